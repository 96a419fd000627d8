// CUDA implementation of two_layer_sgd_steps.
#include "common/tensor.h"

#include "common/two_layer_instances.h"
#include "common/two_layer_tensors.h"
#include "two_layer_sgd_steps.cuh"

namespace pyext {

#define PYEXT_DECLARE(T) PYEXT_SGD_STEP_INSTANCE(extern, T)
PYEXT_FOR_EACH_FLOATING(PYEXT_DECLARE)

namespace {

// A batch, or the first one of a batch for each step.
template <class T>
Matrix<const T> first_batch(const Tensor& batches) {
  const int64_t dim = batches.dim();
  return {const_data<T>(batches), batches.stride(dim - 2), batches.stride(dim - 1)};
}

Tensor two_layer_sgd_steps_op(const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& w2,
                              double lr, int64_t steps) {
  const char* op = "two_layer_sgd_steps";
  STD_TORCH_CHECK(steps >= 0, op, ": steps must not be negative");
  const bool many = x.dim() == 3;
  STD_TORCH_CHECK((many || x.dim() == 2) && y.dim() == x.dim() && w1.dim() == 2 && w2.dim() == 2,
                  op, ": x and y must be batches or a batch for each step, w1 and w2 matrices");
  STD_TORCH_CHECK(!many || (x.size(0) == steps && y.size(0) == steps), op,
                  ": there must be a batch for each step");
  const int64_t dim = x.dim();
  const TwoLayerSize size{x.size(dim - 2), x.size(dim - 1), w1.size(1), w2.size(1)};
  check_shape(op, "w1", w1, size.in, size.hidden);
  check_shape(op, "w2", w2, size.hidden, size.out);
  STD_TORCH_CHECK(y.size(dim - 2) == size.batch && y.size(dim - 1) == size.out, op,
                  ": each batch of y must have shape (", size.batch, ", ", size.out, ")");
  check_matches(op, "y", y, x);
  check_matches(op, "w1", w1, x);
  check_matches(op, "w2", w2, x);
  const OnDeviceOf device(x);
  const Tensor losses = torch::stable::new_empty(x, {steps});
  dispatch_floating(op, x.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    const SgdBatches<T> batches{first_batch<T>(x), first_batch<T>(y), many ? x.stride(0) : 0,
                                many ? y.stride(0) : 0};
    two_layer_sgd_steps(
        size, batches, mutable_matrix<T>(w1), mutable_matrix<T>(w2), lr, steps,
        mutable_data<T>(losses),
        [&](const auto& body) {
          TensorScratch scratch(x);
          body(scratch);
        },
        device.stream);
  });
  return losses;
}

PYEXT_KERNEL_LIBRARY(m) {
  m.impl("two_layer_sgd_steps", TORCH_BOX(&two_layer_sgd_steps_op));
}

}  // namespace
}  // namespace pyext
