// fastkd::sparse_embedding_cpp on CPU, its backward and the embedding block. The schemas and the formulas stand in
// fastkd/ops/sparse_embedding.py. This file is compiled once per instruction set; the library that fits the CPU is
// loaded.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "embedding_block.h"
#include "output_rows.h"
#include "sparse_code.h"
#include "sparse_embedding_backward.h"

namespace fastkd {
namespace {

Tensor new_output(const Tensor& ids, int64_t width, const at::TensorOptions& options) {
  std::vector<int64_t> sizes = ids.sizes().vec();
  sizes.push_back(width);
  return at::empty(sizes, options);
}

// function(i, recipe) for the tokens from begin to end; the recipe is nullptr where the token cannot be looked up. The
// rows of the next token are on their way meanwhile.
template <typename Function>
void for_each_recipe(const Code& code, const Ids& ids, int64_t begin, int64_t end, Function function) {
  Recipe now(code.atoms, code.width), ahead(code.atoms, code.width);
  bool known = begin < end && code.find(ids[begin], now);
  for (int64_t i = begin; i < end; ++i) {
    const bool next = i + 1 < end && code.find(ids[i + 1], ahead);
    if (next) {
      code.prefetch(ahead);
    }
    function(i, known ? &now : nullptr);
    std::swap(now, ahead);
    known = next;
  }
}

Tensor sparse_embedding(const Tensor& ids, const Tensor& slot, const Tensor& kept, const MaybeTensor& kept_scale,
                        const Tensor& atom_ids, const Tensor& atom_weights, const MaybeTensor& weight_scale,
                        const MaybeTensor& residual, const MaybeTensor& codebook, at::ScalarType dtype) {
  const Code code(slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook);
  const Ids tokens(ids);
  Tensor out = new_output(ids, code.width, kept.options().dtype(dtype));
  Fault fault;
  with_type_of_table(dtype, "dtype", [&](auto type) {
    using Out = decltype(type);
    const OutputRows<Out> rows(out, code.width);
    const bool as_stored = code.kept_dtype == dtype;
    at::parallel_for(0, ids.numel(), tokens_per_task(code.width), [&](int64_t begin, int64_t end) {
      std::vector<float> sums(code.width);
      for_each_recipe(code, tokens, begin, end, [&](int64_t i, Recipe* recipe) {
        if (!recipe) {
          fault.at(i);
        } else if (as_stored && recipe->coded < 0) {
          rows[i].copy(code.row<Out>(recipe->rows[0]));
        } else if constexpr (std::is_same_v<Out, float>) {
          code.decode(*recipe, [row = rows[i]](auto values, int64_t column) { row.put(column, values); });
        } else {
          code.decode(*recipe, [&](auto values, int64_t column) { store(sums.data() + column, values); });
          rows[i].write(sums.data(), [](auto value, int64_t) { return value; });
        }
      });
      rows.flush();
    });
  });
  if (fault.token()) {
    code.throw_for(tokens[*fault.token()]);
  }
  return out;
}

std::tuple<Tensor, Tensor> sparse_embedding_backward(
    const Tensor& upstream, const Tensor& ids, const Tensor& slot, const Tensor& kept, const MaybeTensor& kept_scale,
    const Tensor& atom_ids, const Tensor& atom_weights, const MaybeTensor& weight_scale, const MaybeTensor& residual,
    const MaybeTensor& codebook, int64_t padding_idx, bool kept_wanted, bool weights_wanted) {
  const Code code(slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook);
  const Contributions found = contributions_of(code, ids, padding_idx);
  const Tensor dense = upstream.contiguous();
  Tensor d_kept = at::empty(kept_wanted ? kept.sizes() : at::IntArrayRef{0}, kept.options());
  Tensor d_weights = at::empty(weights_wanted ? atom_weights.sizes() : at::IntArrayRef{0}, atom_weights.options());
  with_type_of_table(upstream.scalar_type(), "upstream", [&](auto type) {
    if (kept_wanted) {
      sum_into_kept_rows<decltype(type)>(dense, found.to_kept_rows, d_kept);
    }
    if (weights_wanted) {
      sum_into_weights<decltype(type)>(dense, found.of_coded_rows, code, Indices(atom_ids), d_weights);
    }
  });
  return {d_kept, d_weights};
}

Tensor embedding_block(const Tensor& ids, const MaybeTensor& type_ids, const MaybeTensor& position_ids,
                       const Tensor& slot, const Tensor& kept, const MaybeTensor& kept_scale, const Tensor& atom_ids,
                       const Tensor& atom_weights, const MaybeTensor& weight_scale, const MaybeTensor& residual,
                       const MaybeTensor& codebook, const Tensor& positions, const MaybeTensor& types,
                       const Tensor& norm_weight, const Tensor& norm_bias, double eps, at::ScalarType dtype) {
  const Code code(slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook);
  const Block block(ids, type_ids, position_ids, positions, types, norm_weight, norm_bias, eps);
  const Ids tokens(ids);
  Tensor out = new_output(ids, code.width, kept.options().dtype(dtype));
  Fault fault;
  with_type_of_table(dtype, "dtype", [&](auto type) {
    using Out = decltype(type);
    const OutputRows<Out> rows(out, code.width);
    with_type_of_table(positions.scalar_type(), "positions", [&](auto table_type) {
      at::parallel_for(0, ids.numel(), tokens_per_task(code.width), [&](int64_t begin, int64_t end) {
        std::vector<float> x(code.width);
        for_each_recipe(code, tokens, begin, end, [&](int64_t i, Recipe* recipe) {
          if (recipe && block.in_range(i)) {
            block.compute<decltype(table_type)>(code, *recipe, i, x.data(), rows);
          } else {
            fault.at(i);
          }
        });
        rows.flush();
      });
    });
  });
  if (fault.token()) {
    block.check(*fault.token());
    code.throw_for(tokens[*fault.token()]);
  }
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("sparse_embedding_cpp", sparse_embedding);
  m.impl("sparse_embedding_backward_cpp", sparse_embedding_backward);
  m.impl("embedding_block_cpp", embedding_block);
}

} // namespace fastkd
