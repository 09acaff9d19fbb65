#include <cstdlib>
#include <stdexcept>
#include <string>

#include "vector_kernels.h"

namespace lf {

namespace plain {
extern const InstructionSet instructions;
}
#if defined(LF_HAS_X86)
namespace avx2 {
extern const InstructionSet instructions;
}
namespace avx512bf16 {
extern const InstructionSet instructions;
}
namespace avx512 {
extern const InstructionSet instructions;
}
#endif

// The plain one runs anywhere.
const InstructionSet* const compiled_instruction_sets[] = {
#if defined(LF_HAS_X86)
    &avx512bf16::instructions,  // 64 bytes, and products of bfloat16
    &avx512::instructions,      // 64 bytes
    &avx2::instructions,        // 32
#endif
    &plain::instructions,  // 16
    nullptr,
};

namespace {

const InstructionSet& choose() {
  const char* wanted = std::getenv("LF_DENSE_INSTRUCTION_SET");
  std::string names;
  for (auto entry = compiled_instruction_sets; *entry; ++entry) {
    const InstructionSet* set = *entry;
    if (!set->supported()) continue;
    if (!wanted || !*wanted || std::string(wanted) == set->name) return *set;
    names += names.empty() ? set->name : std::string(", ") + set->name;
  }
  throw std::runtime_error("the environment variable LF_DENSE_INSTRUCTION_SET is '" + std::string(wanted) +
                           "', which this processor does not run or this build does not have: use one of " +
                           names + ".");
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace lf
