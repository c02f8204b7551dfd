// The state of the SIMT harness, which its two files share: simt.cpp runs fibers, checks.cpp watches memory.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "simt/control.h"
#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/simt.h"

namespace simt {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;               // a block's on sm_90, the most of all architectures
constexpr size_t kArenaBytes = kMaxSharedBytes + 32 * 1024;  // shared arrays lie apart in it
constexpr size_t kDefaultSharedBytes = 48 * 1024;            // without the opt-in
constexpr int kMostThreads = 2048;                           // of a multiprocessor, on sm_80 and sm_90
constexpr int kRegisterFile = 64 * 1024;                     // of a multiprocessor, from sm_80 on
constexpr int kRegisterUnit = 256;                           // a warp's registers are given out in this unit
constexpr size_t kSharedGranule = 2;                         // device code shares nothing smaller than a half
constexpr int kWarp = 32;

enum class Status { kReady, kAtBarrier, kAtWarpOp, kDone };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

struct Thread {
  Fiber fiber;
  Status status = Status::kReady;
  dim3 index;
  Site site{"", 0};
  // Of a warp operation.
  WarpOp op = WarpOp::kSync;
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  int source = 0;
  const void *a = nullptr, *b = nullptr;
  void* c = nullptr;
  // Asynchronous copies: those not committed, and groups that are.
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};

struct StaticShared {
  const char* file;
  int line;
  Region region;
};

struct Harness {
  std::vector<Region> buffers;  // by base
  size_t last_hit = 0;
  std::map<std::string, std::pair<size_t, size_t>> traffic;  // of buffers that are forgotten: bytes read, bytes written
  Order order = Order::kForward;
  std::mt19937 random{0};

  size_t most_shared_bytes = 99 * 1024;  // with the opt-in: the least of all architectures, sm_86's
  std::map<std::string, int> registers;  // of a thread, by kernel
  int multiprocessors = 132;
  std::set<const void*> opted_in;  // kernels
  size_t shared_limit = 0;         // of the launch

  bool in_device_code = false;  // else the compiler's checks in functions shared with device code mean nothing
  std::string kernel, fault;
  dim3 grid, block, block_index;
  void (*entry)(const void*) = nullptr;
  const char* closure = nullptr;
  size_t closure_bytes = 0;
  std::vector<Thread> threads;
  std::unique_ptr<char[]> stacks;
  size_t num_stacks = 0;
  Fiber scheduler;
  int current = 0;
  Moment now;
  std::vector<uint32_t> warp_epochs;
  std::unique_ptr<char[]> arena;
  char* arena_base = nullptr;
  size_t arena_used = 0;
  size_t shared_used = 0;  // static and dynamic, as a device counts them
  std::unique_ptr<Region> dynamic_shared;
  std::vector<std::unique_ptr<StaticShared>> static_shared;

  Thread& thread() { return threads[current]; }
  char* stack(int thread) { return stacks.get() + thread * kStackBytes; }
  Moment moment() {
    now.thread = uint32_t(current);
    now.warp_epoch = warp_epochs[current / kWarp];
    return now;
  }
};

extern Harness h;

// Lives as long as the harness itself is at work on behalf of a thread.
class Guard {
 public:
  Guard() : before_(h.in_device_code) { h.in_device_code = false; }
  ~Guard() { h.in_device_code = before_; }

 private:
  bool before_;
};

std::string site_name(const Site& site);
std::string triple(const dim3& d);

// Leaves the running fiber for good; the scheduler throws.
[[noreturn]] void fail(const std::string& what);

// The piece of memory that holds an address, or null; and for messages, the one that it is in or has just missed: "x + 12, which has 8 bytes".
Region* find(uintptr_t address);
std::string nearest(uintptr_t address);

// What is wrong with the shared memory that the block has taken; empty if nothing.
std::string shared_fault();

// End the launch if the running thread may not do this now.
void check_access(uintptr_t address, size_t count, Access access);
void check_natural_alignment(uintptr_t address, size_t count, Access access);

}  // namespace simt
