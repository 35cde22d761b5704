// fastkd::relation_kl_cpp: the attention-relation KL and its student gradient on CPU. The schema and the formulas stand
// in fastkd/ops/relation_kl.py. This file is compiled once per instruction set; the library that fits the CPU is loaded.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <atomic>
#include <numeric>
#include <optional>
#include <tuple>

#include "relation_kl_strip.h"
#include "relation_kl_symmetric.h"

namespace fastkd {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Which rows of a (B, L, D) or packed (T, D) tensor are the tokens of sequence b.
struct Batch {
  const int64_t* starts;
  const int32_t* lengths;
  const int32_t* order;
  int64_t order_stride;
  int64_t size;

  // Inputs are only read; for the gradients, which this file owns, the same addresses are written.
  Tokens tokens(const Tensor& x, int64_t sequence, int64_t head, int64_t num_heads) const {
    const int64_t bytes = x.element_size(), width = x.size(-1) / num_heads;
    const int64_t first = (x.dim() == 3 ? sequence : starts[sequence]) * x.stride(0) + head * width;
    return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + first * bytes,
            x.stride(-2) * bytes,
            x.scalar_type(),
            order ? order + sequence * order_stride : nullptr,
            lengths[sequence],
            width,
            width * bytes};
  }
};

void check(const Batch& batch, const Tensor& x) {
  for (int64_t b = 0; b < batch.size; ++b) {
    const int64_t start = x.dim() == 3 ? 0 : batch.starts[b];
    TORCH_CHECK(start >= 0 && batch.lengths[b] >= 0 && start + batch.lengths[b] <= x.size(-2), "relation_kl_cpp: sequence ",
                b, " has ", batch.lengths[b], " tokens from row ", start, " on, of ", x.size(-2));
  }
}

// The gradient of padding is zero. Padded tensors are cleared sequence by sequence, packed ones only where rows are left.
Tensor new_gradient(const MaybeTensor& of, const Batch& batch) {
  Tensor grad = at::empty(of->sizes(), of->options().memory_format(at::MemoryFormat::Contiguous));
  if (grad.dim() == 2 && std::accumulate(batch.lengths, batch.lengths + batch.size, int64_t{0}) < grad.size(0)) {
    std::memset(grad.data_ptr(), 0, grad.nbytes());
  }
  return grad;
}

void clear_padding(const Tokens& grad, int64_t num_heads, int64_t positions) { // given the first head, clears all
  for (int64_t i = grad.count; grad.first && i < positions; ++i) {
    std::memset(grad.at(i), 0, grad.bytes * num_heads);
  }
}

// How much scratch a form needs on each thread, beside 13 KiB of sums per row tile: with everything kept if that fits in
// 2 MiB, so that it stays in the caches, else with scores computed twice. Then, with n = the longest sequence rounded up
// to tiles, s and t the head widths rounded up to 16, it is n · (s + 10) + 896 s + 640 t + 8192 floats, wide heads
// n · (s + 10) + 320 s + 256 t + 8192, and 4096 more for bf16 tiles: within max(2 MiB, 4 n · (s + 64) bytes) for s + t <= 256, whatever the batch and
// the number of heads.
struct Plan {
  bool keep;
  int64_t floats;
};

template <typename Form>
Plan plan_of(const Relation& relation) {
  constexpr int64_t kLimit = 2 * 1024 * 1024 / sizeof(float);
  Arena everything(nullptr), little(nullptr);
  const Form kept(everything, relation, true), recomputed(little, relation, false);
  return everything.used() <= kLimit ? Plan{true, everything.used()} : Plan{false, little.used()};
}

// Computes the heads 0 ... tasks - 1 and returns their divergences. A head is computed by one thread, and its result does
// not depend on which. A thread takes several neighbouring heads at once, whose channels lie side by side, as long as
// enough are left for the others.
template <typename Element, typename HeadOf>
std::vector<double> run_heads(const Relation& relation, int64_t tasks, int64_t num_heads, int64_t padded_length,
                              const HeadOf& head_of) {
  using Strip = StripForm<Element>;
  using Symmetric = SymmetricForm<Element>;
  const bool symmetric = !relation.cross && !relation.causal;
  const Plan strip_plan = plan_of<Strip>(relation), symmetric_plan = plan_of<Symmetric>(relation);
  const int64_t scratch_bytes = std::max(strip_plan.floats, symmetric ? symmetric_plan.floats : 0) * sizeof(float);
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  std::vector<double> divergences(tasks);
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    // One after the other, the forms use the same scratch.
    Arena strip_arena(static_cast<float*>(scratch.get())), symmetric_arena(static_cast<float*>(scratch.get()));
    Strip strip(strip_arena, relation, strip_plan.keep);
    std::optional<Symmetric> half;
    if (symmetric) {
      half.emplace(symmetric_arena, relation, symmetric_plan.keep);
    }
    for (;;) {
      int64_t begin = taken, end;
      do {
        end = begin + std::clamp<int64_t>((tasks - begin) / (4 * threads), 1, 8);
      } while (!taken.compare_exchange_weak(begin, end));
      if (begin >= tasks) {
        break;
      }
      for (int64_t task = begin; task < end; ++task) {
        // Behind the last of these, the next that nobody has taken so far: mostly this thread does.
        const int64_t following = task + 1 < end ? task + 1 : taken.load();
        const Head head = head_of(task), next = following < tasks ? head_of(following) : Head();
        if (task % num_heads == 0) {
          clear_padding(head.grad, num_heads, padded_length);
          clear_padding(head.grad_right, num_heads, padded_length);
        }
        if (head.student.count > 0) {
          const std::optional<double> divergence = half ? half->run(head, next) : std::nullopt;
          divergences[task] = divergence ? *divergence : strip.run(head);
        }
      }
    }
    end_products<Element>();
  });
  return divergences;
}

std::tuple<Tensor, Tensor, Tensor> relation_kl(const Tensor& student, const MaybeTensor& student_right,
                                               const Tensor& teacher, const MaybeTensor& teacher_right,
                                               const Tensor& starts, const Tensor& lengths, const MaybeTensor& order,
                                               int64_t /*max_length*/, int64_t num_heads, bool causal,
                                               int64_t divisor, bool with_grad) {
  const Tensor starts_ = starts.contiguous(), lengths_ = lengths.contiguous();
  const MaybeTensor order_ = order ? MaybeTensor(order->contiguous()) : std::nullopt;
  const Batch batch{starts_.const_data_ptr<int64_t>(), lengths_.const_data_ptr<int32_t>(),
                    order_ ? order_->const_data_ptr<int32_t>() : nullptr, order_ ? order_->size(1) : 0, lengths_.size(0)};
  check(batch, student);

  const bool cross = student_right.has_value();
  Tensor losses = at::empty({batch.size}, lengths.options().dtype(at::kFloat));
  Tensor grad = with_grad ? new_gradient(student, batch) : at::empty({0}, student.options());
  Tensor grad_right = with_grad && cross ? new_gradient(student_right, batch) : at::empty({0}, student.options());

  std::vector<int64_t> longest_first(batch.size);
  std::iota(longest_first.begin(), longest_first.end(), 0);
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](int64_t a, int64_t b) { return batch.lengths[a] > batch.lengths[b]; });
  const Relation relation{batch.size ? batch.lengths[longest_first[0]] : 0,
                          student.size(-1) / num_heads,
                          teacher.size(-1) / num_heads,
                          cross,
                          causal,
                          with_grad};
  const auto rows_of = [&](int64_t b) { return std::max<int64_t>(batch.lengths[b], 1); };
  const bool folded = student.scalar_type() != at::kHalf; // see the schema
  const auto head_of = [&](int64_t task) {
    const int64_t b = longest_first[task / num_heads], h = task % num_heads;
    Head head;
    head.student = batch.tokens(student, b, h, num_heads);
    head.teacher = batch.tokens(teacher, b, h, num_heads);
    if (cross) {
      head.student_right = batch.tokens(*student_right, b, h, num_heads);
      head.teacher_right = batch.tokens(*teacher_right, b, h, num_heads);
    }
    if (with_grad) {
      head.grad = batch.tokens(grad, b, h, num_heads);
      head.weight = folded ? static_cast<float>(1.0 / static_cast<double>(num_heads * rows_of(b) * divisor)) : 1.f;
    }
    if (with_grad && cross) {
      head.grad_right = batch.tokens(grad_right, b, h, num_heads);
    }
    return head;
  };

  const int64_t tasks = batch.size * num_heads, padded_length = student.dim() == 3 ? student.size(1) : 0;
  const bool in_bf16 = kBf16Tiles && student.scalar_type() == at::kBFloat16 && teacher.scalar_type() == at::kBFloat16;
  const std::vector<double> divergences = in_bf16
      ? run_heads<std::conditional_t<kBf16Tiles, c10::BFloat16, float>>(relation, tasks, num_heads, padded_length, head_of)
      : run_heads<float>(relation, tasks, num_heads, padded_length, head_of);

  // Summed over heads in their order, so that the loss is the same for every number of threads.
  for (int64_t i = 0; i < batch.size; ++i) {
    const double* heads = divergences.data() + i * num_heads;
    const int64_t b = longest_first[i];
    losses.mutable_data_ptr<float>()[b] =
        static_cast<float>(std::accumulate(heads, heads + num_heads, 0.0) / static_cast<double>(num_heads * rows_of(b)));
  }
  return {losses, grad, grad_right};
}

} // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation_kl_cpp", relation_kl);
}

} // namespace fastkd
