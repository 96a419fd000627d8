// CUDA implementations of relu_max_pool2d_forward, relu_max_pool2d_backward and
// relu_max_pool2d_gather.
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

using Sizes = std::vector<int64_t>;

// What memory safety needs of the sizes; pyext/ops/relu_max_pool2d.py says it in better words.
// `planes` has the leading dimensions of the operands.
Pooling pooling(const char* op, const Tensor& planes, int64_t height, int64_t width,
                const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(planes.dim() >= 2, op, ": operands are planes");
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                  ": kernel_size, stride and padding are pairs");
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel[i] > 0 && kernel[i] <= NOWHERE && stride[i] > 0 && padding[i] >= 0 &&
                        2 * padding[i] <= kernel[i],
                    op, ": kernel_size, stride or padding is out of range");
  }
  STD_TORCH_CHECK(kernel[0] * kernel[1] <= NOWHERE, op, ": at most 255 elements to a window");
  const auto windows = [&](int64_t n, int i) {
    const int64_t last = n + 2 * padding[i] - kernel[i];
    STD_TORCH_CHECK(n > 0 && last >= 0, op, ": a window does not fit into the input");
    return last / stride[i] + 1;
  };
  int64_t count = 1;
  for (int64_t i = 0; i < planes.dim() - 2; ++i) count *= planes.size(i);
  return {count,     height,    width,     windows(height, 0), windows(width, 1), kernel[0],
          kernel[1], stride[0], stride[1], padding[0],         padding[1]};
}

Sizes with_last_two(const Tensor& like, int64_t height, int64_t width) {
  Sizes sizes;
  for (int64_t i = 0; i < like.dim() - 2; ++i) sizes.push_back(like.size(i));
  sizes.push_back(height);
  sizes.push_back(width);
  return sizes;
}

void check_index(const char* op, const Tensor& index, const Tensor& operand, const Sizes& sizes) {
  bool fits = index.scalar_type() == ScalarType::Byte &&
              index.is_cuda() == operand.is_cuda() &&
              index.get_device_index() == operand.get_device_index() &&
              index.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; fits && i < index.dim(); ++i) fits = index.size(i) == sizes[i];
  STD_TORCH_CHECK(fits, op, ": index must be uint8 with one element for each window");
}

std::tuple<Tensor, Tensor> relu_max_pool2d_forward_op(Tensor input, Sizes kernel, Sizes stride,
                                                      Sizes padding) {
  const char* op = "relu_max_pool2d_forward";
  STD_TORCH_CHECK(input.dim() >= 2, op, ": operands are planes");
  const Pooling p = pooling(op, input, input.size(-2), input.size(-1), kernel, stride, padding);
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
  const Pooling p = pooling(op, grad, height, width, kernel, stride, padding);
  STD_TORCH_CHECK(grad.size(-2) == p.out_height && grad.size(-1) == p.out_width, op,
                  ": grad must have one element for each window");
  check_index(op, index, grad, with_last_two(grad, p.out_height, p.out_width));
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
  STD_TORCH_CHECK(input.dim() >= 2, op, ": operands are planes");
  const Pooling p = pooling(op, input, input.size(-2), input.size(-1), kernel, stride, padding);
  const Sizes sizes = with_last_two(input, p.out_height, p.out_width);
  check_index(op, index, input, sizes);
  const OnDeviceOf device(input);
  const Tensor dense = torch::stable::contiguous(input);
  const Tensor dense_index = torch::stable::contiguous(index);
  const Tensor out = torch::stable::new_empty(input, sizes);
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
