// The command explain: one small row through a real forward and backward, every array printed, each gradient beside
// the slope of the loss that a moved number shows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/text.h"
#include "commands/commands.h"
#include "commands/shared.h"
#include "dataloader.h"
#include "runtime/models.h"

namespace gca {
namespace {

// ---- the backend: the CPU in double, watched --------------------------------------------------------------------
// Its ops are the CPU's. After the op that makes an array, one number of it may be moved; and what backward leaves for
// a moment only is kept.
class Watched : public Cpu<double> {
 public:
  using Cpu<double>::Cpu;

  struct Move {
    const double* array = nullptr;  // null: nothing is moved
    int64_t index = 0;
    double by = 0;
    bool product = false;  // array holds weights of picks: not the weight is moved, but the r_c.L_m that it comes from
  } move;
  std::vector<double> dn, dx, dgain;            // (T,D), (T,D), (D) of the last norm, the first that backward comes to
  std::vector<double> dO, dq, dw, dr, dL, dkv;  // (T,D), (T,D), (C+1,K), (C,D), (C,D), (C,S,2D), of one row

  void rmsnorm_forward(double* out, double* rstd, const double* x, const double* gain, int64_t rows, int64_t D,
                       int64_t stride, double eps) {
    std::vector<double> moved(gain, gain + D);
    if (gain == move.array) moved[move.index] += move.by;
    Cpu<double>::rmsnorm_forward(out, rstd, x, moved.data(), rows, D, stride, eps);
    move_in(out);
  }
  void rmsnorm_backward(const RmsnormBackward<double, double, double, double>& a, int64_t rows, int64_t D,
                        int64_t stride) {
    const bool last = dn.empty();
    if (last) dn.assign(a.dn, a.dn + rows * D);  // before: dx may be dn
    Cpu<double>::rmsnorm_backward(a, rows, D, stride);
    if (!last) return;
    dx.assign(a.dx, a.dx + rows * D);
    dgain.assign(a.dgain, a.dgain + D);
  }
  void matmul_forward(double* y, const double* x, const double* W, const double* residual, int64_t rows, int64_t in,
                      int64_t out) {
    Cpu<double>::matmul_forward(y, x, W, residual, rows, in, out);
    move_in(y);
  }
  void gca_forward(double* out, double* lse, const double* q, const double* kv, const int32_t* pick, const double* w,
                   const GcaShape& s) {
    Cpu<double>::gca_forward(out, lse, q, kv, pick, w, s);
    move_in(out);
  }
  void chunk_retrieval_forward(int32_t* pick, double* w, const double* r, const double* landmark,
                               const RetrievalShape& s, const Selection& selection) {
    Cpu<double>::chunk_retrieval_forward(pick, w, r, landmark, s, selection);
    if (!move.product) return move_in(w);
    if (w != move.array) return;
    // A score that is larger by x has e^x times its part of the softmax.
    w[move.index] *= std::exp(move.by / std::sqrt(static_cast<double>(s.D)));
    double *row = w + move.index / s.K * s.K, sum = 0;
    for (int k = 0; k < s.K; k++) sum += row[k];
    for (int k = 0; k < s.K && sum > 0; k++) row[k] /= sum;
  }
  void gca_backward_query(const GcaBackward<double, double>& a, const GcaShape& s) {
    Cpu<double>::gca_backward_query(a, s);
    dO.assign(a.dout, a.dout + s.T * s.H * s.d);
    dq.assign(a.dq, a.dq + s.T * s.H * s.d);
  }
  void chunk_retrieval_backward(const RetrievalBackward<double, double>& a, const RetrievalShape& s) {
    dw.assign(a.dw, a.dw + s.table().size(1));
    Cpu<double>::chunk_retrieval_backward(a, s);
    dr.assign(a.dr, a.dr + s.C * s.D);
    dL.resize(dr.size());
    copy_rows(dL.data(), s.D, a.dlandmark, s.stride, s.C, s.D);
  }
  void gca_backward_memory(double* dkv_, const FetchingLayer<double, double>* layers, int n_layers, const double* kv,
                           const GcaShape& s) {
    Cpu<double>::gca_backward_memory(dkv_, layers, n_layers, kv, s);
    dkv.assign(dkv_, dkv_ + s.M * s.S * 2 * s.H * s.d);
  }

 private:
  void move_in(double* array) const {
    if (array == move.array) array[move.index] += move.by;
  }
};

// ---- words and numbers ------------------------------------------------------------------------------------------
constexpr char names[] =
    "all|token|target|sees|L|r|score|pick|w|CK|CV|q|P|o|gate|up|h|x|rstd|n|loss|"
    "dn|dgain|dx|dO|dq|delta|dw|dscore|dr|dL|dCK|dCV";
constexpr double none = std::numeric_limits<double>::quiet_NaN();  // where an array has no number

std::string number(double x) {
  if (x != x) return right(".", 9);
  return right(std::fabs(x) < 0.000005 ? "0" : fixed(x, 5), 9);  // what rounds to nothing has no sign
}

struct Example {
  int64_t chunks = 4, seed = 45;
  std::string text = "she sells sea", only = "all";
  Config config{.width = 4,
                .heads = 2,
                .ffn = 8,
                .lower = 1,
                .groups = {1},
                .encoder = 1,
                .chunk = 4,
                .reach = {.topk = 2, .window = 4}};
};

// ---- one row ------------------------------------------------------------------------------------------------------
class OneRow {
 public:
  explicit OneRow(const Example& example);
  void print_forward();
  // Whether each gradient is the slope that moving its number shows.
  bool print_backward();

 private:
  bool begins(const std::string& name, const std::string& shape, const std::string& says) const;
  void print_text() const;
  void print_sees() const;
  void print_retrieval();
  void print_fetched() const;
  void print_softmax() const;
  void print_small_ops() const;
  void print_delta() const;
  double loss_with(const Watched::Move& move);
  double slope(Watched::Move move);
  // label(row): what stands before it; value(row, column), place(row, column): the gradient's number, and where in
  // `array` lies what it is the gradient of (-1: a constant).
  template <class Label, class Value>
  void print_rows(int64_t rows, int64_t columns, Label label, Value value) const;
  template <class Label, class Value, class Place>
  void print_gradient(int64_t rows, int64_t columns, Label label, Value value, const double* array, Place place,
                      bool product = false);

  GcaShape gca_shape() const {
    const int H = static_cast<int>(model_.config.heads);
    return {.B = 1,
            .T = T_,
            .H = H,
            .d = static_cast<int>(D_) / H,
            .S = static_cast<int>(S_),
            .K = static_cast<int>(K_),
            .M = C_,
            .null_slot = model_.config.null_slot};
  }
  const DRT<Watched>::Group& group() const { return model_.groups[0]; }
  const DRT<Watched>::Layer& layer() const { return group().layers[0]; }
  std::string slot_label(int64_t t) const { return str("  slot ", right(t, 2), "  ", left(letters_[token_[t]], 5)); }
  static std::string chunk_label(int64_t c) { return str("  chunk ", left(c, 8)); }
  std::string pick_label(int64_t row) const {
    const std::string from = row ? str("  of chunk ", row - 1) : "  no pick",
                      to = row < C_ ? str(", for chunk ", row) : ", for nobody";
    return left(from + to, 26);
  }

  const std::string only_;
  const int64_t C_, S_, T_, D_, K_;
  Watched device_;
  DRT<Watched> model_;
  std::vector<std::string> letters_;     // (V) each id as it is shown, the landmark last
  std::vector<int32_t> token_, target_;  // (T)
  double per_target_ = 0;                // 1/N
  bool right_ = true;
};

// The ids: each byte that the text has, in the bytes' order, then the landmark.
std::string alphabet(std::string text) {
  std::sort(text.begin(), text.end());
  text.erase(std::unique(text.begin(), text.end()), text.end());
  return text;
}
Config with_vocabulary(Config config, const std::string& text) {
  config.vocab = std::ssize(alphabet(text)) + 1;
  return config;
}

OneRow::OneRow(const Example& example)
    : only_(example.only),
      C_(example.chunks),
      S_(example.config.chunk),
      T_(C_ * S_),
      D_(example.config.width),
      K_(example.config.reach.topk),
      device_(1),
      model_(device_, with_vocabulary(example.config, example.text)),
      token_(T_ + 1),
      target_(T_) {
  const std::string letters = alphabet(example.text);
  const int64_t real = C_ * (S_ - 1) + 1;
  for (const char letter : letters) letters_.push_back(letter == ' ' ? "_" : printable(std::string(1, letter)));
  letters_.push_back("|");
  for (int64_t n = 0; n < real; n++)
    token_[n] = static_cast<int32_t>(letters.find(example.text[n % example.text.size()]));
  spread_chunks(token_.data(), target_.data(), real, C_, S_, static_cast<int32_t>(std::ssize(letters)));
  per_target_ =
      1.0 / static_cast<double>(std::count_if(target_.begin(), target_.end(), [](int32_t t) { return t >= 0; }));

  model_.plan(1, T_);
  model_.allocate();
  model_.commit_activations();
  model_.initialise(static_cast<uint64_t>(example.seed), device_.pool());
  for (const Tensor& t : model_.table.tensors)
    for (int64_t i = 0; t.columns && i < t.size(); i++) model_.masters[t.offset + i] *= 25;  // normal(0, 0.5)
  model_.upload(token_.data(), target_.data(), nullptr, T_);
  model_.begin_step();
  model_.forward({1, T_, {}});
  model_.head(per_target_, true);
  model_.backward();
  loss_with({});  // forward's numbers once more: backward has written over some
}

// The loss once that number is another one, the picks as they were.
double OneRow::loss_with(const Watched::Move& move) {
  DRT<Watched>::Input in{1, T_, {}};
  in.selection.picking = Picking::given;
  device_.move = move;
  model_.begin_step();
  model_.forward(in);
  model_.head(per_target_, false);
  device_.move = {};
  return model_.step_state().loss;
}
// By a central difference of fourth order.
double OneRow::slope(Watched::Move move) {
  constexpr double step = 2e-4;
  double sum = 0;
  for (const auto& [steps, factor] : {std::pair{1, 8.0}, {-1, -8.0}, {2, -1.0}, {-2, 1.0}}) {
    move.by = steps * step;
    sum += factor * loss_with(move);
  }
  return sum / (12 * step);
}

// ---- printing -----------------------------------------------------------------------------------------------------
// The heading of an array that is wanted.
bool OneRow::begins(const std::string& name, const std::string& shape, const std::string& says) const {
  if (only_ != "all" && only_ != name) return false;
  print(only_ == "all" ? "\n" : "", left(name + " " + shape, 15), says, "\n");
  return true;
}
template <class Label, class Value>
void OneRow::print_rows(int64_t rows, int64_t columns, Label label, Value value) const {
  for (int64_t i = 0; i < rows; i++) {
    std::string line = label(i);
    for (int64_t j = 0; j < columns; j++) line += number(value(i, j));
    print(line, "\n");
  }
}
template <class Label, class Value, class Place>
void OneRow::print_gradient(int64_t rows, int64_t columns, Label label, Value value, const double* array, Place place,
                            bool product) {
  double largest = 0, difference = 0;
  const int64_t width = 9 * columns;
  print(left("", label(0).size()), right("backward", width), "  |", right("finite difference", width), "\n");
  for (int64_t i = 0; i < rows; i++) {
    std::string line = label(i), slopes;
    for (int64_t j = 0; j < columns; j++) {
      const int64_t at = place(i, j);
      const double claimed = value(i, j), found = at < 0 ? none : slope({array, at, 0, product});
      line += number(claimed);
      slopes += number(found);
      if (at < 0) continue;
      largest = std::max(largest, std::fabs(claimed));
      if (!(std::fabs(claimed - found) <= difference)) difference = std::fabs(claimed - found);
    }
    print(line, "  |", slopes, "\n");
  }
  const bool agrees = difference <= 1e-7 * largest + 1e-10;
  if (agrees) print("  they differ by less than 1e-7 of the largest\n");
  else
    print("  they differ by ", significant(difference, 2), ", the largest is ", significant(largest, 2), ": WRONG\n");
  right_ = right_ && agrees;
}

void OneRow::print_text() const {
  const auto print_ids = [&](const std::vector<int32_t>& ids) {
    for (int64_t c = 0; c < C_; c++) {
      std::string shown = chunk_label(c), line;
      for (int64_t t = c * S_; t < (c + 1) * S_; t++) {
        shown += left(ids[t] < 0 ? "." : letters_[ids[t]], 5);
        line += right(ids[t] < 0 ? "." : str(ids[t]), 5);
      }
      print(shown, line, "\n");
    }
  };
  if (begins("token", "(C,S)", "the text, a landmark | at each chunk's end; _ is a space; beside it the ids"))
    print_ids(token_);
  if (begins("target", "(C,S)", "what the slot is to predict: the next real token, across the landmark; . nothing"))
    print_ids(target_);
}

void OneRow::print_sees() const {
  if (!begins("sees", "(T,T)", "what slot i sees: # through the window, + in a fetched chunk, 0 its null slot")) return;
  std::string top;
  for (int64_t t = 0; t < T_; t++) top += letters_[token_[t]].substr(0, 1);
  print(left("", 16), top, "\n");
  const PickTable picks{C_, K_};
  for (int64_t i = 0; i < T_; i++) {
    std::string line(T_, '.');
    for (int64_t k = 0; k < K_; k++)
      if (const int32_t m = group().pick[picks.serving(0, i / S_, k)]; m >= 0) {
        std::fill_n(line.begin() + m * S_, S_ - 1, '+');
        if (model_.config.null_slot) line[(m + 1) * S_ - 1] = '0';
      }
    for (int64_t j = std::max<int64_t>(0, i - model_.reach.window); j <= i; j++) line[j] = '#';
    print(slot_label(i), line, "\n");
  }
}

void OneRow::print_retrieval() {
  const double* landmarks = model_.enc_out + (S_ - 1) * D_;  // of chunk m at m*S*D
  if (begins("L", "(C,D)", "the landmark's row of the encoder's output: what chunk m is found by"))
    print_rows(C_, D_, chunk_label, [&](int64_t m, int64_t j) { return landmarks[m * S_ * D_ + j]; });
  if (begins("r", "(C,D)", "Norm(x at the landmark of chunk c): what it asks for, now that it has been read"))
    print_rows(C_, D_, chunk_label, [&](int64_t c, int64_t j) { return group().r[c * D_ + j]; });
  if (begins("score", "(C,C)", "r_c.L_m / sqrt(D), chunk c down, chunk m across; only the past may be fetched")) {
    const RetrievalShape shape{1, C_, static_cast<int>(D_), static_cast<int>(K_), 0, S_ * D_, T_ * D_};
    std::vector<double> score(C_ * C_, none);
    for (int64_t c = 0; c < C_; c++)
      Watched::score_row(&score[c * C_], group().r + c * D_, landmarks, candidates(c), shape);
    print_rows(C_, C_, chunk_label, [&](int64_t c, int64_t m) { return score[c * C_ + m]; });
  }
  const auto label = [&](int64_t row) { return pick_label(row); };
  if (begins("pick", "(C+1,K)", "the K best of the past, the best first; what chunk c picked serves chunk c+1"))
    for (int64_t row = 0; row <= C_; row++) {
      std::string line = label(row);
      for (int64_t k = 0; k < K_; k++) {
        const int32_t m = group().pick[row * K_ + k];
        line += right(m < 0 ? "." : str("chunk ", m), 9);
      }
      print(line, "\n");
    }
  if (begins("w", "(C+1,K)", "softmax over the scores of the picks"))
    print_rows(C_ + 1, K_, label, [&](int64_t row, int64_t k) { return group().w[row * K_ + k]; });
}

void OneRow::print_fetched() const {
  const auto label = [&](int64_t t) { return slot_label(t); };
  if (begins("CK", "(C,S,D)", "the keys of each chunk; the landmark's is zero: the null slot"))
    print_rows(T_, D_, label, [&](int64_t t, int64_t j) { return model_.kv[t * 2 * D_ + j]; });
  if (begins("CV", "(C,S,D)", "its values, likewise"))
    print_rows(T_, D_, label, [&](int64_t t, int64_t j) { return model_.kv[t * 2 * D_ + D_ + j]; });
  if (begins("q", "(T,D)",
             str("what each slot asks the fetched chunks; head h has columns ", D_ / model_.config.heads, "h and on")))
    print_rows(T_, D_, label, [&](int64_t t, int64_t j) { return layer().q[t * D_ + j]; });
  print_softmax();
  if (begins("o", "(T,D)", "what each slot gets: sum_k w[k] sum_j P[k,j] CV[pick[k],j]"))
    print_rows(T_, D_, label, [&](int64_t t, int64_t j) { return layer().fetched[t * D_ + j]; });
}

// SwiGLU's of the last layer, and those of the norm after it.
void OneRow::print_small_ops() const {
  const auto label = [&](int64_t t) { return slot_label(t); };
  const int64_t F = model_.config.ffn;
  if (begins("gate", "(T,F)", "Wgate Norm(mlp_in), of the upper layer"))
    print_rows(T_, F, label, [&](int64_t t, int64_t j) { return layer().gate_up[t * 2 * F + j]; });
  if (begins("up", "(T,F)", "Wup Norm(mlp_in)"))
    print_rows(T_, F, label, [&](int64_t t, int64_t j) { return layer().gate_up[t * 2 * F + F + j]; });
  if (begins("h", "(T,F)", "silu(gate) * up, silu(z) = z / (1 + e^-z)"))
    print_rows(T_, F, label, [&](int64_t t, int64_t j) { return layer().h[t * F + j]; });
  if (begins("x", "(T,D)", "what leaves the last layer: a + Wdown h"))
    print_rows(T_, D_, label, [&](int64_t t, int64_t j) { return layer().out[t * D_ + j]; });
  if (begins("rstd", "(T)", "1 / sqrt(mean(x^2) + eps), over the slot's columns"))
    print_rows(T_, 1, label, [&](int64_t t, int64_t) { return model_.final_rstd[t]; });
  if (begins("n", "(T,D)", "gain * x * rstd, the last norm, of which the logits are made; gains begin at 1"))
    print_rows(T_, D_, label, [&](int64_t t, int64_t j) { return model_.final_n[t * D_ + j]; });
}

// Not kept by forward: made anew from the log-sum-exp that is, as backward does it.
void OneRow::print_softmax() const {
  const GcaShape shape = gca_shape();
  const int64_t c = C_ - 1;
  if (!begins("P", str("(S,H,K,", shape.null_slot ? "S)" : "S-1)"),
              str("softmax_j( q_i.CK[pick[k],j] / sqrt(d) ) of the slots of chunk ", c, "; w weighs the pick")))
    return;
  for (int64_t t = c * S_; t < T_; t++)
    for (int h = 0; h < shape.H; h++)
      for (int k = 0; k < K_; k++) {
        const int64_t at = shape.table().serving(0, c, k), m = group().pick[at];
        if (m < 0) continue;
        std::string line = str(slot_label(t), " head ", h, "  chunk ", m, "  w", number(group().w[at]), "  P");
        for (int64_t j = 0; j < shape.keys(); j++) {
          double product = 0;
          for (int64_t e = h * shape.d; e < (h + 1) * shape.d; e++)
            product += layer().q[t * D_ + e] * model_.kv[(m * S_ + j) * 2 * D_ + e];
          const double lse = layer().gca_lse[gca_stat(shape, 0, c, k, h) + t % S_];
          line += number(std::exp(product / std::sqrt(static_cast<double>(shape.d)) - lse));
        }
        print(line, "\n");
      }
}

// Kept by backward: of the softmaxes of P.
void OneRow::print_delta() const {
  const GcaShape shape = gca_shape();
  if (!begins("delta", "(K,H,S)",
              str("sum_j P[j] (dO_i.CV[pick[k],j]) of the slots of chunk ", C_ - 1, "; all of a chunk's make its dw")))
    return;
  for (int k = 0; k < K_; k++)
    for (int h = 0; h < shape.H; h++)
      if (const int32_t m = group().pick[shape.table().serving(0, C_ - 1, k)]; m >= 0) {
        std::string line = str("  head ", h, "  chunk ", m);
        for (int64_t i = 0; i < S_; i++) line += number(layer().delta[gca_stat(shape, 0, C_ - 1, k, h) + i]);
        print(line, "\n");
      }
}

void OneRow::print_forward() {
  if (only_ == "all")
    print("One row of C=", C_, " chunks of S=", S_, " slots: T=", T_, ", D=", D_, ", H=", model_.config.heads,
          ", K=", K_, ", W=", model_.reach.window, ", V=", model_.config.vocab, "; in double, on the CPU\n");
  print_text();
  print_sees();
  print_retrieval();
  print_fetched();
  print_small_ops();
  if (begins("loss", "(C,S)",
             str("cross entropy of each slot; their mean, the loss, is ", fixed(model_.step_state().loss, 5))))
    print_rows(C_, S_, chunk_label,
               [&](int64_t c, int64_t i) { return target_[c * S_ + i] < 0 ? none : model_.loss[c * S_ + i]; });
}

bool OneRow::print_backward() {
  const auto slot = [&](int64_t t) { return slot_label(t); };
  const auto row_label = [&](int64_t row) { return pick_label(row); };
  const auto plain = [&](int64_t i, int64_t j) { return i * D_ + j; };
  const auto in_table = [&](int64_t row, int64_t k) { return group().pick[row * K_ + k] < 0 ? -1 : row * K_ + k; };
  if (begins("dn", "(T,D)", "the loss by n"))
    print_gradient(
        T_, D_, slot, [&](int64_t t, int64_t j) { return device_.dn[t * D_ + j]; }, model_.final_n, plain);
  if (begins("dgain", "(D)", "the loss by the last norm's gain: sum over slots of dn * x * rstd"))
    print_gradient(
        1, D_, [](int64_t) { return left("  all slots", 16); }, [&](int64_t, int64_t j) { return device_.dgain[j]; },
        model_.weights + model_.table.norm, plain);
  if (begins("dx", "(T,D)", "the loss by x, through the last norm, which alone reads it"))
    print_gradient(
        T_, D_, slot, [&](int64_t t, int64_t j) { return device_.dx[t * D_ + j]; }, layer().out, plain);
  if (begins("dO", "(T,D)", "the loss by o"))
    print_gradient(
        T_, D_, slot, [&](int64_t t, int64_t j) { return device_.dO[t * D_ + j]; }, layer().fetched, plain);
  if (begins("dq", "(T,D)", "the loss by q, over all chunks that the slot got"))
    print_gradient(
        T_, D_, slot, [&](int64_t t, int64_t j) { return device_.dq[t * D_ + j]; }, layer().q, plain);
  print_delta();
  if (begins("dw", "(C+1,K)", "the loss by w: as far as it helped to fetch that chunk, summed over slots and heads"))
    print_gradient(
        C_ + 1, K_, row_label, [&](int64_t row, int64_t k) { return device_.dw[row * K_ + k]; }, group().w, in_table);
  if (begins("dscore", "(C+1,K)", "the loss by r_c.L_m, through the softmax; each row's sum is 0"))
    print_gradient(
        C_ + 1, K_, row_label, [&](int64_t row, int64_t k) { return group().dw[row * K_ + k]; }, group().w, in_table,
        true);
  if (begins("dr", "(C,D)", "the loss by r: sum_k dscore[c,k] L_pick[c,k]"))
    print_gradient(
        C_, D_, chunk_label, [&](int64_t c, int64_t j) { return device_.dr[c * D_ + j]; }, group().r, plain);
  if (begins("dL", "(C,D)", "the loss by L: sum of dscore[c,k] r_c over all (c,k) that picked chunk m"))
    print_gradient(
        C_, D_, chunk_label, [&](int64_t m, int64_t j) { return device_.dL[m * D_ + j]; }, model_.enc_out,
        [&](int64_t m, int64_t j) { return (m * S_ + S_ - 1) * D_ + j; });
  for (const int64_t part : {int64_t{0}, D_}) {
    if (!begins(part ? "dCV" : "dCK", "(C,S,D)",
                str("the loss by ", part ? "CV" : "CK",
                    ", over all slots that fetched it; the landmark's zero is a constant")))
      continue;
    print_gradient(
        T_, D_, slot, [&](int64_t t, int64_t j) { return device_.dkv[t * 2 * D_ + part + j]; }, model_.kv,
        [&](int64_t t, int64_t j) { return t % S_ == S_ - 1 ? -1 : t * 2 * D_ + part + j; });
  }
  return right_;
}

}  // namespace

int explain_command(const std::vector<std::string>& arguments) {
  Example example;
  Config& config = example.config;
  Flags flags("explain",
              "One small row through a real forward and backward in double: every array with its name, shape and "
              "values, each gradient beside the slope that the loss shows when the number is moved, picks held. The "
              "matrices are normal(0, 0.5), so that there is something to see. Letters are those of doc/drt.md.");
  flags.add_choice("only", example.only, names, "the array to print");
  flags.add("text", example.text, "TEXT", "the row's tokens are its bytes; it is repeated until the row is full");
  flags.add("seed", example.seed, 0, INT64_MAX, "of the weights; 45 is one whose scores lie well apart");
  flags.add("chunks", example.chunks, 1, 8, "C, chunks of the row");
  flags.add("chunk", config.chunk, 2, 8, "S, slots of a chunk, its landmark among them");
  flags.add("topk", config.reach.topk, 1, 8, "K, chunks fetched");
  flags.add("window", config.reach.window, 0, 64, "W, slots looked back");
  flags.add("width", config.width, 2, 8, "D; beyond 4 lines are longer than 100 columns");
  flags.add("heads", config.heads, 1, 8, "H");
  flags.add_on_off("null-slot", config.null_slot, "a query may take nothing from a fetched chunk");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  if (example.text.empty()) throw UsageError("--text: expected one byte at least, found none");
  OneRow row(example);
  row.print_forward();
  if (!row.print_backward()) throw Error("a gradient is not the slope of the loss: see the lines with WRONG");
  return 0;
}

}  // namespace gca
