// One step of Adafactor over many tensors: what the kernels of an ISA are given (pyops/ops/adafactor.py has the
// equations).
//
// Four passes, of which each is one parallel region: the sums of g² and p², where matrices are in pieces the factors
// made of these sums, Σu² of such matrices, and the update. A tensor of 4-byte elements is read by the first and the
// last pass, its gradient by three: 24 bytes a parameter.
#pragma once

#include "optim.h"

namespace pyops::adafactor {

using optim::kBlock;

enum class Kind : int8_t {
  vector,  // at most one dimension: one variance an element
  tiny,    // matrices of which several fit into a block: their factors stay in L1 from sum to use
  tiled,   // larger ones, and those whose elements lie between those of other matrices
};

constexpr int kTiny = 256;  // most elements of a tiny matrix

// The elements of a tensor, in the order in which they are walked through: outer × rows × columns × inner, of which
// outer and inner count matrices.
struct Shape {
  int64_t outer = 1, rows = 1, columns = 1, inner = 1;
  bool transposed = false;  // `rows` count the last dimension of the parameter and `columns` the last but one
};

// How matrices are cut into tiles: of all columns of a panel, the rows of a strip, and `depth` matrices side by side.
struct Tiling {
  int64_t strip = 1, panel = 1, depth = 1;
  int64_t strips = 1, panels = 1, depths = 1;
  bool whole = true;  // a tile has all of its matrices, and their sums fit on a stack
};

constexpr int kMostSums = 8192;  // of rows and columns of such a tile

// What a step of one parameter depends on besides its elements.
struct Numbers {
  double multiplier = 1;    // of the gradient: clipping, unscaling, -1 to maximize
  double weight = 1;        // of the new squares in their averages
  double epsilon = 0;       // eps1
  double least_scale = 0;   // eps2
  double largest_step = 1;  // min(lr, 1/√t)
  double clip = 1;          // d
  double decay = 1;         // of p
  double threshold = 0;     // lr·l1
  double ema_weight = 0;
};

constexpr int64_t kFactorPiece = 2048;  // elements of a factor that a unit of the second pass makes

struct Item {
  optim::Entry e;  // state[0] is the variance of a vector
  Kind kind = Kind::vector;
  Shape shape;
  Tiling tiling;
  Numbers numbers;
  double own_epsilon = 0;  // eps1 where none is given
  // Of matrices, in the type of the arithmetic:
  void* row_var = nullptr;      // [outer, rows, inner], the average over columns (col_var if transposed)
  void* column_var = nullptr;   // [outer, columns, inner]
  void* row_sums = nullptr;     // [panels, outer, rows, inner], of this step, where tiles are not whole matrices
  void* column_sums = nullptr;  // [strips, outer, columns, inner]
  void* inverse = nullptr;      // [outer, inner] of tiled ones: 1/max(mean of row_var, eps1)
  double step_size = 0;         // of the update, when RMS(p) and RMS(u) are known

  int64_t tiles() const { return shape.outer * tiling.strips * tiling.panels * tiling.depths; }
  int64_t matrices_of_block() const { return kBlock / (shape.rows * shape.columns); }
  // Units of the first pass, and of the second.
  int64_t pieces() const {
    if (kind == Kind::vector) return e.blocks();
    if (kind == Kind::tiled) return tiles();
    return (shape.outer + matrices_of_block() - 1) / matrices_of_block();
  }
  int64_t factor_pieces() const {
    const int64_t others = (shape.transposed ? shape.rows : shape.columns) * shape.inner;
    return shape.outer * (1 + (others + kFactorPiece - 1) / kFactorPiece);
  }
  bool in_pieces() const { return kind == Kind::tiled && !tiling.whole; }
};

struct Kernels {
  // Sums of g² over pieces [begin, end), and where these are whole matrices their factors and Σu², which is returned.
  double (*sums)(const Item&, int64_t begin, int64_t end);
  // Σp² of blocks [begin, end).
  double (*squares)(const Item&, int64_t begin, int64_t end);
  // The factors out of the sums of tiles; one unit of each `outer` makes that whose mean is needed, and the mean.
  void (*factors)(const Item&, int64_t begin, int64_t end);
  // Σu² of blocks [begin, end).
  double (*directions)(const Item&, int64_t begin, int64_t end);
  // The update of blocks [begin, end).
  void (*step)(const Item&, const optim::Options&, int64_t begin, int64_t end);
};

}  // namespace pyops::adafactor
