// Two small kernels that use what the shim models: a block reduction, and a pipelined matmul on tensor cores. The tests
// define PLANT_… to see that the mistakes it names are caught.
#include "compat.hpp"

namespace probe {

constexpr int kThreads = 128;
constexpr int kTile = 32;           // rows and columns of an output tile: 2 × 2 warps of 16 × 16
constexpr int kStep = 64;           // bytes of K in one stage
constexpr int kPitch = kStep + 16;  // rows of a stage in shared memory, shifted so that ldmatrix meets no bank twice
constexpr int kStages = 2;
constexpr int kStageBytes = 2 * kTile * kPitch;

// One block a row: s = max|x| / 127 and q = round(x · (127 / max|x|)), rounded as in pyops/ops/int8_linear.py.
__global__ void __launch_bounds__(kThreads) quantize_rows(
    const float* __restrict__ x,  // [M, K]
    int8_t* __restrict__ q,       // [M, K]
    float* __restrict__ scale,    // [M]
    int K) {
  __shared__ float warp_amax[kThreads / 32];
  const int t = threadIdx.x;
  const float* row = x + int64_t(blockIdx.x) * K;
  float amax = 0;
  for (int k = t; k < K; k += kThreads) amax = fmaxf(amax, fabsf(row[k]));
  for (int d = 16; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
  if (t % 32 == 0) warp_amax[t / 32] = amax;
#ifndef PLANT_MISSING_SYNC
  __syncthreads();
#endif
  for (int w = 0; w < kThreads / 32; w++) amax = fmaxf(amax, warp_amax[w]);
  const float inverse = amax > 0 ? __fdiv_rn(127.0f, amax) : 0.0f;
  if (t == 0) scale[blockIdx.x] = __fdiv_rn(amax, 127.0f);
#ifdef PLANT_OUT_OF_BOUNDS
  for (int k = t; k <= K; k += kThreads)
#else
  for (int k = t; k < K; k += kThreads)
#endif
    q[int64_t(blockIdx.x) * K + k] = int8_t(__float2int_rn(__fmul_rn(row[k], inverse)));
}

// Brings 32 rows × 64 bytes of a [rows, K] matrix into shared memory, zeros beyond its edges.
__device__ inline void load_tile(int8_t* tile, const int8_t* matrix, int first_row, int rows, int k, int K) {
  const int row = threadIdx.x / 4, byte = threadIdx.x % 4 * 16;
  const bool inside = first_row + row < rows && k + byte < K;
  cp_async_16(tile + row * kPitch + byte, matrix + (inside ? int64_t(first_row + row) * K + k + byte : 0), inside ? 16 : 0);
}

// c [M, N] int32 = a [M, K] · b [N, K]ᵀ, int8; K is a multiple of 16.
__global__ void __launch_bounds__(kThreads)
    matmul_s8(const int8_t* __restrict__ a, const int8_t* __restrict__ b, int* __restrict__ c, int M, int N, int K) {
  DYNAMIC_SHARED(int8_t, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, warp_m = warp / 2 * 16, warp_n = warp % 2 * 16;
  int acc[2][4] = {};
  const int steps = (K + kStep - 1) / kStep;
  for (int step = -1; step < steps; step++) {
    if (step + 1 < steps) {
      int8_t* stage = shared + (step + 1) % kStages * kStageBytes;
      load_tile(stage, a, m0, M, (step + 1) * kStep, K);
      load_tile(stage + kTile * kPitch, b, n0, N, (step + 1) * kStep, K);
    }
    cp_async_commit();
    if (step < 0) continue;
#ifndef PLANT_MISSING_WAIT
    cp_async_wait<1>();
#endif
    __syncthreads();
    const int8_t* tile_a = shared + step % kStages * kStageBytes;
    const int8_t* tile_b = tile_a + kTile * kPitch;
    for (int k = 0; k < kStep; k += 32) {
      uint32_t fragment_a[4], fragment_b[4];
      ldmatrix_x4(fragment_a, tile_a + (warp_m + lane % 16) * kPitch + k + lane / 16 * 16);
      ldmatrix_x4(fragment_b, tile_b + (warp_n + lane % 8 + lane / 16 * 8) * kPitch + k + lane / 8 % 2 * 16);
      for (int j = 0; j < 2; j++) mma_m16n8k32_s8(acc[j], fragment_a, {fragment_b[2 * j], fragment_b[2 * j + 1]});
    }
    __syncthreads();
  }
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) {
      const int m = m0 + warp_m + lane / 4 + e / 2 * 8, n = n0 + warp_n + j * 8 + lane % 4 * 2 + e % 2;
      if (m < M && n < N) c[int64_t(m) * N + n] = acc[j][e];
    }
}

void launch_quantize_rows(const float* x, int8_t* q, float* scale, int M, int K, cudaStream_t stream) {
  LAUNCH(quantize_rows, dim3(M), dim3(kThreads), 0, stream, x, q, scale, K);
}

void launch_matmul_s8(const int8_t* a, const int8_t* b, int* c, int M, int N, int K, cudaStream_t stream) {
  const dim3 grid((N + kTile - 1) / kTile, (M + kTile - 1) / kTile);
  LAUNCH(matmul_s8, grid, dim3(kThreads), kStages * kStageBytes, stream, a, b, c, M, N, K);
}

}  // namespace probe
