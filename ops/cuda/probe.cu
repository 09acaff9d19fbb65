// Whether kernels of this library run on a GPU at all. The library loads where the driver is too old for it
// and where no kernel was compiled for the GPU; the first launch would be what fails.
#include <cuda_runtime.h>

namespace {

__global__ void nothing() {}

cudaError_t launch_nothing() {
  cudaStream_t stream = nullptr;
  // A stream of its own: the caller's may be captured into a graph, and must not wait.
  cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status != cudaSuccess) return status;
  nothing<<<1, 1, 0, stream>>>();
  status = cudaGetLastError();
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return status;
}

cudaError_t launch_on(int device) {
  int previous = 0;
  cudaError_t status = cudaGetDevice(&previous);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  // A capture that another stream is in must not forbid what happens here.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  status = launch_nothing();
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaSetDevice(previous);
  return status;
}

}  // namespace

// What the runtime says of a launch that fails, or null.
extern "C" __attribute__((visibility("default"))) const char* lf_dense_launch_failure(int device) {
  const cudaError_t status = launch_on(device);
  // The error must not wait for the next operator's check.
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
