// eval's comparisons: classes and errors by hand, against one run of each kind of picks, against rows made for it.
#include <cmath>
#include <map>
#include <set>

#include "base/json.h"
#include "dataloader.h"
#include "runtime/by_reach.h"
#include "runtime/overlap_picks.h"
#include "dev/test/workshop.h"

using namespace gca;
using test::says;
using test::skip;
using test::Workshop;

namespace {

std::string hash_of(const Workshop::Result& result) {
  CAPTURE(result.out);
  REQUIRE(result.exit == 0);
  return result.out.substr(result.out.find("hash ") + 5, 8);
}

std::vector<Json> lines_of(const std::string& path) {
  std::vector<Json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(parse_json(line, path));
  return lines;
}
JsonField at(const Json& line, const char* name) { return JsonField(line, "line").at(name); }

// A shard of some of another's tokens.
void write_part(const std::string& prefix, const std::string& of, int64_t first, int64_t count) {
  const Tokenizer bytes = Tokenizer::load("bytes");
  std::vector<int32_t> tokens(count);
  TokenStream(of, bytes).read(first, count, tokens.data());
  ShardWriter writer(prefix, bytes, count);
  writer.append(tokens);
  ShardWriter::commit({&writer});
}

}  // namespace

TEST_CASE("by reach: how far back a bigram last stood, and its class, by hand") {
  const int32_t L = 9, N = no_target;
  // 1 2 1 2 3 1 2 3 4 in chunks of three tokens: a bigram goes on over the landmark between its tokens.
  const std::vector<int32_t> tokens = {1, 2, 1, L, 2, 3, 1, L, 2, 3, 4, L};
  const std::vector<int32_t> targets = {2, 1, 2, N, 3, 1, 2, N, 3, 4, N, N};
  CHECK(slots_back(tokens, targets) == std::vector<int64_t>{0, 0, 2, 0, 0, 0, 4, 0, 4, 0, 0, 0});

  const ReachClasses classes({2, 3});
  REQUIRE(classes.count() == 5);
  const std::vector<const char*> names = {"1..2", "3..3", "4..", "never", "all"};
  for (size_t i = 0; i < names.size(); i++) CHECK(classes.name(i) == names[i]);
  CHECK(classes.of(1) == 0);
  CHECK(classes.of(2) == 0);
  CHECK(classes.of(3) == 1);
  CHECK(classes.of(4) == 2);
  CHECK(classes.of(0) == 3);
  ScoredRows rows{classes};
  CHECK(rows.add(tokens, targets, 12) == std::vector<int32_t>{3, 3, 0, -1, 3, 3, 2, -1, 2, 3, -1, -1});
  CHECK(rows.add(tokens, targets, 4) == std::vector<int32_t>{2, 3, -1, -1});  // what went before it is known
  CHECK(rows.targets == std::vector<std::vector<int64_t>>{{1, 0, 2, 5, 8}, {0, 0, 1, 1, 2}});
  for (const std::vector<int64_t>& edges : {std::vector<int64_t>{}, {3, 3}, {4, 2}})
    CHECK_THROWS_AS(ReachClasses{edges}, UsageError);

  // Without edges: one class, of all.
  ScoredRows together;
  CHECK(together.add(tokens, targets, 4) == std::vector<int32_t>{0, 0, -1, -1});
  CHECK(together.targets == std::vector<std::vector<int64_t>>{{2}});
}

TEST_CASE("by reach: means of losses and of their differences, with errors over rows, by hand") {
  ScoredRows rows{ReachClasses({5})};  // 1..5, 6.., never, all
  rows.targets = {{2, 0, 1, 3}, {0, 0, 1, 1}, {1, 0, 1, 2}};
  RunLosses run, other;
  run.add(rows.classes, std::vector<int32_t>{0, 2, -1, 0}, std::vector<double>{3, 7, 100, 4}.data());
  run.add(rows.classes, std::vector<int32_t>{2}, std::vector<double>{5}.data());
  run.add(rows.classes, std::vector<int32_t>{0, 2}, std::vector<double>{2, 1}.data());
  for (const std::vector<int32_t>& classes : {std::vector<int32_t>{0, 2, -1, 0}, {2}, {0, 2}})
    other.add(rows.classes, classes, std::vector<double>{1, 1, 100, 4}.data());
  CHECK(run.sum == std::vector<std::vector<double>>{{7, 0, 7, 14}, {0, 0, 5, 5}, {2, 0, 1, 3}});
  CHECK(run.hash != other.hash);
  const MeanOverRows loss = mean_loss(rows, run, 0);
  CHECK(loss.targets == 3);
  CHECK(loss.rows == 2);
  CHECK(loss.mean == doctest::Approx(3));
  CHECK(loss.error == doctest::Approx(std::sqrt(2.0 * (1 + 1)) / 3));  // rows' sums 7 and 2, by the mean 6 and 3
  const MeanOverRows difference = mean_difference(rows, run, other, 3);
  CHECK(difference.mean == doctest::Approx((8.0 + 4 + 1) / 6));
  // Rows' differences 8, 4 and 1, by the mean 6.5, 13/6 and 13/3.
  CHECK(difference.error ==
        doctest::Approx(std::sqrt(1.5 * (1.5 * 1.5 + std::pow(11.0 / 6, 2) + std::pow(10.0 / 3, 2))) / 6));
  CHECK(mean_loss(rows, run, 1).targets == 0);
  CHECK(std::isnan(mean_loss(ScoredRows{ReachClasses(), {{4}}}, {{{8.0}}}, 0).error));
}

TEST_CASE("eval --by-reach: the losses of one run of each kind of picks, parted into classes") {
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run", {{"steps", "5"}})).exit == 0);
  REQUIRE(shop.run(shop.training("baseline", {{"steps", "1"}, {"groups", ""}})).exit == 0);
  const std::string data = "eval --rows 20 --data '" + shop.path + "/shards/t_val_*' --checkpoint " + shop.path,
                    eval = data + "/run ", out = shop.path + "/figures.jsonl";
  const Workshop::Result table = shop.run(eval + "--by-reach --reach-edges 12,30 --out " + out);
  REQUIRE(table.exit == 0);
  for (const char* words : {"\n1..12 ", "\n13..30 ", "\n31.. ", "\nnever ", "\nall ", " learned - newest "}) {
    CAPTURE(words);
    CHECK(says(table, words));
  }
  const std::vector<Json> lines = lines_of(out);
  REQUIRE(lines.size() == 4 * 5);
  for (size_t run = 0; run < 4; run++) {
    const Json& all = lines[run * 5 + 4];
    const std::string picks = at(all, "retrieval").string();
    const Workshop::Result plain = shop.run(eval + "--picks " + picks);
    CAPTURE(picks);
    CHECK(hash_of(plain) == at(all, "hash").string());
    CHECK(says(plain, "loss " + fixed(at(all, "loss").at("mean").number(), 4) + " "));
    int64_t targets = 0;
    double sum = 0, difference = 0;
    for (size_t i = 0; i < 4; i++) {
      const Json& line = lines[run * 5 + i];
      const int64_t here = at(line, "targets").integer();
      CHECK(here > 0);
      CHECK(here == at(lines[i], "targets").integer());
      targets += here;
      sum += at(line, "loss").at("mean").number() * static_cast<double>(here);
      if (run) difference += at(line, "learned_minus_this").at("mean").number() * static_cast<double>(here);
    }
    CHECK(targets == at(all, "targets").integer());
    CHECK(sum / static_cast<double>(targets) == doctest::Approx(at(all, "loss").at("mean").number()).epsilon(1e-12));
    if (run == 0) continue;
    const double learned = at(lines[4], "loss").at("mean").number();
    CHECK(difference / static_cast<double>(targets) ==
          doctest::Approx(learned - at(all, "loss").at("mean").number()).epsilon(1e-9));
  }
  // Rows' sums are those of the means.
  for (const Json& line : lines) {
    int64_t targets = 0;
    double sum = 0;
    const JsonField rows = at(line, "row_losses");
    REQUIRE(rows.items().size() == 20);
    for (size_t r = 0; r < rows.items().size(); r++) {
      targets += rows.at(r).at(1).integer();
      sum += rows.at(r).at(2).number();
    }
    CHECK(targets == at(line, "targets").integer());
    CHECK(sum == doctest::Approx(at(line, "loss").at("mean").number() * static_cast<double>(targets)).epsilon(1e-12));
  }
  // How many rows are read at once changes nothing; the model's window is the edge where none is given; a baseline runs
  // once.
  const auto figures = [](const Workshop::Result& result) { return result.out.substr(result.out.find("\nlast seen")); };
  CHECK(figures(shop.run(eval + "--by-reach --reach-edges 12,30 --batch 7 --batch-slots 8")) == figures(table));
  CHECK(says(shop.run(eval + "--by-reach"), "\n13.. "));
  for (const char* which : {"", "--by-reach "})
    CHECK(says(shop.run(eval + which + "--memory host"), " GB/s (copies were under way for "));
  const Workshop::Result baseline = shop.run(data + "/baseline --by-reach");
  CHECK(says(baseline, "\n13.. "));
  CHECK(says(baseline, " baseline\n"));
  CHECK(says(baseline, hash_of(shop.run(data + "/baseline")) + "\n"));

  shop.fails(eval + "--by-reach --picks newest", 2, "leave --picks and --pick-weights out");
  shop.fails(eval + "--by-reach --no-retrieval", 2, "leave --picks and --pick-weights out");
  shop.fails(eval + "--by-reach --pick-weights equal", 2, "leave --picks and --pick-weights out");
  shop.fails(eval + "--by-reach --reach-edges 30,12", 2, "each larger than the one before, found '30,12'");
  shop.fails(eval + "--by-reach --reach-edges 0", 2, "a whole number from 1");
  shop.fails(eval + "--reach-edges 12", 2, "expected --by-reach");
  shop.fails(eval + "--out " + out, 2, "expected --by-reach or --past");
  shop.fails(eval + "--by-reach --out " + shop.path + "/nowhere/figures.jsonl", 1, "cannot open");
}

TEST_CASE("eval --out: two models by row in dev/compare_rows.py, as the comparison of one run has them") {
  if (system("python3 -c '' > /dev/null 2>&1") != 0) return skip("no python3");
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run", {{"steps", "5"}})).exit == 0);
  const std::string out = shop.path + "/figures.jsonl", other = shop.path + "/other.jsonl",
                    printed = shop.path + "/printed",
                    eval = "eval --by-reach --against random --chunks 4 --past 1,2 --data '" + shop.path +
                           "/shards/t_val_*' --checkpoint " + shop.path + "/run ";
  const auto compare = [&] {
    const int code = system(("python3 dev/compare_rows.py " + out + " " + other + " > " + printed + " 2>&1").c_str());
    return Workshop::Result{code == 0 ? 0 : 1, read_file(printed, 1 << 20)};
  };
  REQUIRE(shop.run(eval + "--rows 20 --out " + out).exit == 0);
  std::string as_another;
  std::map<std::string, std::string> cells;
  for (Json line : lines_of(out)) {
    if (at(line, "retrieval").string() != "random") continue;
    const JsonField difference = at(line, "learned_minus_this");
    const double mean = difference.at("mean").number();
    cells[at(line, "class").string()] +=
        str(" | ", mean < 0 ? "" : "+", fixed(mean, 4), " (", fixed(difference.at("error").number(), 4), ")");
    line["retrieval"] = "learned";
    as_another += line.dump() + "\n";
  }
  REQUIRE(cells.size() == 4);
  write_file(other, as_another);
  const Workshop::Result table = compare();
  CAPTURE(table.out);
  CHECK(table.exit == 0);
  CHECK(says(table, "| loss of A minus B | rows of 32 slots | rows of 64 slots |"));
  for (const auto& [name, of_pasts] : cells) CHECK(says(table, "\n| " + name + of_pasts + " |\n"));
  // By hand: differences 8, 4 and 1 of 3, 1 and 2 targets, 6.5, 13/6 and 13/3 by the mean.
  const auto by_hand = [](const std::string& retrieval, const std::string& losses) {
    return "{\"retrieval\":\"" + retrieval +
           "\",\"past\":1,\"class\":\"all\",\"slots\":32,\"scored_slots\":16,\"row_losses\":" + losses + "}\n";
  };
  write_file(out, by_hand("learned", "[[0,3,9],[4,1,5],[8,2,1],[9,0,0]]"));
  write_file(other, by_hand("random", "[]") + by_hand("baseline", "[[0,3,1],[4,1,1],[8,2,0],[9,0,0]]"));
  const double error = std::sqrt(1.5 * (1.5 * 1.5 + std::pow(11.0 / 6, 2) + std::pow(10.0 / 3, 2))) / 6;
  CHECK(says(compare(), str("\n| all | +2.1667 (", fixed(error, 4), ") |\n")));
  std::filesystem::remove(out);
  std::filesystem::remove(other);
  REQUIRE(shop.run(eval + "--rows 20 --out " + out).exit == 0);
  REQUIRE(shop.run(eval + "--rows 19 --out " + other).exit == 0);
  CHECK(compare().exit == 1);
  CHECK(says(compare(), "expected the same rows and targets in both files"));
  write_file(other, "{}\n");
  CHECK(says(compare(), "other.jsonl:1: expected a line of `eval --out`"));
}

TEST_CASE("picks by words: who shares what with whom, by hand") {
  // Five chunks of three tokens and a landmark, 9. Token 1 is everywhere, so it weighs nothing.
  const std::vector<int32_t> tokens{1, 2, 3, 9, 1, 4, 5, 9, 1, 3, 2, 9, 1, 5, 2, 9, 1, 6, 3, 9};
  // Chunk 2 has 2 and 3 of chunk 0. Chunk 3 shares 2 with 0 and 2 (in three of four chunks), 5 with 1 (in two): 1, then
  // the newer of the others. Chunk 4 shares 3 with 0 and 2.
  CHECK(overlap_picks(tokens, 4, 2, 1, false) == std::vector<int32_t>{-1, -1, 0, -1, 0, 1, 1, 2, 2, 0});
  // By the chunk after it: 1 by chunk 2, 2 by chunk 3 (5 of chunk 1), 3 by chunk 4 (3 of 2 and 0); the last by itself.
  CHECK(overlap_picks(tokens, 4, 2, 1, true) == std::vector<int32_t>{-1, -1, 0, -1, 1, 0, 2, 0, 2, 0});
  CHECK(overlap_picks(tokens, 4, 1, 3, false) == std::vector<int32_t>{-1, -1, -1, 0, 0});
}

TEST_CASE("eval --picks noisy, lexical, hindsight: as --by-reach --against has them, in any batch and segment") {
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run", {{"steps", "5"}})).exit == 0);
  const std::string eval =
                        "eval --rows 20 --data '" + shop.path + "/shards/t_val_*' --checkpoint " + shop.path + "/run ",
                    against = "--by-reach --against noisy,lexical,hindsight,equal,newest ",
                    out = shop.path + "/figures.jsonl";
  const Workshop::Result table = shop.run(eval + against + "--out " + out);
  REQUIRE(table.exit == 0);
  std::map<std::string, std::string> hashes;
  for (const Json& line : lines_of(out)) hashes[at(line, "retrieval").string()] = at(line, "hash").string();
  REQUIRE(hashes.size() == 6);
  std::set<std::string> different;
  for (const auto& [picks, hash] : hashes) {
    CAPTURE(picks);
    different.insert(hash);
    const bool equal = picks == "learned, equal weights";
    CHECK(hash_of(shop.run(eval + (equal ? "--pick-weights equal" : "--picks " + picks))) == hash);
  }
  CHECK(different.size() == hashes.size());
  CHECK(says(table, " hindsight  learned, equal weights  "));  // a column is as wide as its heading
  const auto figures = [](const Workshop::Result& result) { return result.out.substr(result.out.find("\nlast seen")); };
  CHECK(figures(shop.run(eval + against + "--batch 7 --batch-slots 8")) == figures(table));
  CHECK(figures(shop.run(eval + against + "--memory host")).starts_with(figures(table).substr(0, 600)));
  CHECK(hash_of(shop.run(eval + "--picks noisy --seed 2")) != hashes["noisy"]);
  CHECK(hash_of(shop.run(eval + "--picks hindsight --seed 2")) == hashes["hindsight"]);
  CHECK(says(shop.run(eval + "--picks hindsight"), ", hindsight picks"));

  shop.fails(eval + "--by-reach --against lexcal", 2, "found 'lexcal', did you mean lexical?");
  shop.fails(eval + "--by-reach --against newest,", 2, "found ''");
  shop.fails(eval + "--against newest", 2, "expected --by-reach");
  shop.fails("passkey --picks lexical --checkpoint " + shop.path + "/run", 2, "--picks");
}

TEST_CASE("eval --past: the same tokens at the end of longer rows") {
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run", {{"steps", "5"}})).exit == 0);
  const std::string val = shop.path + "/shards/t_val_*", of_run = "eval --checkpoint " + shop.path + "/run --data ",
                    eval = of_run + "'" + val + "' ", out = shop.path + "/figures.jsonl";
  // Alone, rows of once C chunks are those of any eval, with each kind of picks.
  for (const char* flags : {"", "--picks newest ", "--score-last 2 ", "--no-cross --rows 9 "}) {
    CAPTURE(flags);
    const Workshop::Result past = shop.run(eval + flags + "--past 1");
    CHECK(says(past, " " + hash_of(shop.run(eval + flags)) + "\n"));
  }
  // Of a text of four times 6 chunks of 7 tokens: its one row, and the text of its last 6 chunks alone.
  write_part(shop.path + "/four", val, 0, 4 * 42 + 1);
  write_part(shop.path + "/last", val, 3 * 42, 42 + 1);
  const std::string four = of_run + "'" + shop.path + "/four_*' ", last = of_run + "'" + shop.path + "/last_*' ";
  const Workshop::Result both = shop.run(four + "--by-reach --past 4,1 --out " + out);
  CHECK(says(both, "3 of 4 rows have too little past for 4 times 6 chunks and are left out"));
  CHECK(says(both, " 1 - 4"));
  CHECK(says(both, "; classes by rows of 192 slots"));
  const std::vector<Json> lines = lines_of(out);
  REQUIRE(lines.size() == 2 * 4 * 4);
  // Classes are of the long rows, which have seen more.
  for (const bool is_long : {true, false}) {
    const std::string of = shop.path + (is_long ? "/long.jsonl" : "/short.jsonl");
    REQUIRE(shop.run((is_long ? four + "--chunks 24 --score-last 6" : last) + " --by-reach --out " + of).exit == 0);
    const std::vector<Json> alone = lines_of(of);
    bool same = true;
    for (size_t i = 0; i < 4; i++) same &= at(alone[i], "targets").integer() == at(lines[i], "targets").integer();
    CHECK(same == is_long);
  }
  for (size_t run = 0; run < 8; run++) {
    const Json& all = lines[run * 4 + 3];
    const std::string picks = "--picks " + at(all, "retrieval").string();
    CAPTURE(picks);
    const std::string want =
        hash_of(run < 4 ? shop.run(four + "--chunks 24 --score-last 6 " + picks) : shop.run(last + picks));
    CHECK(at(all, "hash").string() == want);
    CHECK(at(all, "slots").integer() == (run < 4 ? 4 : 1) * 48);
    if (run < 4) continue;
    for (size_t i = 0; i < 4; i++) {  // the same targets in each class, though the short row saw less
      const Json &shorter = lines[run * 4 + i], &longer = lines[(run - 4) * 4 + i];
      CHECK(at(shorter, "targets").integer() == at(longer, "targets").integer());
      if (at(shorter, "targets").integer() == 0) continue;
      CHECK(at(shorter, "minus_first_past").at("mean").number() ==
            doctest::Approx(at(shorter, "loss").at("mean").number() - at(longer, "loss").at("mean").number()));
    }
  }
  CHECK(hash_of(shop.run(last + "--no-retrieval")) !=
        hash_of(shop.run(four + "--chunks 24 --score-last 6 --no-retrieval")));
  shop.fails(four + "--past 1,5", 1, "--past 5: expected a text of 5 x 42 tokens");
  shop.fails(four + "--past 0", 2, "a whole number from 1");
}
