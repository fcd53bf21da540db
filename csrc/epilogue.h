// The epilogue that every matmul and convolution shares: y = act(acc · scale + bias + residual).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace pyops {

enum class Activation : int { none, relu, relu6, gelu, gelu_tanh, silu, sigmoid, tanh, hardswish };

inline Activation parse_activation(const char* name) {
  static constexpr const char* kNames[] = {"none", "relu",    "relu6", "gelu",     "gelu_tanh",
                                           "silu", "sigmoid", "tanh",  "hardswish"};
  for (int i = 0; i < 9; i++)
    if (std::string_view(kNames[i]) == name) return Activation(i);
  throw std::invalid_argument(std::string("activation='") + name + "' is unknown");
}

// What the epilogue of one tile reads and writes. The tile has 32 columns, of which `cols` are wanted. Acc is int32_t
// or float.
template <class T, class Acc = int32_t>
struct EpilogueTile {
  const Acc* acc;     // [rows][32]
  const float* s_x;   // [rows]
  const float* s_w;   // [32], padded
  const float* bias;  // [32], padded, zeros where there is none
  const T* residual;  // [rows][ld], or null
  T* y;               // [rows][ld]
  int64_t ld;
  int cols;
  bool
      past_cache;  // y is larger than the caches: store without reading its lines first; fence_streams when all is done
};

// Rows [begin, end) of a tile.
template <class T, class Acc = int32_t>
using EpilogueFn = void (*)(const EpilogueTile<T, Acc>& tile, int begin, int end);

// Whether rows of 32 at y, `ld` apart, are whole cache lines.
template <class T>
inline bool whole_lines(const T* y, int64_t ld) {
  return (reinterpret_cast<uintptr_t>(y) | static_cast<uintptr_t>(ld * sizeof(T))) % 64 == 0;
}

}  // namespace pyops

#define PYOPS_ISA_FILE "epilogue.inc"
#include "for_each_isa.h"
