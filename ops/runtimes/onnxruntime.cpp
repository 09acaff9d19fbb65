// The node as an onnxruntime custom operator, on the session's own threads. The C interface alone is used,
// and the oldest version of it that has what is needed, so that one binary serves every onnxruntime from 1.17
// on.
#include <onnxruntime_c_api.h>

#include <array>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "node.h"

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
  ONNXTensorElementDataType type;
  DType dtype;
};

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

struct Kernel {
  const OrtApi* api;
  DType dtype;
  NodeAttributes attributes;
};

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  const OrtApi* api = self(op).api;
  return guarded(api, [&] {
    NodeAttributes node;
    check(api->KernelInfoGetAttribute_float(info, "scale", &node.scale));
    check(api->KernelInfoGetAttribute_int64(info, "iters", &node.iters));
    check(api->KernelInfoGetAttribute_float(info, "eps", &node.eps));
    check(api->KernelInfoGetAttribute_float(info, "tau", &node.tau));
    check_attributes(node);
    *kernel = new Kernel{api, self(op).dtype, node};
  });
}

Dims shape_of(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &rank);
  Dims dims(rank);
  if (!status) status = api->GetDimensions(info, dims.data(), rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  return dims;
}

void* data_of(const OrtApi* api, const OrtValue* value) {
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

OrtStatus* compute(void* state, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  const OrtApi* api = kernel.api;
  return guarded(api, [&] {
    const OrtValue* inputs[4];
    Dims shapes[4];
    for (int i = 0; i < 4; ++i) {
      check(api->KernelContext_GetInput(context, i, &inputs[i]));
      shapes[i] = shape_of(api, inputs[i]);
    }
    check_shapes(shapes[0], shapes[1], shapes[2], shapes[3]);
    OrtValue* out = nullptr;
    check(api->KernelContext_GetOutput(context, 0, shapes[0].data(), shapes[0].size(), &out));
    const auto tokens = [&](const OrtValue* value) {
      return token_view(data_of(api, value), shapes[0], kernel.dtype);
    };
    current = {api, context};
    run_node(kernel.attributes, tokens(inputs[0]), tokens(inputs[1]), tokens(inputs[2]),
             landmark_view(data_of(api, inputs[3]), shapes[3], kernel.dtype), tokens(out));
  });
}

OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = self(op).api;
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
  OrtStatus* status = api->ShapeInferContext_GetInputTypeShape(context, 0, &info);
  return status ? status : api->ShapeInferContext_SetOutputTypeShape(context, 0, info);
}

Operator make_operator(const OrtApi* api, ONNXTensorElementDataType type, DType dtype) {
  Operator op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return kNode; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 4; };
  op.GetInputType = [](const OrtCustomOp* op, size_t) { return self(op).type; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
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
  op.type = type;
  op.dtype = dtype;
  return op;
}

// One operator for each dtype, under one name. They are never released: nobody says when the last session
// that uses them has ended.
struct Operators {
  std::array<Operator, 3> all;
  OrtCustomOpDomain* domain = nullptr;

  explicit Operators(const OrtApi* api)
      : all{make_operator(api, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, DType::kFloat32),
            make_operator(api, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, DType::kFloat16),
            make_operator(api, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, DType::kBFloat16)} {
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
