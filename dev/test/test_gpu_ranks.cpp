// Ranks on GPUs: NCCL with a world of one where there is one card, and what two cards do together where there are two.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>

#include "commands/device.h"
#include "dev/test/gpu_test.h"
#include "dev/test/rank_shop.h"
#include "dev/test/small_model.h"
#include "ranks/collectives.h"
#include "runtime/checkpoint.h"
#include "runtime/models.h"
#include "runtime/parallel.h"

using namespace gca;
using namespace gca::test;

namespace {

// NCCL for a world of one; null where it cannot be loaded, which the test then says.
std::unique_ptr<Collectives> nccl_alone(Ranks& alone, GpuDevice& gpu) {
  try {
    return nccl_collectives(alone, gpu.side_stream());
  } catch (const Error& error) {
    if (!has(error.what(), "found none that loads")) throw;
    skip(error.what());
    return nullptr;
  }
}
bool fewer_than_two() {
  if (gpu_count() >= 2) return false;
  skip(str("two GPUs are wanted, found ", gpu_count()));
  return true;
}

// Three steps of 4 rows, of which this rank takes its part a row at a time; in the second, a number that is none in the
// gradient of rank `broken`.
template <class Act>
void three_steps(DRT<Gpu<Act>>& net, const Batch& batch, int broken) {
  make_steps(net, batch, 3, 0, 0, [&](int step, int64_t begin) {
    const float nan = std::nanf("");
    if (step == 1 && net.shards.rank == broken && begin == net.table.norm)
      net.device.upload(net.gradient + begin, &nan, sizeof nan);
  });
}
template <class Act>
void make_ready(DRT<Gpu<Act>>& net, const Batch& batch) {
  net.allocate();
  net.plan(1, batch.T);
  net.commit_activations();
  ThreadPool pool(1);
  net.initialise(7, pool);
}
template <class Act>
std::vector<Act> weights_of(const DRT<Gpu<Act>>& net) {
  std::vector<Act> weights(static_cast<size_t>(net.table.size));
  net.device.download(weights.data(), net.weights, net.table.size * static_cast<int64_t>(sizeof(Act)));
  return weights;
}

template <class Act>
void check_world_of_one(const Batch& batch, const Config& config, Collectives* nccl, Gpu<Act>& gpu) {
  DRT<Gpu<Act>> plain(gpu, config), shared(gpu, config, Use::training, {0, 1, 4096});
  make_ready(plain, batch);
  three_steps(plain, batch, -1);
  shared.collectives = nccl;
  make_ready(shared, batch);
  CHECK(shared.shards.buckets.size() > 3);
  three_steps(shared, batch, -1);
  CHECK(same_bits(weights_of(shared), weights_of(plain)));
  CHECK(shared.step_state().grad_norm == doctest::Approx(plain.step_state().grad_norm).epsilon(1e-12));
  CHECK(shared.step_state().adam_steps == 3);
}

Config gpu_config() {
  Config config = small({1, 1}, 8);
  config.width = 64;
  config.heads = 2;
  config.ffn = 96;
  return config;
}

}  // namespace

TEST_CASE(
    "GPU: NCCL with a world of one leaves numbers as they are, and a step in buckets has the bits of a plain one") {
  if (no_gpu()) return;
  Ranks alone{World{}};
  const Config config = gpu_config();
  const Batch batch(config, 4, 3);
  {
    Gpu<float> gpu;
    const std::unique_ptr<Collectives> nccl = nccl_alone(alone, gpu);
    if (!nccl) return;
    CHECK(has(nccl->description(), "NCCL 2."));
    const int64_t n = 5000;
    const std::vector<float> values = random_values<float>(n, 3);
    const double sums[2] = {0.1, 7};
    float* data = static_cast<float*>(gpu.allocate(n * 4));
    double* doubles = static_cast<double*>(gpu.allocate(sizeof sums));
    gpu.upload(data, values.data(), n * 4);
    gpu.upload(doubles, sums, sizeof sums);
    gpu.side_waits();
    nccl->reduce_scatter(data, n);
    nccl->all_reduce(doubles, 2);
    nccl->begin_group();
    nccl->all_gather(data, n * 4);
    nccl->all_gather(doubles, sizeof sums);
    nccl->end_group();
    gpu.wait_for_side();
    std::vector<float> got(values.size());
    double got_sums[2] = {};
    gpu.download(got.data(), data, n * 4);
    gpu.download(got_sums, doubles, sizeof got_sums);
    CHECK(same_bits(got, values));
    CHECK(got_sums[0] == sums[0]);
    CHECK(got_sums[1] == sums[1]);
    gpu.release(data);
    gpu.release(doubles);
    check_world_of_one(batch, config, nccl.get(), gpu);
  }
  Gpu<bf16> gpu;
  const std::unique_ptr<Collectives> nccl = nccl_alone(alone, gpu);
  REQUIRE(nccl);
  check_world_of_one(batch, config, nccl.get(), gpu);
}

TEST_CASE("GPU: two cards follow one card's losses, the same world twice has the same bits, and a run changes over") {
  if (fewer_than_two()) return;
  const RankShop shop("./train_gca");
  const FlagMap run = {{"batch", "3"}, {"steps", "20"}, {"save-every", "10"}, {"keep", "9"}, {"device", "cuda"}};
  for (const char* precision : {"float", "bf16"}) {
    const std::string name = precision;
    const FlagMap flags = with(run, {{"precision", name}});
    REQUIRE(shop.run(shop.training("one_" + name, flags)).exit == 0);
    for (const char* out : {"cold_", "two_", "again_"}) {  // the first measures the products' algorithms
      const Workshop::Result result = shop.run(shop.training(out + name, with(flags, {{"gpus", "2"}})));
      CAPTURE(result.out);
      REQUIRE(result.exit == 0);
      CHECK(has(result.out, "ranks        2, over NCCL 2."));
    }
    shop.check_follows("one_" + name, "two_" + name, "loss", name == "float" ? 1e-4 : 5e-3);
    CHECK(shop.weights("two_" + name, "00000020") == shop.weights("again_" + name, "00000020"));
    std::string from = "two_" + name;
    for (const char* gpus : {"2", "1"}) {
      const std::string copy = "resumed_" + name + gpus;
      std::filesystem::copy(shop.folder(from), shop.folder(copy), std::filesystem::copy_options::recursive);
      for (const int64_t step : list_checkpoints(shop.folder(copy)))
        if (step > 10) remove_tree(checkpoint_folder(shop.folder(copy), step));
      std::filesystem::remove(shop.folder(copy) + "/log.jsonl");
      const Workshop::Result result =
          shop.run("train --resume --device cuda --gpus " + std::string(gpus) + " --out " + shop.folder(copy));
      CAPTURE(result.out);
      REQUIRE(result.exit == 0);
      if (*gpus == '2') CHECK(shop.weights(copy, "00000020") == shop.weights(from, "00000020"));
      const auto losses = shop.logged_values(copy, "loss"), want = shop.logged_values("one_" + name, "loss");
      for (const auto& [step, loss] : losses)
        CHECK(std::fabs(loss - want.at(step)) < (name == "float" ? 1e-4 : 5e-3) * loss);
    }
  }
}

TEST_CASE("GPU: of two cards' ranks one that is killed or stopped ends both, a signal to one saves both") {
  if (fewer_than_two()) return;
  const RankShop shop("./train_gca");
  for (const int signal : {SIGTERM, SIGKILL, SIGSTOP}) {
    CAPTURE(signal);
    const std::string run = str("run", signal);
    const FlagMap flags = {{"steps", "1000000"}, {"save-every", "1000000"}, {"device", "cuda"}, {"gpus", "2"}};
    Process process(shop.command("GCA_TIMEOUT=5", "./train_gca"), shop.tiny_training(run, flags),
                    shop.output("output"));
    REQUIRE(shop.logged(run, 20));
    const std::vector<pid_t> ranks = children_of(process.id, 2);
    kill(ranks[1], signal);
    REQUIRE(process.ends_within(60));
    const int exit_code = process.wait();
    const std::string out = shop.printed();
    CAPTURE(out);
    CHECK(exit_code == (signal == SIGTERM ? 0 : 1));
    CHECK(has(out, signal == SIGTERM   ? ", saved; go on with"
                   : signal == SIGKILL ? "has ended without a word"
                                       : "has given no sign of life"));
    for (const pid_t rank : ranks) CHECK(is_gone(rank, 5));
  }
}

TEST_CASE("GPU: a step that is not finite on one of two cards changes nothing on either") {
  if (fewer_than_two()) return;
  const RankShop shop("./train_gca");
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  const int port = free_port();
  std::vector<std::unique_ptr<Process>> ranks;
  for (int r = 0; r < 2; r++)
    ranks.push_back(std::make_unique<Process>(
        shop.command(str("RANK=", r, " WORLD_SIZE=2 LOCAL_RANK=", r, " MASTER_ADDR=127.0.0.1 GCA_PORT=", port),
                     self.c_str()),
        "--no-skip --test-case='rank of two GPUs: *'", shop.output(str("out", r))));
  for (int r = 0; r < 2; r++) {
    REQUIRE(ranks[static_cast<size_t>(r)]->ends_within(120));
    const int exit_code = ranks[static_cast<size_t>(r)]->wait();
    CHECK_MESSAGE(exit_code == 0, shop.printed(str("out", r)));
  }
}

// A process of the test above.
TEST_CASE("rank of two GPUs: a step that is not finite on rank 1 is skipped" * doctest::skip()) {
  const World world = world_of();
  if (world.size != 2) return skip("it is one of two processes of another test");
  Ranks ranks(world);
  Gpu<bf16> gpu(gpu_of(world.local_rank));
  const std::unique_ptr<Collectives> nccl = collectives_of(ranks, gpu);
  const Config config = gpu_config();
  const Batch batch(config, 4, 3);
  DRT<Gpu<bf16>> net(gpu, config, Use::training, {ranks.rank(), 2, 4096});
  net.collectives = nccl.get();
  make_ready(net, batch);
  three_steps(net, batch, 1);
  const StepState state = net.step_state();
  CHECK(state.adam_steps == 2);
  CHECK(state.skipped == 1);
  CHECK(state.skipped_in_a_row == 0);
  const std::vector<bf16> weights = weights_of(net);
  const std::string crc = str(crc32c(weights.data(), weights.size() * sizeof(bf16)));
  for (const std::string& other : ranks.gather(crc)) CHECK(other == crc);
  ranks.leave();
}
