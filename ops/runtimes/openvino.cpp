// The nodes as OpenVINO operations, for ONNX files and for IR files, on the threads of the stream that runs
// it.
#include <openvino/core/op_extension.hpp>
#include <openvino/core/version.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "nodes.h"

#define LF_TEXT_OF(x) #x
#define LF_TEXT(x) LF_TEXT_OF(x)

// lf_dense.export.libraries reads it: a library for one version of OpenVINO does not load into another.
extern "C" __attribute__((visibility("default"), used)) const char lf_dense_built_for[] =
    "lf_dense's operators for OpenVINO " LF_TEXT(OPENVINO_VERSION_MAJOR) "." LF_TEXT(
        OPENVINO_VERSION_MINOR) "." LF_TEXT(OPENVINO_VERSION_PATCH);

namespace lf {

int64_t pool_threads() { return tbb::this_task_arena::max_concurrency(); }

void run_on_pool(int64_t times, void (*run)(void*), void* state) {
  tbb::parallel_for(
      tbb::blocked_range<int64_t>(0, times, 1), [&](const auto&) { run(state); }, tbb::simple_partitioner());
}

namespace {

DType dtype_of(const NodeKind& node, const ov::element::Type& type) {
  if (type == ov::element::f32) return DType::kFloat32;
  if (node.takes_halves && type == ov::element::f16) return DType::kFloat16;
  if (node.takes_halves && type == ov::element::bf16) return DType::kBFloat16;
  node.refuse("the inputs are " + type.get_type_name() + ", and have to be " +
              (node.takes_halves ? "f32, f16 or bf16." : "f32."));
}

// One class for each node: to OpenVINO each is a type of its own.
template <size_t index>
class Operation : public ov::op::Op {
  static const NodeKind& kind() { return kNodes[index]; }

 public:
  OPENVINO_OP(kNodes[index].name, "lf_dense");

  Operation() = default;
  Operation(const ov::OutputVector& inputs, const Attributes& attributes)
      : Op(inputs), attributes_(attributes) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    if (get_input_size() != kind().inputs.size()) {
      kind().refuse("it takes " + listed(kind().inputs) + ", and here are " +
                    std::to_string(get_input_size()) + " inputs.");
    }
    kind().check(kind(), attributes_);
    ov::element::Type type = get_input_element_type(0);
    Shapes shapes;
    std::vector<ov::Dimension> unknown{ov::Dimension::dynamic()};  // -1 - i is the size of unknown[i]
    for (size_t i = 0; i < get_input_size(); ++i) {
      if (!ov::element::Type::merge(type, type, get_input_element_type(i)))
        kind().refuse("the inputs are of several dtypes, and have to be of one.");
      const ov::PartialShape& shape = get_input_partial_shape(i);
      Dims& dims = shapes.emplace_back();
      if (shape.rank().is_dynamic()) dims.resize(kind().inputs[i].shape.size(), kUnknown);
      for (size_t axis = 0; shape.rank().is_static() && axis < shape.size(); ++axis) {
        if (shape[axis].is_dynamic()) unknown.push_back(shape[axis]);
        dims.push_back(shape[axis].is_static() ? shape[axis].get_length()
                                               : -static_cast<int64_t>(unknown.size()));
      }
    }
    if (type.is_static()) dtype_of(kind(), type);
    const Sizes sizes = sizes_of(kind(), shapes);
    set_output_size(kind().outputs.size());
    for (size_t i = 0; i < kind().outputs.size(); ++i) {
      ov::PartialShape shape = ov::PartialShape::dynamic(0);
      for (const int64_t size : shape_of(kind().outputs[i], sizes))
        shape.push_back(size < 0 ? unknown[-1 - size] : ov::Dimension(size));
      set_output_type(i, type, shape);
    }
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<Operation>(inputs, attributes_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    for (const auto& [name, member] : kind().floats) visitor.on_attribute(name, attributes_.*member);
    for (const auto& [name, member] : kind().integers) visitor.on_attribute(name, attributes_.*member);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    Shapes shapes;
    std::vector<char*> from, to;
    for (const ov::Tensor& tensor : inputs) {
      if (!tensor.is_continuous()) return false;
      const ov::Shape shape = tensor.get_shape();
      shapes.emplace_back(shape.begin(), shape.end());
      from.push_back(static_cast<char*>(const_cast<void*>(tensor.data())));
    }
    const Sizes sizes = sizes_of(kind(), shapes);
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Dims dims = shape_of(kind().outputs[i], sizes);
      outputs[i].set_shape({dims.begin(), dims.end()});
      if (!outputs[i].is_continuous()) return false;
      to.push_back(static_cast<char*>(outputs[i].data()));
    }
    run_node(kind(), {attributes_, sizes, dtype_of(kind(), inputs[0].get_element_type()), from, to});
    return true;
  }

 private:
  Attributes attributes_;
};

template <size_t... index>
std::vector<ov::Extension::Ptr> extensions(std::index_sequence<index...>) {
  return {
      std::make_shared<ov::OpExtension<Operation<index>>>()...,
      std::make_shared<ov::frontend::onnx::OpExtension<Operation<index>>>(kNodes[index].name, kDomain)...};
}

}  // namespace
}  // namespace lf

OPENVINO_CREATE_EXTENSIONS(lf::extensions(std::make_index_sequence<lf::kNodes.size()>()))
