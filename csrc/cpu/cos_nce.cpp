// fastkd::cos_nce_sums_cpp and fastkd::cos_nce_cpp: sums of unit vectors, and COS-NCE with its student gradient from them.
// The schemas and the formulas stand in fastkd/ops/cos_nce.py. This file is compiled once per instruction set; the library
// that fits the CPU is loaded.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "cos_nce_rows.h"
#include "output_rows.h"

namespace fastkd {
namespace {

// Sums of many numbers are taken in two levels, so that their rounding errors stay those of a few hundred additions.
constexpr int64_t kAddedAtOnce = 128;

// out[layer, 0] = the sum over all samples; `out` is (M, S, L, D).
template <typename T>
void sum_all(const Tensor& vectors, const Valid& valid, Tensor& out) {
  const int64_t layers = vectors.size(0), positions = vectors.size(2), width = vectors.size(3);
  const Rows<T> rows(vectors);
  const Partition partition(vectors, /*floats_of_a_block*/ 8192, /*least_chunk*/ 64, /*most_chunks*/ 64);
  // One sum per chunk; added up in a fixed order at the end.
  Tensor parts = partition.chunks == 1 ? out.slice(1, 0, 1).unsqueeze(0)
                                       : at::empty({partition.chunks, layers, 1, positions, width}, out.options());
  float* const first = parts.mutable_data_ptr<float>();
  at::parallel_for(0, partition.tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(partition.block * width);
    for (int64_t i = begin; i < end; ++i) {
      const Task task(partition, i);
      float* const part = first + task.chunk * parts.stride(0) + task.layer * parts.stride(1) + task.first_position * width;
      const int64_t floats = (task.last_position - task.first_position) * width;
      std::fill(part, part + floats, 0.f);
      for (int64_t from = task.first_sample; from < task.last_sample; from += kAddedAtOnce) {
        const int64_t to = std::min(from + kAddedAtOnce, task.last_sample);
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int64_t n = from; n < to; ++n) {
          for (int64_t l = task.first_position; l < task.last_position; ++l) {
            if (n + 1 < to) {
              rows.prefetch(task.layer, n + 1, l);
            }
            if (valid(n, l)) {
              add_unit(rows.at(task.layer, n, l), width, sums.data() + (l - task.first_position) * width);
            }
          }
        }
        add(sums.data(), floats, part);
      }
    }
  });
  if (partition.chunks != 1) {
    Tensor all = out.select(1, 0);
    at::sum_out(all, parts.squeeze(2), /*dim*/ 0);
  }
}

// out[layer, 1 + c] = the sum over the samples of class c, each by one thread in the order of its samples.
template <typename T>
void sum_classes(const Tensor& vectors, const Valid& valid, const int32_t* classes, Tensor& out) {
  const int64_t samples = vectors.size(1), positions = vectors.size(2), width = vectors.size(3), count = out.size(1) - 1;
  const Rows<T> rows(vectors);
  std::vector<std::vector<int64_t>> members(count);
  for (int64_t n = 0; n < samples; ++n) {
    TORCH_CHECK(classes[n] < count, "cos_nce_sums_cpp: sample ", n, " is of class ", classes[n], " of ", count);
    if (classes[n] >= 0) {
      members[classes[n]].push_back(n);
    }
  }
  float* const first = out.mutable_data_ptr<float>();
  at::parallel_for(0, vectors.size(0) * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t layer = i / count, c = i % count;
      float* const sums = first + (layer * (1 + count) + 1 + c) * positions * width;
      std::fill(sums, sums + positions * width, 0.f);
      for (const int64_t n : members[c]) {
        for (int64_t l = 0; l < positions; ++l) {
          if (valid(n, l)) {
            add_unit(rows.at(layer, n, l), width, sums + l * width);
          }
        }
      }
    }
  });
}

Tensor cos_nce_sums(const Tensor& vectors, const MaybeTensor& mask, const MaybeTensor& classes, int64_t num_classes) {
  Tensor out = at::empty({vectors.size(0), 1 + num_classes, vectors.size(2), vectors.size(3)},
                         vectors.options().dtype(at::kFloat));
  if (vectors.size(1) == 0) {
    return out.zero_();
  }
  const Valid valid(mask);
  with_type_of_vectors(vectors, [&](auto type) {
    sum_all<decltype(type)>(vectors, valid, out);
    if (num_classes > 0) {
      sum_classes<decltype(type)>(vectors, valid, classes->contiguous().template const_data_ptr<int32_t>(), out);
    }
  });
  return out;
}

// What a row is compared with besides its own teacher vector.
struct Others {
  const float* sum; // T
  const float* excluded; // the class sum to be taken off, or nullptr
  float own; // how often the row's own unit vector is taken off
  float half_inverse_count; // 1 / (2 K), or 0 where there is no negative
};

class Negatives {
 public:
  Negatives(const Tensor& sums, const Tensor& counts, const MaybeTensor& excluded, bool own)
      : sums_(sums.const_data_ptr<float>()),
        counts_(counts.const_data_ptr<float>()),
        excluded_(excluded ? excluded->const_data_ptr<int32_t>() : nullptr),
        classes_(sums.size(1) - 1),
        positions_(sums.size(2)),
        width_(sums.size(3)),
        own_(own ? 1.f : 0.f) {}

  Others of(int64_t layer, int64_t sample, int64_t position) const {
    const float* const all = sums_ + (layer * (1 + classes_) * positions_ + position) * width_;
    const int64_t c = excluded_ ? excluded_[sample] : -1;
    TORCH_CHECK(c < classes_, "cos_nce_cpp: sample ", sample, " excludes class ", c, " of ", classes_);
    const float left = counts_[position] - (c >= 0 ? counts_[(1 + c) * positions_ + position] : own_);
    return {all, c >= 0 ? all + (1 + c) * positions_ * width_ : nullptr, c >= 0 ? 0.f : own_, left > 0.5f ? 0.5f / left : 0.f};
  }

 private:
  const float* sums_;
  const float* counts_;
  const int32_t* excluded_;
  int64_t classes_, positions_, width_;
  float own_;
};

// The loss of a row, and its gradient as a sum of multiples of four rows.
struct Row {
  float loss, of_student, of_teacher, of_others;
};

template <typename S, typename T>
Row compared(const S* student, const T* teacher, const Others& others, int64_t width, float weight) {
  const auto [squares, teacher_squares, cosine, all] = dots<4>(width, [&](auto load) {
    const Vec s = load(student), t = load(teacher);
    return std::array<std::pair<Vec, Vec>, 4>{{{s, s}, {t, t}, {s, t}, {s, load(others.sum)}}};
  });
  float excluded = 0.f;
  if (others.excluded) {
    std::tie(excluded) = std::tuple_cat(dots<1>(width, [&](auto load) {
      return std::array<std::pair<Vec, Vec>, 1>{{{load(student), load(others.excluded)}}};
    }));
  }
  const float inverse = inverse_norm(squares), teacher_inverse = inverse_norm(teacher_squares);
  const float positive = cosine * inverse * teacher_inverse;
  const float negative = (all - excluded) * inverse - others.own * positive;
  const float along = -1.5f * positive + others.half_inverse_count * negative; // u · ŝ
  const float scale = inverse * weight;
  return {2.f + along, -along * inverse * scale, (-1.5f - others.own * others.half_inverse_count) * teacher_inverse * scale,
          others.half_inverse_count * scale};
}

template <typename S, typename T>
void write_gradient(const Row& row, const S* student, const T* teacher, const Others& others, int64_t i,
                    const OutputRows<S>& grad) {
  const Vec of_student(row.of_student), of_teacher(row.of_teacher), of_others(row.of_others);
  const auto vector = [&](const Vec& sum, int64_t column) {
    const Vec s = of_student * floats_of(student + column);
    return at::vec::fmadd(of_others, sum, at::vec::fmadd(of_teacher, floats_of(teacher + column), s));
  };
  const auto number = [&](float sum, int64_t column) {
    return row.of_student * static_cast<float>(student[column]) + row.of_teacher * static_cast<float>(teacher[column]) +
        row.of_others * sum;
  };
  if (!others.excluded) {
    return grad[i].write(others.sum, [&](auto sum, int64_t column) {
      if constexpr (std::is_same_v<decltype(sum), float>) {
        return number(sum, column);
      } else {
        return vector(sum, column);
      }
    });
  }
  grad[i].write(others.sum, [&](auto sum, int64_t column) {
    if constexpr (std::is_same_v<decltype(sum), float>) {
      return number(sum - others.excluded[column], column);
    } else {
      return vector(sum - Vec::loadu(others.excluded + column), column);
    }
  });
}

template <typename S, typename T>
void compare_all(const Tensor& student, const Tensor& teacher, const Negatives& negatives, const Valid& valid,
                 const MaybeTensor& weights, float divisor, Tensor& losses, Tensor& grad) {
  const int64_t samples = student.size(1), positions = student.size(2), width = student.size(3);
  const Rows<S> students(student);
  const Rows<T> teachers(teacher);
  const float* const weight_of = weights ? weights->const_data_ptr<float>() : nullptr;
  const int64_t weight_stride = weights ? weights->stride(0) : 0;
  float* const loss_of = losses.mutable_data_ptr<float>();
  std::optional<OutputRows<S>> grads;
  if (grad.dim() == 4) {
    grads.emplace(grad, width);
  }
  const std::vector<float> zeros(grads ? width : 0);
  const Partition partition(student, /*floats_of_a_block*/ 65536, /*least_chunk*/ 1, /*most_chunks*/ 1 << 20);
  at::parallel_for(0, partition.tasks, 1, [&](int64_t begin, int64_t end) {
    // Backwards, because the caches still hold what was summed last.
    for (int64_t index = end; index-- > begin;) {
      const Task task(partition, index);
      for (int64_t n = task.first_sample; n < task.last_sample; ++n) {
        const float weight = (weight_of ? weight_of[n * weight_stride] : 1.f) / divisor;
        for (int64_t l = task.first_position; l < task.last_position; ++l) {
          const int64_t i = (task.layer * samples + n) * positions + l;
          const bool last = l + 1 == task.last_position;
          if (const int64_t next = last ? n + 1 : n; next < task.last_sample) {
            students.prefetch(task.layer, next, last ? task.first_position : l + 1);
            teachers.prefetch(task.layer, next, last ? task.first_position : l + 1);
          }
          if (!valid(n, l)) {
            loss_of[i] = 0.f;
            if (grads) {
              (*grads)[i].write(zeros.data(), [](auto zero, int64_t) { return zero; });
            }
            continue;
          }
          const S* const s = students.at(task.layer, n, l);
          const T* const t = teachers.at(task.layer, n, l);
          const Others others = negatives.of(task.layer, n, l);
          const Row row = compared(s, t, others, width, weight);
          loss_of[i] = row.loss;
          if (grads) {
            write_gradient(row, s, t, others, i, *grads);
          }
        }
      }
    }
    if (grads) {
      grads->flush();
    }
  });
}

std::tuple<Tensor, Tensor> cos_nce(const Tensor& student, const Tensor& teacher, const Tensor& sums, const Tensor& counts,
                                   const MaybeTensor& mask, const MaybeTensor& excluded, bool own,
                                   const MaybeTensor& weights, int64_t divisor, bool with_grad) {
  TORCH_CHECK(student.sizes() == teacher.sizes(), "cos_nce_cpp: student ", student.sizes(), ", teacher ", teacher.sizes());
  Tensor losses = at::empty(student.sizes().slice(0, 3), student.options().dtype(at::kFloat));
  Tensor grad = at::empty(with_grad ? student.sizes() : at::IntArrayRef{0},
                          student.options().memory_format(at::MemoryFormat::Contiguous));
  if (student.numel() > 0) {
    const Tensor sums_ = sums.contiguous(), counts_ = counts.contiguous();
    const MaybeTensor excluded_ = excluded ? MaybeTensor(excluded->contiguous()) : std::nullopt;
    const Negatives negatives(sums_, counts_, excluded_, own);
    with_type_of_vectors(student, [&](auto type) {
      using S = decltype(type);
      with_type_of_vectors(teacher, [&](auto teacher_type) {
        compare_all<S, decltype(teacher_type)>(student, teacher, negatives, Valid(mask), weights,
                                               static_cast<float>(divisor), losses, grad);
      });
    });
  }
  return {losses, grad};
}

} // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("cos_nce_sums_cpp", cos_nce_sums);
  m.impl("cos_nce_cpp", cos_nce);
}

} // namespace fastkd
