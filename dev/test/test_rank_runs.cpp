// Trainings of several ranks as a user starts them, on this CPU: the same run whatever their number, and what happens
// when one of them is killed, stopped, signalled or led astray.
#include "dev/test/rank_shop.h"
#include "runtime/checkpoint.h"

using namespace gca;
using namespace gca::test;

// ---- the same run -------------------------------------------------------------------------------------------------
TEST_CASE("rank runs: 2, 3 and 7 ranks follow the losses of one; the same world twice has the same bits") {
  const RankShop shop;
  const std::string more = " --steps 15 --threads 1";
  const FlagMap batch = {{"batch", "5"}};  // shared out as 3 + 2, 2 + 2 + 1, and one each of 5
  REQUIRE(shop.run(shop.training("one", batch) + more).exit == 0);
  for (const char* ranks : {"2", "3", "7"}) {
    const Workshop::Result result = shop.run(shop.training(ranks, batch) + more + " --ranks " + ranks);
    CAPTURE(result.out);
    REQUIRE(result.exit == 0);
    CHECK(times(result.out, "step 7/15") == 1);  // rank 0 alone prints
    CHECK(has(result.out, str("ranks        ", ranks, ", over TCP")));
    shop.check_follows("one", ranks, "loss", 1e-5);
    shop.check_follows("one", ranks, "grad_norm", 1e-4);
    shop.check_follows("one", ranks, "val_loss", 1e-5);
  }
  REQUIRE(shop.run(shop.training("again", batch) + more + " --ranks 3").exit == 0);
  CHECK(shop.weights("again", "00000015") == shop.weights("3", "00000015"));
  CHECK(shop.logged_values("again", "loss") == shop.logged_values("3", "loss"));
}

TEST_CASE("rank runs: a curriculum of needles on 3 ranks, whose stages' rows do not divide and leave some none") {
  const RankShop shop;
  const FlagMap task = {{"task", "recall"},     {"haystack", shop.path + "/text.txt"},
                        {"curriculum", "4,8"},  {"promote", "0"},
                        {"batch", "4"},         {"steps", "45"},
                        {"threads", "1"},       {"lr", "3e-2"},
                        {"micro-batch", "1"},   {"value-tokens", "1"},
                        {"answer-weight", "2"}, {"questions", "4"}};
  FlagMap run = with(with(tiny_model, {{"out", shop.folder("one")}, {"width", "16"}}), task);
  const Workshop::Result one = shop.run("train" + written(run));
  CAPTURE(one.out);
  REQUIRE(one.exit == 0);
  REQUIRE(has(one.out, "on to rows of 8 chunks"));  // where 2 rows are left for 3 ranks
  const Workshop::Result three =
      shop.run("train" + written(with(run, {{"out", shop.folder("three")}, {"ranks", "3"}})));
  CAPTURE(three.out);
  REQUIRE(three.exit == 0);
  shop.check_follows("one", "three", "loss", 1e-4);
  shop.check_follows("one", "three", "answer_loss", 1e-4);
  shop.check_follows("one", "three", "answers_right", 1e-9);
  shop.check_follows("one", "three", "chunks", 0);
}

TEST_CASE("rank runs: a checkpoint is that of one process, and goes on on any number of ranks") {
  const RankShop shop;
  const FlagMap run = {{"batch", "5"},      {"threads", "1"}, {"steps", "12"},
                       {"save-every", "6"}, {"keep", "9"},    {"eval-every", "50"}};
  REQUIRE(shop.run(shop.training("whole", run)).exit == 0);
  REQUIRE(shop.run(shop.training("three", with(run, {{"ranks", "3"}}))).exit == 0);
  for (const char* ranks : {"3", "2", "1"}) {  // after step 6 with so many
    CAPTURE(ranks);
    const std::string copy = str("resumed_", ranks);
    std::filesystem::copy(shop.folder("three"), shop.folder(copy), std::filesystem::copy_options::recursive);
    remove_tree(checkpoint_folder(shop.folder(copy), 12));
    std::filesystem::remove(shop.folder(copy) + "/log.jsonl");
    const Workshop::Result result =
        shop.run(str("train --resume --threads 1 --device cpu --out ", shop.folder(copy), " --ranks ", ranks));
    CAPTURE(result.out);
    REQUIRE(result.exit == 0);
    CHECK(has(result.out, "from step 6"));
    const auto losses = shop.logged_values(copy, "loss"), want = shop.logged_values("whole", "loss");
    CHECK(losses.size() == 6);
    for (const auto& [step, loss] : losses) CHECK(std::fabs(loss - want.at(step)) < 1e-5 * loss);
    if (*ranks == '3') {  // as if never stopped
      CHECK(shop.weights(copy, "00000012") == shop.weights("three", "00000012"));
      CHECK(read_file(checkpoint_folder(shop.folder(copy), 12) + "/optimizer.safetensors", 1 << 24) ==
            read_file(checkpoint_folder(shop.folder("three"), 12) + "/optimizer.safetensors", 1 << 24));
    }
  }
}

// ---- faults -------------------------------------------------------------------------------------------------------
TEST_CASE("rank runs: a signal to stop, to any one rank or to the launcher, saves and ends all") {
  const RankShop shop;
  for (const auto& [whom, signal] : {std::pair{0, SIGTERM},
                                     {2, SIGTERM},
                                     {-1, SIGTERM},
                                     {1, SIGUSR1},
                                     {-1, SIGUSR1},
                                     {-1, SIGUSR2},
                                     {-1, SIGXCPU}}) {
    CAPTURE(whom);
    CAPTURE(signal);
    const std::string run = str("run", whom, "_", signal);
    Process process(shop.program, shop.endless(run, 3), shop.output("output"));
    REQUIRE(shop.logged(run, 5));
    const std::vector<pid_t> ranks = children_of(process.id, 3);
    kill(whom < 0 ? process.id : ranks[static_cast<size_t>(whom)], signal);
    REQUIRE(process.ends_within(20));
    CHECK(process.wait() == 0);
    const std::string out = shop.printed();
    CAPTURE(out);
    CHECK(has(out, ", saved; go on with: train_gca train --out"));
    CHECK(list_checkpoints(shop.folder(run)).size() == 1);
  }
}

TEST_CASE("rank runs: a rank that is killed or stopped ends the run for all, with a sentence") {
  const RankShop shop;
  for (const int whom : {0, 1})
    for (const int signal : {SIGKILL, SIGSTOP}) {
      CAPTURE(whom);
      CAPTURE(signal);
      const std::string run = str("run", whom, "_", signal);
      Process process(shop.command("GCA_TIMEOUT=1.5"), shop.endless(run, 3), shop.output("output"));
      REQUIRE(shop.logged(run, 5));
      const std::vector<pid_t> ranks = children_of(process.id, 3);
      kill(ranks[static_cast<size_t>(whom)], signal);
      REQUIRE(process.ends_within(20));
      CHECK(process.wait() == 1);
      const std::string out = shop.printed();
      CAPTURE(out);
      CHECK(has(out, str("rank ", whom, " (")));
      CHECK(has(out, signal == SIGKILL ? "has ended without a word" : "has given no sign of life for 1.5 s"));
      if (signal == SIGKILL)
        CHECK(has(out, str("rank ", whom, ", process ", ranks[static_cast<size_t>(whom)], ", was ended by signal 9")));
      for (const pid_t rank : ranks) CHECK(is_gone(rank, 1));
    }
}

TEST_CASE("rank runs: a stop of all, as Ctrl-Z makes it, is no failure") {
  const RankShop shop;
  Process process(shop.command("GCA_TIMEOUT=1"), shop.endless("run", 2), shop.output("output"));
  REQUIRE(shop.logged("run", 5));
  const std::vector<pid_t> ranks = children_of(process.id, 2);
  for (const pid_t rank : ranks) kill(rank, SIGSTOP);
  usleep(2'500'000);
  for (const pid_t rank : ranks) kill(rank, SIGCONT);
  usleep(300'000);
  kill(ranks[1], SIGTERM);
  REQUIRE(process.ends_within(20));
  CHECK(process.wait() == 0);
  CHECK(has(shop.printed(), ", saved; go on with"));
}

TEST_CASE("rank runs: where the launcher is killed its ranks save and end") {
  const RankShop shop;
  Process process(shop.program, shop.endless("run", 2), shop.output("output"));
  REQUIRE(shop.logged("run", 5));
  const std::vector<pid_t> ranks = children_of(process.id, 2);
  kill(process.id, SIGKILL);
  process.wait();
  for (const pid_t rank : ranks) CHECK(is_gone(rank, 20));
  CHECK(list_checkpoints(shop.folder("run")).size() == 1);
}

// ---- how they meet ------------------------------------------------------------------------------------------------
TEST_CASE("rank runs: ranks that a cluster's launcher starts meet on a port, and strangers are sent away") {
  const RankShop shop;
  const int port = free_port();
  const auto variables = [&](int rank, int size, const std::string& more = "") {
    return shop.command(str("GCA_TIMEOUT=2 RANK=", rank, " WORLD_SIZE=", size, " LOCAL_RANK=", rank,
                            " MASTER_ADDR=127.0.0.1 MASTER_PORT=", port - 1, " ", more));
  };
  const auto training = [&](const std::string& out, const FlagMap& others = {}) {
    return shop.tiny_training(out, with({{"steps", "8"}, {"batch", "3"}, {"threads", "1"}}, others));
  };
  SUBCASE("in any order, past what speaks another language") {
    Process first(variables(0, 3), training("run"), shop.output("out0"));
    Socket stranger;
    for (int i = 0; i < 500 && !stranger; i++) {
      usleep(10000);
      stranger = Socket::connect("127.0.0.1", port);
    }
    REQUIRE(stranger);
    CHECK(stranger.send(std::string(500, 'x').data(), 500, 1));
    Process third(variables(2, 3), training("run"), shop.output("out2"));
    Process second(variables(1, 3), training("run"), shop.output("out1"));
    for (Process* process : {&first, &second, &third}) {
      REQUIRE(process->ends_within(30));
      CHECK(process->wait() == 0);
    }
    CHECK(has(shop.printed("out0"), "is no rank's and was closed"));
    CHECK(has(shop.printed("out0"), "saved step 8"));
    CHECK(shop.printed("out1") == "");
    REQUIRE(shop.run(training("alone")).exit == 0);
    shop.check_follows("alone", "run", "loss", 1e-5);
  }
  SUBCASE("a missing peer") {
    Process first(variables(0, 3, "GCA_TIMEOUT=0.4"), training("run"), shop.output("out0"));
    Process second(variables(1, 3, "GCA_TIMEOUT=0.4"), training("run"), shop.output("out1"));
    CHECK(first.wait() == 1);
    CHECK(second.wait() == 1);
    CHECK(has(shop.printed("out0"), "that these have not come: 2; were they started"));
    CHECK(has(shop.printed("out1"), "that these have not come: 2; were they started"));
  }
  SUBCASE("nobody to meet") {
    Process second(variables(1, 2, "GCA_TIMEOUT=0.4"), training("run"), shop.output("out1"));
    CHECK(second.wait() == 1);
    CHECK(has(shop.printed("out1"), str("rank 1: expected rank 0 at 127.0.0.1 port ", port, ", found nobody there")));
  }
  SUBCASE("a port in use") {
    const Socket taken = Socket::listen("127.0.0.1", port);
    Process first(variables(0, 2), training("run"), shop.output("out0"));
    CHECK(first.wait() == 1);
    CHECK(has(shop.printed("out0"), str("port ", port, " of 127.0.0.1: expected a free one")));
    CHECK(has(shop.printed("out0"), "set GCA_PORT to another"));
    CHECK(shop.run(training("launched") + " --ranks 2").exit == 0);  // which takes one that is free
    const Workshop other(shop.command(str("GCA_PORT=", port)));
    other.fails(training("launched2") + " --ranks 2", 1, str("port ", port, " of 127.0.0.1: expected a free one"));
  }
  SUBCASE("an address that is not this host's") {
    Process first(variables(0, 2, "MASTER_ADDR=192.0.2.1"), training("run"), shop.output("out0"));
    CHECK(first.wait() == 1);
    CHECK(has(shop.printed("out0"), "MASTER_ADDR: expected the address of the host that rank 0 runs on"));
  }
  SUBCASE("two runs on one port") {
    Process first(variables(0, 2), training("run"), shop.output("out0"));
    usleep(200'000);
    Process other(variables(1, 2, "GCA_JOB=other"), training("other"), shop.output("other"));
    CHECK(other.wait() == 1);
    CHECK(has(shop.printed("other"), "is another run's, of 2 ranks: two runs on one port; set GCA_PORT"));
    Process second(variables(1, 2), training("run"), shop.output("out1"));
    CHECK(second.wait() == 0);
    CHECK(first.wait() == 0);
  }
  SUBCASE("a number twice") {
    Process first(variables(0, 3), training("run"), shop.output("out0"));
    Process second(variables(1, 3), training("run"), shop.output("out1"));
    usleep(300'000);
    Process twin(variables(1, 3), training("run"), shop.output("twin"));
    REQUIRE(twin.ends_within(20));
    CHECK(has(shop.printed("twin") + shop.printed("out1"), "is there already"));
  }
  SUBCASE("other settings") {
    Process first(variables(0, 2), training("run"), shop.output("out0"));
    Process second(variables(1, 2), training("run", {{"lr", "2e-3"}}), shop.output("out1"));
    CHECK(first.wait() == 1);
    CHECK(second.wait() == 1);
    CHECK(has(shop.printed("out0"), "rank 1 was started with other settings, weights or data than rank 0"));
    CHECK(shop.printed("out1") == "");
  }
  SUBCASE("a rank that cannot begin") {
    Process first(variables(0, 2), training("run"), shop.output("out0"));
    Process second(variables(1, 2), training("run", {{"data", shop.path + "/none"}}), shop.output("out1"));
    CHECK(first.wait() == 1);
    CHECK(second.wait() == 1);
    CHECK(has(shop.printed("out0"), "train_gca: rank 1 ("));
    CHECK(has(shop.printed("out0"), shop.path + "/none"));
  }
}

TEST_CASE("rank runs: info plans the memory of one of several GPUs") {
  const RankShop shop;
  const std::string info = "info --model drt --precision bf16 --batch 2 --gpus ";
  const std::string one = shop.run(info + "1").out, four = shop.run(info + "4").out;
  const auto size_of = [](const std::string& text, const char* name) {
    const size_t at = text.find(name);
    REQUIRE(at != text.npos);
    return strtod(text.c_str() + at + strlen(name), nullptr);
  };
  CHECK(has(four, "memory of training on a GPU in bf16, one of 4 together, 2 rows of 16640 slots"));
  for (const char* shared : {"Adam's first moment", "Adam's second moment", "  weights"})
    CHECK(size_of(four, shared) == doctest::Approx(size_of(one, shared) / 4).epsilon(0.01));
  for (const char* whole : {"working weights", "gradients", "logits"})
    CHECK(size_of(four, whole) == doctest::Approx(size_of(one, whole)).epsilon(0.001));
}

TEST_CASE("rank runs: --gpus and --ranks that make no sense are refused") {
  const RankShop shop;
  const std::string training = shop.tiny_training("run", {{"steps", "1"}});
  shop.fails(training + " --gpus 0", 2, "--gpus: expected a number from 1, or all, found '0'");
  shop.fails(training + " --gpus some", 2, "--gpus: expected a number from 1, or all, found 'some'");
  shop.fails(training + " --gpus 2 --device cpu", 2, "with --device cpu use --ranks N");
  shop.fails(training + " --gpus 2 --ranks 2", 2, "--gpus and --ranks exclude each other");
  const Workshop in_world(shop.command("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1"));
  in_world.fails(training + " --ranks 2", 2, "a launcher has started 2 ranks already");
}
