// The sizes of a DRT, what of them a step may vary, and the one table of its tensors.
#pragma once
#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "common.h"
#include "ops.h"

namespace gca {

// ---- sizes --------------------------------------------------------------------------------------------------------
// How far a slot reaches: no tensor's shape depends on it, so a step may set it (DRT::reach) where a run wants that,
// and what evaluates in between goes by it too.
struct Reach {
  int64_t topk = 8, window = 512;  // K, chunks that a chunk fetches; W, slots back that a slot attends to
  bool operator==(const Reach&) const = default;
};

struct Config {
  int64_t vocab = 0, width = 768, heads = 12, ffn = 2048;
  int64_t lower = 6;            // layers below the retrieval
  std::vector<int64_t> groups;  // layers of each retrieval group; empty: the sliding-window baseline
  int64_t encoder = 2;          // layers of the chunk encoder
  int64_t chunk = 64;
  Reach reach = {};  // as a run begins, and the most that its buffers have room for
  bool null_slot = true;
  double eps = 1e-5;  // of every norm but the encoder's
  static constexpr double encoder_eps = 1e-6;

  int64_t head_size() const { return width / heads; }
  int64_t upper() const {
    int64_t sum = 0;
    for (int64_t n : groups) sum += n;
    return sum;
  }
  bool operator==(const Config&) const = default;

  const Config& validated() const {
    validate();
    return *this;
  }
  // Throws a UsageError that names the flag.
  void validate() const {
    auto need = [](bool good, const char* flag, const char* expected, int64_t found) {
      if (!good) throw UsageError(str("--", flag, ": expected ", expected, ", found ", found));
    };
    need(vocab >= 2 && vocab <= (int64_t{1} << 24), "vocab", "2 to 16777216 ids", vocab);
    need(width >= 1 && width <= 65536, "width", "1 to 65536", width);
    need(heads >= 1 && width % heads == 0, "heads", "a divisor of --width", heads);
    need(head_size() % 2 == 0, "heads", "an even number of columns a head (--width / --heads)", heads);
    need(ffn >= 1 && ffn <= (1 << 20), "ffn", "1 to 1048576", ffn);
    need(groups.size() <= 255, "groups", "at most 255 groups", static_cast<int64_t>(groups.size()));
    for (int64_t n : groups) need(n >= 1 && n <= 1024, "groups", "1 to 1024 layers in each group", n);
    need(lower >= 0 && lower <= 1024 && lower + upper() >= 1 && lower + upper() <= 1024, "lower",
         "1 to 1024 layers, lower and upper together", lower);
    need(encoder >= 0 && encoder <= 1024, "encoder", "0 to 1024 layers", encoder);
    need(chunk >= 2 && chunk <= 4096, "chunk", "2 to 4096 slots", chunk);
    need(reach.topk >= 1 && reach.topk <= max_topk, "topk", "1 to 32 chunks", reach.topk);
    need(reach.window >= 0 && reach.window < (int64_t{1} << 31), "window", "0 or more slots", reach.window);
    if (!(eps >= 0 && eps < 1)) throw UsageError(str("eps of the norms: expected 0 to 1, found ", eps));
  }
};

struct Preset {
  const char *name, *what;
  Config config;
};
inline const std::array<Preset, 6>& presets() {
  static const std::array<Preset, 6> all = {{
      {"drt", "the paper's model, one retrieval", {.groups = {6}}},
      {"drt-x2", "the paper's model, two retrievals", {.groups = {3, 3}}},
      {"swa", "sliding-window baseline, 12 layers", {.lower = 12, .groups = {}, .encoder = 0}},
      {"swa-14",
       "sliding-window baseline with the DRT's compute, 14 layers",
       {.lower = 14, .groups = {}, .encoder = 0}},
      {"small",
       "for a CPU: width 256",
       {.width = 256, .heads = 4, .ffn = 688, .lower = 3, .groups = {3}, .encoder = 1, .reach = {.window = 128}}},
      {"tiny",
       "for a CPU: width 64",
       {.width = 64, .heads = 4, .ffn = 176, .lower = 3, .groups = {3}, .encoder = 1, .reach = {.window = 128}}},
  }};
  return all;
}

// ---- the table of tensors -----------------------------------------------------------------------------------------
// One line here makes a weight: it is then counted, initialised, decayed, saved, loaded and checked like the others.
struct Tensor {
  std::string name;       // the released model's
  int64_t rows, columns;  // (out, in); columns 0: a gain of rows numbers
  int64_t offset;         // in the flat buffers, in elements
  bool decay;             // matrices only
  int64_t size() const { return rows * std::max<int64_t>(columns, 1); }
};

// Where the tensors of a layer lie in the flat buffers. q, k, v are neighbours, and gate and up: one product each.
struct LayerTensors {
  int64_t begin, norm1, qkv, o, gca_norm, gca_q, gca_o, norm2, gate_up, down;
};

struct TensorTable {
  std::vector<Tensor> tensors;    // in the order of files and of the flat buffers
  std::vector<Segment> segments;  // the same for the optimiser, neighbours of one kind together
  int64_t size = 0;               // of a flat buffer, elements, gaps for alignment included
  int64_t padded_vocab = 0;
  int64_t embedding = 0, enc_prenorm = 0, enc_norm = 0, chunk_kv = 0, norm = 0;
  std::vector<int64_t> lmk_norms;
  std::vector<LayerTensors> lower, encoder;
  std::vector<std::vector<LayerTensors>> upper;

  TensorTable() = default;
  // alignment: elements that each tensor's offset is a multiple of (but inside a fused pair, where it follows at once)
  TensorTable(const Config& c, int64_t vocab_multiple, int64_t alignment) : alignment_(alignment) {
    const int64_t D = c.width;
    padded_vocab = round_up(c.vocab, vocab_multiple);
    embedding = add("model.embed_tokens", c.vocab, D);
    size += (padded_vocab - c.vocab) * D;
    segments.back().size += (padded_vocab - c.vocab) * D;
    for (int64_t i = 0; i < c.lower; i++) lower.push_back(add_layer(str("model.lower_layers.", i, "."), c, false));
    if (!c.groups.empty()) {
      enc_prenorm = add("model.enc_prenorm", D, 0);
      for (int64_t i = 0; i < c.encoder; i++)
        encoder.push_back(add_layer(str("model.encoder.layers.", i, "."), c, false));
      enc_norm = add("model.encoder.norm", D, 0);
      chunk_kv = add("model.chunk_k_proj", D, D);
      add("model.chunk_v_proj", D, D, true);
    }
    for (size_t g = 0; g < c.groups.size(); g++) {
      // What a group adds beside its layers stands here, before them: with lmk_norm's its gradient is told to be final.
      lmk_norms.push_back(add(str("model.lmk_norms.", g), D, 0));
      upper.emplace_back();
      for (int64_t i = 0; i < c.groups[g]; i++)
        upper.back().push_back(add_layer(str("model.upper_layers.", g, ".", i, "."), c, true));
    }
    norm = add("model.norm", D, 0);
    size = round_up(size, alignment_);
  }

  int64_t parameters() const {
    int64_t sum = 0;
    for (const Tensor& t : tensors) sum += t.size();
    return sum;
  }

 private:
  int64_t add(const std::string& name, int64_t rows, int64_t columns, bool follows = false) {
    if (!follows) size = round_up(size, alignment_);
    Tensor t{name + ".weight", rows, columns, size, columns > 0};
    size += t.size();
    if (!segments.empty() && segments.back().decay == t.decay) segments.back().size = size - segments.back().offset;
    else segments.push_back({t.offset, t.size(), t.decay});
    tensors.push_back(std::move(t));
    return tensors.back().offset;
  }
  LayerTensors add_layer(const std::string& prefix, const Config& c, bool upper_kind) {
    const int64_t D = c.width;
    LayerTensors l{};
    l.begin = l.norm1 = add(prefix + "input_layernorm", D, 0);
    l.qkv = add(prefix + "self_attn.q_proj", D, D);
    add(prefix + "self_attn.k_proj", D, D, true);
    add(prefix + "self_attn.v_proj", D, D, true);
    l.o = add(prefix + "self_attn.o_proj", D, D);
    if (upper_kind) {
      l.gca_norm = add(prefix + "gca.pre_norm", D, 0);
      l.gca_q = add(prefix + "gca.q_proj", D, D);
      l.gca_o = add(prefix + "gca.o_proj", D, D);
    }
    l.norm2 = add(prefix + "post_attention_layernorm", D, 0);
    l.gate_up = add(prefix + "mlp.gate_proj", c.ffn, D);
    add(prefix + "mlp.up_proj", c.ffn, D, true);
    l.down = add(prefix + "mlp.down_proj", D, c.ffn);
    return l;
  }
  int64_t alignment_ = 1;
};

// Floating-point operations a slot needs, forward only, a multiplication and an addition counted each; training costs
// three times as much. Attention over the slots that are seen, GCA over K chunks, no masked work.
inline double forward_flops_per_slot(const Config& c, const Reach& reach) {
  const double D = static_cast<double>(c.width), F = static_cast<double>(c.ffn), V = static_cast<double>(c.vocab),
               S = static_cast<double>(c.chunk);
  const double layer = 8 * D * D + 6 * D * F, window = 4 * D * static_cast<double>(reach.window + 1);
  double sum = static_cast<double>(c.lower + c.upper()) * (layer + window) + 2 * V * D;
  if (!c.groups.empty())
    sum += static_cast<double>(c.encoder) * (layer + 4 * D * S) + 4 * D * D +
           static_cast<double>(c.upper()) * (4 * D * D + 4 * D * S * static_cast<double>(reach.topk));
  return sum;
}

}  // namespace gca
