// The check of picks in segments. The CPU backend against an independent oracle: every fixture that is there, in
// double, in float, and as the bf16 twin.
#include <doctest/doctest.h>

#include "commands/pick_check.h"
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

namespace {

// Scores with an error of that part of the query's numbers, another one in each call.
struct Perturbed : Cpu<float> {
  double part;
  uint32_t calls = 0;
  explicit Perturbed(double part_) : Cpu<float>(2), part(part_) {}
  void chunk_retrieval_forward(int32_t* pick, float* w, const float* r, const float* landmark, const RetrievalShape& s,
                               const Selection& selection) {
    std::vector<float> query(r, r + s.B * s.C * s.D);
    calls++;
    for (uint32_t i = 0; i < query.size(); i++)
      query[i] *= static_cast<float>(1 + part * (2 * uniform_open(philox(1, Draw::sample, i, calls).word[0]) - 1));
    Cpu::chunk_retrieval_forward(pick, w, query.data(), landmark, s, selection);
  }
};

}  // namespace

TEST_CASE("picks in segments: every precision passes the check, scores with the error of 8 bits do not") {
  const auto check = [](auto&& device) {
    const std::vector<PickCheck> checks = check_picks(device);
    CHECK(checks.size() == 4);
    bool good = true;
    for (const PickCheck& one : checks) {
      CHECK(one.from_whole.picks == 4 * (8 * 252 + 28));
      good = good && one.from_whole.good() && one.from_double.good();
    }
    return good;
  };
  CHECK(check(Cpu<double>(2)));
  CHECK(check(Cpu<float>(2)));
  CHECK(check(Cpu<float, true>(2)));
  CHECK(check(Perturbed(1e-7)));
  CHECK_FALSE(check(Perturbed(1.0 / 256)));
}

TEST_CASE("picks in segments: what differs is counted as sets, and its distance from the K-th score in rounding") {
  RetrievalRows rows;
  rows.B = 1;
  rows.C = 5;
  rows.D = 1;
  rows.K = 2;
  rows.r = {1, 1, 1, 1, 1};
  rows.landmarks = {1, 8, 4, 4.5f, 0};
  const auto compare =
      [&](std::vector<int32_t> last) {  // what the last chunk picks; the others nothing else than exact
        const std::vector<int32_t> exact = {-1, -1, 0, -1, 1, 0, 1, 2, 1, 3};
        std::vector<int32_t> found = exact;
        std::copy(last.begin(), last.end(), found.end() - 2);
        return differences(rows, found, exact, exact, 0.01);
      };
  CHECK(compare({3, 1}).differing == 0);
  CHECK(compare({3, 1}).picks == 1 + 2 + 2 + 2);
  CHECK(compare({1, 2}).differing == 1);
  CHECK(compare({1, 2}).furthest == doctest::Approx(0.5 / (2 * 0.01 * 8.5)));
  CHECK(compare({3, 2}).furthest == doctest::Approx(3.5 / (2 * 0.01 * 12.5)));  // the best one is lost
  CHECK(compare({0, 0}).differing == 2);
  CHECK(compare({1, 4}).furthest == INFINITY);  // not in the past
  CHECK(compare({1, -1}).furthest == INFINITY);
  const test::Workshop shop;
  const test::Workshop::Result result = shop.run("verify --retrieval --precision bf16");
  CHECK(result.exit == 0);
  CHECK(test::has(result.out, "segments of 3    from one whole pass 0 of 8176 (0.0000)"));
  shop.fails("verify", 2, "verify needs FIXTURE... or --retrieval");
}
