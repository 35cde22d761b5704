// The strip form of relation_kl: rows of tiles from the first column to the last. It serves every kind of relation
// (self, cross, causal) and any size of the scores.
#pragma once

#include "relation_head.h"

namespace fastkd {
namespace {

// With s and t the student's and teacher's scores, the lanes hold Σ 2^(s − S), Σ 2^(t − T) and
// Σ 2^(t − T) ((t − T) − (s − S)) over the columns seen so far. The references S and T are the largest scores seen so far;
// they are kept as dot products, so that the largest score less its reference is exactly zero.
struct RowSums : LaneSums {
  static constexpr float kLowest = -1e30f; // below every score, and finite when scaled

  alignas(64) float student_reference[kTile];
  alignas(64) float teacher_reference[kTile];

  void clear() {
    LaneSums::clear();
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

template <typename Element>
class StripForm {
 public:
  // `keep`: a strip of scores, and its rows' references for each tile, stay until its gradient is taken: 130 · n floats
  // of scratch, n being the longest sequence rounded up to tiles. Else every score is computed twice, in 8192 floats.
  StripForm(Arena& arena, const Relation& relation, bool keep)
      : tiles_(arena, relation, keep),
        keep_(keep),
        causal_(relation.causal),
        student_scale_(score_scale(relation.student_width)),
        teacher_scale_(score_scale(relation.teacher_width)),
        student_scores_(arena.take(kArea * (keep ? tiles_of(relation.longest) : 1))),
        teacher_scores_(arena.take(kArea * (keep ? tiles_of(relation.longest) : 1))),
        references_(arena.take(keep ? 2 * kTile * tiles_of(relation.longest) : 0)),
        sums_(tiles_.group) {}

  // Returns Σ_rows KL(teacher ‖ student) and writes the gradient.
  double run(const Head& head) {
    tiles_.bind(head);
    double divergence = 0;
    for (int64_t first = 0; first < tiles_.tiles(); first += tiles_.group) {
      const int64_t last = std::min(first + tiles_.group, tiles_.tiles());
      divergence += forward(first, last);
      if (tiles_.relation.with_grad) {
        backward(first, last);
      }
    }
    if (tiles_.relation.with_grad) {
      tiles_.end_column_gradients();
    }
    return divergence;
  }

 private:
  template <typename Function>
  void for_each_tile(int64_t first, int64_t last, Function function) { // of the rows of tiles [first, last)
    for (int64_t j = 0; j < (causal_ ? last : tiles_.tiles()); ++j) {
      for (int64_t i = causal_ ? std::max(first, j) : first; i < last; ++i) {
        function(i, j);
      }
    }
  }

  float* student_tile(int64_t j) {
    return student_scores_ + (keep_ ? j * kArea : 0);
  }

  float* teacher_tile(int64_t j) {
    return teacher_scores_ + (keep_ ? j * kArea : 0);
  }

  // How many columns of tile (i, j) the row sees.
  int64_t visible(int64_t i, int64_t j, int64_t row) const {
    return causal_ && i == j ? row + 1 : tiles_.tokens(j);
  }

  double forward(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sums_[i - first].clear();
    }
    for_each_tile(first, last, [&](int64_t i, int64_t j) {
      RowSums& sums = sums_[i - first];
      tiles_.score(i, j, student_tile(j), teacher_tile(j));
      accumulate(i, j, sums);
      if (keep_) {
        std::copy_n(sums.student_reference, kTile, references_ + 2 * j * kTile);
        std::copy_n(sums.teacher_reference, kTile, references_ + (2 * j + 1) * kTile);
      }
    });
    double divergence = 0;
    for (int64_t i = first; i < last; ++i) {
      divergence += finish(i, sums_[i - first]);
    }
    return divergence;
  }

  // Turns the products of tile (i, j) into exponentials relative to the row's reference, and adds them up.
  void accumulate(int64_t i, int64_t j, RowSums& sums) {
    const bool whole = visible(i, j, 0) == kTile;
    for (int64_t row = 0; row < tiles_.tokens(i); ++row) {
      float* student = student_tile(j) + row * kTile;
      float* teacher = teacher_tile(j) + row * kTile;
      if (whole) {
        accumulate_row<true>(row, kTile, kTile, student, teacher, sums);
      } else {
        accumulate_row<false>(row, visible(i, j, row), tiles_.side(j), student, teacher, sums);
      }
    }
  }

  template <bool kWhole>
  void accumulate_row(int64_t row, int64_t visible, int64_t side, float* student, float* teacher, RowSums& sums) {
    const int64_t columns = kWhole ? kTile : side;
    const Vec lowest(RowSums::kLowest);
    Vec student_top = lowest, teacher_top = lowest;
    for (int64_t c = 0; c < columns; c += Vec::size()) {
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
    for (int64_t c = 0; c < columns; c += Vec::size()) {
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
  // exponential into a probability times the factor of the gradient.
  double finish(int64_t i, RowSums& sums) {
    const float factor = tiles_.gradient_factor();
    double divergence = 0;
    const int64_t rows = tiles_.tokens(i);
    for (int64_t row = 0; row < rows; ++row) {
      const float student = sum_of(Vec::loadu(sums.student + row * Vec::size()));
      const float teacher = sum_of(Vec::loadu(sums.teacher + row * Vec::size()));
      const float weighted = sum_of(Vec::loadu(sums.weighted + row * Vec::size()));
      divergence += 0.69314718f * (weighted / teacher) + std::log(student / teacher);
      sums.student[row] = factor / student;
      sums.teacher[row] = factor / teacher;
    }
    std::fill(sums.student + rows, sums.student + kTile, 0.f);
    std::fill(sums.teacher + rows, sums.teacher + kTile, 0.f);
    return divergence;
  }

  void backward(int64_t first, int64_t last) {
    tiles_.begin_row_gradients(first);
    for_each_tile(first, last, [&](int64_t i, int64_t j) {
      tiles_.gradient.pack(tiles_.side(i), tiles_.side(j), difference(i, j, sums_[i - first]), true);
      tiles_.add_gradients(i, j, true);
    });
    tiles_.end_row_gradients(last);
  }

  // G = (S − P) · factor of tile (i, j), in the place of the student's scores.
  float* difference(int64_t i, int64_t j, const RowSums& sums) {
    alignas(64) float student_factor[kTile], teacher_factor[kTile];
    float* student = student_tile(j);
    float* teacher = teacher_tile(j);
    if (keep_) { // the references may have risen since the exponentials of this tile were taken
      rebase(sums.student, references_ + 2 * j * kTile, sums.student_reference, student_scale_, student_factor);
      rebase(sums.teacher, references_ + (2 * j + 1) * kTile, sums.teacher_reference, teacher_scale_, teacher_factor);
    } else {
      tiles_.score(i, j, student, teacher);
      exponentiate(i, j, sums);
      std::copy_n(sums.student, kTile, student_factor);
      std::copy_n(sums.teacher, kTile, teacher_factor);
    }
    for (int64_t row = 0; row < tiles_.side(i); ++row) {
      const Vec s_factor(student_factor[row]), t_factor(teacher_factor[row]);
      for (int64_t c = row * kTile; c < row * kTile + tiles_.side(j); c += Vec::size()) {
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
    for (int64_t row = 0; row < tiles_.tokens(i); ++row) {
      const Vec student_reference(sums.student_reference[row]), teacher_reference(sums.teacher_reference[row]);
      for (int64_t c = 0; c < tiles_.side(j); c += Vec::size()) {
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

  HeadTiles<Element> tiles_;
  const bool keep_;
  const bool causal_;
  const float student_scale_;
  const float teacher_scale_;
  float* student_scores_;
  float* teacher_scores_;
  float* references_; // of each column tile: the rows' references when it was computed
  std::vector<RowSums> sums_;
};

} // namespace
} // namespace fastkd
