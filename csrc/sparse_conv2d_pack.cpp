// From the canonical weight to the packed one (sparse_conv2d.h): checks the structure, chooses the tiling, pairs rows.
#include <algorithm>
#include <array>
#include <atomic>
#include <bitset>
#include <cstring>
#include <numeric>
#include <random>
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
    rows = 1, cols = t.nc, HR = 1, HC = t.nc;
    row_of_tap[0] = col_of_tap[0] = 0;
    return;
  }
  rows = (t.mh - 1) * conv.sh + (conv.R - 1) * conv.dh + 1;
  cols = (t.mw - 1) * conv.sw + (conv.S - 1) * conv.dw + 1;
  HR = slots(conv.R, conv.sh, conv.dh, t.mh, row_of_tap, nullptr);
  HC = slots(conv.S, conv.sw, conv.dw, t.mw, col_of_tap, nullptr);
}

namespace {

// What no other process, and no file, can know.
uint64_t seal(uint64_t number) {
  static const uint64_t secret = (uint64_t(std::random_device{}()) << 32) ^ std::random_device{}();
  uint64_t z = secret + number * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// One kept weight of `rows_at_once` rows: channel · R·S + tap, and where its values are.
struct Entry {
  int32_t tap;
  int64_t value;
};
struct Row {
  int32_t o;                   // first output channel
  int32_t channels;            // of them
  std::vector<Entry> entries;  // by tap
};

// The rows that the kernels work on: blocks of 4 or 8 output channels, or single ones.
struct Rows {
  int32_t at_once;
  std::vector<Row> rows;
};

// The kernels that a weight can use: those for blocks of output channels, or pairs of single ones.
std::vector<int32_t> rows_at_once(const Weight& w) {
  if (w.bo % 8 == 0) return {8, 4};
  return {w.bo % 4 == 0 ? 4 : 2};
}

Rows rows_of(const Weight& w, int32_t at_once) {
  const int32_t step = at_once == 2 ? 1 : at_once;
  const Conv& c = w.conv;
  Rows result{at_once, {}};
  const int64_t in_group = (c.rows() + w.bo - 1) / w.bo, taps = int64_t(c.R) * c.S;
  for (int64_t b = 0; b < in_group * c.groups; b++) {
    const int64_t group = b / in_group, first = b % in_group * w.bo;
    for (int64_t part = 0; part < w.bo && first + part < c.rows(); part += step) {
      Row row{static_cast<int32_t>(group * c.rows() + first + part),
              static_cast<int32_t>(std::min<int64_t>(step, c.rows() - first - part)),
              {}};
      row.entries.reserve((w.crow[b + 1] - w.crow[b]) * w.bc);
      for (int64_t k = w.crow[b]; k < w.crow[b + 1]; k++) {
        const int64_t cb = w.col[k] / taps, tap = w.col[k] % taps;
        for (int64_t i = 0; i < w.bc && cb * w.bc + i < c.channels(); i++)
          row.entries.push_back({static_cast<int32_t>((group * c.channels() + cb * w.bc + i) * taps + tap),
                                 (k * w.bo + part) * w.bc + i});
      }
      if (w.bc > 1) std::sort(row.entries.begin(), row.entries.end(), [](auto& a, auto& b) { return a.tap < b.tap; });
      result.rows.push_back(std::move(row));
    }
  }
  return result;
}

// The entries of a row that lie in one block of channels.
struct Part {
  const Entry *begin, *end;
  int64_t size() const { return end - begin; }
};

struct Plan {
  Tiling tiling;
  int32_t at_once, channels_in_block, group_rows;
  double cycles;
};

class Packer {
 public:
  Packer(const Weight& weight, const Plan& plan, int32_t lanes, bool with_values)
      : w(weight), with_values(with_values), all(rows_of(weight, plan.at_once)), taps(weight.conv.R * weight.conv.S) {
    head.magic = kMagic;
    head.conv = w.conv;
    head.tiling = plan.tiling;
    head.lanes = lanes;
    head.rows_at_once = all.at_once;
    window.init(w.conv, plan.tiling);
    find_live_channels();
    const int64_t of_channel = int64_t(window.HR) * window.HC * lanes * sizeof(float);
    const int64_t reach = std::max<int64_t>(1, int64_t(UINT16_MAX) * 8 / of_channel);
    head.channels_in_block = static_cast<int32_t>(std::clamp<int64_t>(plan.channels_in_block, 1, reach));
    head.live = static_cast<int32_t>(live.size());
    head.blocks = std::max<int32_t>(1, (head.live + head.channels_in_block - 1) / head.channels_in_block);
    cut_row_groups(plan.group_rows);
    for (size_t g = 0; g < groups.size(); g++) pack_group(g);
  }

  int64_t bytes() {
    static std::atomic<uint64_t> made{0};
    head.number = ++made;
    head.seal = seal(head.number);
    head.stored = int64_t(w.crow[w.block_rows()]) * w.bo * w.bc;
    int64_t at = sizeof(Packed);
    const auto place = [&at](int64_t& where, size_t bytes) {
      where = at;
      at = (at + static_cast<int64_t>(bytes) + 63) / 64 * 64;
    };
    place(head.live_at, live.size() * sizeof(int32_t));
    place(head.groups_at, groups.size() * sizeof(RowGroup));
    place(head.row_of_at, row_of.size() * sizeof(uint16_t));
    place(head.blocks_at, blocks.size() * sizeof(Block));
    place(head.segments_at, segments.size() * sizeof(Segment));
    place(head.taps_at, tap_offsets.size() * sizeof(uint16_t));
    place(head.values_at, values.size() * sizeof(float));
    if (!with_values) place(head.sources_at, sources.size() * sizeof(int32_t));
    return head.bytes = at;
  }

  void write(char* out) const {
    const auto put = [out](int64_t at, const auto& v) {
      if (!v.empty()) std::memcpy(out + at, v.data(), v.size() * sizeof(v[0]));
    };
    std::memset(out, 0, head.bytes);
    std::memcpy(out, &head, sizeof(head));
    put(head.live_at, live);
    put(head.groups_at, groups);
    put(head.row_of_at, row_of);
    put(head.blocks_at, blocks);
    put(head.segments_at, segments);
    put(head.taps_at, tap_offsets);
    put(head.values_at, values);
    if (!with_values) put(head.sources_at, sources);
  }

 private:
  void find_live_channels() {
    live_index.assign(w.conv.C, -1);
    for (const Row& row : all.rows)
      for (const Entry& e : row.entries) live_index[e.tap / taps] = 0;
    for (int32_t c = 0; c < w.conv.C; c++)
      if (live_index[c] == 0) {
        live_index[c] = static_cast<int32_t>(live.size());
        live.push_back(c);
      }
  }

  // Rows of accumulators follow the rows of the weight; where a block of rows reaches past its group's end, some stay
  // unused. One more takes what a pair without a partner leaves.
  void cut_row_groups(int32_t group_rows) {
    const int32_t step = all.at_once == 2 ? 1 : all.at_once;
    const int64_t n = all.rows.size(), per = std::max<int64_t>(1, std::min(group_rows, kMaxGroupRows) / step);
    const int64_t count = std::max<int64_t>(1, (n + per - 1) / per);
    row_of.assign(w.conv.O, 0);
    for (int64_t g = 0; g < count; g++) {
      const int64_t begin = n * g / count, end = n * (g + 1) / count;
      first_row.push_back(begin);
      RowGroup group{0, 0, static_cast<int32_t>((end - begin) * step + (all.at_once == 2)), 0};
      if (begin < end) group.o0 = all.rows[begin].o, group.o1 = all.rows[end - 1].o + all.rows[end - 1].channels;
      for (int64_t r = begin; r < end; r++)
        for (int32_t i = 0; i < all.rows[r].channels; i++)
          row_of[all.rows[r].o + i] = static_cast<uint16_t>((r - begin) * step + i);
      groups.push_back(group);
    }
    first_row.push_back(n);
    head.row_groups = static_cast<int32_t>(count);
  }

  void pack_group(size_t g) {
    const int64_t begin = first_row[g], n = first_row[g + 1] - begin;
    std::vector<const Entry*> next(n);
    std::vector<char> started(n, 0);
    for (int64_t r = 0; r < n; r++) next[r] = all.rows[begin + r].entries.data();
    for (int32_t b = 0; b < head.blocks; b++) {
      // Live channels are in order, so a block of them is a range of taps.
      const int64_t last = std::min<int64_t>(head.live, int64_t(b + 1) * head.channels_in_block) - 1;
      const int64_t limit = last < 0 ? 0 : int64_t(live[last] + 1) * taps;
      std::vector<Part> parts(n);
      for (int64_t r = 0; r < n; r++) {
        const auto& entries = all.rows[begin + r].entries;
        const Entry* stop = next[r];
        while (stop < entries.data() + entries.size() && stop->tap < limit) stop++;
        parts[r] = {next[r], stop};
        next[r] = stop;
      }
      blocks.push_back(
          {static_cast<int64_t>(segments.size()), static_cast<int64_t>(tap_offsets.size()), value_count(), 0});
      if (all.at_once == 2)
        emit_pairs(parts, started, b);
      else
        emit_blocks(parts, started, b);
      blocks.back().segments = static_cast<int64_t>(segments.size()) - blocks.back().segment;
    }
  }

  uint16_t offset(int32_t tap, int32_t block) const {
    const int32_t c = live_index[tap / taps] - block * head.channels_in_block, t = tap % taps;
    const int64_t vectors =
        (int64_t(c) * window.HR + window.row_of_tap[t / w.conv.S]) * window.HC + window.col_of_tap[t % w.conv.S];
    return static_cast<uint16_t>(vectors * head.lanes * sizeof(float) / 8);
  }
  void emit(const Entry& e, int32_t block) { tap_offsets.push_back(offset(e.tap, block)); }

  // Rows in order of their number of taps: equal trip counts follow each other, and a loop's end is foreseen.
  void emit_blocks(const std::vector<Part>& parts, std::vector<char>& started, int32_t block) {
    std::vector<int64_t> order(parts.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return parts[a].size() > parts[b].size(); });
    for (const int64_t r : order) {
      // Every row starts somewhere, also one without weights.
      if (!parts[r].size() && (started[r] || block + 1 < head.blocks)) continue;
      push_segment(r * all.at_once, r * all.at_once, {parts[r].size(), 0, 0}, !started[r]);
      started[r] = 1;
      for (const Entry* e = parts[r].begin; e < parts[r].end; e++) {
        emit(*e, block);
        for (int32_t i = 0; i < all.at_once; i++) push_value(e->value + i * w.bc);
      }
    }
  }

  void emit_pairs(const std::vector<Part>& parts, std::vector<char>& started, int32_t block) {
    const int64_t n = parts.size(), spare = n;
    struct Pair {
      int64_t a, b;
      std::array<int64_t, 3> count;
    };
    std::vector<Pair> pairs;
    // A pair is `first` for both or for neither, so rows that began and rows that did not are paired apart.
    for (const char begun : {char(1), char(0)}) {
      std::vector<int64_t> rows;
      for (int64_t r = 0; r < n; r++)
        if (started[r] == begun && (parts[r].size() || (!begun && block + 1 == head.blocks))) rows.push_back(r);
      for (const auto& [a, b] : partners(rows, parts)) {
        const int64_t shared = b == spare ? 0 : overlap(parts[a], parts[b]);
        pairs.push_back({a, b, {shared, parts[a].size() - shared, b == spare ? 0 : parts[b].size() - shared}});
      }
    }
    std::stable_sort(pairs.begin(), pairs.end(), [](auto& p, auto& q) { return p.count > q.count; });
    for (const Pair& p : pairs) {
      push_segment(p.a, p.b, p.count, !started[p.a]);
      const Part a = parts[p.a], b = p.b == spare ? Part{nullptr, nullptr} : parts[p.b];
      merge(a, b, [&](const Entry* x, const Entry* y) {
        if (!x || !y) return;
        emit(*x, block);
        push_value(x->value);
        push_value(y->value);
      });
      for (const bool second : {false, true})
        merge(a, b, [&](const Entry* x, const Entry* y) {
          if ((x && y) || !(second ? y : x)) return;
          emit(second ? *y : *x, block);
          push_value((second ? y : x)->value);
        });
    }
    for (const Pair& p : pairs) {
      started[p.a] = 1;
      if (p.b != spare) started[p.b] = 1;
    }
  }

  template <class F>
  static void merge(Part a, Part b, const F& f) {
    while (a.begin < a.end || b.begin < b.end) {
      const bool take_a = a.begin < a.end && (b.begin == b.end || a.begin->tap <= b.begin->tap);
      const bool take_b = b.begin < b.end && (a.begin == a.end || b.begin->tap <= a.begin->tap);
      f(take_a ? a.begin : nullptr, take_b ? b.begin : nullptr);
      a.begin += take_a;
      b.begin += take_b;
    }
  }
  static int64_t overlap(Part a, Part b) {
    int64_t n = 0;
    merge(a, b, [&n](const Entry* x, const Entry* y) { n += x && y; });
    return n;
  }

  // Greedy: each row with the row that shares most taps with it.
  std::vector<std::pair<int64_t, int64_t>> partners(const std::vector<int64_t>& rows, const std::vector<Part>& parts) {
    const int64_t n = rows.size(), spare = parts.size();
    int32_t low = INT32_MAX, high = 0;
    for (const int64_t r : rows)
      if (parts[r].size()) low = std::min(low, parts[r].begin->tap), high = std::max(high, parts[r].end[-1].tap + 1);
    const int64_t words = high > low ? (high - low + 63) / 64 : 0;
    std::vector<uint64_t> bits(n * words, 0);
    for (int64_t i = 0; i < n; i++)
      for (const Entry* e = parts[rows[i]].begin; e < parts[rows[i]].end; e++)
        bits[i * words + (e->tap - low) / 64] |= uint64_t(1) << ((e->tap - low) % 64);
    std::vector<std::pair<int64_t, int64_t>> result;
    std::vector<char> used(n, 0);
    for (int64_t i = 0; i < n; i++) {
      if (used[i]) continue;
      int64_t best = -1, partner = -1;
      for (int64_t j = i + 1; j < n; j++) {
        if (used[j]) continue;
        int64_t shared = 0;
        for (int64_t k = 0; k < words; k++)
          shared += static_cast<int64_t>(std::bitset<64>(bits[i * words + k] & bits[j * words + k]).count());
        if (shared > best) best = shared, partner = j;
      }
      if (partner >= 0) used[partner] = 1;
      result.emplace_back(rows[i], partner < 0 ? spare : rows[partner]);
    }
    return result;
  }

  void push_value(int64_t index) {
    if (with_values)
      values.push_back(w.value(index));
    else
      sources.push_back(static_cast<int32_t>(index));
  }
  int64_t value_count() const { return static_cast<int64_t>(with_values ? values.size() : sources.size()); }

  void push_segment(int64_t a, int64_t b, const std::array<int64_t, 3>& count, bool first) {
    segments.push_back(
        {{static_cast<uint16_t>(a), static_cast<uint16_t>(b)},
         {static_cast<uint16_t>(count[0]), static_cast<uint16_t>(count[1]), static_cast<uint16_t>(count[2])},
         first});
  }

  const Weight& w;
  const bool with_values;
  const Rows all;
  const int32_t taps;
  Packed head{};
  Window window{};
  std::vector<int32_t> live, live_index;
  std::vector<RowGroup> groups;
  std::vector<int64_t> first_row;
  std::vector<uint16_t> row_of, tap_offsets;
  std::vector<Block> blocks;
  std::vector<Segment> segments;
  std::vector<float> values;
  std::vector<int32_t> sources;
};

// ----------------------------------------------------------------------------------------------------- choice

constexpr int32_t kGroupRows = 128;

// Cycles of one call, from what was measured on a Golden Cove core (docs/sparse_conv2d.md).
Plan judge(const Weight& w, const Target& target, const Tiling& t, int32_t at_once, int32_t live, double taps) {
  constexpr double kL1 = 36 << 10;
  const Conv& c = w.conv;
  Window whole, tile;
  whole.init(c, t);
  tile.init(c, {t.nr, t.nc, t.nr, t.nc, t.flat});
  const int64_t line = int64_t(target.lanes) * sizeof(float);
  const double rows = c.O;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t subtiles =
      t.flat ? up(target.N * target.OH * target.OW, t.nc) : target.N * up(target.OH, t.mh) * up(target.OW, t.mw);
  const double groups = static_cast<double>(up(subtiles, target.lanes));
  const double positions = t.nr * t.nc, tiles = (t.mh / t.nr) * (t.mw / t.nc);
  const int64_t panel_of_tile = int64_t(tile.HR) * tile.HC * line;
  const int64_t per_block = std::max<int64_t>(1, static_cast<int64_t>(kL1) / panel_of_tile);
  // Blocks of equal size; 8 and 4 rows at once read so little that the panel may come from L2.
  const int64_t blocks = at_once > 4 ? 1 : std::max<int64_t>(1, up(live, per_block));
  const int64_t channels = std::max<int64_t>(1, up(live, blocks));
  const double shared = at_once == 2 ? taps / std::max(1.0, rows * live * c.R * c.S) : 1.0;
  const double load = at_once == 2 ? 0.32 * (1 - shared / 2) : 0.32 / at_once;
  const double fma = taps * (positions * (0.5 + load) + 1.1);
  const double segments = rows / at_once * blocks;
  const double accumulators = segments * (at_once * positions * (blocks > 1 ? 3.0 : 1.5) + 12);
  const double in = t.flat ? 1.8 : 4.0, out = t.flat ? 1.5 : 3.5;
  const double pack = live * (whole.HR * ((target.channels_last ? whole.HC : up(whole.HC, 4) * 4)) * in + 4);
  const double cycles = groups * (pack + tiles * (fma + accumulators + c.O * positions * out));
  return {t, at_once, static_cast<int32_t>(channels), kGroupRows, cycles};
}

Plan choose(const Weight& w, const Target& target, SegmentFn (*kernel)(int, int, int)) {
  constexpr int64_t kPanelBytes = 5 << 18;
  const Conv& c = w.conv;
  const double taps = double(w.crow[w.block_rows()]) * w.bo * w.bc;
  std::vector<char> used(w.conv.C, 0);
  const int64_t in_group = w.block_rows() / c.groups, RS = int64_t(c.R) * c.S;
  for (int64_t b = 0; b < w.block_rows(); b++)
    for (int64_t k = w.crow[b]; k < w.crow[b + 1]; k++)
      for (int64_t i = 0, first = w.col[k] / RS * w.bc; i < w.bc && first + i < c.channels(); i++)
        used[b / in_group * c.channels() + first + i] = 1;
  const int32_t live = static_cast<int32_t>(std::count(used.begin(), used.end(), 1));
  Plan best{{1, 1, 1, 1, 0}, rows_at_once(w).back(), 1, kGroupRows, std::numeric_limits<double>::infinity()};
  const auto consider = [&](const Tiling& t, int32_t at_once) {
    const Plan found = judge(w, target, t, at_once, live, taps);
    if (found.cycles < best.cycles) best = found;
  };
  const bool flat = c.R == 1 && c.S == 1 && c.sh == 1 && c.sw == 1 && !target.channels_last && target.unpadded;
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
        const bool smallest = mh == nr && mw == nc;
        if (!smallest && int64_t(live) * window.HR * window.HC * target.lanes * 4 > kPanelBytes) break;
        consider(t, at_once);
      }
  };
  for (const int32_t at_once : rows_at_once(w))
    for (int32_t nr = 1; nr <= 4; nr++)
      for (int32_t nc = 1; nc <= 16; nc++)
        if (kernel(at_once, nr, nc)) consider_tile(nr, nc, at_once);
  if (best.cycles == std::numeric_limits<double>::infinity()) best.tiling = {1, 1, 1, 1, flat};
  return best;
}

}  // namespace

bool sealed(const Packed& packed) { return packed.magic == kMagic && packed.seal == seal(packed.number); }

Tensor pack(const Weight& w, const Target& target, bool with_values, const std::vector<int64_t>& forced) {
  Plan plan = choose(w, target, kernels().segments);
  if (!forced.empty()) {
    STD_TORCH_CHECK(forced.size() == 8, "sparse_conv2d: tiling must have 8 elements");
    const auto f = [&](int i) { return static_cast<int32_t>(forced[i]); };
    plan = {{f(0), f(1), f(2), f(3), f(4)}, f(5), f(6), f(7), 0.0};
    STD_TORCH_CHECK(kernels().segments(plan.at_once, f(2), f(3)), "sparse_conv2d: no kernel for ", f(2), " x ", f(3));
  }
  Packer packer(w, plan, target.lanes, with_values);
  const int64_t size = packer.bytes();
  Tensor blob = empty_cpu(&size, 1, ScalarType::Byte);
  packer.write(static_cast<char*>(blob.mutable_data_ptr()));
  return blob;
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
