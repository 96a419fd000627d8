// Streamed outputs without PyTorch: lengths around the tile, starts off the 64-byte boundary.

#include <cstdint>
#include <vector>

#include "check.h"

#define PYEXT_KERNELS "common/stream.h"
#include "common/for_each_isa.h"

namespace {

// Every element is written once, with the value of its place, and nothing beside them.
template <class T>
void check_write(int64_t offset, int64_t n, bool streamed) {
  std::vector<T> memory(offset + n + 64, T(-1));
  int64_t computed = 0;
  PYEXT_ON_BEST_ISA(kernels::write(
      memory.data() + offset, n, streamed, [&](int64_t first, int64_t count, T* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = T((first + i) % 101);
        computed += count;
      }));
  CHECK(computed == n);
  for (int64_t i = 0; i < int64_t(memory.size()); ++i) {
    const bool inside = i >= offset && i < offset + n;
    CHECK(memory[i] == (inside ? T((i - offset) % 101) : T(-1)));
  }
}

template <class T>
void check_lengths() {
  constexpr int64_t kTile = 4096 / sizeof(T);
  for (int64_t offset : {0, 1, 7, 64 / int(sizeof(T))})
    for (int64_t n : {int64_t(0), int64_t(1), int64_t(15), kTile - 1, kTile, 3 * kTile + 5})
      for (bool streamed : {false, true}) check_write<T>(offset, n, streamed);
}

}  // namespace

int main() {
  check_lengths<float>();
  check_lengths<double>();
  check_lengths<int16_t>();
  return failures != 0;
}
