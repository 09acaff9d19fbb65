// The nodes of the ONNX domain lf_dense, version 1, without any runtime: a table, of which onnxruntime.cpp
// and openvino.cpp make operators. docs/operators.md says what each computes.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../cpu/laplacian_attention.h"
#include "../cpu/layers.h"
#include "../cpu/parallel.h"

namespace lf {

constexpr char kDomain[] = "lf_dense";

// A size that is not known yet is negative: a runtime may number those that it has a name for from -2 down.
constexpr int64_t kUnknown = -1;
using Dims = std::vector<int64_t>;
using Shapes = std::vector<Dims>;
// By the names that stand in a node's ports.
using Sizes = std::map<std::string_view, int64_t>;

// Each node has some of them.
struct Attributes {
  float scale = 0, eps = 0, tau = 0;
  int64_t iters = 0;
};

// An input or output: equal names are equal sizes, and a digit is that size.
struct Port {
  const char* name;
  std::vector<std::string_view> shape;
};

// What a node runs on; tensors are contiguous, and all of one dtype.
struct Call {
  const Attributes& attributes;
  const Sizes& sizes;
  DType dtype;
  const std::vector<char*>&inputs, &outputs;

  float* input(int index) const { return reinterpret_cast<float*>(inputs[index]); }
  float* output(int index) const { return reinterpret_cast<float*>(outputs[index]); }
  int64_t operator[](std::string_view name) const { return sizes.at(name); }
};

struct NodeKind {
  const char* name;
  std::vector<Port> inputs, outputs;
  std::vector<std::pair<const char*, float Attributes::*>> floats;
  std::vector<std::pair<const char*, int64_t Attributes::*>> integers;
  bool takes_halves;  // float16 and bfloat16, beside float32
  void (*check)(const NodeKind&, const Attributes&);
  // Checks how sizes depend on each other, and adds those that no input has.
  void (*relate)(const NodeKind&, Sizes&);
  void (*run)(const Call&);

  [[noreturn]] void refuse(const std::string& why) const {
    throw std::invalid_argument(std::string("lf_dense's ") + name + ": " + why);
  }
};

inline std::string as_text(int64_t size) { return size < 0 ? "?" : std::to_string(size); }
inline std::string as_text(std::string_view name) { return std::string(name); }
inline std::string as_text(const Port& port) { return port.name; }

template <typename Items>
std::string listed(const Items& items) {
  std::string list;
  for (const auto& item : items) list += (list.empty() ? "" : ", ") + as_text(item);
  return list;
}

// A batch may be empty, and so are the tables of an attention that turns nothing.
inline bool may_be_empty(std::string_view name) { return name == "B" || name == "pairs"; }

inline bool bind(std::string_view name, int64_t size, Sizes& sizes) {
  if (size == 0 && !may_be_empty(name)) return false;
  if (name[0] >= '0' && name[0] <= '9') return size < 0 || size == name[0] - '0';
  int64_t& known = sizes.try_emplace(name, size).first->second;
  if (known < 0) known = size < 0 ? known : size;
  return size < 0 || size == known;
}

inline bool bind(const Port& port, const Dims& dims, Sizes& sizes) {
  bool fits = dims.size() == port.shape.size();
  for (size_t i = 0; fits && i < dims.size(); ++i) fits = bind(port.shape[i], dims[i], sizes);
  return fits;
}

[[noreturn]] inline void refuse_shape(const NodeKind& node, size_t index, const Shapes& inputs) {
  const Port& port = node.inputs[index];
  Sizes sizes;
  for (size_t i = 0; i < index; ++i) bind(node.inputs[i], inputs[i], sizes);
  std::string known;
  for (const std::string_view name : port.shape) {
    const auto found = sizes.find(name);
    if (found == sizes.end() || found->second < 0) continue;
    known += (known.empty() ? " with " : ", ") + std::string(name) + " = " + as_text(found->second);
    sizes.erase(found);
  }
  const bool empty = std::count(inputs[index].begin(), inputs[index].end(), 0) > 0;
  node.refuse(as_text(port) + " has shape (" + listed(inputs[index]) + "), and has to be (" +
              listed(port.shape) + ")" + known + (empty ? ", where B alone may be 0." : "."));
}

// The sizes that the inputs' shapes give; refuses shapes that do not belong together.
inline Sizes sizes_of(const NodeKind& node, const Shapes& inputs) {
  Sizes sizes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!bind(node.inputs[i], inputs[i], sizes)) refuse_shape(node, i, inputs);
  }
  node.relate(node, sizes);
  return sizes;
}

inline Dims shape_of(const Port& port, const Sizes& sizes) {
  Dims dims;
  for (const std::string_view name : port.shape) dims.push_back(sizes.at(name));
  return dims;
}

inline void run_node(const NodeKind& node, const Call& call) {
  if (call["B"] > 0) node.run(call);
}

inline bool is_positive(float value) { return value > 0 && std::isfinite(value); }

inline void check_attention(const NodeKind& node, const Attributes& a) {
  if (!is_positive(a.scale) || !is_positive(a.eps) || !(is_positive(a.tau) || a.tau == 0) || a.iters < 1) {
    node.refuse("scale is " + std::to_string(a.scale) + ", eps " + std::to_string(a.eps) + ", tau " +
                std::to_string(a.tau) + " and iters " + std::to_string(a.iters) +
                ": scale and eps have to be positive finite numbers, tau 0 or larger and iters at least 1.");
  }
}

inline void check_norm(const NodeKind& node, const Attributes& a) {
  if (!is_positive(a.eps))
    node.refuse("eps is " + std::to_string(a.eps) + ", and has to be a positive finite number.");
}

inline void check_nothing(const NodeKind&, const Attributes&) {}
inline void relate_nothing(const NodeKind&, Sizes&) {}

// A head has pairs that turn with the row, and as many that turn with the column.
inline void relate_heads(const NodeKind& node, Sizes& sizes) {
  const int64_t channels = sizes["C"], pairs = sizes["pairs"];
  if (pairs > 0 && channels >= 0 && channels % (4 * pairs) != 0) {
    node.refuse("the tables turn " + as_text(pairs) +
                " pairs with the row and as many with the column, and " + as_text(channels) +
                " channels are no whole number of heads of " + as_text(4 * pairs) + ".");
  }
}

// Contiguous (B, N, heads, d).
inline View token_view(const Call& call, char* data) {
  const int64_t heads = call["heads"], d = call["d"], tokens = call["N"];
  return {data, {call["B"], heads, tokens, d}, {tokens * heads * d, d, heads * d, 1}, call.dtype};
}

inline void run_attention(const Call& call) {
  const int64_t heads = call["heads"], m = call["m"], d = call["d"], all = call["B"] * heads;
  const View landmarks{call.inputs[3], {call["B"], heads, m, d}, {heads * m * d, m * d, d, 1}, call.dtype};
  // A backward pass would need these; all are small.
  const Scratch<float> inverse(all * m * m), sums(all * m * d), mass(all * m), mean_value(all * d);
  const Attributes& a = call.attributes;
  attention_forward<float>(token_view(call, call.inputs[0]), token_view(call, call.inputs[1]),
                           token_view(call, call.inputs[2]), landmarks, {a.scale, a.tau}, a.iters, a.eps,
                           token_view(call, call.outputs[0]), {inverse, sums, mass, mean_value});
}

inline Linear<float> layer(const Call& call, int weight) {
  return {call.input(weight), call.input(weight + 1)};
}

inline LayerNorm<float> norm(const Call& call) { return {call.input(1), call.input(2), call.attributes.eps}; }

inline Tokens map_of(const Call& call) { return {call["B"], call["H"], call["W"], call["C"]}; }

inline void run_project(const Call& call) {
  heads_of<float>(map_of(call), call.input(0), norm(call), {layer(call, 3), layer(call, 5), layer(call, 7)},
                  {call.input(9), call.input(10), call["pairs"]},
                  {call.output(0), call.output(1), call.output(2)});
}

inline void run_merge(const Call& call) {
  tokens_of_heads<float>(map_of(call), call.input(0), call.input(1), call.input(2), layer(call, 3),
                         layer(call, 5), call.output(0));
}

inline void run_ffn(const Call& call) {
  feed_forward<float>(map_of(call), call.input(0), norm(call), call["hidden"], layer(call, 3), layer(call, 5),
                      layer(call, 7), call.output(0));
}

// Heads lie as a projection leaves them, so that a graph needs no transposes around the attention.
inline const std::array<NodeKind, 4> kNodes{{
    {"LaplacianAttention",
     {{"q", {"B", "N", "heads", "d"}},
      {"k", {"B", "N", "heads", "d"}},
      {"v", {"B", "N", "heads", "d"}},
      {"landmarks", {"B", "heads", "m", "d"}}},
     {{"out", {"B", "N", "heads", "d"}}},
     {{"scale", &Attributes::scale}, {"eps", &Attributes::eps}, {"tau", &Attributes::tau}},
     {{"iters", &Attributes::iters}},
     true,
     check_attention,
     relate_nothing,
     run_attention},
    {"ProjectHeads",
     {{"x", {"B", "H", "W", "C"}},
      {"norm_weight", {"C"}},
      {"norm_bias", {"C"}},
      {"q_weight", {"C", "C"}},
      {"q_bias", {"C"}},
      {"k_weight", {"C", "C"}},
      {"k_bias", {"C"}},
      {"v_weight", {"C", "C"}},
      {"v_bias", {"C"}},
      {"rows", {"2", "pairs", "H"}},
      {"columns", {"2", "pairs", "W"}}},
     {{"q", {"B", "H", "W", "C"}}, {"k", {"B", "H", "W", "C"}}, {"v", {"B", "H", "W", "C"}}},
     {{"eps", &Attributes::eps}},
     {},
     false,
     check_norm,
     relate_heads,
     run_project},
    {"MergeHeads",
     {{"x", {"B", "H", "W", "C"}},
      {"attended", {"B", "H", "W", "C"}},
      {"values", {"B", "H", "W", "C"}},
      {"conv_weight", {"C", "1", "3", "3"}},
      {"conv_bias", {"C"}},
      {"proj_weight", {"C", "C"}},
      {"proj_bias", {"C"}}},
     {{"out", {"B", "H", "W", "C"}}},
     {},
     {},
     false,
     check_nothing,
     relate_nothing,
     run_merge},
    {"ConvFFN",
     {{"x", {"B", "H", "W", "C"}},
      {"norm_weight", {"C"}},
      {"norm_bias", {"C"}},
      {"fc1_weight", {"hidden", "C"}},
      {"fc1_bias", {"hidden"}},
      {"conv_weight", {"hidden", "1", "3", "3"}},
      {"conv_bias", {"hidden"}},
      {"fc2_weight", {"C", "hidden"}},
      {"fc2_bias", {"C"}}},
     {{"out", {"B", "H", "W", "C"}}},
     {{"eps", &Attributes::eps}},
     {},
     false,
     check_norm,
     relate_nothing,
     run_ffn},
}};

}  // namespace lf
