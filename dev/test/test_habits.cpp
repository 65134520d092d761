// What hands do by habit, and what follows from it: rates, counts that mean never, help, numbers, several patterns.
#include <algorithm>
#include <cmath>

#include "base/flags.h"
#include "base/json.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

// The learning rates of log.jsonl, in its order.
std::vector<double> rates(const Workshop& shop, const std::string& run) {
  std::vector<double> all;
  std::ifstream log(shop.path + "/" + run + "/log.jsonl");
  for (std::string line; std::getline(log, line);) {
    const Json json = parse_json(line, "log.jsonl");
    all.push_back(JsonField(json, "log.jsonl").at("lr").number());
  }
  return all;
}

}  // namespace

TEST_CASE("habits: the rate falls to a tenth of --lr unless --lr-final says otherwise, and never rises") {
  const Workshop shop;
  const auto last = [&](const std::string& out, const std::string& flags) {
    const Workshop::Result result = shop.run(shop.tiny_training(out) + " --steps 10 --threads 1 " + flags);
    REQUIRE_MESSAGE(result.exit == 0, result.out);
    const std::vector<double> all = rates(shop, out);
    REQUIRE(all.size() == 10);
    CHECK(std::is_sorted(all.rbegin(), all.rend()));
    return all.back();
  };
  // The last step is one before the end of the cosine: 2.4% of the way from the final rate to the first.
  const auto one_before = [](double first, double final) {
    return final + 0.5 * (first - final) * (1 + std::cos(3.141592653589793 * 0.9));
  };
  CHECK(last("plain", "--warmup 0") == doctest::Approx(one_before(1.5e-3, 1.5e-4)).epsilon(1e-12));
  CHECK(last("low", "--warmup 0 --lr 3e-5") == doctest::Approx(one_before(3e-5, 3e-6)).epsilon(1e-12));
  CHECK(last("tenth", "--warmup 0 --lr 3e-5 --lr-final -1") == last("again", "--warmup 0 --lr 3e-5"));
  CHECK(last("given", "--warmup 0 --lr 3e-5 --lr-final 1e-5") ==
        doctest::Approx(one_before(3e-5, 1e-5)).epsilon(1e-12));
  CHECK(last("flat", "--warmup 0 --lr 3e-5 --lr-final 3e-5") == 3e-5);
  CHECK(last("zero", "--warmup 0 --lr 3e-5 --lr-final 0") == doctest::Approx(one_before(3e-5, 0)).epsilon(1e-12));
  shop.fails(shop.tiny_training("none") + " --steps 10 --lr 3e-5 --lr-final 1e-4", 2,
             "--lr-final: expected at most --lr, 3e-05, found 0.0001");
  shop.fails(shop.tiny_training("none") + " --steps 10 --lr-final -0.5", 2,
             "--lr-final: expected a number from 0 to 10");
  CHECK_FALSE(std::filesystem::exists(shop.path + "/none"));
}

TEST_CASE("habits: of what is done every so many steps 0 means never, also for a run that goes on") {
  const Workshop shop;
  const auto trained = [&](const std::string& out, const FlagMap& flags) {
    const Workshop::Result result = shop.run(shop.training(out, with({{"steps", "10"}, {"keep", "99"}}, flags)));
    REQUIRE_MESSAGE(result.exit == 0, result.out);
    return result;
  };
  const auto steps = [&](const std::string& out) {
    std::string all;
    for (const std::string& name : list_folder(shop.path + "/" + out))
      if (name.starts_with("step_")) all += name.substr(11) + " ";
    return all;
  };
  const Workshop::Result quiet = trained("quiet", {{"eval-every", "0"}, {"save-every", "0"}, {"print-every", "0"}});
  CHECK_FALSE(says(quiet, "validation after"));
  CHECK_FALSE(says(quiet, "loss"));
  CHECK(steps("quiet") == "10 ");
  const Workshop::Result no_rows = trained("no_rows", {{"eval-rows", "0"}, {"save-every", "4"}});
  CHECK_FALSE(says(no_rows, "validation after"));
  CHECK(says(no_rows, "step 10/10"));
  CHECK(steps("no_rows") == "04 08 10 ");
  const Workshop::Result best = trained("best", {{"eval-every", "6"}, {"save-every", "0"}});
  CHECK(says(best, "validation after step 6"));
  CHECK(says(best, "validation after step 10"));
  CHECK(steps("best") == "06 10 ");  // each was the best one
  remove_tree(shop.path + "/no_rows/step_00000010");
  const Workshop::Result resumed = shop.run("train --resume --save-every 0 --out " + shop.path + "/no_rows");
  CHECK(resumed.exit == 0);
  CHECK_FALSE(says(resumed, "validation after"));
  CHECK(steps("no_rows") == "04 08 10 ");
}

TEST_CASE("habits: numbers with decimal and binary units, exponents and fractions, and what is none") {
  const auto read = [](const std::string& text) {
    int64_t n = -7;
    Flags flags("make", "Makes it.");
    flags.add("size", n, -1, INT64_MAX, "how many");
    const std::string error = error_of([&] { flags.parse({"--size=" + text}); });
    CHECK((n == -7) == (error != ""));
    if (error != "") CHECK(has(error, "--size: expected a whole number from -1 to"));
    return n;
  };
  const std::pair<const char*, int64_t> numbers[] = {{"0", 0},
                                                     {"-1", -1},
                                                     {"007", 7},
                                                     {"1e6", 1000000},
                                                     {"1E6", 1000000},
                                                     {"2.5e9", 2500000000},
                                                     {"1e+3", 1000},
                                                     {"1e0", 1},
                                                     {"1B", 1000000000},
                                                     {"1.3b", 1300000000},
                                                     {"1K", 1024},
                                                     {"16k", 16384},
                                                     {"1M", 1 << 20},
                                                     {"3G", int64_t{3} << 30},
                                                     {"0.01M", 10485},  // of 10485.76
                                                     {"1.5K", 1536},
                                                     {"0.001K", 1},
                                                     {"0.0001K", 0},
                                                     {".5G", 1 << 29},
                                                     {"1.23456e3", 1234},
                                                     {"9e18", 9000000000000000000},
                                                     {"9223372036854775807", INT64_MAX},
                                                     {"8589934591G", int64_t{8589934591} << 30}};
  for (const auto& [text, value] : numbers) {
    CAPTURE(text);
    CHECK(read(text) == value);
  }
  for (const char* text : {"",
                           "-",
                           ".",
                           "1.",
                           "1.5",
                           "K",
                           "e3",
                           "1e",
                           "1e-3",
                           "1e3K",
                           "1KB",
                           "1Mi",
                           "1T",
                           "1 K",
                           " 1",
                           "+1",
                           "0x10",
                           "1,000",
                           "1_000",
                           "1e19",
                           "1e20",
                           "20000000000G",
                           "0.0000000000000000000000001K",
                           "1e99",
                           "1e999",
                           "10e18",
                           "9223372036854775808",
                           "8589934592G",
                           "99999999999999999999",
                           "1.00000000000000000000K",
                           "nan",
                           "inf",
                           "--1",
                           "-2",
                           "1..5K",
                           "1e3.5",
                           "\xc2\xbd"}) {
    CAPTURE(text);
    CHECK(read(text) == -7);
  }
}

TEST_CASE("habits: several patterns for one flag, as a shell expands them too, each file once") {
  const Workshop shop;
  const std::string text = shop.path + "/text.txt", shards = shop.path + "/shards/";
  REQUIRE(shop.run("tokenize --val 0 --shard-tokens 9000 --out " + shards + "more " + text).exit == 0);
  const auto tokens = [&](const std::string& arguments) {
    const Workshop::Result result = shop.run("info --first 0 " + arguments);
    CAPTURE(result.out);
    CHECK(result.exit == 0);
    const size_t at = result.out.find(" shards, ");
    REQUIRE(at != std::string::npos);
    return std::stoll(result.out.substr(at + 9));
  };
  const std::string one = "'" + shards + "t_train_*'", other = "'" + shards + "more_*'";
  const int64_t in_one = tokens("--data " + one), in_other = tokens("--data " + other);
  CHECK(tokens("--data " + one + " --data " + other) == in_one + in_other);
  CHECK(tokens("--data " + one + " " + other + " --tokenizer bytes") == in_one + in_other);
  CHECK(tokens("--data=" + one + " --data=" + other) == in_one + in_other);
  CHECK(tokens("--data " + shards + "more_*") == in_other);  // not quoted: the shell's list
  std::filesystem::create_symlink(shards + "t_train_000000.bin", shards + "again.bin");
  CHECK(tokens("--data " + one + " --data " + one + " " + shards + "again.bin " + shards +
               "../shards/t_train_000000.bin") == in_one);
  shop.fails("info --data " + one + " --data '" + shards + "none_*'", 1, "no file matches '" + shards + "none_*'");
  shop.fails("info --data " + one + " --first 1 --first 2", 2, "--first is given twice");

  // A run remembers all of them, and goes on with the same text.
  FlagMap flags = {
      {"data", shards + "t_train_*"}, {"steps", "12"}, {"save-every", "6"}, {"threads", "1"}, {"keep", "9"}};
  REQUIRE(shop.run(shop.training("whole", flags) + " --data=" + other).exit == 0);
  const std::string more = " --data " + other;
  REQUIRE(shop.run(shop.training("cut", flags) + more).exit == 0);
  CHECK(shop.weights("cut", "00000012") == shop.weights("whole", "00000012"));
  for (const char* step : {"10", "12"}) remove_tree(shop.path + "/cut/step_000000" + step);
  const Workshop::Result resumed = shop.run("train --resume --out " + shop.path + "/cut");
  CHECK(says(resumed, "from step 6"));
  CHECK(says(resumed, str(in_one + in_other, " tokens, ")));
  CHECK(shop.weights("cut", "00000012") == shop.weights("whole", "00000012"));
  CHECK(says(shop.run("info " + shop.path + "/cut"), " --data " + one + " " + other));
  const std::string haystack =
      " --length 80 --trials 2 --value-tokens 2 --checkpoint " + shop.path + "/whole --haystack ";
  write_file(shop.path + "/text2.txt", read_file(text, 1 << 20));
  CHECK(shop.run("passkey" + haystack + text + " " + shop.path + "/text2.txt").exit == 0);
  CHECK(shop.run("passkey" + haystack + text + " --haystack " + shop.path + "/text2.txt," + text).exit == 0);

  // What is trained on validates nothing.
  const std::string val = "t_val_000000.bin";
  std::filesystem::create_hard_link(shards + val, shards + "more_000099.bin");
  shop.fails(shop.training("shared") + " --steps 3" + more, 1, "t_val_000000.bin' is of --data and of --val-data");
  CHECK_FALSE(std::filesystem::exists(shop.path + "/shared"));
}

TEST_CASE("habits: -h, help COMMAND, --version") {
  const Workshop shop;
  const Workshop::Result help = shop.run("train --help");
  CHECK(help.exit == 0);
  CHECK(says(help, "--steps N"));
  CHECK(says(
      help, "  N: 1e6 and 1B are decimal, K, M, G stand for 2^10, 2^20, 2^30, and fractions of them are rounded down"));
  for (const char* other : {"train -h", "help train"}) {
    const Workshop::Result same = shop.run(other);
    CHECK(same.exit == 0);
    CHECK(same.out == help.out);
  }
  shop.fails("help trian", 2, "did you mean train?");
  const Workshop::Result list = shop.run("help");
  CHECK(list.out == shop.run("-h").out);
  CHECK(says(list, "help COMMAND"));
  const Workshop::Result version = shop.run("--version");
  CHECK(version.exit == 0);
  for (const char* words : {"train_gca ", ", commit ", "CUDA", "\ncompiler ", "\nflags "}) CHECK(says(version, words));
  CHECK(shop.run("version").out == version.out);
}
