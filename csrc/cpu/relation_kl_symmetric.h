// The symmetric form of relation_kl, for self relations that are not causal: the scores on one side of the diagonal do.
//
// With a = X Xᵀ in units where the exponential is a power of two, and h_i = a_ii / 2,
//
//     E_ij = 2^(a_ij − h_i − h_j)    is symmetric and at most 1, since a_ij − h_i − h_j = −|x_i − x_j|² / 2,
//     S_ij = E_ij v_j / Z_i          with v_j = 2^(h_j − max h) and Z_i = Σ_j E_ij v_j.
//
// So each pair of tokens costs one exponential, which goes into the sums of its row and of its column, and
// (G + Gᵀ)_ij = E_ij (v_j / Z_i + v_i / Z_j) − the teacher's, again symmetric, one product where G and Gᵀ take two.
#pragma once

#include <limits>
#include <numeric>
#include <optional>

#include "relation_head.h"

namespace fastkd {
namespace {

template <typename Element>
class SymmetricForm {
 public:
  // The weights v of a head may span this many bits, the exponentials as many above the floor of exp2_of_negative, until
  // something is lost that counts. Heads beyond (a diagonal over 80 nats wide) are for the strip form.
  static constexpr float kWidestSpread = 58.f;

  // `keep`: the tiles of both score matrices stay until the gradient is taken: n · (n + 64) floats of scratch, n being
  // the longest sequence rounded up to tiles. Else every score is computed twice, in 8192 floats. And 10 · n for the rows.
  SymmetricForm(Arena& arena, const Relation& relation, bool keep)
      : tiles_(arena, relation, keep),
        keep_(keep),
        student_scores_(arena.take(kArea * kept_tiles(relation, keep))),
        teacher_scores_(arena.take(kArea * kept_tiles(relation, keep))),
        student_(arena, relation, score_scale(relation.student_width)),
        teacher_(arena, relation, score_scale(relation.teacher_width)),
        offset_(arena.take(kTile * tiles_of(relation.longest))),
        weighted_sum_(arena.take(kTile * tiles_of(relation.longest))),
        lanes_(tiles_.group) {}

  // Returns Σ_rows KL(teacher ‖ student) and writes the gradient; nothing where the diagonal spreads too far.
  // Meanwhile it asks for the tokens of the head that comes next.
  std::optional<double> run(const Head& head, const Head& next) {
    tiles_.bind(head);
    next_ = next;
    grad_ = head.grad;
    count_ = head.student.count;
    asked_ = 0;
    const int64_t tiles = tiles_.tiles(), steps = tiles * (tiles + 1) / 2 * (std::min(padded(count_), kTile) / kRows);
    tokens_per_step_ = (std::max(count_, next.student.count) + steps - 1) / steps;
    if (!weigh_tokens()) {
      return std::nullopt;
    }
    for_each_group([&](int64_t first, int64_t last) { forward(first, last); });
    const double divergence = finish();
    if (tiles_.relation.with_grad) {
      for_each_group([&](int64_t first, int64_t last) { backward(first, last); });
    }
    return divergence;
  }

 private:
  // Per token, of the student or of the teacher.
  struct Side {
    Side(Arena& arena, const Relation& relation, float scale) : scale(scale) {
      for (float** values : {&half, &weight, &sum, &inverse}) {
        *values = arena.take(kTile * tiles_of(relation.longest));
      }
    }

    const float scale; // of the scores
    float* half; // half the diagonal, as a dot product
    float* weight; // v, zero for padding
    float* sum; // Z
    float* inverse; // the factor of the gradient / Z, zero for padding
  };

  static int64_t kept_tiles(const Relation& relation, bool keep) {
    const int64_t tiles = tiles_of(relation.longest);
    return keep ? tiles * (tiles + 1) / 2 : 1;
  }

  int64_t slot(int64_t i, int64_t j) const { // of tile (i, j), i <= j
    return keep_ ? (i * tiles_.tiles() - i * (i - 1) / 2 + (j - i)) * kArea : 0;
  }

  template <typename Function>
  void for_each_group(Function function) {
    for (int64_t first = 0; first < tiles_.tiles(); first += tiles_.group) {
      function(first, std::min(first + tiles_.group, tiles_.tiles()));
    }
  }

  template <typename Function>
  void for_each_tile(int64_t first, int64_t last, Function function) { // on and right of the diagonal
    for (int64_t j = first; j < tiles_.tiles(); ++j) {
      for (int64_t i = first; i < std::min(last, j + 1); ++i) {
        function(i, j);
      }
    }
  }

  // The diagonal, and from it the weights. False where they spread too far.
  bool weigh_tokens() {
    for (int64_t i = 0; i < tiles_.tiles(); ++i) {
      float* student = student_scores_ + slot(i, i);
      float* teacher = teacher_scores_ + slot(i, i);
      tiles_.score_diagonal(i, student, teacher);
      for (int64_t row = 0; row < tiles_.side(i); ++row) {
        student_.half[i * kTile + row] = 0.5f * student[row * kTile + row];
        teacher_.half[i * kTile + row] = 0.5f * teacher[row * kTile + row];
      }
    }
    float tops[2];
    for (Side* side : {&student_, &teacher_}) {
      const float top = top_of(side->half, 1.f), low = -top_of(side->half, -1.f);
      if (!((top - low) * side->scale <= kWidestSpread)) { // true for NaN as well
        return false;
      }
      tops[side == &teacher_] = top;
      for (int64_t c = 0; c < padded(count_); c += Vec::size()) {
        const Vec weight = exp2_of_negative((Vec::loadu(side->half + c) - Vec(top)) * Vec(side->scale));
        (weight & first_lanes(count_ - c)).store(side->weight + c);
        Vec(0.f).store(side->sum + c);
      }
    }
    for (int64_t c = 0; c < padded(count_); c += Vec::size()) {
      const Vec student = (Vec::loadu(student_.half + c) - Vec(tops[0])) * Vec(student_.scale);
      const Vec teacher = (Vec::loadu(teacher_.half + c) - Vec(tops[1])) * Vec(teacher_.scale);
      ((teacher - student) & first_lanes(count_ - c)).store(offset_ + c);
      Vec(0.f).store(weighted_sum_ + c);
    }
    return true;
  }

  // The largest of sign · x over the tokens.
  float top_of(const float* x, float sign) const {
    const Vec lowest(-std::numeric_limits<float>::infinity());
    Vec top = lowest;
    for (int64_t c = 0; c < count_; c += Vec::size()) {
      top = at::vec::clamp_min(Vec::blendv(lowest, Vec::loadu(x + c) * Vec(sign), first_lanes(count_ - c)), top);
    }
    return largest_of(top);
  }

  void forward(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      lanes_[i - first].clear();
    }
    for_each_tile(first, last, [&](int64_t i, int64_t j) {
      if (i != j || !keep_) { // the kept tiles of the diagonal are there since the tokens were weighed
        score(i, j);
      }
      accumulate(i, j, lanes_[i - first]);
    });
    for (int64_t i = first; i < last; ++i) {
      const LaneSums& lanes = lanes_[i - first];
      for (int64_t row = 0; row < tiles_.side(i); row += Vec::size()) {
        add(sums_of_rows(lanes.student + row * Vec::size()), student_.sum + i * kTile + row);
        add(sums_of_rows(lanes.teacher + row * Vec::size()), teacher_.sum + i * kTile + row);
        add(sums_of_rows(lanes.weighted + row * Vec::size()), weighted_sum_ + i * kTile + row);
      }
    }
  }

  void score(int64_t i, int64_t j) {
    if (i == j) {
      tiles_.score_diagonal(i, student_scores_ + slot(i, i), teacher_scores_ + slot(i, i));
    } else {
      tiles_.score(i, j, student_scores_ + slot(i, j), teacher_scores_ + slot(i, j));
    }
  }

  // Where a row of tile (i, j) begins: on the diagonal at its block of 16.
  static int64_t begin(int64_t i, int64_t j, int64_t row) {
    return i == j ? row / 16 * 16 : 0;
  }

  // Turns the products of tile (i, j) into exponentials, and adds them to the sums of their rows and of their columns,
  // but for the blocks on the diagonal, which hold each pair twice, so that their rows are enough.
  void accumulate(int64_t i, int64_t j, LaneSums& lanes) {
    for (int64_t row = 0; row < tiles_.side(i); row += kRows) {
      accumulate_rows(i, j, row, lanes);
      for (const int64_t end = asked_ + tokens_per_step_; asked_ < end; ++asked_) {
        prefetch<false>(next_.student, asked_);
        prefetch<false>(next_.teacher, asked_);
        prefetch<true>(grad_, asked_);
      }
    }
  }

  void accumulate_rows(int64_t i, int64_t j, int64_t first_row, LaneSums& lanes) {
    const int64_t first_column = begin(i, j, first_row);
    const int64_t diagonal_end = i == j ? first_column + 16 : 0;
    float* student = student_scores_ + slot(i, j) + first_row * kTile;
    float* teacher = teacher_scores_ + slot(i, j) + first_row * kTile;
    Vec student_sum[kRows], teacher_sum[kRows], weighted_sum[kRows];
    std::fill_n(student_sum, kRows, Vec(0.f));
    std::fill_n(teacher_sum, kRows, Vec(0.f));
    std::fill_n(weighted_sum, kRows, Vec(0.f));
    const Vec student_scale(student_.scale), teacher_scale(teacher_.scale);
    for (int64_t c = first_column; c < tiles_.side(j); c += Vec::size()) {
      const int64_t column = j * kTile + c;
      const Vec student_half = Vec::loadu(student_.half + column), teacher_half = Vec::loadu(teacher_.half + column);
      const Vec student_weight = Vec::loadu(student_.weight + column);
      const Vec teacher_weight = Vec::loadu(teacher_.weight + column);
      const Vec offset = Vec::loadu(offset_ + column);
      Vec student_column(0.f), teacher_column(0.f), weighted_column(0.f);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = i * kTile + first_row + r;
        float* s_tile = student + r * kTile + c;
        float* t_tile = teacher + r * kTile + c;
        const Vec s = (Vec::loadu(s_tile) - (student_half + Vec(student_.half[row]))) * student_scale;
        const Vec t = (Vec::loadu(t_tile) - (teacher_half + Vec(teacher_.half[row]))) * teacher_scale;
        const Vec s_exp = exp2_of_negative(s), t_exp = exp2_of_negative(t), difference = t - s;
        s_exp.store(s_tile);
        t_exp.store(t_tile);
        student_sum[r] = at::vec::fmadd(s_exp, student_weight, student_sum[r]);
        const Vec t_weighted = t_exp * teacher_weight;
        teacher_sum[r] = teacher_sum[r] + t_weighted;
        weighted_sum[r] = at::vec::fmadd(t_weighted, difference + offset, weighted_sum[r]);
        student_column = at::vec::fmadd(s_exp, Vec(student_.weight[row]), student_column);
        const Vec t_weighted_by_row = t_exp * Vec(teacher_.weight[row]);
        teacher_column = teacher_column + t_weighted_by_row;
        weighted_column = at::vec::fmadd(t_weighted_by_row, difference + Vec(offset_[row]), weighted_column);
      }
      if (c >= diagonal_end) {
        add(student_column, student_.sum + column);
        add(teacher_column, teacher_.sum + column);
        add(weighted_column, weighted_sum_ + column);
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      add(student_sum[r], lanes.student + (first_row + r) * Vec::size());
      add(teacher_sum[r], lanes.teacher + (first_row + r) * Vec::size());
      add(weighted_sum[r], lanes.weighted + (first_row + r) * Vec::size());
    }
  }

  static void add(const Vec& x, float* to) {
    (Vec::loadu(to) + x).store(to);
  }

  // The divergence of all rows: Σ_j P_ij (log P_ij − log S_ij), where log2 P_ij is the exponent of E_ij plus those of v_j
  // and 1 / Z_i. Sums are taken relative to the row's own weight, which is the largest term of most rows.
  double finish() {
    const Vec factor(tiles_.gradient_factor());
    for (int64_t row = 0; row < padded(count_); row += Vec::size()) {
      const Vec valid = first_lanes(count_ - row);
      const Vec student_sum = Vec::loadu(student_.sum + row), teacher_sum = Vec::loadu(teacher_.sum + row);
      const Vec student = student_sum / Vec::loadu(student_.weight + row);
      const Vec teacher = teacher_sum / Vec::loadu(teacher_.weight + row);
      const Vec mean = Vec::loadu(weighted_sum_ + row) / teacher_sum - Vec::loadu(offset_ + row);
      at::vec::fmadd(mean, Vec(0.69314718f), (student / teacher).log()).store(weighted_sum_ + row);
      (factor / student_sum & valid).store(student_.inverse + row);
      (factor / teacher_sum & valid).store(teacher_.inverse + row);
    }
    return std::accumulate(weighted_sum_, weighted_sum_ + count_, 0.0);
  }

  void backward(int64_t first, int64_t last) {
    tiles_.begin_row_gradients(first);
    for_each_tile(first, last, [&](int64_t i, int64_t j) {
      float* student = student_scores_ + slot(i, j);
      float* teacher = teacher_scores_ + slot(i, j);
      if (!keep_) {
        score(i, j);
        exponentiate(i, j, student, teacher);
      }
      if (i == j) {
        difference_on_diagonal(i, student, teacher);
      } else {
        difference(i, j, student, teacher);
      }
      tiles_.add_gradients(i, j, i != j);
    });
    tiles_.end_gradients(last);
  }

  void exponentiate(int64_t i, int64_t j, float* student, float* teacher) {
    for (int64_t row = 0; row < tiles_.side(i); ++row) {
      const Vec student_half(student_.half[i * kTile + row]), teacher_half(teacher_.half[i * kTile + row]);
      for (int64_t c = begin(i, j, row); c < tiles_.side(j); c += Vec::size()) {
        const int64_t column = j * kTile + c;
        float* s = student + row * kTile + c;
        float* t = teacher + row * kTile + c;
        exp2_of_negative((Vec::loadu(s) - (Vec::loadu(student_.half + column) + student_half)) * Vec(student_.scale))
            .store(s);
        exp2_of_negative((Vec::loadu(t) - (Vec::loadu(teacher_.half + column) + teacher_half)) * Vec(teacher_.scale))
            .store(t);
      }
    }
  }

  // (G + Gᵀ) · factor of tile (i, j), off the diagonal.
  void difference(int64_t i, int64_t j, float* student, const float* teacher) {
    tiles_.gradient.begin(student);
    const Gradient<Element> gradient = tiles_.gradient; // in registers: a member is read again after every store
    for (int64_t c = 0; c < tiles_.side(j); c += Vec::size()) {
      const Columns columns(*this, j * kTile + c);
      for (int64_t row = 0; row < tiles_.side(i); row += 2) {
        const int64_t r = i * kTile + row;
        const float* s = student + row * kTile + c;
        const float* t = teacher + row * kTile + c;
        gradient.store(row, c, columns.difference(r, s, t), columns.difference(r + 1, s + kTile, t + kTile));
      }
    }
  }

  // The same on the diagonal, from the blocks that were computed, in the place of the student's exponentials.
  void difference_on_diagonal(int64_t i, float* student, const float* teacher) {
    for (int64_t c = 0; c < tiles_.side(i); c += Vec::size()) {
      const Columns columns(*this, i * kTile + c);
      for (int64_t row = 0; row < c / 16 * 16 + 16; ++row) { // down to the column's block on the diagonal
        float* s = student + row * kTile + c;
        columns.difference(i * kTile + row, s, teacher + row * kTile + c).store(s);
      }
    }
    for (int64_t block = 0; block + 16 < tiles_.side(i); block += 16) {
      const float* right = student + block * kTile + block + 16;
      transpose(16, tiles_.side(i) - block - 16, right, kTile, student + (block + 16) * kTile + block, kTile);
    }
    tiles_.gradient.pack(tiles_.side(i), tiles_.side(i), student, /*columns*/ false);
  }

  // What a vector of columns brings to the gradient.
  struct Columns {
    Columns(const SymmetricForm& form, int64_t column)
        : student(form.student_),
          teacher(form.teacher_),
          s_weight(Vec::loadu(student.weight + column)),
          s_inverse(Vec::loadu(student.inverse + column)),
          t_weight(Vec::loadu(teacher.weight + column)),
          t_inverse(Vec::loadu(teacher.inverse + column)) {}

    // Where they meet `row`, from the exponentials there.
    Vec difference(int64_t row, const float* s, const float* t) const {
      const Vec s_factor = at::vec::fmadd(s_weight, Vec(student.inverse[row]), s_inverse * Vec(student.weight[row]));
      const Vec t_factor = at::vec::fmadd(t_weight, Vec(teacher.inverse[row]), t_inverse * Vec(teacher.weight[row]));
      return at::vec::fmsub(Vec::loadu(s), s_factor, Vec::loadu(t) * t_factor);
    }

    const Side student, teacher; // copies, in registers
    const Vec s_weight, s_inverse, t_weight, t_inverse;
  };

    static constexpr int64_t kRows = 4; // whose row sums and common column sums fit in the registers

  HeadTiles<Element> tiles_;
  Head next_;
  Tokens grad_;
  const bool keep_;
  float* student_scores_;
  float* teacher_scores_;
  Side student_, teacher_;
  float* offset_; // log2 of the teacher's weight over the student's
  float* weighted_sum_;
  std::vector<LaneSums> lanes_;
  int64_t count_ = 0;
  int64_t asked_ = 0; // tokens of the next head
  int64_t tokens_per_step_ = 0; // to ask for with every kRows rows of a tile
};

} // namespace
} // namespace fastkd
