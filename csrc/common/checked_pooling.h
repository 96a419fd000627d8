// What memory safety needs of a pooling's operands; pyext/ops/relu_max_pool2d.py says it in better
// words. For every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "pooling.h"

namespace pyext {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Of an input of height x width; `planes` has the leading dimensions of the operands.
inline Pooling checked_pooling(const char* op, const Tensor& planes, int64_t height, int64_t width,
                               const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                  ": kernel_size, stride and padding are pairs");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(kernel[i] > 0 && kernel[i] <= kNowhere && stride[i] > 0 && padding[i] >= 0 &&
                        2 * padding[i] <= kernel[i],
                    op, ": kernel_size, stride or padding is out of range");
  STD_TORCH_CHECK(kernel[0] * kernel[1] <= kNowhere, op, ": at most 255 elements to a window");
  const auto windows = [&](int64_t n, int i) {
    const int64_t last = n + 2 * padding[i] - kernel[i];
    STD_TORCH_CHECK(n > 0 && last >= 0, op, ": a window does not fit into the input");
    return last / stride[i] + 1;
  };
  int64_t count = 1;
  for (int64_t d = 0; d < planes.dim() - 2; ++d) count *= planes.size(d);
  return {count,     height,    width,     windows(height, 0), windows(width, 1), kernel[0],
          kernel[1], stride[0], stride[1], padding[0],         padding[1]};
}

// The same of an input itself.
inline Pooling checked_pooling(const char* op, const Tensor& input, const Sizes& kernel,
                               const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(input.dim() >= 2, op, ": operands are planes");
  return checked_pooling(op, input, input.size(-2), input.size(-1), kernel, stride, padding);
}

// The same of the input whose windows `grad` has.
inline Pooling checked_unpooling(const char* op, const Tensor& grad, int64_t height, int64_t width,
                                 const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(grad.dim() >= 2, op, ": operands are planes");
  const Pooling p = checked_pooling(op, grad, height, width, kernel, stride, padding);
  STD_TORCH_CHECK(grad.size(-2) == p.out_height && grad.size(-1) == p.out_width, op,
                  ": grad must have one element for each window");
  return p;
}

inline Sizes with_last_two(const Tensor& like, int64_t height, int64_t width) {
  const auto sizes = like.sizes();
  Sizes changed(sizes.begin(), sizes.end() - 2);
  changed.push_back(height);
  changed.push_back(width);
  return changed;
}

inline void check_index(const char* op, const Tensor& index, const Tensor& operand,
                        const Pooling& p) {
  using torch::headeronly::ScalarType;
  const Sizes expected = with_last_two(operand, p.out_height, p.out_width);
  const auto sizes = index.sizes();
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Byte &&
                      index.is_cuda() == operand.is_cuda() &&
                      index.get_device_index() == operand.get_device_index() &&
                      Sizes(sizes.begin(), sizes.end()) == expected,
                  op, ": index must be uint8 with one element for each window");
}

}  // namespace pyext
