// One step of Adadelta (Zeiler, 2012, arXiv:1212.5701), in place, in one pass:
//   g           = grad + weight_decay * param
//   square_avg  = rho * square_avg + (1 - rho) * g^2
//   delta       = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
//   acc_delta   = rho * acc_delta + (1 - rho) * delta^2
//   param      -= lr * delta
//
// Bytes moved: reads 4n elements, writes 3n. Launch: 256 threads, four 16-byte vectors per thread
// and operand (elementwise.cuh); one element per access where a pointer is unaligned. Roots and
// quotients are those of IEEE 754, as nvcc makes them by default.
#pragma once

#include <cmath>

#include "common/elementwise.cuh"

namespace pyext {

// `one_less_rho` is 1 - rho before it was rounded to Acc.
template <class Acc>
struct AdadeltaRates {
  Acc lr, rho, one_less_rho, eps, weight_decay;
};

template <class Acc>
AdadeltaRates<Acc> adadelta_rates(double lr, double rho, double eps, double weight_decay) {
  return {static_cast<Acc>(lr), static_cast<Acc>(rho), static_cast<Acc>(1 - rho),
          static_cast<Acc>(eps), static_cast<Acc>(weight_decay)};
}

// Without decay nothing of param may reach the gradient: 0 * inf would be NaN.
template <class T>
__device__ __forceinline__ void adadelta_update(T& param, T grad, T& square_avg, T& acc_delta,
                                                const AdadeltaRates<Accumulate<T>>& rates) {
  using Acc = Accumulate<T>;
  const Acc p = to_accumulate(param);
  Acc g = to_accumulate(grad);
  if (rates.weight_decay != 0) g += rates.weight_decay * p;
  const Acc mean_square = rates.rho * to_accumulate(square_avg) + rates.one_less_rho * (g * g);
  const Acc acc = to_accumulate(acc_delta);
  const Acc delta = std::sqrt(acc + rates.eps) / std::sqrt(mean_square + rates.eps) * g;
  param = from_accumulate<T>(p - rates.lr * delta);
  square_avg = from_accumulate<T>(mean_square);
  acc_delta = from_accumulate<T>(rates.rho * acc + rates.one_less_rho * (delta * delta));
}

// Of the half precisions, one element per access, five blocks on a multiprocessor are enough (sm_100
// takes 42 registers): they keep 41 KB in flight, and an unaligned parameter is rare.
template <class T, int Width>
constexpr KernelLimits adadelta_step_limits() {
  KernelLimits limits = elementwise_limits<T, Width, 4>();
  if (sizeof(T) == 2 && Width == 1) limits.registers = registers_for(5, ELEMENTWISE_THREADS);
  return limits;
}

template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    adadelta_step_kernel(T* param, const T* grad, T* square_avg, T* acc_delta, int64_t n,
                         AdadeltaRates<Accumulate<T>> rates) {
  using Values = Vector<T, Width>;
  const int64_t vectors = n / Width;
  for_each_chunk(vectors, [&](int64_t first) {
    Values params[VECTORS_IN_FLIGHT];
    Values grads[VECTORS_IN_FLIGHT];
    Values square_avgs[VECTORS_IN_FLIGHT];
    Values acc_deltas[VECTORS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) {
        params[i] = load_vector<T, Width>(param + vector * Width);
        grads[i] = load_vector<T, Width>(grad + vector * Width);
        square_avgs[i] = load_vector<T, Width>(square_avg + vector * Width);
        acc_deltas[i] = load_vector<T, Width>(acc_delta + vector * Width);
      }
    }
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) {
#pragma unroll
        for (int j = 0; j < Width; ++j) {
          adadelta_update(params[i].at[j], grads[i].at[j], square_avgs[i].at[j],
                          acc_deltas[i].at[j], rates);
        }
        store_vector(param + vector * Width, params[i]);
        store_vector(square_avg + vector * Width, square_avgs[i]);
        store_vector(acc_delta + vector * Width, acc_deltas[i]);
      }
    }
  });
  const int64_t tail = vectors * Width + threadIdx.x;
  if (blockIdx.x == 0 && tail < n) {
    adadelta_update(param[tail], grad[tail], square_avg[tail], acc_delta[tail], rates);
  }
}

template <class T>
void adadelta_step(T* param, const T* grad, T* square_avg, T* acc_delta, int64_t n,
                   const AdadeltaRates<Accumulate<T>>& rates, cudaStream_t stream) {
  if (n == 0) return;
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  const bool aligned = all_aligned_to_16(param, grad, square_avg, acc_delta);
  launch(aligned ? adadelta_step_kernel<T, width> : adadelta_step_kernel<T, 1>,
         elementwise_shape(n, aligned ? width : 1), stream, param, grad, square_avg, acc_delta, n,
         rates);
}

}  // namespace pyext
