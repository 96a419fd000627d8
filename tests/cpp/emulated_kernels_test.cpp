// Runs every CUDA kernel in the emulator and compares it with naive loops in float64: odd sizes,
// any strides, unaligned pointers, every tile and every split. No PyTorch, no GPU. With the argument
// --few: few of the layouts and networks.
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/adadelta_step.cuh"
#include "../../csrc/cuda/relu.cuh"
#include "../../csrc/cuda/two_layer_sgd_steps.cuh"
#include "emulated.h"

int failures = 0;
int checks = 0;

void expect(bool condition, const std::string& what) {
  ++checks;
  if (condition) return;
  if (++failures <= 40) std::printf("FAILED: %s\n", what.c_str());
}

namespace {

using namespace pyext;

template <class T>
double to_double(T value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<double>(value);
  } else {
    return to_accumulate(value);
  }
}

template <class T>
T from_double(double value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<T>(value);
  } else {
    return from_accumulate<T>(static_cast<float>(value));
  }
}

template <class T>
double rounded(double value) {
  return to_double(from_double<T>(value));
}

template <class T>
constexpr const char* NAME = "?";
template <>
constexpr const char* NAME<double> = "float64";
template <>
constexpr const char* NAME<float> = "float32";
template <>
constexpr const char* NAME<__half> = "float16";
template <>
constexpr const char* NAME<__nv_bfloat16> = "bfloat16";

// Half a unit in the last place, relative.
template <class T>
constexpr double ROUNDING = 0;
template <>
constexpr double ROUNDING<double> = 1.2e-16;
template <>
constexpr double ROUNDING<float> = 6e-8;
template <>
constexpr double ROUNDING<__half> = 4.9e-4;
template <>
constexpr double ROUNDING<__nv_bfloat16> = 3.95e-3;

std::mt19937_64 generator(20240607);

double normal() { return std::normal_distribution<double>()(generator); }

// Memory with canaries around it, but under AddressSanitizer, which must see where it ends; `offset`
// elements away from 16-byte alignment.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int offset = 0)
      : count_(count), bytes_((count + offset) * sizeof(T) + 2 * MARGIN, CANARY) {
    start_ = MARGIN + offset * sizeof(T);
  }

  T* data() { return reinterpret_cast<T*>(bytes_.data() + start_); }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return count_; }

  void fill_normal() {
    for (int64_t i = 0; i < count_; ++i) data()[i] = from_double<T>(normal());
  }

  bool surroundings_untouched() const {
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      const bool inside = i >= start_ && i < start_ + count_ * sizeof(T);
      if (!inside && bytes_[i] != CANARY) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char CANARY = 0xa5;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t MARGIN = 0;
#else
  static constexpr std::size_t MARGIN = 64;  // operator new aligns to 16
#endif
  int64_t count_;
  std::vector<unsigned char> bytes_;
  std::size_t start_;
};

class HostScratch : public Scratch {
  void* allocate_bytes(int64_t bytes) override {
    held_.push_back(std::make_unique<Buffer<unsigned char>>(bytes));
    for (int64_t i = 0; i < bytes; ++i) (*held_.back())[i] = 0xff;  // nan until written
    return held_.back()->data();
  }
  std::vector<std::unique_ptr<Buffer<unsigned char>>> held_;

 public:
  bool surroundings_untouched() const {
    for (const auto& buffer : held_) {
      if (!buffer->surroundings_untouched()) return false;
    }
    return true;
  }
};

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// ---------------------------------------------------------------- elementwise

template <class T>
void fill_with_specials(Buffer<T>& buffer) {
  for (int64_t i = 0; i < buffer.size(); ++i) buffer[i] = from_double<T>(normal() * 40);
  if constexpr (!std::is_integral_v<T>) {
    const double specials[] = {NAN, -0.0, 0.0, INFINITY, -INFINITY};
    for (int64_t i = 0; i < buffer.size() && i < 5; ++i) {
      buffer[(i * 7) % buffer.size()] = from_double<T>(specials[i]);
    }
  }
}

const int64_t ELEMENT_COUNTS[] = {0, 1, 2, 3, 15, 16, 17, 255, 1025, 4096, 16391, 33000};

template <class T>
void test_relu_forward() {
  for (const int64_t n : ELEMENT_COUNTS) {
    for (const int offset : {0, 1}) {
      Buffer<T> x(n, offset);
      Buffer<T> out(n);
      fill_with_specials(x);
      relu_forward<T>(x.data(), out.data(), n, nullptr);
      bool right = true;
      for (int64_t i = 0; i < n; ++i) {
        const double value = to_double(x[i]);
        const double expected = value < 0 ? 0 : value;
        const double got = to_double(out[i]);
        right &= same(got, expected) && std::signbit(got) == std::signbit(expected);
      }
      expect(right && out.surroundings_untouched(), "relu_forward, n " + std::to_string(n));
    }
  }
}

template <class T>
void test_relu_backward() {
  for (const int64_t n : ELEMENT_COUNTS) {
    for (const int offset : {0, 1}) {
      Buffer<T> grad(n, offset);
      Buffer<T> out(n);
      Buffer<T> grad_x(n);
      grad.fill_normal();
      fill_with_specials(out);
      relu_backward<T>(grad.data(), out.data(), grad_x.data(), n, nullptr);
      bool right = true;
      for (int64_t i = 0; i < n; ++i) {
        const double expected = to_double(out[i]) <= 0 ? 0 : to_double(grad[i]);
        right &= same(to_double(grad_x[i]), expected);
      }
      expect(right && grad_x.surroundings_untouched(), "relu_backward, n " + std::to_string(n));
    }
  }
}

template <class T>
void test_relu_with_mask() {
  for (const int64_t n : ELEMENT_COUNTS) {
    for (const int offset : {0, 1}) {
      Buffer<T> x(n, offset), grad(n, offset), out(n), grad_x(n);
      Buffer<uint8_t> mask((n + 7) / 8);
      fill_with_specials(x);
      grad.fill_normal();
      if (n == 33000 && offset == 1)  // one block, which comes back for more
        launch(relu_forward_with_mask_kernel<T, 1>, {dim3(1), dim3(ELEMENTWISE_THREADS)}, nullptr,
               x.data(), out.data(), mask.data(), n);
      else
        relu_forward_with_mask<T>(x.data(), out.data(), mask.data(), n, nullptr);
      relu_backward_with_mask<T>(grad.data(), mask.data(), grad_x.data(), n, nullptr);
      bool right = n % 8 == 0 || mask[n / 8] >> n % 8 == 0;
      for (int64_t i = 0; i < n; ++i) {
        const double value = to_double(x[i]);
        const bool passes = !(value <= 0);
        right &= same(to_double(out[i]), value < 0 ? 0 : value);
        right &= (mask[i / 8] >> i % 8 & 1) == passes;
        right &= same(to_double(grad_x[i]), passes ? to_double(grad[i]) : 0);
      }
      right &= out.surroundings_untouched() && mask.surroundings_untouched() &&
               grad_x.surroundings_untouched();
      expect(right, "relu with a mask, n " + std::to_string(n));
    }
  }
}

template <class T>
void test_adadelta_step() {
  const double lr = 0.5, rho = 0.75, eps = 0.125, weight_decay = 0.25;
  for (const int64_t n : ELEMENT_COUNTS) {
    for (const int offset : {0, 1}) {
      Buffer<T> param(n, offset), grad(n), square_avg(n), acc_delta(n);
      for (Buffer<T>* each : {&param, &grad, &square_avg, &acc_delta}) each->fill_normal();
      std::vector<double> expected;
      for (int64_t i = 0; i < n; ++i) {
        square_avg[i] = from_double<T>(std::abs(to_double(square_avg[i])));
        acc_delta[i] = from_double<T>(std::abs(to_double(acc_delta[i])));
        const double g = to_double(grad[i]) + weight_decay * to_double(param[i]);
        const double mean_square = rho * to_double(square_avg[i]) + (1 - rho) * g * g;
        const double acc = to_double(acc_delta[i]);
        const double delta = std::sqrt(acc + eps) / std::sqrt(mean_square + eps) * g;
        expected.insert(expected.end(), {to_double(param[i]) - lr * delta, mean_square,
                                         rho * acc + (1 - rho) * delta * delta});
      }
      adadelta_step<T>(param.data(), grad.data(), square_avg.data(), acc_delta.data(), n,
                       adadelta_rates<Accumulate<T>>(lr, rho, eps, weight_decay), nullptr);
      bool right = true;
      for (int64_t i = 0; i < n; ++i) {
        const double got[] = {to_double(param[i]), to_double(square_avg[i]),
                              to_double(acc_delta[i])};
        // 16 roundings in the type of the sums, of terms up to 8, and one on storing.
        for (int j = 0; j < 3; ++j) {
          const double value = expected[3 * i + j];
          right &= std::abs(got[j] - value) <=
                   16 * 8 * ROUNDING<Accumulate<T>> + 1.01 * ROUNDING<T> * std::abs(value) +
                       (sizeof(T) == 2 ? 6e-8 : 0);
        }
      }
      for (Buffer<T>* each : {&param, &grad, &square_avg, &acc_delta})
        right &= each->surroundings_untouched();
      expect(right, std::string("adadelta_step ") + NAME<T> + ", n " + std::to_string(n) +
                        ", offset " + std::to_string(offset));
    }
  }
}

template <class T>
void test_mse_loss() {
  for (const int64_t n : ELEMENT_COUNTS) {
    for (const int offset : {0, 1}) {
      const std::string name = std::string("mse_loss ") + NAME<T> + ", n " + std::to_string(n) +
                               ", offset " + std::to_string(offset) + ": ";
      Buffer<T> input(n, offset);
      Buffer<T> target(n);
      Buffer<T> grad(n);
      input.fill_normal();
      target.fill_normal();
      grad.fill_normal();
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        sum += std::pow(to_double(input[i]) - to_double(target[i]), 2);
      }

      Buffer<T> squares(n);
      mse_loss_elementwise<T>(input.data(), target.data(), squares.data(), n, nullptr);
      bool right = squares.surroundings_untouched();
      for (int64_t i = 0; i < n; ++i) {
        const double expected = std::pow(to_double(input[i]) - to_double(target[i]), 2);
        right &= std::fabs(to_double(squares[i]) - expected) <= 8 * ROUNDING<T> * expected + 1e-7;
      }
      expect(right, name + "none");

      for (const bool mean : {false, true}) {
        HostScratch scratch;
        Buffer<T> loss(1);
        mse_loss_reduced<T>(input.data(), target.data(), mean, loss.data(), n, scratch, nullptr);
        const double expected = rounded<T>(mean ? sum / n : sum);
        const double error = std::fabs(to_double(loss[0]) - expected);
        expect(same(to_double(loss[0]), expected) ||
                   error <= (2 * ROUNDING<T> + 64 * ROUNDING<Accumulate<T>>)*expected,
               name + (mean ? "mean" : "sum"));
        expect(loss.surroundings_untouched() && scratch.surroundings_untouched(), name + "bounds");

        for (const bool elementwise : {false, true}) {
          Buffer<T> grad_input(n);
          const T* grads = n == 0 ? nullptr : grad.data();
          mse_loss_backward<T>(grads, elementwise, input.data(), target.data(), mean,
                               grad_input.data(), n, nullptr);
          bool gradients_right = grad_input.surroundings_untouched();
          for (int64_t i = 0; i < n; ++i) {
            const double g = to_double(grad[elementwise ? i : 0]);
            const double wanted =
                g * 2 * (to_double(input[i]) - to_double(target[i])) / (mean ? n : 1);
            const double subnormal = std::is_same_v<T, __half> ? 6e-8 : 0;
            gradients_right &= std::fabs(to_double(grad_input[i]) - wanted) <=
                               (2 * ROUNDING<T> + 8 * ROUNDING<Accumulate<T>>)*std::fabs(wanted) +
                                   subnormal;
          }
          expect(gradients_right, name + "backward");
        }
      }
    }
  }
}

// ---------------------------------------------------------------- products

enum class Layout { rows, columns, strided, unaligned, padded, expanded_rows };

bool few = false;

std::vector<Layout> layouts() {
  if (few) return {Layout::rows, Layout::strided};
  return {Layout::rows,      Layout::columns, Layout::strided,
          Layout::unaligned, Layout::padded,  Layout::expanded_rows};
}

// Each layout of one operand meets every second one of the other.
bool is_left_out(Layout a, Layout b) { return (int(a) + int(b)) % 2 == 1; }

// A matrix of random numbers in the given layout.
template <class T>
struct Operand {
  Operand(int64_t rows, int64_t columns, Layout layout)
      : buffer(3 * rows * columns + 8 * (rows + columns) + 1, layout == Layout::unaligned),
        rows(rows),
        columns(columns) {
    buffer.fill_normal();
    switch (layout) {
      case Layout::rows:
        view = {buffer.data(), columns, 1};
        break;
      case Layout::columns:
        view = {buffer.data(), 1, rows};
        break;
      case Layout::strided:
        view = {buffer.data(), 3 * columns + 1, 3};
        break;
      case Layout::unaligned:
        view = {buffer.data(), columns + 3, 1};
        break;
      case Layout::padded:  // rows start aligned whatever their length
        view = {buffer.data(), (columns + 7) / 4 * 4, 1};
        break;
      case Layout::expanded_rows:
        view = {buffer.data(), 0, 1};
        break;
    }
    constant = {view.data, view.row_stride, view.column_stride};
  }

  double at(int64_t row, int64_t column) const {
    return to_double(view.data[row * view.row_stride + column * view.column_stride]);
  }

  // Whether the memory between the elements is as in `before`, a copy from earlier.
  bool gaps_untouched(Operand& before) {
    std::vector<bool> is_element(buffer.size());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        is_element[i * view.row_stride + j * view.column_stride] = true;
      }
    }
    for (int64_t i = 0; i < buffer.size(); ++i) {
      if (!is_element[i] && to_double(buffer[i]) != to_double(before.buffer[i])) return false;
    }
    return true;
  }

  Buffer<T> buffer;
  int64_t rows;
  int64_t columns;
  Matrix<T> view;
  Matrix<const T> constant;
};

// Rows of doubles, the naive side.
struct Dense {
  int64_t rows;
  int64_t columns;
  std::vector<double> values;

  double& at(int64_t i, int64_t j) { return values[i * columns + j]; }
};

using Element = std::function<double(int64_t, int64_t)>;

Dense naive_product(int64_t m, int64_t n, int64_t k, const Element& a, const Element& b) {
  Dense c{m, n, std::vector<double>(m * n)};
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += a(i, l) * b(l, j);
      c.at(i, j) = sum;
    }
  }
  return c;
}

template <class T>
Element element_of(const Operand<T>& operand) {
  return [&](int64_t i, int64_t j) { return operand.at(i, j); };
}

Element transposed(const Element& e) {
  return [=](int64_t i, int64_t j) { return e(j, i); };
}

// `terms` is the number of rounded operations behind one element, `scale` their magnitude.
template <class T>
void expect_close(double got, double expected, int64_t terms, double scale,
                  const std::string& name) {
  const double tolerance =
      4 * ROUNDING<T> * (std::fabs(expected) + 1e-3) +
      ROUNDING<Accumulate<T>>*(terms + 8) * (scale + std::fabs(expected));
  if (std::fabs(got - expected) <= tolerance) {
    ++checks;
  } else {
    expect(false, name + ": got " + std::to_string(got) + ", expected " + std::to_string(expected));
  }
}

template <class T>
void expect_matrix(Buffer<T>& got, Dense expected, int64_t terms, double scale,
                   const std::string& name) {
  expect(got.surroundings_untouched(), name + ": wrote out of bounds");
  for (std::size_t i = 0; i < expected.values.size(); ++i) {
    expect_close<T>(to_double(got[i]), expected.values[i], terms, scale, name);
  }
}

template <class T>
void test_product() {
  struct Size {
    int64_t m, n, k;
  };
  const Size sizes[] = {{1, 1, 1}, {5, 3, 0}, {33, 17, 5}, {31, 66, 49}, {130, 132, 40}};
  for (const Size& size : sizes) {
    for (const Layout layout_a : layouts()) {
      for (const Layout layout_b : layouts()) {
        if (is_left_out(layout_a, layout_b)) continue;
        Operand<T> a(size.m, size.k, layout_a);
        Operand<T> b(size.k, size.n, layout_b);
        Operand<T> bias(1, size.n, Layout::strided);
        Dense expected =
            naive_product(size.m, size.n, size.k, element_of(a), element_of(b));
        for (int64_t i = 0; i < size.m; ++i) {
          for (int64_t j = 0; j < size.n; ++j) {
            expected.at(i, j) = std::fmax(expected.at(i, j) + bias.at(0, j), 0);
          }
        }
        for (const TileChoice tile :
             {TileChoice::small, TileChoice::medium, TileChoice::large}) {
          if (tile == TileChoice::large && !HAS_LARGE_TILE<T>) continue;
          for (const int parts : {1, 3}) {
            const ProductPlan plan = plan_with(tile, size.m, size.n, size.k, parts);
            if (parts > 1 && plan.parts == 1) continue;
            HostScratch scratch;
            Buffer<T> out(size.m * size.n);
            const StoreBias<T, true> epilogue{
                {}, row_major(out.data(), size.n), bias.view.data, bias.view.column_stride};
            product(plan, a.constant, b.constant, size.m, size.n, size.k, epilogue, scratch,
                    nullptr);
            const std::string name =
                std::string("product ") + NAME<T> + " " + std::to_string(size.m) + "x" +
                std::to_string(size.n) + "x" + std::to_string(size.k) + ", layouts " +
                std::to_string(int(layout_a)) + " " + std::to_string(int(layout_b)) + ", tile " +
                std::to_string(int(tile)) + ", parts " + std::to_string(plan.parts);
            expect_matrix(out, expected, size.k, 4 * std::sqrt(size.k + 1.0), name);
            expect(scratch.surroundings_untouched(), name + ": scratch");
          }
        }
      }
    }
  }
}

template <class T>
void test_column_sum() {
  for (const int64_t rows : {0, 1, 7, 64, 300}) {
    for (const int64_t columns : {1, 31, 33, 70}) {
      for (const Layout layout : layouts()) {
        Operand<T> matrix(rows, columns, layout);
        Dense expected{1, columns, std::vector<double>(columns)};
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) expected.at(0, j) += matrix.at(i, j);
        }
        HostScratch scratch;
        Buffer<T> out(columns);
        column_sum(matrix.constant, rows, columns, out.data(), scratch, nullptr);
        expect_matrix(out, expected, rows, 4 * std::sqrt(rows + 1.0),
                      std::string("column_sum ") + NAME<T> + " " + std::to_string(rows) + "x" +
                          std::to_string(columns));
        expect(scratch.surroundings_untouched(), "column_sum: scratch");
      }
    }
  }
}

// ---------------------------------------------------------------- two-layer network

template <class T>
struct Network {
  Network(const TwoLayerSize& size, Layout layout)
      : size(size),
        x(size.batch, size.in, layout),
        y(size.batch, size.out, layout),
        w1(size.in, size.hidden, layout),
        w2(size.hidden, size.out, layout),
        b1(1, size.hidden, layout),
        b2(1, size.out, layout),
        name(std::string(NAME<T>) + " " + std::to_string(size.batch) + "x" +
             std::to_string(size.in) + "x" + std::to_string(size.hidden) + "x" +
             std::to_string(size.out) + ", layout " + std::to_string(int(layout))) {}

  // Activations as the kernels store them, rounded to T.
  Dense naive_hidden(bool bias) {
    Dense hidden =
        naive_product(size.batch, size.hidden, size.in, element_of(x), element_of(w1));
    for (int64_t i = 0; i < size.batch; ++i) {
      for (int64_t j = 0; j < size.hidden; ++j) {
        const double value = hidden.at(i, j) + (bias ? b1.at(0, j) : 0);
        hidden.at(i, j) = rounded<T>(value < 0 ? 0 : value);
      }
    }
    return hidden;
  }

  Dense naive_out(Dense& hidden, bool bias) {
    Dense out = naive_product(
        size.batch, size.out, size.hidden,
        [&](int64_t i, int64_t j) { return hidden.at(i, j); }, element_of(w2));
    if (bias) {
      for (int64_t i = 0; i < size.batch; ++i) {
        for (int64_t j = 0; j < size.out; ++j) out.at(i, j) += b2.at(0, j);
      }
    }
    return out;
  }

  double hidden_scale() const { return 6 * std::sqrt(size.in + 1.0); }
  // Includes what one rounding of the activations to T does to an output.
  double out_scale() const {
    return hidden_scale() * 6 * std::sqrt(size.hidden + 1.0) *
           (1 + ROUNDING<T> / ROUNDING<Accumulate<T>> / 64);
  }

  TwoLayerSize size;
  Operand<T> x, y, w1, w2, b1, b2;
  std::string name;
};

const TwoLayerSize NETWORKS[] = {
    {1, 1, 1, 1}, {0, 5, 4, 3}, {5, 0, 4, 3}, {6, 3, 0, 2},      {4, 3, 2, 0},
    {7, 5, 9, 3}, {33, 70, 34, 10}, {64, 200, 100, 10}, {65, 13, 67, 66},
};

template <class T>
void test_two_layer_forward() {
  for (const TwoLayerSize& size : NETWORKS) {
    for (const Layout layout : layouts()) {
      for (const bool bias : {false, true}) {
        Network<T> net(size, layout);
        Dense hidden_expected = net.naive_hidden(bias);
        Dense out_expected = net.naive_out(hidden_expected, bias);
        HostScratch scratch;
        Buffer<T> hidden(size.batch * size.hidden);
        Buffer<T> out(size.batch * size.out);
        const Bias<T> b1{bias ? net.b1.view.data : nullptr, net.b1.view.column_stride};
        const Bias<T> b2{bias ? net.b2.view.data : nullptr, net.b2.view.column_stride};
        two_layer_forward(size, net.x.constant, net.w1.constant, b1, net.w2.constant, b2,
                          hidden.data(), out.data(), scratch, nullptr);
        expect_matrix(hidden, hidden_expected, size.in, net.hidden_scale(),
                      "two_layer_forward hidden " + net.name);
        expect_matrix(out, out_expected, size.in + size.hidden, net.out_scale(),
                      "two_layer_forward out " + net.name);
        expect(scratch.surroundings_untouched(), "two_layer_forward scratch " + net.name);

        for (const Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
          const int64_t n = size.batch * size.out;
          Dense difference = out_expected;
          double sum = 0;
          for (int64_t i = 0; i < size.batch; ++i) {
            for (int64_t j = 0; j < size.out; ++j) {
              difference.at(i, j) -= net.y.at(i, j);
              sum += difference.at(i, j) * difference.at(i, j);
            }
          }
          HostScratch loss_scratch;
          Buffer<T> difference_got(n);
          Buffer<T> loss(reduction == Reduction::none ? n : 1);
          two_layer_mse_loss_forward(size, net.x.constant, net.y.constant, net.w1.constant, b1,
                                     net.w2.constant, b2, reduction, hidden.data(),
                                     difference_got.data(), loss.data(), loss_scratch, nullptr);
          const std::string name = "two_layer_mse_loss_forward " + net.name;
          expect_matrix(difference_got, difference, size.in + size.hidden, net.out_scale(), name);
          if (reduction == Reduction::none) {
            Dense squares = difference;
            double largest = 0;
            for (double& value : squares.values) {
              largest = std::fmax(largest, std::fabs(value));
              value *= value;
            }
            if (!std::is_same_v<T, __half> || largest < 200) {  // 65504 ends float16
              expect_matrix(loss, squares, size.in + size.hidden, 2 * largest * net.out_scale(),
                            name + " squares");
            }
          } else {
            const double expected = reduction == Reduction::mean ? sum / n : sum;
            if (n == 0 && reduction == Reduction::mean) {
              expect(std::isnan(to_double(loss[0])), name + ": the mean of nothing is nan");
            } else if (!std::is_same_v<T, __half> || expected < 60000) {
              expect(std::fabs(to_double(loss[0]) - expected) <=
                         (8 * ROUNDING<T> + 1e4 * ROUNDING<Accumulate<T>>)*expected,
                     name + " loss");
            }
          }
          expect(loss.surroundings_untouched() && loss_scratch.surroundings_untouched(),
                 name + " bounds");
        }
      }
    }
  }
}

template <class T>
void test_two_layer_backward() {
  for (const TwoLayerSize& size : NETWORKS) {
    for (const Layout layout : layouts()) {
      for (const bool with_grad_hidden : {false, true}) {
        Network<T> net(size, layout);
        Operand<T> grad_out(size.batch, size.out, layout);
        Operand<T> grad_hidden(size.batch, size.hidden, layout);
        Operand<T> hidden(size.batch, size.hidden, layout);  // about half of it is negative
        Dense d = naive_product(size.batch, size.hidden, size.out, element_of(grad_out),
                                transposed(element_of(net.w2)));
        for (int64_t i = 0; i < size.batch; ++i) {
          for (int64_t j = 0; j < size.hidden; ++j) {
            const double value = d.at(i, j) + (with_grad_hidden ? grad_hidden.at(i, j) : 0);
            d.at(i, j) = hidden.at(i, j) <= 0 ? 0 : rounded<T>(value);
          }
        }
        const Element d_element = [&](int64_t i, int64_t j) { return d.at(i, j); };
        HostScratch scratch;
        Buffer<T> grad_x(size.batch * size.in);
        Buffer<T> grad_w1(size.in * size.hidden);
        Buffer<T> grad_w2(size.hidden * size.out);
        Buffer<T> grad_b1(size.hidden);
        Buffer<T> grad_b2(size.out);
        const bool w1_by_columns = with_grad_hidden, w2_by_columns = !with_grad_hidden;
        const TwoLayerGradients<T> gradients{grad_x.data(),  grad_w1.data(), grad_w2.data(),
                                             grad_b1.data(), grad_b2.data(), w1_by_columns,
                                             w2_by_columns};
        two_layer_backward(size, grad_out.constant,
                           with_grad_hidden ? grad_hidden.constant : Matrix<const T>{},
                           net.x.constant, net.w1.constant, net.w2.constant, hidden.constant,
                           gradients, scratch, nullptr);
        const double d_scale = 6 * std::sqrt(size.out + 1.0) *
                               (1 + ROUNDING<T> / ROUNDING<Accumulate<T>> / 64);
        const auto check = [&](Buffer<T>& got, const Dense& expected, int64_t terms, double scale,
                               const char* what) {
          expect_matrix(got, expected, size.out + terms, scale * 6 * std::sqrt(terms + 1.0),
                        std::string("two_layer_backward ") + what + " " + net.name);
        };
        check(grad_x,
              naive_product(size.batch, size.in, size.hidden, d_element,
                            transposed(element_of(net.w1))),
              size.hidden, d_scale, "x");
        const auto weight_gradient = [&](int64_t m, int64_t n, const Element& a, const Element& b,
                                         bool by_columns) {
          return by_columns ? naive_product(n, m, size.batch, transposed(b), a)
                            : naive_product(m, n, size.batch, transposed(a), b);
        };
        check(grad_w1,
              weight_gradient(size.in, size.hidden, element_of(net.x), d_element, w1_by_columns),
              size.batch, d_scale, "w1");
        check(grad_w2,
              weight_gradient(size.hidden, size.out, element_of(hidden), element_of(grad_out),
                              w2_by_columns),
              size.batch, 1, "w2");
        const Element one = [](int64_t, int64_t) { return 1.0; };
        check(grad_b1, naive_product(1, size.hidden, size.batch, one, d_element), size.batch,
              d_scale, "b1");
        check(grad_b2, naive_product(1, size.out, size.batch, one, element_of(grad_out)),
              size.batch, 1, "b2");
        expect(scratch.surroundings_untouched(), "two_layer_backward scratch " + net.name);
      }
    }
  }
}

// Small weights, so that activations and losses stay near 1 in float16.
template <class T>
void shrink(Operand<T>& operand, double factor) {
  for (int64_t i = 0; i < operand.buffer.size(); ++i) {
    operand.buffer[i] = from_double<T>(to_double(operand.buffer[i]) * factor);
  }
}

template <class T>
void test_two_layer_sgd_step(SgdWay way) {
  const double lr = 1.0 / 1024 + 1e-12;  // the last bits are lost if it passes through float32
  for (const TwoLayerSize& size : NETWORKS) {
    const SgdWay chosen = sgd_way<T>(size);
    // What goes in one launch goes in three, and anything goes by products.
    if (way < chosen) continue;
    for (const Layout layout_x : layouts()) {
      for (const Layout layout_w :
           {Layout::rows, Layout::columns, Layout::strided, Layout::unaligned, Layout::padded}) {
        if (is_left_out(layout_x, layout_w)) continue;
        Network<T> net(size, layout_x);
        Operand<T> w1(size.in, size.hidden, layout_w);
        Operand<T> w2(size.hidden, size.out, layout_w);
        shrink(w1, 1 / std::sqrt(size.in + 1.0));
        shrink(w2, 1 / std::sqrt(size.hidden + 1.0));
        net.w1 = w1;
        net.w2 = w2;
        net.w1.view.data = net.w1.buffer.data();
        net.w2.view.data = net.w2.buffer.data();
        Dense hidden = net.naive_hidden(false);
        Dense g = net.naive_out(hidden, false);
        double loss_expected = 0;
        for (int64_t i = 0; i < size.batch; ++i) {
          for (int64_t j = 0; j < size.out; ++j) {
            const double difference = g.at(i, j) - net.y.at(i, j);
            loss_expected += difference * difference;
            g.at(i, j) = rounded<T>(2 * difference);
          }
        }
        const Element g_element = [&](int64_t i, int64_t j) { return g.at(i, j); };
        const Element hidden_element = [&](int64_t i, int64_t j) { return hidden.at(i, j); };
        Dense d = naive_product(size.batch, size.hidden, size.out, g_element,
                                transposed(element_of(net.w2)));
        for (int64_t i = 0; i < size.batch; ++i) {
          for (int64_t j = 0; j < size.hidden; ++j) {
            d.at(i, j) = hidden.at(i, j) <= 0 ? 0 : rounded<T>(d.at(i, j));
          }
        }
        const Element d_element = [&](int64_t i, int64_t j) { return d.at(i, j); };
        Dense w1_expected = naive_product(size.in, size.hidden, size.batch,
                                          transposed(element_of(net.x)), d_element);
        Dense w2_expected = naive_product(size.hidden, size.out, size.batch,
                                          transposed(hidden_element), g_element);
        for (int64_t i = 0; i < size.in; ++i) {
          for (int64_t j = 0; j < size.hidden; ++j) {
            w1_expected.at(i, j) = net.w1.at(i, j) - lr * w1_expected.at(i, j);
          }
        }
        for (int64_t i = 0; i < size.hidden; ++i) {
          for (int64_t j = 0; j < size.out; ++j) {
            w2_expected.at(i, j) = net.w2.at(i, j) - lr * w2_expected.at(i, j);
          }
        }

        HostScratch scratch;
        Buffer<T> loss(1);
        two_layer_sgd_step(way, size, net.x.constant, net.y.constant, w1.view, w2.view, lr,
                           loss.data(), scratch, nullptr);
        const char* names[] = {"in one launch ", "in three launches ", "by products "};
        const std::string name = std::string("two_layer_sgd_step ") + names[int(way)] + net.name +
                                 ", weights " + std::to_string(int(layout_w));
        expect(std::fabs(to_double(loss[0]) - loss_expected) <=
                   (16 * ROUNDING<T> + 1e3 * ROUNDING<Accumulate<T>>)*(loss_expected + 1e-3),
               name + ": loss " + std::to_string(to_double(loss[0])) + ", expected " +
                   std::to_string(loss_expected));
        // An update is lr times a sum over the batch of operands rounded to T a few times.
        const double scale = lr * 64 * (size.batch + 1) *
                             (1 + ROUNDING<T> / ROUNDING<Accumulate<T>> / 8);
        for (int64_t i = 0; i < size.in; ++i) {
          for (int64_t j = 0; j < size.hidden; ++j) {
            expect_close<T>(w1.at(i, j), w1_expected.at(i, j), 1, scale, name + " w1");
          }
        }
        for (int64_t i = 0; i < size.hidden; ++i) {
          for (int64_t j = 0; j < size.out; ++j) {
            expect_close<T>(w2.at(i, j), w2_expected.at(i, j), 1, scale, name + " w2");
          }
        }
        expect(w1.gaps_untouched(net.w1) && w2.gaps_untouched(net.w2), name + " gaps");
        expect(w1.buffer.surroundings_untouched() && w2.buffer.surroundings_untouched() &&
                   scratch.surroundings_untouched(),
               name + " bounds");
      }
    }
  }
}

// Which sizes go which way, on the emulated device of 4 multiprocessors. At the headline's size four
// blocks fit on one, so that its 125 need 32 multiprocessors.
void test_sgd_way() {
  const auto expect_way = [](SgdWay expected, const TwoLayerSize& size, const char* why) {
    expect(sgd_way<float>(size) == expected, std::string("sgd: ") + why);
  };
  for (const TwoLayerSize& size :
       {TwoLayerSize{1, 1, 1, 1}, TwoLayerSize{33, 70, 34, 10}, TwoLayerSize{64, 128, 100, 10}}) {
    expect_way(SgdWay::one_launch, size, "these fit");
  }
  expect_way(SgdWay::three_launches, {64, 129, 100, 10}, "more blocks than are resident at once");
  expect_way(SgdWay::three_launches, {64, 1000, 100, 10}, "the headline");
  expect_way(SgdWay::one_launch, {1, 256, 1, 1}, "32 blocks of 256 threads are resident");
  expect_way(SgdWay::three_launches, {1, 257, 1, 1}, "33 are not");
  expect_way(SgdWay::three_launches, {1, 2048, 1, 1}, "256 slices");
  expect_way(SgdWay::five_products, {1, 2049, 1, 1}, "too many slices");
  expect_way(SgdWay::one_launch, {80, 8, 100, 4}, "48 KiB of shared memory");
  expect_way(SgdWay::five_products, {128, 8, 100, 10}, "more than 48 KiB");
  for (const TwoLayerSize& size : {TwoLayerSize{0, 1, 1, 1}, TwoLayerSize{1, 0, 1, 1},
                                   TwoLayerSize{1, 1, 0, 1}, TwoLayerSize{1, 1, 1, 0}}) {
    expect_way(SgdWay::five_products, size, "nothing may be empty");
  }
  for (const TwoLayerSize& size : {TwoLayerSize{1, 8, int64_t{1} << 40, 1},
                                   TwoLayerSize{int64_t{1} << 31, 8, int64_t{1} << 31, 1}}) {
    expect_way(SgdWay::five_products, size, "sizes beyond 32 bits");
  }
  expect(sgd_way<double>({64, 8, 100, 10}) == SgdWay::five_products,
         "sgd: float64 needs twice the memory");
  const SgdLayout headline(64, 100, 10);
  expect(headline.elements * sizeof(float) == 38720,
         "sgd: the headline's shared memory is " +
             std::to_string(headline.elements * sizeof(float)));
}

// One launch and three give the same bits.
void test_sgd_launches_agree() {
  const TwoLayerSize size{19, 53, 33, 5};
  Operand<float> x(size.batch, size.in, Layout::rows), y(size.batch, size.out, Layout::rows);
  Operand<float> w1(size.in, size.hidden, Layout::rows), w2(size.hidden, size.out, Layout::rows);
  shrink(w1, 0.1), shrink(w2, 0.1);
  Operand<float> other_w1 = w1, other_w2 = w2;
  other_w1.view.data = other_w1.buffer.data();
  other_w2.view.data = other_w2.buffer.data();
  HostScratch scratch;
  float loss, other_loss;
  two_layer_sgd_step(SgdWay::one_launch, size, x.constant, y.constant, w1.view, w2.view, 1e-3,
                     &loss, scratch, nullptr);
  two_layer_sgd_step(SgdWay::three_launches, size, x.constant, y.constant, other_w1.view,
                     other_w2.view, 1e-3, &other_loss, scratch, nullptr);
  bool equal = loss == other_loss;
  for (int64_t i = 0; i < w1.buffer.size(); ++i) equal &= w1.buffer[i] == other_w1.buffer[i];
  for (int64_t i = 0; i < w2.buffer.size(); ++i) equal &= w2.buffer[i] == other_w2.buffer[i];
  expect(equal, "sgd: one launch and three give the same bits");
}

// Several steps are the same bits as one after the other, in one launch, in three for each and by
// products, with one batch and with a batch for each.
void test_sgd_steps() {
  for (const TwoLayerSize& size : {TwoLayerSize{19, 21, 33, 5}, TwoLayerSize{64, 200, 100, 10},
                                   TwoLayerSize{64, 40, 100, 70}}) {
    for (const bool many : {false, true}) {
      const int64_t steps = 3, x_size = size.batch * size.in, y_size = size.batch * size.out;
      Operand<float> x(many ? steps * size.batch : size.batch, size.in, Layout::rows);
      Operand<float> y(many ? steps * size.batch : size.batch, size.out, Layout::rows);
      Operand<float> w1(size.in, size.hidden, Layout::rows), w2(size.hidden, size.out, Layout::rows);
      shrink(w1, 0.1), shrink(w2, 0.1);
      Operand<float> w1_alone = w1, w2_alone = w2;
      w1_alone.view.data = w1_alone.buffer.data();
      w2_alone.view.data = w2_alone.buffer.data();
      const SgdBatches<float> batches{x.constant, y.constant, many ? x_size : 0,
                                      many ? y_size : 0};
      Buffer<float> losses(steps), alone(steps);
      HostScratch scratch;
      const auto with_scratch = [&](const auto& body) { body(scratch); };
      two_layer_sgd_steps(size, batches, w1.view, w2.view, 1e-3, steps, losses.data(),
                          with_scratch, nullptr);
      for (int64_t step = 0; step < steps; ++step) {
        Matrix<const float> x_now = x.constant, y_now = y.constant;
        x_now.data += step * batches.x_stride;
        y_now.data += step * batches.y_stride;
        two_layer_sgd_step(sgd_way<float>(size), size, x_now, y_now, w1_alone.view, w2_alone.view, 1e-3,
                           alone.data() + step, scratch, nullptr);
        expect(losses[step] == alone[step], "sgd steps: loss");
      }
      for (int64_t i = 0; i < w1.buffer.size(); ++i) {
        expect(w1.buffer[i] == w1_alone.buffer[i], "sgd steps: w1");
      }
      for (int64_t i = 0; i < w2.buffer.size(); ++i) {
        expect(w2.buffer[i] == w2_alone.buffer[i], "sgd steps: w2");
      }
    }
  }
}

// Infinity times the zeros that pad a tile is nan, which must not reach the loss.
void test_infinite_loss() {
  const TwoLayerSize size{1, 1, 1, 3};
  float x = INFINITY, w1 = 1, w2[] = {1, 1, 1}, y[] = {0, 0, 0};
  float hidden, difference[3], loss;
  HostScratch scratch;
  two_layer_mse_loss_forward<float>(size, {&x, 1, 1}, {y, 3, 1}, {&w1, 1, 1}, {}, {w2, 3, 1}, {},
                                    Reduction::sum, &hidden, difference, &loss, scratch, nullptr);
  expect(std::isinf(loss), "an infinite loss is not nan");
}

// Two runs give the same bits.
void test_determinism() {
  const int64_t n = 100003;
  Buffer<float> input(n);
  Buffer<float> target(n);
  input.fill_normal();
  target.fill_normal();
  float losses[2];
  for (float& loss : losses) {
    HostScratch scratch;
    mse_loss_reduced(input.data(), target.data(), true, &loss, n, scratch, nullptr);
  }
  expect(losses[0] == losses[1], "mse_loss gives the same bits twice");
}

void test_plans() {
  // The headline shape: split along k, so that more than eight blocks work.
  const ProductPlan headline = plan_product(64, 100, 1000, true);
  expect(headline.tile == TileChoice::small && headline.parts >= 8,
         "the headline product is split");
  const ProductPlan large = plan_product(8192, 4096, 4096, true);
  expect(large.tile == TileChoice::large && large.parts == 1, "a large product has large tiles");
  for (const int64_t k : {0L, 1L, 15L, 16L, 17L, 1000L, 1L << 40}) {
    for (const int64_t m : {1L, 31L, 129L, 1L << 33}) {
      for (const bool has_large_tile : {false, true}) {
        const ProductPlan plan = plan_product(m, 10, k, has_large_tile);
        const bool covers = plan.parts >= 1 && plan.depth_per_split * plan.parts >= k &&
                            plan.depth_per_split * (plan.parts - 1) < std::max<int64_t>(k, 1);
        expect(covers && plan.parts <= 65535, "the parts of a plan cover k, none is empty");
      }
    }
  }
}

template <class T>
void test_floating() {
  test_relu_forward<T>();
  test_relu_backward<T>();
  test_relu_with_mask<T>();
  test_mse_loss<T>();
  test_product<T>();
  test_column_sum<T>();
  test_two_layer_forward<T>();
  test_two_layer_backward<T>();
  for (const SgdWay way : {SgdWay::one_launch, SgdWay::three_launches, SgdWay::five_products}) {
    test_two_layer_sgd_step<T>(way);
  }
}

}  // namespace

int main(int count, char** arguments) try {
  few = count > 1 && std::string(arguments[1]) == "--few";
  test_emulator();
  test_relu_forward<uint8_t>();
  test_relu_forward<int8_t>();
  test_relu_forward<int16_t>();
  test_relu_forward<int32_t>();
  test_relu_forward<int64_t>();
  test_floating<double>();
  test_floating<float>();
  test_floating<__half>();
  test_floating<__nv_bfloat16>();
  test_sgd_way();
  test_sgd_launches_agree();
  test_sgd_steps();
  test_infinite_loss();
  test_determinism();
  test_plans();
  test_adadelta_step<double>();
  test_adadelta_step<float>();
  test_adadelta_step<__half>();
  test_adadelta_step<__nv_bfloat16>();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::printf("FAILED: %s\n", error.what());
  return 1;
}
