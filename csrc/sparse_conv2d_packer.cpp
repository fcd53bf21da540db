// Writes a weight in the packed form (sparse_conv2d.h) for a plan: cuts rows into groups and channels into blocks,
// pairs the rows that share most taps. A training step may do this for every layer, hence the flat arrays.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "sparse_conv2d_pack.h"

namespace pyops::sparse {
namespace {

// Of a header, what no other process, and no file, can know.
uint64_t seal(const Packed& packed) {
  static const uint64_t secret = (uint64_t(std::random_device{}()) << 32) ^ std::random_device{}();
  static_assert(std::has_unique_object_representations_v<Packed>, "padding has no value");
  Packed head = packed;
  head.seal = 0;
  uint64_t words[sizeof(Packed) / sizeof(uint64_t)], z = secret;
  std::memcpy(words, &head, sizeof(head));
  for (const uint64_t word : words) {
    z = (z ^ word) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 29)) * 0x94d049bb133111ebull;
  }
  return z ^ (z >> 31);
}

// The place of the set of bits that shares most with `mine`, the first of several; -1 if there is none. Word k of set j
// is at sets[k · stride + j].
#define PYOPS_BEST_PARTNER                                                                              \
  int64_t best = -1;                                                                                    \
  for (int64_t j = 0; j < n; j++) {                                                                     \
    int64_t shared = 0;                                                                                 \
    for (int64_t k = 0; k < words; k++) shared += __builtin_popcountll(mine[k] & sets[k * stride + j]); \
    const int64_t key = (shared << 32) + (n - j);                                                       \
    best = key > best ? key : best;                                                                     \
  }                                                                                                     \
  *count = best < 0 ? 0 : best >> 32;                                                                   \
  return best < 0 ? -1 : n - (best & 0xffffffff);
int64_t best_partner(const uint64_t* mine, const uint64_t* sets, int64_t stride, int64_t n, int64_t words,
                     int64_t* count) {
  PYOPS_BEST_PARTNER
}
#if defined(__x86_64__)
__attribute__((target("popcnt"))) int64_t best_partner_popcnt(const uint64_t* mine, const uint64_t* sets,
                                                              int64_t stride, int64_t n, int64_t words,
                                                              int64_t* count) {
  if (words == 1) {
    const int64_t words = 1;
    PYOPS_BEST_PARTNER
  }
  if (words == 2) {
    const int64_t words = 2;
    PYOPS_BEST_PARTNER
  }
  PYOPS_BEST_PARTNER
}
auto* partner_kernel() { return active_isa() >= Isa::avx2 ? best_partner_popcnt : best_partner; }
#else
auto* partner_kernel() { return best_partner; }
#endif
#undef PYOPS_BEST_PARTNER

// One kept weight of `rows_at_once` rows: channel · R·S + tap, and where its first value is.
struct Entry {
  int32_t tap, value;
};

// What is packed for one group of rows; the places in `blocks` count from its own beginnings.
struct Piece {
  std::vector<Block> blocks;
  std::vector<Segment> segments;
  std::vector<uint16_t> taps;
  std::vector<int32_t> sources;  // in place of the values: where they are
};

class Packer {
 public:
  Packer(const Weight& weight, const Plan& plan, int32_t lanes, bool with_values)
      : w(weight),
        with_values(with_values),
        at_once(plan.at_once),
        step(at_once == 2 ? 1 : at_once),
        taps(weight.conv.R * weight.conv.S) {
    find_rows();
    head.magic = kMagic;
    head.conv = w.conv;
    head.tiling = plan.tiling;
    head.lanes = lanes;
    head.rows_at_once = at_once;
    head.kind = w.kind;
    window.init(w.conv, plan.tiling);
    find_live_channels();
    tap_unit = plan.tiling.channels ? 1 : lanes * sizeof(float) / 8;
    const int64_t reach = UINT16_MAX / (int64_t(window.HR) * window.HC * tap_unit);
    STD_TORCH_CHECK(reach >= 1, "sparse_conv2d: a window of ", window.HR, " x ", window.HC, " is too large");
    head.channels_in_block = static_cast<int32_t>(std::clamp<int64_t>(plan.channels_in_block, 1, reach));
    head.live = static_cast<int32_t>(live.size());
    head.blocks = std::max<int32_t>(1, (head.live + head.channels_in_block - 1) / head.channels_in_block);
    find_offsets();
    cut_row_groups(plan.group_rows);
    if (w.int8()) find_starts();
    pieces.resize(groups.size());
    const auto pack_groups = [this](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++) pack_group(g);
    };
    if (entries.size() < 10'000)
      pack_groups(0, groups.size());
    else
      torch::stable::parallel_for(0, groups.size(), 1, pack_groups);
  }

  int64_t bytes() {
    static std::atomic<uint64_t> made{0};
    head.number = ++made;
    head.stored = int64_t(w.crow[w.block_rows()]) * w.bo * w.bc;
    int64_t n_blocks = 0, n_segments = 0, n_taps = 0, n_values = 0;
    for (Piece& piece : pieces) {
      for (Block& b : piece.blocks) b.segment += n_segments, b.tap += n_taps, b.value += n_values;
      n_blocks += piece.blocks.size(), n_segments += piece.segments.size(), n_taps += piece.taps.size();
      n_values += piece.sources.size();
    }
    int64_t at = sizeof(Packed);
    const auto place = [&at](int64_t& where, int64_t bytes) {
      where = at;
      at = (at + bytes + 63) / 64 * 64;
    };
    place(head.live_at, live.size() * sizeof(int32_t));
    place(head.groups_at, groups.size() * sizeof(RowGroup));
    place(head.row_of_at, row_of.size() * sizeof(uint16_t));
    place(head.blocks_at, n_blocks * sizeof(Block));
    place(head.segments_at, n_segments * sizeof(Segment));
    if (w.int8()) place(head.starts_at, starts.size() * sizeof(int32_t));
    place(head.taps_at, n_taps * sizeof(uint16_t));
    place(head.values_at, with_values ? n_values * sizeof(float) : 0);
    if (!with_values) place(head.sources_at, n_values * sizeof(int32_t));
    head.bytes = at;
    head.seal = seal(head);
    return at;
  }

  void write(char* out) const {
    const auto put = [out](int64_t& at, const auto& v) {
      if (!v.empty()) std::memcpy(out + at, v.data(), v.size() * sizeof(v[0]));
      at += static_cast<int64_t>(v.size() * sizeof(v[0]));
    };
    std::memcpy(out, &head, sizeof(head));
    Packed at = head;
    const auto pad = [out](int64_t at, int64_t end) { std::memset(out + at, 0, end - at); };
    pad(sizeof(head), head.live_at);
    put(at.live_at, live), pad(at.live_at, head.groups_at);
    put(at.groups_at, groups), pad(at.groups_at, head.row_of_at);
    put(at.row_of_at, row_of), pad(at.row_of_at, head.blocks_at);
    for (const Piece& piece : pieces) {
      put(at.blocks_at, piece.blocks), put(at.segments_at, piece.segments), put(at.taps_at, piece.taps);
      if (with_values) {
        float* values = reinterpret_cast<float*>(out + at.values_at);
        for (const int32_t source : piece.sources) *values++ = w.value(source);
        at.values_at += static_cast<int64_t>(piece.sources.size() * sizeof(float));
      } else {
        put(at.sources_at, piece.sources);
      }
    }
    pad(at.blocks_at, head.segments_at), pad(at.segments_at, w.int8() ? head.starts_at : head.taps_at);
    if (w.int8()) put(at.starts_at, starts), pad(at.starts_at, head.taps_at);
    pad(at.taps_at, head.values_at);
    pad(with_values ? at.values_at : at.sources_at, head.bytes);
  }

 private:
  void find_starts() {
    const int8_t* q = static_cast<const int8_t*>(w.values);
    for (int64_t o = 0; o < w.conv.O; o++)
      starts.push_back(-128 * std::accumulate(q + 4 * int64_t(w.crow[o]), q + 4 * int64_t(w.crow[o + 1]), 0));
  }

  // A row of accumulators, or `step` rows: its first output channel, its entries by tap.
  void find_rows() {
    const Conv& c = w.conv;
    const int64_t in_group = (c.rows() + w.bo - 1) / w.bo, stored = w.crow[w.block_rows()];
    entries.resize(stored * w.bc * ((w.bo + step - 1) / step));
    row_begin.push_back(0);
    Entry* to = entries.data();
    for (int64_t b = 0; b < in_group * c.groups; b++) {
      const int64_t group = b / in_group, first = b % in_group * w.bo;
      const int32_t tap0 = static_cast<int32_t>(group * c.channels() * taps);
      for (int64_t part = 0; part < w.bo && first + part < c.rows(); part += step) {
        row_o.push_back(static_cast<int32_t>(group * c.rows() + first + part));
        row_channels.push_back(static_cast<int32_t>(std::min<int64_t>(step, c.rows() - first - part)));
        if (w.bc == 1) {
          for (int64_t k = w.crow[b]; k < w.crow[b + 1]; k++)
            *to++ = {tap0 + w.col[k], static_cast<int32_t>(w.index(k, part, 0))};
        } else {
          for (int64_t k = w.crow[b], stop; k < w.crow[b + 1]; k = stop) {  // blocks of the same channels
            const int64_t cb = w.col[k] / taps;
            for (stop = k + 1; stop < w.crow[b + 1] && w.col[stop] < (cb + 1) * taps;) stop++;
            for (int64_t i = 0; i < w.bc && cb * w.bc + i < c.channels(); i++)
              for (int64_t j = k; j < stop; j++)
                *to++ = {static_cast<int32_t>(tap0 + (cb * w.bc + i) * taps + (w.col[j] - cb * taps)),
                         static_cast<int32_t>(w.index(j, part, i))};
          }
        }
        row_begin.push_back(to - entries.data());
      }
    }
    entries.resize(to - entries.data());
  }

  void find_live_channels() {
    std::vector<char> used(int64_t(w.conv.C) * taps, 0);
    for (const Entry& e : entries) used[e.tap] = 1;
    for (int32_t c = 0; c < w.conv.C; c++)
      if (std::memchr(used.data() + int64_t(c) * taps, 1, taps)) live.push_back(c);
  }

  // Of every tap of a live channel: where it lies in the panel of its block.
  void find_offsets() {
    offset_of.resize(int64_t(w.conv.C) * taps, 0);
    for (int32_t i = 0; i < head.live; i++)
      for (int32_t t = 0; t < taps; t++) {
        const int64_t row = int64_t(i % head.channels_in_block) * window.HR + window.row_of_tap[t / w.conv.S];
        const int64_t at = row * window.HC + window.col_of_tap[t % w.conv.S];
        offset_of[int64_t(live[i]) * taps + t] = static_cast<uint16_t>(at * tap_unit);
      }
  }

  // Rows of accumulators follow the rows of the weight; where a block of rows reaches past its group's end, some stay
  // unused. One more takes what a pair without a partner leaves.
  void cut_row_groups(int32_t group_rows) {
    const int64_t n = row_o.size(), unit = std::max<int64_t>(1, w.together / step), units = n / unit;
    const int64_t per = std::max<int64_t>(1, std::min(group_rows, kMaxGroupRows) / step / unit);
    const int64_t count = std::max<int64_t>(1, (units + per - 1) / per);
    row_of.assign(w.conv.O, 0);
    for (int64_t g = 0; g < count; g++) {
      const int64_t begin = units * g / count * unit, end = units * (g + 1) / count * unit;
      first_row.push_back(begin);
      RowGroup group{0, 0, static_cast<int32_t>((end - begin) * step + (at_once == 2)), 0};
      if (begin < end) group.o0 = row_o[begin], group.o1 = row_o[end - 1] + row_channels[end - 1];
      for (int64_t r = begin; r < end; r++)
        for (int32_t i = 0; i < row_channels[r]; i++)
          row_of[row_o[r] + i] = static_cast<uint16_t>((r - begin) * step + i);
      groups.push_back(group);
    }
    first_row.push_back(n);
    head.row_groups = static_cast<int32_t>(count);
  }

  // The entries of a row that lie in one block of channels.
  struct Part {
    const Entry *begin, *end;
    int64_t size() const { return end - begin; }
  };

  // What packing a group needs from block to block.
  struct Work {
    std::vector<Part> parts;
    std::vector<char> started;  // rows whose accumulators hold something
    std::vector<uint64_t> bits, mine;
    std::vector<int64_t> rows, candidates;
    std::vector<Entry> apart[2];
    struct Pair {
      int64_t a, b;
      std::array<int64_t, 3> count;
    };
    std::vector<Pair> pairs;
  };

  void pack_group(int64_t g) {
    const int64_t begin = first_row[g], n = first_row[g + 1] - begin;
    Piece& piece = pieces[g];
    const int64_t n_entries = row_begin[begin + n] - row_begin[begin];
    piece.taps.reserve(n_entries + 1);
    piece.sources.reserve(n_entries * step + 2);
    Work work;
    work.parts.resize(n);
    work.started.assign(n, 0);
    for (int64_t r = 0; r < n; r++) work.parts[r].end = entries.data() + row_begin[begin + r];
    for (int32_t b = 0; b < head.blocks; b++) {
      // Live channels are in order, so a block of them is a range of taps.
      const int64_t last = std::min<int64_t>(head.live, int64_t(b + 1) * head.channels_in_block) - 1;
      const int64_t limit = last < 0 ? 0 : int64_t(live[last] + 1) * taps;
      for (int64_t r = 0; r < n; r++) {
        Part& part = work.parts[r];
        part.begin = part.end;
        const Entry* stop = entries.data() + row_begin[begin + r + 1];
        while (part.end < stop && part.end->tap < limit) part.end++;
      }
      const auto size = [](const auto& v) { return static_cast<int64_t>(v.size()); };
      piece.blocks.push_back({size(piece.segments), size(piece.taps), size(piece.sources), 0});
      if (at_once == 2)
        emit_pairs(work, piece, b);
      else
        emit_blocks(work, piece, b);
      piece.blocks.back().segments = size(piece.segments) - piece.blocks.back().segment;
    }
  }

  // Rows in order of their number of taps: equal trip counts follow each other, and a loop's end is foreseen.
  void emit_blocks(Work& work, Piece& piece, int32_t block) const {
    const auto& parts = work.parts;
    auto& order = work.rows;
    order.resize(parts.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return parts[a].size() > parts[b].size(); });
    for (const int64_t r : order) {
      // Every row starts somewhere, also one without weights; with channels as lanes, it ends in the last block.
      const bool last = block + 1 == head.blocks;
      if (!parts[r].size() && !(last && (head.tiling.channels || !work.started[r]))) continue;
      push_segment(piece, r * at_once, r * at_once, {parts[r].size(), 0, 0}, !work.started[r]);
      work.started[r] = 1;
      for (const Entry* e = parts[r].begin; e < parts[r].end; e++) {
        piece.taps.push_back(offset_of[e->tap]);
        for (int32_t i = 0; i < at_once; i++)
          piece.sources.push_back(static_cast<int32_t>(e->value + i * w.row_step()));
      }
    }
  }

  void emit_pairs(Work& work, Piece& piece, int32_t block) const {
    const int64_t n = work.parts.size(), spare = n;
    const auto& parts = work.parts;
    work.pairs.clear();
    // A pair is `first` for both or for neither, so rows that began and rows that did not are paired apart.
    for (const char begun : {char(1), char(0)}) {
      work.rows.clear();
      for (int64_t r = 0; r < n; r++)
        if (work.started[r] == begun && (parts[r].size() || (!begun && block + 1 == head.blocks)))
          work.rows.push_back(r);
      find_partners(work, spare);
    }
    std::stable_sort(work.pairs.begin(), work.pairs.end(), [](auto& p, auto& q) { return p.count > q.count; });
    for (const auto& p : work.pairs) {
      push_segment(piece, p.a, p.b, p.count, !work.started[p.a]);
      emit_pair(work, piece, parts[p.a], p.b == spare ? Part{nullptr, nullptr} : parts[p.b]);
    }
    for (const auto& p : work.pairs) {
      work.started[p.a] = 1;
      if (p.b != spare) work.started[p.b] = 1;
    }
  }

  // First the taps of both, then those of `a` only, then those of `b` only. Without branches: which comes next is
  // anyone's guess.
  void emit_pair(Work& work, Piece& piece, Part a, Part b) const {
    const size_t taps0 = piece.taps.size(), sources0 = piece.sources.size(), most = std::max(a.size(), b.size()) + 1;
    for (auto& apart : work.apart)
      if (apart.size() < most) apart.resize(most);
    Entry *first = work.apart[0].data(), *second = work.apart[1].data();
    piece.taps.resize(taps0 + a.size() + b.size() + 1);
    piece.sources.resize(sources0 + a.size() + b.size() + 2);
    uint16_t* t = piece.taps.data() + taps0;
    int32_t* s = piece.sources.data() + sources0;
    while (a.begin < a.end && b.begin < b.end) {
      const Entry x = *a.begin, y = *b.begin;
      const bool both = x.tap == y.tap;
      *t = offset_of[x.tap], s[0] = x.value, s[1] = y.value;
      *first = x, *second = y;
      t += both, s += 2 * both;
      first += x.tap < y.tap, second += y.tap < x.tap;
      a.begin += x.tap <= y.tap, b.begin += y.tap <= x.tap;
    }
    const auto put = [&](const Entry* begin, const Entry* end) {
      for (const Entry* e = begin; e < end; e++) *t++ = offset_of[e->tap], *s++ = e->value;
    };
    put(work.apart[0].data(), first), put(a.begin, a.end);
    put(work.apart[1].data(), second), put(b.begin, b.end);
    piece.taps.resize(t - piece.taps.data());
    piece.sources.resize(s - piece.sources.data());
  }

  // Greedy: each of `rows` with the row that shares most taps with it.
  void find_partners(Work& work, int64_t spare) const {
    const auto& parts = work.parts;
    auto& rows = work.rows;
    auto& candidates = work.candidates;
    const int64_t n = rows.size();
    int32_t low = INT32_MAX, high = 0;
    for (const int64_t r : rows)
      if (parts[r].size()) low = std::min(low, parts[r].begin->tap), high = std::max(high, parts[r].end[-1].tap + 1);
    const int64_t words = high > low ? (high - low + 63) / 64 : 0;
    work.bits.assign(n * words, 0);
    work.mine.resize(words);
    for (int64_t i = 0; i < n; i++)
      for (const Entry* e = parts[rows[i]].begin; e < parts[rows[i]].end; e++)
        work.bits[(e->tap - low) / 64 * n + i] |= uint64_t(1) << ((e->tap - low) % 64);
    const auto find = partner_kernel();
    // Rows [i, i + left) of `candidates` and of each row of words are without a partner.
    candidates = rows;
    const auto remove = [&](int64_t at, int64_t end) {
      std::copy(candidates.begin() + at + 1, candidates.begin() + end, candidates.begin() + at);
      for (int64_t k = 0; k < words; k++)
        std::copy(&work.bits[k * n] + at + 1, &work.bits[k * n] + end, &work.bits[k * n] + at);
    };
    for (int64_t i = 0, end = n; i < end; i++) {
      for (int64_t k = 0; k < words; k++) work.mine[k] = work.bits[k * n + i];
      int64_t shared = 0;
      const int64_t a = candidates[i];
      const int64_t at = find(work.mine.data(), work.bits.data() + i + 1, n, end - i - 1, words, &shared);
      if (at < 0) {
        work.pairs.push_back({a, spare, {0, parts[a].size(), 0}});
        continue;
      }
      const int64_t b = candidates[i + 1 + at];
      work.pairs.push_back({a, b, {shared, parts[a].size() - shared, parts[b].size() - shared}});
      remove(i + 1 + at, end--);
    }
  }

  static void push_segment(Piece& piece, int64_t a, int64_t b, const std::array<int64_t, 3>& count, bool first) {
    piece.segments.push_back(
        {{static_cast<uint16_t>(a), static_cast<uint16_t>(b)},
         {static_cast<uint16_t>(count[0]), static_cast<uint16_t>(count[1]), static_cast<uint16_t>(count[2])},
         first});
  }

  const Weight& w;
  const bool with_values;
  const int32_t at_once, step, taps;
  int64_t tap_unit;  // of an element of a panel
  Packed head{};
  std::vector<int32_t> starts;
  Window window{};
  std::vector<Entry> entries;
  std::vector<int64_t> row_begin;
  std::vector<int32_t> row_o, row_channels, live;
  std::vector<uint16_t> offset_of, row_of;
  std::vector<RowGroup> groups;
  std::vector<int64_t> first_row;
  std::vector<Piece> pieces;
};

}  // namespace

bool sealed(const Packed& packed) { return packed.magic == kMagic && packed.seal == seal(packed); }

Tensor pack_as(const Weight& w, const Plan& plan, int32_t lanes, bool with_values) {
  Packer packer(w, plan, lanes, with_values);
  const int64_t size = packer.bytes();
  Tensor blob = empty_cpu(&size, 1, ScalarType::Byte);
  packer.write(static_cast<char*>(blob.mutable_data_ptr()));
  return blob;
}

}  // namespace pyops::sparse
