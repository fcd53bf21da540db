// What the parts of the sparse convolution share: the packed weight, the geometry of a call, the kernels of an ISA.
//
// Pixels are lanes. The output is cut into sub-tiles of mh × mw pixels; as many sub-tiles as a vector has lanes make a
// lane group. Position (i, j) of a lane group is one vector: pixel (i, j) of each of its sub-tiles. The input that a
// lane group sees is packed into a panel [channel][HR][HC][lanes], in which the tap (r, s) of a channel is the whole
// panel of the channel moved by a number of vectors: every load is an aligned vector, whatever the tap, stride or
// dilation. With a stride the rows (columns) of a panel are sorted by phase, so that neighbours stay neighbours.
//
// Where weights come in blocks of as many output channels as a vector has lanes (AVX-512: 16), channels are lanes
// instead: a block is one vector, pixels are broadcast to it from memory. What a patch of mh × mw output pixels sees is
// packed as it is into a panel [channel][HR][HC], rows of whole lines, and a tile of it is computed at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "epilogue.h"
#include "vec.h"

namespace pyops::sparse {

// The convolution of a weight [O, C / groups, R, S], without its padding.
struct Conv {
  int32_t O, C, R, S, groups, sh, sw, dh, dw;
  int32_t channels() const { return C / groups; }  // of the weight
  int32_t rows() const { return O / groups; }      // output channels of a group
};

// What the rows of a packed weight are: output channels, or for the gradient of x its channels in each phase of the
// stride, which depend on the padding. `order`: 0 forward, 1 gradient, phases inside channels, 2 gradient, outside.
struct Kind {
  int32_t order, sh, sw, top, left;
};

// How many pixels: a sub-tile is mh × mw, the registers hold nr × nc of its positions at a time. With channels as lanes
// it is a patch, and its last tiles may be smaller.
struct Tiling {
  int32_t mh, mw, nr, nc;
  int32_t flat;          // 1 × 1, stride 1, NCHW: the lanes of a vector are consecutive pixels, and mh = 1, mw = nc;
                         // with channels as lanes, each image is one row of pixels
  int32_t channels = 0;  // 1: they are the lanes
};

constexpr int kMaxTaps = 64;             // in each direction; a larger kernel has no packed form
constexpr int32_t kChannelLanes = 16;    // with channels as lanes
constexpr int32_t kMaxGroupRows = 1024;  // so that a row of accumulators has a 16-bit number

// Where the window of a sub-tile lies in a panel.
struct Window {
  int32_t rows, cols;            // of the window, in input pixels
  int32_t HR, HC;                // rows and columns of the panel: those of them that any tap reads
  int32_t row_of_tap[kMaxTaps];  // first panel row of tap r
  int32_t col_of_tap[kMaxTaps];
  void init(const Conv& conv, const Tiling& tiling);
  // Window coordinate of each panel row or column: phase + stride · j, phases one after the other.
  static int32_t slots(int32_t taps, int32_t stride, int32_t dilation, int32_t length, int32_t* of_tap, int32_t* at);
};

// Kept weights of one or more output channels within a block of input channels.
struct Segment {
  uint16_t row[2];    // rows of accumulators; pairs: both, others: the first of `rows_at_once`
  uint16_t count[3];  // taps of both rows, of the first only, of the second only; others: taps
  uint16_t first;     // nothing was accumulated for these rows before
};

// A block of input channels for a group of rows.
struct Block {
  int64_t segment, tap, value;  // where its own begin
  int64_t segments;
};

// Output channels that are computed together: rows of accumulators in whole.
struct RowGroup {
  int32_t o0, o1;  // output channels
  int32_t rows;    // of accumulators, padding included
  int32_t reserved;
};

constexpr uint64_t kMagic = 0x31304356'53504f50ull;

// The packed weight: this header, then the arrays that it tells the places of, as offsets from its own.
struct Packed {
  uint64_t magic;
  int64_t bytes;
  uint64_t number, seal;  // of its making; only what this process made is read
  Conv conv;
  Tiling tiling;
  int32_t lanes, rows_at_once;  // 2: pairs
  int32_t channels_in_block, blocks, row_groups, live;
  Kind kind;
  int64_t live_at, groups_at, row_of_at, blocks_at, segments_at, taps_at, values_at;
  int64_t sources_at;  // 0: `values` holds the values; else each call fetches them from where `sources` says
  int64_t stored;      // values of the canonical weight, of an int8 one quads
  int64_t starts_at;   // int8: what the accumulators of each output channel start at; 0: fp32

  template <class T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset);
  }
  const int32_t* live_channels() const { return at<int32_t>(live_at); }  // [live], the input channels in use
  const RowGroup* groups() const { return at<RowGroup>(groups_at); }
  const uint16_t* row_of() const { return at<uint16_t>(row_of_at); }  // [O], row of accumulators in its row group
  const Block* block(int64_t group, int64_t block) const { return at<Block>(blocks_at) + group * blocks + block; }
  const Segment* segments() const { return at<Segment>(segments_at); }
  // Where in the block's panel, in eighths of bytes; with channels as lanes, in floats.
  const uint16_t* taps() const { return at<uint16_t>(taps_at); }
  const float* values() const { return at<float>(values_at); }
  const int32_t* starts() const { return at<int32_t>(starts_at); }    // [O], -128 · Σ of the weights
  const int32_t* sources() const { return at<int32_t>(sources_at); }  // index into the canonical values
  int64_t value_count() const { return (bytes - (sources_at ? sources_at : values_at)) / 4; }  // padding included
};

// acc[row][position] += Σ values · panel, for the segments of one block.
struct SegmentArgs {
  const char* panel;  // of the block's first channel, at the tile's first position
  ptrdiff_t row_bytes;
  const Segment* segments;
  int64_t count;
  const uint16_t* taps;
  const float* values;
  float* acc;         // [rows][nr · nc][lanes]; with channels as lanes, [rows / lanes][nr · nc][lanes]
  const float* bias;  // [rows]
};
using SegmentFn = void (*)(const SegmentArgs&);

// Elements that lie one behind the other in memory, at an address of its own for each lane, to one vector each.
template <class T>
struct GatherArgs {
  const T* x;
  const int64_t* lane;  // offset of each lane
  int64_t n;            // elements, read in fours
  float* out;
  const int64_t* out_at;  // where the vector of each element goes; negative: nowhere
  const uint32_t* valid;  // lanes that are not zero: of each element, or the same of all
  int valid_step;         // 1 or 0
  float pad = 0;          // what the other lanes hold
};
template <class T>
struct ScatterArgs {
  const float* acc;
  int64_t stride;  // floats between the vectors of two elements
  int n;           // elements
  T* y;
  const T* residual;      // null: none; as y
  const int64_t* lane;    // offset of each lane
  const int32_t* counts;  // elements that are wanted of each lane
  Activation activation;  // after the residual; none if there is no residual
};

template <class T>
struct TypeKernels {
  void (*gather)(const GatherArgs<T>&);
  void (*scatter)(const ScatterArgs<T>&);
  void (*copy_in)(const T* x, int64_t n, int64_t vectors, float* out);
  void (*copy_out)(const float* acc, int64_t n, T* y, const T* residual, Activation activation);
  // out[i] = x[i · step]
  void (*copy_steps)(const T* x, int64_t step, int64_t n, float* out);
  // Of `rows` vectors, each to its own place: the first n ≤ lanes elements.
  void (*copy_rows)(const float* acc, int64_t rows, int n, T* y, const T* residual, int64_t step,
                    Activation activation);
};

struct Kernels {
  int lanes;
  SegmentFn (*segments)(int rows_at_once, int nr, int nc);  // null: there is no such kernel
  void (*activate)(float* acc, int64_t vectors, Activation activation);
  TypeKernels<float> fp32;
  TypeKernels<bf16> half;
};
const Kernels& kernels();  // of the active ISA

}  // namespace pyops::sparse
