// The squared error's kernels without PyTorch, against sums that are exact in floating point.

#include <cstdint>
#include <vector>

#include "check.h"

#define PYEXT_KERNELS "mse_loss.h"
#include "common/for_each_isa.h"

namespace {

// Small integers: every difference, square and sum is exact, in any order.
template <class T>
void check_lengths() {
  for (int n = 0; n < 300; ++n) {
    std::vector<T> input(n), target(n), grad(n), out(n), grad_input(n), grad_input_each(n);
    double expected = 0;
    for (int i = 0; i < n; ++i) {
      input[i] = static_cast<T>(i % 11);
      target[i] = static_cast<T>(i % 7);
      grad[i] = static_cast<T>(i % 5);
      const double difference = static_cast<double>(input[i]) - static_cast<double>(target[i]);
      expected += difference * difference;
    }
    const T one_grad = 3;
    double sum = -1;
    PYEXT_ON_BEST_ISA({
      kernels::squared_error<T>(input.data(), target.data(), out.data(), n);
      sum = kernels::sum_of_squared_errors<T>(input.data(), target.data(), n);
      kernels::mse_loss_backward<T>(
          &one_grad, 0, input.data(), target.data(), T(2), grad_input.data(), n);
      kernels::mse_loss_backward<T>(
          grad.data(), 1, input.data(), target.data(), T(2), grad_input_each.data(), n);
    });
    CHECK(sum == expected);
    for (int i = 0; i < n; ++i) {
      const T difference = input[i] - target[i];
      CHECK(out[i] == difference * difference);
      CHECK(grad_input[i] == 6 * difference);
      CHECK(grad_input_each[i] == 2 * grad[i] * difference);
    }
  }
}

}  // namespace

int main() {
  check_lengths<float>();
  check_lengths<double>();
  return failures != 0;
}
