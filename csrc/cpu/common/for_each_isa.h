// Compiles the header named by PYEXT_KERNELS once per instruction set, in a namespace each, so that
// one binary runs on every x86-64 CPU (or other CPU) and uses the widest vectors of the one at hand.
//
//   #define PYEXT_KERNELS "relu.h"
//   #include "common/for_each_isa.h"
//   ...
//   PYEXT_ON_BEST_ISA(kernels::relu_forward(x, out, n));
//
// Standard headers that the kernels need are included before, outside of any target region.
#include "common/isa.h"

#if PYEXT_MULTIPLE_ISAS

#define PYEXT_VECTOR_BYTES 64
#define PYEXT_VECTOR_REGISTERS 32
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace pyext::x86_64_v4 {
#include PYEXT_KERNELS
}
#pragma GCC pop_options
#undef PYEXT_VECTOR_BYTES
#undef PYEXT_VECTOR_REGISTERS

#define PYEXT_VECTOR_BYTES 32
#define PYEXT_VECTOR_REGISTERS 16
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace pyext::x86_64_v3 {
#include PYEXT_KERNELS
}
#pragma GCC pop_options
#undef PYEXT_VECTOR_BYTES
#undef PYEXT_VECTOR_REGISTERS

#endif  // PYEXT_MULTIPLE_ISAS

#define PYEXT_VECTOR_BYTES 16
#define PYEXT_VECTOR_REGISTERS 16
namespace pyext::baseline {
#include PYEXT_KERNELS
}
#undef PYEXT_VECTOR_BYTES
#undef PYEXT_VECTOR_REGISTERS
