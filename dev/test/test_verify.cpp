// The CPU backend against an independent oracle: every fixture that is there, in double, in float, and as the bf16
// twin.
#include <doctest/doctest.h>

#include "commands/verifier.h"
#include "dev/test/workshop.h"

using namespace gca;

namespace {

const std::string folder = "build/oracle";

// Those that `make test` has dev/make_oracle.py make.
std::vector<std::string> fixtures() {
  std::vector<std::string> paths;
  if (!std::filesystem::is_directory(folder)) return paths;
  for (const std::string& name : list_folder(folder))
    if (name.ends_with(".safetensors")) paths.push_back(folder + "/" + name);
  return paths;
}

// Skips the test where there is none.
bool none_in(const std::vector<std::string>& paths) {
  if (paths.empty()) test::skip("no oracle files in " + folder + " (make test makes them where there is numpy)");
  return paths.empty();
}

// What verify says of each file is shown where it is not right.
template <class Device>
void verify_all(VerifyOptions options) {
  const std::vector<std::string> paths = fixtures();
  if (none_in(paths)) return;
  Device device(2);
  for (const std::string& path : paths) {
    std::string report;
    options.report = &report;
    const bool good = Verifier(path, options).run(device);
    CHECK_MESSAGE(good, report);
  }
}

}  // namespace

TEST_CASE("oracle files in double: loss, logits, picks, weights, gradients, norm and ten losses to 1e-10") {
  verify_all<Cpu<double>>({1e-10, false, true});
}
TEST_CASE("oracle files in float to 1e-4") { verify_all<Cpu<float>>({1e-4, false, true}); }
TEST_CASE("oracle files as the bf16 twin, picks held, to 0.2") { verify_all<Cpu<float, true>>({0.2, true, true}); }

TEST_CASE("the check of an oracle file notices a difference: the bf16 twin does not pass as float") {
  const std::vector<std::string> paths = fixtures();
  if (none_in(paths)) return;
  Cpu<float, true> device(1);
  std::string report;
  CHECK_FALSE(Verifier(paths[0], {1e-4, true, true, &report}).run(device));
  CHECK(test::has(report, "PAST THE TOLERANCE\n"));
  CHECK(test::has(report, "FAIL " + paths[0]));
}

TEST_CASE("verify's hash is of the numbers found: the same on any number of threads, another in another precision") {
  const std::vector<std::string> paths = fixtures();
  if (none_in(paths)) return;
  const auto hash = [&](auto& device) {
    std::string report;
    Verifier(paths[0], {1, true, true, &report}).run(device);
    const size_t at = report.find(", hash ");
    REQUIRE(at != report.npos);
    return report.substr(at);
  };
  Cpu<float> one(1), two(2);
  Cpu<double> wide(2);
  CHECK(hash(one) == hash(two));
  CHECK(hash(one) != hash(wide));
}

TEST_CASE("verify without --tolerance takes the precision's own") {
  const std::vector<std::string> paths = fixtures();
  if (none_in(paths)) return;
  const test::Workshop shop;
  const std::string path = " --quiet --use-picks " + std::filesystem::absolute(paths[0]).string();
  for (const std::string precision : {"double", "float", "bf16"}) {
    CAPTURE(precision);
    CHECK(shop.run("verify --precision " + precision + path).exit == 0);
  }
  CHECK(shop.run("verify --precision float --tolerance 1e-10" + path).exit == 1);
  CHECK(shop.run("verify --precision bf16 --tolerance 1e-4" + path).exit == 1);
}
