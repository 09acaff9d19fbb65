// Runs an AOTInductor package of tools/export.py without Python: ones in, the outputs' shapes and ranges
// out.
//
//   run_aoti model.pt2 HEIGHT WIDTH [OPERATORS.so]
//
// OPERATORS.so is lf_dense/backends/_operators_cpu.so, for a model that was exported with --attention
// operator. docs/export.md has the command that compiles this file.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int64_t size(const char* text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text, &end, 10);
  if (*end || value < 1) throw std::invalid_argument(std::string(text) + " is no height or width in pixels.");
  return value;
}

void run(const std::string& model, int64_t height, int64_t width) {
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader loader(model);
  const std::vector<at::Tensor> outputs =
      loader.run(std::vector<at::Tensor>{at::ones({1, 3, height, width})});
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::cout << "output " << i << ": " << outputs[i].sizes() << " from " << outputs[i].min().item<double>()
              << " to " << outputs[i].max().item<double>() << "\n";
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: " << arguments[0] << " model.pt2 HEIGHT WIDTH [OPERATORS.so]\n";
    return 2;
  }
  // The model looks its operators up by name, so the library has to be there before it is loaded.
  if (count > 4 && !dlopen(arguments[4], RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << "error: " << dlerror() << "\n";
    return 2;
  }
  try {
    run(arguments[1], size(arguments[2]), size(arguments[3]));
  } catch (const std::exception& error) {
    const std::string what = error.what();
    std::cerr << "error: " << what.substr(0, what.find('\n')) << "\n";
    return 2;
  }
  return 0;
}
