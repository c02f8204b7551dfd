// The harness: memory. What device code, and the compiler's checks in it, call at each access. Compiled without -fsanitize=thread.
#include <algorithm>
#include <cstring>
#include <utility>

#include "simt/harness.h"

namespace simt {

static bool inside(const Region& region, uintptr_t address) { return address - region.base < region.bytes; }

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

static const char* verb(Access access) {
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

// ---------------------------------------------------------------- what device code calls

void* dynamic_shared() {
  Guard guard;
  if (h.dynamic_shared == nullptr) fail("no dynamic shared memory was asked for");
  return h.arena_base;
}

void* static_shared(Site site, size_t bytes) {
  Guard guard;
  for (const auto& s : h.static_shared)
    if (s->line == site.line && std::strcmp(s->file, site.file) == 0) return reinterpret_cast<void*>(s->region.base);
  h.shared_used += bytes;
  if (const std::string fault = shared_fault(); !fault.empty()) fail(fault);
  const size_t first = h.arena_used;
  h.arena_used += (bytes + 511) / 256 * 256;  // apart, so that a step past the end meets nothing
  if (h.arena_used > kArenaBytes) fail("more shared arrays than the harness has room for");
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

// ---------------------------------------------------------------- what tests call

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
  for (const Region& r : h.buffers) {
    h.traffic[r.name].first += r.bytes_read;
    h.traffic[r.name].second += r.bytes_written;
  }
  h.buffers.clear();
  h.last_hit = 0;
}

std::map<std::string, std::pair<size_t, size_t>> traffic() {
  forget_buffers();
  return std::exchange(h.traffic, {});
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
