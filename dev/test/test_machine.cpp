// What of a machine a process may use: control groups of both versions, as hosts and containers show them.
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <string>
#include <thread>

#include "base/files.h"
#include "base/machine.h"
#include "dev/test/test.h"

using namespace gca;
using namespace gca::test;

namespace {

const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));

// A /proc and /sys of its own, of files by path; the machine that they tell of.
Machine seen(const std::map<std::string, std::string>& files) {
  const TempFolder root;
  for (const auto& [path, content] : files) {
    make_folder(parent_folder(root.path + path));
    write_file(root.path + path, content);
  }
  Machine m = machine(root.path);
  for (std::string* words : {&m.processors_why, &m.memory_why})
    for (size_t at; (at = words->find(root.path)) != words->npos;) words->erase(at, root.path.size());
  return m;
}

const std::string v2_mount = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

}  // namespace

TEST_CASE("machine: without limits it is what the system tells of") {
  const Machine bare = seen({});
  CHECK(bare.processors == all);
  CHECK(bare.free_bytes >= int64_t{1} << 50);
  const Machine m = seen({{"/proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    5000 kB\nBuffers: 1 kB\n"},
                          {"/proc/self/cgroup", "0::/user.slice\n"},
                          {"/proc/self/mountinfo", v2_mount},
                          {"/sys/fs/cgroup/user.slice/cpu.max", "max 100000\n"},
                          {"/sys/fs/cgroup/user.slice/memory.max", "max\n"}});
  CHECK(m.processors == all);
  CHECK(m.free_bytes == 5000 * 1024);
  CHECK(machine().processors >= 1);
  CHECK(machine().free_bytes > 0);
}

TEST_CASE("machine: version 2 of control groups; of nested ones the smallest counts") {
  const std::string top = "/sys/fs/cgroup";
  std::map<std::string, std::string> files = {
      {"/proc/meminfo", "MemAvailable: 4000000 kB\n"},
      {"/proc/self/cgroup", "0::/a/b\n"},
      {"/proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + v2_mount},
      {top + "/a/cpu.max", "50000 100000\n"},  // half of one
      {top + "/a/b/cpu.max", "max 100000\n"},
      {top + "/a/memory.max", "max\n"},
      {top + "/a/b/memory.max", "104857600\n"},
      {top + "/a/b/memory.current", "62914560\n"},
      {top + "/a/b/memory.stat", "anon 41943040\ninactive_file 10485760\nactive_file 10485760\nslab 5\n"}};
  const Machine m = seen(files);
  CHECK(m.processors == 1);
  CHECK(m.processors_why == str("of ", all, ": cpu.max in '/sys/fs/cgroup/a' allows 0.5"));
  CHECK(m.free_bytes == 60 << 20);  // 100 MiB less 60 that are taken, of which 20 are page cache
  CHECK(m.memory_why == "memory.max in '/sys/fs/cgroup/a/b' is 100.0 MiB");
  files[top + "/a/memory.max"] = "52428800\n";  // the group above has less
  files[top + "/a/memory.current"] = "62914560\n";
  CHECK(seen(files).free_bytes == 0);
  files[top + "/a/cpu.max"] = str(int64_t{100000} * all - 1, " 100000\n");  // rounded up: all of them
  CHECK(seen(files).processors == all);
  files[top + "/a/b/cpu.max"] = "1000 1000\n";
  CHECK(seen(files).processors == 1);
  files["/proc/self/cgroup"] = "0::/\n";  // a container sees its own group as the top
  files[top + "/cpu.max"] = "90000 100000\n";
  files[top + "/memory.max"] = "1048576\n";
  CHECK(seen(files).free_bytes == 1 << 20);
  CHECK(seen(files).processors == 1);
}

TEST_CASE("machine: version 1 of control groups, and both at once") {
  const std::string mounts =
      "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
      "36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
      "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
  std::map<std::string, std::string> files = {
      {"/proc/meminfo", "MemAvailable: 4000000 kB\n"},
      {"/proc/self/cgroup", "12:memory:/batch/job\n4:cpu,cpuacct:/docker/123\n3:cpuset:/\n0::/\n"},
      {"/proc/self/mountinfo", mounts},
      {"/sys/fs/cgroup/cpu,cpuacct/docker/123/cpu.cfs_quota_us", "60000\n"},
      {"/sys/fs/cgroup/cpu,cpuacct/docker/123/cpu.cfs_period_us", "100000\n"},
      {"/sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us", "-1\n"},
      {"/sys/fs/cgroup/memory/batch/memory.limit_in_bytes", "9223372036854771712\n"},
      {"/sys/fs/cgroup/memory/batch/job/memory.limit_in_bytes", "31457280\n"},
      {"/sys/fs/cgroup/memory/batch/job/memory.usage_in_bytes", "20971520\n"},
      {"/sys/fs/cgroup/memory/batch/job/memory.stat",
       "inactive_file 1\ntotal_inactive_file 4194304\ntotal_active_file 1048576\n"}};
  const Machine m = seen(files);
  CHECK(m.processors == 1);
  CHECK(m.processors_why ==
        str("of ", all, ": cpu.cfs_quota_us in '/sys/fs/cgroup/cpu,cpuacct/docker/123' allows 0.6"));
  CHECK(m.free_bytes == 15 << 20);
  CHECK(m.memory_why == "memory.limit_in_bytes in '/sys/fs/cgroup/memory/batch/job' is 30.0 MiB");
  // As Docker shows it inside: paths from the host's top, of which the container sees its own group alone.
  files["/proc/self/mountinfo"] =
      "33 31 0:30 /docker/123 /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpuacct,cpu\n"
      "36 31 0:33 /elsewhere /sys/fs/cgroup/mem rw - cgroup cgroup rw,memory\n";
  files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "10000\n";
  files["/sys/fs/cgroup/mem/memory.limit_in_bytes"] = "2097152\n";
  const Machine inside = seen(files);
  CHECK(has(inside.processors_why, "'/sys/fs/cgroup/cpu' allows 0.1"));
  CHECK(inside.free_bytes == 2 << 20);
  for (const char* broken : {"", "x", "0::", "4:cpu:/../..\n0::/../a\n"}) {
    files["/proc/self/cgroup"] = broken;
    CHECK(seen(files).processors >= 1);
  }
  files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "0\n";
  files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "x\n";
  CHECK(seen(files).processors >= 1);
}
