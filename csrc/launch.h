// A launch as data: the parameters of a kernel, filled in by name, kept, and run as often as wanted. Both Python modules are made of this.
//
// An op says with overloads, found by the type of its parameters (launch_fields.h, cuda/launch_fields.h):
//   fields(v, p)   the name that Python knows each field by, and what follows from them; absent pointers are null, absent flags false;
//                  std::invalid_argument for what cannot be
//   scratch(s, p)  buffers that the caller need not give; optional
//   run(p, stream) the kernel; the CPU's have no stream
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace rnndyn {

namespace py = pybind11;
using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A pointer in the parameters that differs from run to run: bases[base] + offset, at so many bytes from their beginning.
struct Patch {
  std::ptrdiff_t place;
  size_t base;
  int64_t offset;
};

// Fills in fields from a dict of Python's. An address is a number, or (base, offset) where it differs from run to run.
class FieldReader {
 public:
  FieldReader(const py::dict& values, void* parameters) : values_(values), start_(static_cast<char*>(parameters)) {}

  // The value of a name; null where there is none, or None.
  py::handle value(const char* name) {
    PyObject* found = PyDict_GetItemString(values_.ptr(), name);
    if (found == nullptr) return {};
    ++taken_;
    return found == Py_None ? nullptr : found;
  }

  template <typename T>
  void operator()(const char* name, T& field) {
    const py::handle given = value(name);
    if constexpr (std::is_pointer_v<T>) {
      address(given, field);
    } else if (given) {
      number(given, name, field);
    } else if constexpr (!std::is_same_v<T, bool>) {
      throw std::invalid_argument(std::string(name) + ": missing");
    }
  }

  // A list of addresses: `count` of them.
  template <typename T, size_t N>
  void list(const char* name, T* (&fields)[N], int& count) {
    count = static_cast<int>(each(name, N, [&](size_t k, py::handle item) { address(item, fields[k]); }));
  }
  template <typename T, size_t N>
  void list(const char* name, T* (&fields)[N]) {
    int count = 0;
    list(name, fields, count);
  }

  // As many numbers as there are fields; whether they are there.
  template <typename... T>
  bool numbers(const char* name, T&... fields) {
    const py::handle given = value(name);
    if (!given) return false;
    const py::sequence items = py::reinterpret_borrow<py::sequence>(given);
    if (items.size() != sizeof...(T))
      throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(sizeof...(T)) + " numbers, got " +
                                  std::to_string(items.size()));
    size_t k = 0;
    (number(items[k++], name, fields), ...);
    return true;
  }

  // Calls f(k, item) for a list of at most so many items; their number.
  template <typename F>
  size_t each(const char* name, size_t most, F f) {
    const py::handle given = value(name);
    if (!given) return 0;
    const py::sequence items = py::reinterpret_borrow<py::sequence>(given);
    const size_t count = items.size();
    if (count > most)
      throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(most) + ", got " +
                                  std::to_string(count));
    for (size_t k = 0; k < count; ++k) f(k, py::object(items[k]));
    return count;
  }

  template <typename T>
  void address(py::handle given, T*& field) {
    field = nullptr;
    if (!given || given.is_none()) return;
    if (!PyTuple_Check(given.ptr())) {
      field = pointer<T>(given.cast<Address>());
      return;
    }
    const auto [base, offset] = given.cast<std::pair<size_t, int64_t>>();
    field = reinterpret_cast<T*>(start_);  // (present, until it is put in)
    patches.push_back({reinterpret_cast<char*>(&field) - start_, base, offset});
  }

  template <typename T>
  void number(py::handle given, const char* name, T& field) {
    if constexpr (std::is_same_v<T, bool>) {
      field = given.cast<bool>();
    } else if constexpr (std::is_floating_point_v<T>) {
      field = static_cast<T>(given.cast<double>());
    } else {
      const auto read = given.cast<int64_t>();
      if constexpr (!std::is_enum_v<T>)
        if (read < static_cast<int64_t>(std::numeric_limits<T>::lowest()) ||
            (sizeof(T) < 8 && read > static_cast<int64_t>(std::numeric_limits<T>::max())))
          throw std::invalid_argument(std::string(name) + ": out of range: " + std::to_string(read));
      field = static_cast<T>(read);
    }
  }

  // Throws where a name belongs to no field.
  void finish(const char* op) const {
    if (taken_ != values_.size())
      throw std::invalid_argument(std::string(op) + ": names that are no fields, among " +
                                  std::string(py::str(values_.attr("keys")())));
  }

  std::vector<Patch> patches;

 private:
  py::dict values_;
  char* start_;
  size_t taken_ = 0;
};

struct ScratchPart {
  int64_t first_byte, elements, element_size;
};

// Cuts buffers out of scratch, or only counts their bytes, where there is no memory yet. A buffer that is there already is left alone.
class ScratchCutter {
 public:
  explicit ScratchCutter(char* memory = nullptr, char* room = nullptr) : memory_(memory), room_(room) {}

  template <typename T>
  void operator()(T*& field, int64_t elements) {
    if (field != nullptr) return;
    field = cut<T>(memory_, bytes, elements);
    if (memory_ == nullptr) parts.push_back({bytes - elements * int64_t(sizeof(T)), elements, int64_t(sizeof(T))});
  }
  // Out of memory of a second kind, which may be that of packed weights.
  template <typename T>
  void room(T*& field, int64_t elements) {
    if (field == nullptr) field = cut<T>(room_, room_bytes, elements);
  }

  int64_t bytes = 0, room_bytes = 0;
  std::vector<ScratchPart> parts;  // of the first kind, where it is only counted

 private:
  template <typename T>
  static T* cut(char* memory, int64_t& used, int64_t elements) {
    const int64_t first = (used + 63) / 64 * 64;
    used = first + elements * int64_t(sizeof(T));
    return memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + first);
  }
  char *memory_, *room_;
};

template <typename P>
void scratch(ScratchCutter&, P&) {}

class Launch {
 public:
  virtual ~Launch() = default;
  virtual void operator()(const Address* bases, char* memory, char* room, void* stream) const = 0;
  int64_t scratch_bytes = 0, room_bytes = 0;
  std::vector<ScratchPart> scratch_parts;
};

template <typename P>
class LaunchOf final : public Launch {
 public:
  LaunchOf(const char* op, const py::dict& values) {
    FieldReader reader(values, &params_);
    fields(reader, params_);
    reader.finish(op);
    patches_ = std::move(reader.patches);
    P counted = params_;
    ScratchCutter count;
    scratch(count, counted);
    scratch_bytes = count.bytes, room_bytes = count.room_bytes, scratch_parts = std::move(count.parts);
  }

  void operator()(const Address* bases, char* memory, char* room, void* stream) const override {
    if (patches_.empty() && scratch_bytes == 0 && room_bytes == 0) {
      run(params_, stream);
      return;
    }
    P p = params_;
    for (const Patch& patch : patches_) {
      const Address address = bases[patch.base] + patch.offset;
      *reinterpret_cast<Address*>(reinterpret_cast<char*>(&p) + patch.place) = address;
    }
    ScratchCutter cutter(memory, room);
    scratch(cutter, p);
    run(p, stream);
  }

 private:
  P params_{};
  std::vector<Patch> patches_;
};

// The launches of a module, by name and dtype.
class Registry {
 public:
  template <typename P>
  void add(const char* op, const char* dtype) {
    makers_[{op, dtype}] = [op](const py::dict& values) -> std::shared_ptr<Launch> {
      return std::make_shared<LaunchOf<P>>(op, values);
    };
  }
  std::shared_ptr<Launch> make(const std::string& op, const std::string& dtype, const py::dict& values) const {
    const auto found = makers_.find({op, dtype});
    if (found == makers_.end()) throw std::invalid_argument(op + ": there is no kernel for " + dtype);
    return found->second(values);
  }

 private:
  // (Plain function objects: the name is a literal.)
  std::map<std::pair<std::string, std::string>, std::function<std::shared_ptr<Launch>(const py::dict&)>> makers_;
};

}  // namespace rnndyn
