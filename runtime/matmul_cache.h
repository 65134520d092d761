// The algorithms that a GPU's products were measured to be fastest with, kept between runs: in
// $XDG_CACHE_HOME/train_gca, or ~/.cache.
#pragma once
#include <cstdlib>
#include <filesystem>

#include "base/files.h"
#include "ranks/ranks.h"

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

// What ranks, each of which has measured the shapes of its own rows, know together; of one shape what the first says. A
// rank on another card than the first is left out.
std::string united_products(const std::vector<std::string>& of_ranks);
// All ranks call it; the first gets the text. Nothing where a device measures nothing.
template <class Device>
std::string products_of(const Device& device, Ranks& ranks) {
  if constexpr (requires { device.products(); }) return united_products(ranks.gather(device.products()));
  else return "";
}

// What was measured goes into the cache, of all ranks, which all call it; a cache that cannot be written costs the next
// run some seconds, no more, and is told.
template <class Device>
void keep_products(const Device& device, Ranks& ranks) {
  if constexpr (requires { device.products(); }) {
    double measured = device.products_measured();
    ranks.sum(&measured, 1);
    const std::string path = products_cache(), products = products_of(device, ranks);
    if (measured == 0 || path.empty() || !ranks.first()) return;
    try {
      make_folder(parent_folder(path));
      write_file(path, products);
    } catch (const Error& error) {
      print_error(error.what(), "; the products' algorithms are measured again in the next run\n");
    }
  }
}

}  // namespace gca
