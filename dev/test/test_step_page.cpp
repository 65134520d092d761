// doc/a-step.md runs as it stands, and prints what it says.
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

TEST_CASE("pages: the commands of a-step.md print the lines that it shows") {
  const Workshop shop;
  std::istringstream page(read_file("doc/a-step.md", 1 << 20));
  const std::string here = std::filesystem::absolute(shop.program).string() + " ";
  std::string printed;
  int commands = 0, shown = 0;
  bool fenced = false;
  for (std::string line; std::getline(page, line);) {
    if (line.starts_with("```")) fenced = !fenced;
    else if (!fenced) continue;
    else if (line.starts_with("train_gca ") || line.starts_with("printf ")) {
      const std::string command = line.starts_with("printf ") ? line : here + line.substr(10);
      const int exit = system(("cd " + shop.path + " && (" + command + ") >> printed 2>&1").c_str());
      printed = "\n" + read_file(shop.path + "/printed", 1 << 20);
      CHECK_MESSAGE(exit == 0, line, printed);
      commands++;
    } else {
      CHECK_MESSAGE(has(printed, "\n" + line), "doc/a-step.md shows '", line, "', printed is", printed);
      shown++;
    }
  }
  CHECK(commands == 3);
  CHECK(shown == 6);
}
