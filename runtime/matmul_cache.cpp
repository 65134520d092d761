// Where the table of measured algorithms of a GPU's products is kept between runs.
#include "runtime/matmul_cache.h"

#include <cstdlib>
#include <filesystem>

#include "base/files.h"

namespace gca {

std::string products_cache() {
  const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  if (cache && *cache) return std::string(cache) + "/train_gca/products";
  return home && *home ? std::string(home) + "/.cache/train_gca/products" : "";
}

}  // namespace gca
