// The harness: fibers, barriers, warp operations. Compiled without -fsanitize=thread.
#include "simt/simt.h"

#include <algorithm>
#include <cstring>

#include "simt/harness.h"
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

Harness h;

std::string site_name(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name != nullptr ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string triple(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

[[noreturn]] void fail(const std::string& what) {
  h.fault = h.kernel + ", block " + triple(h.block_index) + ", thread " + triple(h.thread().index) + ": " + what;
  Fiber::change(&h.thread().fiber, &h.scheduler);
  __builtin_unreachable();
}

namespace {

[[noreturn]] void fail_from_scheduler(const std::string& what) {
  throw Fault(h.kernel + ", block " + triple(h.block_index) + ": " + what);
}

void wait(Status status) {
  h.thread().status = status;
  Fiber::change(&h.thread().fiber, &h.scheduler);
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
  h.shared_used = h.dynamic_shared != nullptr ? h.dynamic_shared->bytes : 0;
  h.arena_used = h.shared_used > 0 ? h.shared_used + 256 : 0;
  std::memset(h.arena_base, 0xff, kArenaBytes);  // NaN
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

std::string shared_fault() {
  if (h.shared_used <= h.shared_limit) return "";
  return std::to_string(h.shared_used) + " bytes of static and dynamic shared memory, and a block may have " +
         std::to_string(h.shared_limit) +
         (h.shared_limit == kDefaultSharedBytes ? " where its kernel has not opted in to more" : "");
}

void allow_dynamic_shared(const void* kernel) { h.opted_in.insert(kernel); }

void set_limits(size_t shared_bytes, std::map<std::string, int> registers, int multiprocessors) {
  if (shared_bytes > kMaxSharedBytes)
    throw std::invalid_argument("shared_bytes: expected at most " + std::to_string(kMaxSharedBytes) + ", got " +
                                std::to_string(shared_bytes));
  h.most_shared_bytes = shared_bytes;
  h.registers = std::move(registers);
  h.multiprocessors = multiprocessors;
  h.opted_in.clear();
}

// Registers of a block; 0 if the kernel's are not known.
static int block_registers(const char* name, size_t threads) {
  const auto known = h.registers.find(name);
  if (known == h.registers.end()) return 0;
  const int per_warp = (known->second * kWarp + kRegisterUnit - 1) / kRegisterUnit * kRegisterUnit;
  return int(threads + kWarp - 1) / kWarp * per_warp;
}

int64_t blocks_at_once(const char* name, int threads, size_t shared_bytes) {
  const int registers = block_registers(name, size_t(threads));
  int blocks = kMostThreads / threads;
  if (registers > 0) blocks = std::min(blocks, kRegisterFile / registers);
  // A block takes 1 KiB for the system besides, and a multiprocessor has as much more than a block can have.
  blocks = std::min(blocks, int((h.most_shared_bytes + 1024) / (shared_bytes + 1024)));
  return int64_t(blocks) * h.multiprocessors;
}

void launch(const char* name, const void* kernel, void (*entry)(const void*), const void* closure, size_t closure_bytes,
            dim3 grid, dim3 block, size_t shared_bytes) {
  const size_t count = size_t(block.x) * block.y * block.z;
  h.kernel = name;
  if (count == 0 || count > 1024 || size_t(grid.x) * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    throw Fault(h.kernel + ": grid " + triple(grid) + " of blocks " + triple(block) + " cannot be launched");
  h.shared_limit = h.opted_in.count(kernel) != 0 ? h.most_shared_bytes : kDefaultSharedBytes;
  h.shared_used = shared_bytes;
  if (h.shared_used > h.shared_limit) throw Fault(h.kernel + ": " + shared_fault());
  if (block_registers(name, count) > kRegisterFile)
    throw Fault(h.kernel + ": blocks " + triple(block) + " of threads with " + std::to_string(h.registers[name]) +
                " registers, and a multiprocessor has " + std::to_string(kRegisterFile));
  if (h.num_stacks < count) {
    h.stacks.reset(new char[count * kStackBytes]);
    h.num_stacks = count;
  }
  if (h.arena == nullptr) {
    h.arena.reset(new char[kArenaBytes + 1024]);
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

void set_order(Order order, unsigned seed) {
  h.order = order;
  h.random.seed(seed);
}

}  // namespace simt
