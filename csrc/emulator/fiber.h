// Fibers: functions with a stack of their own that hand control back and forth within one OS
// thread.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// AddressSanitizer's frames are several times as large.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t STACK_BYTES = 128 * 1024;
#else
constexpr std::size_t STACK_BYTES = 64 * 1024;
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack and its top in *save, then continues on `load`.
// swapcontext would do, at the price of two system calls per switch.
extern "C" void pyext_emulator_switch_stack(void** save, void* load);
asm(R"(
.pushsection .text.pyext_emulator, "axG", @progbits, pyext_emulator_switch_stack, comdat
.weak pyext_emulator_switch_stack
.type pyext_emulator_switch_stack, @function
pyext_emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyext_emulator_switch_stack, . - pyext_emulator_switch_stack
.popsection
)");
#endif

// A stack on which one function at a time runs. `resume` runs it until it yields or returns.
class Fiber {
 public:
  Fiber() {
    memory_ = ::mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    ::mprotect(memory_, GUARD_BYTES, PROT_NONE);  // an overflow faults instead of corrupting
  }
  ~Fiber() { ::munmap(memory_, STACK_BYTES); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Abandons what ran here before. `body` must not return and must outlive the run: it ends by
  // yielding for the last time. Stacks that start at different `skew`s (multiples of 16 below 4096)
  // do not compete for the same lines of the cache.
  void start(void (*body)(), std::size_t skew = 0) {
#if defined(__SANITIZE_ADDRESS__)
    // An abandoned run has left its frames' red zones behind.
    ASAN_UNPOISON_MEMORY_REGION(static_cast<char*>(memory_) + GUARD_BYTES,
                                STACK_BYTES - GUARD_BYTES);
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(static_cast<char*>(memory_) + STACK_BYTES - skew);
    *--top = nullptr;  // where a debugger's backtrace ends
    *--top = reinterpret_cast<void*>(body);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    inside_ = top;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = memory_;
    inside_.uc_stack.ss_size = STACK_BYTES - skew;
    inside_.uc_link = nullptr;
    makecontext(&inside_, body, 0);
#endif
  }

  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, static_cast<char*>(memory_) + GUARD_BYTES,
                                   STACK_BYTES - GUARD_BYTES);
#endif
    switch_to(outside_, inside_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // From inside the fiber: back to `resume`.
  void yield() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, outside_stack_, outside_stack_bytes_);
#endif
    switch_to(inside_, outside_);
#if defined(__SANITIZE_ADDRESS__)
    entered(fake_stack);
#endif
  }

  bool owns(std::uintptr_t address) const {
    return address - reinterpret_cast<std::uintptr_t>(memory_) < STACK_BYTES;
  }

  // To be called first thing by `body`.
  void entered(void* fake_stack = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &outside_stack_, &outside_stack_bytes_);
#else
    static_cast<void>(fake_stack);
#endif
  }

 private:
  static constexpr std::size_t GUARD_BYTES = 4096;

#if defined(__x86_64__)
  using Context = void*;
  static void switch_to(Context& from, Context& to) { pyext_emulator_switch_stack(&from, to); }
#else
  using Context = ucontext_t;
  static void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

  void* memory_;
  Context inside_{};
  Context outside_{};
#if defined(__SANITIZE_ADDRESS__)
  const void* outside_stack_ = nullptr;
  std::size_t outside_stack_bytes_ = 0;
#endif
};

}  // namespace emulator
