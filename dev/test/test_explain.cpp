// The command explain: what it prints is of one model, its own arithmetic and that of dev/by_hand.h; the pages print
// what the programs print.
#include <cmath>
#include <filesystem>
#include <sstream>

#include "dev/by_hand.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

// The rows of an array as explain prints it: the last `columns` numbers of each line, of a gradient those before the
// bar.
by_hand::Slots array_of(const Workshop& shop, const std::string& flags, const std::string& name, size_t columns) {
  const Workshop::Result result = shop.run("explain --only " + name + " " + flags);
  REQUIRE_MESSAGE(result.exit == 0, result.out);
  CHECK(result.out.substr(0, name.size() + 2) == name + " (");
  by_hand::Slots rows;
  for (const std::string& line : lines_of(result.out)) {
    if (line.find("backward") != line.npos || line[0] != ' ' || has(line, "differ")) continue;
    std::vector<std::string> words;
    std::istringstream in(line.substr(0, line.find("  |", 16)));
    for (std::string word; in >> word;) words.push_back(word);
    rows.emplace_back();
    for (size_t i = words.size() - columns; i < words.size(); i++)
      rows.back().push_back(words[i] == "." ? 0 : std::stod(words[i]));
  }
  return rows;
}

}  // namespace

TEST_CASE("explain: every gradient is the slope of the loss, at any sizes") {
  const Workshop shop;
  for (const char* flags : {"", "--seed 1", "--seed 80", "--chunks 1", "--chunks 2 --chunk 2", "--chunks 7 --topk 3",
                            "--null-slot off", "--topk 1", "--topk 8 --chunks 6", "--window 0", "--window 64",
                            "--heads 1", "--width 8 --heads 4 --chunk 3", "--text a", "--text '| \xc3\xa9'"}) {
    const Workshop::Result result = shop.run(str("explain ", flags));
    CHECK_MESSAGE(result.exit == 0, flags, result.out);
    CHECK_FALSE(has(result.out, "WRONG"));
    CHECK_FALSE(has(result.out, "nan"));
  }
  for (const std::string& line : lines_of(shop.run("explain").out)) CHECK_MESSAGE(line.size() <= 100, line);
}

TEST_CASE("explain: what each slot gets is by hand what the printed q, CK, CV, picks and weights give") {
  const Workshop shop;
  for (const bool null_slot : {true, false}) {
    const std::string flags = null_slot ? "--chunks 5" : "--chunks 5 --null-slot off";
    const by_hand::Slots q = array_of(shop, flags, "q", 4), CK = array_of(shop, flags, "CK", 4),
                         CV = array_of(shop, flags, "CV", 4), w = array_of(shop, flags, "w", 2),
                         o = array_of(shop, flags, "o", 4), score = array_of(shop, flags, "score", 5);
    REQUIRE(q.size() == 20);
    REQUIRE(o.size() == 20);
    REQUIRE(w.size() == 6);
    for (int64_t t = 0; t < 20; t++) {
      const int64_t c = t / 4 - 1;  // whose picks serve the slot
      by_hand::Vec got(4, 0.0);
      // The K best scores of its past, and their softmax.
      std::vector<std::pair<double, int64_t>> best;
      for (int64_t m = 0; m < c; m++) best.push_back({-score[c][m], m});
      std::sort(best.begin(), best.end());
      for (size_t k = 0; k < best.size() && k < 2; k++) {
        const double other = best.size() < 2 ? 0 : std::exp(best[k].first - best[1 - k].first);
        CHECK(w[c + 1][k] == doctest::Approx(1 / (1 + other)).epsilon(1e-4));
        const int64_t first = best[k].second * 4;
        got = by_hand::plus(
            got,
            by_hand::attend(q[t], 2, CK, CV, first, first + 3, null_slot, nullptr, [](int, int64_t) { return 0.0; }),
            w[c + 1][k]);
      }
      for (int64_t j = 0; j < 4; j++) CHECK(std::fabs(got[j] - o[t][j]) < 5e-5);
    }
  }
}

TEST_CASE("explain: delta adds up to dw, dscore to 0, which makes dr of L and dL of r") {
  const Workshop shop;
  const by_hand::Slots dw = array_of(shop, "", "dw", 2), w = array_of(shop, "", "w", 2),
                       dscore = array_of(shop, "", "dscore", 2), L = array_of(shop, "", "L", 4),
                       r = array_of(shop, "", "r", 4), dr = array_of(shop, "", "dr", 4),
                       dL = array_of(shop, "", "dL", 4);
  REQUIRE(dscore.size() == 5);
  const by_hand::Slots delta = array_of(shop, "", "delta", 4);  // of picks and heads: its chunk's make its dw
  REQUIRE(delta.size() == 4);
  for (size_t k = 0; k < 2; k++) {
    double sum = 0;
    for (size_t h = 0; h < 2; h++)
      for (const double of_slot : delta[2 * k + h]) sum += of_slot;
    CHECK(std::fabs(sum - dw[3][k]) < 1e-4);
  }
  const double mean = w[3][0] * dw[3][0] + w[3][1] * dw[3][1];
  CHECK(std::fabs(dscore[3][0]) > 0.001);  // or there is nothing to see
  for (size_t k = 0; k < 2; k++) CHECK(std::fabs(w[3][k] * (dw[3][k] - mean) / 2 - dscore[3][k]) < 2e-5);
  for (const by_hand::Vec& row : dscore) CHECK(std::fabs(row[0] + row[1]) < 2e-5);
  const bool zero_first = has(shop.run("explain --only pick").out, "for chunk 3   chunk 0  chunk 1");
  for (size_t j = 0; j < 4; j++) {
    const size_t first = zero_first ? 0 : 1;
    CHECK(std::fabs(dscore[3][0] * L[first][j] + dscore[3][1] * L[1 - first][j] - dr[2][j]) < 5e-5);
    CHECK(std::fabs(dscore[3][0] * r[2][j] - dL[first][j]) < 5e-5);
  }
}

TEST_CASE("explain: h is by hand of gate and up, n of x, and dgain adds up dn and n over the slots") {
  const Workshop shop;
  const by_hand::Slots gate = array_of(shop, "", "gate", 8), up = array_of(shop, "", "up", 8),
                       h = array_of(shop, "", "h", 8), x = array_of(shop, "", "x", 4),
                       rstd = array_of(shop, "", "rstd", 1), n = array_of(shop, "", "n", 4),
                       dn = array_of(shop, "", "dn", 4), dgain = array_of(shop, "", "dgain", 4);
  REQUIRE(gate.size() == 16);
  REQUIRE(dgain.size() == 1);
  by_hand::Vec sum(4, 0.0);
  for (size_t t = 0; t < 16; t++) {
    for (size_t j = 0; j < 8; j++)
      CHECK(std::fabs(gate[t][j] / (1 + std::exp(-gate[t][j])) * up[t][j] - h[t][j]) < 5e-5);
    const by_hand::Vec want = by_hand::norm(x[t], by_hand::Vec(4, 1.0), 1e-5);
    for (size_t j = 0; j < 4; j++) {
      CHECK(std::fabs(want[j] - n[t][j]) < 5e-5);
      CHECK(std::fabs(x[t][j] * rstd[t][0] - n[t][j]) < 5e-5);
      sum[j] += dn[t][j] * n[t][j];
    }
  }
  for (size_t j = 0; j < 4; j++) CHECK(std::fabs(sum[j] - dgain[0][j]) < 2e-4);
}

TEST_CASE("explain: a name that is none is refused with the list, and the wrong sizes by their flags") {
  const Workshop shop;
  shop.fails(
      "explain --only dK", 2,
      "--only: expected all|token|target|sees|L|r|score|pick|w|CK|CV|q|P|o|gate|up|h|x|rstd|n|loss|dn|dgain|dx|dO|dq");
  shop.fails("explain --heads 3", 2, "--heads: expected a divisor of --width, found 3");
  shop.fails("explain --text ''", 2, "--text: expected one byte at least, found none");
  CHECK(has(shop.run("help explain").out, "dscore|dr|dL|dCK|dCV"));
}
