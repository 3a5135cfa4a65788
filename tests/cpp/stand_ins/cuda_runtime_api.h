// A stand-in for CUDA's runtime: what src/tensorrt.cpp calls of it, on the processor. Signatures are CUDA's, the rest is ours.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorNoDevice = 100 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

inline cudaError_t cudaGetDeviceCount(int* count) {
  const char* said = std::getenv("STAND_IN_GPUS");
  *count = said == nullptr ? 0 : std::atoi(said);
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

// The thread's GPU, at first the last one. Memory, streams and their ends belong to the first: elsewhere the process dies,
// and it dies at its end if its main thread was not given back its own.
inline int last_gpu() {
  int count = 0;
  cudaGetDeviceCount(&count);
  return count > 0 ? count - 1 : 0;
}
inline thread_local int this_gpu = last_gpu();
inline void dies_unless(bool fine) {
  if (!fine) {
    std::abort();
  }
}
struct AtTheEnd {
  ~AtTheEnd() { dies_unless(this_gpu == last_gpu()); }
};
inline AtTheEnd at_the_end;
inline cudaError_t cudaGetDevice(int* device) {
  *device = this_gpu;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  this_gpu = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {"Stand-in", 9, 0};
  return cudaSuccess;
}
extern "C" cudaError_t cudaDriverGetVersion(int* version);  // in cudart.cpp: who calls it has to link
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
inline cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  dies_unless(this_gpu == 0);
  *address = std::malloc(bytes);
  return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
  dies_unless(this_gpu == 0);
  std::free(address);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  dies_unless(this_gpu == 0);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t*) {
  dies_unless(this_gpu == 0);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) {
  dies_unless(this_gpu == 0);
  return cudaSuccess;
}
