// The harness: fibers, barriers, warp operations, checked memory. This file is compiled without -fsanitize=thread.
#include "simt/simt.h"

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <random>

#include "simt/control.h"
#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/tensor_core.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // a block's, on sm_90
constexpr size_t kSharedGranule = 2;            // device code shares nothing smaller than a half
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
  Order order = Order::kForward;
  std::mt19937 random{0};

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

Harness h;

// Lives as long as the harness itself is at work on behalf of a thread.
class Guard {
 public:
  Guard() : before_(h.in_device_code) { h.in_device_code = false; }
  ~Guard() { h.in_device_code = before_; }

 private:
  bool before_;
};

std::string site_name(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name != nullptr ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string triple(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

// Leaves the fiber for good; the scheduler throws.
[[noreturn]] void fail(const std::string& what) {
  h.fault = h.kernel + ", block " + triple(h.block_index) + ", thread " + triple(h.thread().index) + ": " + what;
  Fiber::change(&h.thread().fiber, &h.scheduler);
  __builtin_unreachable();
}

[[noreturn]] void fail_from_scheduler(const std::string& what) {
  throw Fault(h.kernel + ", block " + triple(h.block_index) + ": " + what);
}

void wait(Status status) {
  h.thread().status = status;
  Fiber::change(&h.thread().fiber, &h.scheduler);
}

bool inside(const Region& region, uintptr_t address) { return address - region.base < region.bytes; }

Region* find(uintptr_t address) {
  if (h.dynamic_shared != nullptr && inside(*h.dynamic_shared, address)) return h.dynamic_shared.get();
  for (auto& s : h.static_shared)
    if (inside(s->region, address)) return &s->region;
  if (h.last_hit < h.buffers.size() && inside(h.buffers[h.last_hit], address)) return &h.buffers[h.last_hit];
  auto after = std::upper_bound(h.buffers.begin(), h.buffers.end(), address,
                                [](uintptr_t a, const Region& r) { return a < r.base; });
  if (after == h.buffers.begin() || !inside(*(after - 1), address)) return nullptr;
  h.last_hit = size_t(after - 1 - h.buffers.begin());
  return &h.buffers[h.last_hit];
}

// "x + 12, which has 8 bytes": the buffer that an address has just missed.
std::string nearest(uintptr_t address) {
  std::string text = "an address near no buffer";
  uintptr_t least = 1 << 20;
  auto consider = [&](const Region& r) {
    const uintptr_t distance = address < r.base             ? r.base - address
                               : address < r.base + r.bytes ? 0
                                                            : address - r.base - r.bytes + 1;
    if (distance >= least) return;
    least = distance;
    text = r.name +
           (address < r.base ? " - " + std::to_string(r.base - address) : " + " + std::to_string(address - r.base)) +
           ", which has " + std::to_string(r.bytes) + " bytes";
  };
  for (const Region& r : h.buffers) consider(r);
  if (h.dynamic_shared != nullptr) consider(*h.dynamic_shared);
  for (const auto& s : h.static_shared) consider(s->region);
  return text;
}

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic update";
}

void check_access(uintptr_t address, size_t count, Access access) {
  if (count == 0) return;
  Region* region = find(address);
  if (region == nullptr || address + count > region->base + region->bytes)
    fail(std::string("out-of-bounds ") + verb(access) + " of " + std::to_string(count) + " bytes at " +
         nearest(address));
  const char* fault = region->check(address, count, access, h.moment());
  if (fault != nullptr)
    fail(std::string(fault) + " (" + region->name + " + " + std::to_string(address - region->base) + ")");
}

void check_natural_alignment(uintptr_t address, size_t count, Access access) {
  if (address % count != 0)
    fail(std::string("misaligned ") + verb(access) + " of " + std::to_string(count) + " bytes at " + nearest(address));
}

// ---------------------------------------------------------------- warp operations

Thread& lane_of(int warp, int lane) { return h.threads[warp * kWarp + lane]; }

std::string waiting_for(int warp) {
  std::string text;
  for (int lane = 0; lane < kWarp && warp * kWarp + lane < int(h.threads.size()); ++lane) {
    const Thread& t = lane_of(warp, lane);
    const std::string place = t.status == Status::kDone        ? "returned"
                              : t.status == Status::kAtBarrier ? "__syncthreads at " + site_name(t.site)
                                                               : "warp operation at " + site_name(t.site);
    if (text.find(place) == std::string::npos)
      text += (text.empty() ? "" : ", ") + ("lane " + std::to_string(lane) + ": " + place);
  }
  return text;
}

void load_matrix(int warp, bool transposed) {
  // Lanes 8 i to 8 i + 7 bring the addresses of the rows of matrix i.
  uint16_t rows[4][8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    h.current = warp * kWarp + lane;
    const Thread& t = h.thread();
    const uintptr_t address = reinterpret_cast<uintptr_t>(t.a);
    std::string fault;
    Region* region = find(address);
    if (address % 16 != 0) {
      fault = "misaligned row of ldmatrix at " + nearest(address);
    } else if (region == nullptr || address + 16 > region->base + region->bytes) {
      fault = "out-of-bounds row of ldmatrix at " + nearest(address);
    } else if (!region->shared) {
      fault = "ldmatrix from memory that is not shared: " + region->name;
    } else if (const char* what = region->check(address, 16, Access::kRead, h.moment())) {
      fault = std::string(what) + " (" + region->name + " + " + std::to_string(address - region->base) + ")";
    }
    if (!fault.empty()) fail_from_scheduler("thread " + triple(t.index) + ": " + fault + ", " + site_name(t.site));
    std::memcpy(rows[lane / 8][lane % 8], t.a, 16);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    load_matrix_fragment(rows, lane, transposed, static_cast<uint32_t*>(lane_of(warp, lane).c));
}

void multiply(int warp, bool bf16) {
  const uint32_t *a[kWarp], *b[kWarp];
  float* c[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread& t = lane_of(warp, lane);
    a[lane] = static_cast<const uint32_t*>(t.a), b[lane] = static_cast<const uint32_t*>(t.b);
    c[lane] = static_cast<float*>(t.c);
  }
  mma_m16n8k16(a, b, c, bf16);
}

// Completes the operation for which a lane waits, if all lanes of its mask do; false if not.
bool complete(int warp, int lane) {
  const Thread first = lane_of(warp, lane);
  const int lanes = std::min(kWarp, int(h.threads.size()) - warp * kWarp);
  if ((first.mask >> lane & 1) == 0)
    fail_from_scheduler("lane " + std::to_string(lane) + " is not in its own mask, " + site_name(first.site));
  for (int i = 0; i < kWarp; ++i) {
    if ((first.mask >> i & 1) == 0) continue;
    if (i >= lanes)
      fail_from_scheduler("mask names lane " + std::to_string(i) + ", and the warp has " + std::to_string(lanes) +
                          ", " + site_name(first.site));
    const Thread& t = lane_of(warp, i);
    const bool same = t.status == Status::kAtWarpOp && t.op == first.op && t.mask == first.mask &&
                      t.site.line == first.site.line && std::strcmp(t.site.file, first.site.file) == 0;
    if (!same) return false;
  }
  switch (first.op) {
    case WarpOp::kSync:
      ++h.warp_epochs[warp];
      break;
    case WarpOp::kBallot: {
      uint64_t votes = 0;
      for (int i = 0; i < lanes; ++i)
        if ((first.mask >> i & 1) != 0) votes |= lane_of(warp, i).value << i;
      for (int i = 0; i < lanes; ++i) lane_of(warp, i).result = votes;
      break;
    }
    case WarpOp::kShuffle:
      for (int i = 0; i < lanes; ++i) {
        if ((first.mask >> i & 1) == 0) continue;
        const int source = lane_of(warp, i).source & (kWarp - 1);
        if ((first.mask >> source & 1) == 0)
          fail_from_scheduler("lane " + std::to_string(i) + " shuffles from lane " + std::to_string(source) +
                              ", which is not in the mask, " + site_name(first.site));
        lane_of(warp, i).result = lane_of(warp, source).value;
      }
      break;
    case WarpOp::kLoadMatrix:
    case WarpOp::kLoadMatrixTransposed:
      load_matrix(warp, first.op == WarpOp::kLoadMatrixTransposed);
      break;
    case WarpOp::kMmaF16:
    case WarpOp::kMmaBf16:
      multiply(warp, first.op == WarpOp::kMmaBf16);
      break;
  }
  for (int i = 0; i < lanes; ++i)
    if ((first.mask >> i & 1) != 0) lane_of(warp, i).status = Status::kReady;
  return true;
}

// ---------------------------------------------------------------- scheduler

void fiber_entry() {
  h.in_device_code = true;
  h.entry(h.closure);
  h.in_device_code = false;
  wait(Status::kDone);
  __builtin_unreachable();
}

bool complete_warp_ops() {
  bool progress = false;
  for (size_t i = 0; i < h.threads.size(); ++i)
    if (h.threads[i].status == Status::kAtWarpOp) progress |= complete(int(i) / kWarp, int(i) % kWarp);
  return progress;
}

// Opens the barrier if all threads wait at the same one; false if some do not wait.
bool complete_barrier() {
  const Thread* first = nullptr;
  for (const Thread& t : h.threads) {
    if (t.status == Status::kAtWarpOp || t.status == Status::kReady) return false;
    if (t.status == Status::kAtBarrier && first == nullptr) first = &t;
  }
  if (first == nullptr) return false;
  for (const Thread& t : h.threads) {
    if (t.status == Status::kDone)
      fail_from_scheduler("divergent barrier: thread " + triple(first->index) + " waits at " + site_name(first->site) +
                          ", and thread " + triple(t.index) + " has returned");
    if (t.site.line != first->site.line || std::strcmp(t.site.file, first->site.file) != 0)
      fail_from_scheduler("divergent barrier: thread " + triple(first->index) + " waits at " + site_name(first->site) +
                          ", and thread " + triple(t.index) + " at " + site_name(t.site));
  }
  for (Thread& t : h.threads) t.status = Status::kReady;
  ++h.now.epoch;
  return true;
}

void run_block() {
  std::vector<int> order(h.threads.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = int(h.order == Order::kReversed ? order.size() - 1 - i : i);
    Thread& t = h.threads[i];
    t.status = Status::kReady;
    t.copies.clear();
    t.groups.clear();
    t.fiber.start(fiber_entry, h.stack(int(i)), kStackBytes);
  }
  if (h.dynamic_shared != nullptr) h.dynamic_shared->forget();
  h.static_shared.clear();
  h.arena_used = h.dynamic_shared != nullptr ? h.dynamic_shared->bytes + 256 : 0;
  std::memset(h.arena_base, 0xff, kMaxSharedBytes);  // NaN
  while (true) {
    bool progress = false;
    if (h.order == Order::kRandom) std::shuffle(order.begin(), order.end(), h.random);
    for (int i : order) {
      if (h.threads[i].status != Status::kReady) continue;
      progress = true;
      h.current = i;
      Fiber::change(&h.scheduler, &h.thread().fiber);
      if (!h.fault.empty()) throw Fault(h.fault);
    }
    progress |= complete_warp_ops();
    progress |= complete_barrier();
    if (progress) continue;
    for (size_t i = 0; i < h.threads.size(); ++i)
      if (h.threads[i].status != Status::kDone)
        fail_from_scheduler("divergent warp operation: " + waiting_for(int(i) / kWarp));
    return;
  }
}

}  // namespace

// ---------------------------------------------------------------- what device code calls

dim3 thread_index() { return h.thread().index; }
dim3 block_index() { return h.block_index; }
dim3 block_dim() { return h.block; }
dim3 grid_dim() { return h.grid; }
int lane() { return h.current % kWarp; }

void sync_threads(Site site) {
  Guard guard;
  h.thread().site = site;
  wait(Status::kAtBarrier);
}

uint64_t warp_op(Site site, WarpOp op, uint32_t mask, uint64_t value, int source) {
  Guard guard;
  Thread& t = h.thread();
  t.site = site, t.op = op, t.mask = mask, t.value = value, t.source = source;
  wait(Status::kAtWarpOp);
  return t.result;
}

void warp_matrix_op(Site site, WarpOp op, const void* a, const void* b, void* c) {
  Guard guard;
  Thread& t = h.thread();
  t.a = a, t.b = b, t.c = c;
  warp_op(site, op, 0xffffffffu, 0, 0);
}

void* dynamic_shared() {
  Guard guard;
  if (h.dynamic_shared == nullptr) fail("no dynamic shared memory was asked for");
  return h.arena_base;
}

void* static_shared(Site site, size_t bytes) {
  Guard guard;
  for (const auto& s : h.static_shared)
    if (s->line == site.line && std::strcmp(s->file, site.file) == 0) return reinterpret_cast<void*>(s->region.base);
  const size_t first = h.arena_used;
  h.arena_used += (bytes + 511) / 256 * 256;  // apart, so that a step past the end meets nothing
  if (h.arena_used > kMaxSharedBytes) fail("more shared memory than a block can have");
  const uintptr_t base = reinterpret_cast<uintptr_t>(h.arena_base) + first;
  h.static_shared.push_back(std::unique_ptr<StaticShared>(
      new StaticShared{site.file, site.line,
                       Region("shared array at " + site_name(site), base, bytes, kSharedGranule, true, false, true)}));
  return reinterpret_cast<void*>(base);
}

void check_aligned(const void* address, size_t bytes) {
  if (!h.in_device_code) return;
  Guard guard;
  check_natural_alignment(reinterpret_cast<uintptr_t>(address), bytes, Access::kRead);
}

void copy_async(void* shared, const void* global, int bytes) {
  Guard guard;
  const uintptr_t to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  check_natural_alignment(to, 16, Access::kWrite);
  check_natural_alignment(from, 16, Access::kRead);
  if (bytes < 0 || bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
  check_access(from, size_t(bytes), Access::kRead);
  check_access(to, 16, Access::kWrite);
  Region* region = find(to);
  if (!region->shared) fail("cp.async to memory that is not shared: " + region->name);
  region->set_pending(to, 16, true);
  h.thread().copies.push_back({shared, global, bytes});
}

void commit_copies() {
  Guard guard;
  h.thread().groups.push_back(std::move(h.thread().copies));
  h.thread().copies.clear();
}

void wait_copies(int groups_left) {
  Guard guard;
  auto& groups = h.thread().groups;
  while (int(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      const uintptr_t to = reinterpret_cast<uintptr_t>(copy.shared);
      find(to)->set_pending(to, 16, false);
      check_access(to, 16, Access::kWrite);
      std::memset(copy.shared, 0, 16);
      std::memcpy(copy.shared, copy.global, size_t(copy.bytes));
    }
    groups.pop_front();
  }
}

float atomic_add(float* address, float value) {
  Guard guard;
  check_natural_alignment(reinterpret_cast<uintptr_t>(address), 4, Access::kAtomic);
  check_access(reinterpret_cast<uintptr_t>(address), 4, Access::kAtomic);
  const float before = *address;
  *address += value;
  return before;
}

int atomic_add(int* address, int value) {
  Guard guard;
  check_natural_alignment(reinterpret_cast<uintptr_t>(address), 4, Access::kAtomic);
  check_access(reinterpret_cast<uintptr_t>(address), 4, Access::kAtomic);
  const int before = *address;
  *address += value;
  return before;
}

void launch(const char* name, void (*entry)(const void*), const void* closure, size_t closure_bytes, dim3 grid,
            dim3 block, size_t shared_bytes) {
  const size_t count = size_t(block.x) * block.y * block.z;
  h.kernel = name;
  if (count == 0 || count > 1024 || size_t(grid.x) * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    throw Fault(h.kernel + ": grid " + triple(grid) + " of blocks " + triple(block) + " cannot be launched");
  if (shared_bytes > kMaxSharedBytes)
    throw Fault(h.kernel + ": asked for " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (h.num_stacks < count) {
    h.stacks.reset(new char[count * kStackBytes]);
    h.num_stacks = count;
  }
  if (h.arena == nullptr) {
    h.arena.reset(new char[kMaxSharedBytes + 1024]);
    h.arena_base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(h.arena.get()) + 1023) / 1024 * 1024);
  }
  h.fault.clear();
  h.entry = entry, h.closure = static_cast<const char*>(closure), h.closure_bytes = closure_bytes;
  h.grid = grid, h.block = block;
  h.threads.assign(count, Thread{});
  for (size_t i = 0; i < count; ++i)
    h.threads[i].index = dim3(unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y));
  h.dynamic_shared.reset();
  if (shared_bytes > 0)
    h.dynamic_shared.reset(new Region("dynamic shared memory", reinterpret_cast<uintptr_t>(h.arena_base), shared_bytes,
                                      kSharedGranule, true, false, true));
  ++h.now.launch;
  h.warp_epochs.assign((count + kWarp - 1) / kWarp, 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        h.block_index = dim3(x, y, z);
        h.now.block = (z * grid.y + y) * grid.x + x;
        h.now.epoch = 0;
        run_block();
      }
}

// ---------------------------------------------------------------- what tests call

void set_order(Order order, unsigned seed) {
  h.order = order;
  h.random.seed(seed);
}

void register_buffer(const std::string& name, uintptr_t base, size_t bytes, size_t granule, bool writable,
                     bool initialised) {
  if (bytes == 0) return;
  for (Region& r : h.buffers) {
    if (base + bytes <= r.base || r.base + r.bytes <= base) continue;
    if (r.base != base || r.bytes != bytes)
      throw std::invalid_argument(name + ": overlaps " + r.name + ", which is another buffer");
    r = Region(r.name, base, bytes, std::min(granule, r.granule), writable || r.writable, initialised || !r.writable,
               false);
    return;
  }
  Region region(name, base, bytes, granule, writable, initialised, false);
  h.buffers.insert(std::upper_bound(h.buffers.begin(), h.buffers.end(), base,
                                    [](uintptr_t a, const Region& r) { return a < r.base; }),
                   std::move(region));
}

void forget_buffers() {
  h.buffers.clear();
  h.last_hit = 0;
}

// ---------------------------------------------------------------- what the compiler's checks call

static void observe(const void* where, size_t count, Access access, bool aligned) {
  if (!h.in_device_code) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(where);
  if (address - reinterpret_cast<uintptr_t>(h.stack(h.current)) < kStackBytes) return;
  if (address - reinterpret_cast<uintptr_t>(h.closure) < h.closure_bytes && access == Access::kRead) return;
  Guard guard;
  if (aligned) check_natural_alignment(address, count, access);
  check_access(address, count, access);
}

}  // namespace simt

extern "C" {
#define SIMT_CALLBACKS(count)                                                                           \
  void __tsan_read##count(void* p) { simt::observe(p, count, simt::Access::kRead, true); }              \
  void __tsan_write##count(void* p) { simt::observe(p, count, simt::Access::kWrite, true); }            \
  void __tsan_unaligned_read##count(void* p) { simt::observe(p, count, simt::Access::kRead, false); }   \
  void __tsan_unaligned_write##count(void* p) { simt::observe(p, count, simt::Access::kWrite, false); } \
  void __tsan_volatile_read##count(void* p) { simt::observe(p, count, simt::Access::kRead, true); }     \
  void __tsan_volatile_write##count(void* p) { simt::observe(p, count, simt::Access::kWrite, true); }
SIMT_CALLBACKS(1)
SIMT_CALLBACKS(2)
SIMT_CALLBACKS(4)
SIMT_CALLBACKS(8)
SIMT_CALLBACKS(16)
void __tsan_read_range(void* p, size_t count) { simt::observe(p, count, simt::Access::kRead, false); }
void __tsan_write_range(void* p, size_t count) { simt::observe(p, count, simt::Access::kWrite, false); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
