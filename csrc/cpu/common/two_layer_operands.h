// What the launches of the two-layer ops share: views of tensors, checks, threads.
#pragma once

#include "common/buffer.h"
#include "common/matrix.h"
#include "common/tensors.h"

namespace pyext {

template <class T>
Matrix<const T> view(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <class T>
Matrix<T> mutable_view(const Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// A view of a workspace that holds rows x columns without gaps.
template <class T>
Matrix<T> dense_view(T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns, 1};
}

template <class T>
Matrix<const T> as_const(const Matrix<T>& m) {
  return {m.data, m.rows, m.columns, m.row_stride, m.column_stride};
}

template <class T>
Panels<const T> as_const(const Panels<T>& p) {
  return {p.data, p.rows, p.columns, p.width};
}

// A vector without gaps and its pointer; null for an absent one.
struct __attribute__((visibility("hidden"))) Bias {
  std::optional<Tensor> dense;

  explicit Bias(const std::optional<Tensor>& bias)
      : dense(bias ? std::optional(in_one_run(*bias)) : std::nullopt) {}

  template <class T>
  const T* data() const {
    return dense ? dense->const_data_ptr<T>() : nullptr;
  }
};

// PyTorch's own threads: they are awake in a training loop anyway, and a pool of ours beside them
// would compete with every other op for the cores.
struct Parallel {
  int64_t threads = torch::stable::get_num_threads();

  template <class F>
  void operator()(int64_t tasks, int64_t threads_wanted, const F& f) const {
    if (threads_wanted == 1 || tasks == 1)
      f(int64_t(0), tasks);
    else
      torch::stable::parallel_for(0, tasks, 1, f);
  }
};

inline void check_matrix(const char* op, const char* name, const Tensor& like, const Tensor& t,
                         int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name,
                  " must have shape (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.is_cpu(), op, ": ", name,
                  " differs from x in dtype or device");
}

inline void check_network(const char* op, const Tensor& x, const Tensor& w1, const Tensor& w2,
                          const std::optional<Tensor>& b1, const std::optional<Tensor>& b2) {
  STD_TORCH_CHECK(x.dim() == 2 && w1.dim() == 2 && w2.dim() == 2, op,
                  ": x, w1 and w2 must be matrices");
  check_matrix(op, "w1", x, w1, x.size(1), w1.size(1));
  check_matrix(op, "w2", x, w2, w1.size(1), w2.size(1));
  for (const auto& [bias, size] : {std::pair(&b1, w1.size(1)), std::pair(&b2, w2.size(1))})
    STD_TORCH_CHECK(!*bias || ((*bias)->dim() == 1 && (*bias)->size(0) == size &&
                               (*bias)->scalar_type() == x.scalar_type() && (*bias)->is_cpu()),
                    op, ": a bias differs in shape, dtype or device");
}

}  // namespace pyext
