// SGD steps of the two-layer network by slices of w1, on the sum of squared errors:
//   hidden = relu(x @ w1), g = 2 (hidden @ w2 - y), loss = sum(g^2) / 4, d = (g @ w2^T) masked
//   w1 -= lr * x^T @ d,    w2 -= lr * hidden^T @ g
//
// FLOPs 2NH(2I + 3O) a step; from device memory x, y, w1 and w2 once, and w1 and w2 back. Launch: a
// block for every eight rows of w1 and the eight columns of x that go with them. (A block for some
// columns of w1 would read all of x twice a step.) What a block does has three parts: it leaves
// x[:, slice] @ w1[slice]; it adds up its share of the hidden layer over all blocks; with all of the
// hidden layer it computes g and updates its slice of w1. Of the small second layer every block
// computes g itself, but updates its share of w2 alone.
//
// One cooperative launch (`sgd_steps_kernel`) does all steps. The grid meets between the parts, twice
// a step. w1 and a batch that stays the same lie in shared memory from the first step to the last. The
// others read a block's share of w2 after the first meeting of the next step. Nothing is overwritten
// before a meeting that follows its last read, so that no buffer is needed twice.
//
// Where not all blocks can be resident at once, or the device knows no cooperative launch, each part
// is a launch, three for each step, and w2 as it was is kept for the third. The second and the third
// overlap the one before where that is possible: they load what no kernel ahead of them writes.
#pragma once

#include <cooperative_groups.h>

#include "matrix.cuh"
#include "reduce.cuh"
#include "two_layer_size.h"

namespace pyext {

// One batch for all steps, or a batch for each: then `x_stride` and `y_stride` elements further on.
template <class T>
struct SgdBatches {
  Matrix<const T> x;
  Matrix<const T> y;
  int64_t x_stride = 0;
  int64_t y_stride = 0;
};

constexpr int SGD_THREADS = 256;
constexpr int SGD_WARPS = SGD_THREADS / WARP_SIZE;
// Rows of w1 in a block: with a quad of columns they are as many weights as a warp has lanes.
constexpr int SLICE = WARP_SIZE / QUAD;
constexpr int64_t MOST_SLICES = 256;

// Where a block's matrices lie in its shared memory, in elements, and how their rows are padded: an
// odd number of quads (x and the hidden layer, read in quads) or of elements (g) from row to row
// spreads a warp's lanes, each at a row of its own, over the banks.
struct SgdLayout {
  static constexpr int X_LEADING = SLICE + QUAD;
  static constexpr int X = ceil_div(SGD_WARPS, QUAD) * QUAD;  // behind what block_sum overwrites

  int quads, leading, g_leading;  // of a row of the hidden layer, w1 and w2^T; of g
  int w1, w2, g, hidden;
  std::size_t elements;

  // Sizes for which one of the matrices alone would be too much are not asked for.
  __host__ __device__ SgdLayout(int batch, int n_hidden, int out)
      : quads(ceil_div(n_hidden, QUAD)),
        leading(QUAD * (quads | 1)),
        g_leading(out | 1),
        w1(X + batch * X_LEADING),
        w2(w1 + SLICE * leading),
        g(w2 + ceil_div(out, 2) * 2 * leading),
        hidden(g + ceil_div(batch * g_leading, QUAD) * QUAD) {
    const int staged = SGD_THREADS * QUAD;  // add_slices keeps its sums where the hidden layer goes
    elements = hidden + (batch * leading > staged ? batch * leading : staged);
  }
};

inline LaunchShape sgd_steps_shape(int64_t slices, std::size_t shared_bytes) {
  return {dim3(static_cast<unsigned>(slices)), dim3(SGD_THREADS), shared_bytes, true};
}

// Of one of the three launches of a step.
inline LaunchShape sgd_part_shape(int64_t slices, std::size_t shared_bytes,
                                  bool overlaps_previous = true) {
  return {dim3(static_cast<unsigned>(slices)), dim3(SGD_THREADS), shared_bytes, false,
          overlaps_previous};
}

// float64's 32 sums of a thread take twice the registers.
template <class T>
constexpr int SGD_BLOCKS_PER_SM = std::is_same_v<T, double> ? 1 : 2;

template <class T>
constexpr KernelLimits sgd_steps_limits() {
  return {.registers = registers_for(SGD_BLOCKS_PER_SM<T>, SGD_THREADS),
          .load_bytes = 16,
          .store_bytes = 16,
          .shared_bytes = MOST_SHARED_BYTES};
}

// Afterwards lane k's values[0] is the sum of values[k] over the warp, always in the same order. By
// recursion: nvcc does not unroll a loop over halves, and an array with a runtime index is not in
// registers.
template <int Half = WARP_SIZE / 2, class Acc>
__device__ __forceinline__ void scatter_sums(Acc (&values)[WARP_SIZE], int lane) {
  const bool upper = lane & Half;
#pragma unroll
  for (int k = 0; k < Half; ++k) {
    const Acc given = upper ? values[k] : values[k + Half];
    const Acc kept = upper ? values[k + Half] : values[k];
    values[k] = kept + __shfl_xor_sync(FULL_WARP, given, Half);
  }
  if constexpr (Half > 1) scatter_sums<Half / 2>(values, lane);
}

// A weight after its step, as storing it rounds it.
template <class T>
__device__ __forceinline__ Accumulate<T> descend(Accumulate<T> weight, Accumulate<T> lr,
                                                 Accumulate<T> gradient) {
  return to_accumulate(from_accumulate<T>(weight - lr * gradient));
}

// What one block does. All sizes but that of the whole input fit 32 bits (sgd_way).
template <class T>
class SgdBlock {
 public:
  using Acc = Accumulate<T>;

  __device__ SgdBlock(const TwoLayerSize& size)
      : batch_(static_cast<int>(size.batch)),
        n_hidden_(static_cast<int>(size.hidden)),
        out_(static_cast<int>(size.out)),
        first_in_(int64_t{blockIdx.x} * SLICE),
        slice_(static_cast<int>(size.in - first_in_ < SLICE ? size.in - first_in_ : SLICE)),
        layout_(batch_, n_hidden_, out_),
        x_(shared_memory<Acc>() + SgdLayout::X),
        w1_(shared_memory<Acc>() + layout_.w1),
        w2_(shared_memory<Acc>() + layout_.w2),
        g_(shared_memory<Acc>() + layout_.g),
        hidden_(shared_memory<Acc>() + layout_.hidden) {}

  __device__ int hidden_quads() const { return batch_ * layout_.quads; }

  // Zeros where a slice or a row of quads has no more elements.
  __device__ void load_w1(const Matrix<T>& w1) const {
    for (int e = threadIdx.x; e < SLICE * layout_.leading; e += SGD_THREADS) {
      const int i = e / layout_.leading, h = e % layout_.leading;
      w1_[e] = i < slice_ && h < n_hidden_ ? to_accumulate(*w1.at(first_in_ + i, h)) : Acc(0);
    }
  }

  __device__ void store_w1(const Matrix<T>& w1) const {
    for (int e = threadIdx.x; e < slice_ * n_hidden_; e += SGD_THREADS) {
      const int i = e / n_hidden_, h = e % n_hidden_;
      *w1.at(first_in_ + i, h) = from_accumulate<T>(w1_[i * layout_.leading + h]);
    }
  }

  __device__ void load_x(const Matrix<const T>& x) const {
    for (int e = threadIdx.x; e < batch_ * SLICE; e += SGD_THREADS) {
      const int n = e / SLICE, i = e % SLICE;
      x_[n * SgdLayout::X_LEADING + i] =
          i < slice_ ? to_accumulate(*x.at(n, first_in_ + i)) : Acc(0);
    }
  }

  // y lies where g will be: g = 2 (out - y).
  __device__ void load_y(const Matrix<const T>& y) const {
    for (int e = threadIdx.x; e < batch_ * out_; e += SGD_THREADS) {
      const int n = e / out_, o = e % out_;
      g_[n * layout_.g_leading + o] = to_accumulate(*y.at(n, o));
    }
  }

  // This block's share of w2, as the step found it.
  __device__ void copy_w2(const Matrix<T>& w2, T* copy) const {
    const auto [begin, end] = share_of_w2();
    for (int e = begin + threadIdx.x; e < end; e += SGD_THREADS) copy[e] = *w2.at(e / out_, e % out_);
  }

  // Transposed; zeros in the row that pairs of outputs add.
  __device__ void load_w2(const Matrix<const T>& w2) const {
    for (int e = threadIdx.x; e < ceil_div(out_, 2) * 2 * layout_.leading; e += SGD_THREADS) {
      const int o = e / layout_.leading, h = e % layout_.leading;
      w2_[e] = o < out_ && h < n_hidden_ ? to_accumulate(*w2.at(h, o)) : Acc(0);
    }
  }

  // part = x[:, slice] @ w1[slice], in quads. A thread keeps the slice of its columns in registers.
  __device__ void multiply_slice(Acc* part) const {
    const int columns = layout_.quads < SGD_THREADS ? layout_.quads : SGD_THREADS;
    const int rows = SGD_THREADS / columns;
    const int first_row = threadIdx.x / columns;
    if (first_row >= rows) return;
    for (int quad = threadIdx.x % columns; quad < layout_.quads; quad += columns) {
      Vector<Acc, QUAD> weights[SLICE];
#pragma unroll
      for (int i = 0; i < SLICE; ++i) {
        weights[i] = load_vector<Acc, QUAD>(w1_ + i * layout_.leading + quad * QUAD);
      }
      for (int n = first_row; n < batch_; n += rows) {
        const auto values = load_vector<Acc, SLICE>(x_ + n * SgdLayout::X_LEADING);
        Vector<Acc, QUAD> sums{};
#pragma unroll
        for (int i = 0; i < SLICE; ++i) {
#pragma unroll
          for (int j = 0; j < QUAD; ++j) sums.at[j] += values.at[i] * weights[i].at[j];
        }
        store_vector(part + (n * layout_.quads + quad) * QUAD, sums);
      }
    }
  }

  // This block's share of the hidden layer. Groups of threads add up every so many blocks' parts,
  // and the first group adds up theirs: the order follows from the sizes alone.
  __device__ void add_slices(const Acc* parts, Acc* hidden) const {
    const int slices = gridDim.x;
    const int share = ceil_div(hidden_quads(), slices);
    const int begin = blockIdx.x * share;
    int groups = 1;
    while (2 * groups <= slices && 2 * groups * share <= SGD_THREADS) groups *= 2;
    const int columns = SGD_THREADS / groups;
    const int group = threadIdx.x / columns, column = threadIdx.x % columns;
    for (int first = 0; first < share; first += columns) {
      const int quad = begin + first + column;
      const bool exists = first + column < share && quad < hidden_quads();
      Vector<Acc, QUAD> sums{};
      if (exists) {
#pragma unroll 8
        for (int part = group; part < slices; part += groups) {
          add(sums, parts + (int64_t{part} * hidden_quads() + quad) * QUAD);
        }
      }
      if (groups > 1) {
        store_vector(hidden_ + threadIdx.x * QUAD, sums);
        __syncthreads();
      }
      if (group == 0 && exists) {
        for (int other = 1; other < groups; ++other) {
          add(sums, hidden_ + (other * columns + column) * QUAD);
        }
#pragma unroll
        for (int j = 0; j < QUAD; ++j) {
          // What pads a row stays 0, whatever x holds.
          const bool pads = quad % layout_.quads * QUAD + j >= n_hidden_;
          sums.at[j] = pads || sums.at[j] < 0 ? Acc(0) : sums.at[j];
        }
        store_vector(hidden + quad * QUAD, sums);
      }
      if (groups > 1) __syncthreads();
    }
  }

  __device__ void load_hidden(const Acc* hidden) const {
    for (int e = threadIdx.x; e < hidden_quads(); e += SGD_THREADS) {
      const int n = e / layout_.quads, quad = e % layout_.quads;
      store_vector(hidden_ + n * layout_.leading + quad * QUAD,
                   load_vector<Acc, QUAD>(hidden + e * QUAD));
    }
  }

  // A warp has 32 rows of a pair of outputs.
  __device__ void compute_g() const {
    const int row_blocks = ceil_div(batch_, WARP_SIZE);
    for (int item = warp(); item < row_blocks * ceil_div(out_, 2); item += SGD_WARPS) {
      const int n = item % row_blocks * WARP_SIZE + lane();
      const int first_out = item / row_blocks * 2;
      if (n >= batch_) continue;
      Acc sums[2] = {};
      for (int quad = 0; quad < layout_.quads; ++quad) {
        const auto hidden = load_vector<Acc, QUAD>(hidden_ + n * layout_.leading + quad * QUAD);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const auto weights =
              load_vector<Acc, QUAD>(w2_ + (first_out + k) * layout_.leading + quad * QUAD);
#pragma unroll
          for (int j = 0; j < QUAD; ++j) sums[k] += hidden.at[j] * weights.at[j];
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (first_out + k >= out_) continue;
        Acc& element = g_[n * layout_.g_leading + first_out + k];
        element = 2 * (sums[k] - element);
      }
    }
  }

  // Valid in thread 0; for all threads of the block.
  __device__ Acc loss() const {
    Acc sum = 0;
    for (int e = threadIdx.x; e < batch_ * out_; e += SGD_THREADS) {
      const Acc difference = g_[e / out_ * layout_.g_leading + e % out_] / 2;
      sum += difference * difference;
    }
    return block_sum(sum);
  }

  // This block's share of w2, a warp for each weight.
  __device__ void update_w2(const Matrix<T>& w2, Acc lr) const {
    const auto [begin, end] = share_of_w2();
    for (int e = begin + warp(); e < end; e += SGD_WARPS) {
      const int h = e / out_, o = e % out_;
      Acc sum = 0;
      for (int n = lane(); n < batch_; n += WARP_SIZE) {
        sum += hidden_[n * layout_.leading + h] * g_[n * layout_.g_leading + o];
      }
      for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        sum += __shfl_down_sync(FULL_WARP, sum, offset);
      }
      if (lane() == 0) {
        *w2.at(h, o) = from_accumulate<T>(descend<T>(w2_[o * layout_.leading + h], lr, sum));
      }
    }
  }

  // A warp has a quad of columns, a lane every 32nd row of the batch: there it computes d, and adds
  // to the sums of the 32 weights. d reaches no memory.
  __device__ void update_w1(Acc lr) const {
    for (int quad = warp(); quad < layout_.quads; quad += SGD_WARPS) {
      Acc sums[WARP_SIZE] = {};
      for (int n = lane(); n < batch_; n += WARP_SIZE) {
        Acc d[QUAD] = {};
        for (int o = 0; o < out_; ++o) {
          const Acc g = g_[n * layout_.g_leading + o];
          const auto weights = load_vector<Acc, QUAD>(w2_ + o * layout_.leading + quad * QUAD);
#pragma unroll
          for (int j = 0; j < QUAD; ++j) d[j] += g * weights.at[j];
        }
        const auto hidden = load_vector<Acc, QUAD>(hidden_ + n * layout_.leading + quad * QUAD);
        const auto values = load_vector<Acc, SLICE>(x_ + n * SgdLayout::X_LEADING);
#pragma unroll
        for (int j = 0; j < QUAD; ++j) {
          d[j] = hidden.at[j] <= 0 ? Acc(0) : d[j];
#pragma unroll
          for (int i = 0; i < SLICE; ++i) sums[i * QUAD + j] += values.at[i] * d[j];
        }
      }
      scatter_sums(sums, lane());
      const int i = lane() / QUAD, h = quad * QUAD + lane() % QUAD;
      if (i < slice_ && h < n_hidden_) {  // what pads stays 0, even where x times 0 is nan
        Acc& weight = w1_[i * layout_.leading + h];
        weight = descend<T>(weight, lr, sums[0]);
      }
    }
  }

  // With the whole hidden layer: g, this block's shares of both weights and, in the first block, the
  // loss. Then x and g may be overwritten.
  __device__ void finish_step(const Acc* hidden, const Matrix<T>& w2, Acc lr, T* loss_out) const {
    load_hidden(hidden);
    __syncthreads();
    compute_g();
    __syncthreads();
    if (blockIdx.x == 0) {
      const Acc sum = loss();
      if (threadIdx.x == 0) *loss_out = from_accumulate<T>(sum);
    }
    update_w2(w2, lr);
    update_w1(lr);
    __syncthreads();
  }

 private:
  struct Range {
    int begin, end;
  };
  __device__ Range share_of_w2() const {
    const int all = n_hidden_ * out_, share = ceil_div(all, static_cast<int>(gridDim.x));
    const int begin = blockIdx.x * share;
    return {begin, begin + share < all ? begin + share : all};
  }

  static __device__ int lane() { return threadIdx.x % WARP_SIZE; }
  static __device__ int warp() { return threadIdx.x / WARP_SIZE; }

  static __device__ __forceinline__ void add(Vector<Acc, QUAD>& sums, const Acc* quad) {
    const auto values = load_vector<Acc, QUAD>(quad);
#pragma unroll
    for (int j = 0; j < QUAD; ++j) sums.at[j] += values.at[j];
  }

  const int batch_, n_hidden_, out_;
  const int64_t first_in_;
  const int slice_;  // rows of w1 in this block, which may be the last one
  const SgdLayout layout_;
  Acc* const x_;
  Acc* const w1_;
  Acc* const w2_;
  Acc* const g_;
  Acc* const hidden_;
};

// parts: batch x hidden, in whole quads, for each block; hidden: the same once.
template <class T>
__global__ void __launch_bounds__(SGD_THREADS, SGD_BLOCKS_PER_SM<T>)
    sgd_steps_kernel(const TwoLayerSize size, const SgdBatches<T> batches, const Matrix<T> w1,
                     const Matrix<T> w2, Accumulate<T> lr, int64_t steps, Accumulate<T>* parts,
                     Accumulate<T>* hidden, T* losses) {
  const auto grid = cooperative_groups::this_grid();
  const SgdBlock<T> block(size);
  block.load_w1(w1);
  for (int64_t step = 0; step < steps; ++step) {
    Matrix<const T> x = batches.x, y = batches.y;
    x.data += step * batches.x_stride;
    y.data += step * batches.y_stride;
    if (step == 0 || batches.x_stride != 0) block.load_x(x);
    block.load_y(y);
    __syncthreads();
    block.multiply_slice(parts + int64_t{blockIdx.x} * block.hidden_quads() * QUAD);
    grid.sync();
    block.load_w2(as_const(w2));
    block.add_slices(parts, hidden);
    grid.sync();
    block.finish_step(hidden, w2, lr, losses + step);
  }
  block.store_w1(w1);
}

// The three parts of one step as launches of their own.
template <class T>
__global__ void __launch_bounds__(SGD_THREADS, SGD_BLOCKS_PER_SM<T>)
    sgd_multiply_kernel(const TwoLayerSize size, const Matrix<const T> x, const Matrix<T> w1,
                        Accumulate<T>* parts) {
  let_next_kernel_begin();
  const SgdBlock<T> block(size);
  block.load_w1(w1);
  block.load_x(x);
  __syncthreads();
  block.multiply_slice(parts + int64_t{blockIdx.x} * block.hidden_quads() * QUAD);
}

template <class T>
__global__ void __launch_bounds__(SGD_THREADS, SGD_BLOCKS_PER_SM<T>)
    sgd_add_kernel(const TwoLayerSize size, const Matrix<T> w2, T* old_w2,
                   const Accumulate<T>* parts, Accumulate<T>* hidden) {
  let_next_kernel_begin();
  const SgdBlock<T> block(size);
  block.copy_w2(w2, old_w2);
  wait_for_previous_kernel();
  block.add_slices(parts, hidden);
}

// old_w2: contiguous.
template <class T>
__global__ void __launch_bounds__(SGD_THREADS, SGD_BLOCKS_PER_SM<T>)
    sgd_update_kernel(const TwoLayerSize size, const Matrix<const T> x, const Matrix<const T> y,
                      const Matrix<T> w1, const Matrix<T> w2, Accumulate<T> lr, const T* old_w2,
                      const Accumulate<T>* hidden, T* loss) {
  const SgdBlock<T> block(size);
  block.load_w1(w1);
  block.load_x(x);
  block.load_y(y);
  wait_for_previous_kernel();
  block.load_w2({old_w2, size.out, 1});
  block.finish_step(hidden, w2, lr, loss);
  block.store_w1(w1);
}

// Lanes lie along a row of w1, one element each.
template <class T>
constexpr KernelLimits sgd_multiply_limits() {
  KernelLimits limits = sgd_steps_limits<T>();
  limits.load_bytes = sizeof(T);
  return limits;
}

template <class T>
constexpr KernelLimits sgd_update_limits() {
  KernelLimits limits = sgd_steps_limits<T>();
  limits.store_bytes = sizeof(T);
  return limits;
}

inline int64_t slices_of(const TwoLayerSize& size) { return ceil_div<int64_t>(size.in, SLICE); }

template <class T>
std::size_t sgd_shared_bytes(const TwoLayerSize& size) {
  const SgdLayout layout(static_cast<int>(size.batch), static_cast<int>(size.hidden),
                         static_cast<int>(size.out));
  return layout.elements * sizeof(Accumulate<T>);
}

// How a step goes, on the current device.
enum class SgdWay { one_launch, three_launches, five_products };

// By slices:
//   - Nothing may be empty: the products handle that case.
//   - The hidden layer, g and w2 fit into 48 KiB of shared memory beside a slice. That also bounds
//     the work that every block repeats: of g and d, 4 NHO FLOPs, which is 0.26 of 26 MFLOP at
//     64 x 1000 x 100 x 10 in float32.
//   - 256 slices at most (I <= 2048): the parts of the hidden layer, N x H for each slice, pass
//     through L2 twice a step, and beyond that a multiprocessor repeats its work for several blocks.
// These go in one launch where the device knows cooperative launches and all blocks are resident at
// once, so that the grid can meet; else in three.
template <class T>
SgdWay sgd_way(const TwoLayerSize& size) {
  constexpr int64_t MOST_ELEMENTS = MOST_SHARED_BYTES / sizeof(Accumulate<T>);
  for (const int64_t extent : {size.batch, size.hidden, size.out}) {
    if (extent == 0 || extent > MOST_ELEMENTS) return SgdWay::five_products;
  }
  if (size.in == 0 || slices_of(size) > MOST_SLICES || size.batch * size.hidden > MOST_ELEMENTS ||
      size.hidden * size.out > MOST_ELEMENTS || size.batch * size.out > MOST_ELEMENTS ||
      sgd_shared_bytes<T>(size) > MOST_SHARED_BYTES) {
    return SgdWay::five_products;
  }
  int device = 0, can_cooperate = 0, multiprocessors = 0, blocks = 0;
  PYEXT_CHECK_CUDA(cudaGetDevice(&device));
  PYEXT_CHECK_CUDA(cudaDeviceGetAttribute(&can_cooperate, cudaDevAttrCooperativeLaunch, device));
  PYEXT_CHECK_CUDA(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  PYEXT_CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, sgd_steps_kernel<T>, SGD_THREADS, sgd_shared_bytes<T>(size)));
  const bool all_resident = slices_of(size) <= int64_t{blocks} * multiprocessors;
  return can_cooperate && all_resident ? SgdWay::one_launch : SgdWay::three_launches;
}

// What the blocks leave for each other, of a size that goes by slices.
template <class T>
struct SgdExchange {
  Accumulate<T>* parts;   // of the hidden layer, in whole quads, for each block
  Accumulate<T>* hidden;  // likewise, once

  SgdExchange(const TwoLayerSize& size, Scratch& scratch) {
    const int64_t elements = size.batch * ceil_div<int64_t>(size.hidden, QUAD) * QUAD;
    parts = scratch.allocate<Accumulate<T>>(slices_of(size) * elements);
    hidden = scratch.allocate<Accumulate<T>>(elements);
  }
};

// `steps` steps, at least one; losses[steps].
template <class T>
void sgd_steps_in_one_launch(const TwoLayerSize& size, const SgdBatches<T>& batches,
                             const Matrix<T>& w1, const Matrix<T>& w2, double lr, int64_t steps,
                             T* losses, Scratch& scratch, cudaStream_t stream) {
  const SgdExchange<T> exchange(size, scratch);
  launch(sgd_steps_kernel<T>, sgd_steps_shape(slices_of(size), sgd_shared_bytes<T>(size)), stream,
         size, batches, w1, w2, static_cast<Accumulate<T>>(lr), steps, exchange.parts,
         exchange.hidden, losses);
}

template <class T>
void sgd_step_in_three_launches(const TwoLayerSize& size, const Matrix<const T>& x,
                                const Matrix<const T>& y, const Matrix<T>& w1, const Matrix<T>& w2,
                                double lr, T* loss, Scratch& scratch, cudaStream_t stream) {
  const SgdExchange<T> exchange(size, scratch);
  T* old_w2 = scratch.allocate<T>(size.hidden * size.out);
  const int64_t slices = slices_of(size);
  const std::size_t shared_bytes = sgd_shared_bytes<T>(size);
  launch(sgd_multiply_kernel<T>, sgd_part_shape(slices, shared_bytes, false), stream, size, x, w1,
         exchange.parts);
  launch(sgd_add_kernel<T>, sgd_part_shape(slices, shared_bytes), stream, size, w2, old_w2,
         exchange.parts, exchange.hidden);
  launch(sgd_update_kernel<T>, sgd_part_shape(slices, shared_bytes), stream, size, x, y, w1, w2,
         static_cast<Accumulate<T>>(lr), old_w2, exchange.hidden, loss);
}

}  // namespace pyext
