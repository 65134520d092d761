// Flags: the help, with headings and without.
#include <doctest/doctest.h>

#include "base/flags.h"
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
        "  --now                            at once\n");

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
        "  --heat X                         how hot [0.5]\n");
  flags.parse({"--heat", "0.25", "--size=2K"});  // headings change nothing else
  CHECK(x == 0.25);
  CHECK(n == 2048);
}
