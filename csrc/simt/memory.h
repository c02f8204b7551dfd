// What the harness knows of each piece of memory that device code may touch: where it ends, which bytes have been written, and who
// touched them last.
//
// A shadow cell per granule (the smallest element) records the last write and the readers since. Two accesses of different threads,
// one of them a write, are ordered if a launch, a __syncthreads(), or, within a warp, a __syncwarp() lies between them; else they are
// a race, whichever came first here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// Who touches memory, and when.
struct Moment {
  uint32_t launch = 0, block = 0, thread = 0, epoch = 0, warp_epoch = 0;
};

enum class Access { kRead, kWrite, kAtomic };

struct Cell {
  Moment written, read;
  uint8_t readers = 0;  // since the last write: 0, 1, 2: several threads of a warp, 3: several warps, 4: several blocks
  bool initialised = false, atomic = false;
  bool pending = false;  // an asynchronous copy is on its way here
};

class Region {
 public:
  Region(std::string name, uintptr_t base, size_t bytes, size_t granule, bool writable, bool initialised, bool shared)
      : name(std::move(name)),
        base(base),
        bytes(bytes),
        granule(granule),
        writable(writable),
        shared(shared),
        cells_(writable ? (bytes + granule - 1) / granule : 0) {
    for (Cell& cell : cells_) cell.initialised = initialised;
  }

  // A block begins: its shared memory holds nothing.
  void forget() {
    for (Cell& cell : cells_) cell = Cell{};
  }

  // Null, or what is wrong with this access, which lies within the region.
  const char* check(uintptr_t address, size_t count, Access access, const Moment& now) {
    (access == Access::kRead ? bytes_read : bytes_written) += count;
    if (!writable) return access == Access::kRead ? nullptr : "write to a buffer that is an input";
    const size_t first = (address - base) / granule, last = (address - base + count - 1) / granule;
    for (size_t i = first; i <= last; ++i) {
      const char* fault = access == Access::kRead ? read(&cells_[i], now) : write(&cells_[i], now, access);
      if (fault != nullptr) return fault;
    }
    return nullptr;
  }

  void set_pending(uintptr_t address, size_t count, bool pending) {
    for (size_t i = (address - base) / granule; i <= (address - base + count - 1) / granule; ++i)
      cells_[i].pending = pending;
  }

  std::string name;
  uintptr_t base;
  size_t bytes, granule;
  size_t bytes_read = 0, bytes_written = 0;
  bool writable, shared;

 private:
  static bool ordered(const Moment& before, const Moment& now) {
    if (before.launch != now.launch) return true;
    if (before.block != now.block) return false;
    if (before.thread == now.thread || before.epoch != now.epoch) return true;
    return before.thread / 32 == now.thread / 32 && before.warp_epoch != now.warp_epoch;
  }

  const char* read(Cell* cell, const Moment& now) {
    if (cell->pending) return "read of memory into which an asynchronous copy is on its way";
    if (!cell->initialised) return shared ? "read of unwritten shared memory" : "read of unwritten memory";
    if (!ordered(cell->written, now)) return "race: read of what another thread writes";
    const Moment& before = cell->read;
    uint8_t readers = 1;
    if (cell->readers > 0 && before.launch == now.launch && (before.block != now.block || before.epoch == now.epoch)) {
      if (before.block != now.block) {
        readers = 4;
      } else if (before.thread / 32 != now.thread / 32) {
        readers = 3;
      } else if (before.thread != now.thread && before.warp_epoch == now.warp_epoch) {
        readers = 2;
      }
      // Within a warp's epoch the sets only grow; a new warp epoch of the same warp starts a smaller one.
      const bool kept = cell->readers >= 3 || before.warp_epoch == now.warp_epoch;
      if (kept && cell->readers > readers) readers = cell->readers;
    }
    cell->read = now;
    cell->readers = readers;
    return nullptr;
  }

  const char* write(Cell* cell, const Moment& now, Access access) {
    const bool atomic = access == Access::kAtomic;
    if (cell->pending) return "write to memory into which an asynchronous copy is on its way";
    if (atomic && !cell->initialised) return "atomic update of unwritten memory";
    if (cell->initialised && !(atomic && cell->atomic) && !ordered(cell->written, now))
      return "race: write to what another thread writes";
    if (cell->readers > 0 && cell->read.launch == now.launch) {
      const Moment& before = cell->read;
      const bool same_epoch = before.block == now.block && before.epoch == now.epoch;
      const bool race =
          cell->readers == 4 || before.block != now.block ||
          (same_epoch && (cell->readers == 3 || before.thread / 32 != now.thread / 32)) ||
          (same_epoch && before.warp_epoch == now.warp_epoch && (cell->readers == 2 || before.thread != now.thread));
      if (race) return "race: write to what another thread reads";
    }
    cell->written = now;
    cell->initialised = true;
    cell->atomic = atomic;
    cell->readers = 0;
    return nullptr;
  }

  std::vector<Cell> cells_;
};

}  // namespace simt
