// The pages of doc/ about kernels and ranks: what they print is what the program computes, and the kernels that they
// name are there. A page that says something else fails here, with the lines that it should have.
#include <filesystem>
#include <map>
#include <regex>

#include "base/files.h"
#include "base/text.h"
#include "config.h"
#include "dev/test/cpu_ops.h"
#include "dev/test/workshop.h"
#include "ranks/shards.h"

using namespace gca;
using namespace gca::test;

namespace {

std::string page(const std::string& name) { return read_file("doc/" + name, 1 << 20); }

// "    NAME   1.0000 ..", as pages print arrays.
template <class Numbers>
std::string row_of(const std::string& name, const Numbers& numbers, int digits = 4, int width = 9) {
  std::string line = "    " + left(name, 9);
  for (const auto x : numbers) line += right(fixed(x, digits), width);
  return line + "\n";
}
// Code without its spaces and comments.
std::string squeezed(const std::string& code) { return std::regex_replace(code, std::regex("//[^\n]*|\\s+"), ""); }
// Whether the page has these lines, all of them together.
void expect(const std::string& name, const std::string& lines) {
  INFO("doc/", name, " should have these lines:\n", lines);
  CHECK(has(page(name), lines));
}

}  // namespace

TEST_CASE("pages: every kernel that a page names is there") {
  std::string sources;
  for (const auto& entry : std::filesystem::recursive_directory_iterator("kernels"))
    if (entry.is_regular_file()) sources += read_file(entry.path().string(), 1 << 20);
  const std::regex kernel("[a-z0-9_]+_kernel\\b");
  for (const auto& entry : std::filesystem::directory_iterator("doc")) {
    const std::string text = read_file(entry.path().string(), 1 << 20);
    for (std::sregex_iterator at(text.begin(), text.end(), kernel), end; at != end; ++at) {
      CAPTURE(entry.path().string());
      CAPTURE(at->str());
      CHECK(std::regex_search(sources, std::regex("\\b" + at->str() + "\\(")));
    }
  }
}

TEST_CASE("pages: the numbers of first-kernel.md are the ops', its loops the op") {
  const Workshop shop;
  // An array's rows as explain prints them, of a gradient what stands before the bar.
  const auto array = [&](const std::string& name, size_t columns) {
    Vec numbers;
    for (const std::string& line : lines_of(shop.run("explain --only " + name).out))
      for (size_t j = 0; line.starts_with("  slot") && j < columns; j++)
        numbers.push_back(std::stod(line.substr(16 + 9 * j, 9)));
    REQUIRE(numbers.size() == 16 * columns);
    return numbers;
  };
  constexpr int R = 16, D = 4;
  Vec x = array("x", D), gain(D, 1.0);
  const Vec dn = array("dn", D);
  Vec rstd(R), n(R * D), dx(R * D), dgain(D, 0.0);
  for (int r = 0; r < R; r++) {
    double squares = 0, mean = 0;
    for (int j = 0; j < D; j++) squares += x[r * D + j] * x[r * D + j];
    rstd[r] = 1 / std::sqrt(squares / D + 1e-5);
    for (int j = 0; j < D; j++) n[r * D + j] = gain[j] * x[r * D + j] * rstd[r];
    for (int j = 0; j < D; j++) mean += gain[j] * dn[r * D + j] * x[r * D + j] * rstd[r] / D;
    for (int j = 0; j < D; j++) dx[r * D + j] = rstd[r] * (gain[j] * dn[r * D + j] - x[r * D + j] * rstd[r] * mean);
    for (int j = 0; j < D; j++) dgain[j] += dn[r * D + j] * x[r * D + j] * rstd[r];
  }
  const std::string text = page("first-kernel.md");
  const size_t loop = text.find("    for (int r = 0; r < R; r++) {"), end = text.find("\n    }\n", loop);
  REQUIRE(end != text.npos);
  CHECK(
      has(squeezed(read_file("dev/test/test_kernel_pages.cpp", 1 << 20)), squeezed(text.substr(loop, end + 6 - loop))));

  Double cpu(1);
  Vec op_rstd(R), op_n(R * D), op_dx(R * D), op_dgain(D, 0.0);
  const auto forward = [&] { cpu.rmsnorm_forward(op_n.data(), op_rstd.data(), x.data(), gain.data(), R, D, D, 1e-5); };
  const auto loss = [&] {
    forward();
    return inner(dn, op_n);
  };
  forward();
  cpu.rmsnorm_backward({op_dx.data(), op_dgain.data(), dn.data(), x.data(), op_rstd.data(), gain.data()}, R, D, D);
  const double of_n = relative_error(n, op_n), of_dx = relative_error(dx, op_dx),
               of_dgain = relative_error(dgain, op_dgain), slope_x = slope_error(x, op_dx, loss),
               slope_gain = slope_error(gain, op_dgain, loss);
  print("first-kernel.md: the loop from the op: n ", significant(of_n, 2), ", dx ", significant(of_dx, 2), ", dgain ",
        significant(of_dgain, 2), "; the op from finite differences: dx ", significant(slope_x, 2), ", dgain ",
        significant(slope_gain, 2), "\n");
  for (const double error : {of_n, of_dx, of_dgain}) CHECK(error < 1e-14);
  for (const double error : {slope_x, slope_gain}) CHECK(error < slope_tolerance);
  // explain's own, of the numbers that it rounds to five digits
  CHECK(relative_error(n, array("n", D)) < 1e-4);
  CHECK(relative_error(dx, array("dx", D)) < 1e-4);

  const Vec gate = array("gate", 8), up = array("up", 8);
  const Vec gate_up{gate[13 * 8], gate[13 * 8 + 1], up[13 * 8], up[13 * 8 + 1]}, dh{1, 1};
  Vec h(2), dgate_up(4);
  cpu.swiglu_forward(h.data(), gate_up.data(), 1, 2);
  cpu.swiglu_backward(dgate_up.data(), nullptr, dh.data(), gate_up.data(), 1, 2);
  const auto row = [](const char* name, double first, double second) { return row_of(name, Vec{first, second}, 5); };
  expect("first-kernel.md", row("gate", gate_up[0], gate_up[1]) + row("up", gate_up[2], gate_up[3]) +
                                row("h", h[0], h[1]) + row("dh", 1, 1) + row("dgate", dgate_up[0], dgate_up[1]) +
                                row("dup", dgate_up[2], dgate_up[3]));
}

TEST_CASE("pages: the inverted table of gca-kernels.md is what invert_picks makes of explain's picks") {
  const Workshop shop;
  const std::string shown = shop.run("explain --chunks 6 --only pick").out;
  constexpr int C = 6, K = 2;
  std::vector<int32_t> pick;  // (C+1,K)
  const std::regex line("for (chunk \\d|nobody) +(chunk (\\d)|\\.) +(chunk (\\d)|\\.)\n");
  for (std::sregex_iterator at(shown.begin(), shown.end(), line), end; at != end; ++at)
    for (const size_t k : {3, 5}) pick.push_back((*at)[k].matched ? std::stoi(at->str(k)) : -1);
  REQUIRE(pick.size() == (C + 1) * K);
  Double cpu(1);
  const Inverse inverse = inverted(cpu, pick, 1, C, K);
  const auto begin = inverse.fetches.begin();
  expect("gca-kernels.md", row_of("start", std::vector<double>(inverse.start.begin(), inverse.start.end()), 0, 4) +
                               row_of("fetches", std::vector<double>(begin, begin + inverse.start[C]), 0, 4));
}

// Of gca_forward at the shape of doc/measured.md, one H100; what is no count is as published, or of dev/LOG.md.
TEST_CASE("pages: the ladder of tensor-cores.md is arithmetic on the shape") {
  constexpr int64_t B = 4, C = 260, K = 8, H = 12, S = 64, d = 64;
  constexpr double clock = 1.755e9, processors = 132;
  int64_t picks = 0;  // that serve a chunk: what chunk c - 1 picked serves chunk c
  for (int64_t c = 1; c < C; c++) picks += std::min(K, candidates(c - 1));
  const double tiles = static_cast<double>(B * H * picks), work = tiles * 2 * 2 * S * S * d,
               kv_bytes = tiles * 2 * S * d * 2, slots = B * C * S,
               memory_bytes = slots * H * d * 2 * 4 + slots * K * H * 4, shared_rate = processors * 128 * clock,
               exps = tiles * S * S, exp_rate = processors * 16 * clock;
  const auto counted = [](const char* name, const std::string& amount) { return "    " + left(name, 26) + amount; };
  expect("gca-kernels.md", counted("(chunk, head, pick)", fixed(tiles, 0)));
  expect("gca-kernels.md", counted("L2 read, GB", fixed(kv_bytes * 1e-9, 3)));
  expect("gca-kernels.md", counted("work, GFLOP", fixed(work * 1e-9, 1)));

  const auto ms = [](double seconds) { return fixed(1e3 * seconds, 3); };
  const auto row = [](const std::string& what, const std::string& amount, const std::string& rate,
                      const std::string& bound) {
    return "    " + left(what, 30) + left(amount, 17) + left(rate, 25) + bound + "\n";
  };
  const auto giga = [](double x, int digits, const char* unit) { return fixed(x * 1e-9, digits) + unit; };
  const double float_bound = work / 67e12, cache_bound = kv_bytes / 8.4e12;
  expect("tensor-cores.md",
         row("what", "amount", "at most a second", "bound, ms") +
             row("products", giga(work, 1, " GFLOP"), "989 TFLOP, bf16", ms(work / 989e12)) +
             row("products, plain", giga(work, 1, " GFLOP"), "67 TFLOP, float", ms(float_bound)) +
             row("exponentials", giga(exps, 3, " G"), fixed(exp_rate * 1e-12, 2) + " T", ms(exps / exp_rate)) +
             row("CK and CV from L2", giga(kv_bytes, 3, " GB"), "8.4 to 10.9 TB",
                 ms(kv_bytes / 10.9e12) + " to " + ms(cache_bound)) +
             row("device memory", giga(memory_bytes, 3, " GB"), "2.97 TB", ms(memory_bytes / 2.97e12)) +
             row("shared memory, 2 warps", giga(3 * kv_bytes, 3, " GB"), fixed(shared_rate * 1e-12, 1) + " TB",
                 ms(3 * kv_bytes / shared_rate)) +
             row("shared memory, 4 warps", giga(5 * kv_bytes, 3, " GB"), fixed(shared_rate * 1e-12, 1) + " TB",
                 ms(5 * kv_bytes / shared_rate)));
  // The turns of adding.md: a warp's accesses, one a clock and multiprocessor, for half of the multiply-adds.
  const double turn = 1e3 * work / 2 / 2 / 32 / (processors * clock);
  CHECK(has(page("adding.md"), " = " + fixed(turn, 3) + " ms:"));
  for (const int turns : {32, 2, 36}) CHECK(has(page("adding.md"), " | " + fixed(turns * turn, 1) + " |\n"));
  // The rungs: how often K and V pass through shared memory, ncu's wavefronts of 128 bytes of the same, and times.
  const auto rung_row = [](const std::vector<std::string>& cells) {
    std::string line = "    " + left(cells[0], 22);
    const size_t widths[] = {0, 14, 10, 12, 14, 15, 0};
    for (size_t i = 1; i < cells.size(); i++) line += left(cells[i], widths[i]);
    return line + "\n";
  };
  const auto share = [](double bound, double took_ms) { return fixed(1e5 * bound / took_ms, 0) + "%"; };
  const auto rung = [&](const char* name, int passes, double wavefronts, double took_ms) {
    const double shared_bound = passes * kv_bytes / shared_rate, bound = std::max(cache_bound, shared_bound),
                 in_turn = work / 989e12 + exps / exp_rate + cache_bound + shared_bound;
    return rung_row({name, fixed(passes * kv_bytes * 1e-9, 3), fixed(wavefronts * 128e-9, 3), ms(bound), ms(in_turn),
                     fixed(took_ms, 3), share(bound, took_ms)});
  };
  expect("tensor-cores.md",
         rung_row({"rung", "counted, GB", "ncu, GB", "bound, ms", "in turn, ms", "measured, ms", "bound / measured"}) +
             rung_row({"1 plain", "", "", ms(float_bound), "", "4.750", share(float_bound, 4.75)}) +
             rung("2 mma.sync, bf16", 1 + 4 * 8 + 8, 520117209, 2.297) + rung("3 swizzle", 1 + 4 + 1, 71922883, 0.498) +
             rung("4 P in registers", 1 + 4, 58077274, 0.430) + rung("5 32 rows a warp", 1 + 2, 31960898, 0.441) +
             rung("6 the ring", 1 + 2, 31877584, 0.403));
  // The passes: products of S x S x d a pick, bytes of L2 a pick, layers.
  const auto pass = [&](const char* name, int products, double bytes, int layers, double took_ms) {
    const double all = layers * tiles, product_bound = all * products * 2 * S * S * d / 989e12,
                 exp_bound = layers * exps / exp_rate, l2_bound = all * bytes / 8.4e12;
    return "    " + left(name, 22) + left(ms(product_bound), 14) + left(ms(exp_bound), 18) + left(ms(l2_bound), 10) +
           left(fixed(took_ms, 3), 15) + share(std::max({product_bound, exp_bound, l2_bound}), took_ms) + "\n";
  };
  expect("tensor-cores.md", pass("forward", 2, 2 * S * d * 2, 1, 0.407) + pass("by query", 3, 2 * S * d * 2, 1, 0.544) +
                                pass("memory, six layers", 4, 2 * S * (d * 2 + 4), 6, 4.13));
}

TEST_CASE("pages: the slices of ranks.md are those of its command's model on two ranks") {
  const Config config{
      .vocab = 263, .width = 16, .heads = 2, .ffn = 24, .lower = 1, .groups = {1}, .encoder = 1, .chunk = 16};
  const TensorTable table(config, 1, 16);
  const Shards of_0(0, 2, table.size, table.padded_vocab * config.width, 16, 8 << 20), of_1 = of_0.of_rank(1);
  REQUIRE(of_0.buckets.size() == 2);
  const Shards::Bucket &rest = of_0.buckets[0], &embedding = of_0.buckets[1];
  expect("ranks.md", "    " + left(str("gradient (", table.size, ")"), 21) + left(str(embedding.flat), 13) +
                         left(str(of_1.buckets[1].flat), 15) + left(str(rest.flat), 20) +
                         left(str(of_1.buckets[0].flat), 15) + str(of_0.size) + "\n");
  CHECK(has(page("ranks.md"), "5,968 each"));
  const std::string text = page("ranks.md");
  const size_t loop = text.find("    for (; reduced_ < ");
  REQUIRE(loop != text.npos);
  CHECK(has(squeezed(read_file("model_backward.h", 1 << 20)),
            squeezed(text.substr(loop, text.find("\n    }\n", loop) + 6 - loop))));
  CHECK(of_0.share() == 5968);
}

TEST_CASE("pages: the four numbers of ranks.md, summed, clipped and updated by slices") {
  Double cpu(1);
  const Vec g0{1, 2, 3, 4}, g1{5, 6, 7, 8}, before{1, 1, 1, 1};
  Vec sum(4), clipped(4), after = before, m(4, 0.0), v(4, 0.0);
  for (int i = 0; i < 4; i++) sum[i] = g0[i] + g1[i];
  StepState state{};
  const Shards of_0(0, 2, 4, 0, 2, 0);
  const Segment all{0, of_0.share(), false};
  for (const Shards& shards : {of_0, of_0.of_rank(1)})
    cpu.add_squares(&state, &sum[shards.buckets[0].flat], shards.share());
  cpu.end_gradient(&state, 1);
  for (int i = 0; i < 4; i++) clipped[i] = sum[i] * state.grad_scale;
  for (const Shards& shards : {of_0, of_0.of_rank(1)}) {
    const int64_t at = shards.buckets[0].flat;
    cpu.adamw(&after[at], &after[at], &m[at], &v[at], &sum[at], &all, 1, &state, {.lr = 0.1});
  }
  expect("ranks.md", row_of("G rank 0", g0) + row_of("G rank 1", g1) + row_of("sum", sum) +
                         row_of("norm", Vec{state.grad_norm}) + row_of("clipped", clipped) + row_of("m1", m) +
                         row_of("m2", v) + row_of("weight", before) + row_of("updated", after));
}

// The words for weights are of one processor, and the last digits too.
TEST_CASE("pages: the losses of ranks.md are those of its command") {
  const Workshop shop;
  const std::string text = page("ranks.md"), program = std::filesystem::absolute(shop.program).string(),
                    in = "cd " + shop.path + " && ";
  for (const std::string& line : lines_of(text))
    if (line.starts_with("    seq ")) CHECK(system((in + line).c_str()) == 0);
    else if (line.starts_with("    train_gca tokenize "))
      CHECK(system((in + program + line.substr(13) + " > log").c_str()) == 0);
  const size_t begin = text.find("    train_gca train --data n_train"), end = text.find("--ranks", begin);
  REQUIRE(end != std::string::npos);
  const std::string train = in + program + text.substr(begin + 13, end - begin - 13);
  const std::regex row("\n\\| (\\d)[^|]* \\| [\\d, ]+ \\| ([\\d.]+) \\| ([\\d.]+) \\| ([\\d.]+) \\|"),
      value("\"(loss|grad_norm)\":([^,]+)");
  int rows = 0;
  for (std::sregex_iterator at(text.begin(), text.end(), row), none; at != none; ++at, rows++) {
    const std::string out = shop.path + "/run";
    std::filesystem::remove_all(out);
    REQUIRE(system((train + "--ranks " + at->str(1) + " > log").c_str()) == 0);
    const std::vector<std::string> log = lines_of(read_file(out + "/log.jsonl", 1 << 20));
    REQUIRE(log.size() == 20);
    const auto logged = [&](const std::string& line, const char* name) {
      for (std::sregex_iterator found(line.begin(), line.end(), value), last; found != last; ++found)
        if (found->str(1) == name) return std::stod(found->str(2));
      return double{NAN};
    };
    CAPTURE(at->str());
    CHECK(std::fabs(logged(log[0], "loss") - std::stod(at->str(2))) < 1e-7);
    CHECK(std::fabs(logged(log[0], "grad_norm") - std::stod(at->str(3))) < 1e-6);
    CHECK(std::fabs(logged(log[19], "loss") - std::stod(at->str(4))) < 1e-6);
  }
  CHECK(rows == 4);
}

TEST_CASE("pages: the op that adding.md tries, and the places of the weight and the flag that it follows") {
  Double cpu(1);
  const GcaShape s{.B = 1, .T = 8, .H = 1, .d = 2, .S = 4, .K = 1, .M = 2};
  const Vec q = randoms(16, 1), kv = random_memory(cpu, 2, 4, 2, 2), dout(16, 1);
  Vec w{0, 0.5, 0}, out(16), lse(8), dq(16), dw(3), delta(8), mine(16);
  const std::vector<int32_t> pick{-1, 0, -1};
  double my_dw = 0;
  for (int i = 4; i < 8; i++) {
    double p[4], sum = 0;
    for (int j = 0; j < 4; j++)
      sum += p[j] = std::exp((q[2 * i] * kv[4 * j] + q[2 * i + 1] * kv[4 * j + 1]) / std::sqrt(2.0));
    for (int e = 0; e < 2; e++) {
      double o = 0;
      for (int j = 0; j < 4; j++) o += p[j] / sum * kv[4 * j + 2 + e];
      mine[2 * i + e] = w[1] * o;
      my_dw += dout[2 * i + e] * o;
    }
  }
  const auto loss = [&](double weight) {
    w[1] = weight;
    cpu.gca_forward(out.data(), lse.data(), q.data(), kv.data(), pick.data(), w.data(), s);
    return inner(dout, out);
  };
  const double slope = (loss(0.501) - loss(0.499)) / 0.002;
  loss(0.5);
  cpu.gca_backward_query({.dq = dq.data(),
                          .dw = dw.data(),
                          .delta = delta.data(),
                          .dout = dout.data(),
                          .q = q.data(),
                          .kv = kv.data(),
                          .lse = lse.data(),
                          .pick = pick.data(),
                          .w = w.data()},
                         s);
  const auto line = [](const char* name, int begin, int end, auto number) {
    std::string text = "    " + left(name, 5);
    for (int i = begin; i < end; i++) text += right(fixed(number(i), 4), 8);
    return text + "\n";
  };
  expect("adding.md", line("q", 8, 16, [&](int i) { return q[i]; }) +
                          line("CK", 0, 8, [&](int i) { return kv[i / 2 * 4 + i % 2]; }) +
                          line("CV", 0, 8, [&](int i) { return kv[i / 2 * 4 + 2 + i % 2]; }) +
                          line("out", 8, 16, [&](int i) { return out[i]; }) +
                          line("delta", 4, 8, [&](int i) { return delta[i]; }) + "    dw   " +
                          right(fixed(dw[1], 4), 8) + "   slope" + right(fixed(slope, 4), 8) + "   the loop's " +
                          fixed(my_dw, 4));
  CHECK(relative_error(mine, out) < 1e-14);
  // The page's own text of this, but for spaces and comments.
  const std::string text = page("adding.md"), last = ".w = w.data()}, s);";
  const size_t begin = text.find("      Double cpu(1);"), end = text.find(last);
  REQUIRE(end != text.npos);
  CHECK(has(squeezed(read_file("dev/test/test_kernel_pages.cpp", 1 << 20)),
            squeezed(text.substr(begin, end + last.size() - begin))));

  // Each file of the two tables knows what the table is of.
  for (const auto& [heading, words] :
       {std::pair<std::string, std::string>{"\n## A weight\n", "lmk_norm"}, {"\n## A flag\n", "answer[-_]weight"}}) {
    REQUIRE(has(text, heading));
    const size_t from = text.find(heading) + 4;
    const std::string section = text.substr(from, text.find("\n## ", from) - from);
    const std::regex row("\n\\| `([^`]+)` \\|");
    int places = 0;
    for (std::sregex_iterator at(section.begin(), section.end(), row), end; at != end; ++at, places++) {
      INFO("doc/adding.md: ", at->str(1), " knows nothing of ", words);
      CHECK(std::regex_search(read_file(at->str(1), 1 << 24), std::regex(words)));
    }
    CHECK(places >= 6);
  }
}

TEST_CASE("pages: the holders of tiles.md, each number of a tile once, and its banks") {
  std::map<std::pair<int, int>, std::string> plain, mma;
  for (int thread = 0; thread < 256; thread++)  // multiply_nt
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++)
        CHECK(plain
                  .try_emplace({thread / 16 + 16 * i, thread % 16 + 16 * j},
                               str("thread ", thread, ", `f[", i, "][", j, "]`"))
                  .second);
  for (int thread = 0; thread < 64; thread++)  // two warps of 2 x 8 Sums
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 8; j++)
        for (int e = 0; e < 4; e++)
          CHECK(
              mma.try_emplace({thread / 32 * 32 + 16 * i + e / 2 * 8 + thread % 32 / 4, 8 * j + thread % 4 * 2 + e % 2},
                              str("thread ", thread, ", `p[", i, "][", j, "][", e, "]`"))
                  .second);
  CHECK(plain.size() == 64 * 64);
  CHECK(mma.size() == 64 * 64);
  expect("tiles.md", "| P at (37, 21) | " + plain[{37, 21}] + " | " + mma[{37, 21}] + " |\n");

  std::map<std::pair<int, int>, std::string> window;  // four warps of 2 x 4 Sums: 128 queries, 32 keys
  for (int thread = 0; thread < 128; thread++)
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 4; j++)
        for (int e = 0; e < 4; e++)
          window[{thread / 32 * 32 + 16 * i + e / 2 * 8 + thread % 32 / 4, 8 * j + thread % 4 * 2 + e % 2}] =
              str("thread ", thread, ", `p[", i, "][", j, "][", e, "]`");
  CHECK(window.size() == 128 * 32);
  CHECK(has(page("tiles.md"), window[{77, 45 - 32}]));
  std::string in_plain = plain[{77 - 64, 45}];
  CHECK(has(page("tiles.md"), in_plain.replace(in_plain.find("`f"), 2, "`score")));

  std::string rows = "    place    0  1  2  3  4  5  6  7", banks = "    bank   ";
  for (int row = 0; row < 4; row++) {
    std::string line = str("    row ", row, "  ");
    for (int place = 0; place < 8; place++) line += right(str(place ^ row), 3);
    expect("tiles.md", line);
  }
  for (int row = 0; row < 9; row++) banks += right(str(4 * row % 32), 4);  // rows of 68 floats
  expect("tiles.md", rows);
  expect("tiles.md", banks);
}
