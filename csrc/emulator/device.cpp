// Runs the blocks of a launch: threads are fibers that take turns at barriers and warp operations.
#include "device.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <mutex>
#include <utility>

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulator {

Position position;
__attribute__((tls_model("initial-exec"))) thread_local bool in_kernel = false;

namespace {

// A meeting of lanes of one warp. Two sets of slots, because a fast lane may leave its next value
// before a slow one has read.
struct WarpMeeting {
  unsigned mask;
  unsigned arrived = 0;
  unsigned round = 0;
  Lanes lanes[2] = {};
};

enum class ThreadState { ready, at_barrier, at_grid_barrier, in_warp_meeting, done };

struct Thread {
  Fiber fiber;
  unsigned number = 0;
  uint3 index{};
  ThreadState state = ThreadState::done;
  int barrier_line = 0;
  bool predicate = false;
  unsigned first_block = 0;  // the first with which this thread's accesses may race
  std::exception_ptr error;

  unsigned lane() const { return number % WARP_LANES; }
  unsigned warp() const { return number / WARP_LANES; }
};

struct Block {
  uint3 index{};
  unsigned serial = 0;
  unsigned epoch = 0;
  unsigned done = 0;
  unsigned barrier_votes = 0;  // of the barrier that opened last
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::deque<WarpMeeting>> meetings;  // per warp; a deque's elements stay in place
  std::vector<unsigned> warp_epochs;
  SharedMemory shared;
};

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

class Device {
 public:
  void run(const cudaLaunchConfig_t& config, const Launch& launch) {
    launch_ = &launch;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    count_ = blockDim.x * blockDim.y * blockDim.z;
    cooperative_ = emulator::is_cooperative(config);
    overlaps_ = overlaps_previous(config);
    position.first_of_launch = first_block_ = serial_ + 1;
    // All launches that overlap the one before may still run, back to the first that does not.
    if (!overlaps_) first_of_overlapping_ = first_block_;
    position.call = reinterpret_cast<std::uintptr_t>(launch.call.get());
    position.call_bytes = launch.call_bytes;
    const std::uint64_t all = std::uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    if (cooperative_) {
      alive_ = static_cast<unsigned>(all);
      for (unsigned i = 0; i < alive_; ++i) start(block(i), i, config.dynamicSmemBytes);
      run_alive();
    } else {
      alive_ = 1;
      for (std::uint64_t i = 0; i < all; ++i) {
        start(block(0), i, config.dynamicSmemBytes);
        run_alive();
      }
    }
  }

  unsigned barrier(ThreadState kind, int line, bool predicate) {
    thread_->state = kind;
    thread_->barrier_line = line;
    thread_->predicate = predicate;
    yield();
    return block_->barrier_votes;
  }

  Lanes meet(unsigned mask, std::uint64_t value) {
    const Outside outside;
    const unsigned lane = thread_->lane();
    if (!(mask >> lane & 1)) fail("a warp operation whose mask leaves out the calling lane");
    WarpMeeting& meeting = find_meeting(mask);
    const unsigned set = meeting.round % 2;
    meeting.lanes[set].values[lane] = value;
    meeting.arrived |= 1u << lane;
    thread_->state = ThreadState::in_warp_meeting;
    close_if_complete(meeting, *block_, thread_->warp());
    if (thread_->state == ThreadState::in_warp_meeting) yield();
    position.now.warp_epoch = block_->warp_epochs[thread_->warp()];
    return meeting.lanes[set];
  }

  void wait_for_previous_kernel() { thread_->first_block = position.first_block = first_block_; }

  unsigned lane() const { return thread_->lane(); }
  bool is_cooperative() const { return cooperative_; }
  void order_blocks() { position.now.grid_epoch = ++grid_epoch_; }

  unsigned existing_lanes() const {
    unsigned lanes = 0;
    for (unsigned i = thread_->warp() * WARP_LANES, lane = 0; lane < WARP_LANES && i < count_;
         ++i, ++lane) {
      if (block_->threads[i]->state != ThreadState::done) lanes |= 1u << lane;
    }
    return lanes;
  }

  [[noreturn]] void fail_without_unwinding(const std::string& what) {
    record_error([&] { fail(what); });
    end();
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw KernelError(kernel_name(launch_->kernel) + ", block " + text(block_->index) +
                      ", thread " + text(thread_->index) + ": " + what);
  }

 private:
  Block& block(unsigned i) {
    while (blocks_.size() <= i) blocks_.push_back(std::make_unique<Block>());
    return *blocks_[i];
  }

  void start(Block& block, std::uint64_t number, std::size_t shared_bytes) {
    block.index = {static_cast<unsigned>(number % gridDim.x),
                   static_cast<unsigned>(number / gridDim.x % gridDim.y),
                   static_cast<unsigned>(number / gridDim.x / gridDim.y)};
    block.serial = ++serial_;
    block.epoch = ++epoch_;
    block.done = 0;
    const unsigned warps = (count_ + WARP_LANES - 1) / WARP_LANES;
    block.meetings.resize(warps);
    for (auto& meetings : block.meetings) meetings.clear();
    block.warp_epochs.assign(warps, 0);
    SharedMemory& shared = block.shared;
    shared.storage.resize((2 * SHARED_MARGIN_BYTES + shared_bytes) / sizeof(*shared.storage.data()) +
                          1);
    shared.data = reinterpret_cast<unsigned char*>(shared.storage.data()) + SHARED_MARGIN_BYTES;
    shared.bytes = shared_bytes;
    std::memset(shared.data, 0xff, shared_bytes);  // nan in every type
    while (block.threads.size() < count_) block.threads.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = *block.threads[i];
      thread.number = i;
      thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      thread.state = ThreadState::ready;
      thread.first_block = overlaps_ ? first_of_overlapping_ : first_block_;
      thread.error = nullptr;
      thread.fiber.start(&Device::thread_main, i % 32 * 128);
    }
  }

  void run_alive() {
    while (true) {
      bool progress = false;
      bool finished = true;
      for (unsigned i = 0; i < alive_; ++i) {
        progress |= step(*blocks_[i]);
        finished &= blocks_[i]->done == count_;
      }
      if (finished) return;
      if (!progress) open_grid_barrier();
    }
  }

  // Runs every thread of the block that can run, then opens the barrier that they stand at. Whether
  // anything happened.
  bool step(Block& block) {
    if (block.done == count_) return false;
    block_ = &block;
    blockIdx = block.index;
    position.now.block = block.serial;
    position.shared = &block.shared;
    bool progress = false;
    for (unsigned i = 0; i < count_; ++i) {
      if (block.threads[i]->state != ThreadState::ready) continue;
      progress = true;
      resume(*block.threads[i]);
    }
    if (progress || block.done == count_) return progress;
    return open_barrier();
  }

  void resume(Thread& thread) {
    thread_ = &thread;
    threadIdx = thread.index;
    Access& now = position.now;
    now.thread = thread.number;
    now.epoch = block_->epoch;
    now.warp_epoch = block_->warp_epochs[thread.warp()];
    position.first_block = thread.first_block;
    position.fiber = &thread.fiber;
    in_kernel = true;
    thread.fiber.resume();
    in_kernel = false;
    if (thread.error) std::rethrow_exception(std::exchange(thread.error, nullptr));
    if (thread.state == ThreadState::done) {
      if (thread.first_block != first_block_) {
        fail("it ends without having waited for the kernel that its launch overlaps");
      }
      ++block_->done;
      for (auto& meeting : block_->meetings[thread.warp()]) {
        close_if_complete(meeting, *block_, thread.warp());
      }
    }
  }

  void yield() { thread_->fiber.yield(); }

  // What the running thread keeps of an exception; its stack, soon abandoned, must hold no part of it.
  template <class Body>
  void record_error(const Body& body) {
    try {
      body();
    } catch (...) {
      thread_->error = std::current_exception();
    }
  }

  [[noreturn]] void end() {
    thread_->state = ThreadState::done;
    yield();
    std::abort();  // nobody resumes a thread that is done
  }

  static void thread_main();

  // No thread of the block can run: its barrier opens if every thread stands at it. False if all
  // wait for the grid.
  bool open_barrier() {
    Thread* first = nullptr;
    for (unsigned i = 0; i < count_; ++i) {
      thread_ = block_->threads[i].get();
      if (thread_->state == ThreadState::in_warp_meeting) {
        fail("a warp operation to which not all lanes of its mask come");
      }
      if (thread_->state != ThreadState::done && first == nullptr) first = thread_;
    }
    unsigned votes = 0;
    for (unsigned i = 0; i < count_; ++i) {
      const Thread& thread = *block_->threads[i];
      thread_ = first;
      if (thread.state == ThreadState::done) {
        fail("the barrier in line " + std::to_string(first->barrier_line) + ", which thread " +
             text(thread.index) + " never reaches");
      }
      if (thread.barrier_line != first->barrier_line || thread.state != first->state) {
        fail("the barrier in line " + std::to_string(first->barrier_line) + ", while thread " +
             text(thread.index) + " stands at that in line " + std::to_string(thread.barrier_line));
      }
      votes += thread.predicate;
    }
    if (first->state == ThreadState::at_grid_barrier) return false;
    open(*block_, votes);
    return true;
  }

  // Every block that has not ended stands at a barrier of the grid.
  void open_grid_barrier() {
    const auto at = std::find_if(blocks_.begin(), blocks_.begin() + alive_,
                                 [&](auto& each) { return each->done < count_; });
    const auto over = std::find_if(blocks_.begin(), blocks_.begin() + alive_,
                                   [&](auto& each) { return each->done == count_; });
    if (over != blocks_.begin() + alive_) {
      block_ = at->get();
      thread_ = block_->threads[0].get();
      fail("the barrier of the grid in line " + std::to_string(thread_->barrier_line) +
           ", which block " + text((*over)->index) + " never reaches");
    }
    for (unsigned i = 0; i < alive_; ++i) open(*blocks_[i], 0);
    order_blocks();
  }

  void open(Block& block, unsigned votes) {
    for (unsigned i = 0; i < count_; ++i) block.threads[i]->state = ThreadState::ready;
    block.barrier_votes = votes;
    block.epoch = ++epoch_;
  }

  WarpMeeting& find_meeting(unsigned mask) {
    auto& meetings = block_->meetings[thread_->warp()];
    for (auto& meeting : meetings) {
      if (meeting.mask == mask) return meeting;
    }
    meetings.push_back({mask});
    return meetings.back();
  }

  void close_if_complete(WarpMeeting& meeting, Block& block, unsigned warp) {
    if (meeting.arrived == 0) return;
    const unsigned first = warp * WARP_LANES;
    for (unsigned lane = 0; lane < WARP_LANES && first + lane < count_; ++lane) {
      const bool awaited = meeting.mask >> lane & 1 && !(meeting.arrived >> lane & 1);
      if (awaited && block.threads[first + lane]->state != ThreadState::done) return;
    }
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
      if (meeting.arrived >> lane & 1) block.threads[first + lane]->state = ThreadState::ready;
    }
    meeting.lanes[meeting.round % 2].present = meeting.arrived;
    meeting.arrived = 0;
    ++meeting.round;
    ++block.warp_epochs[warp];
  }

  const Launch* launch_ = nullptr;
  unsigned count_ = 0;  // threads per block
  bool cooperative_ = false;
  bool overlaps_ = false;
  unsigned first_block_ = 0;           // of this launch
  unsigned first_of_overlapping_ = 0;  // of this launch and those before that may still run
  unsigned alive_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;
  Block* block_ = nullptr;
  Thread* thread_ = nullptr;
  unsigned serial_ = 0;
  unsigned epoch_ = 0;
  unsigned grid_epoch_ = 0;
};

Device device;

void Device::thread_main() {
  device.thread_->fiber.entered();
  device.record_error([] { device.launch_->run(device.launch_->call.get()); });
  device.end();
}

std::mutex one_launch_at_a_time;

}  // namespace

void run(const cudaLaunchConfig_t& config, const Launch& launch) {
  const std::lock_guard lock(one_launch_at_a_time);
  device.run(config, launch);
}

std::string kernel_name(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_saddr != kernel) return "a kernel";
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  if (status != 0) return info.dli_sname;
  // A template's name begins with its return type.
  const std::string found = name.get();
  return found.starts_with("void ") ? found.substr(5) : found;
}

void fail_launch(const cudaLaunchConfig_t& config, const void* kernel, const std::string& what) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  throw KernelError(kernel_name(kernel) + ", grid " + text({grid.x, grid.y, grid.z}) + " of blocks " +
                    text({block.x, block.y, block.z}) + ": " + what);
}

unsigned char* block_shared_memory() { return position.shared->data; }

unsigned block_barrier(int line, bool predicate) {
  return device.barrier(ThreadState::at_barrier, line, predicate);
}

void grid_barrier(int line) {
  if (!device.is_cooperative()) {
    const Outside outside;
    fail("a barrier of the grid in a launch that is not cooperative");
  }
  device.barrier(ThreadState::at_grid_barrier, line, false);
}

void fence() { device.order_blocks(); }
void wait_for_previous_kernel() { device.wait_for_previous_kernel(); }

Lanes exchange(unsigned mask, std::uint64_t value) { return device.meet(mask, value); }

std::uint64_t shuffle(unsigned mask, std::uint64_t value, unsigned source, bool in_range) {
  const Lanes lanes = device.meet(mask, value);
  if (!in_range) return value;
  if (!(lanes.present >> source & 1)) {
    const Outside outside;
    fail("a shuffle from lane " + std::to_string(source) + ", which takes no part");
  }
  return lanes.values[source];
}

unsigned lane() { return device.lane(); }
unsigned existing_lanes() { return device.existing_lanes(); }
void fail(const std::string& what) {
  const Outside outside;
  device.fail(what);
}
void fail_without_unwinding(const std::string& what) { device.fail_without_unwinding(what); }

void check_alignment(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    const Outside outside;
    fail("a misaligned access of " + std::to_string(bytes) + " bytes");
  }
}

}  // namespace emulator
