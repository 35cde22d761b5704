// fastkd::attribution_distance_cpp: the distance between gradient attributions, and its gradients. Schema and formula
// stand in fastkd/ops/attribution_distance.py. This file is compiled once per instruction set; the library that fits the
// CPU is loaded.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <c10/util/string_view.h>

#include <limits>
#include <tuple>
#include <vector>

#include "cos_nce_rows.h"
#include "output_rows.h"

namespace fastkd {
namespace {

enum class Form { kNorm, kSum, kSaliency };
enum class Norm { kNone, kL1, kL2 };
enum class Kind { kL1, kL2, kSmoothL1 };

// φ and its derivative.
std::pair<double, double> apart(Kind kind, double z) {
  const double size = std::abs(z);
  switch (kind) {
    case Kind::kL2:
      return {z * z, 2 * z};
    case Kind::kL1:
      return {size, z > 0 ? 1 : z < 0 ? -1 : 0};
    default:
      return size < 1 ? std::pair{0.5 * z * z, z} : std::pair{size - 0.5, z > 0 ? 1. : -1.};
  }
}

// From the scores of one sequence and class to D / (B n), and in `pull` to its derivatives w, as `weighted` says.
float compare(const std::vector<int64_t>& tokens, const float* scores, const float* teacher, Norm norm, Kind kind,
              int64_t batch, bool weighted, float* pull) {
  const double weight = 1. / static_cast<double>(batch * std::max<int64_t>(tokens.size(), 1));
  double size = norm == Norm::kNone ? 1 : 0;
  bool says = false;
  for (const int64_t l : tokens) {
    const double a = scores[l];
    size += norm == Norm::kL2 ? a * a : norm == Norm::kL1 ? std::abs(a) : 0;
    says |= teacher[l] != 0;
  }
  if (norm == Norm::kL2) {
    size = std::sqrt(size);
  }
  const double inverse = size == 0 ? 0 : 1 / size + 0 * size; // an infinite size must not end as the inverse 0
  double sum = 0, along = 0;
  for (const int64_t l : tokens) {
    const double normalised = scores[l] * inverse;
    const auto [each, slope] = apart(kind, normalised - teacher[l]);
    sum += each;
    along += slope * normalised;
  }
  const bool finite = std::isfinite(static_cast<float>(sum));
  for (const int64_t l : tokens) {
    const double a = scores[l], normalised = a * inverse;
    const double turn = norm == Norm::kL2 ? normalised : norm == Norm::kL1 ? double((a > 0) - (a < 0)) : 0;
    const double slope = apart(kind, normalised - teacher[l]).second;
    pull[l] = says && finite ? static_cast<float>((slope - turn * along) * inverse * (weighted ? weight : 1)) : 0.f;
  }
  return !says ? 0.f : finite ? static_cast<float>(sum * weight) : std::numeric_limits<float>::quiet_NaN();
}

// As many floats as one vector of T holds.
template <typename T>
auto floats_of_a_vector(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return std::array<Vec, 1>{Vec::loadu(from)};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
    return std::array<Vec, 2>{low, high};
  }
}

template <typename T, size_t kParts>
at::vec::Vectorized<T> rounded(const std::array<Vec, kParts>& floats) {
  if constexpr (kParts == 1) {
    return floats[0];
  } else {
    return at::vec::convert_from_float<T>(floats[0], floats[1]);
  }
}

// One token's row of G of one class, and what it and x get.
template <typename T, Form kForm>
struct Pulled {
  const T* gradient;
  std::optional<typename OutputRows<T>::Row> to;
  float pull, inverse; // w, 1 / a

  template <typename Number>
  std::pair<Number, Number> of(const Number& g, const Number& x) const {
    const Number w(pull), by(inverse);
    if constexpr (kForm == Form::kSum) {
      return {w * x, w * g};
    } else if constexpr (kForm == Form::kSaliency) {
      return {g * by * w, g};
    } else {
      const Number direction = g * x * by;
      return {direction * (x * w), direction * (g * w)}; // 1 / a times w alone may overflow
    }
  }
};

template <typename T, Form kForm>
class Sequences {
 public:
  Sequences(const Tensor& gradient, const Tensor& inputs, const Tensor& teacher, const Valid& valid,
            bool weighted, Norm norm, Kind kind, Tensor& sums, Tensor& of_gradient, Tensor& of_inputs)
      : batch_(gradient.size(0)), classes_(gradient.size(1)), length_(gradient.size(2)), width_(gradient.size(3)),
        gradient_(gradient), inputs_(inputs), teacher_(teacher.const_data_ptr<float>()), valid_(valid),
        weighted_(weighted), norm_(norm), kind_(kind),
        sums_(sums.mutable_data_ptr<float>()), zeros_(width_) {
    if (of_gradient.dim() == 4) {
      of_gradient_.emplace(of_gradient, width_);
    }
    if (of_inputs.dim() == 3) {
      of_inputs_.emplace(of_inputs, width_);
    }
  }

  void run(int64_t begin, int64_t end) const {
    std::vector<float> scores(classes_ * length_), pull(classes_ * length_);
    std::vector<int64_t> tokens;
    for (int64_t b = begin; b < end; ++b) {
      tokens.clear();
      for (int64_t l = 0; l < length_; ++l) {
        if (valid_(b, l)) {
          tokens.push_back(l);
        }
      }
      score(b, tokens, scores);
      for (int64_t k = 0; k < classes_; ++k) {
        const int64_t i = b * classes_ + k;
        sums_[i] = compare(tokens, scores.data() + k * length_, teacher_ + i * length_, norm_, kind_,
                           batch_, weighted_, pull.data() + k * length_);
      }
      if (of_gradient_ || of_inputs_) {
        differentiate(b, tokens, scores, pull);
      }
    }
    for (const auto* rows : {&of_gradient_, &of_inputs_}) {
      if (*rows) {
        (*rows)->flush();
      }
    }
  }

 private:
  void score(int64_t b, const std::vector<int64_t>& tokens, std::vector<float>& scores) const {
    for (size_t t = 0; t < tokens.size(); ++t) {
      const int64_t l = tokens[t];
      const T* const x = inputs_.at(b, 0, l);
      for (int64_t k = 0; k < classes_; ++k) {
        if (t + 1 < tokens.size()) {
          gradient_.prefetch(b, k, tokens[t + 1]);
          inputs_.prefetch(b, 0, tokens[t + 1]);
        }
        const T* const g = gradient_.at(b, k, l);
        const auto [sum] = dots<1>(width_, [&](auto load) {
          const Vec of_g = load(g);
          const Vec product = kForm == Form::kSaliency ? of_g : of_g * load(x);
          return std::array<std::pair<Vec, Vec>, 1>{{{product, kForm == Form::kSum ? Vec(1.f) : product}}};
        });
        scores[k * length_ + l] = kForm == Form::kSum ? sum : std::sqrt(sum);
      }
    }
  }

  // From the last token to the first: what was read last is in a nearer cache.
  void differentiate(int64_t b, const std::vector<int64_t>& tokens, const std::vector<float>& scores,
                     const std::vector<float>& pull) const {
    std::vector<Pulled<T, kForm>> pulled;
    size_t left = tokens.size();
    for (int64_t l = length_; l-- > 0;) {
      const bool token = left && tokens[left - 1] == l;
      left -= token;
      pulled.clear();
      for (int64_t k = 0; k < classes_; ++k) {
        const float w = token ? pull[k * length_ + l] : 0.f, a = token ? scores[k * length_ + l] : 0.f;
        std::optional<typename OutputRows<T>::Row> to;
        if (of_gradient_) {
          to.emplace((*of_gradient_)[(b * classes_ + k) * length_ + l]);
        }
        if (w != 0 && (kForm == Form::kSum || a != 0)) {
          pulled.push_back({gradient_.at(b, k, l), to, w, 1 / a});
        } else if (to) {
          write_zeros(*to);
        }
      }
      std::optional<typename OutputRows<T>::Row> to;
      if (of_inputs_) {
        to.emplace((*of_inputs_)[b * length_ + l]);
      }
      if (pulled.size() == 1) {
        write(std::array{pulled[0]}, inputs_.at(b, 0, l), to); // a copy stays in registers
      } else if (!pulled.empty()) {
        write(pulled, inputs_.at(b, 0, l), to);
      } else if (to) {
        write_zeros(*to);
      }
    }
  }

  void write_zeros(const typename OutputRows<T>::Row& to) const {
    to.write(zeros_.data(), [](auto zero, int64_t) { return zero; });
  }

  template <typename AllPulled>
  void write(const AllPulled& pulled, const T* x, const std::optional<typename OutputRows<T>::Row>& of_inputs) const {
    constexpr int64_t kNumbers = at::vec::Vectorized<T>::size();
    constexpr size_t kParts = kNumbers / kLanes;
    int64_t column = 0;
    for (; column + kNumbers <= width_; column += kNumbers) {
      const std::array<Vec, kParts> of_x = floats_of_a_vector(x + column);
      std::array<Vec, kParts> sum;
      sum.fill(Vec(0.f));
      for (const auto& each : pulled) {
        const std::array<Vec, kParts> of_g = floats_of_a_vector(each.gradient + column);
        std::array<Vec, kParts> made;
        for (size_t part = 0; part < kParts; ++part) {
          const auto [of_gradient, more] = each.of(of_g[part], of_x[part]);
          made[part] = of_gradient;
          sum[part] = sum[part] + more;
        }
        if (each.to) {
          each.to->put(column, rounded<T>(made));
        }
      }
      if (of_inputs) {
        of_inputs->put(column, rounded<T>(sum));
      }
    }
    for (; column < width_; ++column) {
      float sum = 0.f;
      for (const auto& each : pulled) {
        const auto [of_gradient, more] = each.of(static_cast<float>(each.gradient[column]), static_cast<float>(x[column]));
        if (each.to) {
          each.to->put(column, static_cast<T>(of_gradient));
        }
        sum += more;
      }
      if (of_inputs) {
        of_inputs->put(column, static_cast<T>(sum));
      }
    }
  }

  int64_t batch_, classes_, length_, width_;
  Rows<T> gradient_, inputs_;
  const float* teacher_;
  Valid valid_;
  bool weighted_;
  Norm norm_;
  Kind kind_;
  float* sums_;
  std::vector<float> zeros_;
  std::optional<OutputRows<T>> of_gradient_, of_inputs_;
};

template <typename Value>
Value named(c10::string_view name, std::initializer_list<std::pair<const char*, Value>> values) {
  for (const auto& [known, value] : values) {
    if (name == known) {
      return value;
    }
  }
  TORCH_CHECK_VALUE(false, "attribution_distance_cpp does not know ", name);
}

std::tuple<Tensor, Tensor, Tensor> attribution_distance(
    const Tensor& gradient, const MaybeTensor& inputs, const Tensor& teacher, const MaybeTensor& mask,
    bool weighted, c10::string_view reduce, c10::string_view norm, c10::string_view kind,
    bool gradient_wanted, bool inputs_wanted) {
  const auto contiguous = gradient.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor sums = at::empty(gradient.sizes().slice(0, 2), contiguous.dtype(at::kFloat));
  Tensor of_gradient = at::empty(gradient_wanted ? gradient.sizes() : at::IntArrayRef{0}, contiguous);
  Tensor of_inputs = at::empty(inputs_wanted ? inputs->sizes() : at::IntArrayRef{0}, contiguous);
  if (sums.numel() == 0) {
    of_inputs.zero_();
    return {sums, of_gradient, of_inputs};
  }
  const Norm over = named<Norm>(norm, {{"none", Norm::kNone}, {"l1", Norm::kL1}, {"l2", Norm::kL2}});
  const Kind by = named<Kind>(kind, {{"l1", Kind::kL1}, {"l2", Kind::kL2}, {"smooth_l1", Kind::kSmoothL1}});
  const bool summed = named<bool>(reduce, {{"norm", false}, {"sum", true}});
  const Tensor x = inputs ? inputs->unsqueeze(1) : gradient;
  const int64_t numbers = std::max<int64_t>(gradient.numel() / gradient.size(0), 1);
  with_type_of_vectors(gradient, [&](auto type) {
    const auto run = [&](const auto& sequences) {
      at::parallel_for(0, gradient.size(0), std::max<int64_t>(16384 / numbers, 1),
                       [&](int64_t begin, int64_t end) { sequences.run(begin, end); });
    };
    using T = decltype(type);
    const auto make = [&]<Form kForm>() {
      run(Sequences<T, kForm>(gradient, x, teacher, Valid(mask), weighted, over, by, sums, of_gradient, of_inputs));
    };
    if (!inputs) {
      make.template operator()<Form::kSaliency>();
    } else if (summed) {
      make.template operator()<Form::kSum>();
    } else {
      make.template operator()<Form::kNorm>();
    }
  });
  return {sums, of_gradient, of_inputs};
}

} // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attribution_distance_cpp", attribution_distance);
}

} // namespace fastkd
