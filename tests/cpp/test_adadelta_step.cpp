// The kernel of adadelta_step without PyTorch, on numbers whose roots and quotients are exact.

#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"

#define PYEXT_KERNELS "adadelta_step.h"
#include "common/for_each_isa.h"

namespace {

// acc_delta + eps = 4^a and square_avg' + eps = 4^b, so that delta = 2^(a - b) g.
template <class T>
void check_lengths() {
  for (int n = 0; n < 150; ++n) {
    std::vector<T> param(n), grad(n), square_avg(n), acc_delta(n);
    for (int i = 0; i < n; ++i) {
      param[i] = T(i % 7);
      grad[i] = T(i % 3) - param[i];  // with a decay of 1, g is 0, 1 or 2
      const T g = T(i % 3);
      square_avg[i] = T(32) - T(2) - g * g;  // the mean with g^2, plus 1, is 16
      acc_delta[i] = T(i % 2 ? 63 : 15);
    }
    const std::vector<T> old = param;
    PYEXT_ON_BEST_ISA({
      const kernels::AdadeltaRates<T> rates{T(2), T(0.5), T(0.5), T(1), T(1)};
      kernels::adadelta_step<T, true>(param.data(), grad.data(), square_avg.data(),
                                      acc_delta.data(), n, rates);
    });
    for (int i = 0; i < n; ++i) {
      const T g = T(i % 3), delta = (i % 2 ? 2 : 1) * g;
      CHECK(square_avg[i] == 15);
      CHECK(acc_delta[i] == T(0.5) * (i % 2 ? 63 : 15) + T(0.5) * delta * delta);
      CHECK(param[i] == old[i] - 2 * delta);
    }
  }
}

}  // namespace

int main() {
  check_lengths<float>();
  check_lengths<double>();
  return failures != 0;
}
