// A matrix with any strides, and access to four neighbouring elements of a row at once.
#pragma once

#include "numeric.cuh"

namespace pyext {

template <class T>
struct Matrix {
  T* data;
  int64_t row_stride;
  int64_t column_stride;

  __host__ __device__ Matrix transposed() const { return {data, column_stride, row_stride}; }

  __device__ T* at(int64_t row, int64_t column) const {
    return data + row * row_stride + column * column_stride;
  }
};

template <class T>
__host__ __device__ Matrix<const T> as_const(const Matrix<T>& matrix) {
  return {matrix.data, matrix.row_stride, matrix.column_stride};
}

template <class T>
Matrix<T> row_major(T* data, int64_t columns) {
  return {data, columns, 1};
}

constexpr int QUAD = 4;

// The same matrix for kernels that go through a row in quads: columns c .. c+count-1, where c is a
// multiple of four and count is four or, at the end of the row, less.
template <class T>
struct QuadMatrix : Matrix<T> {
  using Element = std::remove_const_t<T>;
  bool vectorized;

  QuadMatrix(const Matrix<T>& matrix)
      : Matrix<T>(matrix),
        vectorized(matrix.column_stride == 1 && matrix.row_stride % QUAD == 0 &&
                   is_aligned(matrix.data, alignof(Vector<Element, QUAD>))) {}

  __device__ __forceinline__ void load(int64_t row, int64_t column, int count,
                                       Accumulate<Element> (&values)[QUAD]) const {
    const T* source = this->at(row, column);
    if (vectorized && count == QUAD) {
      const auto quad = load_vector<Element, QUAD>(source);
#pragma unroll
      for (int j = 0; j < QUAD; ++j) values[j] = to_accumulate(quad.at[j]);
    } else {
#pragma unroll
      for (int j = 0; j < QUAD; ++j) {
        values[j] = j < count ? to_accumulate(source[j * this->column_stride]) : 0;
      }
    }
  }

  __device__ __forceinline__ void store(int64_t row, int64_t column, int count,
                                        const Accumulate<Element> (&values)[QUAD]) const {
    T* destination = this->at(row, column);
    if (vectorized && count == QUAD) {
      Vector<Element, QUAD> quad;
#pragma unroll
      for (int j = 0; j < QUAD; ++j) quad.at[j] = from_accumulate<Element>(values[j]);
      store_vector(destination, quad);
    } else {
#pragma unroll
      for (int j = 0; j < QUAD; ++j) {
        if (j < count) {
          destination[j * this->column_stride] = from_accumulate<Element>(values[j]);
        }
      }
    }
  }
};

}  // namespace pyext
