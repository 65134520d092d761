// Where the table of measured algorithms of a GPU's products is kept between runs.
#include "runtime/matmul_cache.h"

#include <cstdlib>
#include <filesystem>
#include <set>
#include <sstream>

#include "base/files.h"

namespace gca {

std::string products_cache() {
  const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  if (cache && *cache) return std::string(cache) + "/train_gca/products";
  return home && *home ? std::string(home) + "/.cache/train_gca/products" : "";
}

std::string united_products(const std::vector<std::string>& of_ranks) {
  if (of_ranks.empty()) return "";
  const std::string head = of_ranks[0].substr(0, of_ranks[0].find('\n'));
  std::string all = head;
  std::set<std::string> seen;
  for (size_t r = of_ranks.size(); r-- > 0;) {  // a reader takes the last line of a shape
    std::istringstream lines(of_ranks[r]);
    std::string line;
    if (!std::getline(lines, line) || line != head) continue;
    while (std::getline(lines, line))
      if (seen.insert(line).second) all += "\n" + line;
  }
  return all;
}

}  // namespace gca
