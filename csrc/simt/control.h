// What tests set and tell the SIMT harness.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace simt {

enum class Order { kForward, kReversed, kRandom };

// The order in which the ready threads of a block are run.
void set_order(Order order, unsigned seed);

// What launches may take. shared_bytes: a block's most, with the opt-in, on the architecture that is simulated. registers: of a thread, by
// kernel, as ptxas gave them; other kernels' are not checked. multiprocessors: of the device. No kernel has opted in after this.
void set_limits(size_t shared_bytes, std::map<std::string, int> registers, int multiprocessors);

// Device code may touch what is registered and nothing else. granule: bytes of an element. An input is not writable; an output is
// writable and, until it has been written, not to be read; a buffer that is added to is writable and initialised. The same buffer may
// be registered as an input and as an output.
void register_buffer(const std::string& name, uintptr_t base, size_t bytes, size_t granule, bool writable,
                     bool initialised);
void forget_buffers();

// Bytes that device code has read and written since the last call, by buffer.
std::map<std::string, std::pair<size_t, size_t>> traffic();

}  // namespace simt
