// Checks of shared memory in the emulator: races, reads of what nothing wrote, accesses beyond what
// the launch asked for.
//
// The kernels are compiled with -fsanitize=thread, so that the compiler announces every access by a
// call; this file answers the calls in place of ThreadSanitizer's runtime, which is not linked and
// would see one thread only. It must itself be compiled without that option. The bounds
// of other memory are left to AddressSanitizer, in a build of its own.
#include "cuda_on_cpu.h"

namespace {

using emulator::shared_memory_state;

// One access: by which thread, in which block and between which barriers.
struct Access {
  unsigned block = 0;  // 0: none
  unsigned thread = 0;
  unsigned block_epoch = 0;
  unsigned warp_epoch = 0;
};

// The two last readers that differ are enough to see that a writer is not the only reader.
struct ByteHistory {
  Access write;
  Access reads[2];
};

thread_local ByteHistory history[emulator::MOST_SHARED_BYTES];

// Whether an earlier access of this block may happen at the same time as this one.
bool unordered(const Access& earlier, const Access& now) {
  if (earlier.block != now.block || earlier.thread == now.thread) return false;
  if (earlier.block_epoch != now.block_epoch) return false;
  const bool same_warp =
      earlier.thread / emulator::WARP_LANES == now.thread / emulator::WARP_LANES;
  return !(same_warp && earlier.warp_epoch != now.warp_epoch);
}

[[noreturn]] void report(const char* what, std::size_t offset) {
  shared_memory_state.in_kernel = false;
  emulator::device().fail_without_unwinding(std::string(what) + " byte " + std::to_string(offset) +
                                            " of the shared memory");
}

void check(const void* address, std::size_t size, bool is_write) {
  auto& memory = shared_memory_state;
  if (!memory.in_kernel) return;
  const std::size_t offset = static_cast<const unsigned char*>(address) - memory.data;
  if (offset >= memory.bytes + emulator::SHARED_MARGIN_BYTES) return;  // other memory
  if (offset + size > memory.bytes) report("an access beyond the end, to", offset);
  const Access now{memory.block_serial, memory.thread, memory.block_epoch,
                   memory.warp_epochs[memory.thread / emulator::WARP_LANES]};
  for (std::size_t byte = offset; byte < offset + size; ++byte) {
    ByteHistory& past = history[byte];
    if (unordered(past.write, now)) {
      report(is_write ? "two threads write, with no barrier between,"
                      : "a thread reads what another writes, with no barrier between,",
             byte);
    }
    if (is_write) {
      for (const Access& read : past.reads) {
        if (unordered(read, now)) {
          report("a thread writes what another reads, with no barrier between,", byte);
        }
      }
      past.write = now;
    } else {
      if (past.write.block != now.block) report("a read of what nothing wrote,", byte);
      if (past.reads[0].thread != now.thread) past.reads[1] = past.reads[0];
      past.reads[0] = now;
    }
  }
}

}  // namespace

// What the compiler calls. The names are ThreadSanitizer's.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define PYEXT_ACCESS(size)                                               \
  void __tsan_read##size(void* address) { check(address, size, false); } \
  void __tsan_write##size(void* address) { check(address, size, true); } \
  void __tsan_unaligned_read##size(void* address) { check(address, size, false); } \
  void __tsan_unaligned_write##size(void* address) { check(address, size, true); }
PYEXT_ACCESS(1)
PYEXT_ACCESS(2)
PYEXT_ACCESS(4)
PYEXT_ACCESS(8)
PYEXT_ACCESS(16)
// Copies of large structures: never a vector access.
void __tsan_read_range(void*, unsigned long) {}
void __tsan_write_range(void*, unsigned long) {}
}
