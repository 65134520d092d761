// Which of how many processes this one is: the ranks of a world that train one model together. A launcher of a cluster
// says so in the environment (torchrun, SLURM's srun, Open MPI's mpirun); launch() starts ranks on this host by itself.
#pragma once
#include <signal.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "common.h"

namespace gca {

struct World {
  int rank = 0, size = 1;
  int local_rank = 0;                 // among the ranks of this host: the number of its GPU
  std::string address = "127.0.0.1";  // where rank 0 listens, alone
  int port = 0;
  std::string job;       // what tells this run's processes from another's
  int listening = -1;    // rank 0: a socket that a launcher listens on already, or -1
  double patience = 45;  // seconds without a sign of life or of progress that end the run; GCA_TIMEOUT
};

// What stands in a variable of the environment, or nothing.
using Environment = std::function<std::optional<std::string>(const char* name)>;
std::optional<std::string> of_environment(const char* name);

// The world that the launcher's variables tell of; without any, a world of one. An Error where they contradict each
// other or where nothing says on which host rank 0 is.
//
//   torchrun   RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
//   srun       SLURM_PROCID SLURM_NTASKS SLURM_LOCALID, the first host of SLURM_JOB_NODELIST
//   mpirun     OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK
//   all        GCA_PORT (else MASTER_PORT + 1, else 29501), MASTER_ADDR, GCA_TIMEOUT
World world_of(const Environment& environment = of_environment);

// The first host of SLURM's list, as n[03-07,12],login -> n03.
std::string first_host(const std::string& list);

// What ends a training after its step, with a checkpoint: Ctrl-C, a terminal that closes, and what batch systems send
// before a job's time is up (SLURM --signal=USR1@120, Grid Engine USR1 and USR2, LSF and limits of CPU time XCPU).
inline constexpr int stop_signals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU};

// Starts `size` ranks on this host: copies of this process as it is now. Call it before there are threads, GPUs or
// signal handlers. In each rank: its world. In the process that called: nothing, after all have ended; exit_code is
// then the first that is not 0. stop_signals are passed on to the ranks; where this process dies they get SIGTERM;
// where one of them fails, the others have a quarter of `patience` to end. An Error where GCA_PORT is taken.
std::optional<World> launch(int size, int& exit_code);

// What count() returns in a process of its own: so that this one does not touch the GPUs before it has launched ranks.
int count_apart(int (*count)() noexcept);

}  // namespace gca
