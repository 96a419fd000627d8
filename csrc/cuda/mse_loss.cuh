// Mean squared error: loss = (input - target)^2, or its sum, or its mean over all n elements;
// grad_input = grad * 2 * (input - target) [/ n].
//
// Bytes moved: forward 2n elements (3n without reduction), backward 3n (4n where grad has n
// elements). Launch: 256 threads, four 16-byte vectors per thread and input. The reduction has two
// stages in a fixed order; its block count depends on n alone, so that every device agrees.
#pragma once

#include "common/elementwise.cuh"
#include "common/reduce.cuh"

namespace pyext {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// Enough blocks that the last wave is a small part on any device (132 SMs hold 1056 of them), few
// enough that the second stage stays a single short block.
constexpr int64_t MOST_LOSS_PARTIALS = 4096;

struct SquaredError {
  template <class T>
  __device__ T operator()(T input, T target) const {
    const auto difference = to_accumulate(input) - to_accumulate(target);
    return from_accumulate<T>(difference * difference);
  }
};

// `scale` is 2 or 2 / n.
template <class Acc>
struct SquaredErrorGradient {
  Acc scale;

  template <class T>
  __device__ T operator()(T input, T target, T grad) const {
    const Acc difference = to_accumulate(input) - to_accumulate(target);
    return from_accumulate<T>(to_accumulate(grad) * scale * difference);
  }
};

template <class T, int Width>
constexpr KernelLimits mse_loss_elementwise_limits() {
  return elementwise_limits<T, Width, 2>();
}

template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    mse_loss_elementwise_kernel(const T* input, const T* target, T* loss, int64_t n) {
  map_elements<Width>(SquaredError{}, n, loss, input, target);
}

template <class T, int Width>
LaunchShape mse_loss_partial_shape(int64_t n) {
  LaunchShape shape = elementwise_shape(n, Width);
  shape.grid.x = static_cast<unsigned>(std::min<int64_t>(shape.grid.x, MOST_LOSS_PARTIALS));
  shape.shared_bytes = block_sum_bytes<Accumulate<T>>(ELEMENTWISE_THREADS);
  return shape;
}

template <class T, int Width>
constexpr KernelLimits mse_loss_partial_limits() {
  KernelLimits limits = elementwise_limits<T, Width, 2>(/*stores_vectors=*/false);
  limits.shared_bytes = block_sum_bytes<Accumulate<T>>(ELEMENTWISE_THREADS);
  return limits;
}

// partials[block] = the block's share of sum (input - target)^2.
template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    mse_loss_partial_kernel(const T* input, const T* target, Accumulate<T>* partials, int64_t n) {
  using Acc = Accumulate<T>;
  const auto squared = [](T a, T b) {
    const Acc difference = to_accumulate(a) - to_accumulate(b);
    return difference * difference;
  };
  const int64_t vectors = n / Width;
  Acc sum = 0;
  for_each_chunk(vectors, [&](int64_t first) {
    Vector<T, Width> inputs[VECTORS_IN_FLIGHT];
    Vector<T, Width> targets[VECTORS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) {
        inputs[i] = load_vector<T, Width>(input + vector * Width);
        targets[i] = load_vector<T, Width>(target + vector * Width);
      }
    }
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      if (first + i * ELEMENTWISE_THREADS < vectors) {
#pragma unroll
        for (int j = 0; j < Width; ++j) sum += squared(inputs[i].at[j], targets[i].at[j]);
      }
    }
  });
  const int64_t tail = vectors * Width + threadIdx.x;
  if (blockIdx.x == 0 && tail < n) sum += squared(input[tail], target[tail]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class T, int Width>
constexpr KernelLimits mse_loss_backward_limits() {
  return elementwise_limits<T, Width, 2>();
}

// grad holds one element.
template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    mse_loss_backward_kernel(const T* grad, const T* input, const T* target, Accumulate<T> scale,
                             T* grad_input, int64_t n) {
  const T one_grad = grad[0];
  const SquaredErrorGradient<Accumulate<T>> gradient{scale};
  map_elements<Width>([=](T a, T b) { return gradient(a, b, one_grad); }, n, grad_input, input,
                      target);
}

template <class T, int Width>
constexpr KernelLimits mse_loss_backward_elementwise_limits() {
  return elementwise_limits<T, Width, 3>();
}

// grad holds n elements.
template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    mse_loss_backward_elementwise_kernel(const T* grad, const T* input, const T* target,
                                         Accumulate<T> scale, T* grad_input, int64_t n) {
  map_elements<Width>(SquaredErrorGradient<Accumulate<T>>{scale}, n, grad_input, input, target,
                      grad);
}

template <class T>
void mse_loss_elementwise(const T* input, const T* target, T* loss, int64_t n,
                          cudaStream_t stream) {
  if (n == 0) return;
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  if (all_aligned_to_16(input, target, loss)) {
    launch(mse_loss_elementwise_kernel<T, width>, elementwise_shape(n, width), stream, input,
           target, loss, n);
  } else {
    launch(mse_loss_elementwise_kernel<T, 1>, elementwise_shape(n, 1), stream, input, target, loss,
           n);
  }
}

// The mean (`mean`) or the sum of the squared errors, into loss[0].
template <class T>
void mse_loss_reduced(const T* input, const T* target, bool mean, T* loss, int64_t n,
                      Scratch& scratch, cudaStream_t stream) {
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  const bool aligned = all_aligned_to_16(input, target);
  const LaunchShape shape =
      aligned ? mse_loss_partial_shape<T, width>(n) : mse_loss_partial_shape<T, 1>(n);
  auto* partials = scratch.allocate<Accumulate<T>>(shape.grid.x);
  if (n > 0) {
    launch(aligned ? mse_loss_partial_kernel<T, width> : mse_loss_partial_kernel<T, 1>, shape,
           stream, input, target, partials, n);
  }
  sum_partials(partials, shape.grid.x, mean, n, loss, stream);
}

// `grad` points to n elements (`grad_is_elementwise`) or to one.
template <class T>
void mse_loss_backward(const T* grad, bool grad_is_elementwise, const T* input, const T* target,
                       bool mean, T* grad_input, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  const auto scale = static_cast<Accumulate<T>>(mean ? 2.0 / static_cast<double>(n) : 2.0);
  const bool aligned = all_aligned_to_16(input, target, grad_input) &&
                       (!grad_is_elementwise || all_aligned_to_16(grad));
  const auto kernel = grad_is_elementwise
                          ? (aligned ? mse_loss_backward_elementwise_kernel<T, width>
                                     : mse_loss_backward_elementwise_kernel<T, 1>)
                          : (aligned ? mse_loss_backward_kernel<T, width>
                                     : mse_loss_backward_kernel<T, 1>);
  launch(kernel, elementwise_shape(n, aligned ? width : 1), stream, grad, input, target, scale,
         grad_input, n);
}

}  // namespace pyext
