// CUDA implementation of two_layer_sgd_step.
#include "common/tensor.h"

#include "common/register_product.h"
#include "common/two_layer_instances.h"
#include "../common/updatable.h"
#include "common/two_layer_tensors.h"
#include "two_layer_sgd_step.cuh"
namespace pyext {

#define PYEXT_DECLARE(T)              \
  PYEXT_TWO_LAYER_INSTANCE(extern, T) \
  PYEXT_TWO_LAYER_MSE_LOSS_INSTANCE(extern, T)
PYEXT_FOR_EACH_FLOATING(PYEXT_DECLARE)
#define PYEXT_DEFINE(T) PYEXT_SGD_STEP_INSTANCE(, T)
PYEXT_FOR_EACH_FLOATING(PYEXT_DEFINE)

namespace {

constexpr std::size_t SHARED = MOST_SHARED_BYTES;
#define PYEXT_REGISTER(T)                                                                \
  PYEXT_REGISTER_PRODUCT(T, UpdateWeight<T>)                                             \
  PYEXT_REGISTER_KERNEL(sgd_steps_kernel<T>, (sgd_steps_shape(1, SHARED)),               \
                        sgd_steps_limits<T>());                                          \
  PYEXT_REGISTER_KERNEL(sgd_multiply_kernel<T>, (sgd_part_shape(1, SHARED, false)),      \
                        sgd_multiply_limits<T>());                                       \
  PYEXT_REGISTER_KERNEL(sgd_add_kernel<T>, (sgd_part_shape(1, SHARED, true)),            \
                        sgd_steps_limits<T>());                                          \
  PYEXT_REGISTER_KERNEL(sgd_update_kernel<T>, (sgd_part_shape(1, SHARED, true)),         \
                        sgd_update_limits<T>());
PYEXT_FOR_EACH_FLOATING(PYEXT_REGISTER)
PYEXT_REGISTER_TILE(float, LargeTile, UpdateWeight<float>);

Tensor two_layer_sgd_step_op(const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& w2,
                             double lr) {
  const char* op = "two_layer_sgd_step";
  const TwoLayerSize size = checked_size(op, x, w1, w2);
  check_shape(op, "y", y, size.batch, size.out);
  check_matches(op, "y", y, x);
  check_updatable(op, {&w1, &w2}, {&x, &y});
  const OnDeviceOf device(x);
  const Tensor loss = torch::stable::new_empty(x, {});
  TensorScratch scratch(x);
  dispatch_floating(op, x.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    two_layer_sgd_step(sgd_way<T>(size), size, const_matrix<T>(x), const_matrix<T>(y),
                       mutable_matrix<T>(w1), mutable_matrix<T>(w2), lr, mutable_data<T>(loss),
                       scratch, device.stream);
  });
  return loss;
}

PYEXT_KERNEL_LIBRARY(m) {
  m.impl("two_layer_sgd_step", TORCH_BOX(&two_layer_sgd_step_op));
}

}  // namespace
}  // namespace pyext
