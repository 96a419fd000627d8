// Launches: what a device refuses, and streams as ordered queues. The null stream and an Op's stream
// run what they are given at once; what goes to another stream runs when somebody waits for it, as
// late as CUDA allows, so that a missing wait shows.
#include <algorithm>
#include <deque>
#include <functional>
#include <map>

#include "device.h"

struct EmulatedStream {
  std::deque<std::function<void()>> queue;
  bool is_of_op = false;
};

struct EmulatedEvent {
  EmulatedStream* stream = nullptr;
  bool pending = false;
};

namespace emulator {
namespace {

struct LastLaunch {
  cudaError_t error = cudaSuccess;
  bool unchecked = false;
  cudaLaunchConfig_t config{};
  const void* kernel = nullptr;
};
thread_local LastLaunch last_launch;
thread_local cudaStream_t op_stream = nullptr;

// What a device of so many multiprocessors would be given is written down and not run.
struct DryRun {
  int multiprocessors = 0;  // 0: launches are run
  std::string launches;     // a line for each
};
DryRun dry_run;

std::vector<EmulatedStream*> streams;
std::map<const void*, std::size_t> opted_in_shared_bytes;

void drain(EmulatedStream* stream) {
  while (!stream->queue.empty()) {
    const std::function<void()> work = std::move(stream->queue.front());
    stream->queue.pop_front();
    work();
  }
}

void drain_all() {
  for (EmulatedStream* stream : streams) drain(stream);
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr) drain_all();
  if (stream == nullptr || stream->is_of_op) {
    work();
  } else {
    stream->queue.push_back(std::move(work));
  }
}

void wait_for(cudaEvent_t event) {
  while (event->pending && !event->stream->queue.empty()) {
    const std::function<void()> work = std::move(event->stream->queue.front());
    event->stream->queue.pop_front();
    work();
  }
}

void require_checked_launch() {
  if (!last_launch.unchecked) return;
  last_launch.unchecked = false;
  fail_launch(last_launch.config, last_launch.kernel, "a launch whose error was never asked for");
}

cudaError_t refusal(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > MOST_THREADS || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > MOST_GRID_X || grid.y > MOST_GRID_YZ || grid.z > MOST_GRID_YZ) {
    return cudaErrorInvalidConfiguration;
  }
  const auto opted_in = opted_in_shared_bytes.find(kernel);
  const std::size_t most_shared = opted_in == opted_in_shared_bytes.end()
                                      ? MOST_SHARED_BYTES
                                      : std::max(opted_in->second, MOST_SHARED_BYTES);
  if (config.dynamicSmemBytes > most_shared) return cudaErrorInvalidValue;
  const std::uint64_t most_blocks =
      std::uint64_t(multiprocessors()) * resident_blocks(threads, config.dynamicSmemBytes);
  if (is_cooperative(config) && std::uint64_t{grid.x} * grid.y * grid.z > most_blocks) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

bool is_cooperative(const cudaLaunchConfig_t& config) {
  return std::any_of(config.attrs, config.attrs + config.numAttrs, [](const auto& attribute) {
    return attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative;
  });
}

bool overlaps_previous(const cudaLaunchConfig_t& config) {
  return std::any_of(config.attrs, config.attrs + config.numAttrs, [](const auto& attribute) {
    return attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
           attribute.val.programmaticStreamSerializationAllowed;
  });
}

cudaError_t submit(const cudaLaunchConfig_t& config, Launch launch) {
  require_checked_launch();
  if (op_stream != nullptr && config.stream != op_stream) {
    fail_launch(config, launch.kernel, "a launch on another stream than the current one");
  }
  last_launch = {refusal(config, launch.kernel), true, config, launch.kernel};
  last_launch.config.numAttrs = 0;  // they live as long as the caller's configuration
  if (last_launch.error != cudaSuccess) return last_launch.error;
  if (dry_run.multiprocessors != 0) {
    dry_run.launches += kernel_name(launch.kernel) + "\n";
    return cudaSuccess;
  }
  try {
    const auto attributes = std::make_shared<std::vector<cudaLaunchAttribute>>(
        config.attrs, config.attrs + config.numAttrs);
    enqueue(config.stream, [=, kept = config]() mutable {
      kept.attrs = attributes->data();
      run(kept, launch);
    });
  } catch (...) {
    last_launch.unchecked = false;  // the exception says more
    throw;
  }
  return cudaSuccess;
}

int multiprocessors() {
  return dry_run.multiprocessors == 0 ? MULTIPROCESSORS : dry_run.multiprocessors;
}

Op::Op() : outer_regions_(region_count()), outer_stream_(op_stream) {
  static EmulatedStream current{{}, true};
  op_stream = &current;
}

Op::~Op() noexcept(false) {
  forget_regions(outer_regions_);
  op_stream = outer_stream_;
  if (std::uncaught_exceptions() == 0) require_checked_launch();
}

cudaStream_t Op::stream() const { return op_stream; }

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > MOST_SHARED_BYTES_OPT_IN) {
    return cudaErrorInvalidValue;
  }
  opted_in_shared_bytes[kernel] = bytes;
  return cudaSuccess;
}

int resident_blocks(std::size_t threads, std::size_t shared_bytes) {
  const std::size_t whole_warps = (threads + WARP_LANES - 1) / WARP_LANES * WARP_LANES;
  std::size_t blocks = std::min<std::size_t>(MOST_BLOCKS_PER_MULTIPROCESSOR,
                                             MOST_THREADS_PER_MULTIPROCESSOR / whole_warps);
  // Every block takes 1 KiB for the system.
  blocks = std::min(blocks, SHARED_BYTES_PER_MULTIPROCESSOR / (shared_bytes + 1024));
  return static_cast<int>(blocks);
}

}  // namespace emulator

using namespace emulator;

// For Python's ctypes: from now on launches are only written down, or (0) are run again.
extern "C" void pyext_emulator_dry_run(int multiprocessors) {
  dry_run = {multiprocessors, ""};
}

extern "C" const char* pyext_emulator_launches() { return dry_run.launches.c_str(); }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_launch.error;
  last_launch.error = cudaSuccess;
  last_launch.unchecked = false;
  return error;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  streams.push_back(*stream = new EmulatedStream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  drain(stream);
  streams.erase(std::find(streams.begin(), streams.end(), stream));
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream == nullptr ? drain_all() : drain(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  enqueue(stream, [=] { wait_for(event); });
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new EmulatedEvent;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  wait_for(event);
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  event->pending = true;
  enqueue(stream, [=] { event->pending = false; });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->pending ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  wait_for(event);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  drain_all();
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t stream) {
  if (dry_run.multiprocessors != 0) {
    dry_run.launches += "cudaMemsetAsync\n";
    return cudaSuccess;
  }
  enqueue(stream, [=] { std::memset(address, value, bytes); });
  return cudaSuccess;
}
