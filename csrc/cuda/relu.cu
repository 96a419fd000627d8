// CUDA implementations of relu_forward and relu_backward, and of both with a mask.
#include "common/tensor.h"

#include "introspect.h"
#include "relu.cuh"

namespace pyext {
namespace {

#define PYEXT_REGISTER_WIDTH(name, T, width)                                    \
  PYEXT_REGISTER_KERNEL((name##_kernel<T, width>), elementwise_shape(1, width), \
                        (name##_limits<T, width>()));
#define PYEXT_REGISTER(name, T)                             \
  PYEXT_REGISTER_WIDTH(name, T, (ELEMENTS_PER_16_BYTES<T>)) \
  PYEXT_REGISTER_WIDTH(name, T, 1)
PYEXT_REGISTER(relu_forward, double)
PYEXT_REGISTER(relu_forward, float)
PYEXT_REGISTER(relu_forward, __half)
PYEXT_REGISTER(relu_forward, __nv_bfloat16)
PYEXT_REGISTER(relu_forward, uint8_t)
PYEXT_REGISTER(relu_forward, int8_t)
PYEXT_REGISTER(relu_forward, int16_t)
PYEXT_REGISTER(relu_forward, int32_t)
PYEXT_REGISTER(relu_forward, int64_t)
PYEXT_REGISTER(relu_backward, double)
PYEXT_REGISTER(relu_backward, float)
PYEXT_REGISTER(relu_backward, __half)
PYEXT_REGISTER(relu_backward, __nv_bfloat16)

#define PYEXT_REGISTER_MASKED(T, width)                                                    \
  PYEXT_REGISTER_KERNEL((relu_forward_with_mask_kernel<T, width>), elementwise_shape(1, width), \
                        (relu_with_mask_limits<T, width>()));                              \
  PYEXT_REGISTER_KERNEL((relu_backward_with_mask_kernel<T, width>), elementwise_shape(1, width), \
                        (relu_with_mask_limits<T, width>()));
PYEXT_REGISTER_MASKED(double, 2)
PYEXT_REGISTER_MASKED(double, 1)
PYEXT_REGISTER_MASKED(float, 4)
PYEXT_REGISTER_MASKED(float, 1)
PYEXT_REGISTER_MASKED(__half, 8)
PYEXT_REGISTER_MASKED(__half, 1)
PYEXT_REGISTER_MASKED(__nv_bfloat16, 8)
PYEXT_REGISTER_MASKED(__nv_bfloat16, 1)

Tensor relu_forward_op(const Tensor& x) {
  const OnDeviceOf device(x);
  const Tensor out = torch::stable::empty_like(x);
  const Tensor dense = with_strides_of(out, x);
  dispatch_floating_or_integer("relu_forward", x.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    relu_forward(const_data<T>(dense), mutable_data<T>(out), out.numel(), device.stream);
  });
  return out;
}

Tensor relu_backward_op(const Tensor& grad, const Tensor& out) {
  STD_TORCH_CHECK(same_sizes(grad, out), "relu_backward: grad and out must have the same shape");
  check_matches("relu_backward", "out", out, grad);
  const OnDeviceOf device(out);
  const Tensor grad_x = torch::stable::empty_like(out);
  const Tensor dense_grad = with_strides_of(grad_x, grad);
  const Tensor dense_out = with_strides_of(grad_x, out);
  dispatch_floating("relu_backward", out.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    relu_backward(const_data<T>(dense_grad), const_data<T>(dense_out), mutable_data<T>(grad_x),
                  out.numel(), device.stream);
  });
  return grad_x;
}

int64_t mask_bytes(const Tensor& of) { return (of.numel() + 7) / 8; }

std::tuple<Tensor, Tensor> relu_forward_with_mask_op(const Tensor& x) {
  const OnDeviceOf device(x);
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  const Tensor mask = torch::stable::new_empty(x, {mask_bytes(x)}, ScalarType::Byte);
  dispatch_floating("relu_forward_with_mask", x.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    relu_forward_with_mask(const_data<T>(dense), mutable_data<T>(out), mutable_data<uint8_t>(mask),
                           out.numel(), device.stream);
  });
  return {out, mask};
}

Tensor relu_backward_with_mask_op(const Tensor& grad, const Tensor& mask) {
  const char* op = "relu_backward_with_mask";
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.numel() == mask_bytes(grad) &&
                      mask.device() == grad.device(),
                  op, ": mask must hold one bit for each element of grad, as uint8");
  const OnDeviceOf device(grad);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Tensor dense_mask = torch::stable::contiguous(mask);
  const Tensor grad_x = torch::stable::new_empty(grad, grad.sizes());
  dispatch_floating(op, grad.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    relu_backward_with_mask(const_data<T>(dense_grad), const_data<uint8_t>(dense_mask),
                            mutable_data<T>(grad_x), grad.numel(), device.stream);
  });
  return grad_x;
}

PYEXT_KERNEL_LIBRARY(m) {
  m.impl("relu_forward", TORCH_BOX(&relu_forward_op));
  m.impl("relu_backward", TORCH_BOX(&relu_backward_op));
  m.impl("relu_forward_with_mask", TORCH_BOX(&relu_forward_with_mask_op));
  m.impl("relu_backward_with_mask", TORCH_BOX(&relu_backward_with_mask_op));
}

}  // namespace
}  // namespace pyext
