// The pool of buffers: blocks come back, no more than its bound is kept, and it can be emptied.

#include <barrier>
#include <cstdint>
#include <thread>

#include "check.h"
#include "common/buffer.h"

namespace {

using pyext::Buffer;
using pyext::BufferPool;

bool is_aligned(const void* data, size_t alignment) {
  return reinterpret_cast<uintptr_t>(data) % alignment == 0;
}

}  // namespace

int main() {
  const float* first;
  {
    const Buffer<float> a(1 << 20);
    first = a.get();
    CHECK(is_aligned(first, BufferPool::kHugePage));
  }
  {
    const Buffer<float> again(1 << 20), other(1 << 20), small(100), none(0);
    CHECK(again.get() == first);
    CHECK(other.get() != first);
    CHECK(is_aligned(other.get(), 64) && is_aligned(small.get(), 64) && is_aligned(none.get(), 64));
    for (int i = 0; i < 1 << 20; ++i) again.get()[i] = other.get()[i] = 1;
  }
  {
    // Both come back in the order of their declaration reversed, so `again`'s is the newer one.
    const Buffer<float> newest(1 << 20);
    CHECK(newest.get() == first);
  }
  CHECK(BufferPool::instance().empty() == 2 * sizeof(float) << 20);
  CHECK(BufferPool::instance().empty() == 0);
  {
    const Buffer<char> too_large(BufferPool::kMost + 1), large(BufferPool::kMost);
    const Buffer<char> one_more(5 << 20);
  }
  CHECK(BufferPool::instance().empty() <= BufferPool::kMost);
  {
    const Buffer<char> large(160 << 20);
  }
  {
    // A block more than twice as large as is needed stays for those who need it, until there is no
    // room for what was used since.
    const Buffer<char> less(40 << 20);
  }
  {
    const Buffer<char> newer(64 << 20);
  }
  CHECK(BufferPool::instance().empty() == size_t{104} << 20);  // 40 and 64, not the older 160

  // A thread finds its own block again, though another one gave one back later.
  std::barrier meet(2);
  std::thread other([&] {
    {
      const Buffer<float> theirs(1 << 20);
      meet.arrive_and_wait();  // both threads hold a block
      meet.arrive_and_wait();  // this one gives its own back later
    }
    meet.arrive_and_wait();
  });
  const float* mine;
  {
    const Buffer<float> a(1 << 20);
    mine = a.get();
    meet.arrive_and_wait();
  }
  meet.arrive_and_wait();
  meet.arrive_and_wait();
  other.join();
  {
    const Buffer<float> again(1 << 20);
    CHECK(again.get() == mine);
  }
  CHECK(BufferPool::instance().empty() == 2 * sizeof(float) << 20);
  return failures != 0;
}
