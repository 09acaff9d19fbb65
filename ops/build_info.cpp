// What was built and what this processor runs; imports without torch.
#include <pybind11/pybind11.h>

#include "cpu/vector_kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How lf_dense's operators were built.";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = LF_BUILD_COMPILER;
    info["torch"] = LF_BUILD_TORCH;
    info["torch_target"] = LF_BUILD_TORCH_TARGET;
    info["cuda"] = LF_BUILD_CUDA;
    info["cuda_architectures"] = LF_BUILD_CUDA_ARCHITECTURES;
    py::list compiled, supported;
    for (auto set = lf::compiled_instruction_sets; *set; ++set) {
      compiled.append((*set)->name);
      if ((*set)->supported()) supported.append((*set)->name);
    }
    info["instruction_sets_compiled"] = compiled;
    info["instruction_sets_supported"] = supported;
    return info;
  });
  m.def(
      "instruction_set", [] { return lf::instruction_set().name; },
      "The one in use; RuntimeError where LF_DENSE_INSTRUCTION_SET asks for another.");
}
