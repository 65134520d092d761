// Linux's tables: what is free, and the limits of this process's control groups and of all those above them.
#include "base/machine.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/text.h"
#include "common.h"

namespace gca {
namespace {

constexpr int64_t plenty_bytes = int64_t{1} << 50;

// The number that begins a file, or stands after a word in it; otherwise what is given: the file is not there, or says
// "max".
int64_t number_in(const std::string& path, int64_t otherwise) {
  std::ifstream file(path);
  int64_t number = 0;
  return file >> number ? number : otherwise;
}
int64_t number_after(const std::string& path, const std::string& word, int64_t otherwise) {
  std::ifstream file(path);
  for (std::string found; file >> found;)
    if (found == word) return file >> otherwise ? otherwise : 0;
  return otherwise;
}

// Where this process stands in one hierarchy of control groups.
struct ControlGroup {
  std::string mount, path;  // the hierarchy's folder, and the group's in it: "" or "/a/b"
  bool unified;             // version 2
};

bool has_word(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// Of the hierarchies those that have the controller ("cpu", "memory"); version 2 has all of them.
std::vector<ControlGroup> control_groups(const std::string& root, const std::string& controller) {
  std::vector<std::pair<std::string, std::string>> mine;  // controllers ("": version 2), path
  std::ifstream memberships(root + "/proc/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {  // 4:cpu,cpuacct:/a/b
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == line.npos) continue;
    mine.push_back({line.substr(first + 1, second - first - 1), line.substr(second + 1)});
  }
  std::vector<ControlGroup> groups;
  std::ifstream mounts(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream words(line);  // id parent device root point options ... - type source options
    std::string skipped, top, point, type, options;
    words >> skipped >> skipped >> skipped >> top >> point;
    while (words >> skipped && skipped != "-") {}
    words >> type >> skipped >> options;
    if (type != "cgroup2" && (type != "cgroup" || !has_word(options, controller))) continue;
    const bool unified = type == "cgroup2";
    for (const auto& [controllers, path] : mine) {
      if (unified ? !controllers.empty() : !has_word(controllers, controller)) continue;
      // A container may see its own group alone, as the hierarchy's top, and its path from the host's.
      const bool below = top == "/" || path == top || path.starts_with(top + "/");
      std::string rest = !below ? "" : top == "/" ? path : path.substr(top.size());
      if (rest == "/" || rest.find("..") != rest.npos) rest.clear();
      groups.push_back({root + point, rest, unified});
    }
  }
  return groups;
}

// visit(folder, unified) for each group with that controller and each one above it.
void for_each_group(const std::string& root, const std::string& controller,
                    const std::function<void(const std::string& folder, bool unified)>& visit) {
  for (const ControlGroup& group : control_groups(root, controller))
    for (std::string path = group.path;; path.resize(path.rfind('/'))) {
      visit(group.mount + path, group.unified);
      if (path.empty()) break;
    }
}

// Processors that a group may keep busy; infinity: no quota.
double quota_of(const std::string& folder, bool unified) {
  if (!unified) {
    const int64_t quota = number_in(folder + "/cpu.cfs_quota_us", -1),
                  period = number_in(folder + "/cpu.cfs_period_us", 100000);
    return quota > 0 && period > 0 ? static_cast<double>(quota) / static_cast<double>(period) : INFINITY;
  }
  std::ifstream file(folder + "/cpu.max");
  double quota = 0, period = 100000;
  if (!(file >> quota)) return INFINITY;  // "max"
  file >> period;
  return quota > 0 && period > 0 ? quota / period : INFINITY;
}

// Bytes that a group may still take, page cache that it would give back among them.
int64_t room_of(const std::string& folder, bool unified, int64_t limit) {
  const std::string stat = folder + "/memory.stat", prefix = unified ? "" : "total_";
  const int64_t used = number_in(folder + (unified ? "/memory.current" : "/memory.usage_in_bytes"), 0),
                cache = number_after(stat, prefix + "inactive_file", 0) + number_after(stat, prefix + "active_file", 0);
  return std::max<int64_t>(0, limit - std::max<int64_t>(0, used - cache));
}

}  // namespace

Machine machine(const std::string& root) {
  const int found = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Machine m{found, "that this process may run on", plenty_bytes, "no limit is known"};
  for_each_group(root, "cpu", [&](const std::string& folder, bool unified) {
    const double quota = quota_of(folder, unified);
    if (!(std::ceil(quota) < m.processors)) return;
    m.processors = static_cast<int>(std::ceil(quota));
    m.processors_why = str("of ", found, ": ", unified ? "cpu.max" : "cpu.cfs_quota_us", " in '", folder, "' allows ",
                           significant(quota, 3));
  });

  const auto lower = [&](int64_t bytes, const std::string& why) {
    if (bytes >= m.free_bytes) return;
    m.free_bytes = bytes;
    m.memory_why = why;
  };
  if (const int64_t kibibytes = number_after(root + "/proc/meminfo", "MemAvailable:", -1); kibibytes >= 0)
    lower(kibibytes * 1024, "MemAvailable in /proc/meminfo");
  for_each_group(root, "memory", [&](const std::string& folder, bool unified) {
    const std::string name = unified ? "/memory.max" : "/memory.limit_in_bytes";
    const int64_t limit = number_in(folder + name, plenty_bytes);
    if (limit < plenty_bytes)
      lower(room_of(folder, unified, limit), str(name.substr(1), " in '", folder, "' is ", mebibytes(limit)));
  });
  if (rlimit limit{}; getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur < static_cast<rlim_t>(plenty_bytes)) {
    const int64_t used = number_after(root + "/proc/self/status", "VmSize:", 0) * 1024,
                  most = static_cast<int64_t>(limit.rlim_cur);
    lower(std::max<int64_t>(0, most - used), str("ulimit -v is ", most / 1024, " KiB"));
  }
  return m;
}

}  // namespace gca
