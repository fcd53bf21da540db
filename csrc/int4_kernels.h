// The kernels of int4_linear (int8 compute) for each ISA.
#pragma once

#include <tuple>

#include "epilogue.h"
#include "int4_amx.h"
#include "int4_dot.h"
#include "int4_steps.h"
#include "int4_vnni.h"
#include "quantize_rows.h"
#include "row_tiles.h"

namespace pyops {

template <class T>
struct Int4TypeKernels {
  float (*quantize)(const T* x, int64_t K, const float* scale, int8_t* q, int64_t chunk_stride);
  EpilogueFn<T, float> (*epilogue_for)(Activation);
  EpilogueFn<T> (*steps_epilogue_for)(Activation);
};

constexpr int kMaxBeside = 3;  // panels that are in work at once

struct Int4Beside {
  int panels;
  Int4Fn fused, fused_steps;
};

template <int P>
constexpr Int4Beside int4_beside(Int4Fn fused, Int4Fn fused_steps) {
  static_assert(P <= kMaxBeside);
  return {P, fused, fused_steps};
}

struct Int4Kernels {
  int max_rows;           // rows of a tile
  bool tiles = false;     // rows in AMX tiles, else in quads
  double macs_per_cycle;  // about
  // dot[r - 1] for r rows in quads; of tiles, dot[0] for 16 rows, dot[1] for 32, dot[2] and dot[3] for groups of 32
  const Int4Fn* dot;
  int offset = 0;                 // what is added to q - z in the weights that `unpack` makes for them
  const Int4Fn* steps = nullptr;  // quads: as dot, for panels with steps, which `unpack_steps` makes xor `flip`
  uint8_t flip = 0;
  int max_fused = 0;  // rows that a fused kernel takes, which reads nibbles: fused[r - 1] for r rows
  const Int4Fn* fused = nullptr;
  const Int4Fn* fused_steps = nullptr;  // of tiles, fused_steps[0] for 16 rows, fused_steps[1] for 32
  // Rows of a lone tile for which panels are read side by side: beside[(r - 1) / beside_rows]
  int max_beside = 0, beside_rows = 1;
  const Int4Beside* beside = nullptr;
  UnpackInt4Fn unpack;
  UnpackStepsFn unpack_steps = nullptr;
  decltype(&pack_quads) pack_rows = nullptr;  // into quads
  // The sums of the groups of a row, which unsigned weights need; or null
  void (*sums)(const int8_t* row, int64_t quads, int64_t group_quads, int32_t* out, int64_t stride) = nullptr;
  void (*fence)();
  std::tuple<Int4TypeKernels<float>, Int4TypeKernels<bf16>, Int4TypeKernels<fp16>> types;
};

#define PYOPS_TYPED(isa, T) \
  Int4TypeKernels<T> { isa::quantize_row<T>, isa::epilogue_for<T, float>, isa::epilogue_for<T> }
#define PYOPS_SHARED(isa, kernels)    \
  kernels.fence = isa::fence_streams; \
  kernels.types = {PYOPS_TYPED(isa, float), PYOPS_TYPED(isa, bf16), PYOPS_TYPED(isa, fp16)}
#define PYOPS_BY_GROUPS(isa, MR) int4_by_groups<MR, isa::int8_dot<MR>, isa::int8_dot<MR, 8>, isa::scale_rows>
#define PYOPS_STEPS(isa, MR) int4_steps_by_dot<MR, isa::int8_dot<MR>>

#define PYOPS_FUSED(steps)                                                                                  \
  v::int4_fused_few<1, steps, 1>, v::int4_fused_few<2, steps, 1>, v::int4_fused_few<3, steps, 1>,           \
      v::int4_fused<4, steps>, v::int4_fused<5, steps>, v::int4_fused<6, steps>, v::int4_fused<7, steps>,   \
      v::int4_fused<8, steps>, v::int4_fused<9, steps>, v::int4_fused<10, steps>, v::int4_fused<11, steps>, \
      v::int4_fused<12, steps>, v::int4_fused<13, steps>, v::int4_fused<14, steps>

inline const Int4Kernels& int4_kernels(Isa isa, int64_t M, bool steps) {
  static constexpr Int4Fn kGeneric[] = {PYOPS_BY_GROUPS(generic, 1), PYOPS_BY_GROUPS(generic, 2),
                                        PYOPS_BY_GROUPS(generic, 3), PYOPS_BY_GROUPS(generic, 4)};
  static constexpr Int4Fn kGenericSteps[] = {PYOPS_STEPS(generic, 1), PYOPS_STEPS(generic, 2), PYOPS_STEPS(generic, 3),
                                             PYOPS_STEPS(generic, 4)};
  static const Int4Kernels generic = [] {
    Int4Kernels k{};
    k.max_rows = 4;
    k.macs_per_cycle = 2;
    k.dot = kGeneric;
    k.steps = kGenericSteps;
    k.unpack = unpack_int4;
    k.unpack_steps = unpack_steps;
    k.pack_rows = pack_quads;
    PYOPS_SHARED(generic, k);
    return k;
  }();
#if defined(__x86_64__)
  static constexpr Int4Fn kAvx2[] = {PYOPS_BY_GROUPS(avx2, 1), PYOPS_BY_GROUPS(avx2, 2), PYOPS_BY_GROUPS(avx2, 3)};
  static constexpr Int4Fn kAvx512[] = {
      PYOPS_BY_GROUPS(avx512, 1), PYOPS_BY_GROUPS(avx512, 2), PYOPS_BY_GROUPS(avx512, 3), PYOPS_BY_GROUPS(avx512, 4),
      PYOPS_BY_GROUPS(avx512, 5), PYOPS_BY_GROUPS(avx512, 6), PYOPS_BY_GROUPS(avx512, 7), PYOPS_BY_GROUPS(avx512, 8)};
  static constexpr Int4Fn kAvx2Steps[] = {PYOPS_STEPS(avx2, 1), PYOPS_STEPS(avx2, 2), PYOPS_STEPS(avx2, 3)};
  static constexpr Int4Fn kAvx512Steps[] = {PYOPS_STEPS(avx512, 1), PYOPS_STEPS(avx512, 2), PYOPS_STEPS(avx512, 3),
                                            PYOPS_STEPS(avx512, 4), PYOPS_STEPS(avx512, 5), PYOPS_STEPS(avx512, 6),
                                            PYOPS_STEPS(avx512, 7), PYOPS_STEPS(avx512, 8)};
  namespace v = avx512vnni;
  static constexpr Int4Fn kVnni[] = {
      v::int4_unpacked<1>,  v::int4_unpacked<2>,  v::int4_unpacked<3>,  v::int4_unpacked<4>, v::int4_unpacked<5>,
      v::int4_unpacked<6>,  v::int4_unpacked<7>,  v::int4_unpacked<8>,  v::int4_unpacked<9>, v::int4_unpacked<10>,
      v::int4_unpacked<11>, v::int4_unpacked<12>, v::int4_unpacked<13>, v::int4_unpacked<14>};
  static constexpr Int4Fn kFused[] = {PYOPS_FUSED(false)};
  static constexpr Int4Fn kFusedSteps[] = {PYOPS_FUSED(true)};
  static constexpr Int4Beside kBeside[] = {
      int4_beside<3>(v::int4_fused_few<1, false, 3>, v::int4_fused_few<1, true, 3>),
      int4_beside<2>(v::int4_fused_few<2, false, 2>, v::int4_fused_few<2, true, 2>),
      int4_beside<2>(v::int4_fused_few<3, false, 2>, v::int4_fused_few<3, true, 2>)};
  static constexpr Int4Fn kVnniSteps[] = {v::int4_steps<1>,  v::int4_steps<2>,  v::int4_steps<3>,  v::int4_steps<4>,
                                          v::int4_steps<5>,  v::int4_steps<6>,  v::int4_steps<7>,  v::int4_steps<8>,
                                          v::int4_steps<9>,  v::int4_steps<10>, v::int4_steps<11>, v::int4_steps<12>,
                                          v::int4_steps<13>, v::int4_steps<14>};
  static constexpr Int4Fn kAmx[] = {amx::int4_unpacked<1, false>, amx::int4_unpacked<2, false>,
                                    amx::int4_unpacked<1, true>, amx::int4_unpacked<2, true>};
  static constexpr Int4Fn kAmxSteps[] = {amx::int4_steps<1, 1>, amx::int4_steps<2, 1>};
  static constexpr Int4Beside kAmxBeside[] = {int4_beside<2>(nullptr, amx::int4_steps<1, 2>)};
  static const Int4Kernels avx2 = [] {
    Int4Kernels k{};
    k.max_rows = 3;
    k.macs_per_cycle = 24;
    k.dot = kAvx2;
    k.steps = kAvx2Steps;
    k.unpack = unpack_int4;
    k.unpack_steps = avx2::unpack_steps_wide;
    k.pack_rows = pack_quads;
    PYOPS_SHARED(avx2, k);
    return k;
  }();
  static const Int4Kernels avx512 = [] {
    Int4Kernels k{};
    k.max_rows = 8;
    k.macs_per_cycle = 40;
    k.dot = kAvx512;
    k.steps = kAvx512Steps;
    k.unpack = avx512::unpack_int4_wide;
    k.unpack_steps = avx512::unpack_steps_wide;
    k.pack_rows = pack_quads_avx512;
    PYOPS_SHARED(avx512, k);
    return k;
  }();
  static const Int4Kernels vnni = [] {
    Int4Kernels k{};
    k.max_rows = 14;
    k.macs_per_cycle = 128;
    k.dot = kVnni;
    k.offset = kVnniOffset;
    k.steps = kVnniSteps;
    k.flip = kUnsigned;
    k.max_fused = 14;
    k.fused = kFused;
    k.fused_steps = kFusedSteps;
    k.max_beside = 3;
    k.beside = kBeside;
    k.unpack = avx512::unpack_int4_wide;
    k.unpack_steps = avx512::unpack_steps_wide;
    k.pack_rows = pack_quads_avx512;
    k.sums = v::group_sums;
    PYOPS_SHARED(avx512, k);
    return k;
  }();
  static const Int4Kernels amx = [] {
    Int4Kernels k{};
    k.max_rows = 32;
    k.tiles = true;
    k.macs_per_cycle = 500;
    k.dot = kAmx;
    k.fused_steps = kAmxSteps;
    k.max_beside = 16;
    k.beside_rows = 16;
    k.beside = kAmxBeside;
    k.unpack = avx512::unpack_int4_wide;
    PYOPS_SHARED(avx512, k);
    return k;
  }();
  switch (isa) {
    case Isa::amx:
      // A few rows only stream weights. Up to 8 where AMX has groups to scale, which does not fetch ahead.
      return M <= (steps ? 3 : 8) ? vnni : amx;
    case Isa::avx512vnni:
      return vnni;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    case Isa::generic:
      break;
  }
#endif
  (void)isa, (void)M, (void)steps;
  return generic;
}

#undef PYOPS_TYPED
#undef PYOPS_SHARED
#undef PYOPS_BY_GROUPS
#undef PYOPS_STEPS
#undef PYOPS_FUSED
}  // namespace pyops
