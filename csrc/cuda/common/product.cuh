// Tiled matrix product with a fused epilogue: C = epilogue(A @ B), A (m, k), B (k, n), any strides.
//
// FLOPs 2mnk. Bytes moved: at least A, B and what the epilogue reads and writes; each element of A
// is read once per tile column, of B once per tile row. Launch: one block per tile of C and split
// of k. Operands are converted to the accumulation type on their way into double-buffered shared
// memory, while registers already hold the next piece; every product is an FMA in that type.
// Tensor-core paths for bf16 and fp16 are to be written when hardware is at hand.
//
// When C has too few tiles to fill a GPU and k is long, k is split: each block writes the sums over
// its part of k to a workspace, and a second pass adds them in a fixed order and runs the epilogue.
//
// An epilogue is a constant functor that receives finished sums, with what a thread adds up kept in
// its State (a kernel parameter that is written to becomes a copy in local memory):
//   row(m, n, sums, count, state)  columns n .. n+count-1 of row m; 4 divides n, count <= 4
//   finish(block, state)           once per thread at the end, by all threads of the block
//   shared_bytes(threads)          the shared memory that `finish` needs
//   Stored                         the element type of what `row` stores, in quads
#pragma once

#include <algorithm>

#include "kernel_limits.cuh"
#include "matrix.cuh"

namespace pyext {

// The base of an epilogue that only maps sums to what it stores.
struct ElementwiseEpilogue {
  struct State {};
  __device__ void finish(int64_t, const State&) const {}
  static constexpr std::size_t shared_bytes(int) { return 0; }
};

// A block computes Rows x Columns of C, `Depth` steps of k at a time. Each thread owns ThreadRows x
// ThreadColumns of it; a warp's lanes lie 4 x 8, so that one read of a fragment touches every bank
// of the shared memory once.
template <int Rows_, int Columns_, int Depth_, int ThreadRows_, int ThreadColumns_,
          int BlocksPerSM_>
struct Tile {
  static constexpr int ROWS = Rows_;
  static constexpr int COLUMNS = Columns_;
  static constexpr int DEPTH = Depth_;
  static constexpr int THREAD_ROWS = ThreadRows_;
  static constexpr int THREAD_COLUMNS = ThreadColumns_;
  static constexpr int BLOCKS_PER_SM = BlocksPerSM_;
  static constexpr int WARP_ROWS = 4 * ThreadRows_;
  static constexpr int WARP_COLUMNS = 8 * ThreadColumns_;
  static constexpr int WARPS = (Rows_ / WARP_ROWS) * (Columns_ / WARP_COLUMNS);
  static constexpr int THREADS = WARPS * WARP_SIZE;
};

// 8 x 8 per thread needs 64 accumulators and 16 fragment registers, which leaves two blocks per SM
// (128 registers a thread); each step of k then costs four 16-byte shared reads per 64 FMAs.
using LargeTile = Tile<128, 128, 16, 8, 8, 2>;
// float64's accumulators take twice the registers, so that two blocks fit instead of three.
template <class T>
using MediumTile = Tile<64, 64, 16, 8, 4, std::is_same_v<T, double> ? 2 : 3>;
using SmallTile = Tile<32, 32, 16, 4, 4, 4>;

enum class TileChoice { small, medium, large };

// float64 would need 128 registers for its accumulators alone; for bf16 and fp16 an FMA path is not
// worth more code than it needs to be right.
template <class T>
constexpr bool HAS_LARGE_TILE = std::is_same_v<T, float>;

// One operand's way from global to shared memory: a piece of Rows x Depth elements, in groups of 16
// bytes that run along whichever dimension has stride 1. B enters as its transpose.
template <class T, int Rows, int Depth, int Threads>
class OperandLoader {
 public:
  using Acc = Accumulate<T>;
  // The padding keeps 16-byte alignment and spreads the transposing stores over the banks.
  static constexpr int LEADING = Rows + ELEMENTS_PER_16_BYTES<Acc>;
  static constexpr int SHARED_ELEMENTS = Depth * LEADING;

  __device__ __forceinline__ OperandLoader(const Matrix<const T>& operand, int64_t first_row,
                                           int64_t rows, int64_t first_depth)
      : depth_stride_(operand.column_stride),
        // A row stride of 1 wins only where the column stride is not 1 as well.
        along_rows_(operand.row_stride == 1 && operand.column_stride != 1),
        step_(along_rows_ ? operand.row_stride : operand.column_stride),
        rows_left_(static_cast<int>(rows - first_row < Rows ? rows - first_row : Rows)) {
    const int64_t other_stride = along_rows_ ? operand.column_stride : operand.row_stride;
    vectorized_ = step_ == 1 && other_stride % GROUP == 0 &&
                  reinterpret_cast<std::uintptr_t>(operand.data) % 16 == 0;
    source_ = operand.at(first_row, first_depth);
    row_stride_ = operand.row_stride;
  }

  // Global memory -> registers: the next Depth columns, of which `depth_left` exist; zeros
  // elsewhere.
  __device__ __forceinline__ void fetch(int64_t depth_left) {
    const int depths = static_cast<int>(depth_left < Depth ? depth_left : Depth);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
      const int row = group_row(i);
      const int depth = group_depth(i);
      const T* group = source_ + row * row_stride_ + depth * depth_stride_;
      const int last_row = along_rows_ ? row + GROUP - 1 : row;
      const int last_depth = along_rows_ ? depth : depth + GROUP - 1;
      if (vectorized_ && last_row < rows_left_ && last_depth < depths) {
        held_[i] = load_vector<T, GROUP>(group);
      } else {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
          const bool inside = along_rows_ ? row + j < rows_left_ && depth < depths
                                          : row < rows_left_ && depth + j < depths;
          held_[i].at[j] = inside ? group[j * step_] : from_accumulate<T>(0);
        }
      }
    }
    source_ += Depth * depth_stride_;
  }

  // Registers -> shared memory, as shared[depth][row].
  __device__ __forceinline__ void store(Acc* shared) const {
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
      Acc* destination = shared + group_depth(i) * LEADING + group_row(i);
      if (along_rows_) {
        constexpr int WIDTH = ELEMENTS_PER_16_BYTES<Acc>;
#pragma unroll
        for (int j = 0; j < GROUP; j += WIDTH) {
          Vector<Acc, WIDTH> converted;
#pragma unroll
          for (int l = 0; l < WIDTH; ++l) converted.at[l] = to_accumulate(held_[i].at[j + l]);
          store_vector(destination + j, converted);
        }
      } else {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) destination[j * LEADING] = to_accumulate(held_[i].at[j]);
      }
    }
  }

 private:
  static constexpr int GROUP = ELEMENTS_PER_16_BYTES<T>;
  static constexpr int GROUPS = Rows * Depth / GROUP / Threads;
  static_assert(GROUPS * GROUP * Threads == Rows * Depth, "every thread loads the same number");

  __device__ __forceinline__ int group_row(int i) const {
    const int group = static_cast<int>(threadIdx.x) + i * Threads;
    return along_rows_ ? group % (Rows / GROUP) * GROUP : group / (Depth / GROUP);
  }
  __device__ __forceinline__ int group_depth(int i) const {
    const int group = static_cast<int>(threadIdx.x) + i * Threads;
    return along_rows_ ? group / (Rows / GROUP) : group % (Depth / GROUP) * GROUP;
  }

  const T* source_;
  int64_t row_stride_;
  int64_t depth_stride_;
  bool along_rows_;
  int64_t step_;
  int rows_left_;
  bool vectorized_;
  Vector<T, GROUP> held_[GROUPS];
};

// Count elements at start, start + Stride, ... in quads, from shared memory.
template <int Count, int Stride, class Acc>
__device__ __forceinline__ void load_fragment(const Acc* start, Acc (&fragment)[Count]) {
#pragma unroll
  for (int quad = 0; quad < Count / QUAD; ++quad) {
    const auto values = load_vector<Acc, QUAD>(start + quad * Stride);
#pragma unroll
    for (int j = 0; j < QUAD; ++j) fragment[quad * QUAD + j] = values.at[j];
  }
}

// blockIdx.x: the tile, along rows of C first within bands of eight tile rows, so that blocks that
// run together share operands in L2. blockIdx.y: the part of k.
struct TilePosition {
  int64_t row;
  int64_t column;
};

template <class TileShape>
__device__ __forceinline__ TilePosition tile_position(int64_t m, int64_t n) {
  constexpr int64_t BAND = 8;
  const int64_t tile_rows = ceil_div<int64_t>(m, TileShape::ROWS);
  const int64_t tile_columns = ceil_div<int64_t>(n, TileShape::COLUMNS);
  const int64_t band = blockIdx.x / (BAND * tile_columns);
  const int64_t within = blockIdx.x % (BAND * tile_columns);
  const int64_t rows_left = tile_rows - band * BAND;
  const int64_t band_rows = rows_left < BAND ? rows_left : BAND;
  return {(band * BAND + within % band_rows) * TileShape::ROWS,
          within / band_rows * TileShape::COLUMNS};
}

// The bytes of an epilogue's stores: a quad of its elements, in accesses of up to 16 bytes.
template <class Epilogue>
constexpr int QUAD_STORE_BYTES = alignof(Vector<typename Epilogue::Stored, QUAD>);

template <class T, class TileShape, class Epilogue>
constexpr KernelLimits product_limits() {
  return {.registers = registers_for(TileShape::BLOCKS_PER_SM, TileShape::THREADS),
          .load_bytes = 16,
          .store_bytes = QUAD_STORE_BYTES<Epilogue>,
          .shared_bytes = shared_for(TileShape::BLOCKS_PER_SM)};
}

template <class T, class TileShape, class Epilogue>
__global__ void __launch_bounds__(TileShape::THREADS, TileShape::BLOCKS_PER_SM)
    product_kernel(Matrix<const T> a, Matrix<const T> b, int64_t m, int64_t n, int64_t k,
                   int64_t depth_per_split, const Epilogue epilogue) {
  using Acc = Accumulate<T>;
  using LoaderA = OperandLoader<T, TileShape::ROWS, TileShape::DEPTH, TileShape::THREADS>;
  using LoaderB = OperandLoader<T, TileShape::COLUMNS, TileShape::DEPTH, TileShape::THREADS>;
  constexpr int BUFFER = LoaderA::SHARED_ELEMENTS + LoaderB::SHARED_ELEMENTS;
  Acc* shared = shared_memory<Acc>();

  const TilePosition tile = tile_position<TileShape>(m, n);
  const int64_t first_depth = blockIdx.y * depth_per_split;
  int64_t depth_left = k - first_depth < depth_per_split ? k - first_depth : depth_per_split;
  LoaderA loader_a(a, tile.row, m, first_depth);
  LoaderB loader_b(b.transposed(), tile.column, n, first_depth);

  const int lane = threadIdx.x % WARP_SIZE;
  const int warp = threadIdx.x / WARP_SIZE;
  constexpr int WARPS_ACROSS = TileShape::COLUMNS / TileShape::WARP_COLUMNS;
  const int row = warp / WARPS_ACROSS * TileShape::WARP_ROWS + lane / 8 * QUAD;
  const int column = warp % WARPS_ACROSS * TileShape::WARP_COLUMNS + lane % 8 * QUAD;
  constexpr int QUAD_ROWS = 4 * QUAD;  // from one quad of a thread's rows to its next
  constexpr int QUAD_COLUMNS = 8 * QUAD;

  Acc sums[TileShape::THREAD_ROWS][TileShape::THREAD_COLUMNS] = {};
  loader_a.fetch(depth_left);
  loader_b.fetch(depth_left);
  loader_a.store(shared);
  loader_b.store(shared + LoaderA::SHARED_ELEMENTS);
  __syncthreads();
  int buffer = 0;
  while (true) {
    depth_left -= TileShape::DEPTH;
    const bool more = depth_left > 0;
    if (more) {
      loader_a.fetch(depth_left);
      loader_b.fetch(depth_left);
    }
    const Acc* shared_a = shared + buffer * BUFFER + row;
    const Acc* shared_b = shared + buffer * BUFFER + LoaderA::SHARED_ELEMENTS + column;
#pragma unroll
    for (int depth = 0; depth < TileShape::DEPTH; ++depth) {
      Acc fragment_a[TileShape::THREAD_ROWS];
      Acc fragment_b[TileShape::THREAD_COLUMNS];
      load_fragment<TileShape::THREAD_ROWS, QUAD_ROWS>(shared_a + depth * LoaderA::LEADING,
                                                       fragment_a);
      load_fragment<TileShape::THREAD_COLUMNS, QUAD_COLUMNS>(shared_b + depth * LoaderB::LEADING,
                                                             fragment_b);
#pragma unroll
      for (int i = 0; i < TileShape::THREAD_ROWS; ++i) {
#pragma unroll
        for (int j = 0; j < TileShape::THREAD_COLUMNS; ++j) {
          sums[i][j] += fragment_a[i] * fragment_b[j];
        }
      }
    }
    if (!more) break;
    // The other buffer was last read before the previous barrier: one barrier per step is enough.
    buffer ^= 1;
    loader_a.store(shared + buffer * BUFFER);
    loader_b.store(shared + buffer * BUFFER + LoaderA::SHARED_ELEMENTS);
    __syncthreads();
  }

  typename Epilogue::State state{};
#pragma unroll
  for (int i = 0; i < TileShape::THREAD_ROWS; ++i) {
    const int64_t c_row = tile.row + row + i / QUAD * QUAD_ROWS + i % QUAD;
    if (c_row >= m) continue;
#pragma unroll
    for (int quad = 0; quad < TileShape::THREAD_COLUMNS / QUAD; ++quad) {
      const int64_t c_column = tile.column + column + quad * QUAD_COLUMNS;
      if (c_column >= n) continue;
      Acc values[QUAD];
#pragma unroll
      for (int j = 0; j < QUAD; ++j) values[j] = sums[i][quad * QUAD + j];
      const int count = n - c_column < QUAD ? static_cast<int>(n - c_column) : QUAD;
      epilogue.row(c_row, c_column, values, count, state);
    }
  }
  epilogue.finish(blockIdx.x, state);
}

// The epilogue of a split product: sums of part blockIdx.y of k, to workspace[part][m][n].
template <class Acc>
struct StorePart : ElementwiseEpilogue {
  using Stored = Acc;
  QuadMatrix<Acc> workspace;
  int64_t part_stride;

  __device__ void row(int64_t m, int64_t n, const Acc (&sums)[QUAD], int count, State&) const {
    QuadMatrix<Acc> part = workspace;
    part.data += blockIdx.y * part_stride;
    part.store(m, n, count, sums);
  }
};

constexpr int COMBINE_THREADS = 128;

template <class Epilogue>
LaunchShape combine_parts_shape(int64_t blocks) {
  return {dim3(static_cast<unsigned>(blocks)), dim3(COMBINE_THREADS),
          Epilogue::shared_bytes(COMBINE_THREADS)};
}

// A block has four 16-byte loads per thread in flight, 8 KiB. Seven blocks are less than device
// memory asks for (blocks_in_flight: eight), but the workspace was written just before and lies in
// L2; the loss's epilogue and float64 need 72 registers on sm_100.
template <class Acc, class Epilogue>
constexpr KernelLimits combine_parts_limits() {
  return {.registers = registers_for(7, COMBINE_THREADS),
          .load_bytes = 16,
          .store_bytes = QUAD_STORE_BYTES<Epilogue>,
          .shared_bytes = shared_for(7)};
}

// The second pass: one thread per quad of C adds the parts in ascending order.
template <class Acc, class Epilogue>
__global__ void __launch_bounds__(COMBINE_THREADS)
    combine_parts_kernel(const QuadMatrix<const Acc> workspace, int64_t part_stride, int parts,
                         int64_t m, int64_t n, const Epilogue epilogue) {
  const int64_t quads_per_row = ceil_div<int64_t>(n, QUAD);
  const int64_t quad = int64_t{blockIdx.x} * COMBINE_THREADS + threadIdx.x;
  const int64_t row = quad / quads_per_row;
  const int64_t column = quad % quads_per_row * QUAD;
  typename Epilogue::State state{};
  if (row < m) {
    const int count = static_cast<int>(n - column < QUAD ? n - column : QUAD);
    QuadMatrix<const Acc> source = workspace;
    Acc sums[QUAD] = {};
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      Acc values[QUAD];
      source.load(row, column, count, values);
      source.data += part_stride;
#pragma unroll
      for (int j = 0; j < QUAD; ++j) sums[j] += values[j];
    }
    epilogue.row(row, column, sums, count, state);
  }
  epilogue.finish(blockIdx.x, state);
}

// How one product is cut up.
struct ProductPlan {
  TileChoice tile;
  int64_t depth_per_split;
  int parts;
  int64_t tiles;
  // Blocks of the kernel that runs the epilogue: the range of `finish`'s argument.
  int64_t epilogue_blocks;
};

template <class TileShape>
ProductPlan plan_with(TileChoice choice, int64_t m, int64_t n, int64_t k, int64_t wanted_parts) {
  const int64_t tiles = ceil_div<int64_t>(m, TileShape::ROWS) *
                        ceil_div<int64_t>(n, TileShape::COLUMNS);
  const int64_t steps = std::max<int64_t>(ceil_div<int64_t>(k, TileShape::DEPTH), 1);
  // grid.y ends at 65535
  const int64_t parts = std::clamp<int64_t>(wanted_parts, 1, std::min<int64_t>(steps, 65535));
  const int64_t steps_per_part = ceil_div(steps, parts);
  ProductPlan plan;
  plan.tile = choice;
  plan.depth_per_split = steps_per_part * TileShape::DEPTH;
  plan.parts = static_cast<int>(ceil_div(steps, steps_per_part));
  plan.tiles = tiles;
  plan.epilogue_blocks =
      plan.parts == 1 ? tiles : ceil_div<int64_t>(m * ceil_div<int64_t>(n, QUAD), COMBINE_THREADS);
  return plan;
}

inline ProductPlan plan_with(TileChoice choice, int64_t m, int64_t n, int64_t k,
                             int64_t wanted_parts) {
  switch (choice) {
    case TileChoice::large:
      return plan_with<LargeTile>(choice, m, n, k, wanted_parts);
    case TileChoice::medium:
      return plan_with<MediumTile<float>>(choice, m, n, k, wanted_parts);
    default:
      return plan_with<SmallTile>(choice, m, n, k, wanted_parts);
  }
}

// The choice depends on the shape alone, so that every device gives the same bits. The largest tile
// wins that (a) is at least half full and (b) makes enough blocks for a GPU of 100 to 150 SMs, if
// need be by splitting k into parts long enough to pay for the second pass. Large tiles do more
// FMAs per shared-memory read; small ones get to work at all where C is small.
inline ProductPlan plan_product(int64_t m, int64_t n, int64_t k, bool has_large_tile) {
  struct Candidate {
    TileChoice tile;
    int64_t rows, columns;
    int64_t enough_blocks;
    int64_t least_depth;  // of one part of k
  };
  constexpr Candidate LARGE{TileChoice::large, LargeTile::ROWS, LargeTile::COLUMNS, 128, 512};
  constexpr Candidate MEDIUM{TileChoice::medium, MediumTile<float>::ROWS,
                             MediumTile<float>::COLUMNS, 192, 256};
  constexpr Candidate SMALL{TileChoice::small, SmallTile::ROWS, SmallTile::COLUMNS, 256, 64};
  // An empty C counts as one tile, which nobody launches.
  const auto tiles = [&](const Candidate& c) {
    return std::max<int64_t>(ceil_div(m, c.rows) * ceil_div(n, c.columns), 1);
  };
  const auto most_parts = [&](const Candidate& c) {
    return std::max<int64_t>(k / c.least_depth, 1);
  };
  const auto plan = [&](const Candidate& c) {
    return plan_with(c.tile, m, n, k,
                     std::min(ceil_div(c.enough_blocks, tiles(c)), most_parts(c)));
  };
  for (const Candidate& c : {LARGE, MEDIUM}) {
    if (c.tile == TileChoice::large && !has_large_tile) continue;
    const bool half_full = 2 * m * n >= tiles(c) * c.rows * c.columns;
    if (half_full && tiles(c) * most_parts(c) >= c.enough_blocks) return plan(c);
  }
  return plan(SMALL);
}

template <class T, class TileShape, class Epilogue>
LaunchShape product_shape(int64_t tiles, int64_t parts) {
  using Acc = Accumulate<T>;
  constexpr std::size_t operands =
      2 * sizeof(Acc) *
      (OperandLoader<T, TileShape::ROWS, TileShape::DEPTH, TileShape::THREADS>::SHARED_ELEMENTS +
       OperandLoader<T, TileShape::COLUMNS, TileShape::DEPTH, TileShape::THREADS>::SHARED_ELEMENTS);
  constexpr std::size_t shared = std::max(operands, Epilogue::shared_bytes(TileShape::THREADS));
  static_assert(shared <= 48 * 1024, "more needs cudaFuncSetAttribute");
  return {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(parts)),
          dim3(TileShape::THREADS), shared};
}

template <class T, class Epilogue>
void launch_product_tiles(const ProductPlan& plan, const Matrix<const T>& a,
                          const Matrix<const T>& b, int64_t m, int64_t n, int64_t k,
                          const Epilogue& epilogue, cudaStream_t stream) {
  const auto launch_tile = [&](auto tile) {
    using TileShape = decltype(tile);
    launch(product_kernel<T, TileShape, Epilogue>,
           product_shape<T, TileShape, Epilogue>(plan.tiles, plan.parts), stream, a, b, m, n, k,
           plan.depth_per_split, epilogue);
  };
  switch (plan.tile) {
    case TileChoice::large:
      if constexpr (HAS_LARGE_TILE<T>) launch_tile(LargeTile{});
      break;
    case TileChoice::medium:
      launch_tile(MediumTile<T>{});
      break;
    case TileChoice::small:
      launch_tile(SmallTile{});
      break;
  }
}

// The first pass of a split product.
template <class T>
void product_parts(const ProductPlan& plan, const Matrix<const T>& a, const Matrix<const T>& b,
                   int64_t m, int64_t n, int64_t k, Accumulate<T>* workspace, int64_t part_stride,
                   cudaStream_t stream) {
  const StorePart<Accumulate<T>> epilogue{{}, row_major(workspace, n), part_stride};
  launch_product_tiles(plan, a, b, m, n, k, epilogue, stream);
}

// epilogue(a @ b), a (m, k) and b (k, n). An empty C launches nothing; k = 0 gives sums of 0.
template <class T, class Epilogue>
void product(const ProductPlan& plan, const Matrix<const T>& a, const Matrix<const T>& b, int64_t m,
             int64_t n, int64_t k, const Epilogue& epilogue, Scratch& scratch,
             cudaStream_t stream) {
  using Acc = Accumulate<T>;
  if (m == 0 || n == 0) return;
  if (plan.parts == 1) {
    launch_product_tiles(plan, a, b, m, n, k, epilogue, stream);
    return;
  }
  const int64_t part_stride = ceil_div<int64_t>(m * n, QUAD) * QUAD;
  Acc* workspace = scratch.allocate<Acc>(plan.parts * part_stride);
  product_parts<T>(plan, a, b, m, n, k, workspace, part_stride, stream);
  const Matrix<const Acc> parts{workspace, n, 1};
  launch(combine_parts_kernel<Acc, Epilogue>, combine_parts_shape<Epilogue>(plan.epilogue_blocks),
         stream, parts, part_stride, plan.parts, m, n, epilogue);
}

template <class T, class Epilogue>
void product(const Matrix<const T>& a, const Matrix<const T>& b, int64_t m, int64_t n, int64_t k,
             const Epilogue& epilogue, Scratch& scratch, cudaStream_t stream) {
  product(plan_product(m, n, k, HAS_LARGE_TILE<T>), a, b, m, n, k, epilogue, scratch,
          stream);
}

}  // namespace pyext
