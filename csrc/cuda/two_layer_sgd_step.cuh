// One SGD step of the two-layer network on the sum of squared errors, in place:
//   hidden = relu(x @ w1), g = 2 (hidden @ w2 - y), loss = sum(g^2) / 4, d = (g @ w2^T) masked
//   w1 -= lr * x^T @ d,    w2 -= lr * hidden^T @ g
//
// FLOPs 2NH(2I + 3O). By slices of w1, in one launch or three, where the network is small enough
// (common/sliced_sgd.cuh), else five products; loss and g come from the second one's epilogue, the
// mask from the third's, and the updates are the last two's epilogues, so that no weight gradient
// reaches memory. w2 is read by the third product before the last one writes it. Launch shapes:
// product.cuh.
#pragma once

#include "common/sliced_sgd.cuh"
#include "two_layer_mse_loss.cuh"

namespace pyext {

// weight -= lr * sums
template <class T>
struct UpdateWeight : ElementwiseEpilogue {
  using Stored = T;
  using Acc = Accumulate<T>;
  QuadMatrix<T> weight;
  Acc lr;

  __device__ __forceinline__ void row(int64_t m, int64_t n, Acc (&sums)[QUAD], int count,
                                      State&) const {
    Acc values[QUAD];
    weight.load(m, n, count, values);
#pragma unroll
    for (int j = 0; j < QUAD; ++j) values[j] -= lr * sums[j];
    weight.store(m, n, count, values);
  }
};

// weight (m, n) -= lr * a @ b. The product runs along the dimension in which the weight is dense: a
// transposed weight is updated as weight^T -= lr * b^T @ a^T.
template <class T>
void update_weight(const Matrix<T>& weight, const Matrix<const T>& a, const Matrix<const T>& b,
                   int64_t m, int64_t n, int64_t k, Accumulate<T> lr, Scratch& scratch,
                   cudaStream_t stream) {
  if (weight.row_stride == 1 && weight.column_stride != 1) {
    const UpdateWeight<T> epilogue{{}, weight.transposed(), lr};
    product(b.transposed(), a.transposed(), n, m, k, epilogue, scratch, stream);
  } else {
    product(a, b, m, n, k, UpdateWeight<T>{{}, weight, lr}, scratch, stream);
  }
}

template <class T>
void sgd_step_by_products(const TwoLayerSize& size, const Matrix<const T>& x,
                          const Matrix<const T>& y, const Matrix<T>& w1, const Matrix<T>& w2,
                          double lr, T* loss, Scratch& scratch, cudaStream_t stream) {
  using Acc = Accumulate<T>;
  const Matrix<const T> old_w1 = as_const(w1), old_w2 = as_const(w2);
  T* hidden = scratch.allocate<T>(size.batch * size.hidden);
  T* g = scratch.allocate<T>(size.batch * size.out);
  T* d = scratch.allocate<T>(size.batch * size.hidden);
  const Matrix<const T> hidden_matrix{hidden, size.hidden, 1};
  const Matrix<const T> g_matrix{g, size.out, 1};
  const Matrix<const T> d_matrix{d, size.hidden, 1};

  hidden_layer(size, x, old_w1, Bias<T>{}, hidden, scratch, stream);
  output_layer_loss(size, hidden_matrix, old_w2, Bias<T>{}, y, Reduction::sum, Acc(2), g, loss,
                    scratch, stream);
  hidden_gradient(size, g_matrix, Matrix<const T>{}, old_w2, hidden_matrix, d, scratch, stream);
  update_weight(w1, x.transposed(), d_matrix, size.in, size.hidden, size.batch,
                static_cast<Acc>(lr), scratch, stream);
  update_weight(w2, hidden_matrix.transposed(), g_matrix, size.hidden, size.out, size.batch,
                static_cast<Acc>(lr), scratch, stream);
}

// One step, the way that `sgd_way` has found for its size.
template <class T>
void two_layer_sgd_step(SgdWay way, const TwoLayerSize& size, const Matrix<const T>& x,
                        const Matrix<const T>& y, const Matrix<T>& w1, const Matrix<T>& w2,
                        double lr, T* loss, Scratch& scratch, cudaStream_t stream) {
  switch (way) {
    case SgdWay::one_launch:
      return sgd_steps_in_one_launch<T>(size, {x, y}, w1, w2, lr, 1, loss, scratch, stream);
    case SgdWay::three_launches:
      return sgd_step_in_three_launches(size, x, y, w1, w2, lr, loss, scratch, stream);
    case SgdWay::five_products:
      return sgd_step_by_products(size, x, y, w1, w2, lr, loss, scratch, stream);
  }
}

}  // namespace pyext
