// The gradient of a lookup: who contributes to a row is sorted by rows, then every row is summed by one thread in the
// order of its tokens. The formula stands in fastkd/ops/sparse_embedding.py.
#pragma once

#include <ATen/Parallel.h>

#include <numeric>
#include <ranges>

#include "sparse_code.h"

namespace fastkd {
namespace {

// `weight` times the upstream gradient of `token`, as a part of the gradient of `row`.
struct Contribution {
  int64_t row, token;
  float weight;
};

// Contributions by row, within a row by token: a counting sort.
class Segments {
 public:
  Segments(const std::vector<Contribution>& contributions, int64_t rows)
      : begins_(rows + 1), sorted_(contributions.size()) {
    for (const Contribution& one : contributions) {
      ++begins_[one.row + 1];
    }
    std::partial_sum(begins_.begin(), begins_.end(), begins_.begin());
    std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
    for (const Contribution& one : contributions) {
      sorted_[next[one.row]++] = one;
    }
  }

  const Contribution* begin_of(int64_t row) const {
    return sorted_.data() + begins_[row];
  }

  const Contribution* end_of(int64_t row) const {
    return sorted_.data() + begins_[row + 1];
  }

  // function(row, panel) for every row and each of so many panels of its columns, in parallel. Threads share the
  // contributions evenly, not the rows: the most frequent token may own a tenth of a batch.
  template <typename Function>
  void for_each_row(int64_t panels, Function function) const {
    const int64_t rows = static_cast<int64_t>(begins_.size()) - 1, costs = cost_before(rows), all = costs * panels;
    const int64_t threads = all < 1024 ? 1 : at::get_num_threads();
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const int64_t from = all * first / threads, to = all * last / threads;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t begin = row_at(from - panel * costs), end = row_at(to - panel * costs);
        for (int64_t row = begin; row < end; ++row) {
          function(row, panel);
        }
      }
    });
  }

 private:
  int64_t cost_before(int64_t row) const {
    return begins_[row] + row; // writing a row costs about as much as one contribution to it
  }

  int64_t row_at(int64_t cost) const {
    const auto rows = std::views::iota(int64_t{0}, static_cast<int64_t>(begins_.size()) - 1);
    return std::ranges::partition_point(rows, [&](int64_t row) { return cost_before(row) < cost; }) - rows.begin();
  }

  std::vector<int64_t> begins_;
  std::vector<Contribution> sorted_;
};

// What the tokens of a batch give to kept rows, and which tokens stand for each coded row.
struct Contributions {
  Segments to_kept_rows, of_coded_rows;
};

inline Contributions contributions_of(const Code& code, const Tensor& ids, int64_t padding_idx) {
  const Ids tokens(ids);
  const int64_t count = ids.numel();
  std::vector<Contribution> kept, coded;
  kept.reserve(count);
  Recipe recipe(code.atoms, 0);
  for (int64_t token = 0; token < count; ++token) {
    if (tokens[token] == padding_idx) {
      continue;
    }
    if (!code.find(tokens[token], recipe)) {
      code.throw_for(tokens[token]);
    }
    for (int64_t a = 0; a < recipe.count; ++a) {
      kept.push_back({recipe.rows[a], token, recipe.weights[a]});
    }
    if (recipe.coded >= 0) {
      coded.push_back({recipe.coded, token, 1.f});
    }
  }
  return {Segments(kept, code.num_kept), Segments(coded, code.num_coded)};
}

// out (width floats from `column` on) = the sum of weight · upstream[token].
template <typename Upstream>
void sum_contributions(const Contribution* begin, const Contribution* end, const Upstream* upstream, int64_t stride,
                       int64_t width, float* out) {
  constexpr int64_t kSize = Vec::size();
  over_columns(width, [&](auto vectors, int64_t column) {
    constexpr int kVectors = decltype(vectors)::value;
    if constexpr (kVectors == 0) {
      float sum = 0.f;
      for (const Contribution* one = begin; one != end; ++one) {
        sum += one->weight * static_cast<float>(upstream[one->token * stride + column]);
      }
      out[column] = sum;
    } else {
      Vec sums[kVectors];
      std::fill(sums, sums + kVectors, Vec(0.f));
      for (const Contribution* one = begin; one != end; ++one) {
        const Upstream* from = upstream + one->token * stride + column;
        for (int i = 0; i < kVectors; ++i) {
          sums[i] = at::vec::fmadd(Vec(one->weight), floats_at(from + i * kSize), sums[i]);
        }
      }
      for (int i = 0; i < kVectors; ++i) {
        sums[i].store(out + column + i * kSize);
      }
    }
  });
}

template <typename Upstream>
void sum_into_kept_rows(const Tensor& upstream, const Segments& segments, Tensor& d_kept) {
  constexpr int64_t kPanel = 256;
  const int64_t width = d_kept.size(1);
  with_type_of_table(d_kept.scalar_type(), "kept", [&](auto type) {
    using Out = decltype(type);
    segments.for_each_row((width + kPanel - 1) / kPanel, [&](int64_t row, int64_t panel) {
      const int64_t column = panel * kPanel, columns = std::min(kPanel, width - column);
      float sums[kPanel];
      sum_contributions(segments.begin_of(row), segments.end_of(row), upstream.const_data_ptr<Upstream>() + column,
                        width, columns, sums);
      at::vec::convert(sums, d_kept.mutable_data_ptr<Out>() + row * width + column, columns);
    });
  });
}

// d weights of a coded row are the dot products of its kept rows with the sum of its tokens' gradients.
template <typename Upstream>
void sum_into_weights(const Tensor& upstream, const Segments& segments, const Code& code, const Indices& atom_ids,
                      Tensor& d_weights) {
  with_type_of<float, c10::Half>(d_weights.scalar_type(), "atom_weights", [&](auto type) {
    using Out = decltype(type);
    with_type_of_rows(code.kept_dtype, [&](auto kept_type) {
      using Kept = decltype(kept_type);
      segments.for_each_row(1, [&](int64_t coded, int64_t) {
        Out* out = d_weights.mutable_data_ptr<Out>() + coded * code.atoms;
        if (segments.begin_of(coded) == segments.end_of(coded)) {
          std::fill(out, out + code.atoms, Out(0.f));
          return;
        }
        thread_local std::vector<float> sum;
        sum.resize(code.width);
        sum_contributions(segments.begin_of(coded), segments.end_of(coded), upstream.const_data_ptr<Upstream>(),
                          code.width, code.width, sum.data());
        for (int64_t a = 0; a < code.atoms; ++a) {
          const int64_t row = atom_ids[coded * code.atoms + a];
          const Kept* values = code.row<Kept>(row);
          const float dot = sum_over_columns(
              code.width,
              [&](int64_t column) { return Vec::loadu(sum.data() + column) * floats_at(values + column); },
              [&](int64_t column) { return sum[column] * static_cast<float>(values[column]); });
          out[a] = static_cast<Out>(dot * code.kept_scale(row));
        }
      });
    });
  });
}

} // namespace
} // namespace fastkd
