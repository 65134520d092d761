// The program on a GPU, as a user runs it: ./train_gca.
#include <cmath>

#include "gca_kernels.cuh"
#include "dev/test/workshop.h"

using namespace gca;
using test::says;
using test::Workshop;

namespace {

std::vector<double> losses(const std::string& out) {
  std::vector<double> found;
  for (size_t at = 0; (at = out.find("  loss ", at)) != std::string::npos; at += 7)
    found.push_back(strtod(out.c_str() + at + 7, nullptr));
  return found;
}

}  // namespace

TEST_CASE("GPU: a short training follows the CPU's losses; bf16 follows too, less closely") {
  if (!gpu_count()) return test::skip("no GPU answers");
  const Workshop shop("./train_gca");
  const std::vector<double> cpu = losses(shop.run(shop.training("cpu") + " --steps 30 --device cpu").out);
  const std::vector<double> gpu = losses(shop.run(shop.training("gpu") + " --steps 30 --device cuda").out);
  const std::vector<double> half =
      losses(shop.run(shop.training("half") + " --steps 30 --device cuda --precision bf16").out);
  REQUIRE(cpu.size() == 30);
  REQUIRE(gpu.size() == 30);
  REQUIRE(half.size() == 30);
  CHECK(cpu.back() < cpu.front() - 0.5);
  for (size_t i = 0; i < cpu.size(); i++) {
    CHECK(std::fabs(gpu[i] - cpu[i]) < 2e-3);
    CHECK(std::fabs(half[i] - cpu[i]) < 5e-2);
  }
}

TEST_CASE("GPU: training goes on after a stop bit for bit; a checkpoint of the GPU goes on on the CPU") {
  if (!gpu_count()) return test::skip("no GPU answers");
  const Workshop shop("./train_gca");
  for (const char* precision : {"float", "bf16"}) {
    CAPTURE(precision);
    const std::string whole = std::string("whole_") + precision, cut = std::string("cut_") + precision;
    const std::string flags = std::string(" --steps 12 --save-every 6 --keep 9 --device cuda --precision ") + precision;
    REQUIRE(shop.run(shop.training(whole) + flags).exit == 0);
    REQUIRE(shop.run(shop.training(cut) + flags).exit == 0);
    CHECK(shop.weights(whole, "00000012") == shop.weights(cut, "00000012"));
    for (const char* later : {"10", "12"})
      remove_tree(shop.path + "/" + cut + "/step_000000" + later);  // as if killed after step 6
    const Workshop::Result resumed = shop.run("train --resume --device cuda --out " + shop.path + "/" + cut);
    CHECK(says(resumed, "from step 6"));
    CHECK(shop.weights(whole, "00000012") == shop.weights(cut, "00000012"));
  }
  remove_tree(shop.path + "/cut_float/step_00000012");
  remove_tree(shop.path + "/cut_float/step_00000010");
  const Workshop::Result on_cpu = shop.run("train --resume --device cpu --out " + shop.path + "/cut_float");
  CHECK(on_cpu.exit == 0);
  CHECK(says(on_cpu, "from step 6"));
  CHECK(shop.run("eval --device cuda --precision bf16 --checkpoint " + shop.path + "/cut_float --data '" + shop.path +
                 "/shards/t_val_*'")
            .exit == 0);
}

TEST_CASE("GPU: what backward computes anew has the bits of what was kept") {
  if (!gpu_count()) return test::skip("no GPU answers");
  const Workshop shop("./train_gca");
  for (const char* recompute : {"none", "norms", "layers"})
    REQUIRE(shop.run(shop.training(recompute) + " --steps 5 --device cuda --precision bf16 --recompute " + recompute)
                .exit == 0);
  CHECK(shop.weights("norms", "00000005") == shop.weights("none", "00000005"));
  CHECK(shop.weights("layers", "00000005") == shop.weights("none", "00000005"));
}

TEST_CASE("GPU: generation and inspection read a checkpoint, and agree with the CPU") {
  if (!gpu_count()) return test::skip("no GPU answers");
  const Workshop shop("./train_gca");
  REQUIRE(shop.run(shop.training("run") + " --steps 40 --device cuda").exit == 0);
  const std::string greedy =
      "generate --temperature 0 --count 60 --prompt 'the sea 3; ' --checkpoint " + shop.path + "/run --device ";
  CHECK(shop.run(greedy + "cuda").out == shop.run(greedy + "cpu").out);
  write_file(shop.path + "/short.txt", "the sea 1; a ship 2; the sea 3; a ship 4; ");
  const std::string inspect = "inspect --text " + shop.path + "/short.txt --checkpoint " + shop.path + "/run --device ";
  CHECK(shop.run(inspect + "cuda").out == shop.run(inspect + "cpu").out);
}

TEST_CASE("GPU: a batch that does not fit is refused before anything is allocated, with the largest that fits") {
  if (!gpu_count()) return test::skip("no GPU answers");
  const Workshop shop("./train_gca");
  const Workshop::Result result =
      shop.run("train --model drt --batch 100000 --chunks 4 --steps 1 --device cuda --data '" + shop.path +
               "/shards/t_train_*' --out " + shop.path + "/big");
  CAPTURE(result.out);
  CHECK(result.exit == 1);
  CHECK(says(result, "fits"));
  const size_t at = result.out.find("--micro-batch ");
  REQUIRE(at != std::string::npos);
  CHECK(strtol(result.out.c_str() + at + 14, nullptr, 10) > 100);
}
