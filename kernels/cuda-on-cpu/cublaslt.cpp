// libcublasLt.so.13: matrix products by plain loops, put into streams as kernels are.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cu.h"
#include "types.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Status = int;
enum : Status {
  SUCCESS = 0,
  NOT_INITIALIZED = 1,
  INVALID_VALUE = 7,
  EXECUTION_FAILED = 13,
  NOT_SUPPORTED = 15,
};

enum DataType { R_32F = 0, R_16F = 2, R_16BF = 14 };
constexpr int COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_16F = 74, COMPUTE_32F_FAST_16BF = 75,
              COMPUTE_32F_FAST_TF32 = 77;
enum Order { COLUMNS = 0, ROWS = 1 };
constexpr int EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4;

struct Operation {
  int compute_type;
  int scale_type;
  int pointer_mode = 0;
  int transpose_a = 0, transpose_b = 0;
  int epilogue = EPILOGUE_DEFAULT;
  void* bias = nullptr;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;  // elements from a column to the next; from a row, if `order` is ROWS
  int order = COLUMNS;
  int batches = 1;
  int64_t batch_stride = 0;
};
struct Preference {
  uint64_t workspace_bytes = 0;
  uint32_t reduction_schemes = 7;                 // none is used here, which is always allowed
  uint32_t alignments[4] = {256, 256, 256, 256};  // of a, b, c, d
};
struct Algorithm {  // 64 bytes, of which the caller knows nothing
  uint64_t magic;
  uint64_t workspace_bytes;
  uint32_t alignments[4];
  uint64_t rest[4];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Algorithm) == 64 && sizeof(Heuristic) == 96, "the library's layout");
constexpr uint64_t MAGIC = 0x637564616f6e6370;

// An attribute of a descriptor, set from and read into the caller's buffer.
template <class T> Status set(T& attribute, const void* from, size_t bytes) {
  if (!from || bytes < sizeof(T)) return INVALID_VALUE;
  memcpy(&attribute, from, sizeof(T));
  return SUCCESS;
}
template <class T> Status get(const T& attribute, void* to, size_t bytes, size_t* written) {
  if (written) *written = sizeof(T);
  if (!to || bytes < sizeof(T)) return INVALID_VALUE;
  memcpy(to, &attribute, sizeof(T));
  return SUCCESS;
}
// Applies `use` to the attribute of that number; NOT_SUPPORTED if it is none of those done here.
template <class Descriptor, class Use> Status with_operation(Descriptor* it, int attribute, Use use) {
  switch (attribute) {
    case 0: return use(it->compute_type);
    case 1: return use(it->scale_type);
    case 2: return use(it->pointer_mode);
    case 3: return use(it->transpose_a);
    case 4: return use(it->transpose_b);
    case 7: return use(it->epilogue);
    case 8: return use(it->bias);
    default: return NOT_SUPPORTED;
  }
}
template <class Descriptor, class Use> Status with_layout(Descriptor* it, int attribute, Use use) {
  switch (attribute) {
    case 0: return use(it->type);
    case 1: return use(it->order);
    case 2: return use(it->rows);
    case 3: return use(it->columns);
    case 4: return use(it->stride);
    case 5: return use(it->batches);
    case 6: return use(it->batch_stride);
    default: return NOT_SUPPORTED;
  }
}
template <class Descriptor, class Use> Status with_preference(Descriptor* it, int attribute, Use use) {
  switch (attribute) {
    case 1: return use(it->workspace_bytes);
    case 3: return use(it->reduction_schemes);
    case 5: case 6: case 7: case 8: return use(it->alignments[attribute - 5]);
    default: return NOT_SUPPORTED;
  }
}

size_t size_of(int type) { return type == R_32F ? 4 : 2; }
float load(const void* from, int type, size_t index) {
  if (type == R_32F) return static_cast<const float*>(from)[index];
  const uint16_t bits = static_cast<const uint16_t*>(from)[index];
  return type == R_16F ? cuda_on_cpu::float_of_f16(bits) : cuda_on_cpu::float_of_bf16(bits);
}
void store(void* to, int type, size_t index, float x) {
  if (type == R_32F)
    static_cast<float*>(to)[index] = x;
  else
    static_cast<uint16_t*>(to)[index] = type == R_16F ? cuda_on_cpu::f16_of_float(x) : cuda_on_cpu::bf16_of_float(x);
}

size_t place(const Layout& layout, uint64_t row, uint64_t column) {
  return layout.order == COLUMNS ? row + column * uint64_t(layout.stride) : row * uint64_t(layout.stride) + column;
}
size_t extent_bytes(const Layout& layout) {
  if (layout.rows == 0 || layout.columns == 0) return 0;
  const size_t last = place(layout, layout.rows - 1, layout.columns - 1) + size_t(layout.batches - 1) * size_t(layout.batch_stride);
  return (last + 1) * size_of(layout.type);
}

struct Product {
  Operation operation;
  Layout a, b, c, d;
  float alpha, beta;
  const void *from_a, *from_b, *from_c;
  void* to;
  void* workspace;
  size_t workspace_bytes;

  uint64_t inner() const { return operation.transpose_a ? a.rows : a.columns; }

  // Shapes and types that the library multiplies.
  Status check() const {
    for (const Layout* layout : {&a, &b, &c, &d}) {
      if (layout->type != R_32F && layout->type != R_16F && layout->type != R_16BF) return NOT_SUPPORTED;
      if (layout->order != COLUMNS && layout->order != ROWS) return NOT_SUPPORTED;
      if (layout->batches != d.batches || layout->batches < 1) return INVALID_VALUE;
      const uint64_t line = layout->order == COLUMNS ? layout->rows : layout->columns;
      if (layout->stride < 0 || uint64_t(layout->stride) < line) return INVALID_VALUE;
    }
    const uint64_t rows = operation.transpose_a ? a.columns : a.rows, columns = operation.transpose_b ? b.rows : b.columns;
    const uint64_t other_inner = operation.transpose_b ? b.columns : b.rows;
    if (inner() != other_inner || d.rows != rows || d.columns != columns || c.rows != rows || c.columns != columns)
      return INVALID_VALUE;
    if (a.type != b.type || c.type != d.type || (d.type != a.type && d.type != R_32F)) return NOT_SUPPORTED;
    const int compute = operation.compute_type;
    if (compute != COMPUTE_32F && compute != COMPUTE_32F_PEDANTIC &&
        !(a.type == R_32F && (compute == COMPUTE_32F_FAST_16F || compute == COMPUTE_32F_FAST_16BF || compute == COMPUTE_32F_FAST_TF32)))
      return NOT_SUPPORTED;
    if (operation.scale_type != R_32F || operation.pointer_mode != 0) return NOT_SUPPORTED;
    if (operation.transpose_a > 1 || operation.transpose_b > 1) return NOT_SUPPORTED;
    if (operation.epilogue != EPILOGUE_DEFAULT && operation.epilogue != EPILOGUE_BIAS) return NOT_SUPPORTED;
    return SUCCESS;
  }

  // Row `i` of op(A), or column `i` of op(B), as floats one after the other.
  static void gather(const Layout& layout, const void* from, bool by_rows, uint64_t i, uint64_t count, size_t first, float* to) {
    for (uint64_t k = 0; k < count; k++)
      to[k] = load(from, layout.type, first + (by_rows ? place(layout, i, k) : place(layout, k, i)));
  }

  static float dot(const float* x, const float* y, uint64_t count) {
    constexpr int LANES = 16;  // what the compiler makes vector instructions of
    float sums[LANES] = {};
    uint64_t k = 0;
    for (; k + LANES <= count; k += LANES)
      for (int lane = 0; lane < LANES; lane++) sums[lane] += x[k + lane] * y[k + lane];
    float sum = 0;
    for (; k < count; k++) sum += x[k] * y[k];
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return sum;
  }

  void run_batch(size_t batch) const {
    const uint64_t count = inner();
    const auto first = [&](const Layout& layout) { return size_t(layout.batch_stride) * batch; };
    std::vector<float> columns(d.columns * count), row(count);
    for (uint64_t j = 0; j < d.columns; j++)
      gather(b, from_b, operation.transpose_b, j, count, first(b), &columns[j * count]);
    for (uint64_t i = 0; i < d.rows; i++) {
      gather(a, from_a, !operation.transpose_a, i, count, first(a), row.data());
      for (uint64_t j = 0; j < d.columns; j++) {
        float x = alpha * dot(row.data(), &columns[j * count], count);
        if (beta != 0) x += beta * load(from_c, c.type, first(c) + place(c, i, j));
        if (operation.epilogue == EPILOGUE_BIAS) x += load(operation.bias, d.type, i);
        store(to, d.type, first(d) + place(d, i, j), x);
      }
    }
  }

  bool is_in_device_memory() const {
    const auto present = [](const void* address, size_t bytes) { return bytes == 0 || cudaOnCpuIsDeviceMemory(address, bytes); };
    return present(from_a, extent_bytes(a)) && present(from_b, extent_bytes(b)) &&
           (beta == 0 || present(from_c, extent_bytes(c))) && present(to, extent_bytes(d)) &&
           (operation.epilogue != EPILOGUE_BIAS || present(operation.bias, d.rows * size_of(d.type))) &&
           (workspace_bytes == 0 || cudaOnCpuIsDeviceMemory(workspace, workspace_bytes));
  }
  CUresult run() const {
    // Memory may have been freed since a capture.
    if (!is_in_device_memory()) {
      fprintf(stderr, "cuda-on-cpu: cublasLtMatmul: a matrix or the workspace is outside of device memory\n");
      return 700;
    }
    if (workspace_bytes) memset(workspace, 0xff, workspace_bytes);
    for (size_t batch = 0; batch < size_t(d.batches); batch++) run_batch(batch);
    return 0;
  }
};

// What an address is a multiple of on a GPU, where allocations begin at multiples of 256.
uint32_t alignment_of(const void* address) {
  CUdeviceptr begin = 0;
  if (cuMemGetAddressRange_v2(&begin, nullptr, CUdeviceptr(address)) != 0) return 1;
  const uint64_t offset = (CUdeviceptr(address) - begin) | 256;
  return uint32_t(offset & (~offset + 1));
}

constexpr size_t WORKSPACE_BYTES = 64 << 10;

Status heuristic_of(const Product& product, const Preference& preference, Heuristic& result) {
  result = Heuristic{};
  result.status = product.check();
  if (result.status) return result.status;
  result.workspace_bytes = std::min<size_t>(preference.workspace_bytes, WORKSPACE_BYTES);
  result.algorithm.magic = MAGIC;
  result.algorithm.workspace_bytes = result.workspace_bytes;
  memcpy(result.algorithm.alignments, preference.alignments, sizeof(preference.alignments));
  result.waves = 1;
  return SUCCESS;
}

}  // namespace

API Status cublasLtCreate(void** handle) {
  if (cudaOnCpuDevice() < 0) return NOT_INITIALIZED;
  *handle = new int(cudaOnCpuDevice());
  return SUCCESS;
}
API Status cublasLtDestroy(void* handle) {
  delete static_cast<int*>(handle);
  return SUCCESS;
}
API size_t cublasLtGetVersion() { return 130000; }
API size_t cublasLtGetCudartVersion() { return 13000; }
API const char* cublasLtGetStatusName(Status status) {
  switch (status) {
    case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS_UNKNOWN";
  }
}
API const char* cublasLtGetStatusString(Status status) { return cublasLtGetStatusName(status); }

API Status cublasLtMatmulDescCreate(Operation** operation, int compute_type, int scale_type) {
  *operation = new Operation{compute_type, scale_type};
  return SUCCESS;
}
API Status cublasLtMatmulDescDestroy(Operation* operation) {
  delete operation;
  return SUCCESS;
}
API Status cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* from, size_t bytes) {
  return with_operation(operation, attribute, [&](auto& it) { return set(it, from, bytes); });
}
API Status cublasLtMatmulDescGetAttribute(const Operation* operation, int attribute, void* to, size_t bytes, size_t* written) {
  return with_operation(operation, attribute, [&](const auto& it) { return get(it, to, bytes, written); });
}

API Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  *layout = new Layout{type, rows, columns, stride};
  return SUCCESS;
}
API Status cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return SUCCESS;
}
API Status cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* from, size_t bytes) {
  return with_layout(layout, attribute, [&](auto& it) { return set(it, from, bytes); });
}
API Status cublasLtMatrixLayoutGetAttribute(const Layout* layout, int attribute, void* to, size_t bytes, size_t* written) {
  return with_layout(layout, attribute, [&](const auto& it) { return get(it, to, bytes, written); });
}

API Status cublasLtMatmulPreferenceCreate(Preference** preference) {
  *preference = new Preference;
  return SUCCESS;
}
API Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  return SUCCESS;
}
API Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* from, size_t bytes) {
  return with_preference(preference, attribute, [&](auto& it) { return set(it, from, bytes); });
}
API Status cublasLtMatmulPreferenceGetAttribute(const Preference* preference, int attribute, void* to, size_t bytes, size_t* written) {
  return with_preference(preference, attribute, [&](const auto& it) { return get(it, to, bytes, written); });
}

API Status cublasLtMatmulAlgoGetHeuristic(void* handle, const Operation* operation, const Layout* a, const Layout* b,
                                          const Layout* c, const Layout* d, const Preference* preference, int asked,
                                          Heuristic* results, int* found) {
  if (!handle || !operation || !a || !b || !c || !d || !preference || asked < 1 || !results || !found) return INVALID_VALUE;
  const Product product{*operation, *a, *b, *c, *d, 1, 1, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  const Status status = heuristic_of(product, *preference, results[0]);
  *found = status == SUCCESS ? 1 : 0;
  return status;
}

API Status cublasLtMatmul(void* handle, const Operation* operation, const void* alpha, const void* from_a, const Layout* a,
                          const void* from_b, const Layout* b, const void* beta, const void* from_c, const Layout* c, void* to,
                          const Layout* d, const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
  if (!handle || !operation || !alpha || !beta || !a || !b || !c || !d) return INVALID_VALUE;
  auto product = std::make_unique<Product>(Product{*operation, *a, *b, *c, *d, *static_cast<const float*>(alpha),
                                                   *static_cast<const float*>(beta), from_a, from_b, from_c, to, workspace, 0});
  const Status status = product->check();
  if (status) return status;
  if (algorithm) {
    if (algorithm->magic != MAGIC || algorithm->workspace_bytes > workspace_bytes) return INVALID_VALUE;
    product->workspace_bytes = algorithm->workspace_bytes;
    const void* addresses[] = {from_a, from_b, product->beta == 0 ? to : from_c, to};
    for (int i = 0; i < 4; i++) {
      if (alignment_of(addresses[i]) >= algorithm->alignments[i]) continue;
      fprintf(stderr, "cuda-on-cpu: cublasLtMatmul: operand %c is aligned to %u bytes, its algorithm was chosen for %u\n",
              "ABCD"[i], alignment_of(addresses[i]), algorithm->alignments[i]);
      return NOT_SUPPORTED;
    }
  }
  if (!product->is_in_device_memory()) {
    fprintf(stderr, "cuda-on-cpu: cublasLtMatmul: a matrix or the workspace is outside of device memory\n");
    return INVALID_VALUE;
  }
  const CUresult error = cudaOnCpuSubmit(
      stream, "cublasLtMatmul", 0, [](void* state) { return static_cast<Product*>(state)->run(); },
      [](void* state) { delete static_cast<Product*>(state); }, product.release());
  return error ? EXECUTION_FAILED : SUCCESS;
}
