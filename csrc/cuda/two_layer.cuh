// Two-layer network: hidden = relu(x @ w1 + b1), out = hidden @ w2 + b2, and its gradients.
//   d = (grad_out @ w2^T + grad_hidden) where hidden > 0, else 0
//   grad_x = d @ w1^T, grad_w1 = x^T @ d, grad_w2 = hidden^T @ grad_out, grad_b = column sums
// x (N, I), w1 (I, H), w2 (H, O).
//
// FLOPs: forward 2NH(I + O), backward twice that. Bias and ReLU run in the first product's
// epilogue, the mask of ReLU's backward in the epilogue of the product that makes d, so that no
// pre-activation ever reaches memory. Launch shapes: product.cuh, column_sum.cuh.
#pragma once

#include "common/column_sum.cuh"
#include "common/product.cuh"
#include "common/two_layer_size.h"

namespace pyext {

// out = sums [+ bias], with a ReLU after it if asked for.
template <class T, bool Relu>
struct StoreBias : ElementwiseEpilogue {
  using Stored = T;
  using Acc = Accumulate<T>;
  QuadMatrix<T> out;
  const T* bias;  // nullptr: none
  int64_t bias_stride;

  __device__ __forceinline__ void row(int64_t m, int64_t n, Acc (&sums)[QUAD], int count,
                                      State&) const {
#pragma unroll
    for (int j = 0; j < QUAD; ++j) {
      if (bias != nullptr && j < count) sums[j] += to_accumulate(bias[(n + j) * bias_stride]);
      if constexpr (Relu) sums[j] = sums[j] < 0 ? Acc(0) : sums[j];
    }
    out.store(m, n, count, sums);
  }
};

// out = (sums [+ addend]) where hidden > 0, else 0: ReLU's backward.
template <class T>
struct StoreMasked : ElementwiseEpilogue {
  using Stored = T;
  using Acc = Accumulate<T>;
  QuadMatrix<T> out;
  QuadMatrix<const T> hidden;
  QuadMatrix<const T> addend;  // data == nullptr: none

  __device__ __forceinline__ void row(int64_t m, int64_t n, Acc (&sums)[QUAD], int count,
                                      State&) const {
    Acc activations[QUAD];
    hidden.load(m, n, count, activations);
    if (addend.data != nullptr) {
      Acc added[QUAD];
      addend.load(m, n, count, added);
#pragma unroll
      for (int j = 0; j < QUAD; ++j) sums[j] += added[j];
    }
#pragma unroll
    for (int j = 0; j < QUAD; ++j) sums[j] = activations[j] <= 0 ? Acc(0) : sums[j];
    out.store(m, n, count, sums);
  }
};

template <class T>
struct Bias {
  const T* data = nullptr;
  int64_t stride = 0;
};

// hidden (N, H) = relu(x @ w1 + b1), contiguous.
template <class T>
void hidden_layer(const TwoLayerSize& size, const Matrix<const T>& x, const Matrix<const T>& w1,
                  const Bias<T>& b1, T* hidden, Scratch& scratch, cudaStream_t stream) {
  const StoreBias<T, true> epilogue{{}, row_major(hidden, size.hidden), b1.data, b1.stride};
  product(x, w1, size.batch, size.hidden, size.in, epilogue, scratch, stream);
}

// out (m, n) = a @ b [+ bias], contiguous.
template <class T>
void plain_product(const Matrix<const T>& a, const Matrix<const T>& b, int64_t m, int64_t n,
                   int64_t k, const Bias<T>& bias, T* out, Scratch& scratch, cudaStream_t stream) {
  const StoreBias<T, false> epilogue{{}, row_major(out, n), bias.data, bias.stride};
  product(a, b, m, n, k, epilogue, scratch, stream);
}

// d (N, H) = (grad_out @ w2^T [+ grad_hidden]) masked by hidden, contiguous.
template <class T>
void hidden_gradient(const TwoLayerSize& size, const Matrix<const T>& grad_out,
                     const Matrix<const T>& grad_hidden, const Matrix<const T>& w2,
                     const Matrix<const T>& hidden, T* d, Scratch& scratch, cudaStream_t stream) {
  const StoreMasked<T> epilogue{{}, row_major(d, size.hidden), hidden, grad_hidden};
  product(grad_out, w2.transposed(), size.batch, size.hidden, size.out, epilogue, scratch, stream);
}

template <class T>
void two_layer_forward(const TwoLayerSize& size, const Matrix<const T>& x,
                       const Matrix<const T>& w1, const Bias<T>& b1, const Matrix<const T>& w2,
                       const Bias<T>& b2, T* hidden, T* out, Scratch& scratch,
                       cudaStream_t stream) {
  hidden_layer(size, x, w1, b1, hidden, scratch, stream);
  const Matrix<const T> activations{hidden, size.hidden, 1};
  plain_product(activations, w2, size.batch, size.out, size.hidden, b2, out, scratch, stream);
}

// Where each gradient goes, without gaps; nullptr: not needed. A weight's may lie by columns.
template <class T>
struct TwoLayerGradients {
  T* x;
  T* w1;
  T* w2;
  T* b1;
  T* b2;
  bool w1_by_columns = false;
  bool w2_by_columns = false;
};

// out (m, n) = a^T @ b, the gradient of a weight: a (k, m), b (k, n).
template <class T>
void weight_product(const Matrix<const T>& a, const Matrix<const T>& b, int64_t m, int64_t n,
                    int64_t k, T* out, bool by_columns, Scratch& scratch, cudaStream_t stream) {
  if (by_columns)
    plain_product(b.transposed(), a, n, m, k, Bias<T>{}, out, scratch, stream);
  else
    plain_product(a.transposed(), b, m, n, k, Bias<T>{}, out, scratch, stream);
}

// grad_hidden.data is nullptr where the hidden layer has no gradient of its own.
template <class T>
void two_layer_backward(const TwoLayerSize& size, const Matrix<const T>& grad_out,
                        const Matrix<const T>& grad_hidden, const Matrix<const T>& x,
                        const Matrix<const T>& w1, const Matrix<const T>& w2,
                        const Matrix<const T>& hidden, const TwoLayerGradients<T>& gradients,
                        Scratch& scratch, cudaStream_t stream) {
  if (gradients.x || gradients.w1 || gradients.b1) {
    T* d = scratch.allocate<T>(size.batch * size.hidden);
    const Matrix<const T> d_matrix{d, size.hidden, 1};
    hidden_gradient(size, grad_out, grad_hidden, w2, hidden, d, scratch, stream);
    if (gradients.x) {
      plain_product(d_matrix, w1.transposed(), size.batch, size.in, size.hidden, Bias<T>{},
                    gradients.x, scratch, stream);
    }
    if (gradients.w1) {
      weight_product(x, d_matrix, size.in, size.hidden, size.batch, gradients.w1,
                     gradients.w1_by_columns, scratch, stream);
    }
    if (gradients.b1) {
      column_sum(d_matrix, size.batch, size.hidden, gradients.b1, scratch, stream);
    }
  }
  if (gradients.w2) {
    weight_product(hidden, grad_out, size.hidden, size.out, size.batch, gradients.w2,
                   gradients.w2_by_columns, scratch, stream);
  }
  if (gradients.b2) column_sum(grad_out, size.batch, size.out, gradients.b2, scratch, stream);
}

}  // namespace pyext
