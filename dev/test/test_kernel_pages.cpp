// The pages of doc/ about kernels: what they print is what the program computes, and the kernels that they name are
// there. A page that says something else fails here, with the lines that it should have.
#include <filesystem>
#include <regex>

#include "base/files.h"
#include "base/text.h"
#include "dev/test/cpu_ops.h"

using namespace gca;
using namespace gca::test;

namespace {

std::string page(const std::string& name) { return read_file("doc/" + name, 1 << 20); }

// "    NAME   1.0000 ..", as pages print arrays.
template <class Numbers>
std::string row_of(const std::string& name, const Numbers& numbers, int digits = 4, int width = 9) {
  std::string line = "    " + left(name, 9);
  for (const auto x : numbers) line += right(fixed(x, digits), width);
  return line + "\n";
}
// Whether the page has these lines, all of them together.
void expect(const std::string& name, const std::string& lines) {
  INFO("doc/", name, " should have these lines:\n", lines);
  CHECK(has(page(name), lines));
}

}  // namespace

TEST_CASE("pages: every kernel that a page names is there") {
  std::string sources;
  for (const auto& entry : std::filesystem::recursive_directory_iterator("kernels"))
    if (entry.is_regular_file()) sources += read_file(entry.path().string(), 1 << 20);
  const std::regex kernel("[a-z0-9_]+_kernel\\b");
  for (const auto& entry : std::filesystem::directory_iterator("doc")) {
    const std::string text = read_file(entry.path().string(), 1 << 20);
    for (std::sregex_iterator at(text.begin(), text.end(), kernel), end; at != end; ++at) {
      CAPTURE(entry.path().string());
      CAPTURE(at->str());
      CHECK(std::regex_search(sources, std::regex("\\b" + at->str() + "\\(")));
    }
  }
}

TEST_CASE("pages: the numbers of first-kernel.md are the ops'") {
  Double cpu(1);
  const Vec x{1, 2, 2, 4}, gain{1, 1, 2, 0.5}, dn{1, 0, -1, 2};
  Vec out(4), rstd(1), dx(4), dgain(4, 0.0);
  cpu.rmsnorm_forward(out.data(), rstd.data(), x.data(), gain.data(), 1, 4, 4, 0);
  cpu.rmsnorm_backward({dx.data(), dgain.data(), dn.data(), x.data(), rstd.data(), gain.data()}, 1, 4, 4);
  expect("first-kernel.md", row_of("x", x) + row_of("gain", gain) + row_of("rstd", rstd) + row_of("out", out) +
                                row_of("dn", dn) + row_of("dx", dx) + row_of("dgain", dgain));
  const Vec gate{0, 1}, up{2, 3}, gate_up{0, 1, 2, 3}, dh{1, 1};
  Vec h(2), dgate_up(4);
  cpu.swiglu_forward(h.data(), gate_up.data(), 1, 2);
  cpu.swiglu_backward(dgate_up.data(), dh.data(), gate_up.data(), 1, 2);
  expect("first-kernel.md", row_of("gate", gate) + row_of("up", up) + row_of("h", h) + row_of("dh", dh) +
                                row_of("dgate", Vec{dgate_up[0], dgate_up[1]}) +
                                row_of("dup", Vec{dgate_up[2], dgate_up[3]}));
}
