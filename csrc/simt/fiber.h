// A fiber: a stack and the place where its function goes on. The threads of a block are fibers of one thread of the host, so that they
// run in an order that the harness chooses and stop exactly at barriers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__)

// Saves the callee-saved registers on this stack, leaves its top at *save, and goes on with the stack whose top is `load`.
// (swapcontext would do, but asks the kernel for the signal mask twice per switch.)
extern "C" void simt_switch(void** save, void* load);

class Fiber {
 public:
  void start(void (*entry)(), char* stack, size_t bytes) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--top = nullptr;                              // entry never returns; and its frame is aligned as after a call
    *--top = reinterpret_cast<void*>(entry);       // where simt_switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp, rbx, r12 to r15
    top_ = top;
  }
  static void change(Fiber* from, Fiber* to) { simt_switch(&from->top_, to->top_); }

 private:
  void* top_ = nullptr;
};

#else

class Fiber {
 public:
  void start(void (*entry)(), char* stack, size_t bytes) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Fiber* from, Fiber* to) { swapcontext(&from->context_, &to->context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace simt
