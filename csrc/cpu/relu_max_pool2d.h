// relu_max_pool2d: out = the maximum of x < 0 ? 0 : x over each window, and at which position of it
// (index, one byte; 255 where the maximum is not above 0). Backward: each element of the input adds
// up the gradients of those windows whose maximum it is, in their order.
// Bytes moved with windows of 2 x 2: forward n + n / 4 items and n / 4 bytes, backward the same.
// Included once per instruction set by common/for_each_isa.h.
#include "common/stream.h"

// kLanes neighbouring values of the type A, and what shuffles them. Vectors go by reference: by value
// their passing would depend on the instruction set, of which the compiler warns.
template <class A, int kLanes>
struct Lanes {
  // As wide as a value.
  using Position =
      std::conditional_t<sizeof(A) == 8, int64_t,
                         std::conditional_t<sizeof(A) == 4, int32_t, int16_t>>;
  typedef A Values __attribute__((vector_size(sizeof(A) * kLanes)));
  typedef Position Positions __attribute__((vector_size(sizeof(A) * kLanes)));
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

  // Elements kFirst, kFirst + 2, ... of a and b in a row.
  template <int kFirst>
  static void every_second(const Values& a, const Values& b, Values& shuffled) {
    shuffle<false, kFirst>(a, b, shuffled, std::make_integer_sequence<int, kLanes>{});
  }
  // a and b in turns, from element kFirst of each.
  template <int kFirst>
  static void in_turns(const Values& a, const Values& b, Values& shuffled) {
    shuffle<true, kFirst>(a, b, shuffled, std::make_integer_sequence<int, kLanes>{});
  }

 private:
  static constexpr int at(bool in_turns, int i, int first) {
    return in_turns ? first + i / 2 + i % 2 * kLanes : first + 2 * i;
  }
  template <bool kInTurns, int kFirst, int... kI>
  static void shuffle(const Values& a, const Values& b, Values& shuffled,
                      std::integer_sequence<int, kI...>) {
#ifdef __clang__
    shuffled = __builtin_shufflevector(a, b, at(kInTurns, kI, kFirst)...);
#else
    shuffled = __builtin_shuffle(a, b, Positions{at(kInTurns, kI, kFirst)...});
#endif
  }
};

// The winner so far: Value is a number or a vector of them, Position an integer as wide. As in
// PyTorch, the first of equal numbers wins, and the last NaN.
template <class Value, class Position>
struct Maximum {
  Value value;
  Position position;

  void offer(const Value& x, int at) {
    const Value candidate = x < 0 ? Value{} : x;
    const auto wins = (candidate > value) | (candidate != candidate);
    value = wins ? candidate : value;
    position = wins ? Position{} + at : position;
  }
  void get_index(Position& index) const {
    index = value <= 0 ? Position{} + int(kNowhere) : position;
  }
  uint8_t byte() const {
    Position index;
    get_index(index);
    return uint8_t(index);
  }
};

template <class Acc>
using MaximumOfOne = Maximum<Acc, typename Lanes<Acc, 1>::Position>;

// kLanes windows of 2 x 2.
template <class Acc, int kLanes, class T>
void relu_max_pool_2x2_lanes(const T* top, const T* bottom, T* out, uint8_t* index) {
  using L = Lanes<Acc, kLanes>;
  Maximum<typename L::Values, typename L::Positions> best{typename L::Values{} - 1, {}};
  int at = 0;
  for (const T* row : {top, bottom}) {
    Acc wide[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) wide[i] = Acc(row[i]);
    typename L::Values halves[2], candidates;
    std::memcpy(halves, wide, sizeof halves);
    L::template every_second<0>(halves[0], halves[1], candidates);
    best.offer(candidates, at++);
    L::template every_second<1>(halves[0], halves[1], candidates);
    best.offer(candidates, at++);
  }
  Acc wide[kLanes];
  std::memcpy(wide, &best.value, sizeof wide);
  for (int i = 0; i < kLanes; ++i) out[i] = T(wide[i]);
  typename L::Positions positions;
  best.get_index(positions);
  const auto bytes = __builtin_convertvector(positions, typename L::Bytes);
  std::memcpy(index, &bytes, sizeof bytes);
}

// Calls lanes<kLanes>(first) until all of n are done: with the widest vectors that n fills, the last
// of which may do some again (12 with 8 lanes: from 0 and from 4). Then one(i) for less than two.
template <int kLanes, class Vector, class One>
void in_lanes(int64_t n, const Vector& vector, const One& one) {
  if constexpr (kLanes < 2) {
    for (int64_t i = 0; i < n; ++i) one(i);
  } else if (n < kLanes) {
    in_lanes<kLanes / 2>(n, vector, one);
  } else {
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) vector.template operator()<kLanes>(i);
    if (n % kLanes) vector.template operator()<kLanes>(n - kLanes);
  }
}

// One row of 2 x 2 windows.
template <class Acc, class T>
void relu_max_pool_2x2(const T* top, const T* bottom, T* out, uint8_t* index, int64_t windows) {
  in_lanes<PYEXT_VECTOR_BYTES / sizeof(Acc)>(
      windows,
      [=]<int kLanes>(int64_t i) {
        relu_max_pool_2x2_lanes<Acc, kLanes>(top + 2 * i, bottom + 2 * i, out + i, index + i);
      },
      [=](int64_t i) {
        MaximumOfOne<Acc> best{-1, 0};
        for (int at = 0; at < 4; ++at) best.offer(Acc((at < 2 ? top : bottom)[2 * i + at % 2]), at);
        out[i] = T(best.value);
        index[i] = best.byte();
      });
}

// One window anywhere; it has at least one element of the plane.
template <class Acc, class T>
MaximumOfOne<Acc> relu_max_of_window(const T* plane, const Pooling& p, int64_t row, int64_t column) {
  const int64_t top = row * p.stride_height - p.padding_height;
  const int64_t left = column * p.stride_width - p.padding_width;
  MaximumOfOne<Acc> best{-1, 0};
  for (int64_t y = std::max<int64_t>(-top, 0); y < std::min(p.kernel_height, p.height - top); ++y)
    for (int64_t x = std::max<int64_t>(-left, 0); x < std::min(p.kernel_width, p.width - left); ++x)
      best.offer(Acc(plane[(top + y) * p.width + left + x]), int(y * p.kernel_width + x));
  return best;
}

// Rows [begin, end) of windows, counted through all planes.
template <class Acc, class T>
void relu_max_pool_forward(const T* input, const Pooling& p, int64_t begin, int64_t end, T* out,
                           uint8_t* index) {
  int64_t row = begin % p.out_height;
  const T* plane = input + begin / p.out_height * p.height * p.width;
  for (int64_t each = begin; each < end; ++each) {
    T* out_row = out + each * p.out_width;
    uint8_t* index_row = index + each * p.out_width;
    if (p.is_2x2()) {
      const T* top = plane + 2 * row * p.width;
      relu_max_pool_2x2<Acc>(top, top + p.width, out_row, index_row, p.out_width);
    } else {
      for (int64_t column = 0; column < p.out_width; ++column) {
        const MaximumOfOne<Acc> best = relu_max_of_window<Acc>(plane, p, row, column);
        out_row[column] = T(best.value);
        index_row[column] = best.byte();
      }
    }
    if (++row == p.out_height) row = 0, plane += p.height * p.width;
  }
}

// Values that are only copied: their bits.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

// 2 kLanes elements of a row of the input under kLanes windows of 2 x 2, in which they have the
// positions `first` and `first` + 1.
template <class Bits, int kLanes>
void relu_max_unpool_2x2_lanes(const void* grad, const uint8_t* index, int first, void* to) {
  using L = Lanes<Bits, kLanes>;
  typename L::Values values;
  std::memcpy(&values, grad, sizeof values);
  typename L::Bytes bytes;
  std::memcpy(&bytes, index, sizeof bytes);
  const auto at = __builtin_convertvector(bytes, typename L::Values);
  const typename L::Values even = at == Bits(first) ? values : 0;
  const typename L::Values odd = at == Bits(first + 1) ? values : 0;
  typename L::Values pairs[2];
  L::template in_turns<0>(even, odd, pairs[0]);
  L::template in_turns<kLanes / 2>(even, odd, pairs[1]);
  std::memcpy(to, pairs, sizeof pairs);
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
  in_lanes<PYEXT_VECTOR_BYTES / sizeof(T)>(
      pairs,
      [=]<int kLanes>(int64_t i) {
        relu_max_unpool_2x2_lanes<BitsOf<T>, kLanes>(grad + i, index + i, first, to + 2 * i);
      },
      [=](int64_t i) {
        to[2 * i] = index[i] == first ? grad[i] : T(0);
        to[2 * i + 1] = index[i] == first + 1 ? grad[i] : T(0);
      });
  for (int64_t i = 2 * pairs; i < count; ++i)
    to[i] = i / 2 < windows && index[i / 2] == first + i % 2 ? grad[i / 2] : T(0);
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
