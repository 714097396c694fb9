// Modules, functions and their launches. All kernels are in this library; a module's image is not looked at.
#include <stdio.h>
#include <string.h>

#include "driver.h"

namespace cuda_on_cpu {
namespace {

std::map<void*, std::unique_ptr<Module>>& modules() {
  static auto& all = *new std::map<void*, std::unique_ptr<Module>>;
  return all;
}
Module* find_module(void* handle) {
  const auto found = modules().find(handle);
  return found == modules().end() ? nullptr : found->second.get();
}
Function* find_function(void* handle) {
  for (const auto& module : modules())
    for (const auto& function : module.second->functions)
      if (function.second.get() == handle) return function.second.get();
  return nullptr;
}

Function* function_of(Module& module, const Kernel& kernel) {
  auto& slot = module.functions[kernel.name];
  if (!slot) slot = std::make_unique<Function>(Function{&kernel, module.device, unsigned(STATIC_SHARED_BYTES)});
  return slot.get();
}

CUresult refuse(const Function& function, CUresult error, const char* why, size_t asked, size_t limit) {
  fprintf(stderr, "cuda-on-cpu: kernel %s is not launched: %s (%zu, at most %zu)\n", function.kernel->name, why, asked, limit);
  return error;
}

CUresult check(const Function& function, Extent grid, Extent block, size_t shared_bytes) {
  if (grid.count() == 0 || block.count() == 0) return refuse(function, CUDA_ERROR_INVALID_VALUE, "the grid or block is empty", 0, 0);
  if (grid.x > 0x7fffffffu) return refuse(function, CUDA_ERROR_INVALID_VALUE, "blocks in x", grid.x, 0x7fffffff);
  if (grid.y > 65535) return refuse(function, CUDA_ERROR_INVALID_VALUE, "blocks in y", grid.y, 65535);
  if (grid.z > 65535) return refuse(function, CUDA_ERROR_INVALID_VALUE, "blocks in z", grid.z, 65535);
  if (block.z > 64) return refuse(function, CUDA_ERROR_INVALID_VALUE, "threads in z", block.z, 64);
  if (block.x > MAX_THREADS || block.y > MAX_THREADS || block.count() > MAX_THREADS)
    return refuse(function, CUDA_ERROR_INVALID_VALUE, "threads of a block", block.count(), MAX_THREADS);
  if (block.count() > function.kernel->max_threads)
    return refuse(function, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "threads of a block that its launch bounds allow", block.count(),
                  function.kernel->max_threads);
  if (shared_bytes > function.max_dynamic_shared)
    return refuse(function, CUDA_ERROR_INVALID_VALUE, "bytes of dynamic shared memory without cuFuncSetAttribute", shared_bytes,
                  function.max_dynamic_shared);
  return CUDA_SUCCESS;
}

// A copy of a launch's parameters.
struct Parameters {
  std::vector<unsigned char> bytes;
  std::vector<size_t> places;
  Parameters(const Kernel& kernel, void** values) {
    size_t end = 0;
    for (const size_t size : kernel.parameter_bytes) {
      places.push_back(end);
      end += (size + 15) / 16 * 16;
    }
    bytes.resize(end + 16);
    for (size_t i = 0; i < places.size(); i++) memcpy(at(i), values[i], kernel.parameter_bytes[i]);
  }
  void* at(size_t i) const {
    const auto begin = (reinterpret_cast<uintptr_t>(bytes.data()) + 15) / 16 * 16;
    return reinterpret_cast<void*>(begin + places[i]);
  }
};

}  // namespace

CUresult launch(const Function& function, Extent grid, Extent block, size_t shared_bytes, void** values,
                const std::shared_ptr<Stream>& stream) {
  const CUresult error = check(function, grid, block, shared_bytes);
  if (error) return error;
  const Kernel* kernel = function.kernel;
  if (!kernel->parameter_bytes.empty() && !values) return CUDA_ERROR_INVALID_VALUE;
  const auto parameters = std::make_shared<Parameters>(*kernel, values);
  return submit(stream, {kernel->name, [=] {
                           std::vector<void*> pointers;
                           for (size_t i = 0; i < parameters->places.size(); i++) pointers.push_back(parameters->at(i));
                           return run(Launch{kernel, pointers.data(), grid, block, shared_bytes});
                         }});
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

CUDA_API CUresult cuModuleLoadData(void** module, const void* image) {
  Lock lock(state);
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  if (!image) return CUDA_ERROR_INVALID_VALUE;
  error = forbidden_in_capture();
  if (error) return error;
  auto made = std::make_unique<Module>();
  made->device = device;
  *module = made.get();
  modules()[made.get()] = std::move(made);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
  return cuModuleLoadData(module, image);
}
CUDA_API CUresult cuModuleLoadFatBinary(void** module, const void* image) { return cuModuleLoadData(module, image); }
CUDA_API CUresult cuModuleUnload(void* module) {
  Lock lock(state);
  return modules().erase(module) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUDA_API CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  Lock lock(state);
  CUresult error;
  if (!current_device(error)) return error;
  Module* found = find_module(module);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  const Kernel* kernel = find_kernel(name);
  if (!kernel) return CUDA_ERROR_NOT_FOUND;
  *function = function_of(*found, *kernel);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuModuleGetFunctionCount(unsigned* count, void* module) {
  Lock lock(state);
  if (!find_module(module)) return CUDA_ERROR_INVALID_HANDLE;
  *count = unsigned(all_kernels().size());
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuModuleEnumerateFunctions(void** functions, unsigned count, void* module) {
  Lock lock(state);
  CUresult error;
  if (!current_device(error)) return error;
  Module* found = find_module(module);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  const auto all = all_kernels();
  for (unsigned i = 0; i < count && i < all.size(); i++) functions[i] = function_of(*found, *all[i]);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuFuncLoad(void* function) {
  Lock lock(state);
  CUresult error = forbidden_in_capture();
  if (error) return error;
  return find_function(function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUDA_API CUresult cuModuleGetLoadingMode(int* mode) {
  *mode = 1;  // at once
  return CUDA_SUCCESS;
}

// A library is its only module, a kernel its function.
CUDA_API CUresult cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  return cuModuleLoadData(library, code);
}
CUDA_API CUresult cuLibraryUnload(void* library) { return cuModuleUnload(library); }
CUDA_API CUresult cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  return cuModuleGetFunction(kernel, library, name);
}
CUDA_API CUresult cuLibraryGetModule(void** module, void* library) {
  *module = library;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return CUDA_SUCCESS;
}

namespace {
enum FunctionAttribute {
  MAX_THREADS_PER_BLOCK = 0,
  STATIC_SHARED_SIZE = 1,
  CONST_SIZE = 2,
  LOCAL_SIZE = 3,
  NUM_REGISTERS = 4,
  PTX_VERSION = 5,
  BINARY_VERSION = 6,
  CACHE_MODE = 7,
  MAX_DYNAMIC_SHARED_SIZE = 8,
  SHARED_CARVEOUT = 9,
};
}  // namespace

CUDA_API CUresult cuFuncSetAttribute(void* handle, int attribute, int value) {
  Lock lock(state);
  CUresult error;
  if (!current_device(error)) return error;
  Function* function = find_function(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  if (attribute == SHARED_CARVEOUT) return value >= -1 && value <= 100 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  if (attribute != MAX_DYNAMIC_SHARED_SIZE || value < 0 || size_t(value) > MAX_SHARED_BYTES) return CUDA_ERROR_INVALID_VALUE;
  function->max_dynamic_shared = unsigned(value);
  return CUDA_SUCCESS;
}
// Sizes of what only a compiler for a GPU knows are 0; registers are as many as the launch bounds leave.
CUDA_API CUresult cuFuncGetAttribute(int* value, int attribute, void* handle) {
  Lock lock(state);
  const Function* function = find_function(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  switch (attribute) {
    case MAX_THREADS_PER_BLOCK:
      *value = int(function->kernel->max_threads);
      return CUDA_SUCCESS;
    case NUM_REGISTERS:
      *value = std::min(255, int(65536 / function->kernel->max_threads));
      return CUDA_SUCCESS;
    case PTX_VERSION:
    case BINARY_VERSION:
      *value = 90;
      return CUDA_SUCCESS;
    case MAX_DYNAMIC_SHARED_SIZE:
      *value = int(function->max_dynamic_shared);
      return CUDA_SUCCESS;
    case SHARED_CARVEOUT:
      *value = -1;
      return CUDA_SUCCESS;
    case STATIC_SHARED_SIZE:
    case CONST_SIZE:
    case LOCAL_SIZE:
    case CACHE_MODE:
      *value = 0;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}
CUDA_API CUresult cuFuncSetCacheConfig(void* handle, int) {
  Lock lock(state);
  return find_function(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUDA_API CUresult cuFuncGetName(const char** name, void* handle) {
  Lock lock(state);
  const Function* function = find_function(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  *name = function->kernel->name;
  return CUDA_SUCCESS;
}

// A parameter's size and place, as the compiler lays a structure of all of them out.
CUDA_API CUresult cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* bytes) {
  Lock lock(state);
  const Function* function = find_function(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  const Kernel& kernel = *function->kernel;
  if (index >= kernel.parameter_bytes.size()) return CUDA_ERROR_INVALID_VALUE;
  size_t end = 0, place = 0;
  for (size_t i = 0; i <= index; i++) {
    place = (end + kernel.parameter_alignments[i] - 1) / kernel.parameter_alignments[i] * kernel.parameter_alignments[i];
    end = place + kernel.parameter_bytes[i];
  }
  if (offset) *offset = place;
  if (bytes) *bytes = kernel.parameter_bytes[index];
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                 unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream_handle,
                                 void** parameters, void** extra) {
  std::shared_ptr<Stream> stream;
  Function function;
  {
    Lock lock(state);
    CUresult error;
    Device* device = current_device(error);
    if (!device) return error;
    const Function* found = find_function(handle);
    stream = find_stream(stream_handle, device);
    if (!found || !stream || found->device != device) return CUDA_ERROR_INVALID_HANDLE;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    function = *found;
  }
  return launch(function, Extent{grid_x, grid_y, grid_z}, Extent{block_x, block_y, block_z}, shared_bytes, parameters, stream);
}

namespace {
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned num_attributes;
};
}  // namespace

// Attributes (clusters, programmatic dependent launches) are not done.
CUDA_API CUresult cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  if (!config) return CUDA_ERROR_INVALID_VALUE;
  if (config->num_attributes) return CUDA_ERROR_NOT_SUPPORTED;
  return cuLaunchKernel(function, config->grid_x, config->grid_y, config->grid_z, config->block_x, config->block_y,
                        config->block_z, config->shared_bytes, config->stream, parameters, extra);
}

// By threads and shared memory; registers are not known.
CUDA_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int block_size, size_t shared_bytes) {
  Lock lock(state);
  const Function* function = find_function(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  if (block_size <= 0) return CUDA_ERROR_INVALID_VALUE;
  const unsigned threads = (unsigned(block_size) + WARP_LANES - 1) / WARP_LANES * WARP_LANES;
  size_t most = std::min<size_t>(32, 2048 / threads);
  most = std::min(most, 228 * KIB / (shared_bytes + KIB));
  *blocks = unsigned(block_size) > function->kernel->max_threads || shared_bytes > function->max_dynamic_shared ? 0 : int(most);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* function, int block_size,
                                                                       size_t shared_bytes, unsigned) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, block_size, shared_bytes);
}
CUDA_API CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, void* handle, int blocks, int) {
  Lock lock(state);
  if (!find_function(handle)) return CUDA_ERROR_INVALID_HANDLE;
  if (blocks <= 0) return CUDA_ERROR_INVALID_VALUE;
  *bytes = std::min(MAX_SHARED_BYTES, 228 * KIB / unsigned(blocks) - KIB);
  return CUDA_SUCCESS;
}
