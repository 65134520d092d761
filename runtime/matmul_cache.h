// The algorithms that a GPU's products were measured to be fastest with, kept between runs: in
// $XDG_CACHE_HOME/train_gca, or ~/.cache.
#pragma once
#include <cstdlib>
#include <filesystem>

#include "base/files.h"

namespace gca {

// Empty where there is no home.
std::string products_cache();

// Measures from now on what neither `saved` (a checkpoint's algorithms, or empty: the cache's are taken) knows. Tells
// where it fits not.
template <class Device>
void choose_products(Device& device, const std::string& saved) {
  if constexpr (requires { device.products(); }) {
    std::string known = saved, path = products_cache();
    std::error_code none;
    if (saved.empty() && !path.empty() && std::filesystem::exists(path, none)) known = read_file(path, 1 << 20);
    if (const std::string why = device.measure_products(known); !why.empty())
      print("the products' algorithms in ", saved.empty() ? ("'" + path + "'").c_str() : "the checkpoint",
            " do not fit: ", why, "; they are measured anew\n");
  }
}

// What was measured goes into the cache; a cache that cannot be written costs the next run some seconds, no more, and
// is told.
template <class Device>
void keep_products(const Device& device) {
  if constexpr (requires { device.products(); }) {
    const std::string path = products_cache();
    if (device.products_measured() == 0 || path.empty()) return;
    try {
      make_folder(parent_folder(path));
      write_file(path, device.products());
    } catch (const Error& error) {
      print_error(error.what(), "; the products' algorithms are measured again in the next run\n");
    }
  }
}

}  // namespace gca
