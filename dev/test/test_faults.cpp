// Nothing is lost: the program killed, signalled, out of space and misled, from outside. Tiny models: a step takes a
// fraction of a millisecond.
#include <sys/stat.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <map>

#include "base/safetensors.h"
#include "runtime/checkpoint.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

// A workshop whose runs are small and quick: in memory where it can be, so that fsync, whose place is tested, costs
// nothing.
struct FaultShop : Workshop {
  FaultShop()
      : Workshop(
            getenv("TRAIN_GCA") ? getenv("TRAIN_GCA") : "build/cpu/train_gca",
            std::filesystem::is_directory("/dev/shm") ? "/dev/shm" : std::filesystem::temp_directory_path().string()) {}
  std::string tiny(const std::string& out, const std::string& more, const FlagMap& others = {}) const {
    return tiny_training(out, with({{"seed", "7"}}, others)) + " " + more;
  }
  std::string folder(const std::string& run, int64_t step) const { return checkpoint_folder(path + "/" + run, step); }
  std::string file(const std::string& run, int64_t step, const char* name) const {
    return read_file(folder(run, step) + "/" + name, size_t{1} << 24);
  }
  // Step -> loss as log.jsonl tells them, each step once.
  std::map<int64_t, double> losses(const std::string& run) const {
    std::map<int64_t, double> all;
    std::ifstream log(path + "/" + run + "/log.jsonl");
    for (std::string line; std::getline(log, line);) {
      const Json json = parse_json(line, "log.jsonl");
      const JsonField field(json, "log.jsonl");
      if (!field.has("loss")) continue;
      const int64_t step = field.at("step").integer();
      const double loss = field.at("loss").number();
      CHECK_FALSE(all.contains(step));
      all[step] = loss;
    }
    return all;
  }
  // Both runs ended after the same step with the same losses on the way, the same weights and the same optimiser.
  bool same(const std::string& a, const std::string& b, int64_t step) const {
    return losses(a) == losses(b) && file(a, step, "model.safetensors") == file(b, step, "model.safetensors") &&
           file(a, step, "optimizer.safetensors") == file(b, step, "optimizer.safetensors");
  }
  // The run `from` as it was after that step.
  void cut(const std::string& from, const std::string& to, int64_t step) const {
    remove_tree(path + "/" + to);
    std::filesystem::copy(path + "/" + from, path + "/" + to, std::filesystem::copy_options::recursive);
    for (const int64_t later : list_checkpoints(path + "/" + to))
      if (later > step) remove_tree(folder(to, later));
    std::ifstream log(path + "/" + from + "/log.jsonl");
    std::string lines;
    int64_t number = 0;
    for (std::string line; std::getline(log, line) && number < step; number++) lines += line + "\n";
    write_file(path + "/" + to + "/log.jsonl", lines);
  }
  std::string resume(const std::string& run, int threads) const {
    return "train --resume --keep 1 --threads " + std::to_string(threads) + " --out " + path + "/" + run;
  }
  // An open file for what a process prints, and what it has printed.
  int output(const char* name = "output") const {
    return ::open((path + "/" + name).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
  }
  std::string printed(const char* name = "output") const { return read_file(path + "/" + name, size_t{1} << 26); }
  // Waits, a minute at most, until the condition holds.
  template <class Condition>
  static bool wait_for(Condition condition) {
    for (int i = 0; i < 60000; i++) {
      if (condition()) return true;
      usleep(1000);
    }
    return false;
  }
  int64_t newest(const std::string& run) const {
    const std::vector<int64_t> steps =
        std::filesystem::exists(path + "/" + run) ? list_checkpoints(path + "/" + run) : std::vector<int64_t>();
    return steps.empty() ? -1 : steps.back();
  }
};

// The program under ptrace until its main thread enters the n-th system call after the mkdir of a checkpoint's partial
// folder; there at_call is called, and if that leaves it alive it goes on untraced. False: it ended before. Threads
// other than the main one are not traced. `traced` is set to false where ptrace is not allowed.
bool run_to_call_of_save(Process& process, int n, bool& traced, const std::function<void()>& at_call) {
  int status = 0;
  traced = waitpid(process.id, &status, 0) == process.id && WIFSTOPPED(status);
  if (!traced) return false;
  // The shell's exec, then the program's.
  ptrace(PTRACE_SETOPTIONS, process.id, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);
  for (int left = -1, pass_on = 0;;) {
    ptrace(PTRACE_SYSCALL, process.id, nullptr, pass_on);
    pass_on = 0;
    if (waitpid(process.id, &status, 0) != process.id || !WIFSTOPPED(status)) return false;
    if (WSTOPSIG(status) != (SIGTRAP | 0x80)) {
      pass_on = WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
      continue;
    }
    __ptrace_syscall_info info{};
    if (ptrace(PTRACE_GET_SYSCALL_INFO, process.id, sizeof info, &info) <= 0) {
      traced = false;
      return false;
    }
    if (info.op != PTRACE_SYSCALL_INFO_ENTRY) continue;
    if (left < 0) {
      const bool at = info.entry.nr == SYS_mkdirat;
      bool made = at;
#ifdef SYS_mkdir
      made |= info.entry.nr == SYS_mkdir;
#endif
      if (!made) continue;
      char text[4096] = {};
      const int memory = ::open(str("/proc/", process.id, "/mem").c_str(), O_RDONLY | O_CLOEXEC);
      if (::pread(memory, text, sizeof text - 1, static_cast<off_t>(info.entry.args[at ? 1 : 0])) < 0) text[0] = '\0';
      ::close(memory);
      if (!std::string_view(text).ends_with(".partial")) continue;
      left = n;
    }
    if (left-- > 0) continue;
    at_call();
    ptrace(PTRACE_DETACH, process.id, nullptr, 0);
    return true;
  }
}

}  // namespace

// ---- kill ---------------------------------------------------------------------------------------------------------

namespace {

// Kills at every stride-th system call from the save of step 4 to the end of the process; each time a fresh process
// goes on.
void kill_in_a_save(int stride) {
  const FaultShop shop;
  REQUIRE(shop.run(shop.tiny("whole", "--steps 4 --save-every 2 --keep 9 --threads 1")).exit == 0);
  int n = 0;
  for (bool killed = true; killed; n += stride) {
    REQUIRE(n < 1000);
    CAPTURE(n);
    shop.cut("whole", "run", 2);
    {
      bool traced = true;
      Process process(shop.program, shop.resume("run", 1), shop.output(),
                      [] { ptrace(PTRACE_TRACEME, 0, nullptr, nullptr); });
      killed = run_to_call_of_save(process, n, traced, [&] { kill(process.id, SIGKILL); });
      if (!traced) return skip("ptrace is not allowed here");
      const int status = process.wait();
      CHECK(status == (killed ? -SIGKILL : 0));
    }
    if (killed) REQUIRE(shop.run(shop.resume("run", 1 + n % 2)).exit == 0);
    const bool same = shop.same("whole", "run", 4);
    CHECK(same);
    for (const std::string& name :
         list_folder(shop.path + "/run"))  // no .partial; and .._2 only where its deletion was cut short
      CHECK((name == "lock" || name == "log.jsonl" || name == "step_00000004" || name == "step_00000002"));
    if (!same) break;
  }
  MESSAGE("killed at " << n / stride - 1 << " system calls");
  CHECK(n > 100);
}

}  // namespace

TEST_CASE("kill: at system calls all over a save, and the run goes on bit for bit") { kill_in_a_save(11); }
TEST_CASE("long: killed at every system call of a save, the run goes on bit for bit" * doctest::skip()) {
  kill_in_a_save(1);
}

TEST_CASE("kill: at 20 random instants of training, and the run goes on bit for bit with another number of threads") {
  const FaultShop shop;
  const std::string settings =
      "--steps 60 --save-every 7 --keep 2 --eval-every 9 --eval-rows 3 --val-data '" + shop.path + "/shards/t_val_*'";
  REQUIRE(shop.run(shop.tiny("whole", settings + " --threads 1")).exit == 0);
  int killed = 0, resumed = 0;
  for (uint32_t trial = 0; killed < 20 && trial < 200; trial++) {  // a run that ended before it was killed is none
    CAPTURE(trial);
    const Philox random = philox(1, Draw::task, trial);
    remove_tree(shop.path + "/run");
    {
      Process process(shop.program, shop.tiny("run", settings + str(" --threads ", 1 + trial % 2)), shop.output());
      CHECK(shop.logged("run", static_cast<int>(random.word[0] % 60)));
      usleep(random.word[1] % 2000);
      kill(process.id, SIGKILL);
      if (process.wait() != -SIGKILL) continue;
    }
    killed++;
    const bool has_checkpoint = shop.newest("run") >= 0;
    resumed += has_checkpoint;
    if (!has_checkpoint) remove_tree(shop.path + "/run");
    const Workshop::Result result =
        shop.run(has_checkpoint ? shop.resume("run", 1 + (trial + 1) % 2) : shop.tiny("run", settings));
    CHECK_MESSAGE(result.exit == 0, result.out);
    CHECK(shop.same("whole", "run", 60));
  }
  CHECK(killed == 20);
  CHECK(resumed >= 8);
}

TEST_CASE("kill: without the seed or the step the run would not go on bit for bit, and the comparison says so") {
  const FaultShop shop;
  REQUIRE(shop.run(shop.tiny("whole", "--steps 4 --save-every 2 --keep 9")).exit == 0);
  // The checkpoint of step 2 again, under another step or without one of the settings.
  const auto remade = [&](const std::string& run, int64_t step, const std::string& without) {
    const Checkpoint from = read_checkpoint(shop.folder("whole", 2));
    Json state, settings;
    const JsonField before(from.state, "state"), settings_before = before.at("settings");
    for (const auto& [name, value] : before.members()) state[name] = value;
    for (const auto& [name, value] : settings_before.members())
      if (name != without) settings[name] = value;
    state["settings"] = settings;
    std::vector<CheckpointFile> files;
    for (const std::string& name : from.files)
      if (name != "state.json")
        files.push_back(
            {name, [&, name](const std::string& path) { std::filesystem::copy_file(from.file(name), path); }});
    make_folder(shop.path + "/" + run);
    write_checkpoint(shop.path + "/" + run, step, files, state);
    const Workshop::Result result = shop.run(shop.resume(run, 1));
    CHECK_MESSAGE(result.exit == 0, result.out);
    return shop.file(run, 4, "model.safetensors") == shop.file("whole", 4, "model.safetensors");
  };
  CHECK(remade("all", 2, ""));
  CHECK_FALSE(remade("no_seed", 2, "seed"));
  CHECK_FALSE(remade("wrong_step", 1, ""));
}

// ---- signals ------------------------------------------------------------------------------------------------------

namespace {

// The run has ended as it should after a signal: exit 0, a sentence, one whole checkpoint newest, and nothing half-made
// beside it.
void check_stopped(const FaultShop& shop, Process& process, const std::string& run, int64_t last_step) {
  CHECK(process.wait() == 0);
  const std::string out = shop.printed();
  CHECK_MESSAGE(has(out, str("stopped after step ", last_step, " of 1000000, saved; go on with: train_gca train --out ",
                             shop.path, "/", run, " --resume")),
                out.substr(out.size() > 500 ? out.size() - 500 : 0));
  CHECK(open_checkpoint(shop.path + "/" + run).step == last_step);
  for (const std::string& name : list_folder(shop.path + "/" + run)) CHECK_FALSE(has(name, "partial"));
}

}  // namespace

TEST_CASE(
    "signals: Ctrl-C and what batch systems send, in a step, once or twice, ends the run after it with a checkpoint") {
  const FaultShop shop;
  for (const std::vector<int>& signals : {std::vector<int>{SIGTERM},
                                          {SIGINT},
                                          {SIGHUP},
                                          {SIGUSR1},
                                          {SIGUSR2},
                                          {SIGXCPU},
                                          {SIGTERM, SIGINT},
                                          {SIGINT, SIGINT},
                                          {SIGUSR1, SIGTERM},
                                          {SIGXCPU, SIGXCPU}}) {
    CAPTURE(signals[0]);
    remove_tree(shop.path + "/run");
    Process process(shop.program, shop.tiny("run", "--steps 1000000 --save-every 1000000", {{"batch", "500"}}),
                    shop.output());
    REQUIRE(shop.logged("run", 2));
    process.freeze();
    const int64_t before = std::ssize(shop.losses("run"));
    kill(process.id, signals[0]);
    process.go_on();
    if (signals.size() > 1) {
      usleep(500);
      kill(process.id, signals[1]);
    }
    CHECK(process.wait() == 0);
    const int64_t after = std::ssize(shop.losses("run"));
    CHECK(after <= before + 1);
    check_stopped(shop, process, "run", after);
  }
}

TEST_CASE("signals: in a validation, which is given up, and in a save, which is finished") {
  const FaultShop shop;
  for (const int number : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) {
    remove_tree(shop.path + "/run");
    Process process(
        shop.program,
        shop.tiny("run",
                  "--steps 1000000 --eval-every 1 --eval-rows 1000000 --val-data '" + shop.path + "/shards/t_train_*'",
                  {{"chunks", "20"}}),
        shop.output());
    REQUIRE(shop.logged("run", 1));  // a step's line comes before its validation, which takes long
    usleep(20000);
    kill(process.id, number);
    check_stopped(shop, process, "run", 1);
    CHECK_FALSE(has(shop.printed(), "validation after"));
  }
  for (const int at : {0, 3, 30, 100, 150}) {
    CAPTURE(at);
    remove_tree(shop.path + "/run");
    bool traced = true;
    Process process(shop.program, shop.tiny("run", "--steps 1000000 --save-every 2"), shop.output(),
                    [] { ptrace(PTRACE_TRACEME, 0, nullptr, nullptr); });
    const bool there = run_to_call_of_save(process, at, traced, [&] {
      kill(process.id, SIGTERM);
      kill(process.id, SIGINT);
    });
    if (!traced) return skip("ptrace is not allowed here");
    REQUIRE(there);
    check_stopped(shop, process, "run", 2);
  }
}

TEST_CASE("signals: what is ignored stays ignored (nohup), and output that nobody reads any more does not end a run") {
  const FaultShop shop;
  {
    Process process(shop.program, shop.tiny("run", "--steps 1000000", {{"batch", "100"}}), shop.output(), [] {
      signal(SIGHUP, SIG_IGN);
      signal(SIGUSR1, SIG_IGN);
    });
    REQUIRE(shop.logged("run", 2));
    kill(process.id, SIGHUP);
    kill(process.id, SIGUSR1);
    const int more = static_cast<int>(std::ssize(shop.losses("run"))) + 5;
    CHECK(shop.logged("run", more));
    kill(process.id, SIGTERM);
    CHECK(process.wait() == 0);
  }
  int ends[2];
  REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
  Process process(shop.program, shop.tiny("piped", "--steps 1000000", {{"batch", "100"}}), ends[1]);
  REQUIRE(shop.logged("piped", 2));
  ::close(ends[0]);
  const int more = static_cast<int>(std::ssize(shop.losses("piped"))) + 5;
  CHECK(shop.logged("piped", more));
  kill(process.id, SIGTERM);
  CHECK(process.wait() == 0);
  CHECK(open_checkpoint(shop.path + "/piped").step >= more);
}

// ---- disk ---------------------------------------------------------------------------------------------------------

TEST_CASE("disk: full, read-only or gone for a while: training says so, goes on, and saves again when it can") {
  const FaultShop shop;
  const std::string run = shop.path + "/run";
  struct Outage {
    const char* name;
    std::function<void(pid_t)> begin, end;
    const char* words;
    bool log_too;
  };
  const auto limit = [](pid_t id, rlim_t bytes) {
    const rlimit to{bytes, RLIM_INFINITY};
    CHECK(prlimit(id, RLIMIT_FSIZE, &to, nullptr) == 0);
  };
  const Outage outages[] = {
      // In the middle of the log's next line, and far below a checkpoint's files.
      {"full", [&](pid_t id) { limit(id, std::filesystem::file_size(run + "/log.jsonl") + 10); },
       [&](pid_t id) { limit(id, RLIM_INFINITY); }, "File too large; raise the limit on a file's size", true},
      {"read-only", [&](pid_t) { chmod(run.c_str(), 0555); }, [&](pid_t) { chmod(run.c_str(), 0755); },
       "Permission denied; check the permissions", false},
      {"gone", [&](pid_t) { rename_path(run, run + ".moved"); }, [&](pid_t) { rename_path(run + ".moved", run); },
       "cannot list the folder", true},
  };
  for (const Outage& outage : outages) {
    CAPTURE(outage.name);
    remove_tree(run);
    int ends[2];  // what it prints must not meet the limit on files
    REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
    REQUIRE(fcntl(ends[1], F_SETPIPE_SZ, 1 << 20) > 0);
    Process process(shop.program, shop.tiny("run", "--steps 1000000 --save-every 3 --keep 2", {{"batch", "200"}}),
                    ends[1], [] {
                      prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE);  // root, too, shall need permissions
                    });
    std::string out;
    const auto read_output = [&] {
      char text[65536];
      const ssize_t n = ::read(ends[0], text, sizeof text);
      REQUIRE(n > 0);  // 0: it has ended
      return out.append(text, n);
    };
    REQUIRE(shop.wait_for([&] { return shop.newest("run") >= 3; }));
    process.freeze();
    const bool saving = std::filesystem::exists(checkpoint_folder(run, shop.newest("run") + 3) + ".partial");
    outage.begin(process.id);
    process.go_on();
    int failed = 0;  // three saves fail, and training goes on
    for (size_t at = 0; failed < 3 && out.size() < (1 << 20);)
      if (const size_t next = read_output().find(" was not saved: ", at); next != out.npos) {
        failed++;
        at = next + 1;
      }
    CHECK(failed == 3);
    CHECK_MESSAGE(has(out, outage.words), out);
    CHECK(has(out, "(older checkpoints are as they were)"));
    process.freeze();
    outage.end(process.id);
    // What is there now was there before, or was being saved just then; it is whole.
    const int64_t last = shop.newest("run");
    CHECK(open_checkpoint(run).step == last);
    CHECK(last <= 9);
    CHECK((saving || list_checkpoints(run).size() <= 2));
    shop.losses("run");  // whole lines of JSON
    process.go_on();
    CHECK(shop.wait_for([&] { return shop.newest("run") > last + 6; }));
    kill(process.id, SIGTERM);
    while (!has(read_output(), "stopped after step")) {}
    CHECK(process.wait() == 0);
    ::close(ends[0]);
    CHECK(has(out, "log.jsonl") == outage.log_too);
    CHECK(open_checkpoint(run).step == shop.losses("run").rbegin()->first);
    CHECK(list_checkpoints(run).size() == 2);
    for (const std::string& name : list_folder(run)) CHECK_FALSE(has(name, "partial"));
  }
}

TEST_CASE("disk: a run that cannot save at its end says so and fails; one that cannot begin says so at once") {
  const FaultShop shop;
  make_folder(shop.path + "/locked");
  chmod((shop.path + "/locked").c_str(), 0555);
  write_file(shop.path + "/plain", "a file");
  const auto fails = [&](const std::string& out, const std::string& words, rlim_t bytes) {
    Process process(shop.program, shop.tiny(out, "--steps 3"), shop.output(), [bytes] {
      prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE);
      const rlimit to{bytes, bytes};
      setrlimit(RLIMIT_FSIZE, &to);
    });
    CHECK(process.wait() == 1);
    CHECK_MESSAGE(has(shop.printed(), words), shop.printed());
    CHECK(shop.newest(out) == -1);
  };
  fails("run", "step 3 was not saved: cannot write '", 8000);
  fails("locked", "lock': Permission denied", RLIM_INFINITY);
  fails("locked/run", "cannot make the folder", RLIM_INFINITY);
  std::filesystem::rename(shop.path + "/plain", shop.path + "/run2");
  Process process(shop.program, shop.tiny("run2", "--steps 3"), shop.output());
  CHECK(process.wait() == 1);
  CHECK_MESSAGE(has(shop.printed(), "cannot make the folder '"), shop.printed());
  CHECK(read_file(shop.path + "/run2", 100) == "a file");
}

TEST_CASE("disk: a file system without locks, or whose folders cannot be written through, costs a warning") {
  const Workshop shop;
  write_file(shop.path + "/no.c", R"(#include <errno.h>
#include <sys/stat.h>
int flock(int fd, int how) { (void)fd; (void)how; errno = ENOSYS; return -1; }
int fsync(int fd) {
  struct stat s;
  if (fstat(fd, &s) == 0 && !S_ISDIR(s.st_mode)) return 0;
  errno = CODE;
  return -1;
})");
  for (const auto& [code, exit] : {std::pair{"ENOTSUP", 0}, {"EACCES", 0}, {"EIO", 1}}) {
    CAPTURE(code);
    const std::string library = shop.path + "/no_" + code + ".so";
    if (system(("cc -shared -fPIC -DCODE=" + std::string(code) + " -o " + library + " " + shop.path + "/no.c").c_str()))
      return skip("no C compiler");
    const auto without = [&](const std::string& arguments) {
      const std::string log = shop.path + "/without.log";
      const int status =
          system(("LD_PRELOAD=" + library + " " + shop.program + " " + arguments + " > " + log + " 2>&1").c_str());
      return Workshop::Result{WEXITSTATUS(status), read_file(log, size_t{1} << 20)};
    };
    const Workshop::Result run = without(shop.tiny_training(code, {{"steps", "2"}}));
    CAPTURE(run.out);
    CHECK(run.exit == exit);
    CHECK(says(run, "lock' cannot be locked"));
    CHECK(says(run, "this file system has no locks"));
    CHECK(says(run, "through to the disk"));
    if (exit == 0)
      CHECK(without("tokenize --val 0 --out " + shop.path + "/s/" + code + " " + shop.path + "/text.txt").exit == 0);
  }
}

TEST_CASE("data: a run that goes on says that the pattern which leads nowhere is the checkpoint's") {
  const Workshop shop;
  const std::string run = shop.path + "/run";
  REQUIRE(shop.run(shop.tiny_training("run", {{"steps", "2"}})).exit == 0);
  std::filesystem::rename(shop.path + "/shards", shop.path + "/moved");
  shop.fails("train --resume --out " + run, 1, "the checkpoint in '" + run + "' remembers this pattern");
  shop.fails("train --resume --out " + run, 1, "'" + shop.path + "' is there, but in it is no 'shards'");
  CHECK(shop.run("train --resume --out " + run + " --data '" + shop.path + "/moved/t_train_*'").exit == 0);
}

TEST_CASE("disk: of two runs on one folder the second is refused") {
  const FaultShop shop;
  Process first(shop.program, shop.tiny("run", "--steps 1000000 --save-every 3", {{"batch", "100"}}), shop.output());
  REQUIRE(shop.wait_for([&] { return shop.newest("run") >= 3; }));
  for (const std::string& second : {shop.tiny("run", "--steps 5"), shop.resume("run", 1)}) {
    Process process(shop.program, second, shop.output("second"));
    REQUIRE(process.ends_within(20));
    CHECK(process.wait() == 1);
    CHECK_MESSAGE(has(shop.printed("second"), str("is being written by another run, process ", first.id)),
                  shop.printed("second"));
  }
  kill(first.id, SIGTERM);
  CHECK(first.wait() == 0);
  const Workshop::Result third = shop.run(shop.tiny("run", "--steps 5"));
  CHECK(third.exit == 1);
  CHECK(says(third, "holds a run already"));
  Process inside(shop.program, "train --resume --out " + shop.folder("run", shop.newest("run")), shop.output("inside"));
  REQUIRE(inside.ends_within(20));
  CHECK(inside.wait() == 2);
  CHECK(has(shop.printed("inside"), "expected a run's folder, found one of its checkpoints"));
}

// ---- numbers that are not finite ----------------------------------------------------------------------------------

TEST_CASE(
    "not finite: a run whose loss overflows changes no weight and no optimiser any more, and ends after ten steps") {
  const FaultShop shop;
  // The decay of lr 10 and weight decay 10 multiplies matrices by -99 a step, until attention overflows.
  const Workshop::Result result = shop.run(shop.tiny("run",
                                                     "--steps 1000 --save-every 1 --keep 1000 --lr 10 --lr-final 10 "
                                                     "--weight-decay 10 --warmup 0 --eval-every 12 --val-data '" +
                                                         shop.path + "/shards/t_val_*'"));
  CHECK(result.exit == 1);
  CHECK(says(result, "SKIPPED: not finite (10 in a row)"));
  CHECK_FALSE(says(result, "(11 in a row)"));
  const int64_t last = shop.newest("run");
  CHECK_MESSAGE(says(result,
                     "ten steps in a row had a loss or a gradient that is not finite, and changed nothing; the last "
                     "good checkpoint is " +
                         shop.folder("run", last)),
                result.out);
  REQUIRE(last > 9);
  const int64_t good = last - 9;  // nine skipped steps were saved after it
  for (int64_t step = good + 1; step <= last; step++)
    for (const char* name : {"model.safetensors", "optimizer.safetensors"})
      CHECK(shop.file("run", step, name) == shop.file("run", good, name));
  CHECK(shop.file("run", good, "model.safetensors") != shop.file("run", good - 1, "model.safetensors"));
  const Json &before = open_checkpoint(shop.folder("run", good)).state,
             after = open_checkpoint(shop.folder("run", last)).state;
  CHECK(JsonField(before, "state").at("adam_steps").integer() == good);
  CHECK(JsonField(after, "state").at("adam_steps").integer() == good);
  CHECK(JsonField(after, "state").at("skipped").integer() == 9);
  // It can still be gone on from, and then ends at once: the tenth in a row.
  const Workshop::Result resumed = shop.run("train --resume --out " + shop.path + "/run");
  CHECK(resumed.exit == 1);
  CHECK_MESSAGE(says(resumed, "ten steps in a row"), resumed.out);
}

TEST_CASE("not finite: a validation whose loss is not finite is no best one") {
  const FaultShop shop;
  REQUIRE(shop.run(shop.tiny("run", "--steps 1")).exit == 0);
  std::string weights = shop.file("run", 1, "model.safetensors");
  const float huge = 3e38f;
  const SafetensorsFile file = SafetensorsFile::open(shop.folder("run", 1) + "/model.safetensors");
  const SafetensorsTensor gain = file.at("model.norm.weight");  // of the last norm: logits overflow
  for (int64_t i = 0; i < gain.count; i++) memcpy(&weights[gain.offset_bytes + 4 * i], &huge, 4);
  write_file(shop.path + "/huge.safetensors", weights);
  const Workshop::Result result =
      shop.run(shop.tiny("huge", "--steps 3 --eval-every 1 --val-data '" + shop.path + "/shards/t_val_*' --init " +
                                     shop.path + "/huge.safetensors"));
  CHECK_MESSAGE(result.exit == 0, result.out);
  CHECK_MESSAGE(says(result, "nan, perplexity"), result.out);
  CHECK(list_checkpoints(shop.path + "/huge").size() == 1);  // of the end; a best one would have been saved
  CHECK(JsonField(open_checkpoint(shop.folder("huge", 3)).state, "state").at("best_step").integer(-1) == -1);
}

// ---- data and state -----------------------------------------------------------------------------------------------

TEST_CASE("data: a shard that fails in the middle of a run costs no step: what was made is saved first") {
  const FaultShop shop;
  const std::string shard = shop.path + "/shards/t_train_000000.bin";
  Process process(shop.program, shop.tiny("run", "--steps 1000000 --save-every 1000000", {{"batch", "100"}}),
                  shop.output());
  REQUIRE(shop.logged("run", 5));
  REQUIRE(truncate(shard.c_str(), 2000) == 0);
  CHECK(process.wait() == 1);
  CHECK_MESSAGE(has(shop.printed(), "t_train_000000.bin' ends at byte "), shop.printed());
  CHECK(open_checkpoint(shop.path + "/run").step == shop.losses("run").rbegin()->first);
  const Workshop::Result resumed = shop.run(shop.resume("run", 1));
  CHECK(resumed.exit == 1);
  CHECK(says(resumed, "the header says"));
}

TEST_CASE("data: ids outside the vocabulary, in shards that do not say whose they are") {
  const FaultShop shop;
  const std::string shard = shop.path + "/shards/t_train_000000.bin";
  std::string bytes = read_file(shard, 1 << 24);
  memset(&bytes[12], 0, 8);  // the tokenizer's hash: unknown
  for (size_t i = 1024; i + 1 < bytes.size(); i += 2) {
    bytes[i] = '\x08';
    bytes[i + 1] = '\x01';
  }  // 264; V = 263
  write_file(shard, bytes);
  const Workshop::Result result = shop.run(shop.tiny("run", "--steps 3"));
  CHECK(result.exit == 1);
  CHECK(says(result, "do not say which tokenizer made them"));
  CHECK_MESSAGE(
      says(result, "t_train_000000.bin': expected token ids below 263, the size of the vocabulary, found 264"),
      result.out);
}

TEST_CASE("state: without a field, with a wrong one or from the future it is refused, by the name of file and field") {
  const FaultShop shop;
  REQUIRE(shop.run(shop.tiny("run", "--steps 4 --save-every 2 --keep 9")).exit == 0);
  const Checkpoint from = read_checkpoint(shop.folder("run", 2));
  // Resumes from step 2 with another state under a manifest that fits it.
  const auto resumed = [&](const Json& state) {
    remove_tree(shop.path + "/other");
    make_folder(shop.path + "/other");
    std::vector<CheckpointFile> files;
    for (const std::string& name : from.files)
      if (name != "state.json")
        files.push_back(
            {name, [&, name](const std::string& path) { std::filesystem::copy_file(from.file(name), path); }});
    write_checkpoint(shop.path + "/other", 2, files, state);
    return shop.run(shop.resume("other", 1));
  };
  CHECK(resumed(from.state).exit == 0);
  const JsonField whole(from.state, "state");
  for (const auto& [left_out, value] : whole.members()) {
    if (left_out == "device" || left_out == "build" || left_out == "best_val_loss")
      continue;  // told for people; of no best step
    CAPTURE(left_out);
    Json state;
    for (const auto& [name, kept] : whole.members())
      if (name != left_out) state[name] = kept;
    const Workshop::Result missing = resumed(state);
    CHECK(missing.exit == 1);
    CHECK_MESSAGE(says(missing, "step_00000002/state.json: the field \"" + left_out + "\" is missing"), missing.out);
    state[left_out] = std::vector<int64_t>{1};
    const Workshop::Result mistyped = resumed(state);
    CHECK(mistyped.exit == 1);
    CHECK_MESSAGE(says(mistyped, "state.json: " + left_out), mistyped.out);
  }
  const auto with_setting = [&](const char* name, const Json& value) {
    Json state = from.state;
    state["settings"][name] = value;
    const Workshop::Result result = resumed(state);
    CHECK(result.exit == 1);
    CHECK_MESSAGE(says(result, "state.json"), result.out);
    return result.out;
  };
  CHECK(has(with_setting("telepathy", "on"),
            "the setting \"telepathy\" is not known: a newer train_gca made this checkpoint"));
  CHECK(has(with_setting("width", 8), "settings.width: expected a string, found 8"));
  CHECK(has(with_setting("width", "9"), "--heads: expected a divisor of --width"));
  CHECK(has(with_setting("width", "99999999999"), "--width: expected a whole number from 1 to 65536"));
  CHECK(has(with_setting("null-slot", ""), "--null-slot: expected on or off"));
  // Sizes that are not those of the weights.
  Json state = from.state;
  state["settings"]["ffn"] = "16";
  const Workshop::Result wider = resumed(state);
  CHECK(wider.exit == 1);
  CHECK_MESSAGE(says(wider,
                     "model.safetensors': tensor 'model.lower_layers.0.mlp.gate_proj.weight': expected the shape "
                     "[16,8], found [8,8]"),
                wider.out);
}

// ---- command line -------------------------------------------------------------------------------------------------

TEST_CASE("command line: what is wrong is said with the flag's name, before anything is made") {
  const FaultShop shop;
  const std::string data = " --data '" + shop.path + "/shards/t_train_*'", model = written(tiny_model),
                    out = " --out " + shop.path + "/new ";
  REQUIRE(shop.run(shop.tiny("run", "--steps 2")).exit == 0);
  const std::vector<std::string> before = list_folder(shop.path);
  const auto fails = [&](const std::string& arguments, int exit, const std::string& words) {
    shop.fails(arguments, exit, words);
    CHECK(list_folder(shop.path) == before);
  };
  // Unknown, missing, bad.
  fails("train --stepz 3", 2, "train has no flag --stepz, did you mean --steps?");
  fails("eval --checkpont x", 2, "did you mean --checkpoint?");
  fails("train --xyzzyxyzzy 3", 2, "train has no flag --xyzzyxyzzy; see train_gca train --help");
  fails("trane", 2, "did you mean train?");
  fails("train --steps --out x", 2, "--steps needs a value: N");
  fails("train --steps", 2, "--steps needs a value: N");
  fails("train --resume=yes", 2, "--resume takes no value, found 'yes'");
  fails("train stray", 2, "train takes flags only, found 'stray'");
  for (const char* bad : {"12x", "1.5", "", "-3", "1e3", "0x10", "99999999999999999999", "8T", "K"})
    fails(str("train --steps '", bad, "'"), 2, "--steps: expected a whole number from 0 to 2147483648");
  for (const char* bad : {"x", "", "nan", "inf", "-1", "11", "1,5"})
    fails(str("train --lr '", bad, "'"), 2, "--lr: expected a number from 0 to 10");
  for (const char* bad : {"1", "1.0", "2"})
    fails(str("train --beta2 ", bad), 2, "--beta2: expected a number from 0 to 0.999999");
  for (const char* bad : {"1,,2", "1,", ",", "1;2"})
    fails(str("train --groups '", bad, "'"), 2, "--groups: expected a whole number from 1 to 1024");
  fails("train --device gpu", 2, "--device: expected auto|cpu|cuda, found 'gpu'");
  fails("generate --checkpoint " + shop.path + "/run --prompt-ids 263", 2,
        "--prompt-ids: expected ids below 263, the model's vocabulary, found 263");
  // Contradictions.
  fails("train --steps 3 --tokens 100 " + model + data + out, 2, "train needs either --steps or --tokens");
  fails("train --steps 3 --batch 2 --micro-batch 3 " + model + data + out, 2,
        "--micro-batch: expected at most --batch, 2, found 3");
  fails("train --steps 3 --heads 3 --width 8" + data + out, 2, "--heads: expected a divisor of --width");
  fails("train --resume", 2, "--resume needs --out RUN");
  fails("train --resume --out " + shop.path + "/run --init x", 2, "--init: the run was started with ''");
  fails("eval --checkpoint x --data y --no-retrieval --random-retrieval", 2, "exclude each other");
  fails("generate --checkpoint x --prompt a --prompt-ids 1", 2, "exclude each other");
  fails("train --precision bf16 --device cpu --steps 3 " + model + data, 2, "train needs --out");
  fails("export --checkpoint x", 2, "export needs --out");
  fails("export --checkpoint x --out y --dtype f8", 2, "--dtype: expected float|bf16, found 'f8'");
  // Paths that cannot be read.
  const std::string none = shop.path + "/none";
  fails("train --steps 3 --data '" + none + "_*'" + " --out " + shop.path + "/run ", 1, "holds a run already");
  fails("eval --checkpoint " + none + " --data x", 1,
        "cannot list the folder '" + none + "': No such file or directory; check the path");
  fails("eval --checkpoint " + shop.path + "/run --data " + none, 1, "no file matches '" + none + "'");
  fails("generate --checkpoint " + shop.path + "/run --context " + none, 1, "cannot open '" + none + "': No such file");
  fails("inspect --checkpoint " + shop.path + "/run --text " + shop.path, 1,
        "is a folder, a pipe or a device: expected a regular file");
  fails("train --steps 3 --tokenizer " + none + data + out, 1, "cannot open '" + none + "'");
  fails("train --steps 3 --tokenizer " + shop.path + "/text.txt" + data + out, 1, "text.txt': expected a tokenizer");
  fails("train --steps 3 --init " + shop.path + data + out, 1, "has no checkpoint");
  fails("export --checkpoint " + none + " --out " + shop.path + "/x", 1, "cannot list the folder");
  fails("verify " + none, 1, "cannot open '" + none + "'");
  fails("tokenize --out " + shop.path + "/shards/t " + shop.path + "/text.txt", 1,
        "is there already: remove the old shards");
  // A length that fills no chunk.
  write_file(shop.path + "/log", "");  // is there for every run
  const std::string few = shop.path + "/shards/few.txt";
  write_file(few, "abcde");
  fails("inspect --checkpoint " + shop.path + "/run --text " + few, 1,
        "expected at least the 7 tokens of one chunk, found 5");
  fails("eval --checkpoint " + shop.path + "/run --chunks 1M" + data, 1,
        "expected at least the 7340033 tokens of one row of 1048576 chunks");
  fails("train --steps 3 --chunks 0 " + model + data + out, 2, "--chunks: expected a whole number from 1");
  // Too large for any memory, said before anything is allocated.
  fails("generate --count 64G --checkpoint " + shop.path + "/run", 1,
        "are free; use a shorter --context or a smaller --count");
  fails("info --batch 1M --chunks 1M --chunk 4096 --width 65536 --heads 512", 1,
        "rows of 4294967296 slots of this model need over 2^58 numbers of memory");
}

TEST_CASE("command line: a model too large for the memory is refused before it is allocated, with what would fit") {
  const FaultShop shop;
  const auto fails = [&](const std::string& more, const std::string& words) {
    remove_tree(shop.path + "/new");
    const Workshop::Result result =
        shop.run("train --steps 3 --data '" + shop.path + "/shards/t_train_*' --out " + shop.path + "/new " + more);
    CAPTURE(more);
    CAPTURE(result.out);
    CHECK(result.exit == 1);
    CHECK(says(result, words));
    CHECK(shop.newest("new") == -1);
  };
  fails("--width 65536 --heads 512 --ffn 1M --lower 100 --groups 100",
        "not even one row fits: use fewer --chunks or a smaller model");
  fails("--model tiny --batch 1M", "--micro-batch ");
  fails(
      "--model tiny --chunks 8 --batch 1M --width 65536 --heads 512 --ffn 1M --lower 1000 --groups 20 --chunk 4096 "
      "--topk 32",
      "need over 2^58 numbers");
}

TEST_CASE("tokenize: a run killed at any time leaves nothing that reads as its shards, and the next one clears up") {
  const Workshop shop;
  std::string text;
  for (int i = 0; i < 200000; i++) text += str("line ", i, " of a text that makes some tens of shards\n");
  write_file(shop.path + "/long.txt", text);
  const std::string tokenize =
      "tokenize --threads 1 --shard-tokens 200K --out " + shop.path + "/k/x " + shop.path + "/long.txt";
  const auto tokens = [&] { return shop.run("info --first 0 --data '" + shop.path + "/k/x_train_*'").out; };
  REQUIRE(shop.run(tokenize).exit == 0);
  const std::string whole = tokens();
  REQUIRE(has(whole, " shards, "));
  const auto count = [&](const std::string& part) {
    int64_t n = 0;
    for (const std::string& name : list_folder(shop.path + "/k")) n += has(name, part);
    return n;
  };
  // Killed once while the shards have no names yet, and once while they get them.
  for (const auto& [part, least] : {std::pair<std::string, int>{".partial", 5}, {".bin", 3}}) {
    CAPTURE(part);
    bool hit = false;
    for (int attempt = 0; attempt < 20 && !hit; attempt++) {
      remove_tree(shop.path + "/k");
      make_folder(shop.path + "/k");
      Process process(shop.program, tokenize, ::open("/dev/null", O_WRONLY | O_CLOEXEC));
      while (count(part) < least && !process.ends_within(0)) {}
      kill(process.id, SIGKILL);
      process.wait();
      hit = count(".partial") > 0;
    }
    REQUIRE(hit);
    const Workshop::Result left = shop.run("info --first 0 --data '" + shop.path + "/k/x_train_*'");
    CAPTURE(left.out);
    CHECK(left.exit == 1);
    CHECK((has(left.out, "unfinished set") || has(left.out, "no file matches")));
    REQUIRE(shop.run(tokenize).exit == 0);
    CHECK(tokens() == whole);
    CHECK(count(".partial") + count(".unfinished") == 0);
  }
}

TEST_CASE("limits: where threads, memory or open files do not suffice, a sentence says so and the program ends") {
  const Workshop shop;
  const auto limited = [&](const std::string& limit, const std::string& arguments) {
    const std::string log = shop.path + "/limited";
    const int status = system(
        ("( " + limit + "; exec timeout 20 " + shop.program + " " + arguments + " ) > " + log + " 2>&1").c_str());
    return Workshop::Result{WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(log, size_t{1} << 20)};
  };
  if (limited("ulimit -v 300000", "help").exit != 0)
    return skip("the program does not start in 300 MB of addresses (a sanitizer's)");
  const std::string tokenize = "tokenize --out " + shop.path + "/b/x " + shop.path + "/text.txt --threads ",
                    train = shop.training("many") + " --steps 1 --threads ";
  for (const std::string& command : {tokenize, train}) {
    CAPTURE(command);
    const Workshop::Result many = limited("ulimit -v 300000", command + "64");
    CAPTURE(many.out);
    CHECK(many.exit == 1);
    CHECK(says(many, "expected 64 threads"));
    CHECK(says(many, "--threads"));
    // Whatever fails first: a sentence that ends the program, or it had enough.
    for (const char* limit : {"ulimit -v 60000", "ulimit -v 100000", "ulimit -v 150000", "ulimit -v 400000",
                              "ulimit -n 5", "ulimit -n 7"}) {
      CAPTURE(limit);
      for (const char* made : {"/b", "/many"}) remove_tree(shop.path + made);
      const Workshop::Result result = limited(limit, command + "12");
      CAPTURE(result.out);
      CHECK((result.exit == 0 || result.exit == 1));
      CHECK_FALSE(says(result, "std::"));
      CHECK_FALSE(says(result, "terminate called"));
      if (result.exit == 1)
        CHECK((says(result, "out of memory") || says(result, " are free; ") || says(result, "--threads") ||
               says(result, "ulimit")));
    }
  }
}
