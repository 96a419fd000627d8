// relu_max_pool2d: out = the maximum of x < 0 ? 0 : x over each window, and at which position of it
// (index, one byte; 255 where the maximum is not above 0). Backward: each element of the input adds
// up the gradients of those windows whose maximum it is, in their order.
// Bytes moved with windows of 2 x 2: forward n + n / 4 items and n / 4 bytes, backward the same.
// Included once per instruction set by common/for_each_isa.h.
#include "common/stream.h"

// The winner so far. As in PyTorch, the first of equal numbers wins, and the last NaN. Position is
// as wide as a value: so the compiler puts both into vectors of one width.
template <class Acc>
struct Maximum {
  using Position = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  Acc value;
  Position position;

  template <class T>
  void offer(T x, Position at) {
    const Acc candidate = Acc(x) < Acc(0) ? Acc(0) : Acc(x);
    const bool wins = (candidate > value) | (candidate != candidate);
    value = wins ? candidate : value;
    position = wins ? at : position;
  }
  uint8_t index() const { return uint8_t(value <= Acc(0) ? Position(kNowhere) : position); }
};

// One row of 2 x 2 windows.
template <class Acc, class T>
void relu_max_pool_2x2(const T* top, const T* bottom, T* out, uint8_t* index, int64_t windows) {
  for (int64_t i = 0; i < windows; ++i) {
    Maximum<Acc> best{Acc(-1), 0};
    best.offer(top[2 * i], 0);
    best.offer(top[2 * i + 1], 1);
    best.offer(bottom[2 * i], 2);
    best.offer(bottom[2 * i + 1], 3);
    out[i] = T(best.value);
    index[i] = best.index();
  }
}

// One window anywhere; it has at least one element of the plane.
template <class Acc, class T>
Maximum<Acc> relu_max_of_window(const T* plane, const Pooling& p, int64_t row, int64_t column) {
  const int64_t top = row * p.stride_height - p.padding_height;
  const int64_t left = column * p.stride_width - p.padding_width;
  Maximum<Acc> best{Acc(-1), 0};
  for (int64_t y = std::max<int64_t>(-top, 0); y < std::min(p.kernel_height, p.height - top); ++y)
    for (int64_t x = std::max<int64_t>(-left, 0); x < std::min(p.kernel_width, p.width - left); ++x)
      best.offer(plane[(top + y) * p.width + left + x], y * p.kernel_width + x);
  return best;
}

// Rows [begin, end) of windows, counted through all planes.
template <class Acc, class T>
void relu_max_pool_forward(const T* input, const Pooling& p, int64_t begin, int64_t end, T* out,
                           uint8_t* index) {
  for (int64_t each = begin; each < end; ++each) {
    const int64_t row = each % p.out_height;
    const T* plane = input + each / p.out_height * p.height * p.width;
    T* out_row = out + each * p.out_width;
    uint8_t* index_row = index + each * p.out_width;
    if (p.is_2x2()) {
      const T* top = plane + 2 * row * p.width;
      relu_max_pool_2x2<Acc>(top, top + p.width, out_row, index_row, p.out_width);
    } else {
      for (int64_t column = 0; column < p.out_width; ++column) {
        const Maximum<Acc> best = relu_max_of_window<Acc>(plane, p, row, column);
        out_row[column] = T(best.value);
        index_row[column] = best.index();
      }
    }
  }
}

// Elements [column, column + count) of a row of the input under one row of 2 x 2 windows, in which
// that row's elements have the positions `first` and `first` + 1.
template <class T>
void relu_max_unpool_2x2(const T* grad, const uint8_t* index, int first, int64_t windows,
                         int64_t column, int64_t count, T* to) {
  const auto at = [=](int64_t c) {
    return c / 2 < windows && index[c / 2] == first + c % 2 ? grad[c / 2] : T(0);
  };
  if (count > 0 && column % 2) *to++ = at(column++), --count;
  grad += column / 2, index += column / 2, windows -= column / 2;
  const int64_t pairs = std::min(count / 2, windows);
  for (int64_t i = 0; i < pairs; ++i) {
    to[2 * i] = index[i] == first ? grad[i] : T(0);
    to[2 * i + 1] = index[i] == first + 1 ? grad[i] : T(0);
  }
  for (int64_t i = 2 * pairs; i < count; ++i) to[i] = i / 2 < windows ? at(column + i) : T(0);
}

// The gradient of one element of the input: windows that contain it, in their order.
template <class Acc, class T>
T relu_max_unpool(const T* grad, const uint8_t* index, const Pooling& p, int64_t y, int64_t x) {
  y += p.padding_height, x += p.padding_width;
  const auto first = [](int64_t at, int64_t kernel, int64_t stride) {
    return at < kernel ? 0 : (at - kernel) / stride + 1;
  };
  Acc sum = 0;
  for (int64_t row = first(y, p.kernel_height, p.stride_height);
       row <= std::min(y / p.stride_height, p.out_height - 1); ++row)
    for (int64_t column = first(x, p.kernel_width, p.stride_width);
         column <= std::min(x / p.stride_width, p.out_width - 1); ++column) {
      const int64_t position =
          (y - row * p.stride_height) * p.kernel_width + x - column * p.stride_width;
      const int64_t window = row * p.out_width + column;
      if (index[window] == position) sum += Acc(grad[window]);
    }
  return T(sum);
}

// Elements [begin, begin + count) of the input's gradient.
template <class Acc, class T>
void relu_max_pool_backward(const T* grad, const uint8_t* index, const Pooling& p, int64_t begin,
                            int64_t count, T* to) {
  int64_t column = begin % p.width, row = begin / p.width % p.height;
  int64_t plane = begin / p.width / p.height;
  while (count > 0) {
    const int64_t length = std::min(count, p.width - column);
    const int64_t windows = plane * p.out_height * p.out_width;
    if (p.is_2x2()) {
      const int64_t window_row = windows + row / 2 * p.out_width;
      const int64_t reached = row / 2 < p.out_height ? p.out_width : 0;
      relu_max_unpool_2x2(grad + window_row, index + window_row, row % 2 * 2, reached, column,
                          length, to);
    } else {
      for (int64_t i = 0; i < length; ++i)
        to[i] = relu_max_unpool<Acc>(grad + windows, index + windows, p, row, column + i);
    }
    to += length, count -= length, column = 0;
    if (++row == p.height) row = 0, ++plane;
  }
}

// Windows [begin, end): the input's element at the position that `index` says. A position beyond
// the plane, which no forward writes, reads nothing.
template <class T>
void relu_max_pool_gather(const T* input, const uint8_t* index, const Pooling& p, int64_t begin,
                          int64_t end, T* out) {
  for (int64_t window = begin; window < end; ++window) {
    const int64_t row = window / p.out_width % p.out_height, position = index[window];
    const int64_t plane = window / p.out_width / p.out_height;
    const int64_t y = row * p.stride_height - p.padding_height + position / p.kernel_width;
    const int64_t x = window % p.out_width * p.stride_width - p.padding_width +
                      position % p.kernel_width;
    const bool inside = position != kNowhere && y >= 0 && y < p.height && x >= 0 && x < p.width;
    out[window] = inside ? input[(plane * p.height + y) * p.width + x] : T(0);
  }
}
