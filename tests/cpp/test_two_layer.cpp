// The fused training step without PyTorch: both arrangements of its products, shared among threads.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "common/buffer.h"
#include "common/matrix.h"

#define PYEXT_KERNELS "two_layer.h"
#include "common/for_each_isa.h"

namespace {

using pyext::Matrix;
using pyext::Panels;

// Runs the tasks one after another in as many shares as there are threads, the last share first: none
// may need what another one does.
struct Backwards {
  int64_t threads;
  template <class Body>
  void operator()(int64_t tasks, int64_t threads_wanted, const Body& body) const {
    const int64_t share = pyext::divide_up(tasks, std::min(threads, threads_wanted));
    for (int64_t begin = (tasks - 1) / share * share; begin >= 0; begin -= share)
      body(begin, std::min(begin + share, tasks));
  }
};

// Small integers, so that every sum is exact in any order.
template <class T>
struct Values {
  std::vector<T> data;
  int64_t rows, columns, row_stride, column_stride;

  Values(int64_t rows, int64_t columns, int step = 0, bool by_columns = false)
      : data(rows * columns),
        rows(rows),
        columns(columns),
        row_stride(by_columns ? 1 : columns),
        column_stride(by_columns ? rows : 1) {
    for (size_t i = 0; i < data.size() && step; ++i) data[i] = static_cast<T>(i * step % 5) - 2;
  }
  T& operator()(int64_t i, int64_t j) { return matrix()(i, j); }
  Matrix<T> matrix() { return {data.data(), rows, columns, row_stride, column_stride}; }
  Matrix<const T> view() const {
    return {data.data(), rows, columns, row_stride, column_stride};
  }
};

template <class T>
void check_step(int64_t n, int64_t n_in, int64_t n_hidden, int64_t n_out, int64_t threads,
                bool by_halves, bool w1_by_columns = false, bool w2_by_columns = false) {
  const Values<T> x(n, n_in, 3), y(n, n_out, 2), w1_before(n_in, n_hidden, 7, w1_by_columns);
  const Values<T> w2_before(n_hidden, n_out, 3, w2_by_columns);
  Values<T> w1 = w1_before, w2 = w2_before, hidden(n, n_hidden), grad_out(n, n_out), d(n, n_hidden);
  Values<T> g1(n_in, n_hidden, 0, w1_by_columns), g2(n_hidden, n_out, 0, w2_by_columns);
  Values<T> g1_of_copies = g1, g2_of_copies = g2;
  const T lr = T(0.5);
  PYEXT_ON_BEST_ISA({
    const int64_t partials = pyext::divide_up(n_out, kernels::Vector<T>::lanes);
    std::vector<double> partial_sums(n * partials);
    const kernels::StoreError<T, T, T> store_error{
        nullptr, y.view(), grad_out.matrix(), 2, nullptr, partial_sums.data(), partials};
    Panels<T> panels{nullptr, n, n_hidden,
                     kernels::panel_width_of_d<T>(
                         x.view(), n_hidden, kernels::StoreWithBias<T, T>{nullptr, g1.matrix()})};
    const pyext::Buffer<T> panels_data(panels.size());
    panels.data = panels_data.get();
    std::fill_n(panels.data, panels.size(), std::numeric_limits<T>::quiet_NaN());
    const Panels<const T> const_panels{panels.data, n, n_hidden, panels.width};
    const kernels::StoreWhereActive<T, T> store_d{nullptr, hidden.view(), panels};
    const auto rest = [&](const auto& rows) {
      kernels::product_of_rows<T>(rows, hidden.view(), w2.view(), store_error);
      kernels::product_of_rows<T>(rows, grad_out.view(), w2.view().transposed(), store_d);
    };
    if (by_halves)
      kernels::forward_by_halves<T>(x.view(), w1.view(), hidden.matrix(), Backwards{threads}, rest);
    else
      kernels::forward_by_rows<T>(x.view(), w1.view(), w2.view(), Backwards{threads},
                                  kernels::StoreReluWithBias<T, T>{nullptr, hidden.matrix()}, rest);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n_hidden; ++j) {
        const int64_t first = panels.width ? j / panels.width * panels.width : 0;
        d(i, j) = panels.at(i, first)[j - first];
      }
    if (panels.width)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = n_hidden % panels.width; c && c < panels.width; ++c)
          CHECK(panels.at(i, n_hidden / panels.width * panels.width)[c] == 0);
    kernels::weight_products<T>(x.view(), hidden.view(), const_panels, grad_out.view(),
                                Backwards{threads}, kernels::StoreWithBias<T, T>{nullptr, g1.matrix()},
                                kernels::StoreWithBias<T, T>{nullptr, g2.matrix()});
    const kernels::StoreWithBias<T, T> store_1{nullptr, g1_of_copies.matrix()};
    const kernels::StoreWithBias<T, T> store_2{nullptr, g2_of_copies.matrix()};
    const int64_t tasks = kernels::tasks_of_one_region<T>(x.view(), d.view(), grad_out.view(),
                                                          Backwards{threads}, store_1, store_2);
    CHECK(tasks <= threads);
    std::vector<Values<T>> copies(tasks, Values<T>(n, n_hidden));
    std::vector<int> calls(tasks);
    kernels::weight_products<T>(x.view(), hidden.view(), const_panels, grad_out.view(),
                                Backwards{threads}, store_1, store_2, [&](int64_t task) {
                                  ++calls[task];
                                  copies[task].data = d.data;
                                  return copies[task].view();
                                });
    CHECK(calls == std::vector<int>(tasks, 1));
    CHECK(g1_of_copies.data == g1.data && g2_of_copies.data == g2.data);
    kernels::weight_products<T>(x.view(), hidden.view(), const_panels, grad_out.view(),
                                Backwards{threads}, kernels::Descend<T, T>{w1.matrix(), lr},
                                kernels::Descend<T, T>{w2.matrix(), lr});
  });
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n_hidden; ++j) {
      T sum = 0, back = 0;
      for (int64_t k = 0; k < n_in; ++k) sum += x.view()(i, k) * w1_before.view()(k, j);
      CHECK(hidden(i, j) == std::max(sum, T(0)));
      for (int64_t k = 0; k < n_out; ++k) back += grad_out(i, k) * w2_before.view()(j, k);
      CHECK(d(i, j) == (sum > 0 ? back : T(0)));
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n_out; ++k) {
      T out = 0;
      for (int64_t j = 0; j < n_hidden; ++j) out += hidden(i, j) * w2_before.view()(j, k);
      CHECK(grad_out(i, k) == 2 * (out - y.view()(i, k)));
    }
  for (int64_t k = 0; k < n_in; ++k)
    for (int64_t j = 0; j < n_hidden; ++j) {
      T gradient = 0;
      for (int64_t i = 0; i < n; ++i) gradient += x.view()(i, k) * d(i, j);
      CHECK(g1(k, j) == gradient);
      CHECK(w1(k, j) == w1_before.view()(k, j) - lr * gradient);
    }
  for (int64_t j = 0; j < n_hidden; ++j)
    for (int64_t k = 0; k < n_out; ++k) {
      T gradient = 0;
      for (int64_t i = 0; i < n; ++i) gradient += hidden(i, j) * grad_out(i, k);
      CHECK(g2(j, k) == gradient);
      CHECK(w2(j, k) == w2_before.view()(j, k) - lr * gradient);
    }
}

}  // namespace

int main() {
  for (int64_t threads : {1, 2, 3, 8})
    for (int64_t n : {1, 4, 6, 33, 66})
      for (int64_t n_in : {1, 5, 61, 301})
        for (int64_t n_hidden : {7, 52, 97, 98, 100, 101, 112}) {
          check_step<double>(n, n_in, n_hidden, 3, threads, false);
          check_step<double>(n, n_in, n_hidden, 3, threads, true);
        }
  check_step<double>(40, 64, 300, 200, 3, false);  // w2 too large for a copy of each thread's own
  check_step<double>(300, 9, 52, 3, 2, true);  // a batch of more than one sum block
  check_step<float>(6, 5, 100, 1, 2, true);
  check_step<float>(9, 3, 97, 2, 3, true);
  // Of a weight by columns it is x that must fit the registers: with 100 columns, of 64 bits with 52.
  for (int64_t threads : {1, 2, 3})
    for (const bool w1_by_columns : {false, true})
      for (const bool w2_by_columns : {false, true}) {
        for (int64_t n_in : {5, 97, 100, 112})
          check_step<float>(9, n_in, 100, 3, threads, true, w1_by_columns, w2_by_columns);
        for (int64_t n_in : {49, 52})
          check_step<double>(33, n_in, 61, 3, threads, false, w1_by_columns, w2_by_columns);
      }
  return failures != 0;
}
