// What the device, the streams and the memory checks share; no kernel sees it.
#pragma once

#include <vector>

#include "cuda_on_cpu.h"
#include "fiber.h"

namespace emulator {

// When and by whom memory was touched. `epoch` stands for one block between two of its barriers, and
// no other; `warp_epoch` counts the meetings of one warp since its block began, `grid_epoch` what
// orders blocks.
struct Access {
  unsigned block = 0;  // counted over all launches; 0: none
  unsigned epoch = 0;  // likewise
  unsigned grid_epoch = 0;
  unsigned thread : 11 = 0;
  unsigned warp_epoch : 20 = 0;
  unsigned is_atomic : 1 = 0;
};

// The two last readers that differ are enough to see that a writer is not the only reader.
struct ByteHistory {
  Access write;
  Access reads[2];
};

// What happened to each byte of some memory, in pages, of which those that were never touched do not
// exist. Where memory was accessed in whole words of four bytes only, the first byte of a word speaks
// for all four.
class History {
 public:
  // Calls visit(history, offset) for what an access touches, in memory of `bytes` bytes.
  template <class Visit>
  void visit(std::size_t offset, std::size_t size, std::size_t bytes, const Visit& visit) {
    if (bytes_ < bytes) grow(bytes);
    for (const std::size_t end = offset + size; offset < end;) {
      Page& page = at(offset / PAGE_BYTES);
      const std::size_t in_page = offset % PAGE_BYTES;
      ByteHistory* word = &page.entries[in_page / 4 * 4];
      bool& is_split = page.is_split[in_page / 4];
      if (!is_split && offset % 4 == 0 && end - offset >= 4) {
        visit(*word, offset);
        offset += 4;
        continue;
      }
      if (!is_split) word[1] = word[2] = word[3] = word[0];
      is_split = true;
      visit(word[offset % 4], offset);
      ++offset;
    }
  }

 private:
  static constexpr std::size_t PAGE_BYTES = 512;
  struct Page {
    ByteHistory entries[PAGE_BYTES];
    bool is_split[PAGE_BYTES / 4] = {};
  };
  struct Free {
    void operator()(Page** table) const { std::free(table); }
  };

  Page& at(std::size_t number) {
    Page*& page = table_.get()[number];
    if (page == nullptr) page = pages_.emplace_back(std::make_unique<Page>()).get();
    return *page;
  }

  void grow(std::size_t bytes) {
    // calloc: an operand that spans gigabytes costs nothing until it is touched.
    table_.reset(static_cast<Page**>(std::calloc(bytes / PAGE_BYTES + 1, sizeof(Page*))));
    if (!table_) throw std::bad_alloc();
    pages_.clear();
    bytes_ = bytes;
  }

  std::vector<std::unique_ptr<Page>> pages_;
  std::unique_ptr<Page*, Free> table_;
  std::size_t bytes_ = 0;
};

// The memory of one block, with margins in which an overrun hits nothing else.
constexpr std::size_t SHARED_MARGIN_BYTES = 1024;
struct SharedMemory {
  struct alignas(16) Aligned {
    unsigned char bytes[16];
  };
  std::vector<Aligned> storage;
  unsigned char* data = nullptr;
  std::size_t bytes = 0;
  History history;
};

// Where the running thread stands.
struct Position {
  Access now;
  unsigned first_block = 0;      // the first whose accesses may not be over
  unsigned first_of_launch = 0;  // of those, the first that a fence can order
  SharedMemory* shared = nullptr;
  const Fiber* fiber = nullptr;
  std::uintptr_t call = 0;  // the kernel's arguments
  std::size_t call_bytes = 0;
};
extern Position position;

// Whether this host thread is inside a kernel. Other threads may be at work in code that announces
// its accesses.
extern __attribute__((tls_model("initial-exec"))) thread_local bool in_kernel;

// The emulator's own work on behalf of a kernel. It may run code that was compiled with the kernels,
// such as the standard library's templates, and its accesses are none of the kernel's.
class Outside {
 public:
  Outside() : was_in_kernel_(in_kernel) { in_kernel = false; }
  ~Outside() { in_kernel = was_in_kernel_; }

 private:
  bool was_in_kernel_;
};

// Ends the running thread with an error where an exception could not pass: under a call that the
// compiler put in and takes for one that does not throw.
[[noreturn]] void fail_without_unwinding(const std::string& what);

// A kernel's name with its template arguments. Needs it among the dynamic symbols: a shared library, or
// an executable linked with -rdynamic.
std::string kernel_name(const void* kernel);

// Runs a launch to its end.
void run(const cudaLaunchConfig_t& config, const Launch& launch);

[[noreturn]] void fail_launch(const cudaLaunchConfig_t& config, const void* kernel,
                              const std::string& what);

// The memory that the current Op has named.
std::size_t region_count();
void forget_regions(std::size_t first);

}  // namespace emulator
