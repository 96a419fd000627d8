// Runs CUDA kernels on the CPU, for tests and debuggers: the part of CUDA that the kernels of
// csrc/cuda use, for a host compiler. Threads of a block are fibers, so a barrier is a yield;
// blocks run one after the other, and a launch has finished when it returns.
//
// Caught here, with the kernel's name, block and thread: a barrier that not all threads of the
// block reach, a warp operation whose lanes do not arrive or that reads a lane that takes no part,
// a launch beyond the device's limits, a launch whose error nobody asked for, a misaligned vector
// access. Shared memory starts as NaN in every block. memory_checks.cpp adds races, unwritten reads
// and bounds of shared memory.
//
// Not modelled: time, memory ordering weaker than the host's, tensor cores, more than one device.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fiber.h"
#include "types.h"

inline thread_local uint3 threadIdx;
inline thread_local uint3 blockIdx;
inline thread_local dim3 blockDim;
inline thread_local dim3 gridDim;

namespace emulator {

// Compute capability 8.0's, the smallest of the architectures that the kernels are built for.
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned MOST_GRID_X = 0x7fffffffu;
constexpr unsigned MOST_GRID_YZ = 65535;
constexpr std::size_t MOST_SHARED_BYTES = 48 * 1024;  // without cudaFuncSetAttribute
constexpr unsigned WARP_LANES = 32;
// Beyond the shared memory, so that an overrun hits nothing else.
constexpr std::size_t SHARED_MARGIN_BYTES = 1024;

// A mistake in a kernel, which hardware would not have reported.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A meeting of lanes of one warp: each leaves a value, and reads the others' once all have arrived.
// Two sets of slots, because a fast lane may leave its next value before a slow one has read.
struct WarpMeeting {
  unsigned mask;
  unsigned arrived = 0;
  unsigned round = 0;
  unsigned took_part[2] = {};
  std::uint64_t slots[2][WARP_LANES] = {};
};

enum class ThreadState { ready, at_barrier, in_warp_meeting, done };

struct Thread {
  Fiber fiber;
  unsigned number = 0;
  uint3 index{};
  ThreadState state = ThreadState::done;
  int barrier_line = 0;  // of the barrier at which it waits
  std::exception_ptr error;

  unsigned lane() const { return number % WARP_LANES; }
  unsigned warp() const { return number / WARP_LANES; }
};

// What memory_checks.cpp needs to know. Epochs count barriers (per block) and meetings (per warp):
// two accesses in different epochs are ordered.
struct SharedMemoryState {
  unsigned char* data = nullptr;
  std::size_t bytes = 0;
  unsigned block_serial = 0;
  unsigned block_epoch = 0;
  unsigned warp_epochs[MOST_THREADS / WARP_LANES] = {};
  unsigned thread = 0;
  bool in_kernel = false;
};
inline thread_local SharedMemoryState shared_memory_state;

// Runs the blocks of one launch. One per OS thread, so that stacks are reused.
class Device {
 public:
  void run_grid(const void* kernel_address, dim3 grid, dim3 block, std::size_t shared_bytes,
                const std::function<void()>& kernel) {
    kernel_address_ = kernel_address;
    kernel_ = &kernel;
    count_ = block.x * block.y * block.z;
    while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < count_; ++i) {
      threads_[i]->number = i;
      threads_[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
    shared_.resize((shared_bytes + SHARED_MARGIN_BYTES) / sizeof(Aligned) + 1);
    shared_memory_state.data = reinterpret_cast<unsigned char*>(shared_.data());
    shared_memory_state.bytes = shared_bytes;
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          run_block();
        }
      }
    }
  }

  // The calling thread waits until all threads of the block have come to the same barrier.
  void barrier(int line) {
    running_->state = ThreadState::at_barrier;
    running_->barrier_line = line;
    running_->fiber.yield();
  }

  // The calling lane leaves `value` and waits until all lanes of `mask` have come. Returns what
  // each left; a lane that has ended or does not exist counts as present, without a value.
  struct Exchanged {
    const std::uint64_t* values;
    unsigned took_part;
  };
  Exchanged meet(unsigned mask, std::uint64_t value) {
    const unsigned lane = running_->lane();
    if (!(mask >> lane & 1)) fail("a warp operation whose mask leaves out the calling lane");
    WarpMeeting& meeting = find_meeting(running_->warp(), mask);
    const unsigned set = meeting.round % 2;
    meeting.slots[set][lane] = value;
    meeting.arrived |= 1u << lane;
    running_->state = ThreadState::in_warp_meeting;
    close_if_complete(meeting, running_->warp());
    if (running_->state == ThreadState::in_warp_meeting) running_->fiber.yield();
    return {meeting.slots[set], meeting.took_part[set]};
  }

  unsigned lane() const { return running_->lane(); }

  // Ends the calling thread with an error where an exception could not pass: under a call that the
  // compiler put in and takes for one that does not throw.
  [[noreturn]] void fail_without_unwinding(const std::string& what) {
    try {
      fail(what);
    } catch (...) {
      running_->error = std::current_exception();
    }
    running_->state = ThreadState::done;
    running_->fiber.yield();
    std::abort();  // nobody resumes a thread that is done
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw KernelError(kernel_name() + ", block " + text(blockIdx) + ", thread " +
                      text(running_->index) + ": " + what);
  }

 private:
  struct alignas(16) Aligned {
    unsigned char bytes[16];
  };

  static std::string text(const uint3& index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
  }

  // Needs the kernel among the dynamic symbols: a shared library, or an executable linked with
  // -rdynamic.
  std::string kernel_name() const {
    Dl_info info{};
    if (dladdr(kernel_address_, &info) == 0 || info.dli_sname == nullptr) return "a kernel";
    int status = 0;
    std::unique_ptr<char, void (*)(void*)> name(
        abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
    return status == 0 ? name.get() : info.dli_sname;
  }

  void run_block() {
    std::memset(shared_.data(), 0xff, shared_.size() * sizeof(Aligned));  // nan in every type
    meetings_.resize((count_ + WARP_LANES - 1) / WARP_LANES);
    for (auto& meetings : meetings_) meetings.clear();
    SharedMemoryState& memory = shared_memory_state;
    ++memory.block_serial;
    ++memory.block_epoch;
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = *threads_[i];
      thread.state = ThreadState::ready;
      thread.error = nullptr;
      thread.fiber.start(&Device::thread_main);
    }
    unsigned done = 0;
    while (done < count_) {
      bool progress = false;
      for (unsigned i = 0; i < count_; ++i) {
        if (threads_[i]->state != ThreadState::ready) continue;
        progress = true;
        resume(*threads_[i]);
        if (threads_[i]->state == ThreadState::done) ++done;
      }
      if (!progress) release_barrier();
    }
  }

  void resume(Thread& thread) {
    running_ = &thread;
    threadIdx = thread.index;
    shared_memory_state.thread = thread.number;
    shared_memory_state.in_kernel = true;
    thread.fiber.resume();
    shared_memory_state.in_kernel = false;
    if (thread.error) std::rethrow_exception(thread.error);
    if (thread.state == ThreadState::done) {
      for (auto& meeting : meetings_[thread.warp()]) close_if_complete(meeting, thread.warp());
    }
  }

  static void thread_main();

  // Nothing can run: the barrier opens if every thread of the block stands at it.
  void release_barrier() {
    Thread* first = nullptr;
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = *threads_[i];
      running_ = &thread;
      if (thread.state == ThreadState::in_warp_meeting) {
        fail("a warp operation to which not all lanes of its mask come");
      }
      if (thread.state == ThreadState::at_barrier && first == nullptr) first = &thread;
    }
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = *threads_[i];
      running_ = &thread;
      if (thread.state == ThreadState::done) {
        running_ = first;
        fail("the barrier in line " + std::to_string(first->barrier_line) + ", which thread " +
             text(thread.index) + " never reaches");
      }
      if (thread.barrier_line != first->barrier_line) {
        fail("the barrier in line " + std::to_string(thread.barrier_line) + ", while thread " +
             text(first->index) + " stands at that in line " + std::to_string(first->barrier_line));
      }
    }
    for (unsigned i = 0; i < count_; ++i) threads_[i]->state = ThreadState::ready;
    ++shared_memory_state.block_epoch;
  }

  WarpMeeting& find_meeting(unsigned warp, unsigned mask) {
    for (auto& meeting : meetings_[warp]) {
      if (meeting.mask == mask) return meeting;
    }
    meetings_[warp].push_back({mask});
    return meetings_[warp].back();
  }

  void close_if_complete(WarpMeeting& meeting, unsigned warp) {
    if (meeting.arrived == 0) return;
    const unsigned first = warp * WARP_LANES;
    for (unsigned lane = 0; lane < WARP_LANES && first + lane < count_; ++lane) {
      const bool awaited = meeting.mask >> lane & 1 && !(meeting.arrived >> lane & 1);
      if (awaited && threads_[first + lane]->state != ThreadState::done) return;
    }
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
      if (meeting.arrived >> lane & 1) threads_[first + lane]->state = ThreadState::ready;
    }
    meeting.took_part[meeting.round % 2] = meeting.arrived;
    meeting.arrived = 0;
    ++meeting.round;
    ++shared_memory_state.warp_epochs[warp];
  }

  const void* kernel_address_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  unsigned count_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Aligned> shared_;
  std::vector<std::deque<WarpMeeting>> meetings_;  // per warp; a deque's elements stay in place
  Thread* running_ = nullptr;
};

inline Device& device() {
  static thread_local Device instance;
  return instance;
}

inline void Device::thread_main() {
  Device& self = device();
  Thread& thread = *self.running_;
  thread.fiber.entered();
  try {
    (*self.kernel_)();
  } catch (...) {
    thread.error = std::current_exception();
  }
  thread.state = ThreadState::done;
  thread.fiber.yield();
  std::abort();  // nobody resumes a thread that is done
}

// A GPU refuses a vector access at an address that is no multiple of its size; this CPU does not.
inline void check_alignment(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    device().fail("a misaligned access of " + std::to_string(bytes) + " bytes");
  }
}

inline unsigned char* block_shared_memory() { return shared_memory_state.data; }

// The error of the last launch, and the launch whose error nobody has asked for yet.
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local bool launch_is_unchecked = false;

template <class Value>
Value shuffle(unsigned mask, Value value, unsigned source, bool in_range) {
  static_assert(sizeof(Value) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  const Device::Exchanged exchanged = device().meet(mask, bits);
  if (!in_range) return value;
  if (!(exchanged.took_part >> source & 1)) {
    device().fail("a shuffle from lane " + std::to_string(source) + ", which takes no part");
  }
  std::memcpy(&value, &exchanged.values[source], sizeof(value));
  return value;
}

}  // namespace emulator

// The line tells barriers apart: after optimisation one barrier may be several calls.
inline void __syncthreads(int line = __builtin_LINE()) { emulator::device().barrier(line); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::device().meet(mask, 0); }

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
  const unsigned lane = emulator::device().lane();
  const unsigned target = lane / width * width + static_cast<unsigned>(source) % width;
  return emulator::shuffle(mask, value, target, true);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::device().lane();
  return emulator::shuffle(mask, value, lane + delta, lane % width + delta < unsigned(width));
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::device().lane();
  return emulator::shuffle(mask, value, lane - delta, lane % width >= delta);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask, int width = 32) {
  const unsigned lane = emulator::device().lane();
  const unsigned target = lane ^ static_cast<unsigned>(lane_mask);
  return emulator::shuffle(mask, value, target, target / width == lane / width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto exchanged = emulator::device().meet(mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < emulator::WARP_LANES; ++lane) {
    const bool present = exchanged.took_part >> lane & 1;
    if (present && exchanged.values[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  emulator::launch_is_unchecked = false;
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace emulator;
  if (launch_is_unchecked) throw KernelError("a launch whose error was never asked for");
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > MOST_THREADS || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > MOST_GRID_X || grid.y > MOST_GRID_YZ || grid.z > MOST_GRID_YZ) {
    last_error = cudaErrorInvalidConfiguration;
  } else if (config->dynamicSmemBytes > MOST_SHARED_BYTES) {
    last_error = cudaErrorInvalidValue;
  }
  if (last_error != cudaSuccess) {
    launch_is_unchecked = true;
    return last_error;
  }
  const std::tuple<Parameters...> copies(static_cast<Parameters>(arguments)...);
  device().run_grid(reinterpret_cast<const void*>(kernel), grid, block, config->dynamicSmemBytes,
                    [&] { std::apply(kernel, copies); });
  launch_is_unchecked = true;
  return cudaSuccess;
}
