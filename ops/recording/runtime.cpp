// A CUDA runtime that launches nothing and writes each launch down: for tools/read_kernels.py, which reads
// the kernels' machine code without a GPU.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#define LF_RECORDED extern "C" __attribute__((visibility("hidden")))

namespace {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
};

struct Recording {
  std::map<const void*, std::string> names;
  std::map<std::string, std::vector<size_t>> parameter_sizes;
  std::ofstream out;
  int processors = 0, shared_bytes = 0;
  Launch next;
  void* stream = nullptr;
};

Recording& recording() {
  static Recording result;
  return result;
}

void write(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  Recording& r = recording();
  const std::string& name = r.names[function];
  r.out << name << ' ' << grid.x << ' ' << grid.y << ' ' << grid.z << ' ' << block.x << ' ' << block.y << ' '
        << block.z << ' ' << shared_bytes;
  size_t index = 0;
  for (const size_t size : r.parameter_sizes[name]) {
    const auto* bytes = static_cast<const unsigned char*>(arguments[index++]);
    r.out << ' ';
    for (size_t i = 0; i < size; ++i) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", bytes[i]);
      r.out << digits;
    }
  }
  r.out << '\n' << std::flush;
}

}  // namespace

// `sizes` has a line for each kernel: its mangled name and the bytes of each parameter. Launches are written
// to `out`: name, grid, block, dynamic shared memory, and each parameter in hexadecimal digits.
extern "C" __attribute__((visibility("default"))) void lf_dense_record(const char* sizes, const char* out,
                                                                       int processors, int shared_bytes) {
  Recording& r = recording();
  r.parameter_sizes.clear();
  std::ifstream file(sizes);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    for (size_t size; words >> size;) r.parameter_sizes[name].push_back(size);
  }
  r.out = std::ofstream(out);
  r.processors = processors, r.shared_bytes = shared_bytes;
}

// What nvcc's host code calls to make kernels known and to launch them.
LF_RECORDED void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
LF_RECORDED void __cudaRegisterFatBinaryEnd(void**) {}
LF_RECORDED void __cudaUnregisterFatBinary(void**) {}
LF_RECORDED void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                                        uint3*, dim3*, dim3*, int*) {
  recording().names[function] = name;
}
LF_RECORDED void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
LF_RECORDED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void*) {
  recording().next = {grid, block, shared_bytes};
  return 0;
}
LF_RECORDED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                                   void* stream) {
  const Launch& next = recording().next;
  *grid = next.grid, *block = next.block, *shared_bytes = next.shared_bytes;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
LF_RECORDED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
LF_RECORDED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                           size_t shared_bytes, cudaStream_t) {
  write(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes);
  return cudaSuccess;
}
LF_RECORDED cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                         size_t shared_bytes, cudaStream_t) {
  write(function, grid, block, arguments, shared_bytes);
  return cudaSuccess;
}
LF_RECORDED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                            void** arguments) {
  write(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
  return cudaSuccess;
}

// The rest of the runtime that the operators use.
LF_RECORDED cudaError_t cudaGetLastError() { return cudaSuccess; }
LF_RECORDED const char* cudaGetErrorString(cudaError_t) { return "no error"; }
LF_RECORDED cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
LF_RECORDED cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
LF_RECORDED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Recording& r = recording();
  *value = attribute == cudaDevAttrMultiProcessorCount            ? r.processors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? r.shared_bytes
                                                                  : 0;
  return cudaSuccess;
}

// What torch has in libtorch_cuda alone.
LF_RECORDED int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
LF_RECORDED int aoti_torch_create_device_guard(int, void** guard) {
  *guard = nullptr;
  return 0;
}
LF_RECORDED int aoti_torch_delete_device_guard(void*) { return 0; }
