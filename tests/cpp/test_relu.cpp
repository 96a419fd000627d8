// ReLU's kernels without PyTorch: the kink, NaN, infinities, and lengths around the vector width.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "common/bits.h"

#define PYEXT_KERNELS "relu.h"
#include "common/for_each_isa.h"

namespace {

template <class T>
std::vector<T> forward(const std::vector<T>& x) {
  std::vector<T> out(x.size());
  const int64_t n = static_cast<int64_t>(x.size());
  PYEXT_ON_BEST_ISA(kernels::relu_forward(x.data(), out.data(), n));
  return out;
}

template <class T>
std::vector<T> backward(const std::vector<T>& grad, const std::vector<T>& out) {
  std::vector<T> grad_x(out.size());
  const int64_t n = static_cast<int64_t>(out.size());
  PYEXT_ON_BEST_ISA(kernels::relu_backward(grad.data(), out.data(), grad_x.data(), n));
  return grad_x;
}

template <class T>
void check_special_values() {
  const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
  const T least = std::numeric_limits<T>::denorm_min();
  const std::vector<T> out = forward<T>({nan, inf, -inf, T(0), T(-0.0), least, -least});
  CHECK(std::isnan(out[0]));
  CHECK(out[1] == inf);
  CHECK(out[2] == 0);
  CHECK(out[3] == 0 && !std::signbit(out[3]));
  CHECK(out[4] == 0 && std::signbit(out[4]));  // as PyTorch on the CPU
  CHECK(out[5] == least);
  CHECK(out[6] == 0);

  const std::vector<T> grad_x = backward<T>({1, 2, 3, 4}, {T(0), T(-0.0), least, nan});
  CHECK(grad_x[0] == 0);
  CHECK(grad_x[1] == 0);
  CHECK(grad_x[2] == 3);
  CHECK(grad_x[3] == 4);
}

// Every length up to a few vectors, so that each remainder of the vectorised loop is met.
template <class T>
void check_lengths() {
  for (int n = 0; n < 200; ++n) {
    std::vector<T> x(n), grad(n);
    for (int i = 0; i < n; ++i) {
      const int magnitude = i % 100 + 1;  // fits in every type
      x[i] = static_cast<T>(i % 3 == 0 ? -magnitude : magnitude);
      grad[i] = static_cast<T>(magnitude + 7);
    }
    const std::vector<T> out = forward(x), grad_x = backward(grad, out);
    for (int i = 0; i < n; ++i) {
      CHECK(out[i] == (i % 3 == 0 ? T(0) : x[i]));
      CHECK(grad_x[i] == (i % 3 == 0 ? T(0) : grad[i]));
    }
  }
}

// Around the 64 elements that are taken at a time; what lies behind the mask and the outputs stays.
template <class T>
void check_masks() {
  const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
  const T special[] = {T(3), T(-2), nan, T(0), T(-0.0), inf, -inf, -nan, T(1)};
  for (int n = 0; n < 200; ++n) {
    const int bytes = (n + 7) / 8;
    std::vector<T> x(n), grad(n), out(n + 1, T(77)), grad_x(n + 1, T(77));
    std::vector<uint8_t> mask(bytes + 1, 77);
    for (int i = 0; i < n; ++i) {
      x[i] = special[i % 9];
      grad[i] = static_cast<T>(i + 1);
    }
    PYEXT_ON_BEST_ISA(kernels::relu_forward_with_mask(x.data(), out.data(), mask.data(), n));
    PYEXT_ON_BEST_ISA(kernels::relu_backward_with_mask(grad.data(), mask.data(), grad_x.data(), n));
    for (int i = 0; i < n; ++i) {
      const bool passes = !(x[i] <= 0);
      CHECK((mask[i / 8] >> i % 8 & 1) == passes);
      CHECK(grad_x[i] == (passes ? grad[i] : T(0)));
      CHECK(std::isnan(x[i]) ? std::isnan(out[i]) : out[i] == (x[i] < 0 ? T(0) : x[i]));
    }
    if (n % 8 != 0) CHECK(mask[n / 8] >> n % 8 == 0);
    CHECK(mask[bytes] == 77 && out[n] == 77 && grad_x[n] == 77);
  }
}

}  // namespace

int main() {
  check_special_values<float>();
  check_special_values<double>();
  check_lengths<float>();
  check_lengths<double>();
  check_lengths<int32_t>();
  check_lengths<int8_t>();
  check_masks<float>();
  check_masks<double>();
  return failures != 0;
}
