// Start, devices, contexts, errors.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

namespace cuda_on_cpu {

std::mutex state;

namespace {
bool initialized = false;
thread_local std::vector<Device*> context_stack;

size_t number_of_environment(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  if (!text || !*text) return otherwise;
  char* end = nullptr;
  const unsigned long long number = strtoull(text, &end, 10);
  if (*end) {
    fprintf(stderr, "cuda-on-cpu: %s=%s is not a number\n", name, text);
    abort();
  }
  return size_t(number);
}

Device* device_of(CUdevice ordinal) {
  if (ordinal < 0 || size_t(ordinal) >= devices().size()) return nullptr;
  return &devices()[size_t(ordinal)];
}
Device* device_of_context(void* context) {
  for (Device& device : devices())
    if (&device == context) return &device;
  return nullptr;
}

struct ErrorText {
  CUresult code;
  const char *name, *text;
};
constexpr ErrorText ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_UNSUPPORTED_LIMIT, "CUDA_ERROR_UNSUPPORTED_LIMIT", "limit is not supported on this architecture"},
    {CUDA_ERROR_FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE, "CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", "cannot set while device is active in this process"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing blocking stream"},
    {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
    {CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE", "the graph update was not performed because it included changes which violated constraints specific to instantiated graph update"},
};
const ErrorText* text_of(CUresult code) {
  for (const ErrorText& error : ERRORS)
    if (error.code == code) return &error;
  return nullptr;
}
}  // namespace

std::vector<Device>& devices() {
  static std::vector<Device>& all = *[] {  // never destroyed: threads of other libraries may end after this one
    auto* made = new std::vector<Device>(number_of_environment("CUDA_ON_CPU_DEVICES", 1));
    for (size_t i = 0; i < made->size(); i++) (*made)[i].ordinal = CUdevice(i);
    return made;
  }();
  return all;
}

size_t memory_bytes() {
  static const size_t bytes = number_of_environment("CUDA_ON_CPU_MEMORY_BYTES", size_t(2) << 30);
  return bytes;
}

Device* current_device(CUresult& error) {
  error = CUDA_SUCCESS;
  if (!initialized) {
    error = CUDA_ERROR_NOT_INITIALIZED;
    return nullptr;
  }
  Device* device = context_stack.empty() ? nullptr : context_stack.back();
  if (!device || device->retained == 0) {
    error = CUDA_ERROR_INVALID_CONTEXT;
    return nullptr;
  }
  error = device->error;
  return error ? nullptr : device;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

CUDA_API CUresult cuInit(unsigned flags) {
  Lock lock(state);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (devices().empty()) return CUDA_ERROR_NO_DEVICE;
  catch_faults();
  initialized = true;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDriverGetVersion(int* version) {
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = 13000;
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuGetErrorName(CUresult code, const char** name) {
  const ErrorText* error = text_of(code);
  *name = error ? error->name : nullptr;
  return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUDA_API CUresult cuGetErrorString(CUresult code, const char** text) {
  const ErrorText* error = text_of(code);
  *text = error ? error->text : nullptr;
  return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUDA_API CUresult cuDeviceGetCount(int* count) {
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  *count = int(devices().size());
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if (!device_of(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDeviceGetName(char* name, int bytes, CUdevice device) {
  if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (bytes <= 0) return CUDA_ERROR_INVALID_VALUE;
  snprintf(name, size_t(bytes), "cuda-on-cpu");
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = memory_bytes();
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDeviceGetUuid_v2(unsigned char (*uuid)[16], CUdevice device) {
  if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
  memcpy(*uuid, "cuda-on-cpu-----", 16);
  (*uuid)[15] = (unsigned char)device;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDeviceGetPCIBusId(char* text, int bytes, CUdevice device) {
  if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(text, size_t(bytes), "0000:%02X:00.0", device + 1);
  return CUDA_SUCCESS;
}

// The values of an H100 or H200 where they are properties of the architecture.
CUDA_API CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  static const std::map<int, int> values = {
      {1, 1024},         // threads per block
      {2, 1024},         // block x
      {3, 1024},         // block y
      {4, 64},           // block z
      {5, 0x7fffffff},   // grid x
      {6, 65535},        // grid y
      {7, 65535},        // grid z
      {8, int(STATIC_SHARED_BYTES)},
      {9, 65536},        // constant memory
      {10, 32},          // lanes of a warp
      {12, 65536},       // registers per block
      {13, 1980000},     // clock, kHz
      {14, 512},         // alignment of textures
      {15, 1},           // copies while kernels run
      {16, NUM_MULTIPROCESSORS},
      {17, 0},           // no limit of time
      {18, 0},           // not integrated
      {19, 1},           // can map host memory
      {20, 0},           // compute mode: default
      {31, 1},           // concurrent kernels
      {32, 1},           // ECC
      {33, 1},           // bus
      {34, 0},           // device on the bus
      {36, 2619000},     // memory clock, kHz
      {37, 5120},        // bits of the memory bus
      {38, 50 << 20},    // L2
      {39, 2048},        // threads per multiprocessor
      {40, 3},           // copy engines
      {41, 1},           // unified addressing
      {50, 0},           // PCI domain
      {75, 9},           // compute capability 9.0
      {76, 0},
      {78, 1},           // stream priorities
      {81, int(228 * KIB)},  // shared memory per multiprocessor
      {82, 65536},       // registers per multiprocessor
      {83, 0},           // managed memory: not here
      {90, 1},           // compute preemption
      {95, 0},           // cooperative launches: not here
      {97, int(MAX_SHARED_BYTES)},
      {99, 1},           // host memory can be registered
      {106, 32},         // blocks per multiprocessor
      {111, int(KIB)},   // shared memory that is reserved per block
      {115, 0},          // memory pools: not here
  };
  if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
  const auto found = values.find(attribute);
  if (found == values.end()) return CUDA_ERROR_INVALID_VALUE;
  *value = found->second;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  if (!device_of(device) || !device_of(peer)) return CUDA_ERROR_INVALID_DEVICE;
  *can = device != peer;
  return CUDA_SUCCESS;
}

// Held from the last release of a context until all that belongs to it is gone, so that who retains it meanwhile gets a new one.
static std::mutex lifetimes;

CUDA_API CUresult cuDevicePrimaryCtxRetain(void** context, CUdevice ordinal) {
  const Lock lifetime(lifetimes);
  Lock lock(state);
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  Device* device = device_of(ordinal);
  if (!device) return CUDA_ERROR_INVALID_DEVICE;
  if (device->retained++ == 0) device->error = CUDA_SUCCESS;
  *context = device;
  return CUDA_SUCCESS;
}
static CUresult destroy_primary(CUdevice ordinal, bool reset) {
  Device* device = device_of(ordinal);
  if (!device) return CUDA_ERROR_INVALID_DEVICE;
  const Lock lifetime(lifetimes);
  {
    Lock lock(state);
    if (device->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (!reset && --device->retained > 0) return CUDA_SUCCESS;
  }
  finish_all(device);
  drop_streams(device);
  free_memory_of(device);
  Lock lock(state);
  device->retained = 0;
  device->error = CUDA_SUCCESS;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return destroy_primary(device, false); }
CUDA_API CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) { return destroy_primary(device, true); }
CUDA_API CUresult cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned* flags, int* active) {
  Device* device = device_of(ordinal);
  if (!device) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *active = device->retained > 0;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned) {
  return device_of(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUDA_API CUresult cuCtxSetCurrent(void* context) {
  Lock lock(state);
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if (!context) {
    if (!context_stack.empty()) context_stack.pop_back();
    return CUDA_SUCCESS;
  }
  Device* device = device_of_context(context);
  if (!device || device->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (context_stack.empty()) context_stack.push_back(device);
  context_stack.back() = device;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuCtxGetCurrent(void** context) {
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  *context = context_stack.empty() ? nullptr : context_stack.back();
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuCtxPushCurrent_v2(void* context) {
  Lock lock(state);
  Device* device = device_of_context(context);
  if (!device || device->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  context_stack.push_back(device);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuCtxPopCurrent_v2(void** context) {
  if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = context_stack.back();
  context_stack.pop_back();
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuCtxGetDevice(CUdevice* device) {
  if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *device = context_stack.back()->ordinal;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuCtxSetFlags(unsigned) { return CUDA_SUCCESS; }
CUDA_API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuCtxEnablePeerAccess(void* context, unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  return device_of_context(context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUDA_API CUresult cuCtxSynchronize() {
  Device* device;
  {
    Lock lock(state);
    CUresult error;
    device = current_device(error);
    if (!device) return error;
    error = forbidden_for_device(device);
    if (error) return error;
  }
  return finish_all(device);
}

CUDA_API CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
  *function = nullptr;
  for (const char* suffix : {"_v3", "_v2", ""}) {
    *function = dlsym(RTLD_DEFAULT, (std::string(symbol) + suffix).c_str());
    if (*function) break;
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUDA_API int cudaOnCpuDevice() {
  CUresult error;
  Lock lock(state);
  const Device* device = current_device(error);
  return device ? device->ordinal : -1;
}
