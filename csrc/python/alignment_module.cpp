// SPDX-License-Identifier: Apache-2.0
// opd_kernels._align: opd_align_tokens for Python, without torch and without the interpreter's lock.
// Arrays come in through the buffer protocol or DLPack and go out as buffers; neither is copied.
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "opd/nearest_tokens.h"
#include "opd/opd.h"

namespace py = pybind11;

namespace {

// -- in ------------------------------------------------------------------------------------------

// The part of DLPack's interface (version 0, which every producer speaks) that is read here.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlManaged {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManaged*);
};
constexpr int32_t kDlCpu = 1, kDlCudaHost = 3;
constexpr uint8_t kDlInt = 0, kDlUint = 1;

// A vector of integers of somebody else's, held as long as this lives.
class Vector {
 public:
  Vector() = default;
  Vector(const Vector&) = delete;
  Vector(Vector&& other) noexcept { *this = std::move(other); }
  Vector& operator=(Vector&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    std::swap(step_, other.step_);
    std::swap(item_bytes_, other.item_bytes_);
    std::swap(is_signed_, other.is_signed_);
    std::swap(owner_, other.owner_);
    return *this;
  }

  // name: with the function's, for what is said of an object that is no vector of integers
  Vector(const py::handle& object, const std::string& name) {
    if (PyObject_CheckBuffer(object.ptr())) {
      auto view = std::make_shared<py::buffer_info>(
          py::reinterpret_borrow<py::buffer>(object).request());
      check(name, view->ndim, view->format.size() == 1 ? view->format[0] : '?');
      set(view->ptr, view->shape[0], view->strides[0], view->itemsize, is_signed_);
      owner_ = view;
    } else if (py::hasattr(object, "__dlpack__")) {
      from_dlpack(object, name);
    } else {
      throw py::type_error(name + " must be a tensor, an array or a list of integers, got " +
                           std::string(py::str(py::type::of(object).attr("__name__"))) + ".");
    }
  }

  const uint8_t* data() const { return data_; }
  int64_t count() const { return count_; }
  int64_t item_bytes() const { return item_bytes_; }
  bool is_contiguous() const { return count_ <= 1 || step_ == item_bytes_; }

  template <class T>
  void copy(int64_t* out) const {
    for (int64_t i = 0; i < count_; ++i) {
      T value;
      std::memcpy(&value, data_ + i * step_, sizeof(T));
      out[i] = static_cast<int64_t>(value);
    }
  }

  // The whole vector as T, where it is one; else in words what it is not.
  template <class T>
  const T* as(const std::string& name, const char* dtype) const {
    if (item_bytes_ != sizeof(T) || is_signed_ != std::is_signed_v<T> || !is_contiguous()) {
      throw py::type_error(name + " must be contiguous and of " + dtype + ".");
    }
    return reinterpret_cast<const T*>(data_);
  }

  void check_ids(const std::string& name) const {
    if (!is_signed_ || (item_bytes_ != 4 && item_bytes_ != 8)) {
      throw py::type_error(name + " must be int32 or int64, got " +
                           (is_signed_ ? "int" : "uint") + std::to_string(8 * item_bytes_) + ".");
    }
  }

 private:
  void set(const void* data, int64_t count, int64_t step, int64_t item_bytes, bool is_signed) {
    data_ = static_cast<const uint8_t*>(data);
    count_ = count;
    step_ = step;
    item_bytes_ = item_bytes;
    is_signed_ = is_signed;
  }

  void check(const std::string& name, int64_t ndim, char format) {
    const bool is_signed = std::string("bhilqn").find(format) != std::string::npos;
    if (ndim != 1 || (!is_signed && std::string("BHILQN").find(format) == std::string::npos)) {
      throw py::type_error(name + " must be a vector of integers, got format '" + format +
                           "' of " + std::to_string(ndim) + " dimension(s).");
    }
    is_signed_ = is_signed;
  }

  void from_dlpack(const py::handle& object, const std::string& name) {
    const py::object capsule = object.attr("__dlpack__")();
    auto* managed = static_cast<DlManaged*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    // from here on it is this vector's to give back
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    owner_ = std::shared_ptr<void>(managed, [](void* opaque) {
      auto* given = static_cast<DlManaged*>(opaque);
      if (given->deleter != nullptr) given->deleter(given);
    });
    const DlTensor& tensor = managed->tensor;
    if (tensor.device_type != kDlCpu && tensor.device_type != kDlCudaHost) {
      throw std::invalid_argument(name +
                                  " must be on the CPU: text is aligned on the host. Pass a copy "
                                  "of it there.");
    }
    const bool is_integer = (tensor.code == kDlInt || tensor.code == kDlUint) && tensor.lanes == 1;
    check(name, tensor.ndim, !is_integer ? '?' : tensor.code == kDlInt ? 'q' : 'Q');
    const int64_t item_bytes = tensor.bits / 8;
    set(static_cast<const uint8_t*>(tensor.data) + tensor.byte_offset, tensor.shape[0],
        tensor.strides == nullptr ? item_bytes : tensor.strides[0] * item_bytes, item_bytes,
        tensor.code == kDlInt);
  }

  const uint8_t* data_ = nullptr;
  int64_t count_ = 0, step_ = 0, item_bytes_ = 8;
  bool is_signed_ = true;
  std::shared_ptr<void> owner_;
};

// One side's sequences: vectors are taken as they are, lists are copied.
class Ids {
 public:
  Ids(const py::sequence& sequences, const std::string& side) : offsets_{0} {
    const size_t count = py::len(sequences);
    offsets_.reserve(count + 1);
    pointers_.reserve(count);
    for (size_t b = 0; b < count; ++b) {
      const std::string name = side + "_ids" + (count == 1 ? "" : "[" + std::to_string(b) + "]");
      const py::object sequence = sequences[b];
      if (PyList_Check(sequence.ptr()) || PyTuple_Check(sequence.ptr())) {
        add(converted(sequence, name));
        continue;
      }
      Vector vector(sequence, name);
      vector.check_ids(name);
      // the first says what all are; a vector is never copied where they agree
      const bool is_fitting = vector.is_contiguous() &&
                              (pointers_.empty() || vector.item_bytes() == item_bytes_);
      if (is_fitting) {
        item_bytes_ = vector.item_bytes();
        pointers_.push_back(vector.data());
        offsets_.push_back(offsets_.back() + vector.count());
        held_.push_back(std::move(vector));
      } else {
        std::vector<int64_t> ids(static_cast<size_t>(vector.count()));
        vector.item_bytes() == 4 ? vector.copy<int32_t>(ids.data())
                                 : vector.copy<int64_t>(ids.data());
        add(std::move(ids));
      }
    }
  }

  opd_token_ids_t get() const {
    return {nullptr, pointers_.data(), static_cast<int32_t>(item_bytes_), offsets_.data()};
  }
  int64_t num_sequences() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t num_tokens() const { return offsets_.back(); }

 private:
  static std::vector<int64_t> converted(const py::object& list, const std::string& name) {
    // holds what it reads: an item's __index__ is code of somebody's, which may empty the list
    const py::tuple items(list);
    const size_t count = items.size();
    std::vector<int64_t> ids(count);
    for (size_t i = 0; i < count; ++i) {
      PyObject* item = PyTuple_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i));
      const long long id = PyLong_AsLongLong(item);
      if (id == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        throw py::type_error(name + " must be integers, got " + std::string(py::repr(item)) +
                             " at position " + std::to_string(i) + ".");
      }
      ids[i] = id;
    }
    return ids;
  }

  // int64 from here on, and what came before too
  void add(std::vector<int64_t> ids) {
    if (item_bytes_ == 4) widen();
    item_bytes_ = 8;
    offsets_.push_back(offsets_.back() + static_cast<int64_t>(ids.size()));
    copies_.push_back(std::move(ids));
    pointers_.push_back(copies_.back().data());
  }

  void widen() {
    for (size_t b = 0; b < held_.size(); ++b) {
      std::vector<int64_t> ids(static_cast<size_t>(held_[b].count()));
      held_[b].copy<int32_t>(ids.data());
      copies_.push_back(std::move(ids));
      pointers_[b] = copies_.back().data();
    }
    held_.clear();
  }

  std::vector<int64_t> offsets_;
  std::vector<const void*> pointers_;
  int64_t item_bytes_ = 8;
  std::vector<Vector> held_;
  std::vector<std::vector<int64_t>> copies_;
};

// (data uint8 [N], offsets int64 [V + 1], symbols uint8 [V] or None)
class Table {
 public:
  Table(const py::tuple& parts, const std::string& side)
      : data_(parts[0], side + "_bytes.data"), offsets_(parts[1], side + "_bytes.offsets") {
    const std::string name = side + "_bytes";
    table_.data = data_.as<uint8_t>(name + ".data", "uint8");
    table_.data_size = data_.count();
    table_.offsets = offsets_.as<int64_t>(name + ".offsets", "int64");
    table_.vocab_size = offsets_.count() - 1;
    if (offsets_.count() < 1) {
      throw std::invalid_argument(name + ".offsets must not be empty.");
    }
    if (parts[2].is_none()) return;
    symbols_ = Vector(parts[2], name + ".symbols");
    table_.symbols = symbols_.as<uint8_t>(name + ".symbols", "uint8");
    if (symbols_.count() != table_.vocab_size) {
      throw std::invalid_argument(name + ".symbols must have " +
                                  std::to_string(table_.vocab_size) + " entries, one per id, got " +
                                  std::to_string(symbols_.count()) + ".");
    }
  }
  const opd_token_table_t& get() const { return table_; }

 private:
  Vector data_, offsets_, symbols_;
  opd_token_table_t table_{};
};

// -- out -----------------------------------------------------------------------------------------

// An array of ours, as a buffer. A large one lies in huge pages: its first touch, page by page, would
// take longer than filling it.
class Array {
 public:
  Array(int64_t capacity, int64_t item_bytes, const char* format)
      : item_bytes_(item_bytes), count_(capacity), format_(format) {
    if (size() < kLarge) {
      data_ = std::malloc(size());
      if (data_ == nullptr) throw std::bad_alloc();
      return;
    }
    mapped_ = size() + kHugePage;
    void* begin = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<uint8_t*>(begin);
    const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
    const size_t shift = (kHugePage - address % kHugePage) % kHugePage;
    data_ = mapping_ + shift;
    // a wish: without it, there are only more pages
    madvise(data_, mapped_ - shift, MADV_HUGEPAGE);
  }
  Array(const Array&) = delete;
  ~Array() {
    mapping_ == nullptr ? std::free(data_) : static_cast<void>(munmap(mapping_, mapped_));
  }

  // gives back what is behind the first `count`
  void shrink(int64_t count) {
    count_ = count;
    if (mapping_ == nullptr) {
      if (void* smaller = std::realloc(data_, size())) data_ = smaller;
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = static_cast<size_t>(static_cast<uint8_t*>(data_) - mapping_) + size();
    const size_t kept = (used + page - 1) / page * page;
    if (kept < mapped_ && munmap(mapping_ + kept, mapped_ - kept) == 0) mapped_ = kept;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t count() const { return count_; }
  py::buffer_info buffer() const {
    return py::buffer_info(data_, item_bytes_, format_, 1, {count_}, {item_bytes_});
  }

 private:
  static constexpr size_t kLarge = size_t{4} << 20, kHugePage = size_t{2} << 20;

  // never 0, for which malloc may give NULL
  size_t size() const { return static_cast<size_t>(std::max<int64_t>(count_ * item_bytes_, 1)); }

  void* data_ = nullptr;
  uint8_t* mapping_ = nullptr;  // NULL: data_ is of malloc
  size_t mapped_ = 0;
  int64_t item_bytes_, count_;
  const char* format_;
};
using Arrays = std::shared_ptr<Array>;

Arrays int64_array(int64_t count) { return std::make_shared<Array>(count, 8, "q"); }

// -- threads -------------------------------------------------------------------------------------

// fewer tokens are done before a thread has started
constexpr int64_t kTokensPerThread = 16384;
thread_local int64_t threads_of_call = 1;

int64_t threads_for(int64_t wanted, int64_t num_threads) {
  return std::max<int64_t>(1, std::min(wanted, num_threads));
}

void check_num_threads(const std::string& function, int64_t num_threads) {
  if (num_threads >= 1) return;
  throw std::invalid_argument(function + ": num_threads must be >= 1, got " +
                              std::to_string(num_threads) + ".");
}

// threads of this call alone, which a forked process cannot find hanging
void run_in_threads(int64_t num_rows, opd_rows_fn body, void* context) {
  const int64_t count = std::min(threads_of_call, num_rows);
  std::vector<std::thread> threads;
  int64_t begin = 0;
  for (int64_t i = 0; i + 1 < count; ++i) {
    const int64_t end = num_rows * (i + 1) / count;
    try {
      threads.emplace_back(body, context, begin, end);
    } catch (const std::exception&) {
      break;  // no more threads to be had: the rest is done here
    }
    begin = end;
  }
  body(context, begin, num_rows);
  for (std::thread& thread : threads) thread.join();
}

py::tuple align(const py::sequence& student_ids, const py::sequence& teacher_ids,
                const py::tuple& student_table, const py::tuple& teacher_table, bool is_repair,
                int32_t max_edits, int64_t num_threads) {
  check_num_threads("align_tokens", num_threads);
  const Ids student(student_ids, "align_tokens: student"),
      teacher(teacher_ids, "align_tokens: teacher");
  if (student.num_sequences() != teacher.num_sequences()) {
    throw std::invalid_argument(
        "align_tokens: both sides must have as many sequences, got " +
        std::to_string(student.num_sequences()) + " of the student and " +
        std::to_string(teacher.num_sequences()) + " of the teacher.");
  }
  const Table student_bytes(student_table, "align_tokens: student"),
      teacher_bytes(teacher_table, "align_tokens: teacher");
  const int64_t tokens = student.num_tokens() + teacher.num_tokens();
  const Arrays student_offsets = int64_array(tokens + 1), teacher_offsets = int64_array(tokens + 1),
               num_bytes = int64_array(tokens), chunk_ends = int64_array(student.num_sequences()),
               is_aligned = std::make_shared<Array>(tokens, 1, "?");
  opd_align_tokens_args_t args{};
  args.struct_size = sizeof(args);
  args.num_sequences = student.num_sequences();
  args.student = student.get();
  args.teacher = teacher.get();
  args.student_table = student_bytes.get();
  args.teacher_table = teacher_bytes.get();
  args.mode = is_repair ? OPD_ALIGN_REPAIR : OPD_ALIGN_STRICT;
  args.max_edits = max_edits;
  args.parallel_for = run_in_threads;
  args.student_offsets = student_offsets->as<int64_t>();
  args.teacher_offsets = teacher_offsets->as<int64_t>();
  args.is_aligned = is_aligned->as<uint8_t>();
  args.num_bytes = num_bytes->as<int64_t>();
  args.chunk_ends = chunk_ends->as<int64_t>();
  opd_status_t status;
  {
    const py::gil_scoped_release release;
    threads_of_call = threads_for(tokens / kTokensPerThread, num_threads);
    status = opd_align_tokens(&args);
  }
  if (status == OPD_BYTES_DIFFER) {
    const py::object error = py::module_::import("opd_kernels.errors").attr("AlignmentError");
    PyErr_SetString(error.ptr(), opd_last_error());
    throw py::error_already_set();
  }
  if (status == OPD_INVALID_ARGUMENT) throw std::invalid_argument(opd_last_error());
  if (status != OPD_OK) throw std::runtime_error(opd_last_error());
  const int64_t chunks = args.num_sequences == 0 ? 0 : args.chunk_ends[args.num_sequences - 1];
  student_offsets->shrink(chunks + 1);
  teacher_offsets->shrink(chunks + 1);
  is_aligned->shrink(chunks);
  num_bytes->shrink(chunks);
  return py::make_tuple(student_offsets, teacher_offsets, is_aligned, num_bytes, chunk_ends);
}

// queries that are done before a thread has started
constexpr int64_t kQueriesPerThread = 8;

py::tuple nearest(const py::tuple& queries_table, const py::tuple& vocabulary_table,
                  int64_t num_threads) {
  check_num_threads("nearest_tokens", num_threads);
  const Table queries(queries_table, "nearest_tokens: queries"),
      vocabulary(vocabulary_table, "nearest_tokens: vocabulary");
  const int64_t count = queries.get().vocab_size;
  const Arrays nearest_ids = int64_array(count), distances = int64_array(count);
  opd_nearest_tokens_args_t args{};
  args.struct_size = sizeof(args);
  args.queries = queries.get();
  args.vocabulary = vocabulary.get();
  args.nearest = nearest_ids->as<int64_t>();
  args.distances = distances->as<int64_t>();
  args.parallel_for = run_in_threads;
  opd_status_t status;
  {
    const py::gil_scoped_release release;
    threads_of_call = threads_for(count / kQueriesPerThread, num_threads);
    status = opd_nearest_tokens(&args);
  }
  if (status == OPD_INVALID_ARGUMENT) throw std::invalid_argument(opd_last_error());
  if (status != OPD_OK) throw std::runtime_error(opd_last_error());
  return py::make_tuple(nearest_ids, distances);
}

}  // namespace

PYBIND11_MODULE(_align, m) {
  m.doc() = "opd_align_tokens of the C API; opd_kernels.align_tokens is its public function.";
  py::class_<Array, Arrays>(m, "Array", py::buffer_protocol())
      .def_buffer([](Array& array) { return array.buffer(); })
      .def("__len__", &Array::count);
  m.def("align", &align, py::arg("student_ids"), py::arg("teacher_ids"), py::arg("student_table"),
        py::arg("teacher_table"), py::arg("is_repair"), py::arg("max_edits"),
        py::arg("num_threads"),
        "(student_offsets, teacher_offsets, is_aligned, num_bytes, chunk_ends), as buffers, of two "
        "lists of id vectors and two token tables (data, offsets, symbols or None).");
  m.def("nearest", &nearest, py::arg("queries"), py::arg("vocabulary"), py::arg("num_threads"),
        "(ids, distances), as buffers: of the vocabulary, a token table, the nearest to each id of "
        "another.");
}
