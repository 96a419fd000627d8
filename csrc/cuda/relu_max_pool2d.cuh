// ReLU and max-pooling: out = max of (x < 0 ? 0 : x) over each window, and where in it that is
// (index, one byte; 255 where it is not above 0). Backward: each element of the input adds up the
// gradients of the windows whose maximum it is, in their order: every result has one writer, and no
// atomic is needed. gather, its transpose: x at each window's maximum.
//
// Bytes moved with windows of 2 x 2: forward n + n / 4 elements and n / 4 bytes, backward the same.
// Launch: 256 threads. 2 x 2 windows that tile rows of whole 16-byte vectors: each thread takes, of
// two rows each, VECTOR_PAIRS vectors; any other: a thread for each result, whose neighbours take
// what lies beside it.
#pragma once

#include "../common/pooling.h"
#include "common/elementwise.cuh"

namespace pyext {

constexpr int VECTOR_PAIRS = 2;  // in flight for each thread

// The winner so far. As in PyTorch, the first of equal numbers wins, and the last NaN.
template <class Acc>
struct Maximum {
  Acc value = -1;
  int position = 0;

  __device__ __forceinline__ void offer(Acc x, int at) {
    const Acc candidate = x < 0 ? Acc(0) : x;
    const bool wins = candidate > value || candidate != candidate;
    value = wins ? candidate : value;
    position = wins ? at : position;
  }
  __device__ __forceinline__ uint8_t index() const {
    return static_cast<uint8_t>(value <= 0 ? kNowhere : position);
  }
};

// One result for each thread; the grid-stride loop takes over where the grid would get too long.
inline LaunchShape pooling_shape(int64_t results) {
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(results, ELEMENTWISE_THREADS),
                                           int64_t{1} << 20);
  return {dim3(static_cast<unsigned>(blocks)), dim3(ELEMENTWISE_THREADS)};
}

// Calls visit(i) for this thread's results.
template <class Visit>
__device__ __forceinline__ void for_each_result(int64_t results, Visit visit) {
  const int64_t threads = int64_t{gridDim.x} * ELEMENTWISE_THREADS;
  for (int64_t i = int64_t{blockIdx.x} * ELEMENTWISE_THREADS + threadIdx.x; i < results;
       i += threads) {
    visit(i);
  }
}

// Element by element, mostly of windows that overlap, whose elements come from the caches.
template <class T>
constexpr KernelLimits pooling_limits() {
  return {.registers = registers_for(4, ELEMENTWISE_THREADS),
          .load_bytes = static_cast<int>(sizeof(T)),
          .store_bytes = static_cast<int>(sizeof(T)),
          .shared_bytes = 0};
}

template <class T>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    relu_max_pool2d_forward_kernel(const T* input, T* out, uint8_t* index, Pooling p) {
  for_each_result(p.windows(), [&](int64_t window) {
    const int64_t row = window / p.out_width;
    const int64_t top = row % p.out_height * p.stride_height - p.padding_height;
    const int64_t left = window % p.out_width * p.stride_width - p.padding_width;
    const T* plane = input + row / p.out_height * p.height * p.width;
    Maximum<Accumulate<T>> best;
    int position = 0;
    for (int64_t y = top; y < top + p.kernel_height; ++y) {
      for (int64_t x = left; x < left + p.kernel_width; ++x, ++position) {
        if (y >= 0 && y < p.height && x >= 0 && x < p.width) {
          best.offer(to_accumulate(plane[y * p.width + x]), position);
        }
      }
    }
    out[window] = from_accumulate<T>(best.value);
    index[window] = best.index();
  });
}

// The first window that reaches `at`, an offset from the first window's beginning.
__device__ __forceinline__ int64_t first_window(int64_t at, int64_t kernel, int64_t stride) {
  return at < kernel ? 0 : (at - kernel) / stride + 1;
}

// Told that four blocks are enough: for sm_100 the compiler would rather fit eight, and spill.
template <class T>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS, 4)
    relu_max_pool2d_backward_kernel(const T* grad, const uint8_t* index, T* grad_input,
                                    Pooling p) {
  for_each_result(p.elements(), [&](int64_t element) {
    const int64_t line = element / p.width;
    const int64_t y = line % p.height + p.padding_height;
    const int64_t x = element % p.width + p.padding_width;
    const int64_t first_row = first_window(y, p.kernel_height, p.stride_height);
    const int64_t first_column = first_window(x, p.kernel_width, p.stride_width);
    const int64_t plane = line / p.height * p.out_height;
    Accumulate<T> sum = 0;
    for (int64_t row = first_row; row < p.out_height && row * p.stride_height <= y; ++row) {
      const int64_t windows = (plane + row) * p.out_width;
      const int64_t position = (y - row * p.stride_height) * p.kernel_width + x;
      for (int64_t column = first_column; column < p.out_width && column * p.stride_width <= x;
           ++column) {
        if (index[windows + column] == position - column * p.stride_width) {
          sum += to_accumulate(grad[windows + column]);
        }
      }
    }
    grad_input[element] = from_accumulate<T>(sum);
  });
}

// A position beyond the plane, which no forward writes, reads nothing.
template <class T>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    relu_max_pool2d_gather_kernel(const T* input, const uint8_t* index, T* out, Pooling p) {
  for_each_result(p.windows(), [&](int64_t window) {
    const int position = index[window], kernel_width = static_cast<int>(p.kernel_width);
    const int64_t row = window / p.out_width;
    const int64_t y =
        row % p.out_height * p.stride_height - p.padding_height + position / kernel_width;
    const int64_t x =
        window % p.out_width * p.stride_width - p.padding_width + position % kernel_width;
    const bool inside =
        position != kNowhere && y >= 0 && y < p.height && x >= 0 && x < p.width;
    const T* plane = input + row / p.out_height * p.height * p.width;
    out[window] = inside ? plane[y * p.width + x] : from_accumulate<T>(0);
  });
}

// --- 2 x 2 windows over rows of whole vectors -----------------------------------------------------

inline LaunchShape pooling_2x2_shape(int64_t pairs) {
  return pooling_shape(ceil_div<int64_t>(pairs, VECTOR_PAIRS));
}

// A thread has VECTOR_PAIRS times `loads` loads of `load_bytes` in flight.
constexpr KernelLimits pooling_2x2_limits(int loads, int load_bytes, int store_bytes) {
  const int block_bytes = ELEMENTWISE_THREADS * VECTOR_PAIRS * loads * load_bytes;
  return {.registers = registers_for(blocks_in_flight(block_bytes, 4), ELEMENTWISE_THREADS),
          .load_bytes = load_bytes,
          .store_bytes = store_bytes,
          .shared_bytes = 0};
}

// Of pair `pair` of vectors: where its upper one begins, and the first of its windows.
struct VectorPair {
  int64_t element, window;
  bool whole;  // not in the last of an odd number of rows, which has no window
};

template <int Width>
__device__ __forceinline__ VectorPair vector_pair(int64_t pair, const Pooling& p) {
  const int64_t vectors = p.width / Width;
  const int64_t row = pair / vectors, column = pair % vectors;  // of pairs, through all planes
  int64_t input_row = 2 * row, window_row = row;
  bool whole = true;
  if (p.height % 2 != 0) {
    const int64_t plane = row / (p.out_height + 1);
    whole = row % (p.out_height + 1) < p.out_height;
    input_row -= plane;
    window_row -= plane;
  }
  return {input_row * p.width + column * Width, window_row * p.out_width + column * (Width / 2),
          whole};
}

inline int64_t vector_pairs(const Pooling& p, int width) {
  return p.planes * ceil_div<int64_t>(p.height, 2) * (p.width / width);
}

template <class T, int Width>
constexpr KernelLimits relu_max_pool2d_forward_2x2_limits() {
  return pooling_2x2_limits(2, sizeof(T) * Width, sizeof(T) * Width / 2);
}

template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    relu_max_pool2d_forward_2x2_kernel(const T* input, T* out, uint8_t* index, Pooling p,
                                       int64_t pairs) {
  const int64_t step = int64_t{gridDim.x} * ELEMENTWISE_THREADS;
  for (int64_t first = int64_t{blockIdx.x} * ELEMENTWISE_THREADS + threadIdx.x; first < pairs;
       first += step * VECTOR_PAIRS) {
    Vector<T, Width> rows[VECTOR_PAIRS][2];
    VectorPair at[VECTOR_PAIRS];
#pragma unroll
    for (int i = 0; i < VECTOR_PAIRS; ++i) {
      const int64_t pair = first + i * step;
      at[i] = vector_pair<Width>(pair, p);
      at[i].whole = at[i].whole && pair < pairs;
      if (at[i].whole) {
        rows[i][0] = load_vector<T, Width>(input + at[i].element);
        rows[i][1] = load_vector<T, Width>(input + at[i].element + p.width);
      }
    }
#pragma unroll
    for (int i = 0; i < VECTOR_PAIRS; ++i) {
      if (!at[i].whole) continue;
      Vector<T, Width / 2> values;
      Vector<uint8_t, Width / 2> positions;
#pragma unroll
      for (int window = 0; window < Width / 2; ++window) {
        Maximum<Accumulate<T>> best;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          best.offer(to_accumulate(rows[i][j / 2].at[2 * window + j % 2]), j);
        }
        values.at[window] = from_accumulate<T>(best.value);
        positions.at[window] = best.index();
      }
      store_vector(out + at[i].window, values);
      store_vector(index + at[i].window, positions);
    }
  }
}

template <class T, int Width>
constexpr KernelLimits relu_max_pool2d_backward_2x2_limits() {
  return pooling_2x2_limits(1, sizeof(T) * Width / 2, sizeof(T) * Width);
}

template <class T, int Width>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    relu_max_pool2d_backward_2x2_kernel(const T* grad, const uint8_t* index, T* grad_input,
                                        Pooling p, int64_t pairs) {
  const int64_t step = int64_t{gridDim.x} * ELEMENTWISE_THREADS;
  for (int64_t first = int64_t{blockIdx.x} * ELEMENTWISE_THREADS + threadIdx.x; first < pairs;
       first += step * VECTOR_PAIRS) {
    Vector<T, Width / 2> gradients[VECTOR_PAIRS];
    Vector<uint8_t, Width / 2> positions[VECTOR_PAIRS];
    VectorPair at[VECTOR_PAIRS];
#pragma unroll
    for (int i = 0; i < VECTOR_PAIRS; ++i) {
      const int64_t pair = first + i * step;
      at[i] = vector_pair<Width>(pair, p);
      if (pair < pairs && at[i].whole) {
        gradients[i] = load_vector<T, Width / 2>(grad + at[i].window);
        positions[i] = load_vector<uint8_t, Width / 2>(index + at[i].window);
      }
    }
#pragma unroll
    for (int i = 0; i < VECTOR_PAIRS; ++i) {
      if (first + i * step >= pairs) continue;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (row == 1 && !at[i].whole) continue;
        Vector<T, Width> result;
#pragma unroll
        for (int j = 0; j < Width; ++j) {
          const bool chosen = at[i].whole && positions[i].at[j / 2] == 2 * row + j % 2;
          result.at[j] = chosen ? gradients[i].at[j / 2] : from_accumulate<T>(0);
        }
        store_vector(grad_input + at[i].element + row * p.width, result);
      }
    }
  }
}

template <class T>
bool takes_vectors(const Pooling& p, const T* of_elements, const T* of_windows,
                   const uint8_t* index) {
  constexpr int width = ELEMENTS_PER_16_BYTES<T>;
  return p.is_2x2() && p.width % width == 0 && is_aligned(of_elements, 16) &&
         is_aligned(of_windows, 8) && is_aligned(index, width / 2);
}

template <class T>
void relu_max_pool2d_forward(const T* input, T* out, uint8_t* index, const Pooling& p,
                             cudaStream_t stream) {
  if (p.windows() == 0) return;
  if (takes_vectors(p, input, out, index)) {
    constexpr int width = ELEMENTS_PER_16_BYTES<T>;
    const int64_t pairs = vector_pairs(p, width);
    launch(relu_max_pool2d_forward_2x2_kernel<T, width>, pooling_2x2_shape(pairs), stream, input,
           out, index, p, pairs);
  } else {
    launch(relu_max_pool2d_forward_kernel<T>, pooling_shape(p.windows()), stream, input, out, index,
           p);
  }
}

template <class T>
void relu_max_pool2d_backward(const T* grad, const uint8_t* index, T* grad_input, const Pooling& p,
                              cudaStream_t stream) {
  if (p.elements() == 0) return;
  if (takes_vectors(p, static_cast<const T*>(grad_input), grad, index)) {
    constexpr int width = ELEMENTS_PER_16_BYTES<T>;
    const int64_t pairs = vector_pairs(p, width);
    launch(relu_max_pool2d_backward_2x2_kernel<T, width>, pooling_2x2_shape(pairs), stream, grad,
           index, grad_input, p, pairs);
  } else {
    launch(relu_max_pool2d_backward_kernel<T>, pooling_shape(p.elements()), stream, grad, index,
           grad_input, p);
  }
}

template <class T>
void relu_max_pool2d_gather(const T* input, const uint8_t* index, T* out, const Pooling& p,
                            cudaStream_t stream) {
  if (p.windows() == 0) return;
  launch(relu_max_pool2d_gather_kernel<T>, pooling_shape(p.windows()), stream, input, index, out,
         p);
}

}  // namespace pyext
