// Needles: what a row holds and where, its repeatability; the training on tasks and `passkey` from outside.
#include <map>
#include <set>

#include "runtime/needles.h"
#include "dev/test/workshop.h"

using namespace gca;
using test::error_of;
using test::FlagMap;
using test::has;
using test::says;
using test::with;
using test::Workshop;
using test::written;

namespace {

constexpr int64_t S = 32;

// Text of words, without capitals, so that some letters stand in it and some pairs do not.
Haystack prose(const Tokenizer& tokenizer, int64_t tokens = 20000) {
  const std::vector<std::string> words = {"the ",  "sea ", "was ", "calm ",   "and ", "a ",
                                          "ship ", "lay ", "at ",  "anchor ", "\n"};
  std::string text;
  for (uint32_t i = 0; std::ssize(text) < tokens; i++) text += words[philox(9, Draw::sample, i).word[0] % words.size()];
  Haystack haystack;
  haystack.tokens = tokenizer.encode(text);
  haystack.files = 1;
  return haystack;
}

struct Bench {
  Tokenizer tokenizer = Tokenizer::load("bytes");
  Haystack haystack = prose(tokenizer);
  TaskSettings settings;
  Task task() const { return Task(settings, tokenizer, haystack, S); }
};

// A row's real tokens: its slots without the landmarks, which must stand at each chunk's end.
std::vector<int32_t> real_tokens(const TaskRow& row, int32_t landmark) {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < row.tokens.size(); i++) {
    REQUIRE((row.tokens[i] == landmark) == (i % S == S - 1));
    if (row.tokens[i] != landmark) tokens.push_back(row.tokens[i]);
  }
  return tokens;
}
int64_t count_of(const std::vector<int32_t>& text, const std::vector<int32_t>& part) {
  int64_t count = 0;
  for (auto at = text.begin(); (at = std::search(at, text.end(), part.begin(), part.end())) != text.end(); at++)
    count++;
  return count;
}
std::vector<int32_t> joined(std::initializer_list<std::vector<int32_t>> parts) {
  std::vector<int32_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// A row is laid out as runtime/needles.h says, for the style of special ids.
void check_row(const TaskRow& row, const Bench& bench, int64_t C) {
  const Tokenizer& t = bench.tokenizer;
  const bool two_hop = bench.settings.two_hop();
  REQUIRE(std::ssize(row.tokens) == C * S);
  const std::vector<int32_t> text = real_tokens(row, t.landmark);
  for (int64_t c = 0; c < C; c++)
    for (int64_t j = 0; j < S; j++) {
      const int32_t target = row.targets[c * S + j];
      if (j == S - 1) CHECK(target == no_target);
      else if (c * (S - 1) + j + 1 < std::ssize(text)) CHECK(target == text[c * (S - 1) + j + 1]);
    }
  // Each needle whole in its chunk, where nothing else is; each value where it was put and nowhere else.
  std::vector<int> owner(text.size());
  auto own = [&](int64_t first, int64_t length) {
    for (int64_t i = first; i < first + length; i++) CHECK(owner[i]++ == 0);
  };
  std::set<int64_t> chunks;
  std::set<int32_t> first_tokens, last_tokens;
  for (size_t i = 0; i < row.needles.size(); i++) {
    const Needle& needle = row.needles[i];
    const std::vector<int32_t> whole = joined({{t.KEY},
                                               needle.name,
                                               two_hop ? std::vector<int32_t>{t.ARROW} : std::vector<int32_t>{},
                                               needle.value,
                                               {t.END}});
    CHECK(std::ssize(whole) == needle.length);
    CHECK(needle.first >= 0);
    CHECK(needle.first + needle.length <= S - 1);
    CHECK(chunks.insert(needle.chunk).second);
    const int64_t at = needle.chunk * (S - 1) + needle.first;
    CHECK(std::equal(whole.begin(), whole.end(), text.begin() + at));
    own(at, needle.length);
    if (!two_hop || i % 2 == 0) {
      CHECK(first_tokens.insert(needle.name.front()).second);
      CHECK(last_tokens.insert(needle.name.back()).second);
    } else {
      CHECK(needle.name == row.needles[i - 1].value);
    }
    int64_t expected = 1 + (two_hop && i % 2 == 0);
    for (const Question& question : row.questions)
      expected += std::count(question.needles.begin(), question.needles.end(), static_cast<int64_t>(i));
    if (bench.settings.value_tokens > 1) CHECK(count_of(text, needle.value) == expected);
  }
  CHECK(count_of(text, {t.KEY}) == std::ssize(row.needles));
  CHECK(count_of(text, {t.ASK}) == std::ssize(row.questions));
  std::set<int64_t> asked;
  for (const Question& question : row.questions) {
    const Needle& needle = row.needles[question.needles[0]];
    std::vector<int32_t> answer = needle.value;
    for (const int64_t i : question.needles) {
      CHECK(asked.insert(i).second);
      CHECK(row.needles[i].chunk < question.chunk);  // so that its chunk may fetch it
    }
    if (two_hop) answer = joined({answer, {t.COMMA}, row.needles[question.needles[1]].value});
    CHECK(question.answer == answer);
    CHECK(question.first_slot == (question.chunk + 1 + bench.settings.gap) * S);
    const std::vector<int32_t> ask = joined({{t.ASK}, needle.name}),
                               opened = joined({{two_hop ? t.ARROW : needle.name.back()}, answer});
    const int64_t end = (question.chunk + 1) * (S - 1), start = question.first_slot / S * (S - 1);
    CHECK(std::equal(ask.begin(), ask.end(), text.begin() + end - std::ssize(ask)));  // ends at slot S-2
    CHECK(std::equal(opened.begin(), opened.end(), text.begin() + start));            // opens its chunk
    own(end - std::ssize(ask), std::ssize(ask));
    own(start, std::ssize(opened));
    for (int64_t i = 0; i < std::ssize(answer); i++) CHECK(row.targets[question.first_slot + i] == answer[i]);
  }
}

}  // namespace

TEST_CASE(
    "rows of training: whole needles, one a chunk, each asked for once at most; values stand nowhere else; the same "
    "bytes again") {
  Bench bench;
  for (const char* task : {"single", "two-hop"})
    for (const char* values : {"letters", "random"})
      for (const int64_t gap : {0, 1}) {
        CAPTURE(task);
        CAPTURE(values);
        CAPTURE(gap);
        bench.settings.task = task;
        bench.settings.values = values;
        bench.settings.gap = gap;
        // Few tokens; or so many that a needle, a question and an answer do not fit in one chunk.
        const bool many = bench.settings.values == "random";
        bench.settings.value_tokens = bench.settings.two_hop() ? (many ? 6 : 2) : (many ? 14 : 4);
        const Task maker = bench.task();
        int64_t needles = 0, questions = 0;
        for (int64_t number = 0; number < 50; number++) {
          const TaskRow row = maker.training_row(5, number, 12, 4, 6),
                        again = bench.task().training_row(5, number, 12, 4, 6),
                        other = maker.training_row(6, number, 12, 4, 6);
          check_row(row, bench, 12);
          needles += std::ssize(row.needles);
          questions += std::ssize(row.questions);
          CHECK(row.tokens == again.tokens);
          CHECK(row.targets == again.targets);
          CHECK(row.tokens != other.tokens);
        }
        CHECK(needles == 50 * 4 * (bench.settings.two_hop() ? 2 : 1));
        CHECK(questions > 60);
      }
  CHECK(Draws(5, Draws::training, 7).below(1 << 30) !=
        Draws(5, Draws::trial, 7).below(1 << 30));  // no trial was in the training
}

TEST_CASE(
    "trials: one question at the end, enough other names, the needle's depth uniform over what the windows do not "
    "reach") {
  Bench bench;
  bench.settings.task = "single";
  bench.settings.value_tokens = 3;
  const Task maker = bench.task();
  const int64_t C = 14, reach = 100, far = maker.far_chunks(C, reach), trials = 2000;
  // By hand: the answer opens chunk 13, slot 416; chunk m ends with slot 32 m + 31, and 416 - 100 = 316 lies in
  // chunk 9.
  REQUIRE(far == 9);
  for (const bool near : {false, true}) {
    CAPTURE(near);
    std::map<int64_t, int64_t> chunks, places, others;
    for (int64_t number = 0; number < trials; number++) {
      const TaskRow row = maker.trial(1, number, C, 4, reach, near);
      if (number < 40) check_row(row, bench, C);
      REQUIRE(row.needles.size() == 5);
      REQUIRE(row.questions.size() == 1);
      CHECK(row.questions[0].first_slot == (C - 1) * S);
      chunks[row.needles[0].chunk]++;
      places[row.needles[0].first]++;
      for (size_t i = 1; i < 5; i++) others[row.needles[i].chunk]++;
    }
    // Chi-squared against uniform: mean n, standard deviation sqrt(2n); six of them.
    auto uniform = [&](const std::map<int64_t, int64_t>& counts, int64_t first, int64_t last, double all) {
      CHECK(counts.begin()->first == first);
      CHECK(counts.rbegin()->first == last - 1);
      const double n = static_cast<double>(last - first), expected = all / n;
      double sum = 0;
      for (int64_t i = first; i < last; i++)
        sum += (static_cast<double>(counts.count(i) ? counts.at(i) : 0) - expected) *
               (static_cast<double>(counts.count(i) ? counts.at(i) : 0) - expected) / expected;
      CHECK(sum < n + 6 * std::sqrt(2 * n));
    };
    uniform(chunks, near ? far : 0, near ? C - 2 : far, trials);
    uniform(places, 0, S - maker.needle_length(), trials);
    CHECK(others.size() == static_cast<size_t>(C - 2));  // the others stand anywhere before the question
  }
  bench.settings.gap = 1;
  check_row(bench.task().trial(1, 0, C, 4, reach, false), bench, C);
  bench.settings.task = "two-hop";
  for (int64_t number = 0; number < 20; number++)
    check_row(bench.task().trial(1, number, C, 3, reach, false), bench, C);
  CHECK(has(error_of([&] { bench.task().trial(1, 0, C, 8, reach, false); }), "use a longer --length or fewer needles"));
  CHECK(has(error_of([&] { bench.task().trial(1, 0, C, 1, C * S, false); }), "out of the windows' reach"));
}

TEST_CASE("the text style says the same in words") {
  Bench bench;
  bench.settings.task = "single";
  bench.settings.style = "text";
  bench.settings.value_tokens = 4;
  auto text_of = [&](const TaskRow& row) { return bench.tokenizer.decode(real_tokens(row, bench.tokenizer.landmark)); };
  const TaskRow row = Task(bench.settings, bench.tokenizer, bench.haystack, S).trial(1, 0, 12, 4, 64, false);
  auto letters = [&](const std::vector<int32_t>& ids) { return bench.tokenizer.decode(ids); };
  const std::string name = letters(row.needles[0].name), value = letters(row.needles[0].value), text = text_of(row);
  CHECK(has(text, "|The passkey of " + name + " is: " + value + "|"));
  CHECK(text.substr(11 * (S - 1) - 21, 26) ==
        "|The passkey of " + name + " is: " + value);  // its last space opens the answer's chunk
  CHECK(letters(row.questions[0].answer) == value);
  bench.settings.task = "two-hop";
  bench.settings.value_tokens = 3;
  const TaskRow hops = bench.task().trial(1, 0, 12, 1, 64, false);
  const std::string A = letters(hops.needles[0].name), B = letters(hops.needles[0].value),
                    C = letters(hops.needles[1].value), all = text_of(hops);
  CHECK(has(all, "|After " + A + " comes " + B + "|"));
  CHECK(has(all, "|After " + B + " comes " + C + "|"));
  CHECK(letters(hops.questions[0].answer) == B + ", " + C);
}

TEST_CASE("chance, and the interval of a share") {
  Bench bench;
  bench.settings.task = "single";
  bench.settings.value_tokens = 3;
  const double guess = 1.0 / (26 * 25 * 24);  // different letters
  CHECK(bench.task().chance(18, 0, 1) == doctest::Approx(guess));
  CHECK(bench.task().chance(18, 4, 1) == doctest::Approx(0.25).epsilon(1e-3));  // of 16 candidates
  CHECK(bench.task().chance(6, 8, 1) == doctest::Approx(1));
  bench.settings.gap = 8;  // picks come from all that chunk 18 may fetch, after the question too
  CHECK(bench.task().chance(20, 4, 1) == doctest::Approx(4.0 / 18).epsilon(1e-3));
  // Wilson (1927), p + z^2/2n -+ z sqrt(p q / n + z^2 / 4 n^2), over 1 + z^2/n, by hand for 8 of 10.
  CHECK(Score::interval(8, 10).first == doctest::Approx(0.49016).epsilon(1e-4));
  CHECK(Score::interval(8, 10).second == doctest::Approx(0.94331).epsilon(1e-4));
}

TEST_CASE("the haystack leaves out files with the task's words; sizes that cannot hold a needle are refused") {
  const test::TempFolder folder;
  Bench bench;
  write_file(folder.path + "/a.txt", "some text");
  write_file(folder.path + "/b.txt", "once: |The passkey of Q is: abc|");
  const Haystack haystack = Haystack::load(folder.path, bench.tokenizer);
  CHECK(haystack.files == 1);
  CHECK(haystack.left_out == 1);
  CHECK(haystack.tokens == joined({{bench.tokenizer.end_of_text}, bench.tokenizer.encode("some text")}));
  CHECK(Haystack::load(folder.path + "/a.txt," + folder.path + "/a.*", bench.tokenizer).files == 2);
  CHECK(has(error_of([&] { Haystack::load(folder.path + "/b.txt", bench.tokenizer); }), "hold the words of needles"));
  write_file(folder.path + "/empty.txt", "");
  CHECK(has(error_of([&] { Haystack::load(folder.path + "/empty.txt", bench.tokenizer); }), "only empty files"));
  bench.settings.task = "single";
  bench.settings.value_tokens = 13;
  bench.task();
  bench.settings.value_tokens = 14;
  CHECK(has(error_of([&] { bench.task(); }), "half of the different tokens"));
  bench.settings.values = "random";
  bench.settings.value_tokens = 31 - 3 + 1;
  CHECK(has(error_of([&] { bench.task(); }), "a model of larger chunks"));
  bench.settings.value_tokens = 1;
  CHECK_NOTHROW(bench.task().check_names(256));
  CHECK(has(error_of([&] { bench.task().check_names(257); }), "names for 256"));
  // Every pair of letters stands in this text: none is free to be a value.
  std::string pairs;
  for (char a = 'a'; a <= 'z'; a++)
    for (char b = 'a'; b <= 'z'; b++) {
      pairs += a;
      pairs += b;
    }
  bench.haystack.tokens = bench.tokenizer.encode(pairs);
  bench.settings.values = "letters";
  bench.settings.value_tokens = 2;
  CHECK(has(error_of([&] { bench.task().trial(1, 0, 100, 4, 64, false); }), "--value-tokens: found no values"));
}

namespace {

std::string recall(const Workshop& shop, const std::string& out, const FlagMap& others = {}) {
  return "train" + written(with({{"task", "recall"},
                                 {"width", "16"},
                                 {"heads", "2"},
                                 {"ffn", "24"},
                                 {"lower", "1"},
                                 {"groups", "1"},
                                 {"encoder", "1"},
                                 {"chunk", "16"},
                                 {"window", "12"},
                                 {"topk", "2"},
                                 {"value-tokens", "3"},
                                 {"batch", "4"},
                                 {"lr", "3e-3"},
                                 {"haystack", shop.path + "/text.txt"},
                                 {"out", shop.path + "/" + out}},
                                others));
}

}  // namespace

TEST_CASE("training on a task goes on after a stop bit for bit, its stage of the curriculum too") {
  const Workshop shop;
  // Any accuracy ends a stage, so the stages change after steps 20 and 40: the run is cut in the middle of the second.
  const std::string flags =
      " --curriculum 4,6,10 --needles 2,3 --questions 2,4 --promote 0 --steps 50 --save-every 10 --keep 9";
  const Workshop::Result whole = shop.run(recall(shop, "whole") + flags + " --threads 1");
  REQUIRE(whole.exit == 0);
  CHECK(says(whole, "step 20: 0% of the answers are right; on to rows of 6 chunks"));
  CHECK(says(whole, "step 40: 0% of the answers are right; on to rows of 10 chunks"));
  REQUIRE(shop.run(recall(shop, "cut") + flags).exit == 0);
  for (const char* later : {"40", "50"})
    remove_tree(shop.path + "/cut/step_000000" + later);  // as if killed after step 30
  const Workshop::Result resumed = shop.run("train --resume --out " + shop.path + "/cut");
  CHECK(resumed.exit == 0);
  CHECK(says(resumed, "from step 30"));
  CHECK(says(resumed, "step 40: 0% of the answers are right; on to rows of 10 chunks"));
  CHECK(shop.weights("whole", "00000050") == shop.weights("cut", "00000050"));
  // The text is part of the run.
  write_file(shop.path + "/text.txt", read_file(shop.path + "/text.txt", size_t{1} << 24) + "!");
  const Workshop::Result changed = shop.run("train --resume --out " + shop.path + "/cut");
  CHECK(changed.exit == 1);
  CHECK(says(changed, "the haystack has changed"));
}

TEST_CASE("passkey: a table of far and near trials, the ablations, JSON, a trial in words; wrong flags are told") {
  const Workshop shop;
  REQUIRE(shop.run(recall(shop, "run") + " --chunks 8 --steps 3").exit == 0);
  const std::string passkey = "passkey --checkpoint " + shop.path + "/run --trials 6 --length 192,256";
  const Workshop::Result table = shop.run(passkey + " --show 1 --out " + shop.path + "/figures.jsonl");
  CHECK(table.exit == 0);
  for (const char* words : {"single: 3 tokens in an answer, 4 other needles", "windows reach 24 slots", " far ",
                            " near ", "fetched for it, with weight", "answer: "}) {
    CAPTURE(words);
    CHECK(says(table, words));
  }
  const std::string figures = read_file(shop.path + "/figures.jsonl", size_t{1} << 20);
  CHECK(std::count(figures.begin(), figures.end(), '\n') == 4);
  const Json line = parse_json(figures.substr(0, figures.find('\n')), "line");
  CHECK(JsonField(line, "line").at("trials").integer() == 6);
  CHECK(JsonField(line, "line").at("chunks").integer() == 12);
  const Workshop::Result none = shop.run(passkey + " --no-retrieval");
  CHECK(none.exit == 0);
  CHECK(says(none, "without retrieval"));
  CHECK(shop.run(passkey + " --random-retrieval --far-only").exit == 0);
  const Workshop::Result newest =
      shop.run(passkey + " --picks newest --pick-weights equal --out " + shop.path + "/newest.jsonl");
  CHECK(says(newest, "single, newest chunks, equal weights: "));
  CHECK(has(read_file(shop.path + "/newest.jsonl", size_t{1} << 20), "\"newest, equal weights\""));
  CHECK(shop.run(passkey + " --task two-hop --value-tokens 2 --gap 1").exit == 0);
  auto fails = [&](const std::string& arguments, int exit, const std::string& words) {
    shop.fails(arguments, exit, words);
  };
  fails("passkey", 2, "needs --checkpoint");
  fails("passkey --checkpoint " + shop.path + "/run --trials 6 --length 190", 2, "a multiple of 16");
  fails(passkey + " --no-retrieval --random-retrieval", 2, "exclude each other");
  fails(passkey + " --value-tokens 20", 2, "--value-tokens");
  fails(passkey + " --others 40", 2, "has names for 26 needles");
  fails(passkey + " --others 20", 2, "use a longer --length");
  // Said before the first length is tried: nothing is lost, nothing half done.
  const std::string trials = "passkey --checkpoint " + shop.path + "/run --trials 6 --length ";
  const auto at_once = [&](const std::string& arguments, int exit, const std::string& words) {
    fails(trials + arguments, exit, words);
    CHECK(!has(shop.run(trials + arguments).out, "chance"));
  };
  at_once("256,32", 2, "three chunks at least");
  at_once("256,96 --others 6", 2, "use a longer --length");
  at_once("256 --gap 200", 2, "--length: expected at least");
  at_once("256 --out " + shop.path + "/nowhere/figures.jsonl", 1, "cannot open");
  fails(recall(shop, "new"), 2, "either --steps or --tokens");
  fails(recall(shop, "new") + " --steps 3 --data x", 2, "leave --data out");
  fails(recall(shop, "new") + " --steps 3 --val-data x", 2, "leave --val-data out");
  fails(recall(shop, "new") + " --steps 3 --name-tokens 11", 2, "a model of larger chunks");
  fails(recall(shop, "new") + " --steps 3 --needles 30", 2, "has names for 26");
  fails(recall(shop, "new") + " --steps 3 --needles ''", 2, "one number at least");
  fails(recall(shop, "new") + " --steps 3 --curriculum 2", 2, "--curriculum: expected");
  fails("train --task recall --steps 3 --out " + shop.path + "/new", 2, "needs --haystack");
  fails(shop.training("new") + " --steps 3 --promote 0.5", 2, "give --task");
}
