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
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif PYEXT_MULTIPLE_ISAS && PYEXT_VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif PYEXT_MULTIPLE_ISAS
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// The words of kBlocks blocks from `first` on, in the order of their elements.
inline void philox(uint64_t key, int64_t first, uint32_t* words) {
  Words c0, c1, c2 = {}, c3 = {};
  for (int64_t lane = 0; lane < kBlocks; ++lane) c0[lane] = uint64_t(first + lane);
  c1 = c0 >> 32;
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
  for (int64_t lane = 0; lane < kBlocks; ++lane) {
    const uint64_t block[2] = {lower[lane], upper[lane]};
    std::memcpy(words + 4 * lane, block, sizeof block);
  }
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
    for (int64_t j = 0; j < count; ++j) {
      const T scaled = T(Accumulate<T>(x[i + j]) * scale);
      out[i + j] = bits[j] >= threshold ? scaled : T(0);
    }
    i += count;
  }
}
