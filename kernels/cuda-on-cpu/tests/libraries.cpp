// Tests of cuBLASLt and NCCL.
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <vector>

#include "../types.h"
#include "check.h"

extern "C" {
int cublasLtCreate(void**);
int cublasLtDestroy(void*);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescDestroy(void*);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatrixLayoutDestroy(void*);
int cublasLtMatmulPreferenceCreate(void**);
int cublasLtMatmulPreferenceDestroy(void*);
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int*);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*,
                   void*, const void*, void*, size_t, void*);

struct UniqueId {
  char text[128];
};
struct NcclConfig {
  size_t size;
  unsigned magic, version;
  int blocking, rest[20];
};
int ncclGetUniqueId(UniqueId*);
int ncclCommInitRank(void**, int, UniqueId, int);
int ncclCommInitRankConfig(void**, int, UniqueId, int, const NcclConfig*);
int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*);
int ncclAllGather(const void*, void*, size_t, int, void*, void*);
int ncclReduceScatter(const void*, void*, size_t, int, int, void*, void*);
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*);
int ncclCommGetAsyncError(void*, int*);
int ncclCommCount(void*, int*);
int ncclCommAbort(void*);
int ncclCommDestroy(void*);
int ncclGroupStart();
int ncclGroupEnd();
}

namespace {

struct Matrix {
  CUdeviceptr address;
  int type;
  uint64_t rows, columns;
  int64_t stride;
  bool transposed = false;
};
void* layout_of(const Matrix& matrix) {
  void* layout = nullptr;
  SAME(cublasLtMatrixLayoutCreate(&layout, matrix.type, matrix.rows, matrix.columns, matrix.stride), 0);
  return layout;
}
// d = alpha op(a) op(b) + beta d, by columns.
int multiply(const Matrix& a, const Matrix& b, const Matrix& d, float alpha, float beta, CUdeviceptr workspace, size_t workspace_bytes) {
  void *handle, *operation, *preference;
  SAME(cublasLtCreate(&handle), 0);
  SAME(cublasLtMatmulDescCreate(&operation, 68, 0), 0);
  const int transpose_a = a.transposed, transpose_b = b.transposed;
  SAME(cublasLtMatmulDescSetAttribute(operation, 3, &transpose_a, 4), 0);
  SAME(cublasLtMatmulDescSetAttribute(operation, 4, &transpose_b, 4), 0);
  SAME(cublasLtMatmulPreferenceCreate(&preference), 0);
  const uint64_t most = 1 << 20;
  SAME(cublasLtMatmulPreferenceSetAttribute(preference, 1, &most, 8), 0);
  void *layout_a = layout_of(a), *layout_b = layout_of(b), *layout_d = layout_of(d);
  uint64_t heuristic[12];
  int found = 0;
  int status = cublasLtMatmulAlgoGetHeuristic(handle, operation, layout_a, layout_b, layout_d, layout_d, preference, 1, heuristic, &found);
  if (status == 0) {
    SAME(found, 1);
    void* out = reinterpret_cast<void*>(d.address);
    status = cublasLtMatmul(handle, operation, &alpha, reinterpret_cast<void*>(a.address), layout_a,
                            reinterpret_cast<void*>(b.address), layout_b, &beta, out, layout_d, out, layout_d, heuristic,
                            reinterpret_cast<void*>(workspace), workspace_bytes, stream);
  }
  for (void* layout : {layout_a, layout_b, layout_d}) cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatmulDescDestroy(operation);
  cublasLtDestroy(handle);
  return status;
}

// Each rank is a process.
int nccl_rank(int rank, int ranks, const UniqueId& id) {
  void* comm;
  SAME(ncclCommInitRank(&comm, ranks, id, rank), 0);
  int got = 0;
  SAME(ncclCommCount(comm, &got), 0);
  SAME(got, ranks);
  constexpr size_t COUNT = 200001;  // some pieces
  std::vector<float> values(COUNT);
  for (size_t i = 0; i < COUNT; i++) values[i] = float(i % 1000) + 1000.0f * float(rank);
  const Buffer<float> x(values), all(COUNT * size_t(ranks)), part(COUNT / size_t(ranks));
  const auto at = [](const auto& buffer) { return reinterpret_cast<void*>(buffer.address); };
  const float sum_of_ranks = float(ranks * (ranks - 1) / 2);
  void *graph, *executable;
  SAME(cuStreamBeginCapture_v2(stream, 1), 0);
  SAME(ncclGroupStart(), 0);
  SAME(ncclAllGather(at(x), at(all), COUNT, 7, comm, stream), 0);
  SAME(ncclReduceScatter(at(x), at(part), COUNT / size_t(ranks), 7, 0, comm, stream), 0);
  SAME(ncclGroupEnd(), 0);
  SAME(ncclAllReduce(at(x), at(x), COUNT, 7, 0, comm, stream), 0);
  SAME(launch("check_add", {1, 256}, x.address, 1.0f, 1u), 0);
  SAME(cuStreamEndCapture(stream, &graph), 0);
  SAME(cuGraphInstantiateWithFlags(&executable, graph, 0), 0);
  SAME(cuGraphLaunch(executable, stream), 0);
  SAME(cuStreamSynchronize(stream), 0);
  const auto sums = x.get(), gathered = all.get(), scattered = part.get();
  for (size_t i = 0; i < COUNT; i += 7) {
    SAME(sums[i], float(i % 1000) * float(ranks) + 1000 * sum_of_ranks + (i == 0));
    for (size_t r = 0; r < size_t(ranks); r++) SAME(gathered[r * COUNT + i], float(i % 1000) + 1000.0f * float(r));
  }
  for (size_t i = 0; i < scattered.size(); i += 7)
    SAME(scattered[i], float((size_t(rank) * scattered.size() + i) % 1000) * float(ranks) + 1000 * sum_of_ranks);
  SAME(cuGraphExecDestroy(executable), 0);
  SAME(cuGraphDestroy(graph), 0);

  std::vector<__nv_bfloat16> halves(3, __nv_bfloat16(float(rank + 1)));
  const Buffer<__nv_bfloat16> h(halves);
  SAME(ncclAllReduce(at(h), at(h), 3, 9, 0, comm, stream), 0);
  SAME(cuStreamSynchronize(stream), 0);
  SAME(float(h.get()[2]), sum_of_ranks + float(ranks));
  SAME(ncclBroadcast(at(x), at(x), COUNT, 7, ranks - 1, comm, stream), 0);
  SAME(cuStreamSynchronize(stream), 0);
  SAME(x.get()[1], sums[1]);

  // The last rank goes away; the others wait, can ask, and abort.
  if (rank == ranks - 1) _exit(failures != 0);
  void* event;
  SAME(cuEventCreate(&event, 2), 0);
  SAME(ncclAllReduce(at(x), at(x), COUNT, 7, 0, comm, stream), 0);
  SAME(launch("check_add", {1, 256}, x.address, 1.0f, 1u), 0);
  SAME(cuEventRecord(event, stream), 0);
  for (int i = 0; i < 20; i++) {
    SAME(cuEventQuery(event), 600);
    usleep(1000);
  }
  int error = -1;
  SAME(ncclCommGetAsyncError(comm, &error), 0);
  SAME(error, 0);
  SAME(ncclCommAbort(comm), 0);
  SAME(cuStreamSynchronize(stream), 0);
  return failures;
}

}  // namespace

void cublas_multiplies_in_streams_and_graphs() {
  constexpr unsigned m = 5, n = 7, k = 37;
  std::vector<__nv_bfloat16> a(m * (k + 3)), b((n + 1) * k);
  for (size_t i = 0; i < a.size(); i++) a[i] = float(int(i * 37 % 29) - 14);
  for (size_t i = 0; i < b.size(); i++) b[i] = float(int(i * 53 % 23) - 11);
  const Buffer<__nv_bfloat16> device_a(a), device_b(b);
  const Buffer<float> d(std::vector<float>((m + 2) * n, 1));
  const Buffer<char> workspace(1 << 20);
  const Matrix in_a{device_a.address, 14, k, m, k + 3, true}, in_b{device_b.address, 14, n, k, n + 1, true};
  const Matrix out{d.address, 0, m, n, m + 2};
  void *graph, *executable;
  SAME(cuStreamBeginCapture_v2(stream, 1), 0);
  SAME(multiply(in_a, in_b, out, 2, 3, workspace.address, 1 << 20), 0);
  SAME(cuStreamEndCapture(stream, &graph), 0);
  SAME(d.get()[0], 1);
  SAME(cuGraphInstantiateWithFlags(&executable, graph, 0), 0);
  SAME(cuGraphLaunch(executable, stream), 0);
  const auto got = d.get();
  for (unsigned row = 0; row < m + 2; row++)
    for (unsigned column = 0; column < n; column++) {
      float expected = 1;
      if (row < m) {
        expected = 3;
        for (unsigned i = 0; i < k; i++) expected += 2 * float(a[row * (k + 3) + i]) * float(b[i * (n + 1) + column]);
      }
      SAME(got[column * (m + 2) + row], expected);
    }
  cuGraphExecDestroy(executable);
  cuGraphDestroy(graph);

  SAME(multiply(in_a, in_b, out, 1, 0, workspace.address, 0), 7);  // the algorithm wants its workspace
  Matrix shifted = in_a;
  shifted.address += 2;
  SAME(multiply(shifted, in_b, out, 1, 0, workspace.address, 1 << 20), 15);
  Matrix narrow = in_a;
  narrow.stride = k - 1;
  SAME(multiply(narrow, in_b, out, 1, 0, workspace.address, 1 << 20), 7);
  Matrix large = out;
  large.stride = 100;
  SAME(multiply(in_a, in_b, large, 1, 0, workspace.address, 1 << 20), 7);
}

void processes_reduce_and_gather() {
  for (const int ranks : {1, 2, 3}) {
    UniqueId id;
    SAME(ncclGetUniqueId(&id), 0);
    std::vector<pid_t> children;
    for (int rank = 0; rank < ranks; rank++) {
      const pid_t child = fork();
      if (child == 0) {
        alarm(20);
        _exit(nccl_rank(rank, ranks, id) != 0);
      }
      children.push_back(child);
    }
    for (const pid_t child : children) {
      int status;
      waitpid(child, &status, 0);
      SAME(status, 0);
    }
  }
}

void communicators_can_be_made_without_waiting() {
  UniqueId id;
  SAME(ncclGetUniqueId(&id), 0);
  NcclConfig config{};
  config.blocking = 0;
  void *first, *second;
  int error;
  SAME(ncclCommInitRankConfig(&first, 2, id, 0, &config), 7);
  SAME(ncclCommGetAsyncError(first, &error), 0);
  SAME(error, 7);
  SAME(ncclCommInitRankConfig(&second, 2, id, 1, &config), 0);
  SAME(ncclCommGetAsyncError(first, &error), 0);
  SAME(error, 0);
  SAME(ncclCommDestroy(first), 0);
  SAME(ncclCommAbort(second), 0);
  SAME(ncclCommAbort(second), 4);
}
