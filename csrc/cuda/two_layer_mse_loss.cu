// CUDA implementation of two_layer_mse_loss_forward.
#include "common/tensor.h"

#include "common/register_product.h"
#include "common/two_layer_instances.h"
#include "common/two_layer_tensors.h"

namespace pyext {

#define PYEXT_DECLARE(T) PYEXT_TWO_LAYER_INSTANCE(extern, T)
PYEXT_FOR_EACH_FLOATING(PYEXT_DECLARE)
#define PYEXT_DEFINE(T) PYEXT_TWO_LAYER_MSE_LOSS_INSTANCE(, T)
PYEXT_FOR_EACH_FLOATING(PYEXT_DEFINE)

namespace {

#define PYEXT_REGISTER(T) PYEXT_REGISTER_PRODUCT(T, StoreLoss<T>)
PYEXT_FOR_EACH_FLOATING(PYEXT_REGISTER)
PYEXT_REGISTER_TILE(float, LargeTile, StoreLoss<float>);

std::tuple<Tensor, Tensor, Tensor> two_layer_mse_loss_forward_op(
    const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& w2,
    const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, int64_t reduction_code) {
  const char* op = "two_layer_mse_loss_forward";
  const TwoLayerSize size = checked_size(op, x, w1, w2);
  check_shape(op, "y", y, size.batch, size.out);
  check_matches(op, "y", y, x);
  check_bias(op, "b1", b1, size.hidden, x);
  check_bias(op, "b2", b2, size.out, x);
  STD_TORCH_CHECK(reduction_code >= 0 && reduction_code <= 2, op,
                  ": reduction must be 0 (none), 1 (mean) or 2 (sum), not ", reduction_code);
  const Reduction reduction = static_cast<Reduction>(reduction_code);
  const OnDeviceOf device(x);
  const Tensor hidden = torch::stable::new_empty(x, {size.batch, size.hidden});
  const Tensor difference = torch::stable::new_empty(x, {size.batch, size.out});
  const Tensor loss = reduction == Reduction::none
                          ? torch::stable::new_empty(x, {size.batch, size.out})
                          : torch::stable::new_empty(x, {});
  TensorScratch scratch(x);
  dispatch_floating(op, x.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    two_layer_mse_loss_forward(size, const_matrix<T>(x), const_matrix<T>(y), const_matrix<T>(w1),
                               bias_of<T>(b1), const_matrix<T>(w2), bias_of<T>(b2), reduction,
                               mutable_data<T>(hidden), mutable_data<T>(difference),
                               mutable_data<T>(loss), scratch, device.stream);
  });
  return {loss, hidden, difference};
}

PYEXT_KERNEL_LIBRARY(m) {
  m.impl("two_layer_mse_loss_forward", TORCH_BOX(&two_layer_mse_loss_forward_op));
}

}  // namespace
}  // namespace pyext
