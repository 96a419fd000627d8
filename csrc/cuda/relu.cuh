// ReLU: out = x < 0 ? 0 : x, so that nan passes and -0.0 stays;  grad_x = out <= 0 ? 0 : grad.
//
// Bytes moved: forward 2n, backward 3n elements; with a mask, one bit for each element that says
// whether grad passes, 2n elements and n/8 bytes each way. Launch: 256 threads, four 16-byte vectors
// per thread and input (elementwise.cuh); one element per access where a pointer is unaligned.
#pragma once

#include "common/elementwise.cuh"

namespace pyext {

struct ReluForward {
  template <class T>
  __device__ T operator()(T x) const {
    if constexpr (std::is_unsigned_v<T>) {
      return x;
    } else if constexpr (std::is_integral_v<T>) {
      return x < T(0) ? T(0) : x;
    } else {
      return to_accumulate(x) < 0 ? from_accumulate<T>(0) : x;
    }
  }
};

struct ReluBackward {
  template <class T>
  __device__ T operator()(T grad, T out) const {
    return to_accumulate(out) <= 0 ? from_accumulate<T>(0) : grad;
  }
};

// Two blocks per multiprocessor are enough for bytes, 16 to a vector: taking them apart costs 80 to
// 96 registers, and the 32 KiB then in flight feed sm_80 and sm_90 (3.35 TB/s over 132
// multiprocessors: 25 KB). Nobody trains on bytes.
template <class T, int Width>
constexpr KernelLimits relu_forward_limits() {
  KernelLimits limits = elementwise_limits<T, Width, 1>();
  if (sizeof(T) == 1 && Width > 1) limits.registers = registers_for(2, ELEMENTWISE_THREADS);
  return limits;
}

template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    relu_forward_kernel(const T* x, T* out, int64_t n) {
  map_elements<Width>(ReluForward{}, n, out, x);
}

template <class T, int Width>
constexpr KernelLimits relu_backward_limits() {
  return elementwise_limits<T, Width, 2>();
}

template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    relu_backward_kernel(const T* grad, const T* out, T* grad_x, int64_t n) {
  map_elements<Width>(ReluBackward{}, n, grad_x, grad, out);
}

template <class T>
void relu_forward(const T* x, T* out, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  if (all_aligned_to_16(x, out)) {
    launch(relu_forward_kernel<T, width>, elementwise_shape(n, width), stream, x, out, n);
  } else {
    launch(relu_forward_kernel<T, 1>, elementwise_shape(n, 1), stream, x, out, n);
  }
}

template <class T>
void relu_backward(const T* grad, const T* out, T* grad_x, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  if (all_aligned_to_16(grad, out, grad_x)) {
    launch(relu_backward_kernel<T, width>, elementwise_shape(n, width), stream, grad, out, grad_x,
           n);
  } else {
    launch(relu_backward_kernel<T, 1>, elementwise_shape(n, 1), stream, grad, out, grad_x, n);
  }
}

// With a mask: bit i % 8 of mask[i / 8] is 1 where out[i] > 0 or is nan; those behind the last
// element are 0. Neighbouring lanes hold the elements of one byte.
template <int Width>
constexpr int LANES_PER_BYTE = Width < 8 ? 8 / Width : 1;

// Calls visit(first) as for_each_chunk does, but all threads of a block equally often: they meet in
// shuffles. A byte's lanes are all below `vectors` or none is.
template <class Visit>
__device__ __forceinline__ void for_each_chunk_together(int64_t vectors, Visit visit) {
  const int64_t chunk = int64_t{ELEMENTWISE_THREADS} * VECTORS_IN_FLIGHT;
  for (int64_t begin = blockIdx.x * chunk; begin < vectors; begin += gridDim.x * chunk) {
    visit(begin + threadIdx.x);
  }
}

// One element at a time, where a pointer is unaligned, six blocks per multiprocessor have to do:
// the address of its byte takes registers (sm_100: 40).
template <class T, int Width>
constexpr KernelLimits relu_with_mask_limits() {
  KernelLimits limits = elementwise_limits<T, Width, 1>();
  if (Width == 1) limits.registers = registers_for(6, ELEMENTWISE_THREADS);
  return limits;
}

template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    relu_forward_with_mask_kernel(const T* x, T* out, uint8_t* mask, int64_t n) {
  constexpr int lanes = LANES_PER_BYTE<Width>;
  const int64_t vectors = n / 8 * (8 / Width);
  const int lane = threadIdx.x % lanes;
  for_each_chunk_together(vectors, [&](int64_t first) {
    Vector<T, Width> loaded[VECTORS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) loaded[i] = load_vector<T, Width>(x + vector * Width);
    }
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      unsigned passes = 0;
      if (vector < vectors) {
        Vector<T, Width> result;
#pragma unroll
        for (int j = 0; j < Width; ++j) {
          result.at[j] = ReluForward{}(loaded[i].at[j]);
          passes |= unsigned(!(to_accumulate(result.at[j]) <= 0)) << (lane * Width + j);
        }
        store_vector(out + vector * Width, result);
      }
#pragma unroll
      for (int offset = 1; offset < lanes; offset *= 2) {
        passes |= __shfl_xor_sync(FULL_WARP, passes, offset);
      }
      if (lane == 0 && vector < vectors) {
        mask[vector / lanes] = static_cast<uint8_t>(passes);
      }
    }
  });
  if (blockIdx.x == 0 && threadIdx.x == 0 && n % 8 != 0) {
    unsigned passes = 0;
    for (int64_t i = n / 8 * 8; i < n; ++i) {
      out[i] = ReluForward{}(x[i]);
      passes |= unsigned(!(to_accumulate(out[i]) <= 0)) << (i % 8);
    }
    mask[n / 8] = static_cast<uint8_t>(passes);
  }
}

// Told how many blocks must fit: for halves on sm_80 the compiler would rather fit five, and spill.
template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS, Width == 1 ? 6 : 4)
    relu_backward_with_mask_kernel(const T* grad, const uint8_t* mask, T* grad_x, int64_t n) {
  constexpr int lanes = LANES_PER_BYTE<Width>;
  const int64_t vectors = n / 8 * (8 / Width);
  const int lane = threadIdx.x % lanes;
  for_each_chunk(vectors, [&](int64_t first) {
    Vector<T, Width> loaded[VECTORS_IN_FLIGHT];
    unsigned passes[VECTORS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) {
        loaded[i] = load_vector<T, Width>(grad + vector * Width);
        passes[i] = mask[vector / lanes] >> (lane * Width);
      }
    }
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) {
        Vector<T, Width> result;
#pragma unroll
        for (int j = 0; j < Width; ++j) {
          result.at[j] = passes[i] >> j & 1 ? loaded[i].at[j] : from_accumulate<T>(0);
        }
        store_vector(grad_x + vector * Width, result);
      }
    }
  });
  const int64_t tail = n / 8 * 8 + threadIdx.x;
  if (blockIdx.x == 0 && tail < n) {
    grad_x[tail] = mask[tail / 8] >> (tail % 8) & 1 ? grad[tail] : from_accumulate<T>(0);
  }
}

template <class T>
void relu_forward_with_mask(const T* x, T* out, uint8_t* mask, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  if (all_aligned_to_16(x, out)) {
    launch(relu_forward_with_mask_kernel<T, width>, elementwise_shape(n, width), stream, x, out,
           mask, n);
  } else {
    launch(relu_forward_with_mask_kernel<T, 1>, elementwise_shape(n, 1), stream, x, out, mask, n);
  }
}

template <class T>
void relu_backward_with_mask(const T* grad, const uint8_t* mask, T* grad_x, int64_t n,
                             cudaStream_t stream) {
  if (n == 0) return;
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  if (all_aligned_to_16(grad, grad_x)) {
    launch(relu_backward_with_mask_kernel<T, width>, elementwise_shape(n, width), stream, grad,
           mask, grad_x, n);
  } else {
    launch(relu_backward_with_mask_kernel<T, 1>, elementwise_shape(n, 1), stream, grad, mask,
           grad_x, n);
  }
}

}  // namespace pyext
