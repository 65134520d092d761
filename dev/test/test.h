// What the tests share: folders, one measure of error, finite differences, and the way to skip.
#pragma once
#include <doctest/doctest.h>
#include <stdlib.h>

#include <filesystem>
#include <string>
#include <vector>

#include "common.h"
#include "dev/test/numbers.h"

namespace gca::test {

// ---- skipping -----------------------------------------------------------------------------------------------------
inline bool case_skipped = false;  // read by the main after each test case

// The test that calls this counts as skipped unless a check fails: if (...) return skip("no GPU answers");
inline void skip(const std::string& reason) {
  case_skipped = true;
  print("skipped: ", doctest::getContextOptions()->currentTest->m_name, ": ", reason, "\n");
}

// ---- files and errors ---------------------------------------------------------------------------------------------
// A fresh folder that goes with the test.
struct TempFolder {
  std::string path;
  explicit TempFolder(const std::string& parent = std::filesystem::temp_directory_path().string()) {
    std::string name = parent + "/gca_test_XXXXXX";
    REQUIRE(mkdtemp(name.data()));
    path = name;
  }
  ~TempFolder() { std::filesystem::remove_all(path); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
};

// What the Error says that call() throws; "" where it throws none.
template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}
inline bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

// ---- errors -------------------------------------------------------------------------------------------------------
// Largest |got - want| over largest |want|, of n numbers; not a number where one of them is not. No want but zeros: 0,
// or infinite.
template <class Got, class Want>
double relative_error(const Got* got, const Want* want, int64_t n) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < n; i++) {
    const double a = static_cast<double>(got[i]), b = static_cast<double>(want[i]);
    if (!(std::fabs(a - b) <= difference)) difference = std::fabs(a - b);
    if (difference != difference) return difference;
    size = std::fmax(size, std::fabs(b));
  }
  return difference == 0 ? 0 : difference / size;
}
template <class Got, class Want>
double relative_error(const std::vector<Got>& got, const std::vector<Want>& want) {
  GCA_CHECK(got.size() == want.size(), got.size(), " numbers against ", want.size());
  return relative_error(got.data(), want.data(), static_cast<int64_t>(got.size()));
}

inline constexpr double slope_tolerance =
    1e-6;  // of the errors below; right gradients reach 1e-7 in a model, 1e-9 in an op

// Finite differences: how far gradient . direction lies from the slope of loss() when x moves along the direction,
// relative to the larger of the two. A central difference of fourth order, so that a coarse step serves and rounding
// does not matter. x, gradient and direction hold n numbers; x is given back as it was.
template <class Loss>
double slope_error(double* x, const double* gradient, const std::vector<double>& direction, Loss&& loss) {
  const std::vector<double> at(x, x + direction.size());
  double slope = 0, claimed = 0;
  const double step = 1e-4;
  for (const auto& [place, factor] : {std::pair{1, 8.0}, {-1, -8.0}, {2, -1.0}, {-2, 1.0}}) {
    for (size_t i = 0; i < at.size(); i++) x[i] = at[i] + place * step * direction[i];
    slope += factor * loss() / (12 * step);
  }
  for (size_t i = 0; i < at.size(); i++) {
    x[i] = at[i];
    claimed += gradient[i] * direction[i];
  }
  return slope == claimed ? 0 : std::fabs(slope - claimed) / std::fmax(std::fabs(slope), std::fabs(claimed));
}
// Along a random direction.
template <class Loss>
double slope_error(std::vector<double>& x, const std::vector<double>& gradient, Loss&& loss) {
  return slope_error(x.data(), gradient.data(), random_values<double>(static_cast<int64_t>(x.size()), 4321), loss);
}

}  // namespace gca::test
