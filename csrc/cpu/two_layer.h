// The two-layer network's products with everything that fits into their epilogues:
//   hidden = relu(x @ w1 + b1)            bias and ReLU in the first product's epilogue
//   out    = hidden @ w2 + b2             (or error = out - y and partial sums of its square)
//   d      = (grad_out @ w2ᵀ + grad_hidden) where hidden > 0      ReLU's backward in the epilogue
//   grad_x = d @ w1ᵀ, grad_w1 = xᵀ @ d, grad_w2 = hiddenᵀ @ grad_out   (or w -= lr * grad)
// N x I x H x O multiply-adds: forward N (I H + H O), backward N (2 I H + 2 H O) with grad_x.
// Included once per instruction set by common/for_each_isa.h.
#include "common/product.h"

// Rows of the batch, and the threads that work on them: Parallel{1} is the thread at hand alone. (A
// type of its own for that would have every product compiled twice.)
template <class Parallel>
struct Rows {
  int64_t begin, end;
  Parallel parallel;
};

// The product of these rows of A alone; the epilogue is told their numbers in the batch.
template <class Acc, class TA, class TB, class Parallel, class Epilogue>
void product_of_rows(const Rows<Parallel>& rows, const Matrix<const TA>& a,
                     const Matrix<const TB>& b, const Epilogue& epilogue) {
  product<Acc>(a.row_range(rows.begin, rows.end), b, rows.parallel,
               [&](int64_t i, int64_t j, int64_t count, const Acc* sums) {
                 epilogue(rows.begin + i, j, count, sums);
               });
}

// Rows that a product without packing needs at least.
constexpr int64_t kSlab = 4;

// Begin and end of one of `shares` shares of the rows: whole slabs, and the last one has the rest.
inline std::pair<int64_t, int64_t> share_of(int64_t rows, int64_t index, int64_t shares) {
  const int64_t slabs = rows / kSlab;
  return {slabs * index / shares * kSlab,
          index == shares - 1 ? rows : slabs * (index + 1) / shares * kSlab};
}

// f(rows) on each thread, with rows of its own.
template <class Parallel, class F>
void for_rows(int64_t rows, int64_t threads, const Parallel& parallel, const F& f) {
  const int64_t slabs = std::max<int64_t>(rows / kSlab, 1);
  parallel(slabs, threads, [&](int64_t begin, int64_t end) {
    f(Rows<Parallel>{begin * kSlab, end == slabs ? rows : end * kSlab, Parallel{1}});
  });
}

// Whether w2 is so small that each thread packs its own copy rather than wait for a shared one after
// every product.
template <class T>
bool is_copied_by_each(const Matrix<const T>& w2) {
  return w2.rows * w2.columns <= 1 << 15;
}

// hidden = epilogue(x @ w1), then rest(rows): products of these rows of hidden with w2 and of what
// comes of them. As much of it as needs no shared packing is one parallel region, in which each
// thread takes its rows through the network and waits for nobody.
template <class Acc, class T, class Parallel, class Epilogue, class Rest>
void forward_by_rows(const Matrix<const T>& x, const Matrix<const T>& w1,
                     const Matrix<const T>& w2, const Parallel& parallel, const Epilogue& epilogue,
                     const Rest& rest) {
  const bool own_w2 = is_copied_by_each(w2);
  const bool all = own_w2 && needs_no_packing<Acc>(x, w1);
  if (!all) product<Acc>(x, w1, parallel, epilogue);
  if (!own_w2) return rest(Rows<Parallel>{0, x.rows, parallel});
  const int64_t work = x.rows * w1.columns * (w2.columns + (all ? x.columns : 0));
  for_rows(x.rows, work < kSerialWork ? 1 : parallel.threads, parallel, [&](const auto& rows) {
    if (all) product_of_rows<Acc>(rows, x, w1, epilogue);
    rest(rows);
  });
}

// Whether a step takes `forward_by_halves`.
template <class Acc, class T>
bool goes_by_halves(const Matrix<const T>& x, const Matrix<const T>& w1,
                    const Matrix<const T>& w2) {
  return is_copied_by_each(w2) && needs_no_packing<Acc>(x, w1);
}

// The same for a step that updates w1. Each half of the threads keeps to one half of the depth, here
// and in the update: w1 is 400 KB at 64 x 1000 x 100, and half of it would otherwise have to come
// from the other core's cache after every step (a step of 288 µs takes 184, seen on two Zen 4 cores
// while eager took 550). Whoever works, an element is the sum of its two halves.
template <class Acc, class TIn, class T, class Parallel, class Rest>
void forward_by_halves(const Matrix<const TIn>& x, const Matrix<const TIn>& w1,
                       const Matrix<T>& hidden, const Parallel& parallel, const Rest& rest) {
  const int64_t n = x.rows, n_hidden = w1.columns;
  const int64_t threads = n * n_hidden * x.columns < kSerialWork ? 1 : parallel.threads;
  const int64_t groups = std::clamp<int64_t>(threads / 2, 1, std::max<int64_t>(n / kSlab, 1));
  const Buffer<Acc> sums(2 * n * n_hidden);
  parallel(2 * groups, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t half = task / groups;
      const auto [row, row_end] = share_of(n, task % groups, groups);
      const auto [k, k_end] = share_of(x.columns, half, 2);
      Acc* out = sums.get() + half * n * n_hidden;
      product_of_rows<Acc>(Rows<Parallel>{row, row_end, Parallel{1}}, x.column_range(k, k_end),
                           w1.row_range(k, k_end),
                           [&](int64_t i, int64_t j, int64_t count, const Acc* from) {
                             std::copy_n(from, count, out + i * n_hidden + j);
                           });
    }
  });
  for_rows(n, threads, parallel, [&](const auto& rows) {
    for (int64_t i = rows.begin * n_hidden; i < rows.end * n_hidden; ++i) {
      const Acc sum = sums.get()[i] + sums.get()[n * n_hidden + i];
      hidden.data[i] = T(sum < 0 ? Acc(0) : sum);
    }
    rest(rows);
  });
}

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

  StoreWithBias from_row(int64_t i) const {
    return {bias, out.row_range(i, out.rows)};
  }
  bool is_by_columns() const { return out.is_by_columns(); }
  // Of a gradient, which has no bias.
  StoreWithBias transposed() const { return {nullptr, out.transposed()}; }
  // Without a bias a microkernel stores from its registers.
  static constexpr bool kReads = false;
  template <class V>
  V operator()(V, V sums) const {
    return sums;
  }
  bool can_be_in_place() const { return !bias && out.column_stride == 1; }
  Acc* in_place(int64_t i) const
    requires(std::is_same_v<T, Acc>)
  {
    return &out(i, 0);
  }
  int64_t row_stride() const { return out.row_stride; }
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

// d = (sums + grad_hidden) where hidden > 0, else 0; kept in the accumulation type. If d lies in panels
// a call begins at a panel's first column and ends with the panel or the last column: the product
// whose epilogue this is has as many columns, so its panels are the same.
template <class Acc, class T>
struct StoreWhereActive {
  const T* grad_hidden;
  Matrix<const T> hidden;
  Panels<Acc> d;

  void operator()(int64_t i, int64_t j, int64_t count, const Acc* sums) const {
    const T* activation = &hidden(i, j);
    const T* extra = grad_hidden ? grad_hidden + (&hidden(i, j) - hidden.data) : nullptr;
    Acc* row = d.at(i, j);
    for (int64_t c = 0; c < count; ++c) {
      const Acc value = extra ? sums[c] + Acc(extra[c]) : sums[c];
      row[c] = Acc(activation[c]) <= 0 ? Acc(0) : value;
    }
    for (int64_t c = count; c < d.width; ++c) row[c] = 0;
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

  Descend from_row(int64_t i) const { return {weight.row_range(i, weight.rows), lr}; }
  bool is_by_columns() const { return weight.is_by_columns(); }
  Descend transposed() const { return {weight.transposed(), lr}; }
  // The same where the sums are: a microkernel that has whole rows of them in registers updates the
  // weight from there (9 of 137 µs of one thread for w1's update at 64 x 1000 x 100).
  static constexpr bool kReads = true;
  template <class V>
  V operator()(V before, V sums) const {
    return before - lr * sums;
  }
  bool can_be_in_place() const { return weight.column_stride == 1; }
  Acc* in_place(int64_t i) const
    requires(std::is_same_v<T, Acc>)
  {
    return &weight(i, 0);
  }
  int64_t row_stride() const { return weight.row_stride; }
};

// epilogue(aᵀ @ b), the gradient of a weight, by the rows or the columns that the weight lies in.
template <class Acc, class TA, class TB, class Parallel, class Epilogue>
void weight_product(const Matrix<const TA>& a, const Matrix<const TB>& b, const Parallel& parallel,
                    const Epilogue& epilogue) {
  if (epilogue.is_by_columns())
    product<Acc>(b.transposed(), a, parallel, epilogue.transposed());
  else
    product<Acc>(a.transposed(), b, parallel, epilogue);
}

// The same where b may lie in panels.
template <class Acc, class TA, class Parallel, class Epilogue>
void weight_product(const Matrix<const TA>& a, const Panels<const Acc>& b, const Parallel& parallel,
                    const Epilogue& epilogue) {
  if (b.width)
    product<Acc>(a.transposed(), b, parallel, epilogue);
  else
    weight_product<Acc>(a, b.by_rows(), parallel, epilogue);
}

// The width of the panels for a d that is needed for epilogue(xᵀ @ d) alone; 0: by rows. Packing would
// read and write all of d once more: 2 MB at 1024 x 784 x 512 x 10.
template <class Acc, class T, class Epilogue>
int64_t panel_width_of_d(const Matrix<const T>& x, int64_t n_hidden, const Epilogue& epilogue) {
  return !epilogue.is_by_columns() && can_take_panels<Acc>(x.transposed(), n_hidden)
             ? panel_width<Acc>(n_hidden)
             : 0;
}

// The tasks of weight_products where it is one parallel region, in which they wait for nobody, at
// most one for each thread; else 0. Of d and grad_out only the shapes and strides count.
template <class Acc, class T, class TGrad, class Parallel, class Epilogue1, class Epilogue2>
int64_t tasks_of_one_region(const Matrix<const T>& x, const Matrix<const Acc>& d,
                            const Matrix<const TGrad>& grad_out, const Parallel& parallel,
                            const Epilogue1& epilogue1, const Epilogue2& epilogue2) {
  if (!needs_no_packing<Acc>(x.transposed(), d) || epilogue1.is_by_columns() ||
      epilogue2.is_by_columns())
    return 0;
  const int64_t work = d.rows * d.columns * (x.columns + grad_out.columns);
  return std::min(work < kSerialWork ? 1 : parallel.threads,
                  std::max<int64_t>(x.columns / kSlab, 1));
}

// epilogue1(xᵀ @ d) and epilogue2(hiddenᵀ @ grad_out), the gradients of w1 and w2. Where neither
// needs shared packing they are one parallel region, in which each thread takes some rows of both: of
// w1 those of its half of the depth in forward_by_halves. There d is what `d_of(task)` returns, which
// is called once for each of tasks_of_one_region.
template <class Acc, class T, class TGrad, class Parallel, class Epilogue1, class Epilogue2,
          class DOf>
void weight_products(const Matrix<const T>& x, const Matrix<const T>& hidden,
                     const Panels<const Acc>& d, const Matrix<const TGrad>& grad_out,
                     const Parallel& parallel, const Epilogue1& epilogue1,
                     const Epilogue2& epilogue2, const DOf& d_of) {
  const auto x_t = x.transposed(), hidden_t = hidden.transposed();
  const int64_t tasks =
      tasks_of_one_region<Acc>(x, d.by_rows(), grad_out, parallel, epilogue1, epilogue2);
  if (tasks == 0) {
    weight_product<Acc>(x, d, parallel, epilogue1);
    weight_product<Acc>(hidden, grad_out, parallel, epilogue2);
    return;
  }
  parallel(tasks, tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Matrix<const Acc> d = d_of(task);
      const auto [k, k_end] = share_of(x.columns, task, tasks);
      product<Acc>(x_t.row_range(k, k_end), d, Parallel{1}, epilogue1.from_row(k));
      const auto [j, j_end] = share_of(hidden.columns, task, tasks);
      product<Acc>(hidden_t.row_range(j, j_end), grad_out, Parallel{1}, epilogue2.from_row(j));
    }
  });
}

// The same of a d that is there already.
template <class Acc, class T, class TGrad, class Parallel, class Epilogue1, class Epilogue2>
void weight_products(const Matrix<const T>& x, const Matrix<const T>& hidden,
                     const Panels<const Acc>& d, const Matrix<const TGrad>& grad_out,
                     const Parallel& parallel, const Epilogue1& epilogue1,
                     const Epilogue2& epilogue2) {
  weight_products<Acc>(x, hidden, d, grad_out, parallel, epilogue1, epilogue2,
                       [&](int64_t) { return d.by_rows(); });
}

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
