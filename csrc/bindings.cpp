// fastkd._build: what the compiled part was built for. Importing it loads no operator.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> found;
  for (std::string word; stream >> word;) {
    found.push_back(word);
  }
  return found;
}

} // namespace

PYBIND11_MODULE(_build, m) {
  m.attr("torch_version") = FASTKD_TORCH_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "GCC " __VERSION__;
#else
  m.attr("compiler") = "an unnamed compiler";
#endif
  m.attr("cpu_libraries") = words(FASTKD_CPU_LIBRARIES);
  m.attr("cuda_archs") = words(FASTKD_CUDA_ARCHS);
}
