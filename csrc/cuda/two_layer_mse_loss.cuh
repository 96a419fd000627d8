// The two-layer network and its loss: difference = relu(x @ w1 + b1) @ w2 + b2 - y, and
// difference^2, its sum or its mean.
//
// FLOPs 2NH(I + O). The second product's epilogue subtracts y, stores the difference (the loss's
// gradient up to a factor) and adds up the block's part of the loss, so that the network's output
// never reaches memory. Launch shapes: product.cuh; one more block adds the parts of the loss.
#pragma once

#include "common/reduce.cuh"
#include "mse_loss.cuh"
#include "two_layer.cuh"

namespace pyext {

// difference = sums [+ bias] - y, stored times `scale`; squares go to `squares` or are added up in
// partials[block].
template <class T>
struct StoreLoss {
  using Stored = T;
  using Acc = Accumulate<T>;
  QuadMatrix<T> difference;
  QuadMatrix<const T> y;
  Bias<T> bias;  // data == nullptr: none
  Acc scale;
  QuadMatrix<T> squares;  // data == nullptr: none
  Acc* partials;

  struct State {
    Acc sum = 0;
  };

  __device__ __forceinline__ void row(int64_t m, int64_t n, Acc (&sums)[QUAD], int count,
                                      State& state) const {
    Acc targets[QUAD];
    Acc squared[QUAD];
    y.load(m, n, count, targets);
#pragma unroll
    for (int j = 0; j < QUAD; ++j) {
      if (bias.data != nullptr && j < count) {
        sums[j] += to_accumulate(bias.data[(n + j) * bias.stride]);
      }
      sums[j] -= targets[j];
      squared[j] = sums[j] * sums[j];
      if (j < count) state.sum += squared[j];
      sums[j] *= scale;
    }
    difference.store(m, n, count, sums);
    if (squares.data != nullptr) squares.store(m, n, count, squared);
  }
  __device__ __forceinline__ void finish(int64_t block, const State& state) const {
    if (partials == nullptr) return;
    const Acc block_total = block_sum(state.sum);
    if (threadIdx.x == 0) partials[block] = block_total;
  }
  static constexpr std::size_t shared_bytes(int threads) { return block_sum_bytes<Acc>(threads); }
};

// scaled_difference (N, O) = scale * (hidden @ w2 + b2 - y), contiguous; the loss goes to loss[0],
// or for Reduction::none to loss[N * O].
template <class T>
void output_layer_loss(const TwoLayerSize& size, const Matrix<const T>& hidden,
                       const Matrix<const T>& w2, const Bias<T>& b2, const Matrix<const T>& y,
                       Reduction reduction, Accumulate<T> scale, T* scaled_difference, T* loss,
                       Scratch& scratch, cudaStream_t stream) {
  using Acc = Accumulate<T>;
  const bool elementwise = reduction == Reduction::none;
  const ProductPlan plan =
      plan_product(size.batch, size.out, size.hidden, HAS_LARGE_TILE<T>);
  Acc* partials = elementwise ? nullptr : scratch.allocate<Acc>(plan.epilogue_blocks);
  const StoreLoss<T> epilogue{row_major(scaled_difference, size.out),
                              y,
                              b2,
                              scale,
                              row_major(elementwise ? loss : nullptr, size.out),
                              partials};
  product(plan, hidden, w2, size.batch, size.out, size.hidden, epilogue, scratch, stream);
  if (!elementwise) {
    const int64_t n = size.batch * size.out;
    sum_partials(partials, n == 0 ? 0 : plan.epilogue_blocks, reduction == Reduction::mean, n, loss,
                 stream);
  }
}

template <class T>
void two_layer_mse_loss_forward(const TwoLayerSize& size, const Matrix<const T>& x,
                                const Matrix<const T>& y, const Matrix<const T>& w1,
                                const Bias<T>& b1, const Matrix<const T>& w2, const Bias<T>& b2,
                                Reduction reduction, T* hidden, T* difference, T* loss,
                                Scratch& scratch, cudaStream_t stream) {
  hidden_layer(size, x, w1, b1, hidden, scratch, stream);
  const Matrix<const T> activations{hidden, size.hidden, 1};
  output_layer_loss(size, activations, w2, b2, y, reduction, Accumulate<T>(1), difference, loss,
                    scratch, stream);
}

}  // namespace pyext
