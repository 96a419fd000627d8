// Between PyTorch and the kernels: the current stream, scratch memory, dispatch by dtype, layouts.
// Uses PyTorch's stable ABI only. To be included before any .cuh.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../../common/layout.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define PYEXT_CHECK_CUDA(call) STD_CUDA_CHECK(call)
// Registers CUDA implementations; the emulator registers the same functions for CPU tensors, in a
// namespace whose schemas pyext/backends.py takes from this one.
#define PYEXT_KERNEL_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m)
#else
#define PYEXT_KERNEL_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pyext_emulated, CPU, m)
#endif

#include "matrix.cuh"

namespace pyext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__CUDACC__)
// Makes the tensor's device current for as long as it lives; `stream` is that device's current one.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    PYEXT_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#else
// As long as it lives, kernels may touch what `allow_access` has named, and nothing else.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) : stream(op_.stream()) {}

 private:
  emulator::Op op_;

 public:
  cudaStream_t stream;
};

// From the tensor's first element to its last.
inline void allow_access(const Tensor& tensor, std::size_t element_bytes, emulator::Memory kind) {
  if (tensor.numel() == 0) return;
  int64_t elements = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
  emulator::allow(tensor.const_data_ptr(), elements * element_bytes, kind);
}
#endif

// From PyTorch's caching allocator, which hands memory out again in the order of the stream.
class TensorScratch : public Scratch {
 public:
  explicit TensorScratch(const Tensor& like) : like_(like) {}

 private:
  void* allocate_bytes(int64_t bytes) override {
    held_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
#if !defined(__CUDACC__)
    allow_access(held_.back(), 1, emulator::Memory::unwritten);
#endif
    return held_.back().mutable_data_ptr();
  }

  const Tensor& like_;
  std::vector<Tensor> held_;
};

template <class T>
struct ElementType {
  using type = T;
};

// Calls body(ElementType<T>{}) with the kernels' own type for a floating dtype.
template <class Body>
void dispatch_floating(const char* op, ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(ElementType<double>{});
    case ScalarType::Float:
      return body(ElementType<float>{});
    case ScalarType::Half:
      return body(ElementType<__half>{});
    case ScalarType::BFloat16:
      return body(ElementType<__nv_bfloat16>{});
    default:
      STD_TORCH_CHECK(false, op, ": the kernel takes float64, float32, bfloat16 and float16, not ",
                      torch::headeronly::toString(dtype));
  }
}

template <class Body>
void dispatch_floating_or_integer(const char* op, ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Byte:
      return body(ElementType<uint8_t>{});
    case ScalarType::Char:
      return body(ElementType<int8_t>{});
    case ScalarType::Short:
      return body(ElementType<int16_t>{});
    case ScalarType::Int:
      return body(ElementType<int32_t>{});
    case ScalarType::Long:
      return body(ElementType<int64_t>{});
    default:
      return dispatch_floating(op, dtype, body);
  }
}

// T is the kernels' type of the tensor's dtype, which the stable ABI's typed accessors do not know.
template <class T>
const T* const_data(const Tensor& tensor) {
#if !defined(__CUDACC__)
  allow_access(tensor, sizeof(T), emulator::Memory::read_only);
#endif
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
#if !defined(__CUDACC__)
  allow_access(tensor, sizeof(T), emulator::Memory::writable);
#endif
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
Matrix<const T> const_matrix(const Tensor& tensor) {
  return {const_data<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

template <class T>
Matrix<T> mutable_matrix(const Tensor& tensor) {
  return {mutable_data<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline void check_matches(const char* op, const char* name, const Tensor& tensor,
                          const Tensor& reference) {
  STD_TORCH_CHECK(tensor.scalar_type() == reference.scalar_type() &&
                      tensor.is_cuda() == reference.is_cuda() &&
                      tensor.get_device_index() == reference.get_device_index(),
                  op, ": ", name, " differs from the first argument in dtype or device");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                        int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, op,
                  ": ", name, " must have shape (", rows, ", ", columns, ")");
}

}  // namespace pyext
