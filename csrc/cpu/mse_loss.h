// mse_loss: out = (input - target)^2, or the mean or sum of it, and its derivative
// grad_input = 2 (input - target) grad [/ n]. Bytes moved: forward 2 n items (3 n without a
// reduction), backward 3 n. Included once per instruction set by common/for_each_isa.h.
#include "common/stream.h"

// Sums run in this many independent lanes: enough to hide the latency of an add in two 512-bit
// accumulators of float, and the same on every instruction set so that the order of adds is too.
constexpr int kSumLanes = 64;

template <class Acc, class T>
void squared_error(const T* input, const T* target, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc error = Acc(input[i]) - Acc(target[i]);
    out[i] = T(error * error);
  }
}

// The sum over one block, in float64 beyond the lanes.
template <class Acc, class T>
double sum_of_squared_errors(const T* input, const T* target, int64_t n) {
  Acc lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int lane = 0; lane < kSumLanes; ++lane) {
      const Acc error = Acc(input[i + lane]) - Acc(target[i + lane]);
      lanes[lane] += error * error;
    }
  for (int lane = 0; i < n; ++i, ++lane) {
    const Acc error = Acc(input[i]) - Acc(target[i]);
    lanes[lane] += error * error;
  }
  double sum = 0;
  for (int lane = 0; lane < kSumLanes; ++lane) sum += lanes[lane];
  return sum;
}

// grad_input = scale * grad[i * grad_step] * (input - target); grad_step is 0 for a 0-d gradient.
template <class Acc, class T>
void mse_loss_backward(const T* grad, int64_t grad_step, const T* input, const T* target, Acc scale,
                       T* grad_input, int64_t n) {
  if (grad_step == 0) {
    const Acc factor = scale * Acc(grad[0]);
    for (int64_t i = 0; i < n; ++i) grad_input[i] = T(factor * (Acc(input[i]) - Acc(target[i])));
  } else {
    for (int64_t i = 0; i < n; ++i)
      grad_input[i] = T(scale * Acc(grad[i]) * (Acc(input[i]) - Acc(target[i])));
  }
}
