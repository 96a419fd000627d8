// dropout: out[i] = bits[i] >= threshold ? x[i] * scale : 0, where bits come from Philox 4x32-10
// (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): element i has word i % 4
// of the block whose counter is i / 4. Bytes moved: 2 n items; the bits stay in L1.
// Included once per instruction set by common/for_each_isa.h.
#include "common/stream.h"

// One word of a block to a 64-bit lane, in its lower half; the upper one holds anything.
typedef uint64_t Words __attribute__((vector_size(PYEXT_VECTOR_BYTES)));
constexpr int64_t kBlocks = PYEXT_VECTOR_BYTES / sizeof(uint64_t);

// The 64-bit products of the lower halves: one instruction, which GCC 12 does not find by itself.
inline Words multiply_lower(Words a, Words b) {
#if PYEXT_MULTIPLE_ISAS && PYEXT_VECTOR_BYTES == 64
  // (Without a mask, GCC 12 warns of its own header.)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif PYEXT_MULTIPLE_ISAS && PYEXT_VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif PYEXT_MULTIPLE_ISAS
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// out = a[0], b[0], a[1], b[1] ... (Stored lane by lane, dropout took 1.4 times as long on AVX-512.)
inline void interleave(Words a, Words b, Words* out) {
#if defined(__clang__)
#define PYEXT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYEXT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif
#if PYEXT_VECTOR_BYTES == 64
  out[0] = PYEXT_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  out[1] = PYEXT_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif PYEXT_VECTOR_BYTES == 32
  out[0] = PYEXT_SHUFFLE(a, b, 0, 4, 1, 5);
  out[1] = PYEXT_SHUFFLE(a, b, 2, 6, 3, 7);
#else
  out[0] = PYEXT_SHUFFLE(a, b, 0, 2);
  out[1] = PYEXT_SHUFFLE(a, b, 1, 3);
#endif
#undef PYEXT_SHUFFLE
}

// The words of kBlocks blocks from `first` on, in the order of their elements.
inline void philox(uint64_t key, int64_t first, uint32_t* words) {
  Words c0 = {}, c2 = {}, c3 = {};
  for (int64_t lane = 0; lane < kBlocks; ++lane) c0[lane] = uint64_t(lane);
  c0 += uint64_t(first);
  Words c1 = c0 >> 32;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words product_0 = multiply_lower(c0, Words{} + 0xD2511F53u);
    const Words product_1 = multiply_lower(c2, Words{} + 0xCD9E8D57u);
    c0 = (product_1 >> 32) ^ c1 ^ k0;
    c1 = product_1;
    c2 = (product_0 >> 32) ^ c3 ^ k1;
    c3 = product_0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Words lower = (c0 & 0xffffffff) | (c1 << 32), upper = (c2 & 0xffffffff) | (c3 << 32);
  Words in_order[2];
  interleave(lower, upper, in_order);
  std::memcpy(words, in_order, sizeof in_order);
}

// Elements [first, first + n) of the whole tensor; x and out start at the first of them.
template <class T>
void dropout(const T* x, T* out, int64_t first, int64_t n, uint64_t key, uint32_t threshold,
             Accumulate<T> scale) {
  constexpr int64_t kTile = 1024;
  alignas(64) uint32_t words[kTile];
  for (int64_t i = 0; i < n;) {
    const int64_t block = (first + i) / 4, skipped = (first + i) % 4;
    const int64_t count = std::min(n - i, kTile - skipped);
    for (int64_t word = 0; word < skipped + count; word += 4 * kBlocks)
      philox(key, block + word / 4, words + word);
    const uint32_t* bits = words + skipped;
    // Two loops: of one, GCC 12 makes a branch for each element where there are no masked vectors,
    // which on AVX2 took 3.5 times as long.
    for (int64_t j = 0; j < count; ++j) out[i + j] = T(Accumulate<T>(x[i + j]) * scale);
    for (int64_t j = 0; j < count; ++j) out[i + j] = bits[j] >= threshold ? out[i + j] : T(0);
    i += count;
  }
}
