// What info says of a run, of one of its checkpoints, of an exported file; RUN/best.
#include "runtime/checkpoint.h"
#include "runtime/run.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

// A run of no learning rate, whose first validation stays the best, after step 5; only the newest step is kept beside.
std::string best_first(const Workshop& shop, const std::string& out) {
  return shop.training(out, {{"steps", "20"}, {"save-every", "5"}, {"keep", "1"}, {"lr", "0"}, {"lr-final", "0"}});
}

void cut_off(const std::string& path) { std::filesystem::resize_file(path, 10); }

}  // namespace

TEST_CASE("best: RUN/best is the checkpoint that the newest step remembers as that of the best validation") {
  const TempFolder folder;
  const std::string run = folder.path + "/run";
  make_folder(run);
  const auto save = [&](int64_t step, int64_t best) {
    Json state;
    state[best_step_field] = best;
    write_checkpoint(run, step, {{"w", [&](const std::string& path) { write_file(path, std::string(100, 'w')); }}},
                     state);
  };
  const auto error = [&](bool fallback = false) { return error_of([&] { open_checkpoint(run + "/best", fallback); }); };
  save(1, -1);
  CHECK(has(error(), "has no best checkpoint: expected a validation before step 1, found none; train with --val-data"));
  save(2, 2);
  save(3, 2);
  for (const char* best : {"/best", "/best/", "//best"}) CHECK(open_checkpoint(run + best).step == 2);
  const auto here = std::filesystem::current_path();
  std::filesystem::current_path(run);
  CHECK(open_checkpoint("best").step == 2);
  std::filesystem::current_path(here);
  // Pruning keeps it; where the newest is damaged the next one's word is taken, if that is wished.
  keep_checkpoints(run, 1, 2);
  CHECK(list_checkpoints(run) == std::vector<int64_t>{2, 3});
  cut_off(checkpoint_folder(run, 3) + "/state.json");
  CHECK(has(error(), "state.json' is cut off"));
  CHECK(has(error(), "--fallback takes an older one"));
  const Checkpoint older = open_checkpoint(run + "/best", true);
  CHECK(older.step == 2);
  CHECK(older.passed_over.size() == 1);
  remove_tree(checkpoint_folder(run, 3));
  // All of it is checked, but of the newest its state alone.
  save(3, 2);
  write_file(checkpoint_folder(run, 3) + "/w", std::string(100, 'x'));
  CHECK(open_checkpoint(run + "/best").step == 2);
  write_file(checkpoint_folder(run, 2) + "/w", std::string(100, 'x'));
  CHECK(has(error(), "step_00000002/w' has changed since it was saved"));
  remove_tree(checkpoint_folder(run, 2));
  CHECK(has(error(), "step_00000002', which step 3 remembers as the best, is missing"));
  std::string state = read_file(checkpoint_folder(run, 3) + "/state.json", 1000);
  state[state.find('2')] = '1';
  write_file(checkpoint_folder(run, 3) + "/state.json", state);
  CHECK(has(error(), "step_00000003/state.json' has changed since it was saved"));
  // A folder of that name is what it is.
  save(4, 3);
  rename_path(checkpoint_folder(run, 4), run + "/best");
  CHECK(open_checkpoint(run + "/best").step == 4);
  CHECK(has(error_of([&] { open_checkpoint(folder.path + "/none/best"); }), "cannot list the folder"));
}

TEST_CASE("best: whatever reads a checkpoint takes RUN/best; it survives pruning, and a save that failed is none") {
  const Workshop shop;
  REQUIRE(shop.run(best_first(shop, "run")).exit == 0);
  const std::string run = shop.path + "/run", best = " --checkpoint " + run + "/best";
  CHECK(list_checkpoints(run) == std::vector<int64_t>{5, 20});
  CHECK(says(shop.run("eval --chunks 6 --data '" + shop.path + "/shards/t_val_*'" + best), "step_00000005, "));
  CHECK(shop.run("generate --count 2 --prompt x" + best).exit == 0);
  CHECK(shop.run("inspect --text " + shop.path + "/text.txt" + best).exit == 0);
  const Workshop::Result exported = shop.run("export --out " + shop.path + "/best.safetensors" + best);
  CHECK(exported.exit == 0);
  CHECK(says(exported, "of step 5"));
  CHECK(shop.run(shop.training("tuned", {{"steps", "1"}, {"init", run + "/best"}})).exit == 0);

  // A best one that is gone is told, and does not stand in the way of the next.
  remove_tree(checkpoint_folder(run, 5));
  const Workshop::Result lost = shop.run("train --resume --out " + run);
  CHECK(lost.exit == 0);
  CHECK_MESSAGE(says(lost, "the checkpoint of the best validation, step 5, is gone: the next one is the best"),
                lost.out);

  // Step 5 cannot be saved: what has its name is no checkpoint and cannot be set aside.
  for (const char* taken : {"", ".2", ".3", ".4", ".5", ".6", ".7", ".8", ".9"})
    make_folder(shop.path + "/blocked/step_00000005.damaged" + taken);
  write_file(shop.path + "/blocked/step_00000005", "");
  const Workshop::Result blocked = shop.run(best_first(shop, "blocked"));
  CHECK_MESSAGE(says(blocked, "the checkpoint of step 5 was not saved"), blocked.out);
  CHECK(open_checkpoint(shop.path + "/blocked/best").step == 10);
}

TEST_CASE("info: what a run is, one of its checkpoints, an exported file") {
  const Workshop shop;
  REQUIRE(shop.run(best_first(shop, "run")).exit == 0);
  const std::string run = shop.path + "/run", file = shop.path + "/e.safetensors";
  REQUIRE(shop.run("export --checkpoint " + run + "/best --out " + file).exit == 0);
  const auto tells = [&](const std::string& path, int exit, const std::vector<std::string>& words) {
    const Workshop::Result result = shop.run("info " + path);
    CHECK(result.exit == exit);
    for (const std::string& word : words) CHECK_MESSAGE(says(result, word), result.out);
  };
  const std::vector<std::string> model = {"best         step 5, validation loss 5.6",
                                          "model        D=16 H=2 F=24, 1 lower + (1,1) upper layers",
                                          "tokenizer    bytes", " --chunks 6 --batch 3 --width 16 ", " --lr 0.0 "};
  for (const std::string& path : {run, run + "/", run + "/best", run + "/step_00000005", file}) tells(path, 0, model);
  const std::string progress = "steps        20 of 20, 2520 tokens";
  tells(run, 0,
        {"run          " + run, "saved        20", progress, "log          step 20, loss 5.5",
         "--data '" + shop.path + "/shards/t_train_*'", "device       CPU", "\n  step_00000005 ", ", best\n",
         "\n  step_00000020 ", ", newest\n", "\n    model.safetensors ", "\n    state.json ", "\n  log.jsonl "});
  tells(run + "/best", 0,
        {"checkpoint   " + run + "/step_00000005", "steps        5 of 20", "\n  optimizer.safetensors "});
  tells(file, 0, {"file         " + file + ", exported", "written      20", "steps        5 of 20", "tensors in BF16"});
  REQUIRE(shop.run(shop.training("tokens", {{"tokens", "200"}})).exit == 0);
  CHECK(says(shop.run("info " + shop.path + "/tokens"), " --window 12 --tokens 200 "));
  cut_off(run + "/step_00000020/model.safetensors");
  tells(run, 1, {"steps        5 of 20", "step_00000020                damaged: ", "is cut off: expected "});
  remove_tree(run + "/step_00000005");
  tells(run, 1, {"has no whole checkpoint"});
  remove_tree(run + "/step_00000020");
  tells(run, 0, {"nothing saved yet", "log          step 20, loss 5.5"});
  tells(shop.path + "/shards", 1, {"has no checkpoint"});
  tells(run + " --batch 2", 2, {"takes no flags, found --batch"});
  tells(run + " " + run, 2, {"expected one RUN"});
}
