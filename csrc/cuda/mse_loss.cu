// CUDA implementations of mse_loss_forward and mse_loss_backward.
#include "common/tensor.h"

#include "introspect.h"
#include "mse_loss.cuh"

namespace pyext {
namespace {

#define PYEXT_REGISTER_WIDTH(T, width)                                                        \
  PYEXT_REGISTER_KERNEL((mse_loss_elementwise_kernel<T, width>), elementwise_shape(1, width), \
                        (mse_loss_elementwise_limits<T, width>()));                           \
  PYEXT_REGISTER_KERNEL((mse_loss_partial_kernel<T, width>),                                  \
                        (mse_loss_partial_shape<T, width>(1)),                                \
                        (mse_loss_partial_limits<T, width>()));                               \
  PYEXT_REGISTER_KERNEL((mse_loss_backward_kernel<T, width>), elementwise_shape(1, width),    \
                        (mse_loss_backward_limits<T, width>()));                              \
  PYEXT_REGISTER_KERNEL((mse_loss_backward_elementwise_kernel<T, width>),                     \
                        elementwise_shape(1, width),                                          \
                        (mse_loss_backward_elementwise_limits<T, width>()));
#define PYEXT_REGISTER(T)                             \
  PYEXT_REGISTER_WIDTH(T, (ELEMENTS_PER_16_BYTES<T>)) \
  PYEXT_REGISTER_WIDTH(T, 1)                          \
  PYEXT_REGISTER_KERNEL(sum_partials_kernel<T>, sum_partials_shape<T>(), sum_partials_limits<T>());
PYEXT_REGISTER(double)
PYEXT_REGISTER(float)
PYEXT_REGISTER(__half)
PYEXT_REGISTER(__nv_bfloat16)

Reduction checked_reduction(const char* op, int64_t reduction) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, op,
                  ": reduction must be 0 (none), 1 (mean) or 2 (sum), not ", reduction);
  return static_cast<Reduction>(reduction);
}

Tensor mse_loss_forward_op(const Tensor& input, const Tensor& target, int64_t reduction_code) {
  const Reduction reduction = checked_reduction("mse_loss_forward", reduction_code);
  STD_TORCH_CHECK(same_sizes(input, target),
                  "mse_loss_forward: input and target must have the same shape");
  check_matches("mse_loss_forward", "target", target, input);
  const OnDeviceOf device(input);
  const Tensor dense_input = torch::stable::contiguous(input);
  const Tensor dense_target = torch::stable::contiguous(target);
  const Tensor loss = reduction == Reduction::none
                          ? torch::stable::empty_like(dense_input)
                          : torch::stable::new_empty(input, {});
  TensorScratch scratch(input);
  dispatch_floating("mse_loss_forward", input.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    const T* inputs = const_data<T>(dense_input);
    const T* targets = const_data<T>(dense_target);
    if (reduction == Reduction::none) {
      mse_loss_elementwise(inputs, targets, mutable_data<T>(loss), input.numel(), device.stream);
    } else {
      mse_loss_reduced(inputs, targets, reduction == Reduction::mean, mutable_data<T>(loss),
                       input.numel(), scratch, device.stream);
    }
  });
  return loss;
}

// Whether every element of the tensor lies at the same address, as in an expanded scalar.
bool is_one_value(const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != 0) return false;
  }
  return true;
}

Tensor mse_loss_backward_op(const Tensor& grad, const Tensor& input, const Tensor& target,
                            int64_t reduction_code) {
  const Reduction reduction = checked_reduction("mse_loss_backward", reduction_code);
  STD_TORCH_CHECK(same_sizes(input, target),
                  "mse_loss_backward: input and target must have the same shape");
  STD_TORCH_CHECK(reduction == Reduction::none ? same_sizes(grad, input) : grad.numel() == 1,
                  "mse_loss_backward: grad must have the shape of the loss");
  check_matches("mse_loss_backward", "target", target, input);
  check_matches("mse_loss_backward", "grad", grad, input);
  const OnDeviceOf device(input);
  const Tensor dense_input = torch::stable::contiguous(input);
  const Tensor dense_target = torch::stable::contiguous(target);
  const bool grad_is_elementwise = !is_one_value(grad);
  const Tensor dense_grad = grad_is_elementwise ? torch::stable::contiguous(grad) : grad;
  const Tensor grad_input = torch::stable::empty_like(dense_input);
  dispatch_floating("mse_loss_backward", input.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    mse_loss_backward(const_data<T>(dense_grad), grad_is_elementwise, const_data<T>(dense_input),
                      const_data<T>(dense_target), reduction == Reduction::mean,
                      mutable_data<T>(grad_input), input.numel(), device.stream);
  });
  return grad_input;
}

PYEXT_KERNEL_LIBRARY(m) {
  m.impl("mse_loss_forward", TORCH_BOX(&mse_loss_forward_op));
  m.impl("mse_loss_backward", TORCH_BOX(&mse_loss_backward_op));
}

}  // namespace
}  // namespace pyext
