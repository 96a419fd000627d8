// The tiled matrix product without PyTorch: sizes around its tiles, strided operands, the epilogue.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "common/buffer.h"
#include "common/matrix.h"

#define PYEXT_KERNELS "common/product.h"
#include "common/for_each_isa.h"

namespace {

using pyext::Matrix;
using pyext::Panels;

// Runs the product's tasks one after another, as if there were `threads` of them.
struct Serial {
  int64_t threads;
  template <class Body>
  void operator()(int64_t tasks, int64_t, const Body& body) const {
    for (int64_t task = 0; task < tasks; ++task) body(task, task + 1);
  }
};

template <class T>
struct Operand {
  std::vector<T> values;
  Matrix<const T> matrix;

  // Small integers, so that sums are exact in any order; transposed: stored by columns.
  Operand(int64_t rows, int64_t columns, int step, bool transposed) : values(rows * columns) {
    for (int64_t i = 0; i < rows * columns; ++i)
      values[i] = static_cast<T>(i * step % 13 - 6);
    matrix = transposed ? Matrix<const T>{values.data(), rows, columns, 1, rows}
                        : Matrix<const T>{values.data(), rows, columns, columns, 1};
  }
};

template <class T>
void check_product(int64_t m, int64_t n, int64_t depth, bool transpose_a, bool transpose_b,
                   int64_t threads) {
  const Operand<T> a(m, depth, 5, transpose_a), b(depth, n, 7, transpose_b);
  std::vector<T> out(m * n);
  std::vector<int> visits(m * n);
  PYEXT_ON_BEST_ISA(kernels::product<T>(
      a.matrix, b.matrix, Serial{threads},
      [&](int64_t i, int64_t j, int64_t count, const T* sums) {
        for (int64_t k = 0; k < count; ++k) {
          out[i * n + j + k] = sums[k];
          ++visits[i * n + j + k];
        }
      }));
  // The same where B lies in panels.
  std::vector<T> of_panels(out);
  PYEXT_ON_BEST_ISA({
    if (kernels::can_take_panels<T>(a.matrix, n)) {
      Panels<T> panels{nullptr, depth, n, kernels::panel_width<T>(n)};
      const pyext::Buffer<T> buffer(panels.size());
      panels.data = buffer.get();
      std::fill_n(panels.data, panels.size(), T(0));
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < n; ++j)
          panels.at(k, j / panels.width * panels.width)[j % panels.width] = b.matrix(k, j);
      std::fill(of_panels.begin(), of_panels.end(), T(-1));
      kernels::product<T>(a.matrix, Panels<const T>{panels.data, depth, n, panels.width},
                          Serial{threads}, [&](int64_t i, int64_t j, int64_t count, const T* sums) {
                            std::copy_n(sums, count, &of_panels[i * n + j]);
                          });
    }
  });
  CHECK(of_panels == out);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      T expected = 0;
      for (int64_t k = 0; k < depth; ++k) expected += a.matrix(i, k) * b.matrix(k, j);
      CHECK(visits[i * n + j] == 1);
      CHECK(out[i * n + j] == expected);
    }
}

template <class T>
void check_sizes() {
  for (int64_t m : {0, 1, 4, 5, 14, 29, 97})
    for (int64_t n : {0, 1, 10, 16, 33, 52, 97, 100, 112})
      for (int64_t depth : {0, 1, 7, 64, 513})
        for (int transposed = 0; transposed < 4; ++transposed)
          check_product<T>(m, n, depth, transposed & 1, transposed & 2, 1);
  // Large enough to be split among threads, beyond a block of depth.
  check_product<T>(131, 67, 1030, false, true, 3);
  check_product<T>(131, 67, 1500, true, false, 4);
  check_product<T>(3, 70, 2050, false, false, 2);
  check_product<T>(29, 10, 1500, false, true, 2);
  check_product<T>(15, 2100, 1030, true, false, 2);  // beyond a block of columns, too
  // Seven vectors of a B that is too large to be read where it lies, of 32 and of 64 bits.
  check_product<T>(15, 100, 1400, true, false, 2);
  check_product<T>(15, 52, 1400, true, false, 2);
}

}  // namespace

int main() {
  check_sizes<float>();
  check_sizes<double>();
  return failures != 0;
}
