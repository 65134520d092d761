// What hands do by habit, and what follows from it: rates, counts that mean never, help, numbers, several patterns.
#include <algorithm>
#include <cmath>

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
