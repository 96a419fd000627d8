// Checks of every access that a kernel makes: races, reads of what nothing wrote, accesses beyond
// the shared memory or the global memory that the launch was given, writes to inputs.
//
// The kernels are compiled with -fsanitize=thread, so that the compiler announces every access by a
// call; this file answers the calls in place of ThreadSanitizer's runtime, which is not linked and
// would see one thread only. It must itself be compiled without that option.
#include <link.h>

#include <algorithm>

#include "device.h"

namespace emulator {
namespace {

// Global memory that the current Op has named.
struct Region {
  std::uintptr_t begin;
  std::uintptr_t end;
  Memory kind;
  History history;

  bool holds(std::uintptr_t address, std::size_t bytes) const {
    return begin <= address && address + bytes <= end;
  }
};
thread_local std::vector<Region> regions;
thread_local std::size_t last_region = 0;

bool kernels_are_instrumented = false;

enum class Kind { read, write, atomic };

std::string name_of(const Region& region) {
  return "the " + std::to_string(region.end - region.begin) + " bytes of global memory";
}

[[noreturn]] void report(const std::string& what) { fail_without_unwinding(what); }

// Whether an earlier access may happen at the same time as this one, in this block or in another.
constexpr auto is_race_in_block = [](const Access& earlier, const Access& now) {
  if (earlier.epoch != now.epoch || earlier.thread == now.thread) return false;
  if (earlier.is_atomic && now.is_atomic) return false;
  const bool same_warp = earlier.thread / WARP_LANES == now.thread / WARP_LANES;
  return !(same_warp && earlier.warp_epoch != now.warp_epoch);
};

constexpr auto is_race = [](const Access& earlier, const Access& now) {
  if (earlier.block == now.block) return is_race_in_block(earlier, now);
  // Fences and meetings order the blocks of a launch, not those of two launches that overlap.
  const bool is_ordered =
      earlier.grid_epoch != now.grid_epoch && earlier.block >= position.first_of_launch;
  return earlier.block >= position.first_block && !is_ordered &&
         !(earlier.is_atomic && now.is_atomic);
};

[[noreturn]] void report_race(const Access& earlier, bool both_write, bool is_write,
                              const std::string& where) {
  const bool same_block = earlier.block == position.now.block;
  const std::string who = same_block ? "thread" : "block";
  const std::string what = both_write  ? "two " + who + "s write"
                           : is_write ? "a " + who + " writes what another reads"
                                      : "a " + who + " reads what another writes";
  report(what + (same_block ? ", with no barrier between, " : ", with nothing to order them, ") +
         where);
}

// `where` names a byte, for a message.
template <class Race, class Where>
void note(ByteHistory& past, Kind kind, const Race& race, bool unwritten, const Where& where) {
  Access now = position.now;
  now.is_atomic = kind == Kind::atomic;
  const bool writes = kind != Kind::read;
  if (race(past.write, now)) report_race(past.write, writes, writes, where());
  if (kind != Kind::write && unwritten) report("a read of what nothing wrote, " + where());
  if (writes) {
    for (const Access& read : past.reads) {
      if (race(read, now)) report_race(read, false, true, where());
    }
    past.write = now;
  } else {
    if (past.reads[0].thread != now.thread || past.reads[0].block != now.block) {
      past.reads[1] = past.reads[0];
    }
    past.reads[0] = now;
  }
}

void check_shared(std::size_t offset, std::size_t size, Kind kind) {
  SharedMemory& shared = *position.shared;
  const auto where = [&](std::size_t byte) {
    return "byte " + std::to_string(static_cast<std::ptrdiff_t>(byte)) + " of the shared memory";
  };
  if (offset > shared.bytes || size > shared.bytes - offset) {
    report("an access beyond the end, to " + where(offset));
  }
  shared.history.visit(offset, size, shared.bytes, [&](ByteHistory& past, std::size_t byte) {
    // What an earlier block left there says nothing about this one.
    const bool unwritten = past.write.block != position.now.block;
    note(past, kind, is_race_in_block, unwritten, [&] { return where(byte); });
  });
}

Region* find_region(std::uintptr_t address, std::size_t size, bool writes) {
  const auto fits = [&](const Region& region) {
    return region.holds(address, size) && !(writes && region.kind == Memory::read_only);
  };
  if (last_region < regions.size() && fits(regions[last_region])) return &regions[last_region];
  const auto found = std::find_if(regions.begin(), regions.end(), fits);
  if (found == regions.end()) return nullptr;
  last_region = found - regions.begin();
  return &*found;
}

// The program or library that holds this code, with its constants and built-in variables.
struct Image {
  std::uintptr_t begin = ~std::uintptr_t{0};
  std::uintptr_t end = 0;

  bool holds(std::uintptr_t address) const { return begin <= address && address < end; }
};

int find_image(dl_phdr_info* info, std::size_t, void* result) {
  Image found;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    found.begin = std::min(found.begin, info->dlpi_addr + part.p_vaddr);
    found.end = std::max(found.end, info->dlpi_addr + part.p_vaddr + part.p_memsz);
  }
  if (!found.holds(reinterpret_cast<std::uintptr_t>(&position))) return 0;
  *static_cast<Image*>(result) = found;
  return 1;
}

Image this_image() {
  Image image;
  dl_iterate_phdr(find_image, &image);
  return image;
}

[[noreturn]] void report_outside(std::uintptr_t address, std::size_t size, Kind kind) {
  if (find_region(address, size, false)) {
    report("a write to an input, byte " +
           std::to_string(address - find_region(address, size, false)->begin) + " of " +
           name_of(*find_region(address, size, false)));
  }
  const Region* nearest = nullptr;
  std::uintptr_t distance = ~std::uintptr_t{0};
  for (const Region& region : regions) {
    const std::uintptr_t gap =
        address + size > region.end ? address + size - region.end : region.begin - address;
    if (gap < distance) {
      distance = gap;
      nearest = &region;
    }
  }
  report(std::string(kind == Kind::read ? "a read" : "a write") + " of " + std::to_string(size) +
         " bytes outside of the memory that the launch was given, to byte " +
         std::to_string(static_cast<std::ptrdiff_t>(address - nearest->begin)) + " of " +
         name_of(*nearest));
}

void check_global(std::uintptr_t address, std::size_t size, Kind kind) {
  const bool writes = kind != Kind::read;
  Region* region = find_region(address, size, writes);
  if (region == nullptr) {
    static const Image image = this_image();
    const bool is_argument = address - position.call < position.call_bytes;
    if (!writes && (is_argument || image.holds(address))) return;
    report_outside(address, size, kind);
  }
  if (region->kind == Memory::read_only) return;
  region->history.visit(
      address - region->begin, size, region->end - region->begin,
      [&](ByteHistory& past, std::size_t byte) {
        const bool unwritten = region->kind == Memory::unwritten && past.write.block == 0;
        note(past, kind, is_race, unwritten,
             [&] { return "byte " + std::to_string(byte) + " of " + name_of(*region); });
      });
}

// `alignment`: what the compiler takes the address for a multiple of.
inline void check(const void* pointer, std::size_t size, Kind kind, std::size_t alignment = 1) {
  if (!in_kernel) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (position.fiber->owns(address)) return;
  const Outside outside;
  if (address % alignment != 0) {
    report("a misaligned access of " + std::to_string(size) + " bytes");
  }
  const SharedMemory& shared = *position.shared;
  const std::uintptr_t offset = address - reinterpret_cast<std::uintptr_t>(shared.data);
  if (offset + SHARED_MARGIN_BYTES < shared.bytes + 2 * SHARED_MARGIN_BYTES) {
    check_shared(offset, size, kind);
  } else if (!regions.empty()) {
    check_global(address, size, kind);
  }
}

}  // namespace

void check_atomic(const void* address, std::size_t bytes) {
  check_alignment(address, bytes);
  if (kernels_are_instrumented) check(address, bytes, Kind::atomic);
}

void allow(const void* address, std::size_t bytes, Memory kind) {
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  if (kind == Memory::unwritten) {  // scratch memory that an op freed may be handed out again
    std::erase_if(regions, [&](const Region& region) {
      return region.kind == kind && region.begin < begin + bytes && begin < region.end;
    });
  }
  for (Region& region : regions) {
    if (region.begin != begin || region.end != begin + bytes) continue;
    if (region.kind == Memory::read_only) region.kind = kind;
    return;
  }
  regions.push_back({begin, begin + bytes, kind, {}});
}

std::size_t region_count() { return regions.size(); }

void forget_regions(std::size_t first) { regions.resize(first); }

}  // namespace emulator

// What the compiler calls. The names are ThreadSanitizer's.
extern "C" {
void __tsan_init() { emulator::kernels_are_instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define PYEXT_ACCESS(size)                                                        \
  void __tsan_read##size(void* address) {                                         \
    emulator::check(address, size, emulator::Kind::read, size < 8 ? size : 8);                 \
  }                                                                               \
  void __tsan_write##size(void* address) {                                        \
    emulator::check(address, size, emulator::Kind::write, size < 8 ? size : 8);                \
  }                                                                               \
  void __tsan_unaligned_read##size(void* address) {                               \
    emulator::check(address, size, emulator::Kind::read);                         \
  }                                                                               \
  void __tsan_unaligned_write##size(void* address) {                              \
    emulator::check(address, size, emulator::Kind::write);                        \
  }
PYEXT_ACCESS(1)
PYEXT_ACCESS(2)
PYEXT_ACCESS(4)
PYEXT_ACCESS(8)
PYEXT_ACCESS(16)
void __tsan_read_range(void* address, unsigned long size) {
  emulator::check(address, size, emulator::Kind::read);
}
void __tsan_write_range(void* address, unsigned long size) {
  emulator::check(address, size, emulator::Kind::write);
}
// The host's side of the same files: reference counts, and the guards of static variables.
unsigned __tsan_atomic32_fetch_add(volatile unsigned* address, unsigned value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
}
