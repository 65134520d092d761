// Oracle files (doc/use.md; dev/make_oracle.py makes them) through the real forward, backward and optimiser of a
// backend. What depends on the backend is here, and only moves arrays to and fro; what is compared, and how, is in
// verifier.cpp.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "base/safetensors.h"
#include "runtime/models.h"

namespace gca {

struct VerifyOptions {
  double tolerance;  // largest difference over largest entry, for each tensor
  // Take the file's picks; the nine losses after the first update, whose picks the file lacks, are left out.
  bool use_picks = false;
  bool quiet = false;             // only the worst tensor of each file
  std::string* report = nullptr;  // what gets the lines instead of standard output
};

class Verifier {
 public:
  // An Error that names the file where it is no oracle's.
  Verifier(const std::string& path, const VerifyOptions& options);

  // Says a line a tensor; true if all are within the tolerance. The last line's hash is of all that was found, so that
  // runs of the same bits have the same one.
  template <class Device>
  bool run(Device& device);

 private:
  SafetensorsFile file_;
  VerifyOptions options_;
  Config config_;
  int64_t B_ = 0, C_ = 0, T_ = 0, R_ = 0;  // rows, chunks and slots of a row, slots of all rows
  int64_t G_ = 0, K_ = 0;                  // groups; columns of the file's picks, the lesser of topk and C
  std::vector<float> noise_;               // (G,B,C,C)
  double worst_ = 0;
  std::string worst_name_ = "none";
  int compared_ = 0;
  uint32_t hash_ = 0;  // CRC-32C of all numbers found, as doubles, in order
  bool picks_differ_ = false, near_tie_ = false;

  template <class... Parts>
  void say(const Parts&... parts) const {
    say_text(str(parts...));
  }
  void say_text(const std::string& text) const;

  // ---- the file ---------------------------------------------------------------------------------------------------
  void read_config();
  static Shape shape_of(const Tensor& t) { return t.columns ? Shape{t.rows, t.columns} : Shape{t.rows}; }
  // Errors where the file's tensors have not the sizes of the metadata; where memory of such sizes is not there.
  void check_shapes(const TensorTable& table) const;
  void check_room(int64_t n_bytes, int64_t room) const;
  // (B,T) each. Returns N, the number of slots with a target.
  int64_t read_rows(std::vector<int32_t>& tokens, std::vector<int32_t>& targets) const;
  void read_noise();
  std::vector<int32_t> file_picks(int64_t g) const;  // (B,C,K_)
  std::vector<double> file_weights(int64_t g) const;
  // The place of the k-th pick of chunk c in the file's tables, and in the model's, (B,C+1,topk), where it is what
  // chunk c + 1 reads.
  size_t in_file(int64_t b, int64_t c, int64_t k) const { return (b * C_ + c) * K_ + k; }
  PickTable table() const { return {C_, config_.reach.topk}; }
  int64_t in_model(int64_t b, int64_t c, int64_t k) const { return table().picked_by(b, c, k); }

  // ---- comparisons --------------------------------------------------------------------------------------------------
  void compare(const std::string& name, const std::vector<double>& found);
  void compare(const std::string& name, const std::vector<double>& found, const std::vector<double>& expected);
  // Equal picks, in order; and how near the K-th and the next candidate came. found: the model's table, r (B,C,D), h
  // (B,C,S,D) the encoder's output.
  void check_picks(int64_t g, const std::vector<int32_t>& found, const std::vector<double>& r,
                   const std::vector<double>& h);
  int64_t count_differing(int64_t g, const std::vector<int32_t>& found) const;
  std::vector<double> sorted_scores(int64_t g, int64_t b, int64_t c, const std::vector<double>& r,
                                    const std::vector<double>& h) const;
  // Whether picks differ because of a near tie alone: then the rest is checked with the file's.
  bool take_files_picks();
  void compare_weights(int64_t g, const std::vector<double>& table);
  // The file's picks as the model's table; an index whose weight is 0 is arbitrary there, and -1 here.
  std::vector<int32_t> given_picks(int64_t g) const;
  void compare_losses(const std::vector<double>& losses);
  bool verdict(bool held) const;

  // ---- the steps of run() -------------------------------------------------------------------------------------------
  template <class Device>
  void allocate(DRT<Device>& model);
  template <class Device>
  void load_parameters(DRT<Device>& model);
  template <class Device>
  double upload_rows(DRT<Device>& model);  // returns 1/N
  template <class Device>
  void give_picks(DRT<Device>& model, typename DRT<Device>::Input& in);
  template <class Device>
  void compare_picks(DRT<Device>& model, typename DRT<Device>::Input& in);
  template <class Device>
  void compare_stages(DRT<Device>& model);
  template <class Device>
  void compare_gradients(DRT<Device>& model);
  template <class Device>
  static void train_on(DRT<Device>& model, const typename DRT<Device>::Input& in, double scale,
                       std::vector<double>& losses);
};

// ---- arrays of a backend ------------------------------------------------------------------------------------------
// count elements of a device array, as doubles or integers
template <class Out, class Device, class In>
std::vector<Out> downloaded(Device& device, const In* from, int64_t count) {
  std::vector<In> raw(count);
  device.download(raw.data(), from, count * static_cast<int64_t>(sizeof(In)));
  std::vector<Out> out(raw.size());
  for (size_t i = 0; i < raw.size(); i++) {
    if constexpr (std::is_arithmetic_v<In>) out[i] = static_cast<Out>(raw[i]);
    else out[i] = static_cast<Out>(static_cast<float>(raw[i]));  // a GPU's bf16
  }
  return out;
}
// The logits of the last forward pass, (rows,V).
template <class Device>
std::vector<double> all_logits(DRT<Device>& model, int64_t rows) {
  const int64_t V = model.config.vocab, stride = model.table.padded_vocab;
  std::vector<double> all;
  for (int64_t first = 0; first < rows; first += model.logits_rows()) {
    const int64_t count = std::min(model.logits_rows(), rows - first);
    model.piece_of_logits(first, count);
    const std::vector<double> piece = downloaded<double>(model.device, model.logits, count * stride);
    for (int64_t r = 0; r < count; r++)
      all.insert(all.end(), piece.begin() + r * stride, piece.begin() + r * stride + V);
  }
  return all;
}

// ---- the run ------------------------------------------------------------------------------------------------------
inline constexpr AdamW oracle_step{
    .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1.0};

template <class Device>
bool Verifier::run(Device& device) {
  DRT<Device> model(device, config_);
  allocate(model);
  load_parameters(model);
  const double scale = upload_rows(model);
  read_noise();
  const int64_t noise_bytes = static_cast<int64_t>(noise_.size() * sizeof(float));
  const auto release = [&](float* memory) { device.release(memory); };
  const std::unique_ptr<float, decltype(release)> noise(static_cast<float*>(device.allocate(noise_bytes)), release);
  if (noise_bytes) device.upload(noise.get(), noise_.data(), noise_bytes);

  typename DRT<Device>::Input in{B_, T_, {}};
  model.forward(in);
  if (file_.find("eval.logits")) compare("eval.logits", all_logits(model, R_));

  in.selection.noise = true;
  in.selection.given_noise = noise.get();
  if (options_.use_picks) give_picks(model, in);
  model.begin_step();
  model.forward(in);
  compare_picks(model, in);
  compare_stages(model);
  model.head(scale, true);
  model.backward();
  std::vector<double> losses{model.step_state().loss};
  compare("loss", losses);
  compare_gradients(model);
  model.update(oracle_step);
  compare("train.grad_norm_first", {model.step_state().grad_norm});

  const bool held = G_ && in.selection.picking == Picking::given;
  if (!held) train_on(model, in, scale, losses);
  compare_losses(losses);
  return verdict(held);
}

// Before anything of those sizes is allocated: they are the file's tensors', whatever its metadata say.
template <class Device>
void Verifier::allocate(DRT<Device>& model) {
  check_shapes(model.table);
  model.plan(B_, T_);
  check_room(model.model_memory().total_bytes() + model.activation_memory().total_bytes(), model.device.free_bytes());
  model.allocate();
  model.commit_activations();
}

template <class Device>
void Verifier::load_parameters(DRT<Device>& model) {
  std::vector<typename DRT<Device>::master> values;
  for (const Tensor& t : model.table.tensors) {
    values.resize(t.size());
    file_.read("param." + t.name, shape_of(t), values.data());
    model.device.upload(model.masters + t.offset, values.data(), t.size() * static_cast<int64_t>(sizeof(values[0])));
  }
  model.weights_changed();
}

template <class Device>
double Verifier::upload_rows(DRT<Device>& model) {
  std::vector<int32_t> tokens, targets;
  const int64_t N = read_rows(tokens, targets);
  model.upload(tokens.data(), targets.data(), nullptr, R_);
  return 1.0 / static_cast<double>(N);
}

template <class Device>
void Verifier::give_picks(DRT<Device>& model, typename DRT<Device>::Input& in) {
  for (int64_t g = 0; g < G_; g++) {
    const std::vector<int32_t> picks = given_picks(g);
    model.device.upload(model.groups[g].pick, picks.data(), static_cast<int64_t>(picks.size() * sizeof(picks[0])));
  }
  in.selection.picking = Picking::given;
}

template <class Device>
void Verifier::compare_picks(DRT<Device>& model, typename DRT<Device>::Input& in) {
  const int64_t D = config_.width;
  for (int64_t g = 0; g < G_; g++)
    check_picks(g, downloaded<int32_t>(model.device, model.groups[g].pick, table().size(B_)),
                downloaded<double>(model.device, model.groups[g].r, B_ * C_ * D),
                downloaded<double>(model.device, model.enc_out, R_ * D));
  if (take_files_picks()) {
    give_picks(model, in);
    model.forward(in);
  }
  for (int64_t g = 0; g < G_; g++)
    compare_weights(g, downloaded<double>(model.device, model.groups[g].w, table().size(B_)));
}

template <class Device>
void Verifier::compare_stages(DRT<Device>& model) {
  const auto stage = [&](const std::string& name, const auto* found) {  // found (R,D)
    if (file_.find(name)) compare(name, downloaded<double>(model.device, found, R_ * config_.width));
  };
  stage("stage.lower_out", model.lower.empty() ? model.embedded : model.lower.back().out);
  if (G_) stage("stage.encoder_out", model.enc_out);
  for (int64_t g = 0; g < G_; g++) stage(str("stage.group", g, "_out"), model.groups[g].layers.back().out);
  compare("logits", all_logits(model, R_));
}

template <class Device>
void Verifier::compare_gradients(DRT<Device>& model) {
  for (const Tensor& t : model.table.tensors)
    compare("grad." + t.name, downloaded<double>(model.device, model.gradient + t.offset, t.size()));
}

// The nine steps after the first: their losses.
template <class Device>
void Verifier::train_on(DRT<Device>& model, const typename DRT<Device>::Input& in, double scale,
                        std::vector<double>& losses) {
  for (int step = 1; step < 10; step++) {
    model.begin_step();
    model.forward(in);
    model.head(scale, true);
    model.backward();
    losses.push_back(model.step_state().loss);
    model.update(oracle_step);
  }
}

// Compiled once, in verify.cpp.
extern template bool Verifier::run(Cpu<double>&);
extern template bool Verifier::run(Cpu<float>&);
extern template bool Verifier::run(Cpu<float, true>&);

}  // namespace gca
