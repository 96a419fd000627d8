// What every op's launch needs of PyTorch's stable ABI: checks for memory safety, layouts, dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../common/layout.h"
#include "buffer.h"

namespace pyext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Elements (or multiply-adds) below which a second thread costs more than it brings; PyTorch's own
// element-wise kernels use the same number.
constexpr int64_t kGrain = 32768;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// What sums of T are kept in.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the C++ type of a floating dtype.
template <class F>
void visit_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(Type<double>{});
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    case ScalarType::Half: return f(Type<Half>{});
    default: STD_TORCH_CHECK(false, op, ": not implemented for ", dtype);
  }
}

// The same for floating and integer dtypes.
template <class F>
void visit_real(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Byte: return f(Type<uint8_t>{});
    case ScalarType::Char: return f(Type<int8_t>{});
    case ScalarType::Short: return f(Type<int16_t>{});
    case ScalarType::Int: return f(Type<int32_t>{});
    case ScalarType::Long: return f(Type<int64_t>{});
    default: return visit_floating(dtype, op, std::forward<F>(f));
  }
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto a_sizes = a.sizes(), b_sizes = b.sizes();
  return std::equal(a_sizes.begin(), a_sizes.end(), b_sizes.begin(), b_sizes.end());
}

inline void check_like(const char* op, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(same_sizes(a, b), op, ": operands differ in shape");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": operands differ in dtype");
  STD_TORCH_CHECK(b.is_cpu(), op, ": operands are on different devices");
}

// Outputs from this size on leave the caches before anyone reads them (a core's share of L3 is 16
// MiB here), so they are written past them.
constexpr int64_t kStreamedBytes = 16 << 20;

inline bool is_streamed(const Tensor& out) {
  return out.numel() * int64_t(out.element_size()) >= kStreamedBytes;
}

using Extents = torch::headeronly::IntHeaderOnlyArrayRef;

// Outputs from this size on lie in blocks of the pool. From PyTorch's allocator large ones are fresh
// pages each time, which the system clears while they are written: torch.relu of 2^24 floats takes
// 24 ms, relu_forward took 15 ms in fresh huge pages and takes 3 ms in a block (two threads, Zen 4).
constexpr int64_t kPooledBytes = BufferPool::kHugePage;

// Elements at `strides`, which leave no gaps, in a block of the pool; it goes back there with the
// last tensor that lies in it. Empty where there is no memory.
inline std::optional<Tensor> pooled(const Tensor& like, Extents sizes, Extents strides,
                                    size_t bytes) {
  BufferPool& pool = BufferPool::instance();
  void* block;
  try {
    block = pool.take(bytes);
  } catch (const std::bad_alloc&) {
    return std::nullopt;
  }
  try {
    return torch::stable::from_blob(block, sizes, strides, like.device(), like.scalar_type(),
                                    [bytes](void* data) {
                                      BufferPool::instance().give_back(data, bytes);
                                    });
  } catch (...) {
    pool.give_back(block, bytes);
    throw;
  }
}

// Uninitialised memory for elements at `strides`, which leave no gaps. What is not pooled comes
// straight from PyTorch's allocator: torch::stable::new_empty and empty_like go through the
// dispatcher, which finds them by their names. With this and in_one_run relu_forward of 4096
// elements takes 2.4 µs instead of 2.8, mse_loss_forward_backward 3.9 instead of 5.9.
inline Tensor fresh(const Tensor& like, Extents sizes, Extents strides) {
  int64_t bytes = like.element_size();
  bool is_too_much = false;  // PyTorch's allocator then says so
  for (const int64_t size : sizes) is_too_much |= __builtin_mul_overflow(bytes, size, &bytes);
  if (!is_too_much && bytes >= kPooledBytes)
    if (auto tensor = pooled(like, sizes, strides, bytes)) return *tensor;
  int32_t dtype, device_type;
  PYEXT_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  PYEXT_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle fresh;
  const AOTITorchError error =
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                               device_type, like.get_device_index(), &fresh);
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 14  // whose checks do not say what went wrong
  if (is_too_much) STD_TORCH_CHECK(!error, "the bytes of a result overflow a 64-bit integer");
  STD_TORCH_CHECK(!error, "cannot allocate memory for a result of ", bytes, " bytes");
#endif
  PYEXT_ERROR_CODE_CHECK(error);
  return Tensor(fresh);
}

// The same without gaps, the last dimension's elements as neighbours.
inline Tensor fresh(const Tensor& like, Extents sizes) {
  constexpr size_t kUsual = 8;
  int64_t usual[kUsual];
  std::vector<int64_t> many(sizes.size() > kUsual ? sizes.size() : 0);
  int64_t* strides = many.empty() ? usual : many.data();
  for (size_t d = sizes.size(); d-- > 0;)
    strides[d] = d + 1 == sizes.size() ? 1 : strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  return fresh(like, sizes, Extents(strides, sizes.size()));
}

inline Tensor fresh_like(const Tensor& t) {
  if (t.is_contiguous()) return fresh(t, t.sizes(), t.strides());
  return fresh(t, t.sizes(), torch::stable::empty_like(t).strides());
}

// `t` itself if it is contiguous, which torch::stable::contiguous would ask the dispatcher, else a
// copy in memory of ours, whose lack is named with every PyTorch.
inline Tensor in_one_run(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor run = fresh(t, t.sizes());
  torch::stable::copy_(run, t);
  return run;
}

}  // namespace pyext
