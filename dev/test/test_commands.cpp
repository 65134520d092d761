// The program from outside: build/cpu/train_gca as a user runs it.
#include <signal.h>

#include <fstream>
#include <tuple>

#include "base/json.h"
#include "base/safetensors.h"
#include "commands/shared.h"
#include "dataloader.h"
#include "model.h"
#include "runtime/checkpoint.h"
#include "dev/test/workshop.h"

using namespace gca;
using test::FlagMap;
using test::has;
using test::says;
using test::with;
using test::Workshop;

TEST_CASE("training goes on after a stop bit for bit, and whatever the number of threads") {
  const Workshop shop;
  REQUIRE(shop.run(shop.training("whole") + " --steps 12 --save-every 6 --threads 1").exit == 0);
  REQUIRE(shop.run(shop.training("cut") + " --steps 12 --save-every 6 --threads 2 --keep 9").exit == 0);
  CHECK(shop.weights("whole", "00000012") == shop.weights("cut", "00000012"));
  for (const char* later : {"10", "12"})
    remove_tree(shop.path + "/cut/step_000000" + later);  // as if killed after step 6
  REQUIRE(list_folder(shop.path + "/cut").back() == "step_00000006");
  const Workshop::Result resumed = shop.run("train --resume --out " + shop.path + "/cut --threads 2");
  CHECK(resumed.exit == 0);
  CHECK(says(resumed, "from step 6"));
  CHECK(shop.weights("whole", "00000012") == shop.weights("cut", "00000012"));
  // Another seed is another model: the comparison can fail.
  REQUIRE(shop.run(shop.training("other") + " --steps 12 --save-every 6 --seed 2").exit == 0);
  CHECK(shop.weights("whole", "00000012") != shop.weights("other", "00000012"));
}

TEST_CASE("log.jsonl has each step once, with its time, whatever a killed run left in it") {
  const Workshop shop;
  const std::string log = shop.path + "/run/log.jsonl";
  const auto lines = [&] {
    std::vector<std::string> all;
    std::ifstream file(log);
    for (std::string line; std::getline(file, line);) all.push_back(line + "\n");
    return all;
  };
  const auto joined = [](const std::vector<std::string>& parts, size_t begin, size_t end) {
    std::string all;
    for (size_t i = begin; i < end; i++) all += parts[i];
    return all;
  };
  for (const char* ranks : {"1", "2"}) {
    CAPTURE(ranks);
    remove_tree(shop.path + "/run");
    REQUIRE(
        shop.run(shop.training("run", {{"eval-every", "2"}}) + " --steps 12 --save-every 4 --keep 9 --ranks " + ranks)
            .exit == 0);
    const std::vector<std::string> whole = lines();
    REQUIRE(whole.size() == 18);
    // After step 8: 12 lines. Then what the log was when the process was killed, and how many lines are no more.
    const std::string told = joined(whole, 0, 18), note = "{\"note\":\"the rate was lower\"}\n";
    const std::tuple<const char*, std::string, int> cases[] = {
        {"killed in step 13", told, 6},
        {"cut off", joined(whole, 0, 13) + whole[13].substr(0, 20), 2},
        {"cut off, and nothing else", joined(whole, 0, 12) + "{", 1},
        {"at the save", joined(whole, 0, 12), 0},
        {"before steps stood once", joined(whole, 0, 9) + joined(whole, 3, 15) + joined(whole, 12, 18), 15},
        {"two in one line", joined(whole, 0, 12) + "{\"st" + whole[12], 1},
        {"with somebody's note", joined(whole, 0, 12) + note + whole[12], 1},
        {"removed", "", 0},
    };
    for (const auto& [name, text, left_out] : cases) {
      CAPTURE(name);
      for (const std::string& step : list_folder(shop.path + "/run"))
        if (step > "step_00000008") remove_tree(shop.path + "/run/" + step);
      if (text.empty()) std::filesystem::remove(log);
      else write_file(log, text);
      const Workshop::Result resumed =
          shop.run("train --resume --out " + shop.path + "/run --device cpu --ranks " + ranks);
      CAPTURE(resumed.out);
      REQUIRE(resumed.exit == 0);
      REQUIRE(says(resumed, "from step 8"));
      CHECK(says(resumed, "goes back to step 8: ") == (left_out > 0));
      CHECK(says(resumed, str("goes back to step 8: ", left_out, " lines")) == (left_out > 0));
      int64_t step = text.empty() ? 8 : 0, validated = step;
      double time = 1.7e9;
      for (const std::string& line : lines()) {
        if (line == note) continue;
        const Json json = parse_json(line, "log.jsonl");
        const JsonField field(json, "log.jsonl");
        if (field.has("val_loss")) CHECK(field.at("step").integer() == (validated += 2));
        else CHECK(field.at("step").integer() == ++step);
        CHECK(field.at("time").number() >= time);
        time = field.at("time").number();
      }
      CHECK(step == 12);
      CHECK(validated == 12);
      CHECK(has(read_file(log, 1 << 20), note) == has(text, note));
    }
  }
}

TEST_CASE("micro-batches change a run by rounding only") {
  const Workshop shop;
  const Workshop::Result one = shop.run(shop.training("one") + " --steps 5"),
                         three = shop.run(shop.training("three") + " --steps 5 --micro-batch 1");
  REQUIRE(one.exit == 0);
  REQUIRE(three.exit == 0);
  auto losses = [](const std::string& out) {
    std::vector<std::string> found;
    for (size_t at = 0; (at = out.find("  loss ", at)) != std::string::npos; at += 7)
      found.push_back(out.substr(at + 7, 6));
    return found;
  };
  CHECK(losses(one.out).size() == 5);
  CHECK(losses(one.out) == losses(three.out));
}

TEST_CASE("a run goes on to another end, as it would have gone there; what changes is said") {
  const Workshop shop;
  const auto train = [&](const std::string& out, const FlagMap& others) {
    const Workshop::Result result =
        shop.run(shop.training(out, with({{"warmup", "2"}, {"lr-final", "3e-3"}}, others)));  // a constant rate
    REQUIRE(result.exit == 0);
  };
  const auto resume = [&](const std::string& flags) {
    const Workshop::Result result = shop.run("train --resume --out " + shop.path + "/run " + flags);
    CHECK_MESSAGE(result.exit == 0, result.out);
    return result;
  };
  const auto refused = [&](const std::string& flags, const std::string& words) {
    shop.fails("train --resume --out " + shop.path + "/run " + flags, 2, words);
  };
  train("longer", {{"steps", "12"}});
  train("run", {{"steps", "6"}});
  train("young", {{"steps", "2"}, {"warmup", "-1"}, {"batch", "1"}});
  const Workshop::Result longer = resume("--steps 12");
  CHECK_MESSAGE(says(longer,
                     "changed      12 steps instead of 6, after the same 2 of warm-up: the cosine ends there, "
                     "and the rate of step 7 is 0.003, where that of the run as it was is 0.003\n"),
                longer.out);
  CHECK(shop.weights("longer", "00000012") == shop.weights("run", "00000012"));
  // The new end is the run's own from then on; fewer steps than there are is none.
  const Workshop::Result same = resume("");
  CHECK(says(same, "all 12 steps were made already; for more, give a larger --steps"));
  CHECK_FALSE(says(same, "changed"));
  CHECK_FALSE(says(resume("--steps 12"), "changed"));
  refused("--steps 11", "--steps: expected 12 steps at least, which the run has made already, found 11; give more");
  refused("--tokens 100", "--tokens: expected 12 steps at least, which the run has made already, found 1;");
  refused("--steps 13 --tokens 4000", "found both");
  for (const char* other : {"--batch 2", "--lr 1", "--warmup 3", "--chunks 5", "--seed 2", "--width 32"})
    refused(str("--steps 13 ", other), "the run was started with '");
  CHECK(says(resume("--tokens 1700"), "14 steps instead of 12"));  // 3 rows of 42 tokens a step
  CHECK(says(resume("--steps 15"), "15 steps instead of 14"));
  CHECK(says(shop.run("train --resume --steps 60 --print-every 1000 --out " + shop.path + "/young"),
             "60 steps instead of 2, after the same 0 of warm-up"));
  // Stopped on its way it may end sooner.
  train("long", {{"steps", "8"}, {"save-every", "4"}, {"keep", "9"}, {"lr-final", "0"}, {"warmup", "-1"}});
  rename_path(shop.path + "/run", shop.path + "/first");
  rename_path(shop.path + "/long", shop.path + "/run");
  remove_tree(shop.path + "/run/step_00000008");
  const Workshop::Result shorter = resume("--steps 6");
  CHECK_MESSAGE(says(shorter,
                     "changed      6 steps instead of 8, after the same 0 of warm-up: the cosine ends there, "
                     "and the rate of step 6 is 0.000201, where that of the run as it was is 0.000926\n"),
                shorter.out);
  CHECK(list_checkpoints(shop.path + "/run").back() == 6);
}

TEST_CASE("a run goes on in smaller pieces: the same batch, other last bits, and it says so") {
  const Workshop shop;
  const FlagMap flags = {{"save-every", "4"}, {"keep", "9"}, {"steps", "8"}};
  REQUIRE(shop.run(shop.training("whole", flags)).exit == 0);
  std::filesystem::copy(shop.path + "/whole", shop.path + "/run", std::filesystem::copy_options::recursive);
  remove_tree(shop.path + "/run/step_00000008");
  const std::string resume = "train --resume --out " + shop.path + "/run --steps 8 ";
  const Workshop::Result pieces = shop.run(resume + "--micro-batch 1");
  CHECK_MESSAGE(pieces.exit == 0, pieces.out);
  CHECK(says(pieces,
             "changed      1 rows at once instead of 3: the batch stays 3 rows, but sums are made in another "
             "order, so results differ in their last bits"));
  CHECK(shop.weights("run", "00000008") != shop.weights("whole", "00000008"));
  const auto weights = [&](const std::string& run) {
    return SafetensorsFile::open(shop.path + "/" + run + "/step_00000008/model.safetensors")
        .values<float>("model.embed_tokens.weight");
  };
  const std::vector<float> a = weights("run"), b = weights("whole");
  for (size_t i = 0; i < a.size(); i++) REQUIRE(a[i] == doctest::Approx(b[i]).epsilon(1e-3).scale(1e-3));
  // It is remembered; all at once again is what the run was.
  remove_tree(shop.path + "/run/step_00000008");
  CHECK(says(shop.run(resume + "--micro-batch 3"), "saved step 8"));
  CHECK(shop.weights("run", "00000008") == shop.weights("whole", "00000008"));
  shop.fails(resume + "--micro-batch 4", 2, "--micro-batch: expected at most --batch, 3, found 4");
}

TEST_CASE("a signal ends a run within a step, with a whole checkpoint to go on from") {
  const Workshop shop;
  const pid_t child = fork();
  if (child == 0) {
    const std::string command =
        "exec " + shop.program + " " + shop.training("run") + " --steps 1000000 > " + shop.path + "/log 2>&1";
    execl("/bin/sh", "sh", "-c", command.c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  CHECK(shop.logged("run", 3));
  kill(child, SIGTERM);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  const std::string out = read_file(shop.path + "/log", size_t{1} << 24);
  CHECK(out.find("stopped after step") != std::string::npos);
  CHECK(out.find("--resume") != std::string::npos);
  CHECK(shop.run("eval --checkpoint " + shop.path + "/run --rows 2 --data '" + shop.path + "/shards/t_val_*'").exit ==
        0);
}

TEST_CASE("eval, generate and inspect read a checkpoint; greedy generation repeats; fine-tuning starts from weights") {
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run") + " --steps 40 --save-every 20").exit == 0);
  const std::string checkpoint = " --checkpoint " + shop.path + "/run",
                    data = " --data '" + shop.path + "/shards/t_val_*'";
  const Workshop::Result eval = shop.run("eval" + checkpoint + data),
                         none = shop.run("eval --no-retrieval" + checkpoint + data);
  CHECK(eval.exit == 0);
  CHECK(says(eval, "bits per byte"));
  CHECK(none.exit == 0);
  CHECK(says(none, "without retrieval"));
  CHECK(eval.out.substr(eval.out.find("loss")) != none.out.substr(none.out.find("loss")));
  const auto hash = [](const Workshop::Result& result) {
    const size_t at = result.out.find("slots/s)  hash ");
    REQUIRE(at != result.out.npos);
    return result.out.substr(at, 23);
  };
  CHECK(hash(eval) == hash(shop.run("eval --threads 1" + checkpoint + data)));
  CHECK(hash(eval) != hash(none));
  CHECK(shop.run("eval --random-retrieval" + checkpoint + data).exit == 0);
  CHECK(shop.run("eval --random-retrieval --no-retrieval" + checkpoint + data).exit == 2);
  const std::string greedy = "generate --temperature 0 --count 40 --prompt 'the sea 3; '" + checkpoint;
  CHECK(shop.run(greedy).out == shop.run(greedy).out);
  CHECK(shop.run(greedy).out.starts_with("the sea 3; "));
  const std::string drawn = "generate --count 40 --prompt 'the sea 3; '" + checkpoint;
  CHECK(shop.run(drawn).out == shop.run(drawn + " --seed 1").out);
  CHECK(shop.run(drawn).out != shop.run(drawn + " --seed 2").out);
  CHECK(shop.run(greedy + " --context " + shop.path + "/text.txt").exit == 0);
  // Several at once: what each gives alone, a line of JSON a piece.
  write_file(shop.path + "/prompts", "the sea 3; \r\na ship\n\nthe sea 4; the sea 5; a");
  const std::string alone_flags = "generate --temperature 0 --count 40 --prompt ";
  const auto as_json = [](const std::string& text) {  // what is not UTF-8 is U+FFFD there
    return JsonField(parse_json(Json(text).dump(), "x"), "x").string();
  };
  for (const char* batch : {"1", "3", "16"}) {
    const std::string several = "generate --temperature 0 --count 40 --prompts " + shop.path + "/prompts --batch ";
    const Workshop::Result texts = shop.run(several + batch + checkpoint);
    CHECK(texts.exit == 0);
    std::map<int64_t, std::string> found;
    std::map<int64_t, int> ends;
    std::istringstream lines(texts.out);
    for (std::string line; std::getline(lines, line);) {
      if (!line.starts_with("{")) continue;  // of standard error
      const Json json = parse_json(line, "a line");
      const JsonField field{json, "a line"};
      const int64_t prompt = field.at("prompt").integer();
      if (field.has("text")) found[prompt] += field.at("text").string();
      else ends[prompt] += field.at("tokens").integer() == 40 && field.at("end").string() == "count" ? 1 : 100;
    }
    CHECK(ends == std::map<int64_t, int>{{1, 1}, {2, 1}, {3, 1}, {4, 1}});
    const auto alone = [&](const std::string& prompt) {
      return as_json(shop.run(alone_flags + "'" + prompt + "'" + checkpoint).out);
    };
    CHECK("the sea 3; " + found[1] + "\n" == alone("the sea 3; "));
    CHECK("a ship" + found[2] + "\n" == alone("a ship"));
    CHECK(found[3] + "\n" == alone(""));
    CHECK(says(texts, "4 prompts, "));
    CHECK(says(texts, "160 tokens generated"));
  }
  // A context before each: what it is before one.
  const std::string drawn_hot = " --temperature 3 --count 40" + checkpoint,
                    context = " --context " + shop.path + "/text.txt" + drawn_hot;
  write_file(shop.path + "/one", "a ship");
  std::string pieces;
  std::istringstream in(shop.run("generate --prompts " + shop.path + "/one" + context).out);
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("{\"prompt\":1,\"text\""))
      pieces += JsonField(parse_json(line, "a line"), "a line").at("text").string();
  CHECK("a ship" + pieces + "\n" == as_json(shop.run("generate --prompt 'a ship'" + context).out));
  CHECK("a ship" + pieces + "\n" != as_json(shop.run("generate --prompt 'a ship'" + drawn_hot).out));
  shop.fails("generate --prompts x --prompt y" + checkpoint, 2, "exclude each other");
  shop.fails("generate --prompts x --save-memory y" + checkpoint, 2, "--save-memory is of one text");
  shop.fails("generate --prompt x --batch 2" + checkpoint, 2, "--batch is of --prompts");
  write_file(shop.path + "/none", "");
  shop.fails("generate --prompts " + shop.path + "/none" + checkpoint, 1, "expected a prompt a line");
  write_file(shop.path + "/short.txt", "the sea 1; a ship 2; the sea 3; a ship 4; ");
  const Workshop::Result inspected = shop.run("inspect --text " + shop.path + "/short.txt" + checkpoint);
  CHECK(inspected.exit == 0);
  CHECK(says(inspected, "group 1 fetches"));
  // Wide characters of four bytes, whatever the chunks' edges: whole, and as many columns as asked for.
  std::string wide;
  for (int i = 0; i < 40; i++) wide += "\xF0\x9F\x99\x82\xE6\x9D\xB1";
  write_file(shop.path + "/wide.txt", wide);
  const Workshop::Result columns_of = shop.run("inspect --columns 10 --text " + shop.path + "/wide.txt" + checkpoint);
  CHECK(columns_of.exit == 0);
  CHECK_FALSE(says(columns_of, "\\x"));
  for (size_t at = 0; at < columns_of.out.size(); at += std::max<size_t>(1, utf8_length(columns_of.out.substr(at))))
    REQUIRE(utf8_length(columns_of.out.substr(at)) > 0);
  const Workshop::Result tuned =
      shop.run(shop.training("tuned") + " --steps 2 --null-slot off --init " + shop.path + "/run");
  CHECK(tuned.exit == 0);
  CHECK(says(tuned, "note: --null-slot: the weights in "));
}

TEST_CASE("the newest chunks that are fetched are those that do not lie wholly in the window of all that they serve") {
  CHECK(distance_beyond_window(128, 64) == 1);
  // Slot 63 of chunk c+1 sees 513 slots: chunks c+1 .. c-6 whole, and one slot of c-7.
  CHECK(distance_beyond_window(512, 64) == 7);
  CHECK(distance_beyond_window(12, 8) == 1);
  CHECK(distance_beyond_window(0, 8) == 1);
  // Slot by slot: the chunk at that distance has a slot that the last one does not see, the one after it has none.
  for (int64_t S = 2; S < 9; S++)
    for (int64_t W = 0; W < 70; W++) {
      const int64_t c = 100, last_served = (c + 2) * S - 1, m = c - distance_beyond_window(W, S);
      CHECK(m * S < last_served - W);
      if (m + 1 < candidates(c)) CHECK((m + 1) * S >= last_served - W);
    }
}

TEST_CASE("picks and their weights are chosen alike in eval, passkey and inspect; short forms mean the same") {
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run", {{"steps", "3"}})).exit == 0);
  REQUIRE(shop.run(shop.training("baseline", {{"steps", "1"}, {"groups", ""}})).exit == 0);
  write_file(shop.path + "/short.txt", read_file(shop.path + "/text.txt", size_t{1} << 24).substr(0, 70));
  const std::string checkpoint = " --checkpoint " + shop.path + "/run",
                    eval = "eval --data '" + shop.path + "/shards/t_val_*'" + checkpoint + " ",
                    inspect = "inspect --text " + shop.path + "/short.txt" + checkpoint + " ";
  const auto hash = [&](const std::string& flags) {
    const Workshop::Result result = shop.run(eval + flags);
    CAPTURE(flags);
    REQUIRE(result.exit == 0);
    return result.out.substr(result.out.find("hash ") + 5, 8);
  };
  const std::vector<std::string> each = {hash(""), hash("--picks random"), hash("--picks newest"), hash("--picks none"),
                                         hash("--pick-weights equal")};
  for (size_t i = 0; i < each.size(); i++)
    for (size_t j = 0; j < i; j++) CHECK(each[i] != each[j]);
  CHECK(hash("--picks learned --pick-weights scores") == each[0]);
  CHECK(hash("--random-retrieval") == each[1]);
  CHECK(hash("--no-retrieval --picks none") == each[3]);
  CHECK(says(shop.run(eval + "--picks newest --pick-weights equal"), " tokens), newest chunks, equal weights\n"));

  // Chunks of 8 slots, windows of 12: chunk 5 fetches 4 and 3, half and half.
  const Workshop::Result newest = shop.run(inspect + "--picks newest --pick-weights equal");
  CHECK(says(newest, "10 chunks of 8 slots, newest chunks, equal weights\n"));
  const std::string of_five = newest.out.substr(newest.out.find("\nchunk 5:"));
  for (const char* group : {"0", "1"}) {
    const size_t at = of_five.find(str("  group ", group, " fetches     4  0.500"));
    CHECK(at < of_five.find(str("  group ", group, " fetches     3  0.500")));
    CHECK(at < of_five.find("\nchunk 6:"));
  }
  CHECK(shop.run(inspect).out != newest.out);
  // The latest are the newest where windows are short. Where all of chunk 2 on is in the window that chunk 6 has, chunk
  // 5 fetches 1 and 0 as the newest.
  CHECK(hash("--picks latest") == each[2]);
  REQUIRE(shop.run(shop.training("wide", {{"steps", "1"}, {"window", "40"}})).exit == 0);
  const std::string wide = "inspect --text " + shop.path + "/short.txt --checkpoint " + shop.path + "/wide --picks ";
  for (const auto& [picks, first] : {std::pair{"latest", "4"}, std::pair{"newest", "1"}}) {
    const std::string out = shop.run(wide + picks + " --pick-weights equal").out;
    CHECK(says(shop.run(wide + picks), str("10 chunks of 8 slots, ", picks)));
    CHECK(out.substr(out.find("\nchunk 5:")).find(str("  group 0 fetches     ", first, "  0.500")) <
          out.substr(out.find("\nchunk 5:")).find("\nchunk 6:"));
  }
  CHECK_FALSE(says(shop.run(inspect + "--no-retrieval"), "fetches"));

  for (const std::string& command :
       {eval, inspect, "passkey --haystack " + shop.path + "/short.txt" + checkpoint + " "}) {
    shop.fails(command + "--picks newest --random-retrieval", 2, "expected no other picks, found --picks newest");
    shop.fails(command + "--picks learned --no-retrieval", 2, "--no-retrieval: expected no other picks");
    shop.fails(command + "--picks last", 2, "learned|noisy|random|latest|newest|");
    shop.fails(command + "--no-retrieval --pick-weights equal", 2, "expected chunks to weigh");
  }
  const std::string baseline =
      "eval --checkpoint " + shop.path + "/baseline --data '" + shop.path + "/shards/t_val_*' ";
  CHECK(shop.run(baseline + "--picks learned").exit == 0);
  for (const char* picks : {"--picks newest", "--picks none", "--random-retrieval", "--pick-weights equal"})
    shop.fails(baseline + picks, 2, "found a sliding-window baseline");
}

TEST_CASE(
    "what is wrong with a command line or a file is said, with its name and the mend, and nothing is overwritten") {
  const Workshop shop;
  auto fails = [&](const std::string& arguments, int exit, const std::string& words) {
    shop.fails(arguments, exit, words);
  };
  fails("trian", 2, "did you mean train?");
  fails("train --widht 3", 2, "did you mean --width?");
  fails("train --width", 2, "needs a value");
  fails("train --width 12x", 2, "expected a whole number");
  fails("train --width 3 --width 4", 2, "given twice");
  fails("train --null-slot maybe", 2, "expected on or off, found 'maybe'");
  fails("train --model drf", 2, "did you mean drt?");
  fails("train --data x", 2, "needs --out");
  fails("eval", 2, "needs --checkpoint");
  fails(shop.training("run"), 2, "either --steps or --tokens");
  fails(shop.training("run") + " --steps 3 --encoder -1", 2, "--encoder: expected");
  fails(shop.training("run", {{"chunks", "100000"}}) + " --steps 3", 1, "fewer chunks");
  fails("train --steps 3 --out " + shop.path + "/x --data '" + shop.path + "/none_*'", 1, "none_*");
  fails(shop.training("run") + " --steps 3 --init " + shop.path + "/text.txt", 1, "text.txt");
  fails("eval --checkpoint " + shop.path + "/nowhere --data x", 1, "nowhere");
  remove_tree(shop.path + "/run");
  REQUIRE(shop.run(shop.training("run") + " --steps 3").exit == 0);
  fails(shop.training("run") + " --steps 3", 1, "holds a run already");
  fails("train --resume --out " + shop.path + "/run --width 32", 2, "the run was started with '16'");
  // Data that have changed since, and a damaged checkpoint.
  const std::string shard = shop.path + "/shards/t_train_000000.bin";
  std::string bytes = read_file(shard, size_t{1} << 24);
  bytes[bytes.size() - 10] ^= 1;
  write_file(shard, bytes);
  fails("train --resume --out " + shop.path + "/run", 1, "is not what");
  const std::string file = shop.path + "/run/step_00000003/model.safetensors";
  bytes = read_file(file, size_t{1} << 24);
  bytes[bytes.size() / 2] ^= 1;
  write_file(file, bytes);
  fails("eval --checkpoint " + shop.path + "/run --data '" + shop.path + "/shards/t_val_*'", 1,
        "has changed since it was saved");
}

TEST_CASE("a tokenizer is learned, used, and its shards looked into") {
  const Workshop shop;
  const std::string texts = shop.path + "/texts", bpe = shop.path + "/new/t.bpe",
                    learn = "tokenizer-train --vocab-size 266 --out " + bpe + " " + texts;
  make_folder(texts + "/val");
  write_file(texts + "/a.txt", read_file(shop.path + "/text.txt", size_t{1} << 24));
  write_file(texts + "/b.txt", "\x1b[2Jthe sea");
  write_file(texts + "/empty.txt", "");
  write_file(texts + "/val/v.txt", "zqzqzqzqzqzqzqzqzqzq");
  const Workshop::Result learned = shop.run(learn);
  CHECK(learned.exit == 0);
  CHECK(says(learned, "2 documents, "));
  CHECK(says(learned, ": 10 merges, V = 273 with the special ids"));
  const Tokenizer tokenizer = Tokenizer::load(bpe);
  CHECK(tokenizer.vocab_size() == 273);
  CHECK(tokenizer.encode("the").size() == 1);
  CHECK(tokenizer.encode("zq").size() == 2);  // what is kept for validation is not learned from
  const Workshop::Result again = shop.run(learn);
  CHECK(again.exit == 1);
  CHECK(says(again, "t.bpe' is there already"));
  CHECK(Tokenizer::load(bpe).hash() == tokenizer.hash());
  CHECK(says(shop.run("tokenizer-train --out " + bpe + "2 " + texts), "needs --vocab-size N"));
  CHECK(shop.run("tokenizer-train --vocab-size 255 --out " + bpe + "2 " + texts).exit == 2);
  CHECK(shop.run("tokenizer-train --vocab-size 266 " + texts).exit == 2);
  CHECK(
      says(shop.run("tokenizer-train --vocab-size 266 --out " + bpe + "2 " + texts + "/none"), "none': No such file"));
  CHECK(!std::filesystem::exists(bpe + "2"));

  REQUIRE(shop.run("tokenize --tokenizer " + bpe + " --shard-tokens 9000 --out " + shop.path + "/s " + texts +
                   "/b.txt " + texts + "/a.txt")
              .exit == 0);
  const std::string info = "info --data '" + shop.path + "/s_train_*' --first 9 --tokenizer ";
  const Workshop::Result shown = shop.run(info + bpe);
  CHECK(shown.exit == 0);
  const int64_t tokens = TokenStream(shop.path + "/s_train_*", tokenizer).tokens();
  CHECK(tokens > 9000);
  CHECK(says(shown, str(ceil_div(tokens, 9000), " shards, ", tokens,
                        " tokens, 2 documents (end-of-text tokens), 0 ids out of vocabulary")));
  CHECK(says(shown, str(left("s_train_000000.bin", 40), " ", right(1024 + 2 * 9000, 14), " ", right(9000, 14), " ",
                        right(2, 12), " ", right(0, 18), "\n")));
  CHECK(says(shown, str("byte-level BPE of 266, V = 273, hash ", hex(tokenizer.hash(), 16))));
  CHECK(says(shown, "the first 9 tokens: <|endoftext|>\\x1b[2Jthe"));
  const Workshop::Result other = shop.run(info + "bytes");
  CHECK(other.exit == 1);
  CHECK(says(other, "s_train_000000.bin' was made with another tokenizer"));

  // A shard that does not say whose it is, with ids that the tokenizer does not have.
  const std::string shard = shop.path + "/s_train_000001.bin";
  std::string content = read_file(shard, size_t{1} << 24);
  memset(content.data() + 12, 0, 8);
  memset(content.data() + 1024, 0xFF, 6);
  write_file(shard, content);
  const Workshop::Result stray = shop.run("info --data " + shard + " --first 4 --tokenizer " + bpe);
  CHECK(stray.exit == 1);
  CHECK(says(stray, "3 ids out of vocabulary"));
  CHECK(
      says(stray,
           "the first 4 tokens: <|65535, out of vocabulary|><|65535, out of vocabulary|><|65535, out of vocabulary|>"));
  CHECK(says(stray, "1 of 1 shards do not say which tokenizer made them"));
  write_file(shard, content.substr(0, content.size() - 1));
  CHECK(says(shop.run(info + bpe), "s_train_000001.bin': the header says"));
  write_file(shard, "no shard");
  CHECK(says(shop.run(info + bpe), "s_train_000001.bin': expected a token shard"));
  CHECK(says(shop.run("info --data " + shop.path + "/none_*"), "no file matches"));
}

TEST_CASE("help of every command, and the list of commands") {
  const Workshop shop;
  const Workshop::Result list = shop.run("");
  CHECK(list.exit == 0);
  for (const char* command :
       {"tokenizer-train", "tokenize", "encode", "decode", "train", "eval", "generate", "inspect", "verify", "info"}) {
    CAPTURE(command);
    CHECK(says(list, std::string("\n  ") + command));
    const Workshop::Result help = shop.run(std::string(command) + " --help");
    CHECK(help.exit == 0);
    CHECK(says(help, std::string("train_gca ") + command));
  }
}

namespace {

// A GPU's model in bf16, as far as its memory goes.
struct PlannedGpu : GpuLayout {
  using act = uint16_t;
  using weight = uint16_t;
  using master = float;
  static constexpr bool weights_are_masters = false;
  void release(void*) {}
};

}  // namespace

TEST_CASE("info: the paper's model, its parameters and its memory") {
  const Workshop shop;
  Config config = presets()[0].config;
  REQUIRE(presets()[0].name == std::string("drt"));
  config.vocab = 50304;
  CHECK(says(shop.run("info --model drt --vocab 50304"), str(TensorTable(config, 1, 1).parameters(), " parameters")));
  // 15997.8 and 5980.3 MiB with 145980672 parameters, of the same plan that a GPU's memory is taken by.
  config.vocab = 50265;
  PlannedGpu device;
  for (const auto& [recompute, name, activations] : {std::tuple{Recompute::none, "none", int64_t{14146705664}},
                                                     {Recompute::layers, "layers", int64_t{3642605824}}}) {
    CAPTURE(name);
    DRT<PlannedGpu> model(device, config);
    model.recompute = recompute;
    model.plan(2, 260 * config.chunk);
    CHECK(model.activation_memory().total_bytes() == activations);
    const int64_t all = model.model_memory().total_bytes() + activations;
    CHECK(says(shop.run(std::string("info --model drt --batch 2 --precision bf16 --recompute ") + name),
               str(mebibytes(all), "\n")));
  }
}

TEST_CASE("eval tells losses by place: the first chunk, then stretches that each end twice as far") {
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run", {{"chunk", "5"}, {"steps", "1"}})).exit == 0);
  const std::string eval =
      "eval --checkpoint " + shop.path + "/run --data '" + shop.path + "/shards/t_val_*' --chunks ";
  const Workshop::Result one = shop.run(eval + "1"), three = shop.run(eval + "3");
  CHECK(says(one, " 0..4 "));
  for (const char* slots : {" 0..4 ", " 5..9 ", " 10..14 "}) CHECK(says(three, slots));
  // In segments of any length: the same bits, the same hash.
  const auto hash = [&](const std::string& flags) {
    const std::string out = shop.run(eval + "3 --batch 2 " + flags).out;
    return out.substr(out.find("hash ") + 5, 8);
  };
  CHECK(hash("--batch-slots 10") == hash(""));
  CHECK(hash("--batch-slots 1") == hash(""));
  CHECK(hash("--score-last 1") != hash(""));
  CHECK(hash("--score-last 1 --batch-slots 10") == hash("--score-last 1"));
}

TEST_CASE(
    "output that cannot be written ends every command with exit 1 and a sentence, a training after its last save") {
  if (!std::filesystem::exists("/dev/full")) return test::skip("no /dev/full");
  const Workshop shop;
  REQUIRE(shop.run(shop.training("run") + " --steps 3").exit == 0);
  const std::string run = " --checkpoint " + shop.path + "/run", text = shop.path + "/text.txt",
                    data = " --data '" + shop.path + "/shards/t_val_*'";
  const auto with_output = [&](const std::string& arguments, const std::string& output) {
    const std::string errors = shop.path + "/errors";
    const int status = system((shop.program + " < " + text + " " + arguments + " 2> " + errors + " " + output).c_str());
    return Workshop::Result{WEXITSTATUS(status), read_file(errors, 1 << 20)};
  };
  int count = 0;
  for (const std::string& arguments : std::vector<std::string>{
           "", "help", "train --help", "eval -h", "info", "info" + data, "eval" + run + data + " --rows 2",
           "eval" + run + data + " --rows 4 --by-reach", "inspect" + run + " --text " + text,
           "passkey" + run + " --haystack " + text + " --value-tokens 2 --length 80 --trials 2",
           "passkey" + run + " --haystack " + text + " --value-tokens 2 --length 80 --trials 2 --show 1",
           "generate" + run + " --prompt a --count 5", "generate" + run + " --prompts " + text + " --count 1",
           "export" + run + " --out " + shop.path + "/weights", "verify --retrieval", "encode",
           "decode < " + shop.path + "/ids", "tokenize --out " + shop.path + "/more/t " + text,
           "tokenizer-train --vocab-size 260 --out " + shop.path + "/bpe " + text}) {
    CAPTURE(arguments);
    write_file(shop.path + "/ids", "97 98\n");
    const Workshop::Result full = with_output(arguments, "> /dev/full");
    CAPTURE(full.out);
    CHECK(full.exit == 1);
    CHECK(says(full, "No space left on device; free some space"));
    count++;
  }
  CHECK(count == 19);
  shop.fails("eval" + run + data + " --rows 4 --by-reach --out /dev/full", 1,
             "cannot write '/dev/full': No space left");
  // A pipe that nobody reads ends it without a word, as a pipe does.
  write_file(shop.path + "/script", shop.program + " train --help 2>" + shop.path + "/errors | sleep 0\n");
  CHECK(system(("sh " + shop.path + "/script").c_str()) == 0);
  CHECK(read_file(shop.path + "/errors", 1000) == "");
  // A training has its log and its checkpoint by then.
  const Workshop::Result full = with_output(shop.training("full") + " --steps 3", "> /dev/full");
  CAPTURE(full.out);
  CHECK(full.exit == 1);
  CHECK(says(full, "cannot write standard output: No space left on device"));
  CHECK(shop.weights("full", "00000003") == shop.weights("run", "00000003"));
  // Where nobody listens from the start nothing is lost, and no file takes the place of standard output or errors.
  const Workshop::Result closed = with_output(shop.training("closed") + " --steps 3", ">&- 2>&-");
  CHECK(closed.exit == 0);
  CHECK(read_file(shop.path + "/closed/lock", 1000).size() < 12);
  CHECK(shop.weights("closed", "00000003") == shop.weights("run", "00000003"));
  CHECK(with_output("info", ">&-").exit == 1);
}

TEST_CASE("what is there already is not lost: outputs replace their own kind alone, and RUN/best is no run's folder") {
  const Workshop shop;
  const std::string run = shop.path + "/run", model = shop.path + "/m.safetensors", text = shop.path + "/text.txt",
                    words = "some text of one's own, which is in no other place";
  REQUIRE(shop.run(shop.training("run", {{"steps", "2"}, {"eval-every", "1"}})).exit == 0);
  REQUIRE(shop.run("export --checkpoint " + run + " --out " + model).exit == 0);
  write_file(text, words);
  const std::string weights = read_file(model, size_t{1} << 24), reading = " --checkpoint " + model + " --text " + text;
  for (const std::string& file : {model, text}) {
    shop.fails("inspect" + reading + " --html " + file, 1, "expected a page of inspect --html to be replaced");
    shop.fails("generate --checkpoint " + model + " --prompt a --save-memory " + file, 1,
               "expected a memory to be replaced");
    shop.fails("eval --checkpoint " + model + " --data '" + shop.path + "/text_val*' --by-reach --out " + file, 1,
               "expected lines of JSON to go on after");
  }
  CHECK(read_file(model, size_t{1} << 24) == weights);
  CHECK(read_file(text, 1000) == words);
  for (int again = 0; again < 2; again++) {
    CHECK(shop.run("inspect" + reading + " --html " + shop.path + "/page.html").exit == 0);
    CHECK(shop.run("generate --checkpoint " + model + " --count 3 --prompt a --save-memory " + shop.path + "/memory")
              .exit == 0);
  }
  for (const char* more : {"", " --resume"})
    shop.fails("train --out " + run + "/best --data '" + shop.path + "/text_train*' --steps 3" + more, 2,
               "found one of its checkpoints");
  CHECK_FALSE(std::filesystem::exists(run + "/best"));
}

TEST_CASE("each save ends in a hash of its weights, the same word for the same bits") {
  const Workshop shop;
  const auto hashes = [&](const std::string& run, const std::string& flags) {
    const Workshop::Result result = shop.run(shop.training(run) + " --steps 4 --save-every 2 " + flags);
    REQUIRE(result.exit == 0);
    std::vector<std::string> found;
    for (size_t at = 0; (at = result.out.find(", weights ", at)) != std::string::npos; at += 10)
      found.push_back(result.out.substr(at + 10, 8));
    return found;
  };
  const std::vector<std::string> once = hashes("once", "--threads 1"), again = hashes("again", "--threads 2");
  REQUIRE(once.size() == 2);
  CHECK(once == again);
  CHECK(once[0] != once[1]);
  CHECK(once != hashes("other", "--seed 2"));
}

TEST_CASE("--topk 1, with which the retriever learns nothing, is said when training starts") {
  const Workshop shop;
  const FlagMap one_pick = {{"topk", "1"}, {"steps", "1"}};
  CHECK(says(shop.run(shop.training("one", one_pick)), "the retriever gets no gradient"));
  // Nothing is fetched in a model without groups.
  const Workshop::Result none = shop.run(shop.training("none", with(one_pick, {{"groups", ""}})));
  CHECK(none.exit == 0);
  CHECK_FALSE(says(none, "the retriever gets no gradient"));
  CHECK_FALSE(says(shop.run(shop.training("two") + " --steps 1"), "the retriever gets no gradient"));
}
