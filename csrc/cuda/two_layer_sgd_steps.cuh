// SGD steps of the two-layer network, in place: in one cooperative launch where that is possible
// (common/sliced_sgd.cuh), else one after the other (two_layer_sgd_step.cuh).
#pragma once

#include "two_layer_sgd_step.cuh"

namespace pyext {

// losses[steps]. `with_scratch(f)` calls f with scratch memory that lives as long as that call: what
// one step needs is free for the next.
template <class T, class WithScratch>
void two_layer_sgd_steps(const TwoLayerSize& size, const SgdBatches<T>& batches,
                         const Matrix<T>& w1, const Matrix<T>& w2, double lr, int64_t steps,
                         T* losses, const WithScratch& with_scratch, cudaStream_t stream) {
  if (steps == 0) return;
  const SgdWay way = sgd_way<T>(size);
  if (way == SgdWay::one_launch) {
    with_scratch([&](Scratch& scratch) {
      sgd_steps_in_one_launch(size, batches, w1, w2, lr, steps, losses, scratch, stream);
    });
    return;
  }
  for (int64_t step = 0; step < steps; ++step) {
    Matrix<const T> x = batches.x, y = batches.y;
    x.data += step * batches.x_stride;
    y.data += step * batches.y_stride;
    with_scratch([&](Scratch& scratch) {
      two_layer_sgd_step(way, size, x, y, w1, w2, lr, losses + step, scratch, stream);
    });
  }
}

}  // namespace pyext
