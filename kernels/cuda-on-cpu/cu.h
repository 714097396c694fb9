// The driver's functions that the tests and the other libraries of this folder call.
#pragma once

#include <stddef.h>
#include <stdint.h>

using CUresult = int;
using CUdeviceptr = unsigned long long;
struct CUgraphExecUpdateResultInfo {
  int result;
  void *node, *from;
};

extern "C" {
CUresult cuInit(unsigned);
CUresult cuDevicePrimaryCtxRetain(void**, int);
CUresult cuDevicePrimaryCtxRelease_v2(int);
CUresult cuCtxSetCurrent(void*);
CUresult cuCtxGetCurrent(void**);
CUresult cuCtxSynchronize();
CUresult cuModuleLoadData(void**, const void*);
CUresult cuModuleGetFunction(void**, void*, const char*);
CUresult cuFuncSetAttribute(void*, int, int);
CUresult cuFuncGetParamInfo(void*, size_t, size_t*, size_t*);
CUresult cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
CUresult cuMemAlloc_v2(CUdeviceptr*, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemGetInfo_v2(size_t*, size_t*);
CUresult cuMemGetAddressRange_v2(CUdeviceptr*, size_t*, CUdeviceptr);
CUresult cuMemcpyHtoD_v2(CUdeviceptr, const void*, size_t);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, void*);
CUresult cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t);
CUresult cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, void*);
CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, void*);
CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, void*);
CUresult cuStreamCreate(void**, unsigned);
CUresult cuStreamDestroy_v2(void*);
CUresult cuStreamSynchronize(void*);
CUresult cuStreamQuery(void*);
CUresult cuStreamWaitEvent(void*, void*, unsigned);
CUresult cuStreamBeginCapture_v2(void*, int);
CUresult cuStreamEndCapture(void*, void**);
CUresult cuStreamIsCapturing(void*, int*);
CUresult cuEventCreate(void**, unsigned);
CUresult cuEventRecord(void*, void*);
CUresult cuEventQuery(void*);
CUresult cuEventSynchronize(void*);
CUresult cuEventElapsedTime_v2(float*, void*, void*);
CUresult cuGraphInstantiateWithFlags(void**, void*, unsigned long long);
CUresult cuGraphLaunch(void*, void*);
CUresult cuGraphDestroy(void*);
CUresult cuGraphExecDestroy(void*);
CUresult cuGraphExecUpdate_v2(void*, void*, CUgraphExecUpdateResultInfo*);

// Our own (driver.h).
CUresult cudaOnCpuSubmit(void* stream, const char* name, int may_block, CUresult (*run)(void*), void (*drop)(void*), void* state);
int cudaOnCpuIsDeviceMemory(const void* address, size_t bytes);
int cudaOnCpuDevice();
}
