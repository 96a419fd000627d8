// out[c] = sum over rows of matrix[r][c], in a fixed order: the gradient of a bias.
//
// Bytes moved: the matrix once. Launch: blocks of 32 columns x 8 rows, a grid of column tiles x
// parts of the rows; where there are several parts a second launch of the same kernel adds them.
#pragma once

#include <algorithm>

#include "kernel_limits.cuh"
#include "matrix.cuh"

namespace pyext {

constexpr int COLUMN_SUM_COLUMNS = 32;
constexpr int COLUMN_SUM_ROWS = 8;

template <class In>
LaunchShape column_sum_shape(int64_t columns, int64_t parts) {
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(columns, COLUMN_SUM_COLUMNS)),
               static_cast<unsigned>(parts)),
          dim3(COLUMN_SUM_COLUMNS, COLUMN_SUM_ROWS),
          COLUMN_SUM_COLUMNS * COLUMN_SUM_ROWS * sizeof(Accumulate<In>)};
}

// Lanes lie along a row, one element each: all 2048 threads of a multiprocessor load at once.
template <class In, class Out>
constexpr KernelLimits column_sum_limits() {
  return {.registers = registers_for(8, COLUMN_SUM_COLUMNS * COLUMN_SUM_ROWS),
          .load_bytes = sizeof(In),
          .store_bytes = sizeof(Out),
          .shared_bytes = shared_for(8)};
}

// out[part][c] = sum over the rows of part blockIdx.y.
template <class In, class Out>
__global__ void __launch_bounds__(COLUMN_SUM_COLUMNS* COLUMN_SUM_ROWS)
    column_sum_kernel(Matrix<const In> matrix, int64_t rows, int64_t columns, int64_t rows_per_part,
                      Out* out) {
  using Acc = Accumulate<In>;
  Acc* shared = shared_memory<Acc>();
  const int64_t column = int64_t{blockIdx.x} * COLUMN_SUM_COLUMNS + threadIdx.x;
  const int64_t first = blockIdx.y * rows_per_part;
  const int64_t end = first + rows_per_part < rows ? first + rows_per_part : rows;
  Acc sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < end; row += COLUMN_SUM_ROWS) {
      sum += to_accumulate(*matrix.at(row, column));
    }
  }
  shared[threadIdx.y * COLUMN_SUM_COLUMNS + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
#pragma unroll
    for (int y = 1; y < COLUMN_SUM_ROWS; ++y) sum += shared[y * COLUMN_SUM_COLUMNS + threadIdx.x];
    out[blockIdx.y * columns + column] = from_accumulate<Out>(sum);
  }
}

template <class In, class Out>
void launch_column_sum(const Matrix<const In>& matrix, int64_t rows, int64_t columns,
                       int64_t rows_per_part, int64_t parts, Out* out, cudaStream_t stream) {
  launch(column_sum_kernel<In, Out>, column_sum_shape<In>(columns, parts), stream, matrix, rows,
         columns, rows_per_part, out);
}

template <class T>
void column_sum(const Matrix<const T>& matrix, int64_t rows, int64_t columns, T* out,
                Scratch& scratch, cudaStream_t stream) {
  using Acc = Accumulate<T>;
  if (columns == 0) return;
  // A part of fewer than 64 rows would be all overhead; 256 blocks are enough for any device.
  const int64_t column_tiles = ceil_div<int64_t>(columns, COLUMN_SUM_COLUMNS);
  const int64_t wanted = std::min(ceil_div<int64_t>(256, column_tiles), rows / 64);
  const int64_t rows_per_part = ceil_div(std::max<int64_t>(rows, 1), std::max<int64_t>(wanted, 1));
  const int64_t parts = ceil_div(std::max<int64_t>(rows, 1), rows_per_part);
  if (parts == 1) {
    launch_column_sum(matrix, rows, columns, rows_per_part, parts, out, stream);
    return;
  }
  Acc* sums = scratch.allocate<Acc>(parts * columns);
  launch_column_sum(matrix, rows, columns, rows_per_part, parts, sums, stream);
  const Matrix<const Acc> parts_matrix{sums, columns, 1};
  launch_column_sum(parts_matrix, parts, columns, parts, 1, out, stream);
}

}  // namespace pyext
