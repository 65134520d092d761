// Several ranks, as processes on this CPU: what they share, how they meet, how they sum, and a model's step on them.
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "base/files.h"
#include "dev/test/small_model.h"
#include "ranks/collectives.h"
#include "ranks/meeting.h"
#include "ranks/shards.h"
#include "ranks/world.h"
#include "runtime/matmul_cache.h"

using namespace gca;
using namespace gca::test;

namespace {

// body(ranks) in n processes, after which they leave in order; returns the launcher's exit code: 0 where all bodies
// return true. What an Error of a rank says goes into the file `errors`, a line each.
template <class Body>
int on_ranks(int n, const std::string& errors, Body body) {
  int exit_code = 0;
  const std::optional<World> world = launch(n, exit_code);
  if (!world) return exit_code;
  bool good = false;
  try {
    Ranks ranks(*world);
    try {
      good = body(ranks);
      ranks.leave();
    } catch (const std::exception& error) {
      good = false;
      append_line(errors, str(world->rank, ranks.fail(error.what()) ? " quiet: " : ": ", error.what()));
    }
  } catch (const std::exception& error) {
    append_line(errors, str(world->rank, " did not meet: ", error.what()));
  }
  _exit(good ? 0 : 3);
}

// While it lives the variable has that value.
struct Variable {
  std::string name;
  Variable(const char* name_, const std::string& value) : name(name_) { setenv(name_, value.c_str(), 1); }
  ~Variable() { unsetenv(name.c_str()); }
};

World world_from(std::map<std::string, std::string> variables) {
  return world_of([variables](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

}  // namespace

// ---- who is who ---------------------------------------------------------------------------------------------------
TEST_CASE("ranks: the launchers' variables say who is who") {
  const World alone = world_from({});
  CHECK(alone.size == 1);
  CHECK(alone.rank == 0);
  const World torchrun = world_from(
      {{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"MASTER_ADDR", "node7"}, {"MASTER_PORT", "29400"}});
  CHECK(torchrun.rank == 5);
  CHECK(torchrun.size == 8);
  CHECK(torchrun.local_rank == 1);
  CHECK(torchrun.address == "node7");
  CHECK(torchrun.port == 29401);  // torchrun's agent holds the other
  const std::map<std::string, std::string> slurm_job = {
      {"SLURM_PROCID", "3"}, {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "1"}, {"SLURM_JOB_NODELIST", "gpu[09-10],big"}};
  const World slurm = world_from(slurm_job);
  CHECK(slurm.rank == 3);
  CHECK(slurm.size == 4);
  CHECK(slurm.local_rank == 1);
  CHECK(slurm.address == "gpu09");
  CHECK(slurm.port == 29501);
  std::map<std::string, std::string> other_job = slurm_job;
  other_job["SLURM_JOB_ID"] = "17";
  other_job["GCA_PORT"] = "1234";
  CHECK(world_from(other_job).job != slurm.job);
  CHECK(world_from(other_job).port == 1234);
  const World mpi = world_from({{"OMPI_COMM_WORLD_RANK", "1"},
                                {"OMPI_COMM_WORLD_SIZE", "2"},
                                {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  CHECK(mpi.rank == 1);
  CHECK(mpi.address == "127.0.0.1");  // all on one host
  CHECK(has(error_of([] {
              world_from({{"OMPI_COMM_WORLD_RANK", "1"},
                          {"OMPI_COMM_WORLD_SIZE", "4"},
                          {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                          {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
            }),
            "MASTER_ADDR: expected the name of the host that rank 0 runs on, found nothing"));
  CHECK(has(error_of([] { world_from({{"RANK", "2"}, {"WORLD_SIZE", "2"}}); }), "RANK: expected a number from 0 to 1"));
  CHECK(has(error_of([] { world_from({{"RANK", "0"}}); }), "WORLD_SIZE: expected one beside RANK, found none"));
  CHECK(has(error_of([] { world_from({{"WORLD_SIZE", "2"}}); }), "RANK: expected one beside WORLD_SIZE"));
  CHECK(world_from({{"SLURM_NTASKS", "4"}}).size == 1);
  CHECK(has(error_of([] { world_from({{"GCA_TIMEOUT", "soon"}}); }), "GCA_TIMEOUT: expected a number"));
  for (const auto& [list, host] : std::map<std::string, std::string>{{"a", "a"},
                                                                     {"a,b", "a"},
                                                                     {"n[3,7-9]", "n3"},
                                                                     {"n[03-07].site,b[1-2]", "n03.site"},
                                                                     {"login,n[1-2]", "login"}})
    CHECK(first_host(list) == host);
}

TEST_CASE("ranks: rows are shared out, each once, the first ranks one more, some none") {
  for (const int64_t rows : {0, 1, 3, 10, 40, 106, 256})
    for (const int ranks : {1, 2, 3, 7, 16}) {
      int64_t next = 0;
      for (int r = 0; r < ranks; r++) {
        const RowRange mine = rows_of_rank(rows, r, ranks);
        CHECK(mine.begin == next);
        CHECK(mine.count() == rows / ranks + (r < rows % ranks));
        next = mine.end;
      }
      CHECK(next == rows);
    }
}

TEST_CASE("ranks: buckets and slices cover a flat buffer once, and a share has no gaps") {
  for (const int ranks : {1, 2, 3, 5})
    for (const int64_t used : {64, 1000, 12345})
      for (const int64_t bucket_size : {100, 1000, 100000}) {
        CAPTURE(ranks);
        CAPTURE(used);
        CAPTURE(bucket_size);
        const int64_t first_end = used / 3, alignment = 16;
        std::vector<int> owners;
        for (int r = 0; r < ranks; r++) {
          const Shards shards = Shards(0, ranks, used, first_end, alignment, bucket_size).of_rank(r);
          owners.resize(static_cast<size_t>(shards.size));
          CHECK(shards.size >= used);
          CHECK(shards.size - used < ranks * alignment);
          std::vector<int> share(static_cast<size_t>(shards.share()));
          int64_t end = shards.size;
          for (const Shards::Bucket& b : shards.buckets) {  // from the end to the beginning
            CHECK(b.end == end);
            CHECK(b.size * ranks == b.end - b.begin);
            CHECK(b.flat % alignment == 0);
            end = b.begin;
          }
          CHECK(end == 0);
          if (ranks > 1) CHECK(shards.buckets.back().end >= first_end);  // the first tensor's own
          shards.owned(0, used, [&](int64_t flat, int64_t place, int64_t count) {
            for (int64_t i = 0; i < count; i++) {
              owners[static_cast<size_t>(flat + i)]++;
              share[static_cast<size_t>(place + i)]++;
            }
          });
          CHECK(std::count_if(share.begin(), share.end(), [](int times) { return times > 1; }) == 0);
        }
        CHECK(std::count(owners.begin(), owners.begin() + used, 1) == used);
      }
}

// ---- what they tell each other ------------------------------------------------------------------------------------
TEST_CASE("ranks: sums are made in the order of ranks, with the same bits everywhere; slices and words arrive") {
  const TempFolder folder;
  const std::string errors = folder.path + "/errors";
  CHECK(on_ranks(3, errors, [&](Ranks& ranks) {
          const std::unique_ptr<Collectives> tcp = tcp_collectives(ranks);
          const int64_t slice = 33000;  // more than one piece in all
          std::vector<std::vector<float>> all;
          for (int r = 0; r < 3; r++) all.push_back(random_values<float>(3 * slice, static_cast<uint64_t>(r) + 1));
          std::vector<float> mine = all[static_cast<size_t>(ranks.rank())];
          tcp->reduce_scatter(mine.data(), slice);
          bool good = true;
          for (int64_t i = ranks.rank() * slice; i < (ranks.rank() + 1) * slice; i++)
            good &= mine[i] == all[0][i] + all[1][i] + all[2][i];
          tcp->all_gather(mine.data(), slice * 4);
          for (int64_t i = 0; i < 3 * slice; i++) good &= mine[i] == all[0][i] + all[1][i] + all[2][i];
          double sums[] = {0.1 * (ranks.rank() + 1), 1};
          tcp->all_reduce(sums, 2);
          good &= sums[0] == 0.1 + 0.1 * 2 + 0.1 * 3 && sums[1] == 3;
          const std::vector<std::string> names = ranks.gather(str("I am ", ranks.rank()));
          good &= ranks.first() ? names == std::vector<std::string>{"I am 0", "I am 1", "I am 2"} : names.empty();
          return good && ranks.broadcast(ranks.first() ? "hear" : "") == "hear";
        }) == 0);
  CHECK(!std::filesystem::exists(errors));
}

TEST_CASE("ranks: one that goes another way, hangs or fails ends the run for all, and says why") {
  const TempFolder folder;
  const std::string errors = folder.path + "/errors";
  const auto said = [&] { return std::filesystem::exists(errors) ? read_file(errors, 1 << 20) : ""; };
  const Variable timeout("GCA_TIMEOUT", "1");
  SUBCASE("another way") {
    CHECK(on_ranks(2, errors, [](Ranks& ranks) {
            double sums[2] = {};
            ranks.sum(sums, ranks.first() ? 2 : 1);
            return true;
          }) == 3);
    CHECK(has(said(), "rank 1"));
    CHECK(has(said(), "are at different points of the program: expected transfer 0 of 16 bytes, found 0 of 8"));
  }
  SUBCASE("an error of its own") {
    CHECK(on_ranks(3, errors, [](Ranks& ranks) {
            ranks.at(Doing::training);
            if (ranks.rank() == 2) throw Error("its disk has gone");
            double sum = 0;
            ranks.sum(&sum, 1);
            return true;
          }) == 3);
    CHECK(has(said(), "2 quiet: its disk has gone"));  // rank 0 says it for all
    CHECK(has(said(), "0: rank 2 ("));
    CHECK(has(said(), "): its disk has gone"));
    CHECK(has(said(), "1 quiet: "));
  }
  SUBCASE("a main thread that hangs, while its signs of life go on") {
    CHECK(on_ranks(3, errors, [](Ranks& ranks) {
            ranks.at(Doing::training);
            if (ranks.rank() == 1) sleep(30);
            double sum = 0;
            ranks.sum(&sum, 1);
            return true;
          }) != 0);
    CHECK(has(said(), "0: rank 1 ("));
    CHECK(has(said(), "has not got on for 1.0 s, and the others wait for it"));
  }
  SUBCASE("one that saves may take its time") {
    CHECK(on_ranks(2, errors, [](Ranks& ranks) {
            ranks.at(ranks.first() ? Doing::saving : Doing::training);
            if (ranks.first()) sleep(3);
            double sum = 0;
            ranks.sum(&sum, 1);
            return true;
          }) == 0);
    CHECK(said() == "");
  }
}

TEST_CASE("ranks: rank 0 listens on its own address alone") {
  const Socket door = Socket::listen("127.0.0.1", 0);
  CHECK(Socket::connect("127.0.0.1", door.port()));
  CHECK(!Socket::connect("127.0.0.2", door.port()));  // this host's as well
}

TEST_CASE("ranks: a rank that sends what is no message, or too long a one, ends the run and is read no further") {
  const TempFolder folder;
  const std::string errors = folder.path + "/errors";
  const Variable timeout("GCA_TIMEOUT", "2");
  for (const ControlHead bad : {ControlHead{.magic = 1}, ControlHead{.bytes = 1u << 31}}) {
    remove_tree(errors);
    CHECK(on_ranks(2, errors, [&](Ranks& ranks) {
            if (ranks.rank() == 1) {  // this process' control line, found among its files
              for (int fd = 3; fd < 64; fd++) send(fd, &bad, sizeof bad, MSG_NOSIGNAL | MSG_DONTWAIT);
              sleep(5);
            }
            double sum = 0;
            ranks.sum(&sum, 1);
            return true;
          }) != 0);
    CHECK(has(read_file(errors, 1 << 20), "sends what is no message of this program"));
  }
}

TEST_CASE("ranks: without NCCL, or with something else, GPUs say what is missing") {
  Ranks alone{World{}};
  const Variable library("GCA_NCCL", "/nowhere/libnccl.so.2");
  const std::string missing = error_of([&] { nccl_collectives(alone, nullptr); });
  CHECK(has(missing, "expected a library '/nowhere/libnccl.so.2', found none that loads"));
  CHECK(has(missing, "set GCA_NCCL to the path"));
  const Variable other("GCA_NCCL", "libm.so.6");
  CHECK(has(error_of([&] { nccl_collectives(alone, nullptr); }), "'libm.so.6' is no NCCL 2: it has no ncclGetVersion"));
}

TEST_CASE("ranks: what they measured of products is put together, of one shape what the first rank says last") {
  CHECK(united_products({}) == "");
  CHECK(united_products({"card"}) == "card");
  CHECK(united_products({"card\n1 2 a\n3 4 b", "card\n1 2 c\n5 6 d\n3 4 b", "other\n7 8 e"}) ==
        "card\n1 2 c\n5 6 d\n3 4 b\n1 2 a");
}

// ---- a model's step -----------------------------------------------------------------------------------------------
namespace {

using Net = DRT<Cpu<double>>;

void draw_weights(Net& net) {
  for (const Tensor& t : net.table.tensors) {
    const auto values = random_values<double>(t.size(), name_hash(t.name), 0.3, t.columns ? 0 : 1);
    net.put(net.masters, t.offset, values.data(), t.size());
  }
  net.weights_changed();
}
// Two steps of a batch of 5 rows, this rank's part of it; broken: the rank whose gradient, or loss, is not finite in
// the second.
void two_steps(Net& net, const Batch& batch, int broken, bool loss) {
  make_steps(net, batch, 2, 0.5, net.shards.rank == 1, [&](int step, int64_t) {
    if (step == 1 && net.shards.rank == broken) (loss ? net.state->loss : net.gradient[net.table.norm]) = std::nan("");
  });
}

}  // namespace

TEST_CASE("ranks: a model's step on 2, 3 and 7 of them is that of one to rounding; not finite on one, skipped by all") {
  const TempFolder folder;
  const std::string errors = folder.path + "/errors";
  const Config config = small({1, 1});
  const Batch batch(config, 5, 3);
  for (const auto& [broken, loss] : {std::pair(-1, false), std::pair(1, false), std::pair(1, true)}) {
    Cpu<double> cpu(1);
    Net one(cpu, config);
    one.allocate();
    one.plan(1, batch.T);
    one.commit_activations();
    draw_weights(one);
    two_steps(one, batch, broken < 0 ? -1 : 0, loss);
    CHECK(one.step_state().skip == (broken >= 0));
    for (const int n : {2, 3, 7}) {  // of 7 two have no rows
      CAPTURE(n);
      CAPTURE(broken);
      CAPTURE(loss);
      CHECK(on_ranks(n, errors, [&, broken = broken, loss = loss](Ranks& ranks) {
              Cpu<double> device(1);
              Net net(device, config, Use::training, {ranks.rank(), n, 200});
              const std::unique_ptr<Collectives> tcp = tcp_collectives(ranks);
              net.collectives = tcp.get();
              net.allocate();
              net.plan(1, batch.T);
              net.commit_activations();
              draw_weights(net);
              two_steps(net, batch, broken, loss);
              const StepState got = net.step_state(), want = one.step_state();
              bool good = net.shards.buckets.size() > 4 && got.stop == 1 && got.skip == want.skip &&
                          got.adam_steps == want.adam_steps && got.skipped == want.skipped;
              good &= relative_error(net.masters, one.masters, one.table.size) < 1e-13;
              const auto near = [](double a, double b) { return std::fabs(a - b) <= 1e-12 * std::fabs(b); };
              good &= (loss || near(got.loss, want.loss)) && (got.skip || near(got.grad_norm, want.grad_norm));
              good &= got.broken == (loss ? 1 : 0) && got.broken_rank == (loss ? 1 : 0);
              const int64_t slice = net.shards.buckets[0].size;  // moments: of this rank's slices alone
              good &= relative_error(net.adam_v + net.shards.buckets[0].place, one.adam_v + net.shards.buckets[0].flat,
                                     std::min(slice, one.table.size - net.shards.buckets[0].flat)) < 1e-12;
              // The same bits on every rank.
              const uint32_t crc = crc32c(net.masters, static_cast<size_t>(one.table.size) * sizeof(double));
              for (const std::string& other : ranks.gather(str(crc))) good &= other == str(crc);
              return good;
            }) == 0);
    }
  }
  CHECK_MESSAGE(!std::filesystem::exists(errors), read_file(errors, 1 << 20));
}
