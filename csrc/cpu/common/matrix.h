// A strided view of a matrix, and what the tiled product is told of threads. No PyTorch in here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace pyext {

template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  T& operator()(int64_t i, int64_t j) const {
    return data[i * row_stride + j * column_stride];
  }
  // The same as a pointer: of an empty matrix, which may have no data, there is no reference.
  T* at(int64_t i, int64_t j) const { return data + i * row_stride + j * column_stride; }
  // As an nn.Linear's weight.t() does; such a matrix is best made as its transpose, by rows.
  bool is_by_columns() const { return row_stride == 1 && column_stride != 1; }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix row_range(int64_t begin, int64_t end) const {
    return {data + begin * row_stride, end - begin, columns, row_stride, column_stride};
  }
  Matrix column_range(int64_t begin, int64_t end) const {
    return {data + begin * column_stride, rows, end - begin, row_stride, column_stride};
  }
};

// A callable by reference. The tiled product is compiled once for each accumulation type and tile
// instead of once more for each dtype and epilogue (a third of the compile time), at the price of an
// indirect call per packed panel and per finished tile.
template <class Signature>
class FunctionRef;

template <class... Args>
class FunctionRef<void(Args...)> {
 public:
  template <class F>
  FunctionRef(const F& f)
      : object_(&f), call_([](const void* object, Args... args) {
          (*static_cast<const F*>(object))(args...);
        }) {}

  void operator()(Args... args) const { call_(object_, args...); }

 private:
  const void* object_;
  void (*call_)(const void*, Args...);
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An intermediate that will be the B of a product: by rows, or as the product would pack it, which
// spares that: panels of `width` columns, [panel][row][width], what the last one lacks being zeros.
template <class T>
struct Panels {
  T* data;
  int64_t rows, columns;
  int64_t width;  // 0: by rows

  int64_t size() const {
    return rows * (width ? divide_up(columns, width) * width : columns);
  }
  // Row i from column j on; in panels j is the first column of one.
  T* at(int64_t i, int64_t j) const {
    return width ? data + j * rows + i * width : data + i * columns + j;
  }
  Matrix<T> by_rows() const { return {data, rows, columns, columns, 1}; }
};

}  // namespace pyext
