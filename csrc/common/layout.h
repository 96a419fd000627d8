// How tensors lie in memory: what kernels that walk them flat ask for. For every device.
// Uses PyTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

// An error of PyTorch's C functions; where PyTorch's headers can, with its message.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define PYEXT_ERROR_CODE_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else  // PyTorch 2.11
#define PYEXT_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace pyext {

using torch::stable::Tensor;

// Whether two tensors of the same sizes put every element at the same offset.
inline bool same_offsets(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a_strides[d] != b_strides[d]) return false;
  return true;
}

// `t` itself if its strides are `like`'s, else a copy that has them: kernels then walk both flat.
inline Tensor with_strides_of(const Tensor& like, const Tensor& t) {
  if (same_offsets(like, t)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

// (stride, size) of each dimension that has more than one index, the shortest stride first.
inline std::vector<std::pair<int64_t, int64_t>> sorted_steps(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1) steps.emplace_back(strides[d], sizes[d]);
  std::sort(steps.begin(), steps.end());
  return steps;
}

// Whether the elements lie in one run of memory, each once, in whatever order of the dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  int64_t run = 1;
  for (const auto& [stride, size] : sorted_steps(t)) {
    if (stride != run) return false;
    run *= size;
  }
  return true;
}

// Whether a matrix lies by columns, as an nn.Linear's weight.t() does. The gradient of such a weight is
// made by columns as well: else autograd copies it, transposing, to the weight's own layout.
inline bool is_by_columns(const Tensor& matrix) {
  return matrix.stride(0) == 1 && matrix.stride(1) != 1;
}

// A tensor that a kernel updates by walking it flat: the tensor itself where it is dense and laid out
// like `like`, else a dense copy, whose values write_back() takes home.
struct __attribute__((visibility("hidden"))) Updated {
  Tensor home, flat;

  explicit Updated(const Tensor& t)
      : home(t), flat(is_dense(t) ? t : with_strides_of(torch::stable::empty_like(t), t)) {}
  Updated(const Tensor& t, const Updated& like) : home(t), flat(with_strides_of(like.flat, t)) {}

  void write_back() {
    if (flat.get() != home.get()) torch::stable::copy_(home, flat);
  }
};

}  // namespace pyext
