// The two-layer network's products with everything that fits into their epilogues:
//   hidden = relu(x @ w1 + b1)            bias and ReLU in the first product's epilogue
//   out    = hidden @ w2 + b2             (or error = out - y and partial sums of its square)
//   d      = (grad_out @ w2ᵀ + grad_hidden) where hidden > 0      ReLU's backward in the epilogue
//   grad_x = d @ w1ᵀ, grad_w1 = xᵀ @ d, grad_w2 = hiddenᵀ @ grad_out   (or w -= lr * grad)
// N x I x H x O multiply-adds: forward N (I H + H O), backward N (2 I H + 2 H O) with grad_x.
// Included once per instruction set by common/for_each_isa.h.
#include "common/product.h"

// out = sums + bias
template <class Acc, class T>
struct StoreWithBias {
  const T* bias;
  Matrix<T> out;

  void operator()(int64_t i, int64_t j, int64_t count, const Acc* sums) const {
    T* row = &out(i, j);
    if (bias)
      for (int64_t c = 0; c < count; ++c) row[c] = T(sums[c] + Acc(bias[j + c]));
    else
      for (int64_t c = 0; c < count; ++c) row[c] = T(sums[c]);
  }
};

// out = relu(sums + bias)
template <class Acc, class T>
struct StoreReluWithBias {
  const T* bias;
  Matrix<T> out;

  void operator()(int64_t i, int64_t j, int64_t count, const Acc* sums) const {
    T* row = &out(i, j);
    for (int64_t c = 0; c < count; ++c) {
      const Acc value = bias ? sums[c] + Acc(bias[j + c]) : sums[c];
      row[c] = T(value < 0 ? Acc(0) : value);
    }
  }
};

// d = (sums + grad_hidden) where hidden > 0, else 0; kept in the accumulation type
template <class Acc, class T>
struct StoreWhereActive {
  const T* grad_hidden;
  Matrix<const T> hidden;
  Matrix<Acc> d;

  void operator()(int64_t i, int64_t j, int64_t count, const Acc* sums) const {
    const T* activation = &hidden(i, j);
    const T* extra = grad_hidden ? grad_hidden + (&hidden(i, j) - hidden.data) : nullptr;
    Acc* row = &d(i, j);
    for (int64_t c = 0; c < count; ++c) {
      const Acc value = extra ? sums[c] + Acc(extra[c]) : sums[c];
      row[c] = Acc(activation[c]) <= 0 ? Acc(0) : value;
    }
  }
};

// error = sums + bias - y, times `factor` in `error`; the sum of its square per row and panel
template <class Acc, class T, class TError>
struct StoreError {
  const T* bias;
  Matrix<const T> y;
  Matrix<TError> error;
  Acc factor;
  T* squares;            // squared errors (N, O), or null where they are only summed
  double* partial_sums;  // [N][partials], zero before; a panel that starts at j: [i][j / lanes]
  int64_t partials;

  void operator()(int64_t i, int64_t j, int64_t count, const Acc* sums) const {
    TError* row = &error(i, j);
    Acc sum = 0;
    for (int64_t c = 0; c < count; ++c) {
      const Acc value = sums[c] + (bias ? Acc(bias[j + c]) : Acc(0)) - Acc(y(i, j + c));
      row[c] = TError(factor * value);
      if (squares) squares[i * y.columns + j + c] = T(value * value);
      sum += value * value;
    }
    partial_sums[i * partials + j / Vector<Acc>::lanes] = sum;
  }
};

// weight -= lr * sums
template <class Acc, class T>
struct Descend {
  Matrix<T> weight;
  Acc lr;

  void operator()(int64_t i, int64_t j, int64_t count, const Acc* sums) const {
    T* row = &weight(i, j);
    const int64_t step = weight.column_stride;
    if (step == 1)
      for (int64_t c = 0; c < count; ++c) row[c] = T(Acc(row[c]) - lr * sums[c]);
    else
      for (int64_t c = 0; c < count; ++c) row[c * step] = T(Acc(row[c * step]) - lr * sums[c]);
  }
};

// out[j] = Σ_i values(i, j), each column's sum in the order of its rows
template <class Acc, class TIn, class T, class Parallel>
void column_sums(const Matrix<const TIn>& values, T* out, const Parallel& parallel) {
  const int64_t threads = values.rows * values.columns < kSerialWork ? 1 : parallel.threads;
  constexpr int64_t kColumns = 256;  // a strip of accumulators that stays in L1
  parallel(divide_up(values.columns, kColumns), threads, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t j = strip * kColumns, count = std::min(kColumns, values.columns - j);
      Acc sums[kColumns] = {};
      for (int64_t i = 0; i < values.rows; ++i)
        for (int64_t c = 0; c < count; ++c) sums[c] += Acc(values(i, j + c));
      for (int64_t c = 0; c < count; ++c) out[j + c] = T(sums[c]);
    }
  });
}
