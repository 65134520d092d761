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

TEST_CASE("the log's figures of picks: every twentieth step, a number a group; none of a sliding window alone") {
  const Workshop shop;
  const auto lines_with_figures = [&](const std::string& name, const std::string& groups) {
    REQUIRE(shop.run("train --width 16 --heads 2 --ffn 24 --lower 1 --encoder 1 --chunk 16 --topk 2 --window 12 --task "
                     "recall "
                     "--value-tokens 3 --chunks 8 --batch 2 --steps 22 --haystack " +
                     shop.path + "/text.txt --groups " + groups + " --out " + shop.path + "/" + name)
                .exit == 0);
    std::vector<std::string> found;
    for (const std::string& line : test::lines_of(read_file(shop.path + "/" + name + "/log.jsonl", size_t{1} << 20)))
      if (line.find("\"score_spread\":[") != line.npos) found.push_back(line);
    return found;
  };
  const std::vector<std::string> found = lines_with_figures("drt", "1,1");
  REQUIRE(found.size() == 2);
  CHECK(found[0].find("\"step\":1,") != std::string::npos);
  CHECK(found[1].find("\"step\":21,") != std::string::npos);
  const Json line = parse_json(found[1], "line");
  for (const char* name : {"score_spread", "largest_weight", "picks_newest", "picks_most_fetched"}) {
    const JsonField field(line, "line");
    REQUIRE(field.at(name).items().size() == 2);
    const double value = JsonField(field.at(name).items()[0], name).number();
    CHECK(value > 0);
    if (std::string(name) != "score_spread") CHECK(value <= 1);
  }
  CHECK(lines_with_figures("window", "''").empty());
}

TEST_CASE("--short-window: a share of the steps has it, none of the last tenth") {
  TrainSettings s;
  s.config.reach.window = 9;
  s.steps = 1000;
  CHECK(s.window_at(0) == 9);
  s.short_window = 4;
  int64_t drawn = 0;
  for (int64_t step = 0; step < 900; step++) drawn += s.window_at(step) == 4;
  CHECK(drawn > 390);
  CHECK(drawn < 510);
  s.short_share = 1;
  for (int64_t step = 0; step < 1000; step++) CHECK(s.window_at(step) == (step < 900 ? 4 : 9));
  s.steps = 1;
  CHECK(s.window_at(0) == 9);

  // While all are short the weights are those of a model with that window; where some are, others than of any.
  const Workshop shop;
  const auto training = [&](const std::string& name, const char* window, const std::string& flags) {
    return shop.tiny_training(name, {{"chunks", "8"}, {"window", window}, {"threads", "1"}}) +
           " --steps 9 --save-every 4 --keep 9 --eval-every 8 --val-data '" + shop.path + "/shards/t_val_*' " + flags;
  };
  const auto trained = [&](const std::string& name, const char* window, const std::string& flags) {
    REQUIRE(shop.run(training(name, window, flags)).exit == 0);
    return shop.weights(name, "00000009");
  };
  const auto whole = trained("whole", "9", ""), four = trained("four", "4", "");
  CHECK(trained("all", "9", "--short-window 4 --short-share 1") != four);  // its last step is not
  CHECK(shop.weights("all", "00000008") == shop.weights("four", "00000008"));
  // The same weights are validated with the whole window, and with theirs.
  const auto loss_at_8 = [&](const std::string& name) {
    std::istringstream log(read_file(shop.path + "/" + name + "/log.jsonl", size_t{1} << 24));
    for (std::string line; std::getline(log, line);) {
      const Json json = parse_json(line, "log.jsonl");
      const JsonField field(json, "line");
      if (field.has("val_loss") && field.at("step").integer() == 8) return field.at("val_loss").number();
    }
    return 0.0;
  };
  CHECK(loss_at_8("all") > 0);
  CHECK(loss_at_8("all") != loss_at_8("four"));
  CHECK(trained("none", "9", "--short-window 4 --short-share 0") == whole);
  const auto some = trained("some", "9", "--short-window 4");
  CHECK(some != whole);
  CHECK(some != four);
  // Stopped in between and resumed: the same steps have it.
  trained("parts", "9", "--short-window 4");
  for (const char* step : {"/parts/step_00000009", "/parts/step_00000008"}) remove_tree(shop.path + step);
  REQUIRE(shop.run("train --resume --out " + shop.path + "/parts").exit == 0);
  CHECK(shop.weights("parts", "00000009") == some);
  shop.fails(shop.tiny_training("no", {{"groups", ""}}) + " --steps 3 --short-window 1", 2,
             "expected a model that fetches");
  shop.fails(shop.tiny_training("no", {{"window", "9"}}) + " --steps 3 --short-window 10", 2,
             "--short-window: expected at most --window, 9, found 10");
}

TEST_CASE("--score-gradient: another trains other weights, and a resumed run keeps it") {
  const Workshop shop;
  const auto weights = [&](const std::string& name, const std::string& flags) {
    REQUIRE(shop.run(shop.tiny_training(name, {{"chunks", "8"}, {"topk", "2"}, {"threads", "1"}}) +
                     " --steps 4 --save-every 2 --keep 9 " + flags)
                .exit == 0);
    return shop.weights(name, "00000004");
  };
  const auto plain = weights("plain", ""), faster = weights("faster", "--score-gradient 8");
  CHECK(faster != plain);
  weights("parts", "--score-gradient 8");
  remove_tree(shop.path + "/parts/step_00000004");
  REQUIRE(shop.run("train --resume --out " + shop.path + "/parts").exit == 0);
  CHECK(shop.weights("parts", "00000004") == faster);
  shop.fails(shop.tiny_training("no", {{"groups", ""}}) + " --steps 3 --score-gradient 8", 2,
             "--score-gradient: expected a model that fetches");
}

TEST_CASE("--noise-scale: a straight line to --noise-scale-final; one alone stays") {
  TrainSettings s;
  s.steps = 5;
  CHECK(s.noise_scale_at(3) == 1);
  s.noise_scale = 0.3;
  CHECK(s.noise_scale_at(4) == 0.3);
  s.noise_scale_final = 0.1;
  CHECK(s.noise_scale_at(0) == 0.3);
  CHECK(s.noise_scale_at(2) == doctest::Approx(0.2));
  CHECK(s.noise_scale_at(4) == doctest::Approx(0.1));

  // Of no noise at all the same weights come as of noise times 0, others of noise times 1.
  const Workshop shop;
  const auto weights = [&](const std::string& name, const std::string& flags) {
    REQUIRE(
        shop.run(shop.tiny_training(name, {{"chunks", "8"}, {"topk", "2"}, {"threads", "1"}}) + " --steps 3 " + flags)
            .exit == 0);
    return shop.weights(name, "00000003");
  };
  const auto without = weights("off", "--noise off");
  CHECK(weights("zero", "--noise-scale 0") == without);
  CHECK(weights("one", "--noise-scale 1") == weights("plain", ""));
  CHECK(weights("again", "") != without);
  CHECK(weights("falling", "--noise-scale 1 --noise-scale-final 0") != weights("once", ""));
  shop.fails(shop.tiny_training("none") + " --steps 3 --noise off --noise-scale 0.5", 2,
             "--noise-scale: expected --noise on");
  shop.fails(shop.tiny_training("none") + " --steps 3 --noise-scale-final -0.5", 2,
             "--noise-scale-final: expected 0 or more");
}
