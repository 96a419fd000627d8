// CUDA implementations of relu_max_pool2d_forward, relu_max_pool2d_backward and
// relu_max_pool2d_gather.
#include "../common/checked_pooling.h"
#include "common/tensor.h"

#include "introspect.h"
#include "relu_max_pool2d.cuh"

namespace pyext {
namespace {

#define PYEXT_REGISTER_POOLING(name, T) \
  PYEXT_REGISTER_KERNEL((name##_kernel<T>), pooling_shape(1), (pooling_limits<T>()));
#define PYEXT_REGISTER_2X2(name, T)                                                           \
  PYEXT_REGISTER_KERNEL((name##_2x2_kernel<T, ELEMENTS_PER_16_BYTES<T>>), pooling_2x2_shape(1), \
                        (name##_2x2_limits<T, ELEMENTS_PER_16_BYTES<T>>()));
#define PYEXT_REGISTER(T)                            \
  PYEXT_REGISTER_POOLING(relu_max_pool2d_forward, T)  \
  PYEXT_REGISTER_POOLING(relu_max_pool2d_backward, T) \
  PYEXT_REGISTER_POOLING(relu_max_pool2d_gather, T)   \
  PYEXT_REGISTER_2X2(relu_max_pool2d_forward, T)      \
  PYEXT_REGISTER_2X2(relu_max_pool2d_backward, T)
PYEXT_REGISTER(double)
PYEXT_REGISTER(float)
PYEXT_REGISTER(__half)
PYEXT_REGISTER(__nv_bfloat16)

std::tuple<Tensor, Tensor> relu_max_pool2d_forward_op(Tensor input, Sizes kernel, Sizes stride,
                                                      Sizes padding) {
  const char* op = "relu_max_pool2d_forward";
  const Pooling p = checked_pooling(op, input, kernel, stride, padding);
  const OnDeviceOf device(input);
  const Tensor dense = torch::stable::contiguous(input);
  const Sizes sizes = with_last_two(input, p.out_height, p.out_width);
  const Tensor out = torch::stable::new_empty(input, sizes);
  const Tensor index = torch::stable::new_empty(input, sizes, ScalarType::Byte);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    relu_max_pool2d_forward(const_data<T>(dense), mutable_data<T>(out),
                            mutable_data<uint8_t>(index), p, device.stream);
  });
  return {out, index};
}

Tensor relu_max_pool2d_backward_op(Tensor grad, Tensor index, Sizes kernel, Sizes stride,
                                   Sizes padding, int64_t height, int64_t width) {
  const char* op = "relu_max_pool2d_backward";
  const Pooling p = checked_unpooling(op, grad, height, width, kernel, stride, padding);
  check_index(op, index, grad, p);
  const OnDeviceOf device(grad);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Tensor dense_index = torch::stable::contiguous(index);
  const Tensor grad_input = torch::stable::new_empty(grad, with_last_two(grad, height, width));
  dispatch_floating(op, grad.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    relu_max_pool2d_backward(const_data<T>(dense_grad), const_data<uint8_t>(dense_index),
                             mutable_data<T>(grad_input), p, device.stream);
  });
  return grad_input;
}

Tensor relu_max_pool2d_gather_op(Tensor input, Tensor index, Sizes kernel, Sizes stride,
                                 Sizes padding) {
  const char* op = "relu_max_pool2d_gather";
  const Pooling p = checked_pooling(op, input, kernel, stride, padding);
  check_index(op, index, input, p);
  const OnDeviceOf device(input);
  const Tensor dense = torch::stable::contiguous(input);
  const Tensor dense_index = torch::stable::contiguous(index);
  const Tensor out =
      torch::stable::new_empty(input, with_last_two(input, p.out_height, p.out_width));
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    relu_max_pool2d_gather(const_data<T>(dense), const_data<uint8_t>(dense_index),
                           mutable_data<T>(out), p, device.stream);
  });
  return out;
}

PYEXT_KERNEL_LIBRARY(m) {
  m.impl("relu_max_pool2d_forward", TORCH_BOX(&relu_max_pool2d_forward_op));
  m.impl("relu_max_pool2d_backward", TORCH_BOX(&relu_max_pool2d_backward_op));
  m.impl("relu_max_pool2d_gather", TORCH_BOX(&relu_max_pool2d_gather_op));
}

}  // namespace
}  // namespace pyext
