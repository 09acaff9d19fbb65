// The nodes as onnxruntime's custom operators, on the session's own threads. The C interface alone is used,
// and the oldest version of it that has what is needed, so that one binary serves every onnxruntime from 1.17
// on.
#include <onnxruntime_c_api.h>

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "nodes.h"

#if ORT_API_VERSION < 17
#error "lf_dense's operators for onnxruntime need the header of onnxruntime 1.17 or newer."
#endif

namespace lf {
namespace {

// KernelContext_ParallelFor came with it.
constexpr uint32_t kApiVersion = 17;

struct StatusError {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw StatusError{status};
}

// Runs `run`; what it throws is returned as the runtime's error.
template <typename Run>
OrtStatus* guarded(const OrtApi* api, const Run& run) {
  try {
    run();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::invalid_argument& error) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

// The call whose loops this thread starts; the interface hands out threads for the length of a call alone.
struct Call {
  const OrtApi* api;
  const OrtKernelContext* context;
};
thread_local Call current;

struct Loop {
  void (*run)(void*);
  void* state;
  std::mutex mutex;
  std::exception_ptr error;

  // No exception may pass through the runtime's own code.
  static void turn(void* loop, size_t) {
    Loop& self = *static_cast<Loop*>(loop);
    try {
      self.run(self.state);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(self.mutex);
      self.error = std::current_exception();
    }
  }
};

}  // namespace

// The interface does not say how many threads a session has. Those that are too many here find nothing to do.
int64_t pool_threads() { return std::max(1u, std::thread::hardware_concurrency()); }

void run_on_pool(int64_t times, void (*run)(void*), void* state) {
  Loop loop{run, state, {}, {}};
  check(current.api->KernelContext_ParallelFor(current.context, Loop::turn, times, 0, &loop));
  if (loop.error) std::rethrow_exception(loop.error);
}

namespace {

struct Operator : OrtCustomOp {
  const OrtApi* api;
  const NodeKind* node;
  ONNXTensorElementDataType type;
  DType dtype;
};

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

struct Kernel {
  const Operator& op;
  Attributes attributes;
};

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  const OrtApi* api = self(op).api;
  return guarded(api, [&] {
    const NodeKind& node = *self(op).node;
    Attributes attributes;
    for (const auto& [name, member] : node.floats)
      check(api->KernelInfoGetAttribute_float(info, name, &(attributes.*member)));
    for (const auto& [name, member] : node.integers)
      check(api->KernelInfoGetAttribute_int64(info, name, &(attributes.*member)));
    node.check(node, attributes);
    *kernel = new Kernel{self(op), attributes};
  });
}

Dims dims_of(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  check(api->GetDimensionsCount(info, &rank));
  Dims dims(rank);
  check(api->GetDimensions(info, dims.data(), rank));
  return dims;
}

Dims dims_of(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api->ReleaseTensorTypeAndShapeInfo)> owner(
      info, api->ReleaseTensorTypeAndShapeInfo);
  return dims_of(api, info);
}

char* data_of(const OrtApi* api, const OrtValue* value) {
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return static_cast<char*>(data);
}

OrtStatus* compute(void* state, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  const NodeKind& node = *kernel.op.node;
  const OrtApi* api = kernel.op.api;
  return guarded(api, [&] {
    Shapes shapes;
    std::vector<char*> inputs, outputs;
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const OrtValue* input = nullptr;
      check(api->KernelContext_GetInput(context, i, &input));
      shapes.push_back(dims_of(api, input));
      inputs.push_back(data_of(api, input));
    }
    const Sizes sizes = sizes_of(node, shapes);
    for (size_t i = 0; i < node.outputs.size(); ++i) {
      const Dims dims = shape_of(node.outputs[i], sizes);
      OrtValue* output = nullptr;
      check(api->KernelContext_GetOutput(context, i, dims.data(), dims.size(), &output));
      outputs.push_back(data_of(api, output));
    }
    current = {api, context};
    run_node(node, {kernel.attributes, sizes, kernel.op.dtype, inputs, outputs});
  });
}

// Shapes before a run, in which sizes have names: equal names are equal sizes to the runtime.
class Inference {
 public:
  Inference(const OrtApi* api, OrtShapeInferContext* context) : api_(api), context_(context) {}

  Dims input(size_t index, const Port& port) {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
    check(api_->ShapeInferContext_GetInputTypeShape(context_, index, &info));
    check(api_->GetTensorElementType(info, &type_));
    Dims dims = dims_of(api_, info);
    // A shape that is not known looks like a scalar's, which no node takes.
    if (dims.empty()) return Dims(port.shape.size(), kUnknown);
    std::vector<const char*> names(dims.size());
    check(api_->GetSymbolicDimensions(info, names.data(), names.size()));
    for (size_t i = 0; i < dims.size(); ++i) {
      if (dims[i] >= 0) continue;
      dims[i] = *names[i] ? -2 - static_cast<int64_t>(names_.size()) : kUnknown;
      if (*names[i]) names_.emplace_back(names[i]);
    }
    return dims;
  }

  void output(size_t index, Dims dims) {
    std::vector<const char*> names;
    for (int64_t& size : dims) {
      // The runtime might take two sizes without a name for equal ones.
      if (size == kUnknown) return;
      names.push_back(size < 0 ? names_[-2 - size].c_str() : "");
      size = std::max(size, int64_t{-1});
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api_->CreateTensorTypeAndShapeInfo(&info));
    OrtStatus* status = api_->SetTensorElementType(info, type_);
    if (!status) status = api_->SetDimensions(info, dims.data(), dims.size());
    if (!status) status = api_->SetSymbolicDimensions(info, names.data(), names.size());
    if (!status) status = api_->ShapeInferContext_SetOutputTypeShape(context_, index, info);
    api_->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
  }

 private:
  const OrtApi* api_;
  OrtShapeInferContext* context_;
  std::vector<std::string> names_;
  // The operators of one name share an inference, so that their own type says nothing.
  ONNXTensorElementDataType type_ = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

// The runtime passes over what this refuses, and the run says it.
OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = self(op).api;
  return guarded(api, [&] {
    const NodeKind& node = *self(op).node;
    Inference inference(api, context);
    Shapes shapes;
    for (size_t i = 0; i < node.inputs.size(); ++i) shapes.push_back(inference.input(i, node.inputs[i]));
    const Sizes sizes = sizes_of(node, shapes);
    for (size_t i = 0; i < node.outputs.size(); ++i) inference.output(i, shape_of(node.outputs[i], sizes));
  });
}

Operator make_operator(const OrtApi* api, const NodeKind& node, ONNXTensorElementDataType type, DType dtype) {
  Operator op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return self(op).node->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).node->inputs.size(); };
  op.GetInputType = [](const OrtCustomOp* op, size_t) { return self(op).type; };
  op.GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).node->outputs.size(); };
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).type; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = infer_shape;
  op.api = api;
  op.node = &node;
  op.type = type;
  op.dtype = dtype;
  return op;
}

// One operator for each node and dtype. They are never released: nobody says when the last session that uses
// them has ended.
struct Operators {
  std::vector<Operator> all;
  OrtCustomOpDomain* domain = nullptr;

  explicit Operators(const OrtApi* api) {
    for (const NodeKind& node : kNodes) {
      all.push_back(make_operator(api, node, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, DType::kFloat32));
      if (!node.takes_halves) continue;
      all.push_back(make_operator(api, node, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, DType::kFloat16));
      all.push_back(make_operator(api, node, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, DType::kBFloat16));
    }
    check(api->CreateCustomOpDomain(kDomain, &domain));
    for (const Operator& op : all) check(api->CustomOpDomain_Add(domain, &op));
  }
};

// A process may hold more than one onnxruntime.
const Operators& operators_of(const OrtApi* api) {
  static std::mutex mutex;
  static auto& known = *new std::map<const OrtApi*, Operators*>;
  const std::lock_guard<std::mutex> lock(mutex);
  Operators*& found = known[api];
  if (!found) found = new Operators(api);
  return *found;
}

}  // namespace
}  // namespace lf

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(lf::kApiVersion);
  if (!api) {
    const std::string why = "lf_dense's operators need onnxruntime 1.17 or newer, and this is " +
                            std::string(base->GetVersionString()) + ": upgrade onnxruntime.";
    return base->GetApi(1)->CreateStatus(ORT_FAIL, why.c_str());
  }
  return lf::guarded(api, [&] { lf::check(api->AddCustomOpDomain(options, lf::operators_of(api).domain)); });
}
