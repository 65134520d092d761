// Flags: the help, with headings and without; what may not change on --resume.
#include <doctest/doctest.h>

#include "base/flags.h"
#include "base/json.h"
#include "dev/test/test.h"

using namespace gca;
using namespace gca::test;

TEST_CASE("flags: the help shows them as they were added, or under headings") {
  int64_t n = 4096;
  double x = 0.5;
  bool on = true, now = false;
  std::string name;
  Flags plain("make", "Makes it.");
  plain.add("size", n, 1, 100000, "how many");
  plain.add_switch("now", now, "at once");
  CHECK(plain.help() ==
        "train_gca make [flags]\n  Makes it.\n"
        "  --size N                         how many [4096]\n"
        "  --now                            at once\n"
        "\n  N: 1e6 and 1B are decimal, K, M, G stand for 2^10, 2^20, 2^30, and fractions of them are rounded down\n");

  Flags flags("make", "Makes it.");
  flags.add("size", n, 1, 100000, "how many");
  flags.heading("places");
  flags.add("out", name, "FOLDER", "where to");
  flags.heading("tempers");
  flags.add("heat", x, 0, 1, "how hot");
  flags.heading("places");
  flags.add_on_off("link", on, "follow links");
  CHECK(flags.help() ==
        "train_gca make [flags]\n  Makes it.\n"
        "  --size N                         how many [4096]\n"
        "\n  places\n"
        "  --out FOLDER                     where to\n"
        "  --link on|off                    follow links [on]\n"
        "\n  tempers\n"
        "  --heat X                         how hot [0.5]\n"
        "\n  N: 1e6 and 1B are decimal, K, M, G stand for 2^10, 2^20, 2^30, and fractions of them are rounded down\n");
  flags.parse({"--heat", "0.25", "--size=2K"});  // headings change nothing else
  CHECK(x == 0.25);
  CHECK(n == 2048);
}

TEST_CASE("flags: what a run was started with stays, also where its checkpoint is older than the flag") {
  Json saved = Json::object();
  saved["width"] = "32";
  const auto resumed_with = [&](const std::vector<std::string>& arguments) {
    int64_t width = 64, gap = 0, threads = 2;
    Flags flags("train", "Trains.");
    flags.add("width", width, 1, 100, "columns", Flags::run);
    flags.add("gap", gap, 0, 100, "chunks", Flags::run);
    flags.add("threads", threads, 0, 100, "of the CPU");
    flags.restore(JsonField(saved, "settings"));
    flags.parse(arguments);
    return error_of([&] { flags.check_unchanged(JsonField(saved, "settings")); });
  };
  CHECK(resumed_with({"--threads", "1"}) == "");
  CHECK(resumed_with({"--width", "32"}) == "");
  CHECK(resumed_with({"--gap", "0"}) == "");
  CHECK(resumed_with({"--gap", "8"}).starts_with("--gap: the run was started with '0', found '8'; "));
  CHECK(resumed_with({"--width", "64"}).starts_with("--width: the run was started with '32', found '64'; "));
}
