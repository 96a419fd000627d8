// Uninitialised memory for intermediates and large outputs. No PyTorch in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyext {

// Blocks are kept between calls: a step at 1024 x 784 x 512 x 10 needs 6 MB of them, 1500 pages that
// the system would have to map and clear at each call. At most kMost bytes are kept, in huge pages:
// room for the output and the gradient of a ReLU of 2^25 floats.
class BufferPool {
 public:
  static constexpr size_t kHugePage = 2 << 20, kMost = 256 << 20;

  // Never destroyed: threads may still give back blocks while the process ends.
  static BufferPool& instance() {
    static BufferPool* pool = new BufferPool;
    return *pool;
  }

  // A block of at least `size` bytes; `size` becomes what it has.
  void* take(size_t& size) {
    size = (size + alignment(size) - 1) / alignment(size) * alignment(size);
    if (const auto lock = lock_unless_in_use(); lock) {
      auto best = blocks_.end();
      // Among equals one that this thread gave back, for its lines are in this core's caches and not
      // in another's; the last of these, whose lines are the likeliest to be there still.
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
        if (block->size >= size && block->size <= 2 * size &&
            (best == blocks_.end() || block->size < best->size ||
             (block->size == best->size && (block->giver == this_thread() ||
                                            best->giver != this_thread()))))
          best = block;
      if (best != blocks_.end()) {
        void* data = best->data;
        size = best->size;
        kept_ -= size;
        blocks_.erase(best);
        return data;
      }
    }
    void* data;
    try {
      data = ::operator new(size, std::align_val_t(alignment(size)));
    } catch (const std::bad_alloc&) {
      empty();
      data = ::operator new(size, std::align_val_t(alignment(size)));
    }
#ifdef MADV_HUGEPAGE
    if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
    return data;
  }

  // Keeps a block, in place of the longest kept ones where it would be too much.
  void give_back(void* data, size_t size) {
    const auto lock = lock_unless_in_use();
    if (!lock || size > kMost) return release({data, size, nullptr});
    while (kept_ + size > kMost) drop_oldest();
    blocks_.push_back({data, size, this_thread()});
    kept_ += size;
  }

  // Frees what is kept and returns how many bytes that were.
  size_t empty() {
    const auto lock = lock_unless_in_use();
    if (!lock) return 0;
    const size_t freed = kept_;
    while (!blocks_.empty()) drop_oldest();
    return freed;
  }

 private:
  struct Block {
    void* data;
    size_t size;
    const void* giver;  // this_thread() of who gave it back
  };

  // The threads of a product come all at once, each for a moment; but a fork may have left the pool
  // locked for ever, and then it goes without. (Whoever did not wait made 16 to 70 page faults a step
  // at 1024 x 784 x 512 x 10.)
  std::unique_lock<std::mutex> lock_unless_in_use() {
    std::unique_lock lock(mutex_, std::try_to_lock);
    for (int attempt = 0; attempt < 1000 && !lock; ++attempt)
      static_cast<void>(lock.try_lock());
    return lock;
  }

  static const void* this_thread() {
    static thread_local const char self = 0;
    return &self;
  }

  static constexpr size_t alignment(size_t size) { return size >= kHugePage ? kHugePage : 64; }
  static void release(const Block& block) {
    ::operator delete(block.data, std::align_val_t(alignment(block.size)));
  }

  void drop_oldest() {
    release(blocks_.front());
    kept_ -= blocks_.front().size;
    blocks_.erase(blocks_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // the longest kept first
  size_t kept_ = 0;
};

// Memory for `size` values, aligned to the widest vectors. A small one lies in the object, on its
// user's stack: without that a step at 4 x 4 x 4 x 4 took 7.0 µs, not 4.9.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : bytes_(size * sizeof(T)) {
    data_ = is_small() ? reinterpret_cast<T*>(small_)
                       : static_cast<T*>(BufferPool::instance().take(bytes_));
  }
  ~Buffer() {
    if (!is_small()) BufferPool::instance().give_back(data_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }

 private:
  bool is_small() const { return bytes_ <= sizeof(small_); }

  size_t bytes_;
  T* data_;
  alignas(64) unsigned char small_[16 << 10];
};

}  // namespace pyext
