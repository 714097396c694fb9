// Device memory and pinned host memory, copies and fills.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"

namespace cuda_on_cpu {
namespace {

// An allocation is a mapping of its own between two pages that nobody may touch. It ends at the second one, as closely as
// its alignment allows (16 bytes; CUDA's allocations begin at multiples of 256, and with that they would seldom end at a
// page), and is filled with 0xff: NaN in all float types, and an index that is out of all bounds.
struct Allocation {
  Device* device;  // null: of the host
  size_t bytes;
  char* mapping;
  size_t mapped_bytes;
  char* begin() const { return mapping + mapped_bytes - page() - (bytes + 15) / 16 * 16; }
  static size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }
  // Bytes that can be touched but are not the allocation's: those before it in its page, and up to 15 behind it.
  template <class F> void for_slack(F each) const {
    for (char* at = mapping + page(); at < begin(); at++) each(*at);
    for (char* at = begin() + bytes; at < mapping + mapped_bytes - page(); at++) each(*at);
  }
};

std::map<CUdeviceptr, Allocation>& allocations() {  // by their beginnings
  static auto& all = *new std::map<CUdeviceptr, Allocation>;
  return all;
}
std::map<CUdeviceptr, size_t>& registered() {  // host memory that the host allocated
  static auto& all = *new std::map<CUdeviceptr, size_t>;
  return all;
}
// Freed: stays unmapped for a while, so that its use is found.
std::deque<Allocation>& freed() {
  static auto& all = *new std::deque<Allocation>;
  return all;
}
constexpr size_t KEPT_FREED = 1024;

size_t charged_bytes(size_t bytes) { return (bytes + 511) / 512 * 512; }

const Allocation* containing(CUdeviceptr address) {
  auto after = allocations().upper_bound(address);
  if (after == allocations().begin()) return nullptr;
  const Allocation& before = std::prev(after)->second;
  return address <= CUdeviceptr(before.begin()) + before.bytes ? &before : nullptr;
}

std::string describe(uintptr_t address) {
  Lock lock(state);
  const auto relation = [&](const Allocation& allocation, const char* adjective) {
    const auto begin = uintptr_t(allocation.begin()), end = begin + allocation.bytes;
    char text[160];
    if (address >= end)
      snprintf(text, sizeof(text), "what is %zu bytes behind the end of an%s allocation of %zu bytes", size_t(address - end), adjective,
               allocation.bytes);
    else if (address < begin)
      snprintf(text, sizeof(text), "what is %zu bytes before an%s allocation of %zu bytes", size_t(begin - address), adjective,
               allocation.bytes);
    else
      snprintf(text, sizeof(text), "byte %zu of an%s allocation of %zu bytes", size_t(address - begin), adjective,
               allocation.bytes);
    return std::string(text);
  };
  const auto concerns = [&](const Allocation& allocation) {
    return address >= uintptr_t(allocation.mapping) && address < uintptr_t(allocation.mapping) + allocation.mapped_bytes;
  };
  for (const auto& it : allocations())
    if (concerns(it.second)) return relation(it.second, "");
  for (const Allocation& allocation : freed())
    if (concerns(allocation)) return relation(allocation, " already freed");
  return "memory of no allocation";
}

CUresult allocate(Device* device, size_t bytes, CUdeviceptr* address) {
  if (bytes == 0 || !address) return CUDA_ERROR_INVALID_VALUE;
  if (device && charged_bytes(bytes) > memory_bytes() - device->used_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  describe_address = describe;
  Allocation made{device, bytes, nullptr, 0};
  const size_t page = Allocation::page();
  made.mapped_bytes = (bytes + page - 1) / page * page + 2 * page;
  void* mapping = mmap(nullptr, made.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  made.mapping = static_cast<char*>(mapping);
  if (mprotect(made.mapping + page, made.mapped_bytes - 2 * page, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping, made.mapped_bytes);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  memset(made.mapping + page, 0xff, made.mapped_bytes - 2 * page);
  if (device) device->used_bytes += charged_bytes(bytes);
  *address = CUdeviceptr(made.begin());
  allocations().emplace(*address, made);
  return CUDA_SUCCESS;
}

void release(std::map<CUdeviceptr, Allocation>::iterator found) {
  const Allocation allocation = found->second;
  size_t overwritten = 0;
  allocation.for_slack([&](char byte) { overwritten += byte != char(0xff); });
  if (overwritten)
    fprintf(stderr, "cuda-on-cpu: %zu bytes just before or behind an allocation of %zu bytes have been overwritten\n",
            overwritten, allocation.bytes);
  if (allocation.device) allocation.device->used_bytes -= charged_bytes(allocation.bytes);
  allocations().erase(found);
  mmap(allocation.mapping, allocation.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  freed().push_back(allocation);
  if (freed().size() > KEPT_FREED) {
    munmap(freed().front().mapping, freed().front().mapped_bytes);
    freed().pop_front();
  }
  if (overwritten) {
    // Whose fault it was is not known any more; going on would hide it.
    allocation.device ? allocation.device->error = CUDA_ERROR_ILLEGAL_ADDRESS : 0;
  }
}

bool is_in_registered(CUdeviceptr address, size_t bytes) {
  auto after = registered().upper_bound(address);
  if (after == registered().begin()) return false;
  const auto& before = *std::prev(after);
  return address + bytes <= before.first + before.second;
}
bool is_usable(CUdeviceptr address, size_t bytes) {
  const Allocation* allocation = containing(address);
  if (allocation) return address + bytes <= CUdeviceptr(allocation->begin()) + allocation->bytes;
  return is_in_registered(address, bytes);
}

enum class End { Host, Device };

// `stream`: null for the calls that wait, which use the default stream.
CUresult copy(CUdeviceptr to, End to_end, CUdeviceptr from, End from_end, size_t bytes, void* stream, bool waits,
              const char* name) {
  std::shared_ptr<Stream> found;
  {
    Lock lock(state);
    CUresult error;
    Device* device = current_device(error);
    if (!device) return error;
    if (waits) {
      error = forbidden_for_default_stream();
      if (error) return error;
    }
    found = find_stream(stream, device);
    if (!found) return CUDA_ERROR_INVALID_HANDLE;
    if (bytes == 0) return CUDA_SUCCESS;
    if ((to_end == End::Device && !is_usable(to, bytes)) || (from_end == End::Device && !is_usable(from, bytes)) || !to || !from)
      return CUDA_ERROR_INVALID_VALUE;
  }
  const CUresult error = submit(found, {name, [=] {
                                          memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
                                          return CUDA_SUCCESS;
                                        }});
  return error || !waits ? error : finish(found, UINT64_MAX);
}

template <class T> CUresult fill(CUdeviceptr to, T value, size_t count, void* stream, bool waits) {
  std::shared_ptr<Stream> found;
  {
    Lock lock(state);
    CUresult error;
    Device* device = current_device(error);
    if (!device) return error;
    if (waits) {
      error = forbidden_for_default_stream();
      if (error) return error;
    }
    found = find_stream(stream, device);
    if (!found) return CUDA_ERROR_INVALID_HANDLE;
    if (count == 0) return CUDA_SUCCESS;
    if (!is_usable(to, count * sizeof(T)) || to % sizeof(T) != 0) return CUDA_ERROR_INVALID_VALUE;
  }
  const CUresult error = submit(found, {"memset", [=] {
                                          T* at = reinterpret_cast<T*>(to);
                                          for (size_t i = 0; i < count; i++) at[i] = value;
                                          return CUDA_SUCCESS;
                                        }});
  return error || !waits ? error : finish(found, UINT64_MAX);
}

}  // namespace

bool is_device_memory(CUdeviceptr address, size_t bytes) {
  Lock lock(state);
  return is_usable(address, bytes);
}

void free_memory_of(Device* device) {
  Lock lock(state);
  for (auto it = allocations().begin(); it != allocations().end();) {
    const auto next = std::next(it);
    if (it->second.device == device) release(it);
    it = next;
  }
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

CUDA_API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  Lock lock(state);
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  error = forbidden_in_capture();
  return error ? error : allocate(device, bytes, address);
}
// Within a capture the real driver would record an allocation that belongs to the graph; here that is an error.
CUDA_API CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, void* stream) {
  Lock lock(state);
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  const auto found = find_stream(stream, device);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  return found->capture ? CUDA_ERROR_NOT_SUPPORTED : allocate(device, bytes, address);
}
static CUresult free_device_memory(CUdeviceptr address) {
  Lock lock(state);
  const auto found = allocations().find(address);
  if (found == allocations().end() || !found->second.device) return CUDA_ERROR_INVALID_VALUE;
  release(found);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuMemFree_v2(CUdeviceptr address) {
  Device* device;
  {
    Lock lock(state);
    CUresult error;
    device = current_device(error);
    if (!device) return error;
    if (address == 0) return CUDA_SUCCESS;
    error = forbidden_in_capture();
    if (error) return error;
  }
  const CUresult error = finish_all(device);  // as the real one: kernels may still use it
  return error ? error : free_device_memory(address);
}
CUDA_API CUresult cuMemFreeAsync(CUdeviceptr address, void* stream) {
  std::shared_ptr<Stream> found;
  {
    Lock lock(state);
    CUresult error;
    Device* device = current_device(error);
    if (!device) return error;
    found = find_stream(stream, device);
    if (!found) return CUDA_ERROR_INVALID_HANDLE;
    if (found->capture) return CUDA_ERROR_NOT_SUPPORTED;
  }
  return submit(found, {"free", [=] { return free_device_memory(address); }});
}
CUDA_API CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  Lock lock(state);
  CUresult error;
  const Device* device = current_device(error);
  if (!device) return error;
  *total = memory_bytes();
  *free_bytes = memory_bytes() - device->used_bytes;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuMemGetAddressRange_v2(CUdeviceptr* begin, size_t* bytes, CUdeviceptr address) {
  Lock lock(state);
  const Allocation* found = containing(address);
  if (!found) return CUDA_ERROR_NOT_FOUND;
  if (begin) *begin = CUdeviceptr(found->begin());
  if (bytes) *bytes = found->bytes;
  return CUDA_SUCCESS;
}
// Only the kind of memory (2) and the ordinal of its device (9).
CUDA_API CUresult cuPointerGetAttribute(void* value, int attribute, CUdeviceptr address) {
  Lock lock(state);
  const Allocation* found = containing(address);
  if (!found) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == 2) {
    *static_cast<unsigned*>(value) = found->device ? 2 : 1;
  } else if (attribute == 9) {
    *static_cast<int*>(value) = found->device ? found->device->ordinal : 0;
  } else {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  Lock lock(state);
  CUresult error;
  if (!current_device(error)) return error;
  error = forbidden_in_capture();
  if (error) return error;
  CUdeviceptr allocated = 0;
  error = allocate(nullptr, bytes, &allocated);
  *address = reinterpret_cast<void*>(allocated);
  return error;
}
CUDA_API CUresult cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }
CUDA_API CUresult cuMemFreeHost(void* address) {
  Lock lock(state);
  const auto found = allocations().find(CUdeviceptr(address));
  if (found == allocations().end() || found->second.device) return CUDA_ERROR_INVALID_VALUE;
  const CUresult error = forbidden_in_capture();
  if (error) return error;
  release(found);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuMemHostRegister_v2(void* address, size_t bytes, unsigned) {
  Lock lock(state);
  CUresult error;
  if (!current_device(error)) return error;
  if (!address || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (is_in_registered(CUdeviceptr(address), 1)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  registered()[CUdeviceptr(address)] = bytes;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuMemHostUnregister(void* address) {
  Lock lock(state);
  return registered().erase(CUdeviceptr(address)) ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}
CUDA_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* address, unsigned) {
  Lock lock(state);
  if (!is_usable(CUdeviceptr(address), 1)) return CUDA_ERROR_INVALID_VALUE;
  *device = CUdeviceptr(address);
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return copy(to, End::Device, CUdeviceptr(from), End::Host, bytes, nullptr, true, "memcpy HtoD");
}
CUDA_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void* stream) {
  return copy(to, End::Device, CUdeviceptr(from), End::Host, bytes, stream, false, "memcpy HtoD");
}
CUDA_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return copy(CUdeviceptr(to), End::Host, from, End::Device, bytes, nullptr, true, "memcpy DtoH");
}
CUDA_API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void* stream) {
  return copy(CUdeviceptr(to), End::Host, from, End::Device, bytes, stream, false, "memcpy DtoH");
}
CUDA_API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy(to, End::Device, from, End::Device, bytes, nullptr, true, "memcpy DtoD");
}
CUDA_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) {
  return copy(to, End::Device, from, End::Device, bytes, stream, false, "memcpy DtoD");
}
CUDA_API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy(to, End::Host, from, End::Host, bytes, nullptr, true, "memcpy");
}
CUDA_API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) {
  return copy(to, End::Host, from, End::Host, bytes, stream, false, "memcpy");
}
CUDA_API CUresult cuMemcpyPeerAsync(CUdeviceptr to, void*, CUdeviceptr from, void*, size_t bytes, void* stream) {
  return copy(to, End::Device, from, End::Device, bytes, stream, false, "memcpy peer");
}

CUDA_API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) { return fill(to, value, count, nullptr, true); }
CUDA_API CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) { return fill(to, value, count, nullptr, true); }
CUDA_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, void* stream) {
  return fill(to, value, count, stream, false);
}
CUDA_API CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, void* stream) {
  return fill(to, value, count, stream, false);
}
CUDA_API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, void* stream) {
  return fill(to, value, count, stream, false);
}

CUDA_API int cudaOnCpuIsDeviceMemory(const void* address, size_t bytes) { return is_device_memory(CUdeviceptr(address), bytes); }
