// Writes large outputs past the caches. A store to memory that is not cached reads its line first;
// at 2^24 floats in huge pages a ReLU takes 9.3 ms that way and 3.7 ms with streaming stores (2 x
// Zen 4). Included once per instruction set by common/for_each_isa.h.

// Copies bytes, a multiple of 64, from a buffer to memory that starts at a multiple of 64.
inline void stream(const char* from, char* to, int64_t bytes) {
#if PYEXT_MULTIPLE_ISAS && PYEXT_VECTOR_BYTES == 64
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif PYEXT_MULTIPLE_ISAS && PYEXT_VECTOR_BYTES == 32
  for (int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif PYEXT_MULTIPLE_ISAS
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  std::memcpy(to, from, bytes);
#endif
}

// Has compute(first, count, to) write out[first … first + count) to `to`: at once into `out`, or in
// tiles through a buffer in L1 where the output is streamed.
template <class T, class Compute>
void write(T* out, int64_t n, bool streamed, const Compute& compute) {
  if (!streamed) return compute(0, n, out);
  constexpr int64_t kTile = 4096 / sizeof(T);
  alignas(64) T tile[kTile];
  const int64_t misaligned = reinterpret_cast<uintptr_t>(out) % 64;
  const int64_t head = std::min<int64_t>(n, (64 - misaligned) % 64 / sizeof(T));
  compute(0, head, out);
  int64_t i = head;
  for (; i + kTile <= n; i += kTile) {
    compute(i, kTile, tile);
    stream(reinterpret_cast<const char*>(tile), reinterpret_cast<char*>(out + i), sizeof tile);
  }
  compute(i, n - i, out + i);
#if PYEXT_MULTIPLE_ISAS
  _mm_sfence();  // before another thread reads them
#endif
}
