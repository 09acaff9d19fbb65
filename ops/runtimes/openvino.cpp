// The node as an OpenVINO operation, for ONNX files and for IR files, on the threads of the stream that runs
// it.
#include <openvino/core/op_extension.hpp>
#include <openvino/core/version.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "node.h"

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

DType dtype_of(const ov::element::Type& type) {
  if (type == ov::element::f32) return DType::kFloat32;
  if (type == ov::element::f16) return DType::kFloat16;
  if (type == ov::element::bf16) return DType::kBFloat16;
  refuse("the inputs are " + type.get_type_name() + ", and have to be f32, f16 or bf16.");
}

Dims dims_of(const ov::PartialShape& shape) {
  Dims dims;
  for (const ov::Dimension& size : shape) dims.push_back(size.is_static() ? size.get_length() : -1);
  return dims;
}

Dims dims_of(const ov::Tensor& tensor) {
  const ov::Shape shape = tensor.get_shape();
  return {shape.begin(), shape.end()};
}

class LaplacianAttention : public ov::op::Op {
 public:
  OPENVINO_OP("LaplacianAttention", "lf_dense");

  LaplacianAttention() = default;
  LaplacianAttention(const ov::OutputVector& inputs, const NodeAttributes& attributes)
      : Op(inputs), attributes_(attributes) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    if (get_input_size() != 4)
      refuse("it takes q, k, v and landmarks, and here are " + std::to_string(get_input_size()) + " inputs.");
    check_attributes(attributes_);
    ov::element::Type type = get_input_element_type(0);
    ov::PartialShape shape = get_input_partial_shape(0);
    bool ranks_known = true;
    for (size_t i = 0; i < 4; ++i) {
      ranks_known &= get_input_partial_shape(i).rank().is_static();
      if (!ov::element::Type::merge(type, type, get_input_element_type(i)))
        refuse("the inputs are of several dtypes, and have to be of one.");
    }
    if (type.is_static()) dtype_of(type);
    if (ranks_known) {
      const auto dims = [&](size_t i) { return dims_of(get_input_partial_shape(i)); };
      check_shapes(dims(0), dims(1), dims(2), dims(3));
    }
    set_output_type(0, type, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<LaplacianAttention>(inputs, attributes_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("scale", attributes_.scale);
    visitor.on_attribute("iters", attributes_.iters);
    visitor.on_attribute("eps", attributes_.eps);
    visitor.on_attribute("tau", attributes_.tau);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const auto whole = [](const ov::Tensor& tensor) { return tensor.is_continuous(); };
    if (!std::all_of(inputs.begin(), inputs.end(), whole) || !whole(outputs[0])) return false;
    const Dims shape = dims_of(inputs[0]);
    check_shapes(shape, dims_of(inputs[1]), dims_of(inputs[2]), dims_of(inputs[3]));
    outputs[0].set_shape(inputs[0].get_shape());
    const DType dtype = dtype_of(inputs[0].get_element_type());
    const auto tokens = [&](const ov::Tensor& tensor) { return token_view(tensor.data(), shape, dtype); };
    run_node(attributes_, tokens(inputs[0]), tokens(inputs[1]), tokens(inputs[2]),
             landmark_view(inputs[3].data(), dims_of(inputs[3]), dtype), tokens(outputs[0]));
    return true;
  }

 private:
  NodeAttributes attributes_;
};

}  // namespace
}  // namespace lf

OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{
    std::make_shared<ov::OpExtension<lf::LaplacianAttention>>(),
    std::make_shared<ov::frontend::onnx::OpExtension<lf::LaplacianAttention>>(lf::kNode, lf::kDomain)}));
