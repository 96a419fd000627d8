// ReLU: out = x < 0 ? 0 : x, so that nan passes and -0.0 stays;  grad_x = out <= 0 ? 0 : grad.
//
// Bytes moved: forward 2n, backward 3n elements. Launch: 256 threads, four 16-byte vectors per
// thread and input (elementwise.cuh); one element per access where a pointer is unaligned.
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

}  // namespace pyext
