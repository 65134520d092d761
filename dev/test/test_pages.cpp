// The pages show what the program prints: a fenced block whose first line is `$ train_gca ...` is run and compared.
#include <algorithm>
#include <filesystem>
#include <tuple>

#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

// A command of a page, and the lines that the page shows of what it prints; `...` stands for any lines.
struct Shown {
  int64_t line;  // of the command, from 1
  std::string arguments;
  std::vector<std::string> output;
};

// A block may show several commands, one after another.
std::vector<Shown> shown_on(const std::string& page) {
  const std::string prompt = "$ train_gca ";
  std::vector<Shown> all;
  bool fenced = false, runs = false;
  const std::vector<std::string> lines = lines_of(page);
  for (int64_t i = 0; i < std::ssize(lines); i++) {
    if (lines[i].starts_with("```")) {
      fenced = !fenced;
      runs = fenced && i + 1 < std::ssize(lines) && lines[i + 1].starts_with(prompt);
    } else if (runs && lines[i].starts_with(prompt)) {
      all.push_back({i + 1, lines[i].substr(prompt.size()), {}});
    } else if (runs) {
      all.back().output.push_back(lines[i]);
    }
  }
  return all;
}

// What is not as shown; "" if it is.
std::string difference(const std::vector<std::string>& shown, const std::vector<std::string>& printed) {
  auto at = printed.begin();
  bool any = false;
  for (const std::string& line : shown) {
    if (line == "...") {
      any = true;
      continue;
    }
    const auto found = any ? std::find(at, printed.end(), line) : at;
    if (found == printed.end()) return "the page shows '" + line + "', which is not printed";
    if (*found != line) return "the page shows '" + line + "', printed is '" + *found + "'";
    at = found + 1;
    any = false;
  }
  return any || at == printed.end() ? "" : "printed is also '" + *at + "'";
}

// Runs what a page shows; each command that does not print so is a line.
std::string stale(const Workshop& shop, const std::string& path) {
  std::string found;
  for (const Shown& shown : shown_on(read_file(path, size_t{1} << 24))) {
    const Workshop::Result result = shop.run(shown.arguments);
    const std::string what = difference(shown.output, lines_of(result.out));
    if (!what.empty()) found += str(path, ":", shown.line, ": train_gca ", shown.arguments, ": ", what, "\n");
  }
  return found;
}

}  // namespace

TEST_CASE("pages: what they show of the program is what it prints") {
  const Workshop shop;
  CHECK(stale(shop, "README.md") == "");
  int64_t commands = 0;
  for (const auto& page : std::filesystem::directory_iterator("doc")) {
    if (page.path().extension() != ".md") continue;
    CHECK(stale(shop, page.path().string()) == "");
    commands += std::ssize(shown_on(read_file(page.path().string(), size_t{1} << 24)));
  }
  CHECK(commands > 0);
}

// "    NAME      a line", as explain --only NAME prints it.
TEST_CASE("pages: the row of drt.md from tokens to gradients, and that of first-kernel.md, a line of each array") {
  const Workshop shop;
  for (const auto& [page, heading, arrays] :
       {std::tuple<const char*, const char*, int>{"drt.md", "\n## The row, from tokens to gradients\n", 15},
        {"first-kernel.md", "\n## A slot's row\n", 9}}) {
    const std::string text = read_file(std::string("doc/") + page, 1 << 20);
    REQUIRE(has(text, heading));
    int shown = 0;
    for (const std::string& line : lines_of(text.substr(text.find(heading) + std::string(heading).size()))) {
      if (line.starts_with("#") || (shown && line.empty())) break;
      if (!line.starts_with("    ")) continue;
      const std::string name = line.substr(4, line.find(' ', 4) - 4), printed = shop.run("explain --only " + name).out;
      CHECK_MESSAGE(has(printed, "\n  " + line.substr(14) + "\n"), line, " is not in\n", printed);
      shown++;
    }
    CHECK(shown == arrays);
  }
}

TEST_CASE("pages: a line that is not printed is seen, and so is one that is not shown") {
  const Workshop shop;
  const std::string pick = shop.run("explain --only pick").out, path = shop.path + "/page";
  const std::vector<std::string> lines = lines_of(pick);
  REQUIRE(lines.size() == 6);
  const auto complaint = [&](const std::string& block) {
    write_file(path, "# A page\n\n```\n" + block + "```\nand more\n");
    return stale(shop, path);
  };
  const std::string command = "$ train_gca explain --only pick\n";
  CHECK(complaint(command + pick) == "");
  CHECK(complaint(command + pick + command + pick) == "");
  CHECK(complaint(command + lines[0] + "\n...\n") == "");
  CHECK(complaint(command + "...\n" + lines[3] + "\n...\n" + lines[5] + "\n") == "");
  CHECK(complaint("$ ls\n" + pick) == "");  // not this program's
  CHECK(complaint("a picture\n" + command) == "");
  CHECK(has(complaint(command + pick + "one more\n"), "'one more', which is not printed"));
  CHECK(has(complaint(command + lines[0] + "\n"), "page:4: train_gca explain --only pick: printed is also"));
  CHECK(has(complaint(command + lines[0] + "\n" + lines[2] + "\n...\n"), "the page shows '" + lines[2] + "'"));
  CHECK(has(complaint(command + "...\n" + lines[5] + "\n...\n" + lines[3] + "\n"), "which is not printed"));
  CHECK(has(complaint(command + pick + "$ train_gca explain --only dK\n" + pick), "page:11: "));
}
