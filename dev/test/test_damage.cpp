// Files cut off at every length and changed in every byte: refused with an Error that names the file, or the same as
// before.
#include <fcntl.h>
#include <algorithm>
#include <map>

#include "dataloader.h"
#include "runtime/models.h"
#include "runtime/run.h"
#include "runtime/weights.h"
#include "commands/verifier.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

// Calls read() for the file at every length shorter than its own, and with every byte changed in turn (from `first` to
// `last`), one bit and all bits of it, and puts it back. read() returns a description of what it read, or throws an
// Error, which must name the file or its folder. Returns how often it was neither refused nor the same as of the whole
// file.
template <class Read>
int damage_everywhere(const std::string& path, Read read, size_t first = 0, size_t last = SIZE_MAX, bool cut = true) {
  const std::string content = read_file(path, 1 << 24), folder = parent_folder(path), whole = read();
  int accepted = 0;
  const auto attempt = [&] {
    try {
      accepted += read() != whole;
    } catch (const Error& error) {
      if (!has(error.what(), folder)) FAIL_CHECK(std::string(error.what()));
    }
  };
  const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
  for (size_t at = first; at < std::min(content.size(), last); at++)
    for (const char flip : {'\x01', '\xFF'}) {
      const char changed = static_cast<char>(content[at] ^ flip);
      REQUIRE(::pwrite(fd, &changed, 1, static_cast<off_t>(at)) == 1);
      attempt();
      REQUIRE(::pwrite(fd, &content[at], 1, static_cast<off_t>(at)) == 1);
    }
  for (size_t size = content.size(); cut && size-- > 0;) {
    REQUIRE(::ftruncate(fd, static_cast<off_t>(size)) == 0);
    attempt();
  }
  ::close(fd);
  write_file(path, content);
  CHECK(read() == whole);
  return accepted;
}

// Keeps standard output still while it lives.
struct Quiet {
  int kept;
  Quiet() {
    fflush(stdout);
    kept = dup(STDOUT_FILENO);
    const int nowhere = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
    dup2(nowhere, STDOUT_FILENO);
    ::close(nowhere);
  }
  ~Quiet() {
    fflush(stdout);
    dup2(kept, STDOUT_FILENO);
    ::close(kept);
  }
};

}  // namespace

TEST_CASE(
    "damage: no file of a checkpoint is read otherwise than it was written, and the fallback takes the older one") {
  const TempFolder run(std::filesystem::is_directory("/dev/shm") ? "/dev/shm"
                                                                 : std::filesystem::temp_directory_path().string());
  const Tokenizer tokenizer({{'a', 'b'}, {256, 'c'}});
  for (const int64_t step : {1, 2}) {
    TrainSettings settings;
    Json state;
    state["settings"] = train_flags(settings).values();
    state["adam_steps"] = step;
    const float weights[4] = {1.5f, -2, 3, static_cast<float>(step)};
    write_checkpoint(run.path, step,
                     {{SavedRun::model_file,
                       [&](const std::string& path) {
                         write_safetensors(path, {}, {safetensors_entry("w", {2, 2}, weights)});
                       }},
                      {SavedRun::tokenizer_file, [&](const std::string& path) { tokenizer.save(path); }}},
                     state);
  }
  const std::string folder = checkpoint_folder(run.path, 2);
  // What was given, and the checkpoint's own.
  const std::vector<std::string> files = {"manifest.json", SavedRun::model_file, "state.json",
                                          SavedRun::tokenizer_file};
  CHECK(list_folder(folder) == files);
  const auto read = [&] {
    const SavedRun saved = SavedRun::open(run.path);
    std::string all =
        str(saved.checkpoint.step, " ", saved.checkpoint.state.dump(), " ", hex(saved.tokenizer.hash(), 16));
    for (const float w : SafetensorsFile::open(saved.checkpoint.file(SavedRun::model_file)).values<float>("w"))
      all += str(" ", hex(std::bit_cast<uint32_t>(w)));
    return all;
  };
  for (const std::string& name : list_folder(folder)) {
    CAPTURE(name);
    CHECK(damage_everywhere(folder + "/" + name, read) == 0);
  }
  CHECK(list_folder(folder) == files);
  // The fallback, at a few places of each.
  for (const std::string& name : list_folder(folder)) {
    const std::string path = folder + "/" + name, content = read_file(path, 1 << 20);
    for (const size_t at : {size_t{0}, content.size() / 2}) {
      std::string damaged = content;
      damaged[at] = static_cast<char>(damaged[at] ^ 1);
      for (const std::string& now : {damaged, content.substr(0, at)}) {
        write_file(path, now);
        CHECK(open_checkpoint(run.path, true).step == 1);
        CHECK(read_file(path, 1 << 20) == now);  // nothing is mended behind the user's back
      }
    }
    write_file(path, content);
  }
  // A folder that was renamed to another step is noticed, whether the run or the step is given; under a name of its own
  // it may go.
  rename_path(folder, checkpoint_folder(run.path, 3));
  for (const std::string& path : {run.path, checkpoint_folder(run.path, 3), checkpoint_folder(run.path, 3) + "/"}) {
    const std::string error = error_of([&] { open_checkpoint(path); });
    CHECK_MESSAGE(has(error, "holds step 2: it was renamed"), error);
  }
  rename_path(checkpoint_folder(run.path, 3), run.path + "/best");
  CHECK(open_checkpoint(run.path + "/best").step == 2);
}

TEST_CASE("damage: manifests that are foreign, nested, too long, double or linked") {
  const TempFolder run;
  write_checkpoint(run.path, 1, {}, Json::object());
  const std::string folder = checkpoint_folder(run.path, 1), manifest = folder + "/manifest.json",
                    good = read_file(manifest, 1 << 20);
  const auto error = [&](const std::string& content) {
    write_file(manifest, content);
    return error_of([&] { open_checkpoint(run.path); });
  };
  CHECK(error(good) == "");
  CHECK(has(error(""), "manifest.json is not valid JSON at byte 0"));
  CHECK(has(error("\x7f"
                  "ELF"),
            "manifest.json is not valid JSON at byte 0"));
  CHECK(has(error("[]"), "expected an object"));
  CHECK(has(error("{}"), "the field \"format\" is missing"));
  CHECK(has(error(std::string(100000, '[')), "at most 64 levels of nesting"));
  CHECK(has(error(std::string((1 << 20) + 1, ' ')), "manifest.json': expected at most 1048576 bytes"));
  CHECK(has(error("{\"format\": 1, \"format\": 2}"), "each field once, not \"format\" again"));
  for (const char* name : {"", ".", "..", "../state.json", "/etc/passwd", "a/b", "manifest.json", "a\\u0000b"})
    CHECK(has(error(str("{\"format\": \"train_gca checkpoint\", \"version\": 1, \"step\": 1, \"files\": [{\"name\": \"",
                        name, "\", \"bytes\": 1, \"crc32c\": 1}]}")),
              "files[0].name: expected the name of a file in the folder, once"));
  CHECK(has(error("{\"format\": \"train_gca checkpoint\", \"version\": 1, \"step\": 1, \"files\": [{\"name\": \"a\", "
                  "\"bytes\": 9223372036854775808, \"crc32c\": 1}]}"),
            "an integer that fits 64 bits"));
  CHECK(has(error("{\"format\": \"train_gca checkpoint\", \"version\": 1, \"step\": 1, \"files\": [{\"name\": \"a\", "
                  "\"bytes\": 1, \"crc32c\": 4294967296}]}"),
            "crc32c: expected an integer from 0 to 4294967295"));
  CHECK(has(error("{\"format\": \"train_gca checkpoint\", \"version\": 1, \"step\": 1, \"files\": []}"),
            "has no file 'state.json'"));
  remove_tree(manifest);
  std::filesystem::create_symlink("manifest.json", manifest);  // to itself
  CHECK(error_of([&] { open_checkpoint(run.path); }) != "");
  remove_tree(manifest);
  write_file(manifest, good);
  // A link in the place of a partial folder is removed, not followed; and one in the place of a file that is to be
  // made.
  const TempFolder other;
  write_file(other.path + "/precious", "x");
  std::filesystem::create_directory_symlink(other.path, checkpoint_folder(run.path, 2) + ".partial");
  write_checkpoint(run.path, 2, {}, Json::object());
  CHECK(list_folder(other.path) == std::vector<std::string>{"precious"});
  CHECK(open_checkpoint(run.path).step == 2);
  std::filesystem::create_symlink(other.path + "/precious", run.path + "/lock");
  CHECK(has(error_of([&] { RunLock lock(run.path); }),
            "lock': Too many levels of symbolic links; a link is not followed here"));
  CHECK(read_file(other.path + "/precious", 10) == "x");
}

TEST_CASE("damage: a shard gives ids of the vocabulary or an Error, whatever is changed in it") {
  const TempFolder folder;
  const Tokenizer tokenizer = Tokenizer::load("bytes");
  ShardWriter writer(folder.path + "/s", tokenizer, 100);
  writer.append(random_ids(20, 1, tokenizer.vocab_size()));
  ShardWriter::commit({&writer});
  const std::string path = folder.path + "/s_000000.bin";
  const auto read = [&] {
    const TokenStream stream(path, tokenizer);
    std::vector<int32_t> ids(stream.tokens());
    stream.read(0, stream.tokens(), ids.data());
    for (const int32_t id : ids) CHECK((id >= 0 && id < tokenizer.vocab_size()));
    return comma_list({ids.begin(), ids.end()});
  };
  CHECK(damage_everywhere(path, read, 0, ShardHeader::bytes) == 0);
  CHECK(damage_everywhere(path, read, ShardHeader::bytes, SIZE_MAX, false) >
        0);  // the tokens have no checksum: another id may stand there
  // But a run that goes on does notice.
  const Json state = TokenStream(path, tokenizer).state();
  CHECK(damage_everywhere(path, [&] {
          TokenStream(path, tokenizer).check_same(JsonField(state, "state.json"));
          return std::string();
        }) == 0);
  std::string content = read_file(path, 1 << 20);
  content[1024 + 5] = static_cast<char>(content[1024 + 5] ^ 1);
  write_file(path, content);
  CHECK(has(error_of([&] { TokenStream(path, tokenizer).check_same(JsonField(state, "state.json: data")); }),
            "is not what state.json: data was written with: expected the shard"));
}

TEST_CASE("damage: a tokenizer's file has a hash of all its bytes") {
  const TempFolder folder;
  const std::string path = folder.path + "/t.bpe";
  Tokenizer({{'a', 'b'}, {256, 'c'}, {'x', 257}}).save(path);
  int accepted = 0;
  const std::string content = read_file(path, 1 << 20);
  CHECK(damage_everywhere(path, [&] {
          accepted++;
          const Tokenizer tokenizer = Tokenizer::load(path);
          return str(tokenizer.vocab_size(), " ", hex(tokenizer.hash(), 16));
        }) == 0);
  CHECK(accepted == 2 + 3 * static_cast<int>(content.size()));  // each was tried
}

TEST_CASE("damage: an oracle's file is refused, or checked and found wrong, but for what is not checked") {
  const TempFolder folder;
  const std::string path = folder.path + "/fixture.safetensors";
  const char* const from = "build/oracle/drt_one_group.safetensors";
  if (!std::filesystem::exists(from)) return skip(std::string("no ") + from);
  std::filesystem::copy_file(from, path);
  uint64_t header_bytes = 0;
  const std::string content = read_file(path, 1 << 24);
  memcpy(&header_bytes, content.data(), 8);
  struct Counting : Cpu<double> {
    using Cpu<double>::Cpu;
    int64_t allocated_bytes = 0;
    void* allocate(int64_t n_bytes) {
      allocated_bytes += n_bytes;
      return Cpu<double>::allocate(n_bytes);
    }
  } cpu(1);
  const auto verified = [&] {
    const Quiet quiet;
    cpu.allocated_bytes = 0;
    return std::string(Verifier(path, {1e-10, false, true}).run(cpu) ? "good" : "bad");
  };
  REQUIRE(verified() == "good");
  // Its sizes, in the metadata, one digit after another; then the rest of the header thinly, and cut off.
  const std::vector<std::string> names = {"vocab",     "width",   "heads",       "ffn",   "lower",
                                          "groups",    "encoder", "chunk",       "topk",  "window",
                                          "null_slot", "eps",     "landmark_id", "batch", "chunks"},
                                 values = {"0", "7", "-1", "99999999999999999999", "1000000", "x", ""};
  size_t tried = 0, refused = 0;
  for (const std::string& name : names) {
    const size_t at = content.find("\"" + name + "\"");
    REQUIRE(at < header_bytes);
    const size_t begin = content.find('"', content.find(':', at)) + 1, end = content.find('"', begin);
    for (const std::string& value : values) {
      CAPTURE(name);
      CAPTURE(value);
      std::string header = content.substr(8, begin - 8) + value + content.substr(end, 8 + header_bytes - end);
      const uint64_t bytes = header.size();
      write_file(path,
                 std::string(reinterpret_cast<const char*>(&bytes), 8) + header + content.substr(8 + header_bytes));
      tried++;
      try {
        verified();
      } catch (const Error& error) {
        refused++;
        CHECK_MESSAGE(has(error.what(), "fixture.safetensors"), error.what());
        // Sizes that are not those of the file's tensors: before memory of such sizes is asked for.
        for (const char* of_tensors : {"vocab", "width", "ffn", "batch", "chunks"})
          if (name == of_tensors) CHECK(cpu.allocated_bytes == 0);
      }
    }
  }
  CHECK(tried == names.size() * values.size());
  CHECK(refused > 60);
  // Sizes that every file has; of others a file without them was made as by the flag's default.
  for (const std::string name : {"vocab", "width", "groups", "batch", "chunks"}) {
    std::string renamed = content;
    renamed[content.find("\"" + name + "\"") + 1] = 'X';
    write_file(path, renamed);
    std::string message = "none";
    try {
      verified();
    } catch (const Error& error) {
      message = error.what();
    }
    CHECK_MESSAGE(has(message, (name + ": expected, but missing").c_str()), message);
  }
  for (size_t at = 0; at < 8 + header_bytes; at += 97) {
    std::string damaged = content;
    damaged[at] = static_cast<char>(damaged[at] ^ 1);
    for (const std::string& now : {damaged, content.substr(0, at)}) {
      write_file(path, now);
      try {
        verified();
      } catch (const Error& error) {
        CHECK_MESSAGE(has(error.what(), "fixture.safetensors"), error.what());
      }
    }
  }
  // What is not a number anywhere is found, and does no harm.
  for (const char* name : {"param.model.norm.weight", "group0.gumbel_noise", "tokens", "targets", "logits"}) {
    CAPTURE(name);
    write_file(path, content);
    const SafetensorsTensor tensor = SafetensorsFile::open(path).at(name);
    std::string damaged = content;
    for (int64_t i = 0; i < tensor.count * tensor.dtype.bytes(); i++) damaged[tensor.offset_bytes + i] = '\xFF';
    write_file(path, damaged);
    std::string result = "refused";
    try {
      result = verified();
    } catch (const Error& error) {
      CHECK(has(error.what(), "fixture.safetensors"));
    }
    CHECK(result != "good");
  }
}
