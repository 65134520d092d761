// The launchers' variables, and a launcher of our own: fork, and wait.
#include "ranks/world.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <iterator>
#include <type_traits>
#include <vector>

#include "base/files.h"
#include "ranks/sockets.h"

namespace gca {

namespace {

template <class Number>
Number number_of(const char* name, const std::string& value, Number low, Number high) {
  Number number{};
  const char* end = value.c_str();
  if constexpr (std::is_floating_point_v<Number>) {  // std::from_chars would do, where every library had it for these
    char* stop = nullptr;
    number = strtod(value.c_str(), &stop);
    end = stop;
  } else {
    end = std::from_chars(value.data(), value.data() + value.size(), number).ptr;  // too large: number stays 0
  }
  if (value.empty() || end != value.data() + value.size() || !(number >= low && number <= high))
    throw Error(str(name, ": expected a number from ", low, " to ", high, ", found '", value, "'"));
  return number;
}

struct Launcher {
  const char *rank, *size, *local_rank;
};
constexpr Launcher launchers[] = {{"RANK", "WORLD_SIZE", "LOCAL_RANK"},
                                  {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"},
                                  {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"}};
constexpr int most_ranks = 4096, default_port = 29501, last_port = 65535;

void read_timeout(World& world, const Environment& environment) {
  if (const auto seconds = environment("GCA_TIMEOUT"))
    world.patience = number_of<double>("GCA_TIMEOUT", *seconds, 0.2, 1e6);
}

int port_of(const Environment& environment) {
  if (const auto port = environment("GCA_PORT")) return number_of("GCA_PORT", *port, 1, last_port);
  if (const auto port = environment("MASTER_PORT")) return number_of("MASTER_PORT", *port, 1, last_port - 1) + 1;
  return default_port;
}

}  // namespace

std::optional<std::string> of_environment(const char* name) {
  const char* value = getenv(name);
  return value && *value ? std::optional<std::string>(value) : std::nullopt;
}

std::string first_host(const std::string& list) {
  const size_t bracket = list.find('['), comma = list.find(',');
  if (bracket == std::string::npos || comma < bracket) return list.substr(0, comma);
  const size_t end = list.find_first_of(",-]", bracket + 1), close = list.find(']', bracket);
  if (close == std::string::npos)
    throw Error("SLURM_JOB_NODELIST: expected hosts as n[01-04],m, found '" + list + "'; set MASTER_ADDR");
  const size_t after = list.find(',', close);
  return list.substr(0, bracket) + list.substr(bracket + 1, end - bracket - 1) +
         list.substr(close + 1, (after == std::string::npos ? list.size() : after) - close - 1);
}

World world_of(const Environment& environment) {
  World world;
  read_timeout(world, environment);
  for (const Launcher& launcher : launchers) {
    const auto rank = environment(launcher.rank), size = environment(launcher.size),
               local_rank = environment(launcher.local_rank);
    // SLURM and Open MPI leave a size alone where they start nothing.
    if (&launcher == launchers && !rank != !size)
      throw Error(str(rank ? launcher.size : launcher.rank, ": expected one beside ",
                      rank ? launcher.rank : launcher.size, ", found none; set both, or neither to train alone"));
    if (!rank || !size) continue;
    world.size = number_of(launcher.size, *size, 1, most_ranks);
    world.rank = number_of(launcher.rank, *rank, 0, world.size - 1);
    world.local_rank = local_rank ? number_of(launcher.local_rank, *local_rank, 0, most_ranks - 1) : 0;
    if (world.size == 1) return world;
    world.port = port_of(environment);
    for (const char* name : {"GCA_JOB", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"})
      world.job += environment(name).value_or("") + "/";
    const auto address = environment("MASTER_ADDR"), hosts = environment("SLURM_JOB_NODELIST"),
               on_this_host = environment("OMPI_COMM_WORLD_LOCAL_SIZE");
    if (address) world.address = *address;
    else if (hosts) world.address = first_host(*hosts);
    else if (on_this_host != size)
      throw Error(str("MASTER_ADDR: expected the name of the host that rank 0 runs on, found nothing; set it for all ",
                      world.size, " ranks"));
    return world;
  }
  return world;
}

// ---- the launcher of our own --------------------------------------------------------------------------------------
namespace {

std::atomic<int> signal_to_pass_on = 0;
void note_signal(int number) { signal_to_pass_on = number; }

// While it lives, stop_signals are noted, but for those that are ignored (nohup, a background job).
class NotedSignals {
 public:
  NotedSignals() {
    for (size_t i = 0; i < std::size(stop_signals); i++) {
      sigaction(stop_signals[i], nullptr, &before_[i]);
      if (before_[i].sa_handler == SIG_IGN) continue;
      struct sigaction action = {};
      action.sa_handler = note_signal;
      sigaction(stop_signals[i], &action, nullptr);
    }
  }
  ~NotedSignals() {
    for (size_t i = 0; i < std::size(stop_signals); i++) sigaction(stop_signals[i], &before_[i], nullptr);
  }
  NotedSignals(const NotedSignals&) = delete;
  NotedSignals& operator=(const NotedSignals&) = delete;

 private:
  struct sigaction before_[std::size(stop_signals)];
};

// Until all have ended. Those that are left when one has failed end by themselves, within the time, or are ended.
int wait_for_ranks(std::vector<pid_t> ranks, double patience) {
  const NotedSignals noted;
  int exit_code = 0;
  double failed_at = 0;
  for (size_t alive = ranks.size(); alive > 0;) {
    const int passed_on = signal_to_pass_on.exchange(0);
    for (size_t r = 0; r < ranks.size(); r++) {
      if (ranks[r] <= 0) continue;
      if (passed_on) kill(ranks[r], passed_on);
      if (failed_at > 0 && monotonic_seconds() > failed_at + std::max(1.0, patience / 4)) kill(ranks[r], SIGKILL);
      int status = 0;
      if (waitpid(ranks[r], &status, WNOHANG) != ranks[r]) continue;
      alive--;
      if (WIFSIGNALED(status))
        print_error("train_gca: rank ", r, ", process ", ranks[r], ", was ended by signal ", WTERMSIG(status), " (",
                    strsignal(WTERMSIG(status)), ")\n");
      ranks[r] = 0;
      const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
      if (code == 0) continue;
      if (failed_at == 0) failed_at = monotonic_seconds();
      if (exit_code == 0) exit_code = code;
    }
    usleep(10000);
  }
  return exit_code;
}

}  // namespace

std::optional<World> launch(int size, int& exit_code) {
  World world;
  world.size = size;
  read_timeout(world, of_environment);
  const auto asked = of_environment("GCA_PORT");
  Socket listening = Socket::listen(world.address, asked ? number_of("GCA_PORT", *asked, 1, last_port) : 0);
  world.port = listening.port();
  const pid_t parent = getpid();
  world.job = str("launched by ", parent, " at ", monotonic_seconds());
  fflush(nullptr);  // or each rank would print it again
  std::vector<pid_t> ranks;
  for (world.rank = 0; world.rank < size; world.rank++) {
    const pid_t id = fork();
    if (id < 0) {
      const int code = errno;
      for (const pid_t started : ranks) kill(started, SIGKILL);
      throw system_error(str("cannot start rank ", world.rank), code);
    }
    if (id > 0) {
      ranks.push_back(id);
      continue;
    }
#ifdef __linux__  // elsewhere a rank learns of it by the silence of the others
    prctl(PR_SET_PDEATHSIG, SIGTERM);
#endif
    if (getppid() != parent) _exit(1);  // it died before
    world.local_rank = world.rank;
    if (world.rank == 0) world.listening = dup(listening.fd());
    return world;
  }
  listening = Socket();
  exit_code = wait_for_ranks(ranks, world.patience);
  return std::nullopt;
}

int count_apart(int (*count)() noexcept) {
  int ends[2];
  if (pipe(ends) < 0) throw system_error("cannot make a pipe", errno);
  const pid_t id = fork();
  if (id == 0) {
    const int found = count();
    _exit(write(ends[1], &found, sizeof found) == sizeof found ? 0 : 1);
  }
  ::close(ends[1]);
  int found = 0;
  const bool told = id > 0 && uninterrupted([&] { return read(ends[0], &found, sizeof found); }) == sizeof found;
  ::close(ends[0]);
  if (id > 0) uninterrupted([&] { return waitpid(id, nullptr, 0); });
  return told ? found : 0;
}

}  // namespace gca
