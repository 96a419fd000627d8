// Which instruction sets the kernels are compiled for, and which one this CPU runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// GCC honours `#pragma GCC target`; elsewhere (clang, ARM) the compiler's own target is the one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYEXT_MULTIPLE_ISAS 1
#include <immintrin.h>
#else
#define PYEXT_MULTIPLE_ISAS 0
#endif

// For loops over an array of accumulators: not unrolled early, GCC 12 gives the array memory as well,
// which it clears before and fills after the long loop (7 % of xᵀ @ d at 64 x 1000 x 100).
#if defined(__GNUC__) && !defined(__clang__)
#define PYEXT_UNROLL _Pragma("GCC unroll 16")
#else
#define PYEXT_UNROLL _Pragma("unroll")
#endif

namespace pyext {

enum class Isa { baseline, x86_64_v3, x86_64_v4 };

// PYEXT_CPU_ISA=baseline|x86-64-v3|x86-64-v4 lowers the choice, for testing the narrower kernels.
inline Isa find_best_isa() {
#if PYEXT_MULTIPLE_ISAS
  const char* cap = std::getenv("PYEXT_CPU_ISA");
  const bool allow_v3 = !cap || std::strcmp(cap, "baseline") != 0;
  const bool allow_v4 = allow_v3 && (!cap || std::strcmp(cap, "x86-64-v3") != 0);
  if (allow_v4 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::x86_64_v4;
  if (allow_v3 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return Isa::x86_64_v3;
#endif
  return Isa::baseline;
}

inline Isa best_isa() {
  static const Isa isa = find_best_isa();
  return isa;
}

}  // namespace pyext

// Runs a statement with `kernels` naming the namespace of the best instruction set.
#if PYEXT_MULTIPLE_ISAS
#define PYEXT_ON_BEST_ISA(...)                   \
  do {                                           \
    switch (::pyext::best_isa()) {               \
      case ::pyext::Isa::x86_64_v4: {            \
        namespace kernels = ::pyext::x86_64_v4;  \
        __VA_ARGS__;                             \
        break;                                   \
      }                                          \
      case ::pyext::Isa::x86_64_v3: {            \
        namespace kernels = ::pyext::x86_64_v3;  \
        __VA_ARGS__;                             \
        break;                                   \
      }                                          \
      case ::pyext::Isa::baseline: {             \
        namespace kernels = ::pyext::baseline;   \
        __VA_ARGS__;                             \
        break;                                   \
      }                                          \
    }                                            \
  } while (false)
#else
#define PYEXT_ON_BEST_ISA(...)               \
  do {                                       \
    namespace kernels = ::pyext::baseline;   \
    __VA_ARGS__;                             \
  } while (false)
#endif
