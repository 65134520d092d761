// Needles: what a row holds and where, its repeatability; the training on tasks and `passkey` from outside.
#include <map>
#include <set>

#include "runtime/needles.h"
#include "runtime/trials.h"
#include "commands/trial_reader.h"
#include "dev/test/small_model.h"
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

TEST_CASE("other questions of a trial: the same text and needles, another needle as far away asked in the same place") {
  Bench bench;
  const int64_t C = 22, reach = 320;
  for (const char* task : {"single", "two-hop"})
    for (const int64_t gap : {0, 1})
      for (const bool near : {false, true}) {
        CAPTURE(task);
        CAPTURE(gap);
        CAPTURE(near);
        bench.settings.task = task;
        bench.settings.gap = gap;
        bench.settings.value_tokens = bench.settings.two_hop() ? 2 : 3;
        const Task maker = bench.task();
        const int64_t far = maker.far_chunks(C, reach);
        int64_t questions = 0, expected = 0;
        for (int64_t number = 0; number < 40; number++) {
          const TaskRow trial = maker.trial(1, number, C, bench.settings.two_hop() ? 2 : 4, reach, near);
          const std::vector<TaskRow> rows = maker.questions_of(trial, 1000, reach, near);
          CHECK(rows[0].tokens == trial.tokens);
          std::set<int64_t> asked;
          for (const TaskRow& row : rows) {
            check_row(row, bench, C);
            CHECK(row.questions[0].chunk == trial.questions[0].chunk);
            const int64_t same = row.questions[0].chunk * S;
            CHECK(std::equal(row.tokens.begin(), row.tokens.begin() + same, trial.tokens.begin()));
            for (size_t i = 0; i < row.needles.size(); i++) CHECK(row.needles[i].chunk == trial.needles[i].chunk);
            for (const int64_t needle : row.questions[0].needles) {
              CHECK(asked.insert(needle).second);
              CHECK((row.needles[needle].chunk >= far) == near);
            }
          }
          const size_t hops = bench.settings.two_hop() ? 2 : 1;
          for (size_t i = 0; i < trial.needles.size(); i += hops) {
            bool there = true;
            for (size_t j = i; j < i + hops; j++) there = there && (trial.needles[j].chunk >= far) == near;
            expected += there;
          }
          questions += std::ssize(rows);
          CHECK(maker.questions_of(trial, 1, reach, near).size() == 1);
          CHECK(maker.questions_of(trial, 2, reach, near).size() == std::min<size_t>(2, rows.size()));
        }
        // A few are left out, whose answer would stand twice.
        CHECK(questions <= expected);
        CHECK(questions >= expected - 4);
        CHECK(questions > 44);
      }
}

TEST_CASE("other questions of a trial: none whose answer would stand in the row twice") {
  Bench bench;
  bench.settings.task = "single";
  bench.settings.value_tokens = 2;
  const Task maker = bench.task();
  int64_t left_out = 0;
  for (int64_t number = 0; number < 20; number++) {
    TaskRow trial = maker.trial(1, number, 14, 4, 60, false);
    // Another needle's value follows the answer: asked, it would stand there and behind.
    const int64_t after = trial.questions[0].first_slot + 3;
    const std::vector<int32_t>& value = trial.needles[1].value;
    std::copy(value.begin(), value.end(), trial.tokens.begin() + after);
    std::copy(value.begin(), value.end(), trial.targets.begin() + after - 1);
    for (const TaskRow& row : maker.questions_of(trial, 100, 60, false)) CHECK(row.questions[0].needles[0] != 1);
    left_out += trial.needles[1].chunk < maker.far_chunks(14, 60);
  }
  CHECK(left_out > 3);
}

TEST_CASE("questions of a haystack that was read once are answered as each in a row of its own") {
  Bench bench;
  bench.settings.task = "single";
  bench.settings.value_tokens = 3;
  const Task maker = bench.task();
  Config config = test::small({1, 1}, S, 2);
  config.vocab = bench.tokenizer.vocab_size();
  const int64_t C = 14, reach = 60;
  test::Model<Cpu<float>> model(config, 1, S, Use::inference);
  Haystacks haystacks;
  size_t questions = 0;
  for (int64_t number = 5; number < 8; number++) {
    haystacks.push_back(maker.questions_of(maker.trial(1, number, C, 4, reach, false), 3 + number % 2, reach, false));
    questions += haystacks.back().size();
  }
  REQUIRE(questions > 8);
  for (const Picking picking : {Picking::learned, Picking::uniform})
    for (const bool on_host : {false, true}) {
      CAPTURE(on_host);
      Selection selection;
      selection.picking = picking;
      const auto read = [&](const Haystacks& rows, int64_t first_number, bool split) {
        RowReader<Cpu<float>> reader(
            model.net, {.B = 3, .chunks = C, .segment_slots = 3 * 4 * S, .on_host = on_host, .kept = split});
        int64_t last = 0;
        const Answers answers = TrialReader<Cpu<float>>(model.net, reader, selection, bench.tokenizer.landmark, split)
                                    .read(rows, first_number, [&](int64_t slots) {
                                      CHECK(slots > last);
                                      last = slots;
                                    });
        CHECK(last >= C * S);
        return answers;
      };
      const Answers together = read(haystacks, 5, true);
      std::set<std::vector<int32_t>> different;
      for (size_t b = 0; b < haystacks.size(); b++) {
        REQUIRE(together[b].size() == haystacks[b].size());
        for (size_t q = 0; q < haystacks[b].size(); q++) {
          const Answer alone = read({{haystacks[b][q]}}, 5 + static_cast<int64_t>(b), false)[0][0];
          CHECK(together[b][q].answer == alone.answer);
          CHECK(alone.answer.size() == 3);
          const double margins[2] = {together[b][q].margin, alone.margin};
          CHECK(!memcmp(&margins[0], &margins[1], sizeof(double)));
          REQUIRE(together[b][q].fetched.size() == 2);
          for (size_t g = 0; g < 2; g++) {
            CHECK(together[b][q].fetched[g].pick == alone.fetched[g].pick);
            CHECK(together[b][q].fetched[g].w == alone.fetched[g].w);
          }
          different.insert(alone.answer);
        }
      }
      CHECK(different.size() > 1);
    }
}

TEST_CASE("the interval of several questions a haystack; records of trials in a file") {
  const auto record = [](int64_t number, std::initializer_list<bool> right) {
    TrialRecord made{number, 100, 0.1, {}};
    for (const bool is : right) made.questions.push_back({{is ? 1 : 2, 3}, {1, 3}, is, 1, 0.1 + is, 1.0 / 3});
    return made;
  };
  const auto interval = [&](std::initializer_list<std::initializer_list<bool>> haystacks) {
    Score score;
    for (const auto& right : haystacks) score.add(record(score.haystacks, right));
    return score.exact_interval();
  };
  // One question a haystack: Wilson's.
  CHECK(interval({{true}, {true}, {false}, {true}}) == Score::interval(3, 4));
  // Haystacks whose questions all come out alike tell no more than one question each: p = 1/2, the rests are 1, -1, 1,
  // -1, variance = 4/3 * 4 / 64 = 1/12, p q / variance = 3.
  const auto alike = interval({{true, true}, {false, false}, {true, true}, {false, false}});
  CHECK(alike.first == doctest::Approx(Score::interval(1.5, 3).first));
  CHECK(alike.second == doctest::Approx(Score::interval(1.5, 3).second));
  // Rests 0: as many as there are, and no more.
  CHECK(interval({{true, false}, {false, true}}) == Score::interval(2, 4));
  // All right: that of the haystacks.
  CHECK(interval({{true, true}, {true, true}, {true, true}}) == Score::interval(3, 3));

  const test::TempFolder folder;
  const std::string path = folder.path + "/trials.jsonl";
  const Place far{8, 0, 4, false}, near{8, 4, 6, true};
  {
    TrialFile file(path, "a");
    for (int64_t number = 0; number < 3; number++) file.add(256, far, record(number, {true, false}));
    file.add(256, near, record(0, {true}));
    file.add(256, far, record(4, {true}));  // 3 is missing
    Json figures = Json::object();
    figures["slots"] = 256;
    figures["place"] = "far";
    figures["exact"] = 0.5;
    figures["haystacks"] = 3;
    file.add_figures(figures);
    TrialFile(path, "b").add(256, far, record(0, {false}));
    TrialFile(path, "b").add(256, near, record(1, {true}));
    TrialFile(path, "b").add(256, near, record(0, {true, true}));
  }
  const TrialFile file(path, "a");
  CHECK(file.damaged() == 0);
  CHECK(file.found(256, far, 100).size() == 3);
  CHECK(file.found(256, far, 2).size() == 2);
  CHECK(file.found(256, near, 100).size() == 1);
  CHECK(file.found(256, near, 100)[0].questions.size() == 1);
  CHECK(file.found(512, far, 100).empty());
  CHECK(file.has_figures(256, far, 3));
  CHECK(!file.has_figures(256, far, 4));
  CHECK(!file.has_figures(256, near, 3));
  CHECK(file.found(256, far, 100)[1].json() == record(1, {true, false}).json());
  CHECK(TrialFile(path, "b").found(256, far, 100)[0].json() == record(0, {false}).json());
  // Cut off anywhere: the whole lines count, and what is added next is a line of its own.
  const std::string text = read_file(path, 1 << 20);
  for (size_t size = 0; size <= text.size(); size += 7) {
    write_file(path, std::string_view(text).substr(0, size));
    const int64_t whole = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(size), '\n');
    TrialFile cut(path, "a");
    CAPTURE(size);
    const int64_t there = std::ssize(cut.found(256, far, 100));
    CHECK((there == std::min<int64_t>(whole, 3) || there == std::min<int64_t>(whole + 1, 3)));
    CHECK(cut.damaged() <= 1);
    cut.add(256, far, record(there, {true}));
    CHECK(std::ssize(TrialFile(path, "a").found(256, far, 100)) >= there + 1);
  }
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
  CHECK(Haystack::load(folder.path + "/a.txt," + folder.path + "/a.*", bench.tokenizer).files == 1);  // each once
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
  // Where the memory is on the host, what went there and came back is said.
  const Workshop::Result on_host = shop.run(passkey + " --memory host");
  CHECK(says(on_host, "memory on the host: "));
  for (const char* words : {"fetched for", " GB/s (copies were under way for ", "    waited ",
                            "the first reading took ", ", the later ones (1) "})
    CHECK_MESSAGE(says(on_host, words), on_host.out);
  CHECK(!says(table, "memory on the host"));
  const std::string figures = read_file(shop.path + "/figures.jsonl", size_t{1} << 20);
  CHECK(std::count(figures.begin(), figures.end(), '\n') == 4 + 4 * 6);
  const size_t exact = figures.rfind("{", figures.find("\"exact\""));
  const Json line = parse_json(figures.substr(exact, figures.find('\n', exact) - exact), "line");
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

// The lines of a file of figures, less what differs from run to run: times, and the folder's name.
std::vector<std::string> figures_of(const std::string& path, const std::string& with) {
  std::vector<std::string> lines;
  std::istringstream text(read_file(path, size_t{1} << 24));
  for (std::string line; std::getline(text, line);) {
    if (!has(line, with)) continue;
    const Json json = parse_json(line, "line");
    Json kept = Json::object();
    const JsonField found(json, "line");
    for (const auto& [name, value] : found.members())
      if (name != "seconds" && name != "slots_per_second") kept[name] = value;
    lines.push_back(kept.dump());
  }
  std::sort(lines.begin(), lines.end());
  return lines;
}

TEST_CASE("passkey --out: a run that was stopped goes on after its last whole line, to the figures of a whole one") {
  const Workshop shop;
  REQUIRE(shop.run(recall(shop, "run") + " --chunks 8 --steps 3").exit == 0);
  const std::string whole = shop.path + "/whole.jsonl", cut = shop.path + "/cut.jsonl",
                    passkey = "passkey --checkpoint " + shop.path + "/run --length 192,256 --asks 3 --trials ";
  REQUIRE(shop.run(passkey + "5 --out " + whole).exit == 0);
  const std::string text = read_file(whole, size_t{1} << 24);
  CHECK(std::count(text.begin(), text.end(), '\n') == 4 * 5 + 4);
  const auto same = [&] {
    for (const char* kind : {"\"questions\"", "\"exact\""}) CHECK(figures_of(cut, kind) == figures_of(whole, kind));
  };
  // Inside the first row, inside a line of the second, after its figures, whole.
  std::vector<size_t> ends;
  for (size_t at = 0; (at = text.find('\n', at)) != text.npos; at++) ends.push_back(at + 1);
  for (const size_t size : {ends[2], ends[8] + 40, ends[11], ends[11] - 1, text.size()}) {
    CAPTURE(size);
    write_file(cut, text.substr(0, size));
    const Workshop::Result result = shop.run(passkey + "5 --out " + cut);
    CHECK(result.exit == 0);
    CHECK(says(result, "going on after them") == (size < ends[11] - 1));
    CHECK(says(result, "cut off") == (size == ends[8] + 40));
    std::string now = read_file(cut, size_t{1} << 24);
    if (size == ends[8] + 40) {  // the line that was cut off stays as it is; all else is there
      CHECK(std::count(now.begin(), now.end(), '\n') == 25);
      now.erase(ends[8], 41);
      write_file(cut, now);
    }
    same();
  }
  // More trials of the same go on too; other settings begin anew, in the same file.
  write_file(cut, text);
  CHECK(says(shop.run(passkey + "7 --out " + cut), "has 5 of 7 haystacks of 192 slots, far: going on"));
  CHECK(figures_of(cut, "\"questions\"").size() == 4 * 7);
  for (const char* other : {"5 --seed 2", "5 --asks 2", "5 --others 3", "5 --no-retrieval", "5 --gap 1"}) {
    CAPTURE(other);
    write_file(cut, text);
    std::string command = passkey + other + " --out " + cut;
    if (has(other, "asks")) command.replace(command.find("--asks 3 "), 9, "");
    const Workshop::Result result = shop.run(command);
    CHECK(result.exit == 0);
    CHECK(!says(result, "haystacks of"));
    CHECK(figures_of(cut, "\"exact\"").size() >= 6);  // a gap leaves no chunk near
  }
  // Memory elsewhere, fewer rows at once: the same outcomes.
  for (const char* other : {" --memory host", " --batch-slots 200"}) {
    remove_tree(cut);
    REQUIRE(shop.run(passkey + "5 --out " + cut + other).exit == 0);
    CHECK(figures_of(cut, "\"questions\"") == figures_of(whole, "\"questions\""));
  }
}

TEST_CASE(
    "passkey: what does not fit the memory is refused before it is read, with what would fit; both memories count") {
  Workshop shop;
  REQUIRE(shop.run(recall(shop, "run") + " --chunks 8 --steps 3").exit == 0);
  shop.program = "ulimit -v 400000; exec " + shop.program;
  if (shop.run("help").exit != 0)
    return test::skip("the program does not start in 400 MB of addresses (a sanitizer's)");
  const std::string passkey = "passkey --threads 1 --trials 1 --checkpoint " + shop.path + "/run --length ";
  CHECK(shop.run(passkey + "256K --far-only").exit == 0);
  shop.fails(passkey + "16M", 1, "are free; use a shorter --length (");
  shop.fails(passkey + "16M --memory host", 1, " of the host's, ");
  shop.fails(passkey + "256K --batch-slots 1G", 1, "are free; use fewer --batch-slots, a shorter --length (");
  // 220 MiB of the device's memory and 192 of the host's, which are the same.
  shop.fails(passkey + "1536K --memory host --batch-slots 64K", 1, " of the host's, ");
}
