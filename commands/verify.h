// `verify`: an oracle's file (drt.md, "Fixtures") through the real forward, backward and optimiser of a backend.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "base/safetensors.h"
#include "model.h"

namespace gca {

struct VerifyOptions {
  double tolerance;  // largest difference over largest entry, for each tensor
  bool use_picks =
      false;  // take the file's picks; the nine losses after the first update, whose picks the file lacks, are left out
  bool quiet = false;  // only the worst tensor of each file
};

class Verifier {
 public:
  Verifier(const std::string& path, const VerifyOptions& options)
      : file_(SafetensorsFile::open(path)), options_(options) {
    config_.vocab = field("vocab");
    config_.width = field("width");
    config_.heads = field("heads");
    config_.ffn = field("ffn");
    config_.lower = field("lower");
    config_.encoder = field("encoder");
    config_.chunk = field("chunk");
    config_.topk = field("topk");
    config_.window = field("window");
    config_.null_slot = field("null_slot") != 0;
    const std::string& groups = text("groups");
    for (size_t at = 0; at < groups.size();) {
      const size_t comma = std::min(groups.find(',', at), groups.size());
      config_.groups.push_back(integer(groups.substr(at, comma - at), "groups"));
      at = comma + 1;
    }
    const std::string& eps = text("eps");
    char* end = nullptr;
    config_.eps = strtod(eps.c_str(), &end);
    if (eps.empty() || *end || !(config_.eps >= 0 && config_.eps < 1))
      throw Error(where("eps") + "expected a number from 0 to 1, found '" + eps + "'");
    B_ = field("batch");
    C_ = field("chunks");
    if (B_ < 1 || C_ < 1 || B_ > (1 << 20) || C_ > (1 << 20))
      throw Error(where("batch, chunks") + "expected at least 1 each");
    try {
      config_.validate();
    } catch (const UsageError& error) {
      throw Error("'" + path + "': metadata: " + error.what());
    }
  }

  // Prints a line a tensor; true if all are within the tolerance.
  template <class Device>
  bool run(Device& device) {
    using Model = DRT<Device>;
    const int64_t S = config_.chunk, T = C_ * S, R = B_ * T, G = static_cast<int64_t>(config_.groups.size());
    Model model(device, config_);
    // Before anything of those sizes is allocated: they are the file's tensors', whatever its metadata say.
    for (const Tensor& t : model.table.tensors)
      file_.at("param." + t.name, t.columns ? Shape{t.rows, t.columns} : Shape{t.rows});
    for (const char* name : {"tokens", "targets"}) file_.at(name, {B_, T});
    for (int64_t g = 0; g < G; g++) file_.at(str("group", g, ".gumbel_noise"), {B_, C_, C_});
    model.plan(B_, T);
    if (const int64_t n_bytes = model.model_memory().total_bytes() + model.activation_memory().total_bytes(),
        room = device.free_bytes();
        n_bytes > room)
      throw Error(str("'", file_.path(), "' needs ", fixed(static_cast<double>(n_bytes) / (1 << 20), 1), " MiB, ",
                      fixed(static_cast<double>(room) / (1 << 20), 1), " MiB are free; run it on a larger machine"));
    model.allocate();
    model.commit_activations();
    std::vector<typename Model::master> values;
    for (const Tensor& t : model.table.tensors) {
      values.resize(t.size());
      file_.read("param." + t.name, t.columns ? Shape{t.rows, t.columns} : Shape{t.rows}, values.data());
      device.upload(model.masters + t.offset, values.data(), t.size() * static_cast<int64_t>(sizeof(values[0])));
    }
    model.weights_changed();

    std::vector<int32_t> tokens(R), targets(tokens.size());
    file_.read("tokens", {B_, T}, tokens.data());
    file_.read("targets", {B_, T}, targets.data());
    int64_t N = 0;
    for (size_t i = 0; i < tokens.size(); i++) {
      if (tokens[i] < 0 || tokens[i] >= config_.vocab || targets[i] >= config_.vocab)
        throw Error(str("'", file_.path(), "': tokens, targets: expected ids below vocab ", config_.vocab, ", found ",
                        tokens[i], " and ", targets[i], " at slot ", i));
      N += targets[i] >= 0;
    }
    if (!N) throw Error("'" + file_.path() + "': targets: expected at least one slot with a target");
    noise_.resize(G * B_ * C_ * C_);
    for (int64_t g = 0; g < G; g++)
      file_.read(str("group", g, ".gumbel_noise"), {B_, C_, C_}, noise_.data() + g * B_ * C_ * C_);
    const auto release = [&](float* memory) { device.release(memory); };
    const std::unique_ptr<float, decltype(release)> device_noise(
        static_cast<float*>(device.allocate(static_cast<int64_t>(noise_.size() * sizeof(float)))), release);
    if (G) device.upload(device_noise.get(), noise_.data(), static_cast<int64_t>(noise_.size() * sizeof(float)));
    model.upload(tokens.data(), targets.data(), nullptr, R);

    typename Model::Input in{B_, T, {}};
    model.forward(in);
    if (file_.find("eval.logits")) compare("eval.logits", logits(model, device, R));
    in.selection.noise = true;
    in.selection.given_noise = device_noise.get();
    if (options_.use_picks) give_picks(model, device, in);

    model.begin_step();
    model.forward(in);
    for (int64_t g = 0; g < G; g++) check_picks(model, device, g);
    if (picks_differ_ && near_tie_ && !options_.use_picks) {
      print(file_.path(), ": a near tie decided otherwise: the rest is checked with the file's picks\n");
      give_picks(model, device, in);
      model.forward(in);
      picks_differ_ = false;
    }
    for (int64_t g = 0; g < G; g++) compare_weights(model, device, g);
    compare_stage(device, "stage.lower_out", model.lower.empty() ? model.embedded : model.lower.back().out,
                  R * config_.width);
    if (G) compare_stage(device, "stage.encoder_out", model.enc_out, R * config_.width);
    for (int64_t g = 0; g < G; g++)
      compare_stage(device, str("stage.group", g, "_out"), model.groups[g].layers.back().out, R * config_.width);
    compare("logits", logits(model, device, R));
    model.head(1.0 / static_cast<double>(N), true);
    model.backward();
    const bool held = G && in.selection.picking == Picking::given;
    std::vector<double> losses{model.step_state().loss};
    compare("loss", losses);
    for (const Tensor& t : model.table.tensors)
      compare("grad." + t.name, download<double>(device, model.gradient + t.offset, t.size()));

    const AdamW hyper{.lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1.0};
    model.update(hyper);
    compare("train.grad_norm_first", {model.step_state().grad_norm});
    for (int step = 1; step < 10 && !held; step++) {
      model.begin_step();
      model.forward(in);
      model.head(1.0 / static_cast<double>(N), true);
      model.backward();
      losses.push_back(model.step_state().loss);
      model.update(hyper);
    }
    std::vector<double> expected = file_.values<double>("train.losses");
    expected.resize(std::min(expected.size(), losses.size()));
    compare("train.losses", losses, expected);

    const bool good = worst_ <= options_.tolerance && !picks_differ_;
    print(good ? "ok  " : "FAIL", " ", file_.path(), ": ", compared_, " tensors, worst ", worst_name_, " ",
          significant(worst_, 3), " (tolerance ", significant(options_.tolerance, 3), ")",
          picks_differ_ ? ", picks differ" : "", held ? ", picks of the file held: only the first loss" : "", "\n");
    return good;
  }

 private:
  SafetensorsFile file_;
  VerifyOptions options_;
  Config config_;
  int64_t B_ = 0, C_ = 0;
  std::vector<float> noise_;
  double worst_ = 0;
  std::string worst_name_ = "none";
  int compared_ = 0;
  bool picks_differ_ = false, near_tie_ = false;

  std::string where(const char* name) const { return "'" + file_.path() + "': metadata: " + name + ": "; }
  const std::string& text(const char* name) const {
    const auto place = file_.metadata().find(name);
    if (place == file_.metadata().end())
      throw Error(where(name) + "expected, but missing; is this an oracle's file? dev/make_oracle.py makes one");
    return place->second;
  }
  int64_t integer(const std::string& value, const char* name) const {
    char* end = nullptr;
    const long long number = strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end || number < 0 || number > (1 << 30))
      throw Error(where(name) + "expected a number of at most 2^30, found '" + value + "'");
    return number;
  }
  int64_t field(const char* name) const { return integer(text(name), name); }

  // count elements of a device array, as doubles or integers
  template <class Out, class Device, class In>
  static std::vector<Out> download(Device& device, const In* from, int64_t count) {
    std::vector<In> raw(count);
    device.download(raw.data(), from, count * static_cast<int64_t>(sizeof(In)));
    std::vector<Out> out(raw.size());
    for (size_t i = 0; i < raw.size(); i++) {
      if constexpr (std::is_arithmetic_v<In>) out[i] = static_cast<Out>(raw[i]);
      else out[i] = static_cast<Out>(static_cast<float>(raw[i]));  // a GPU's bf16
    }
    return out;
  }
  template <class Model, class Device>
  static std::vector<double> logits(Model& model, Device& device, int64_t rows) {
    const int64_t V = model.config.vocab, stride = model.table.padded_vocab;
    std::vector<double> all;
    for (int64_t first = 0; first < rows; first += model.logits_rows()) {
      const int64_t count = std::min(model.logits_rows(), rows - first);
      model.piece_of_logits(first, count);
      const std::vector<double> piece = download<double>(device, model.logits, count * stride);
      for (int64_t r = 0; r < count; r++)
        all.insert(all.end(), piece.begin() + r * stride, piece.begin() + r * stride + V);
    }
    return all;
  }

  void compare(const std::string& name, const std::vector<double>& found) {
    compare(name, found, file_.values<double>(name));
  }
  void compare(const std::string& name, const std::vector<double>& found, const std::vector<double>& expected) {
    if (found.size() != expected.size())
      throw Error(str("'", file_.path(), "': tensor '", name, "': expected ", found.size(), " numbers, found ",
                      expected.size()));
    double largest = 0, difference = 0, squares = 0, reference = 0;
    for (size_t i = 0; i < found.size(); i++) {
      const double delta = std::fabs(found[i] - expected[i]);
      largest = std::max(largest, std::fabs(expected[i]));
      if (!(delta <= difference)) difference = delta;  // a NaN stays
      squares += delta * delta;
      reference += expected[i] * expected[i];
    }
    const double error = largest > 0 ? difference / largest : difference;
    const bool good = error <= options_.tolerance;
    if (!options_.quiet || !good)
      print("  ", left(name, 60), " ", right(significant(error, 3), 10), " largest  ",
            right(significant(reference > 0 ? std::sqrt(squares / reference) : std::sqrt(squares), 3), 10), " rms",
            good ? "" : "   PAST THE TOLERANCE", "\n");
    if (!(error <= worst_)) {
      worst_ = std::isnan(error) ? HUGE_VAL : error;
      worst_name_ = name;
    }
    compared_++;
  }
  template <class Device, class T>
  void compare_stage(Device& device, const std::string& name, const T* found, int64_t count) {
    if (file_.find(name)) compare(name, download<double>(device, found, count));
  }

  // The file's table of group g, (B,C,columns), columns the lesser of K and C.
  std::vector<int32_t> file_picks(int64_t g) const {
    std::vector<int32_t> picks(B_ * C_ * columns());
    file_.read(str("group", g, ".topk_index"), {B_, C_, columns()}, picks.data());
    return picks;
  }
  std::vector<double> file_weights(int64_t g) const {
    std::vector<double> weights(B_ * C_ * columns());
    file_.read(str("group", g, ".topk_weight"), {B_, C_, columns()}, weights.data());
    return weights;
  }
  int64_t columns() const { return std::min(config_.topk, C_); }

  // Puts the file's picks into the model's tables; an index whose weight is 0 is arbitrary there, and -1 here.
  template <class Model, class Device>
  void give_picks(Model& model, Device& device, typename Model::Input& in) {
    const int64_t K = config_.topk;
    for (size_t g = 0; g < config_.groups.size(); g++) {
      const std::vector<int32_t> picks = file_picks(static_cast<int64_t>(g));
      const std::vector<double> weights = file_weights(static_cast<int64_t>(g));
      std::vector<int32_t> table(B_ * (C_ + 1) * K, -1);
      for (int64_t b = 0; b < B_; b++)
        for (int64_t c = 0; c < C_; c++)
          for (int64_t k = 0; k < columns(); k++) {
            const size_t from = (b * C_ + c) * columns() + k;
            if (weights[from] == 0) continue;
            if (picks[from] < 0 || picks[from] >= c)
              throw Error(str("'", file_.path(), "': group", g, ".topk_index: chunk ", c,
                              " expected to fetch an earlier chunk, found ", picks[from]));
            table[(b * (C_ + 1) + c + 1) * K + k] = picks[from];
          }
      device.upload(model.groups[g].pick, table.data(), static_cast<int64_t>(table.size() * sizeof(int32_t)));
    }
    in.selection.picking = Picking::given;
  }
  // Equal picks, in order; and how near the K-th and the next candidate came.
  template <class Model, class Device>
  void check_picks(Model& model, Device& device, int64_t g) {
    const int64_t D = config_.width, K = config_.topk, S = config_.chunk;
    const auto& group = model.groups[g];
    const std::vector<int32_t> found = download<int32_t>(device, group.pick, B_ * (C_ + 1) * K),
                               expected = file_picks(g);
    const std::vector<double> weights = file_weights(g), r = download<double>(device, group.r, B_ * C_ * D),
                              h = download<double>(device, model.enc_out, B_ * C_ * S * D);
    int64_t differ = 0, near = 0;
    double nearest = HUGE_VAL;
    for (int64_t b = 0; b < B_; b++)
      for (int64_t c = 0; c < C_; c++) {
        for (int64_t k = 0; k < columns(); k++) {
          const size_t at = (b * C_ + c) * columns() + k;
          const int32_t pick = found[(b * (C_ + 1) + c + 1) * K + k];
          differ += weights[at] == 0 ? pick >= 0 : pick != expected[at];
        }
        std::vector<double> score;
        for (int64_t m = 0; m < c; m++) {
          double sum = 0;
          for (int64_t j = 0; j < D; j++) sum += r[(b * C_ + c) * D + j] * h[((b * C_ + m) * S + S - 1) * D + j];
          sum = sum / std::sqrt(static_cast<double>(D)) + static_cast<double>(noise_[((g * B_ + b) * C_ + c) * C_ + m]);
          score.push_back(std::isnan(sum) ? -HUGE_VAL : sum);  // NaN cannot be sorted
        }
        std::sort(score.rbegin(), score.rend());
        // Neighbours within the first K + 1: a swap inside the K changes the order that the file fixes, one at the edge
        // the set.
        for (size_t k = 1; k < score.size() && k <= static_cast<size_t>(K); k++) {
          nearest = std::min(nearest, score[k - 1] - score[k]);
          near += k == static_cast<size_t>(K) && score[k - 1] - score[k] < near_tie;
        }
      }
    if (near)
      print("  group ", g, ": near tie: the K-th and the next score are closer than ", near_tie, " in ", near,
            " chunks\n");
    near_tie_ |= near > 0 || nearest < near_tie;
    picks_differ_ |= differ > 0;
    if (!options_.quiet || differ)
      print("  group", g, ".topk_index ", left("", 42), " ", differ ? "DIFFER" : "equal", " (", differ, " of ",
            expected.size(), " differ; nearest scores ", significant(nearest, 3), " apart)\n");
  }
  static constexpr double near_tie = 1e-3;

  template <class Model, class Device>
  void compare_weights(Model& model, Device& device, int64_t g) {
    const int64_t K = config_.topk;
    const std::vector<double> table = download<double>(device, model.groups[g].w, B_ * (C_ + 1) * K);
    std::vector<double> found;
    for (int64_t b = 0; b < B_; b++)
      for (int64_t c = 0; c < C_; c++)
        for (int64_t k = 0; k < columns(); k++) found.push_back(table[(b * (C_ + 1) + c + 1) * K + k]);
    compare(str("group", g, ".topk_weight"), found, file_weights(g));
  }
};

}  // namespace gca
