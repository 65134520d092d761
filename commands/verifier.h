// `verify`: an oracle's file (drt.md, "Fixtures") through the real forward, backward and optimiser of a backend.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "base/safetensors.h"
#include "base/text.h"
#include "model.h"

namespace gca {

struct VerifyOptions {
  double tolerance;  // largest difference over largest entry, for each tensor
  // Take the file's picks; the nine losses after the first update, whose picks the file lacks, are left out.
  bool use_picks = false;
  bool quiet = false;  // only the worst tensor of each file
};

class Verifier {
 public:
  Verifier(const std::string& path, const VerifyOptions& options);

  // Prints a line a tensor; true if all are within the tolerance.
  template <class Device>
  bool run(Device& device) {
    using Model = DRT<Device>;
    Model model(device, config_);
    allocate(model);
    load_weights(model);
    const double scale = 1.0 / static_cast<double>(upload_rows(model));
    const auto release = [&](float* memory) { device.release(memory); };
    const std::unique_ptr<float, decltype(release)> noise(upload_noise(device), release);

    typename Model::Input in{B_, C_ * config_.chunk, {}};
    model.forward(in);
    if (file_.find("eval.logits")) compare("eval.logits", logits(model, device, rows()));
    in.selection.noise = true;
    in.selection.given_noise = noise.get();
    if (options_.use_picks) give_picks(model, device, in);

    model.begin_step();
    model.forward(in);
    compare_picks(model, in);
    compare_forward(model);
    model.head(scale, true);
    model.backward();
    std::vector<double> losses{model.step_state().loss};
    compare("loss", losses);
    for (const Tensor& t : model.table.tensors)
      compare("grad." + t.name, download<double>(device, model.gradient + t.offset, t.size()));
    model.update(hyper);
    compare("train.grad_norm_first", {model.step_state().grad_norm});

    const bool held = group_count() && in.selection.picking == Picking::given;
    if (!held) train_on(model, in, scale, losses);
    std::vector<double> expected = file_.values<double>("train.losses");
    expected.resize(std::min(expected.size(), losses.size()));
    compare("train.losses", losses, expected);
    return verdict(held);
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
  uint32_t bits_ = 0;  // CRC-32C of all that was compared, as doubles, in order
  bool picks_differ_ = false, near_tie_ = false;

  static constexpr AdamW hyper{.lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1.0};

  int64_t rows() const { return B_ * C_ * config_.chunk; }
  int64_t group_count() const { return std::ssize(config_.groups); }
  static Shape shape_of(const Tensor& t) { return t.columns ? Shape{t.rows, t.columns} : Shape{t.rows}; }

  // ---- the steps of run() -------------------------------------------------------------------------------------------
  // Before anything of those sizes is allocated the file's tensors must have them, whatever its metadata say.
  template <class Model>
  void allocate(Model& model) {
    const int64_t T = C_ * config_.chunk;
    for (const Tensor& t : model.table.tensors) file_.at("param." + t.name, shape_of(t));
    for (const char* name : {"tokens", "targets"}) file_.at(name, {B_, T});
    for (int64_t g = 0; g < group_count(); g++) file_.at(str("group", g, ".gumbel_noise"), {B_, C_, C_});
    model.plan(B_, T);
    const int64_t n_bytes = model.model_memory().total_bytes() + model.activation_memory().total_bytes(),
                  room = model.device.free_bytes();
    if (n_bytes > room)
      throw Error(str("'", file_.path(), "' needs ", mebibytes(n_bytes), ", ", mebibytes(room),
                      " are free; run it on a larger machine"));
    model.allocate();
    model.commit_activations();
  }
  template <class Model>
  void load_weights(Model& model) {
    std::vector<typename Model::master> values;
    for (const Tensor& t : model.table.tensors) {
      values.resize(t.size());
      file_.read("param." + t.name, shape_of(t), values.data());
      model.device.upload(model.masters + t.offset, values.data(), t.size() * static_cast<int64_t>(sizeof(values[0])));
    }
    model.weights_changed();
  }
  // Returns N, the number of slots with a target.
  template <class Model>
  int64_t upload_rows(Model& model) {
    std::vector<int32_t> tokens(rows()), targets(tokens.size());
    file_.read("tokens", {B_, C_ * config_.chunk}, tokens.data());
    file_.read("targets", {B_, C_ * config_.chunk}, targets.data());
    const int64_t N = count_targets(tokens, targets);
    model.upload(tokens.data(), targets.data(), nullptr, rows());
    return N;
  }
  int64_t count_targets(const std::vector<int32_t>& tokens, const std::vector<int32_t>& targets) const;
  // The noise of all groups, (G,B,C,C), in the device's memory.
  template <class Device>
  float* upload_noise(Device& device) {
    noise_.resize(group_count() * B_ * C_ * C_);
    for (int64_t g = 0; g < group_count(); g++)
      file_.read(str("group", g, ".gumbel_noise"), {B_, C_, C_}, noise_.data() + g * B_ * C_ * C_);
    const int64_t n_bytes = static_cast<int64_t>(noise_.size() * sizeof(float));
    float* noise = static_cast<float*>(device.allocate(n_bytes));
    device.upload(noise, noise_.data(), n_bytes);
    return noise;
  }
  template <class Model>
  void compare_picks(Model& model, typename Model::Input& in) {
    for (int64_t g = 0; g < group_count(); g++) check_picks(model, model.device, g);
    if (picks_differ_ && near_tie_ && !options_.use_picks) {
      print(file_.path(), ": a near tie decided otherwise: the rest is checked with the file's picks\n");
      give_picks(model, model.device, in);
      model.forward(in);
      picks_differ_ = false;
    }
    for (int64_t g = 0; g < group_count(); g++) compare_weights(model, model.device, g);
  }
  template <class Model>
  void compare_forward(Model& model) {
    auto& device = model.device;
    const int64_t size = rows() * config_.width;
    compare_stage(device, "stage.lower_out", model.lower.empty() ? model.embedded : model.lower.back().out, size);
    if (group_count()) compare_stage(device, "stage.encoder_out", model.enc_out, size);
    for (int64_t g = 0; g < group_count(); g++)
      compare_stage(device, str("stage.group", g, "_out"), model.groups[g].layers.back().out, size);
    compare("logits", logits(model, device, rows()));
  }
  // The steps after the first: their losses.
  template <class Model>
  static void train_on(Model& model, const typename Model::Input& in, double scale, std::vector<double>& losses) {
    for (int step = 1; step < 10; step++) {
      model.begin_step();
      model.forward(in);
      model.head(scale, true);
      model.backward();
      losses.push_back(model.step_state().loss);
      model.update(hyper);
    }
  }
  bool verdict(bool held) const;

  // ---- the file's metadata ------------------------------------------------------------------------------------------
  std::string where(const char* name) const { return "'" + file_.path() + "': metadata: " + name + ": "; }
  const std::string& text(const char* name) const;
  int64_t integer(const std::string& value, const char* name) const;
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

  void compare(const std::string& name, const std::vector<double>& found);
  void compare(const std::string& name, const std::vector<double>& found, const std::vector<double>& expected);
  template <class Device, class T>
  void compare_stage(Device& device, const std::string& name, const T* found, int64_t count) {
    if (file_.find(name)) compare(name, download<double>(device, found, count));
  }

  std::vector<int32_t> file_picks(int64_t g) const;
  std::vector<double> file_weights(int64_t g) const;
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
