// From the canonical weight to the packed one (sparse_conv2d.h): checks the structure, chooses the tiling.
#include <algorithm>
#include <limits>
#include <vector>

#include "sparse_conv2d_pack.h"

namespace pyops::sparse {

int32_t Window::slots(int32_t taps, int32_t stride, int32_t dilation, int32_t length, int32_t* of_tap, int32_t* at) {
  int32_t n = 0;
  for (int32_t phase = 0; phase < stride; phase++) {
    int32_t furthest = -1;
    for (int32_t t = 0; t < taps; t++)
      if (t * dilation % stride == phase) {
        if (of_tap) of_tap[t] = n + t * dilation / stride;
        furthest = std::max(furthest, t * dilation / stride);
      }
    for (int32_t j = 0; furthest >= 0 && j < length + furthest; j++, n++)
      if (at) at[n] = phase + stride * j;
  }
  return n;
}

void Window::init(const Conv& conv, const Tiling& t) {
  if (t.flat) {
    rows = 1, cols = t.mw, HR = 1, HC = t.mw;
    row_of_tap[0] = col_of_tap[0] = 0;
  } else {
    rows = (t.mh - 1) * conv.sh + (conv.R - 1) * conv.dh + 1;
    cols = (t.mw - 1) * conv.sw + (conv.S - 1) * conv.dw + 1;
    HR = slots(conv.R, conv.sh, conv.dh, t.mh, row_of_tap, nullptr);
    HC = slots(conv.S, conv.sw, conv.dw, t.mw, col_of_tap, nullptr);
  }
  if (t.channels) HC = (HC + kChannelLanes - 1) / kChannelLanes * kChannelLanes;  // rows of whole lines
}

namespace {

// The kernels that a weight can use: those for blocks of output channels, or pairs of single ones.
std::vector<int32_t> rows_at_once(const Weight& w) {
  if (w.bo % 8 == 0) return {8, 4};
  return {w.bo % 4 == 0 ? 4 : 2};
}

// ----------------------------------------------------------------------------------------------------- choice

constexpr int64_t kGroupRows = 512;  // the more rows, the more taps a pair shares

int64_t lane_groups(const Target& target, const Tiling& t) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t subtiles =
      t.flat ? up(target.N * target.OH * target.OW, t.nc) : target.N * up(target.OH, t.mh) * up(target.OW, t.mw);
  return up(subtiles, target.lanes);
}

// Cycles of one call: a model whose constants were fitted to forced tilings on one AVX-512 core.
Plan judge(const Weight& w, const Target& target, const Tiling& t, int32_t at_once, int32_t live, double taps) {
  constexpr double kL1 = 36 << 10, kRoom = 1600 << 10;
  const Conv& c = w.conv;
  Window whole, tile;
  whole.init(c, t);
  tile.init(c, {t.nr, t.nc, t.nr, t.nc, t.flat});
  const int64_t line = int64_t(target.lanes) * sizeof(float);
  const double rows = c.O;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const double groups = static_cast<double>(lane_groups(target, t));
  const double positions = t.nr * t.nc, tiles = (t.mh / t.nr) * (t.mw / t.nc);
  const int64_t panel_of_tile = int64_t(tile.HR) * tile.HC * line;
  const int64_t per_block = std::max<int64_t>(1, static_cast<int64_t>(kL1) / panel_of_tile);
  // Blocks of equal size; 8 rows at once read so little that the panel may come from L2.
  const int64_t blocks = at_once == 8 ? 1 : std::max<int64_t>(1, up(live, per_block));
  const int64_t channels = std::max<int64_t>(1, up(live, blocks));
  // A multiply-add takes half a cycle, a full-width load beside it 0.3, a broadcast half of that.
  const double shared = taps / std::max(1.0, rows * live * c.R * c.S);
  const double fma = at_once == 2 ? 0.76 - 0.15 * shared : at_once == 4 ? 0.6 : 0.42;
  const double per_tap = at_once == 2 ? 1.2 : at_once == 4 ? 2.5 : 4.5;
  const double multiply = taps * positions * fma + taps / (at_once == 2 ? 1 : at_once) * per_tap;
  // Between blocks the accumulators go through L2.
  const double segments = rows / at_once * blocks;
  const double accumulate = segments * (at_once * positions * (blocks > 1 ? 2.0 : 1.0) + 25);
  // Panels that find no room in L2 are written to L3 and read from there.
  const double vectors = live * (whole.HR * ((target.channels_last ? whole.HC : up(whole.HC, 4) * 4)));
  const double images = (double(live) * c.sh * c.sw + c.O) * t.mh * t.mw;  // what a lane group reads and writes
  const double pack = vectors * (t.flat ? 4 : (vectors + images) * line > kRoom ? 12 : 6);
  // In NCHW each lane has rows of its own; a tile as wide as its sub-tile fills their cache lines at once.
  const double unpack = t.flat                 ? 4 * positions
                        : target.channels_last ? 5 * positions
                                               : 2 * positions + target.lanes * t.nr * (t.nc == t.mw ? 3.0 : 7.0);
  const double cycles = groups * (pack + tiles * (multiply + accumulate + c.O * unpack));
  return {t, at_once, static_cast<int32_t>(channels), kGroupRows, cycles};
}

// In how many groups to cut the rows, `cuts` or more, so that the threads need not wait for each other at the end:
// `tasks` is what each group of rows makes of them, together or in a wave, if the threads share them out at all.
int64_t even_cuts(int64_t cuts, int64_t tasks, int64_t shared, int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || shared % threads == 0 || shared >= 8 * threads) return cuts;
  const auto uneven = [&] { return (tasks * cuts + threads - 1) / threads * threads * 10 > tasks * cuts * 11; };
  while (uneven() && rows / (cuts + 1) >= 16) cuts++;
  return cuts;
}

// As many as there are, unless the threads would wait for each other at the end of a wave (sparse_conv2d.cpp).
int32_t group_rows(const Conv& c, const Target& target, const Tiling& t, int64_t wave) {
  const int64_t groups = lane_groups(target, t), threads = torch::stable::get_num_threads();
  const int64_t tasks = std::min(groups, wave * threads) * (t.mh / t.nr) * (t.mw / t.nc);
  const int64_t cuts = even_cuts(std::max<int64_t>(1, (c.O + kGroupRows - 1) / kGroupRows), tasks, groups, c.O);
  return static_cast<int32_t>(((c.O + cuts - 1) / cuts + 15) / 16 * 16);
}

bool channels_fit(const Weight& w, const Target& target) {
  return w.bo % kChannelLanes == 0 && target.lanes == kChannelLanes && !w.kind.order && !w.int8();
}

bool pointwise(const Conv& c) { return c.R == 1 && c.S == 1 && c.sh == 1 && c.sw == 1; }

// Channels as lanes: the tile that computes an image in the fewest cycles, a patch of some rows of them, blocks of
// channels of which a tile's part fits in L1, groups of rows whose weights stay in L2.
Plan choose_channels(const Weight& w, const Target& target, int32_t live, double taps) {
  constexpr double kWeightBytes = 512 << 10, kL1 = 24 << 10;
  constexpr int32_t kMost = 28, kPatchRows = 14;
  const Conv& c = w.conv;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Plan plan{{1, 1, 1, 1, pointwise(c) && target.unpadded, 1}, target.lanes, 1, target.lanes, 0.0};
  Tiling& t = plan.tiling;
  const int64_t OH = t.flat ? 1 : target.OH, OW = t.flat ? target.OH * target.OW : target.OW;
  double best = std::numeric_limits<double>::infinity();
  // A multiply-add takes 0.66 of a cycle, a tap 2 besides.
  const auto tap = [](int64_t pixels) { return pixels ? 0.66 * static_cast<double>(pixels) + 2 : 0.0; };
  for (int32_t nr = 1; nr <= std::min<int64_t>(4, OH); nr++)
    for (int32_t nc = 1; nc <= std::min<int64_t>(kMost / nr, OW); nc++) {
      const double down = static_cast<double>(OH / nr), across = static_cast<double>(OW / nc);
      const int64_t low = OH % nr, narrow = OW % nc;
      Window seen;
      seen.init(c, {nr, nc, nr, nc, t.flat, 1});
      // The more of it, the fewer channels L1 has room for.
      const double spread = double(seen.HR) * seen.HC / (nr * nc);
      const double cycles = (1 + 0.03 * spread) * (down * (across * tap(nr * nc) + tap(nr * narrow)) +
                                                   across * tap(low * nc) + tap(low * narrow));
      if (cycles < best) best = cycles, t.nr = nr, t.nc = nc;
    }
  t.mh = t.nr, t.mw = t.nc;
  while (c.R > 1 && t.mh < OH && t.mh < kPatchRows) t.mh += t.nr;
  Window tile;
  tile.init(c, {t.nr, t.nc, t.nr, t.nc, t.flat, 1});
  const double of_channel = double(tile.HR) * tile.HC * sizeof(float);
  const int64_t blocks = std::max<int64_t>(1, static_cast<int64_t>(double(live) * of_channel / kL1 + 0.5));
  plan.channels_in_block = static_cast<int32_t>(up(std::max<int32_t>(live, 1), blocks));
  const double of_row = std::max(1.0, taps / c.O * (sizeof(float) + 2.0 / target.lanes));
  const int64_t rows = std::clamp<int64_t>(static_cast<int64_t>(kWeightBytes / of_row), target.lanes, kMaxGroupRows);
  // Of an image: the weights times the pixels, accumulators between blocks, packing, the way out.
  Window patch;
  patch.init(c, t);
  const double patches = double(up(OH, t.mh)) * static_cast<double>(up(OW, t.mw));
  const double vectors = patches * live * static_cast<double>(patch.HC / kChannelLanes) * patch.HR;
  const double out = double(c.O) / target.lanes * static_cast<double>(OH * OW);
  plan.cycles = static_cast<double>(target.N) *
                (taps / target.lanes * best + out * 2 * static_cast<double>(blocks - 1) + vectors * 14 + out * 12);
  if (int64_t(patch.HR) * patch.HC > UINT16_MAX) plan.cycles = std::numeric_limits<double>::infinity();
  const int64_t shared = target.N * static_cast<int64_t>(patches);
  const int64_t cuts = even_cuts(std::max<int64_t>(1, up(c.O, rows)), shared * (t.mh / t.nr), shared, c.O);
  plan.group_rows = static_cast<int32_t>(up(up(c.O, cuts), target.lanes) * target.lanes);
  return plan;
}

// `wanted`: so many rows at once, 0: whatever is fastest.
Plan choose(const Weight& w, const Target& target, SegmentFn (*kernel)(int, int, int), int32_t wanted) {
  constexpr int64_t kPanelBytes = 3 << 19;
  const Conv& c = w.conv;
  const double taps = double(w.crow[w.block_rows()]) * w.bo * w.bc;
  const int64_t in_group = w.block_rows() / c.groups, RS = int64_t(c.R) * c.S;
  const int64_t n_cols = (c.channels() + w.bc - 1) / w.bc * RS;
  std::vector<char> used(w.conv.C, 0), used_cols(n_cols);
  for (int64_t g = 0; g < c.groups; g++) {
    std::fill(used_cols.begin(), used_cols.end(), 0);
    for (int64_t k = w.crow[g * in_group]; k < w.crow[(g + 1) * in_group]; k++) used_cols[w.col[k]] = 1;
    for (int64_t i = 0; i < c.channels(); i++)
      used[g * c.channels() + i] = std::count(&used_cols[i / w.bc * RS], &used_cols[i / w.bc * RS] + RS, 1) > 0;
  }
  const int32_t live = static_cast<int32_t>(std::count(used.begin(), used.end(), 1));
  Plan best{{1, 1, 1, 1, 0},
            wanted ? wanted : rows_at_once(w).back(),
            1,
            kGroupRows,
            std::numeric_limits<double>::infinity()};
  const auto consider = [&](const Tiling& t, int32_t at_once) {
    const Plan found = judge(w, target, t, at_once, live, taps);
    if (found.cycles < best.cycles) best = found;
  };
  const bool flat = pointwise(c) && !target.channels_last && target.unpadded;
  const auto consider_tile = [&](int32_t nr, int32_t nc, int32_t at_once) {
    if (flat) {
      if (nr == 1) consider({1, nc, 1, nc, 1}, at_once);
      return;
    }
    for (int32_t mh = nr; mh < target.OH + nr && mh <= 16; mh += nr)
      for (int32_t mw = nc; mw < target.OW + nc && mw <= 28; mw += nc) {
        const Tiling t{mh, mw, nr, nc, 0};
        Window window;
        window.init(c, t);
        if (int64_t(window.HR) * window.HC * target.lanes * 4 / 8 > UINT16_MAX) break;  // taps are 16 bits
        const bool smallest = mh == nr && mw == nc;
        if (!smallest && int64_t(live) * window.HR * window.HC * target.lanes * 4 > kPanelBytes) break;
        consider(t, at_once);
      }
  };
  const std::vector<int32_t> fitting = wanted ? std::vector<int32_t>{wanted} : rows_at_once(w);
  for (const int32_t at_once : fitting)
    for (int32_t nr = 1; nr <= 4; nr++)
      for (int32_t nc = 1; nc <= 16; nc++)
        if (kernel(at_once, nr, nc)) consider_tile(nr, nc, at_once);
  if (best.cycles == std::numeric_limits<double>::infinity()) best.tiling = {1, 1, 1, 1, flat};
  if (channels_fit(w, target) && (!wanted || wanted == kChannelLanes)) {
    const Plan channels = choose_channels(w, target, live, taps);
    // `judge` knows less of the caches and is short by that.
    if (wanted || channels.cycles * 0.78 < best.cycles) return channels;
  }
  Window window;
  window.init(c, best.tiling);
  const int64_t panel = std::max<int64_t>(1, int64_t(live) * window.HR * window.HC * target.lanes * 4);
  best.group_rows = group_rows(c, target, best.tiling, std::max<int64_t>(1, kPanelsBytes / panel));
  return best;
}

}  // namespace

Tensor pack(const Weight& w, const Target& target, bool with_values, const std::vector<int64_t>& forced) {
  const bool design = forced.size() == 1;
  STD_TORCH_CHECK(!design || (forced[0] == 2 || forced[0] == 4 || forced[0] == 8 ||
                              (forced[0] == kChannelLanes && channels_fit(w, target))),
                  "sparse_conv2d: no kernel for ", design ? forced[0] : 0, " rows at once");
  STD_TORCH_CHECK(!design || forced[0] == 2 || w.bo % forced[0] == 0, "sparse_conv2d: blocks of ", w.bo,
                  " are not whole in ", design ? forced[0] : 0, " rows");
  Plan plan = choose(w, target, kernels().segments, design ? static_cast<int32_t>(forced[0]) : 0);
  if (!forced.empty() && !design) {
    STD_TORCH_CHECK(forced.size() == 8, "sparse_conv2d: tiling must have 8 elements, or 1");
    const auto f = [&](int i) { return static_cast<int32_t>(forced[i]); };
    plan = {{f(0), f(1), f(2), f(3), f(4), f(5) == kChannelLanes}, f(5), f(6), f(7), 0.0};
    for (const int64_t v : forced) STD_TORCH_CHECK(v >= 0 && v < (1 << 16), "sparse_conv2d: tiling holds ", v);
    STD_TORCH_CHECK(kernels().segments(plan.at_once, f(2), f(3)), "sparse_conv2d: no kernel for ", f(2), " x ", f(3));
    const Tiling& t = plan.tiling;
    const bool flat = pointwise(w.conv) && target.unpadded && t.mh == 1 && (t.channels || t.mw == t.nc);
    STD_TORCH_CHECK(t.mh >= 1 && t.mw >= 1 && t.mh % t.nr == 0 && t.mw % t.nc == 0 && plan.group_rows >= 1 &&
                        (t.flat == 0 || (t.flat == 1 && flat && flat_fits(t, target))) &&
                        (t.channels ? channels_fit(w, target) : plan.at_once == 2 || w.bo % plan.at_once == 0),
                    "sparse_conv2d: tiling does not fit this weight");
  }
  return pack_as(w, plan, target.lanes, with_values);
}

void check_structure(const Weight& w, int64_t stored) {
  const Conv& c = w.conv;
  const int64_t limit = (c.channels() + w.bc - 1) / w.bc * c.R * c.S;
  STD_TORCH_CHECK(w.crow[0] == 0, "sparse_conv2d: crow_indices must begin with 0, got ", w.crow[0]);
  for (int64_t b = 0; b < w.block_rows(); b++) {
    STD_TORCH_CHECK(w.crow[b] <= w.crow[b + 1] && w.crow[b + 1] <= stored,
                    "sparse_conv2d: crow_indices must rise from 0 to ", stored, ", the number of blocks");
    for (int64_t k = w.crow[b]; k < w.crow[b + 1]; k++)
      STD_TORCH_CHECK(w.col[k] >= 0 && w.col[k] < limit && (k == w.crow[b] || w.col[k - 1] < w.col[k]),
                      "sparse_conv2d: col_indices must rise within each row, from 0 to below ", limit);
  }
  STD_TORCH_CHECK(stored * w.bo * w.bc < INT32_MAX, "sparse_conv2d: ", stored, " blocks are too many");
  STD_TORCH_CHECK(w.crow[w.block_rows()] == stored, "sparse_conv2d: crow_indices must end with ", stored,
                  ", the number of blocks");
}

}  // namespace pyops::sparse
