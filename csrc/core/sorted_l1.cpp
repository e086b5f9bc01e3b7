// SPDX-License-Identifier: Apache-2.0
// Two laws of different vocabularies, compared rank by rank and, on given pairs of ids, id by id:
// with p = c_T P, q = c_S Q and u_v = dD / d log q_v (0 on ties),
//   D = rest_weight * sum_i |p_(i) - q_(i)| + pair_weight * JSD_beta(p, q on the pairs)
//   dD/dz_v = slope_v (u_v - Q_v sum u),   dD/dlog c_S = sum u.
// Probabilities are positive floats, whose order is that of their bits: a radix sort. What is 0 needs
// no order.
#include "divergence_plain.h"
#include "parallel.h"
#include "radix_sort.h"
#include "rows.h"
#include "sorted_l1_check.h"

namespace opd {
namespace {

// A probability is at most 1, whose float has 30 bits and whose double has 62.
template <class T>
struct Order;

template <>
struct Order<float> {
  using Key = uint32_t;
  // the id below the key: one word to move
  using Entry = uint64_t;
  static constexpr int kDigitBits = 10, kPasses = 3;
  static Entry entry(Key key, int64_t id) {
    return static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(id);
  }
  static Key key(Entry entry) { return static_cast<Key>(entry >> 32); }
  static int64_t id(Entry entry) { return static_cast<int64_t>(entry & 0xffffffffu); }
};

template <>
struct Order<double> {
  using Key = uint64_t;
  struct Entry {
    uint64_t key;
    int64_t id;
  };
  static constexpr int kDigitBits = 11, kPasses = 6;
  static Entry entry(Key key, int64_t id) { return {key, id}; }
  static Key key(Entry entry) { return entry.key; }
  static int64_t id(Entry entry) { return entry.id; }
};

template <class T>
typename Order<T>::Key bits_of(T value) {
  typename Order<T>::Key bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class T>
T value_of(typename Order<T>::Key bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// What one worker sorts in.
template <class T>
struct Workspace {
  using Entry = typename Order<T>::Entry;
  using Key = typename Order<T>::Key;

  static int64_t bytes(int64_t student_size, int64_t teacher_size) {
    const int64_t size = student_size * (2 * sizeof(Entry) + sizeof(T)) +
                         teacher_size * (2 * sizeof(Key) + sizeof(T));
    return (size + 63) / 64 * 64;
  }

  Workspace(void* memory, int64_t student_size, int64_t teacher_size) {
    entries[0] = static_cast<Entry*>(memory);
    entries[1] = entries[0] + student_size;
    keys[0] = reinterpret_cast<Key*>(entries[1] + student_size);
    keys[1] = keys[0] + teacher_size;
    teacher = reinterpret_cast<T*>(keys[1] + teacher_size);
    summands = teacher + teacher_size;
  }

  Entry* entries[2];
  Key* keys[2];
  T* teacher;   // its logits, as its law takes them
  T* summands;  // u
};

// A law's log-sum-exp, for logits as they are and, for pairs, for logits less an origin: the largest
// where its size leaves a double no room for log V. Differences of such logits are exact.
template <class T>
struct Normalizer {
  static constexpr T kHuge = T(1 << 24);

  Normalizer() : shift(0.0) {}
  explicit Normalizer(const RunningLse<T>& row)
      : lse(row.lse()), shift(lse, row.lost()), relative(lse) {
    if (std::isfinite(lse) && std::fabs(row.largest()) >= kHuge) {
      origin = row.largest();
      relative = std::log(row.sum());
    }
  }

  double lse = 0.0;
  Shift<T> shift;
  T origin = T(0);
  double relative = 0.0;
};

template <class T>
OPD_ELEMENTWISE void law_block(const T* __restrict__ block, Shift<T> shift, int padded,
                               T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) out[i] = exp_nonpositive((block[i] - shift.high) - shift.low);
}

// weight * (u - Q U), slope of the temperature and scale included in both factors.
template <class T>
OPD_ELEMENTWISE void gradient_block(const T* __restrict__ law, const T* __restrict__ summands,
                                    T factor, T total, int count, T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < count; ++i) out[i] = factor * (summands[i] - law[i] * total);
}

template <class T>
T scale_of(const void* log_scales, int64_t row) {
  return log_scales ? std::exp(static_cast<const T*>(log_scales)[row]) : T(1);
}

template <class T>
double log_scale_of(const void* log_scales, int64_t row) {
  return log_scales ? static_cast<double>(static_cast<const T*>(log_scales)[row]) : 0.0;
}

// sum_i |p_(i) - q_(i)| over descending ranks; u += dD / d log q.
template <class T>
double compare_ranks(const typename Order<T>::Entry* student, int64_t num_student,
                     const typename Order<T>::Key* teacher, int64_t num_teacher, T student_scale,
                     T teacher_scale, T weight, T* summands, double* total) {
  double sums[2] = {};
  double part[2] = {};
  const auto compare = [&](int64_t i, T teacher_value) {
    const T q = student_scale * value_of<T>(Order<T>::key(student[i]));
    const T excess = q - teacher_scale * teacher_value;
    sums[i & 1] += static_cast<double>(std::fabs(excess));
    if (summands) {
      // no branch: which side is larger is as good as random
      const T sign = static_cast<T>((excess > T(0)) - (excess < T(0)));
      const T u = weight * q * sign;
      summands[Order<T>::id(student[i])] = u;
      part[i & 1] += static_cast<double>(u);
    }
  };
  const int64_t both = std::min(num_student, num_teacher);
  for (int64_t i = 0; i < both; ++i) compare(i, value_of<T>(teacher[i]));
  for (int64_t i = both; i < num_student; ++i) compare(i, T(0));
  for (int64_t i = both; i < num_teacher; ++i) {
    sums[i & 1] += static_cast<double>(teacher_scale * value_of<T>(teacher[i]));
  }
  *total += part[0] + part[1];
  return sums[0] + sums[1];
}

// What a row is made of, once its log-sum-exps are known.
template <class T>
class Row {
 public:
  Row(const opd_sorted_l1_args_t& args, int64_t row, const Workspace<T>& workspace)
      : args_(args),
        row_(row),
        workspace_(workspace),
        student_(args.student, row, args.student_vocab_size),
        teacher_(args.teacher, row, args.teacher_vocab_size) {}

  void run(T weight) {
    of_student_ = Normalizer<T>(running_lse<T>(student_));
    of_teacher_ = Normalizer<T>(running_lse<T>(teacher_));
    if (!std::isfinite(of_student_.lse) || !std::isfinite(of_teacher_.lse)) {
      // no law: NaN, or nothing but -inf
      weight = std::numeric_limits<T>::quiet_NaN();
    }
    T* const summands = args_.grad.data ? workspace_.summands : nullptr;
    if (summands) std::fill(summands, summands + args_.student_vocab_size, T(0));
    double total = 0.0, loss = 0.0;
    const int64_t num_teacher = take_teacher();
    const int64_t num_student = take_student(summands, &loss, &total);
    if (args_.rest_weight != 0.0) {
      const auto* entries = sort_descending<Order<T>::kDigitBits, Order<T>::kPasses>(
          workspace_.entries[0], workspace_.entries[1], num_student, Order<T>::key);
      const auto* keys = sort_descending<Order<T>::kDigitBits, Order<T>::kPasses>(
          workspace_.keys[0], workspace_.keys[1], num_teacher,
          [](typename Order<T>::Key key) { return key; });
      loss += args_.rest_weight *
              compare_ranks<T>(entries, num_student, keys, num_teacher,
                               scale_of<T>(args_.student_log_scales, row_),
                               scale_of<T>(args_.teacher_log_scales, row_),
                               static_cast<T>(args_.rest_weight), summands, &total);
    }
    static_cast<T*>(args_.loss)[row_] = static_cast<T>(static_cast<double>(weight) * loss);
    if (!summands) return;
    static_cast<T*>(args_.grad_log_scales)[row_] =
        static_cast<T>(static_cast<double>(weight) * total);
    store_gradient(weight, static_cast<T>(total));
  }

 private:
  // The keys of what is compared by rank, and the logits where pairs will look them up.
  int64_t take_teacher() {
    Block<T> staged, law;
    int64_t count_kept = 0;
    for_each_block(args_.teacher_vocab_size, [&](int64_t begin, int count) {
      const T* block = teacher_.block(begin, count, staged.values);
      law_block(block, of_teacher_.shift, round_up_to_lanes(count), law.values);
      if (args_.teacher_paired) std::copy(block, block + count, workspace_.teacher + begin);
      auto* const keys = workspace_.keys[0];
      for (int i = 0; i < count; ++i) {
        const bool is_paired = args_.teacher_paired && args_.teacher_paired[begin + i] != 0;
        keys[count_kept] = bits_of(law.values[i]);
        count_kept += law.values[i] > T(0) && !is_paired;
      }
    });
    return count_kept;
  }

  // The same of the student, and the loss of the pairs with its u.
  int64_t take_student(T* summands, double* loss, double* total) {
    Block<T> staged, law;
    int64_t count_kept = 0;
    for_each_block(args_.student_vocab_size, [&](int64_t begin, int count) {
      const T* block = student_.block(begin, count, staged.values);
      law_block(block, of_student_.shift, round_up_to_lanes(count), law.values);
      auto* const entries = workspace_.entries[0];
      for (int i = 0; i < count; ++i) {
        const bool is_paired = args_.student_pairs && args_.student_pairs[begin + i] >= 0;
        entries[count_kept] = Order<T>::entry(bits_of(law.values[i]), begin + i);
        count_kept += law.values[i] > T(0) && !is_paired;
      }
      if (args_.student_pairs && args_.pair_weight != 0.0) {
        add_pairs(begin, count, block, summands, loss, total);
      }
    });
    return count_kept;
  }

  void add_pairs(int64_t begin, int count, const T* block, T* summands, double* loss,
                 double* total) const {
    Block<T> student, teacher, term, dterm;
    int64_t ids[kBlock];
    int num_pairs = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t pair = args_.student_pairs[begin + i];
      if (pair < 0) continue;
      student.values[num_pairs] = block[i] - of_student_.origin;
      teacher.values[num_pairs] = workspace_.teacher[pair] - of_teacher_.origin;
      ids[num_pairs++] = begin + i;
    }
    const int padded = round_up_to_lanes(num_pairs);
    for (T* values : {student.values, teacher.values}) {
      std::fill(values + num_pairs, values + padded, kMinusInfinity<T>);
    }
    double state[OPD_DIVERGENCE_STATE] = {};
    state[kStudentLse] = of_student_.relative - log_scale_of<T>(args_.student_log_scales, row_);
    state[kTeacherLse] = of_teacher_.relative - log_scale_of<T>(args_.teacher_log_scales, row_);
    plain_term_block<false>(Jsd(args_.beta), student.values, teacher.values, Shifts<T>(state),
                            padded, term.values, dterm.values, static_cast<T*>(nullptr));
    // log 0 - log 0: a pair that neither side has
    for (int i = 0; i < padded; ++i) {
      const bool absent = student.values[i] == kMinusInfinity<T> &&
                          teacher.values[i] == kMinusInfinity<T>;
      if (absent) term.values[i] = dterm.values[i] = T(0);
    }
    *loss += args_.pair_weight * lane_sum(term.values, padded);
    if (!summands) return;
    *total += args_.pair_weight * lane_sum(dterm.values, padded);
    for (int i = 0; i < num_pairs; ++i) {
      summands[ids[i]] = static_cast<T>(args_.pair_weight) * dterm.values[i];
    }
  }

  // A block is read whole before it is written: the gradient may take the place of the logits.
  void store_gradient(T weight, T total) const {
    const T factor = weight * student_.slope();
    Block<T> staged, law, gradient, slope;
    for_each_block(args_.student_vocab_size, [&](int64_t begin, int count) {
      const T* block = student_.block(begin, count, staged.values);
      law_block(block, of_student_.shift, round_up_to_lanes(count), law.values);
      gradient_block(law.values, workspace_.summands + begin, factor, total, count,
                     gradient.values);
      student_.times_softcap_slope(begin, count, gradient.values, slope.values);
      store_block(args_.grad, row_, begin, count, gradient.values);
    });
    zero_columns(args_.grad, row_, args_.student_vocab_size, args_.grad_width);
  }

  const opd_sorted_l1_args_t& args_;
  int64_t row_;
  const Workspace<T>& workspace_;
  LogitsRow<T> student_, teacher_;
  Normalizer<T> of_student_, of_teacher_;
};

template <class T>
void run_rows(const opd_sorted_l1_args_t& args) {
  const int64_t workers = std::min(args.num_workers, args.num_tokens);
  const int64_t bytes = Workspace<T>::bytes(args.student_vocab_size, args.teacher_vocab_size);
  parallel_rows(args.parallel_for, workers, [&](int64_t worker) {
    const Workspace<T> workspace(static_cast<char*>(args.workspace) + worker * bytes,
                                 args.student_vocab_size, args.teacher_vocab_size);
    const int64_t end = args.num_tokens * (worker + 1) / workers;
    for (int64_t row = args.num_tokens * worker / workers; row < end; ++row) {
      const T weight = args.token_weights ? static_cast<const T*>(args.token_weights)[row] : T(1);
      if (weight != T(0)) {
        Row<T>(args, row, workspace).run(weight);
        continue;
      }
      static_cast<T*>(args.loss)[row] = T(0);
      if (!args.grad.data) continue;
      static_cast<T*>(args.grad_log_scales)[row] = T(0);
      zero_columns(args.grad, row, 0, args.grad_width);
    }
  });
}

}  // namespace
}  // namespace opd

int64_t opd_sorted_l1_workspace_bytes(int64_t num_workers, int64_t student_vocab_size,
                                      int64_t teacher_vocab_size, int32_t dtype) {
  const auto bytes = dtype == OPD_FLOAT64 ? &opd::Workspace<double>::bytes
                                          : &opd::Workspace<float>::bytes;
  return num_workers * bytes(student_vocab_size, teacher_vocab_size);
}

opd_status_t opd_sorted_l1_cpu(const opd_sorted_l1_args_t* args) {
  return opd::guarded([&] {
    opd::sorted_l1::check_args(args);
    opd::sorted_l1::check_pairs(*args);
    if (args->num_tokens == 0) return;
    opd::visit_real(args->student, [&](auto real) { opd::run_rows<decltype(real)>(*args); });
  });
}
