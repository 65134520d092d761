// What training adds to rows with needles, and what its log says of their picks.
#include <cmath>

#include "runtime/pick_figures.h"
#include "runtime/rows.h"
#include "dev/test/workshop.h"

using namespace gca;
using test::says;
using test::Workshop;

TEST_CASE("--landmark-answers: the landmark before an answer's chunk has the answer's first token for a target") {
  const Workshop shop;
  TrainSettings settings;
  settings.task = {.task = "two-hop", .haystack = shop.path + "/text.txt", .value_tokens = 2, .gap = 1};
  settings.config.chunk = 32;
  settings.batch = 6;
  settings.chunks = 12;
  const Tokenizer tokenizer = Tokenizer::load("bytes");
  StepRows plain, asked;
  row_maker(settings, tokenizer)->make(plain, 3);
  settings.landmark_answers = true;
  row_maker(settings, tokenizer)->make(asked, 3);
  CHECK(asked.tokens == plain.tokens);
  int64_t landmarks = 0;
  for (size_t i = 0; i < plain.targets.size(); i++) {
    if (asked.targets[i] == plain.targets[i]) continue;
    landmarks++;
    REQUIRE(asked.tokens[i] == tokenizer.landmark);
    CHECK(plain.targets[i] < 0);
    CHECK(asked.tokens[i + 1] == tokenizer.ARROW);    // the prompt's last token opens the answer's chunk
    CHECK(asked.targets[i] == asked.targets[i + 1]);  // and has the answer's first token for a target
    CHECK(asked.weights[i] == asked.weights[i + 1]);  // which weighs as much
    CHECK(asked.weights[i] > 2);
  }
  CHECK(landmarks > 12);
  CHECK(asked.targets_in_all == plain.targets_in_all + landmarks);

  const Workshop::Result none = shop.run("train --model tiny --task recall --landmark-answers --haystack " + shop.path +
                                         "/text.txt --steps 1 --out " + shop.path + "/none");
  CHECK(none.exit == 2);
  CHECK(says(none, "--landmark-answers: expected --gap 1 or more, found 0"));
}

TEST_CASE("figures of a row's picks: spread of scores, largest weight, the newest, the most fetched") {
  // Four chunks, K = 1, D = 4, so scores are half of the products: chunk 2 chooses between 0 and 1, chunk 3 among
  // 0, 1, 2; chunks 0 and 1 have no choice.
  const std::vector<double> r = {9, 9, 9, 9, 9, 9, 9, 9, 2, 0, 0, 0, 0, 4, 0, 0},
                            landmarks = {1, 0, 0, 0, 3, 1, 0, 0, 0, 4, 0, 0, 9, 9, 9, 9}, w = {0, 0, 1, 1, 0.5};
  const std::vector<int32_t> pick = {-1, -1, 0, 1, 1};
  const PickFigures figures = pick_figures(r, landmarks, pick, w, 4, 1);
  // Scores of chunk 2: 1 and 3; of chunk 3: 0, 2, 8, whose mean is 10/3 and whose squares' mean 68/3.
  CHECK(figures.score_spread == doctest::Approx((1 + std::sqrt(68.0 / 3 - 100.0 / 9)) / 2));
  CHECK(figures.largest_weight == 0.75);
  CHECK(figures.newest == 0.5);  // chunk 1 is the newest that chunk 2 may fetch, not so for chunk 3
  CHECK(figures.most_fetched == 1);
  CHECK(pick_figures(std::span(r).first(8), std::span(landmarks).first(8), std::vector<int32_t>{-1, -1, 0},
                     std::vector<double>{0, 0, 1}, 2, 1)
            .largest_weight == 0);  // nowhere a choice
}
