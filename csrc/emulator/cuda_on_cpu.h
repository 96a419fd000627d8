// Runs CUDA kernels on the CPU, for tests and debuggers: the part of CUDA that the kernels of
// csrc/cuda use, for a host compiler. Threads of a block are fibers, so a barrier is a yield.
// Blocks run one after the other, but all at once in a cooperative launch; one launch runs at a
// time. docs/emulator.md says what is caught, and what is not modelled.
//
// This header is what a kernel and its launcher see; device.cpp runs the blocks, streams.cpp orders
// the launches or only writes them down, memory_checks.cpp looks at every access of a kernel that was
// compiled with -fsanitize=thread.
#pragma once

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "types.h"

// Of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace emulator {

// The emulated device: compute capability 8.0's limits, the smallest of the architectures that the
// kernels are built for, and few multiprocessors.
constexpr int MULTIPROCESSORS = 4;
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned MOST_THREADS_PER_MULTIPROCESSOR = 2048;
constexpr unsigned MOST_BLOCKS_PER_MULTIPROCESSOR = 32;
constexpr unsigned MOST_GRID_X = 0x7fffffffu;
constexpr unsigned MOST_GRID_YZ = 65535;
constexpr std::size_t MOST_SHARED_BYTES = 48 * 1024;          // without cudaFuncSetAttribute
constexpr std::size_t MOST_SHARED_BYTES_OPT_IN = 163 * 1024;  // with it
constexpr std::size_t SHARED_BYTES_PER_MULTIPROCESSOR = 164 * 1024;
constexpr unsigned WARP_LANES = 32;

// A mistake in a kernel or a launch, which hardware would not have reported. The message names the
// kernel and, inside one, the block and the thread.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

unsigned char* block_shared_memory();

// All threads of the block meet; returns how many of them came with a true predicate. The line
// tells barriers apart: after optimisation one barrier may be several calls.
unsigned block_barrier(int line, bool predicate);
void grid_barrier(int line);
void fence();
void wait_for_previous_kernel();

// Lanes of one warp meet: each leaves a value, and reads the others' once all of `mask` have come.
// A lane that has ended or does not exist counts as present, without a value.
struct Lanes {
  unsigned present;
  std::uint64_t values[WARP_LANES];
};
Lanes exchange(unsigned mask, std::uint64_t value);
std::uint64_t shuffle(unsigned mask, std::uint64_t value, unsigned source, bool in_range);
unsigned lane();
unsigned existing_lanes();

// Ends the kernel with a KernelError.
[[noreturn]] void fail(const std::string& what);

// A GPU refuses an access at an address that is no multiple of its size; this CPU does not.
void check_alignment(const void* address, std::size_t bytes);
void check_atomic(const void* address, std::size_t bytes);

enum class Memory { read_only, writable, unwritten };

// One op as its caller sees it. While it lives, the launches of this host thread may touch only what
// `allow` has named and must go to `stream`; when it ends, every launch must have been checked.
class Op {
 public:
  Op();
  ~Op() noexcept(false);
  Op(const Op&) = delete;
  Op& operator=(const Op&) = delete;
  cudaStream_t stream() const;

 private:
  std::size_t outer_regions_;
  cudaStream_t outer_stream_;
};
void allow(const void* address, std::size_t bytes, Memory kind);

// A kernel with its arguments, which it finds by value wherever and whenever it runs.
struct Launch {
  const void* kernel;
  std::shared_ptr<const void> call;
  std::size_t call_bytes;
  void (*run)(const void* call);
};

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  static void run(const void* call) {
    const auto* self = static_cast<const Call*>(call);
    std::apply(self->kernel, self->arguments);
  }
};

}  // namespace emulator

// ---------------------------------------------------------------- inside a kernel

#define PYEXT_LINE int line = __builtin_LINE()

inline void __syncthreads(PYEXT_LINE) { emulator::block_barrier(line, false); }
inline int __syncthreads_count(int predicate, PYEXT_LINE) {
  return static_cast<int>(emulator::block_barrier(line, predicate != 0));
}
inline int __syncthreads_or(int predicate, PYEXT_LINE) {
  return emulator::block_barrier(line, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, PYEXT_LINE) {
  return emulator::block_barrier(line, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, 0); }
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() {}
inline void cudaGridDependencySynchronize() { emulator::wait_for_previous_kernel(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}  // assumed of every kernel, at its begin

namespace emulator {

template <class Value>
Value shuffle_value(unsigned mask, Value value, unsigned source, bool in_range) {
  static_assert(sizeof(Value) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = shuffle(mask, bits, source, in_range);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace emulator

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
  const unsigned target =
      emulator::lane() / width * width + static_cast<unsigned>(source) % width;
  return emulator::shuffle_value(mask, value, target, true);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle_value(mask, value, lane + delta, lane % width + delta < unsigned(width));
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle_value(mask, value, lane - delta, lane % width >= delta);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask, int width = 32) {
  const unsigned lane = emulator::lane();
  const unsigned target = lane ^ static_cast<unsigned>(lane_mask);
  return emulator::shuffle_value(mask, value, target, target / width == lane / width);
}

inline unsigned __activemask() { return emulator::existing_lanes(); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulator::Lanes lanes = emulator::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < emulator::WARP_LANES; ++lane) {
    if (lanes.present >> lane & 1 && lanes.values[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace emulator {

template <class Combine>
unsigned reduce_lanes(unsigned mask, unsigned value, Combine combine) {
  const Lanes lanes = exchange(mask, value);
  bool first = true;
  for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
    if (!(lanes.present >> lane & 1)) continue;
    const auto each = static_cast<unsigned>(lanes.values[lane]);
    value = first ? each : combine(value, each);
    first = false;
  }
  return value;
}

}  // namespace emulator

#define PYEXT_REDUCE(name, expression)                                                    \
  inline unsigned name(unsigned mask, unsigned value) {                                   \
    return emulator::reduce_lanes(mask, value, [](auto a, auto b) { return expression; }); \
  }
#define PYEXT_REDUCE_SIGNED(name, expression)                                \
  PYEXT_REDUCE(name, expression)                                             \
  inline int name(unsigned mask, int value) {                                \
    return static_cast<int>(emulator::reduce_lanes(                          \
        mask, static_cast<unsigned>(value), [](unsigned left, unsigned right) { \
          const int a = static_cast<int>(left), b = static_cast<int>(right); \
          return static_cast<unsigned>(expression);                          \
        }));                                                                 \
  }
PYEXT_REDUCE_SIGNED(__reduce_min_sync, a < b ? a : b)
PYEXT_REDUCE_SIGNED(__reduce_max_sync, a < b ? b : a)
PYEXT_REDUCE(__reduce_add_sync, a + b)
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
PYEXT_REDUCE(__reduce_and_sync, a & b)
PYEXT_REDUCE(__reduce_or_sync, a | b)
PYEXT_REDUCE(__reduce_xor_sync, a ^ b)
#undef PYEXT_REDUCE
#undef PYEXT_REDUCE_SIGNED

// Fibers take turns only at barriers, so that a plain update is atomic. It is not announced as an
// access of its own: two atomics on one address are no race.
namespace emulator {

template <class T, class Update>
__attribute__((no_sanitize("thread"))) T update(T* address, Update new_value) {
  check_atomic(address, sizeof(T));
  const T old = *address;
  *address = new_value(old);
  return old;
}

}  // namespace emulator

#define PYEXT_ATOMIC(name, expression)                                     \
  template <class T>                                                       \
  T name(T* address, std::type_identity_t<T> value) {                      \
    return emulator::update(address, [value](T old) -> T { return expression; }); \
  }
PYEXT_ATOMIC(atomicAdd, old + value)
PYEXT_ATOMIC(atomicSub, old - value)
PYEXT_ATOMIC(atomicExch, (static_cast<void>(old), value))
PYEXT_ATOMIC(atomicMin, value < old ? value : old)
PYEXT_ATOMIC(atomicMax, old < value ? value : old)
PYEXT_ATOMIC(atomicAnd, old& value)
PYEXT_ATOMIC(atomicOr, old | value)
PYEXT_ATOMIC(atomicXor, old ^ value)
PYEXT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
PYEXT_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef PYEXT_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return old == expected ? value : old; });
}

// Loads and stores with a hint for the cache.
template <class T>
T __ldg(const T* address) {
  emulator::check_alignment(address, sizeof(T));
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return __ldg(address);
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  emulator::check_alignment(address, sizeof(T));
  *address = value;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

// ---------------------------------------------------------------- the launcher's side

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {
bool is_cooperative(const cudaLaunchConfig_t& config);
bool overlaps_previous(const cudaLaunchConfig_t& config);
cudaError_t submit(const cudaLaunchConfig_t& config, Launch launch);
}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using Call = emulator::Call<Parameters...>;
  const std::shared_ptr<const Call> call(
      new Call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)});
  return emulator::submit(*config, {reinterpret_cast<const void*>(kernel), call, sizeof(Call),
                                    &Call::run});
}

cudaError_t cudaGetLastError();

// Streams: the null stream waits for all others, as CUDA's does by default.
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t stream);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

namespace emulator {
int multiprocessors();
cudaError_t allow_shared_bytes(const void* kernel, int bytes);
int resident_blocks(std::size_t threads, std::size_t shared_bytes);  // per multiprocessor
}  // namespace emulator

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

struct cudaFuncAttributes {
  int ptxVersion;
};

// As if compiled for 9.0, the first architecture whose launches may overlap.
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads,
                                                          std::size_t shared_bytes) {
  *blocks = emulator::resident_blocks(threads, shared_bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::multiprocessors();
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulator::MOST_SHARED_BYTES_OPT_IN);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
