// One relation head of one sequence: its operands in tiles, the products of tiles, and the gradient they add up to.
// Both forms of relation_kl, in strips and symmetric, are written over this. Formulas: fastkd/ops/relation_kl.py.
#pragma once

#include <cmath>

#include "operand.h"
#include "operand_bf16.h"

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

// Where one head lies. Of a self relation the right sides are those on the left; the gradients are there `with_grad`, and
// get the factor `weight`.
struct Head {
  Tokens student, student_right;
  Tokens teacher, teacher_right;
  Tokens grad, grad_right;
  float weight = 1.f;
};

// From a dot product to a score in units of log2(e), in which the exponential is a power of two.
inline float score_scale(int64_t width) {
  return static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(width)));
}

// Sums over the columns of the 64 rows of a tile: of the student's and of the teacher's exponentials, and of the teacher's
// times the difference of the scores. Kept per vector lane, and added up once at the end of the row.
struct LaneSums {
  alignas(64) float student[kTile * Vec::size()];
  alignas(64) float teacher[kTile * Vec::size()];
  alignas(64) float weighted[kTile * Vec::size()];

  void clear() {
    std::fill(std::begin(student), std::end(student), 0.f);
    std::fill(std::begin(teacher), std::end(teacher), 0.f);
    std::fill(std::begin(weighted), std::end(weighted), 0.f);
  }
};

// Element: of the tiles that are multiplied. Sums, scores and exponentials are fp32.
template <typename Element>
class HeadTiles {
 public:
  // `keep`: all tiles of the operands stay packed. Else four row tiles are worked on together, so that the column tiles
  // that meet them are packed once for 256 rows; one row tile where the heads are wide.
  // Scratch in floats, with n = the longest sequence rounded up to tiles, s and t the widths rounded up to 16:
  //   keep:  n · (2s + 2t), twice for a cross relation, + (n + 64) · s for the gradient
  //   else:  320 · (2s + 2t) + (n + 256) · s; wide 128 · (2s + 2t) + (n + 64) · s: of the length depends the gradient
  //          of the columns alone
  // The same for bf16 tiles, which are half as large and lie twice, but for 4096 floats more.
  HeadTiles(Arena& arena, const Relation& relation, bool keep)
      : relation(relation),
        group(keep || relation.student_width + relation.teacher_width > 128 ? 1 : 4),
        gradient(arena),
        shared_(keep && !relation.cross),
        student_(arena, relation.student_width, keep ? tiles_of(relation.longest) : group, relation.with_grad),
        teacher_(arena, relation.teacher_width, keep ? tiles_of(relation.longest) : group, false),
        student_right_(arena, relation.student_width, right_slots(relation, keep), relation.with_grad),
        teacher_right_(arena, relation.teacher_width, right_slots(relation, keep), false),
        row_grad_(arena.take(relation.with_grad ? group * kTile * student_.ld : 0)),
        column_grad_(arena.take(relation.with_grad ? tiles_of(relation.longest) * kTile * student_.ld : 0)) {}

  void bind(const Head& head) {
    head_ = head;
    student_.bind(head.student);
    teacher_.bind(head.teacher);
    student_right_.bind(relation.cross ? head.student_right : head.student);
    teacher_right_.bind(relation.cross ? head.teacher_right : head.teacher);
    if (relation.with_grad) {
      std::fill(column_grad_, column_grad_ + tiles() * kTile * student_.ld, 0.f);
    }
  }

  int64_t tiles() const {
    return tiles_of(head_.student.count);
  }

  int64_t tokens(int64_t tile) const {
    return std::min(kTile, head_.student.count - tile * kTile);
  }

  int64_t side(int64_t tile) const { // what is computed: the tokens rounded up to a multiple of 16
    return padded(tokens(tile));
  }

  float gradient_factor() const { // of S − P, in the gradient
    return head_.weight / std::sqrt(static_cast<float>(relation.student_width));
  }

  // The dot products of tile (i, j).
  void score(int64_t i, int64_t j, float* student, float* teacher) {
    product(side(i), side(j), student_.depth, student_.left(i), student_.left_ld, student_right().right(j), kTile,
            student, kTile, false);
    product(side(i), side(j), teacher_.depth, teacher_.left(i), teacher_.left_ld, teacher_right().right(j), kTile,
            teacher, kTile, false);
  }

  // The same for a tile on the diagonal of a self relation, at least from each row's block of 16 on: it is symmetric. In
  // bf16 the calls that taller panels save take longer than the products that they add.
  void score_diagonal(int64_t i, float* student, float* teacher) {
    constexpr int64_t kPanel = std::is_same_v<Element, float> ? 16 : 32;
    for (int64_t row = 0; row < side(i); row += kPanel) {
      const int64_t rows = std::min(kPanel, side(i) - row), columns = side(i) - row, at = row * kTile + row;
      product(rows, columns, student_.depth, student_.left(i, row), student_.left_ld, student_.right(i, row), kTile,
              student + at, kTile, false);
      product(rows, columns, teacher_.depth, teacher_.left(i, row), teacher_.left_ld, teacher_.right(i, row), kTile,
              teacher + at, kTile, false);
    }
  }

  void begin_row_gradients(int64_t first) {
    first_ = first;
    std::fill(row_grad_, row_grad_ + group * kTile * student_.ld, 0.f);
  }

  // Adds what tile (i, j) of G, in `gradient`, gives to the gradient of its rows, G · Right, and, if `columns`, to that
  // of its columns, Gᵀ · Left.
  void add_gradients(int64_t i, int64_t j, bool columns) {
    product(side(i), student_.ld, side(j), gradient.rows, kTile, student_right().row_factor(j), student_.ld, row_grad(i),
            student_.ld, true);
    if (columns) { // as (Leftᵀ · G)ᵀ, which needs no transpose of G
      product(relation.student_width, side(j), side(i), student_.column_factor(i), kTile, gradient.columns, kTile,
              column_grad(j), kTile, true);
    }
  }

  void end_row_gradients(int64_t last) {
    for (int64_t i = first_; i < last; ++i) {
      if (relation.cross) {
        store_rows(row_grad(i), student_.ld, head_.grad, i * kTile);
      } else {
        add_transposed(side(i), student_.ld, row_grad(i), student_.ld, column_grad(i), kTile);
      }
    }
  }

  // For forms that ask for the gradients of columns right of their rows only: those of these columns are complete.
  void end_gradients(int64_t last) {
    for (int64_t i = first_; i < last; ++i) {
      if (i > 0) {
        add_transposed(student_.ld, side(i), column_grad(i), kTile, row_grad(i), student_.ld);
      }
      store_rows(row_grad(i), student_.ld, head_.grad, i * kTile);
    }
  }

  void end_column_gradients() {
    for (int64_t j = 0; j < tiles(); ++j) {
      transpose(student_.ld, side(j), column_grad(j), kTile, row_grad_, student_.ld);
      store_rows(row_grad_, student_.ld, relation.cross ? head_.grad_right : head_.grad, j * kTile);
    }
  }

  const Relation relation;
  const int64_t group; // row tiles worked on together
  Gradient<Element> gradient; // the tile of G that add_gradients takes up

 private:
  static int64_t right_slots(const Relation& relation, bool keep) {
    return !keep ? 1 : relation.cross ? tiles_of(relation.longest) : 0;
  }

  Operand<Element>& student_right() {
    return shared_ ? student_ : student_right_;
  }

  Operand<Element>& teacher_right() {
    return shared_ ? teacher_ : teacher_right_;
  }

  float* row_grad(int64_t tile) { // 64 × ld
    return row_grad_ + (tile - first_) * kTile * student_.ld;
  }

  float* column_grad(int64_t tile) { // transposed: ld × 64
    return column_grad_ + tile * kTile * student_.ld;
  }

  const bool shared_; // the tiles of a self relation are packed once for both sides
  Operand<Element> student_, teacher_, student_right_, teacher_right_;
  float* row_grad_;
  float* column_grad_;
  int64_t first_ = 0;
  Head head_;
};

} // namespace
} // namespace fastkd
