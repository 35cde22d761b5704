// The strip form of relation_kl: rows of tiles from the first column to the last. It serves every kind of relation
// (self, cross, causal) and any size of the scores. Formulas: fastkd/ops/relation_kl.py.
#pragma once

#include <cmath>

#include "operand.h"

namespace fastkd {
namespace {

// What the heads of one batch have in common.
struct Relation {
  int64_t longest; // valid tokens of the longest sequence
  int64_t student_width; // of one relation head
  int64_t teacher_width;
  bool cross;
  bool causal;
  bool with_grad;
};

// One relation head of one sequence. Of a self relation the right sides are those on the left; the gradients have the
// student's dtype and are written only `with_grad`.
struct Head {
  Tokens student, student_right;
  Tokens teacher, teacher_right;
  Tokens grad, grad_right;
};

// From a dot product to a score in units of log2(e), in which the exponential is a power of two.
inline float score_scale(int64_t width) {
  return static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(width)));
}

// Sums over the columns seen so far, for the 64 rows of a tile, with s and t the student's and teacher's scores:
// Σ 2^(s − S), Σ 2^(t − T) and Σ 2^(t − T) ((t − T) − (s − S)). The references S and T are the largest scores seen so far;
// they are kept as dot products, so that the largest score less its reference is exactly zero. The sums are kept per
// vector lane and added up once, at the end of the row.
struct RowSums {
  static constexpr float kLowest = -1e30f; // below every score, and finite when scaled
  alignas(64) float student[kTile * Vec::size()];
  alignas(64) float teacher[kTile * Vec::size()];
  alignas(64) float weighted[kTile * Vec::size()];
  alignas(64) float student_reference[kTile];
  alignas(64) float teacher_reference[kTile];

  void clear() {
    std::fill(std::begin(student), std::end(student), 0.f);
    std::fill(std::begin(teacher), std::end(teacher), 0.f);
    std::fill(std::begin(weighted), std::end(weighted), 0.f);
    std::fill(std::begin(student_reference), std::end(student_reference), kLowest);
    std::fill(std::begin(teacher_reference), std::end(teacher_reference), kLowest);
  }

  // A larger score has come: express the row's sums relative to it.
  void raise(int64_t row, float student_top, float student_scale, float teacher_top, float teacher_scale) {
    const float student_rise = std::max(student_top - student_reference[row], 0.f) * student_scale;
    const float teacher_rise = std::max(teacher_top - teacher_reference[row], 0.f) * teacher_scale;
    const Vec student_factor(std::exp2(-student_rise)), teacher_factor(std::exp2(-teacher_rise));
    const Vec shift(student_rise - teacher_rise);
    float* s = student + row * Vec::size();
    float* t = teacher + row * Vec::size();
    float* w = weighted + row * Vec::size();
    (teacher_factor * at::vec::fmadd(Vec::loadu(t), shift, Vec::loadu(w))).store(w);
    (student_factor * Vec::loadu(s)).store(s);
    (teacher_factor * Vec::loadu(t)).store(t);
    student_reference[row] = std::max(student_reference[row], student_top);
    teacher_reference[row] = std::max(teacher_reference[row], teacher_top);
  }
};

class StripForm {
 public:
  // Scratch in floats, with n = the longest sequence rounded up to tiles, s and t the widths rounded up to 16:
  //   up to 2 MiB:  n · (2s + 2t [twice for a cross relation] + s + 128 + 2) + 64 · s: the operands and a strip of scores
  //                 are kept, and every score is computed once;
  //   else:         n · s + 320 · (2s + 2t) + 256 · s + 8192: of the length depends the column gradient alone; strips
  //                 are computed twice, operands packed once per 256 rows.
  StripForm(Arena& arena, const Relation& relation, bool keep)
      : relation_(relation),
        keep_(keep),
        group_(keep ? 1 : kGroup),
        student_(arena, relation.student_width, keep ? tiles_of(relation.longest) : kGroup),
        teacher_(arena, relation.teacher_width, keep ? tiles_of(relation.longest) : kGroup),
        student_right_(arena, relation.student_width, !keep ? 1 : relation.cross ? tiles_of(relation.longest) : 0),
        teacher_right_(arena, relation.teacher_width, !keep ? 1 : relation.cross ? tiles_of(relation.longest) : 0),
        student_scores_(arena.take(kArea * (keep ? tiles_of(relation.longest) : 1))),
        teacher_scores_(arena.take(kArea * (keep ? tiles_of(relation.longest) : 1))),
        references_(arena.take(keep ? 2 * kTile * tiles_of(relation.longest) : 0)),
        sums_(group_) {
    if (relation.with_grad) {
      row_grad_ = arena.take(group_ * kTile * student_.ld);
      column_grad_ = arena.take(tiles_of(relation.longest) * kTile * student_.ld);
    }
  }

  // Returns Σ_rows KL(teacher ‖ student) and writes the gradient.
  double run(const Head& head) {
    count_ = head.student.count;
    student_.bind(head.student);
    teacher_.bind(head.teacher);
    student_right_.bind(relation_.cross ? head.student_right : head.student);
    teacher_right_.bind(relation_.cross ? head.teacher_right : head.teacher);
    const int64_t tiles = tiles_of(count_);
    if (relation_.with_grad) {
      std::fill(column_grad_, column_grad_ + tiles * kTile * student_.ld, 0.f);
    }
    double divergence = 0;
    for (int64_t first = 0; first < tiles; first += group_) {
      const int64_t last = std::min(first + group_, tiles);
      divergence += forward(first, last);
      if (relation_.with_grad) {
        backward(first, last, head);
      }
    }
    if (relation_.with_grad) {
      for (int64_t j = 0; j < tiles; ++j) {
        transpose(student_.ld, side(j), column_grad(j), kTile, row_grad_, student_.ld);
        store_rows(row_grad_, student_.ld, relation_.cross ? head.grad_right : head.grad, j * kTile);
      }
    }
    return divergence;
  }

 private:
  static constexpr int64_t kGroup = 4;

  int64_t side(int64_t tile) const { // of a tile, in padded tokens
    return padded(std::min(kTile, count_ - tile * kTile));
  }

  float* column_grad(int64_t tile) { // transposed: ld × 64
    return column_grad_ + tile * kTile * student_.ld;
  }

  Operand& student_right() { // the tiles of a self relation are packed once for both sides, if they are kept
    return keep_ && !relation_.cross ? student_ : student_right_;
  }

  Operand& teacher_right() {
    return keep_ && !relation_.cross ? teacher_ : teacher_right_;
  }

  void score(int64_t i, int64_t j) {
    product(side(i), side(j), relation_.student_width, student_.rows(i), student_.ld, student_right().columns(j), kTile,
            student_tile(j), kTile, false);
    product(side(i), side(j), relation_.teacher_width, teacher_.rows(i), teacher_.ld, teacher_right().columns(j), kTile,
            teacher_tile(j), kTile, false);
  }

  float* student_tile(int64_t j) {
    return student_scores_ + (keep_ ? j * kArea : 0);
  }

  float* teacher_tile(int64_t j) {
    return teacher_scores_ + (keep_ ? j * kArea : 0);
  }

  // How many columns of tile (i, j) the row sees.
  int64_t visible(int64_t i, int64_t j, int64_t row) const {
    return relation_.causal && i == j ? row + 1 : std::min(kTile, count_ - j * kTile);
  }

  double forward(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sums_[i - first].clear();
    }
    for (int64_t j = 0; j < (relation_.causal ? last : tiles_of(count_)); ++j) {
      for (int64_t i = relation_.causal ? std::max(first, j) : first; i < last; ++i) {
        score(i, j);
        accumulate(i, j, sums_[i - first]);
        if (keep_) {
          std::copy_n(sums_[i - first].student_reference, kTile, references_ + 2 * j * kTile);
          std::copy_n(sums_[i - first].teacher_reference, kTile, references_ + (2 * j + 1) * kTile);
        }
      }
    }
    double divergence = 0;
    for (int64_t i = first; i < last; ++i) {
      divergence += finish(i, sums_[i - first]);
    }
    return divergence;
  }

  // Turns the products of tile (i, j) into exponentials relative to the row's reference, and adds them up.
  void accumulate(int64_t i, int64_t j, RowSums& sums) {
    const bool whole = visible(i, j, 0) == kTile;
    for (int64_t row = 0; row < std::min(kTile, count_ - i * kTile); ++row) {
      if (whole) {
        accumulate_row<true>(row, kTile, kTile, student_tile(j) + row * kTile, teacher_tile(j) + row * kTile, sums);
      } else {
        accumulate_row<false>(row, visible(i, j, row), side(j), student_tile(j) + row * kTile,
                              teacher_tile(j) + row * kTile, sums);
      }
    }
  }

  template <bool kWhole>
  void accumulate_row(int64_t row, int64_t visible, int64_t columns, float* student, float* teacher, RowSums& sums) {
    const Vec lowest(RowSums::kLowest);
    Vec student_top = lowest, teacher_top = lowest;
    const int64_t end = kWhole ? kTile : columns;
    for (int64_t c = 0; c < end; c += Vec::size()) {
      Vec s = Vec::loadu(student + c), t = Vec::loadu(teacher + c);
      if constexpr (!kWhole) {
        const Vec seen = first_lanes(visible - c);
        s = Vec::blendv(lowest, s, seen);
        t = Vec::blendv(lowest, t, seen);
      }
      student_top = at::vec::clamp_min(s, student_top);
      teacher_top = at::vec::clamp_min(t, teacher_top);
    }
    const float s_top = largest_of(student_top), t_top = largest_of(teacher_top);
    if (s_top > sums.student_reference[row] || t_top > sums.teacher_reference[row]) {
      sums.raise(row, s_top, student_scale_, t_top, teacher_scale_);
    }
    const Vec student_reference(sums.student_reference[row]), teacher_reference(sums.teacher_reference[row]);
    const Vec student_scale(student_scale_), teacher_scale(teacher_scale_);
    float* s_sum = sums.student + row * Vec::size();
    float* t_sum = sums.teacher + row * Vec::size();
    float* w_sum = sums.weighted + row * Vec::size();
    Vec student_sum = Vec::loadu(s_sum), teacher_sum = Vec::loadu(t_sum), weighted_sum = Vec::loadu(w_sum);
    for (int64_t c = 0; c < end; c += Vec::size()) {
      const Vec s = (Vec::loadu(student + c) - student_reference) * student_scale;
      const Vec t = (Vec::loadu(teacher + c) - teacher_reference) * teacher_scale;
      Vec s_exp = exp2_of_negative(s), t_exp = exp2_of_negative(t), difference = t - s;
      if constexpr (!kWhole) {
        const Vec seen = first_lanes(visible - c);
        s_exp = s_exp & seen;
        t_exp = t_exp & seen;
        difference = difference & seen;
      }
      student_sum = student_sum + s_exp;
      teacher_sum = teacher_sum + t_exp;
      weighted_sum = at::vec::fmadd(t_exp, difference, weighted_sum);
      s_exp.store(student + c);
      t_exp.store(teacher + c);
    }
    student_sum.store(s_sum);
    teacher_sum.store(t_sum);
    weighted_sum.store(w_sum);
  }

  // The divergence of the rows of tile i. From here on the first two sums hold, per row, the factor that turns an
  // exponential into a probability divided by √d: what the gradient needs.
  double finish(int64_t i, RowSums& sums) {
    const float inverse_root = 1.f / std::sqrt(static_cast<float>(relation_.student_width));
    double divergence = 0;
    const int64_t rows = std::min(kTile, count_ - i * kTile);
    for (int64_t row = 0; row < rows; ++row) {
      const float student = sum_of(Vec::loadu(sums.student + row * Vec::size()));
      const float teacher = sum_of(Vec::loadu(sums.teacher + row * Vec::size()));
      const float weighted = sum_of(Vec::loadu(sums.weighted + row * Vec::size()));
      divergence += 0.69314718f * (weighted / teacher) + std::log(student / teacher);
      sums.student[row] = inverse_root / student;
      sums.teacher[row] = inverse_root / teacher;
    }
    std::fill(sums.student + rows, sums.student + kTile, 0.f);
    std::fill(sums.teacher + rows, sums.teacher + kTile, 0.f);
    return divergence;
  }

  void backward(int64_t first, int64_t last, const Head& head) {
    const int64_t ld = student_.ld;
    std::fill(row_grad_, row_grad_ + (last - first) * kTile * ld, 0.f);
    for (int64_t j = 0; j < (relation_.causal ? last : tiles_of(count_)); ++j) {
      for (int64_t i = relation_.causal ? std::max(first, j) : first; i < last; ++i) {
        const float* g = difference(i, j, sums_[i - first]);
        product(side(i), ld, side(j), g, kTile, student_right().rows(j), ld, row_grad_ + (i - first) * kTile * ld, ld,
                true);
        product(relation_.student_width, side(j), side(i), student_.columns(i), kTile, g, kTile, column_grad(j), kTile,
                true);
      }
    }
    for (int64_t i = first; i < last; ++i) {
      const float* rows = row_grad_ + (i - first) * kTile * ld;
      if (relation_.cross) {
        store_rows(rows, ld, head.grad, i * kTile);
      } else {
        add_transposed(side(i), ld, rows, ld, column_grad(i), kTile);
      }
    }
  }

  // G = (S − P) / √d of tile (i, j), in the place of the student's scores.
  const float* difference(int64_t i, int64_t j, const RowSums& sums) {
    alignas(64) float student_factor[kTile], teacher_factor[kTile];
    float* student = student_tile(j);
    float* teacher = teacher_tile(j);
    if (keep_) { // the references may have risen since the exponentials of this tile were taken
      rebase(sums.student, references_ + 2 * j * kTile, sums.student_reference, student_scale_, student_factor);
      rebase(sums.teacher, references_ + (2 * j + 1) * kTile, sums.teacher_reference, teacher_scale_, teacher_factor);
    } else {
      score(i, j);
      exponentiate(i, j, sums);
      std::copy_n(sums.student, kTile, student_factor);
      std::copy_n(sums.teacher, kTile, teacher_factor);
    }
    for (int64_t row = 0; row < side(i); ++row) {
      const Vec s_factor(student_factor[row]), t_factor(teacher_factor[row]);
      for (int64_t c = row * kTile; c < row * kTile + side(j); c += Vec::size()) {
        at::vec::fmsub(Vec::loadu(student + c), s_factor, Vec::loadu(teacher + c) * t_factor).store(student + c);
      }
    }
    return student;
  }

  static void rebase(const float* factor, const float* before, const float* now, float scale, float* rebased) {
    for (int64_t row = 0; row < kTile; row += Vec::size()) {
      const Vec rise = (Vec::loadu(before + row) - Vec::loadu(now + row)) * Vec(scale);
      (Vec::loadu(factor + row) * exp2_of_negative(rise)).store(rebased + row);
    }
  }

  // The exponentials of tile (i, j) once more, relative to the final references.
  void exponentiate(int64_t i, int64_t j, const RowSums& sums) {
    for (int64_t row = 0; row < std::min(kTile, count_ - i * kTile); ++row) {
      const Vec student_reference(sums.student_reference[row]), teacher_reference(sums.teacher_reference[row]);
      for (int64_t c = 0; c < side(j); c += Vec::size()) {
        const Vec seen = first_lanes(visible(i, j, row) - c);
        float* student = student_tile(j) + row * kTile + c;
        float* teacher = teacher_tile(j) + row * kTile + c;
        const Vec s = (Vec::loadu(student) - student_reference) * Vec(student_scale_);
        const Vec t = (Vec::loadu(teacher) - teacher_reference) * Vec(teacher_scale_);
        (exp2_of_negative(s) & seen).store(student);
        (exp2_of_negative(t) & seen).store(teacher);
      }
    }
  }

  const Relation relation_;
  const bool keep_;
  const int64_t group_; // row tiles worked on together
  const float student_scale_ = score_scale(relation_.student_width);
  const float teacher_scale_ = score_scale(relation_.teacher_width);
  Operand student_, teacher_, student_right_, teacher_right_;
  float* student_scores_;
  float* teacher_scores_;
  float* references_; // of each column tile: the rows' references when it was computed
  std::vector<RowSums> sums_;
  float* row_grad_ = nullptr;
  float* column_grad_ = nullptr;
  int64_t count_ = 0; // valid tokens of the head at work
};

struct Plan {
  bool keep;
  int64_t floats; // of scratch, per thread
};

inline Plan plan_of(const Relation& relation) {
  constexpr int64_t kFloatsIn2MiB = 2 * 1024 * 1024 / sizeof(float);
  for (const bool keep : {true, false}) {
    Arena counting(nullptr);
    const StripForm form(counting, relation, keep);
    if (!keep || counting.used() <= kFloatsIn2MiB) {
      return {keep, counting.used()};
    }
  }
  return {};
}

} // namespace
} // namespace fastkd
