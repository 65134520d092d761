// A talk on a terminal: what is typed and what the model answers follow each other in one row, which is read once.
#pragma once
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/files.h"
#include "base/text.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "runtime/decode.h"
#include "runtime/memory_file.h"
#include "runtime/run.h"
#include "runtime/stream.h"

namespace gca {

struct TalkSettings {
  Reading reading;
  Choice choice;
  int64_t count, most_tokens;            // of an answer; of the whole talk, what it begins with left out
  std::string load_memory, save_memory;  // files, or ""
};

// Ctrl-C while this is there is noted, and so is a signal to end: a terminal that is closed, a TERM.
class Interrupts {
 public:
  Interrupts() {
    ended_ = false;
    struct sigaction action = {};
    for (size_t i = 0; i < std::size(signals); i++) {
      action.sa_handler = i ? [](int) { ended_ = true; } : [](int) { came_ = true; };
      sigaction(signals[i], &action, &before_[i]);
    }
  }
  ~Interrupts() {
    for (size_t i = 0; i < std::size(signals); i++) sigaction(signals[i], &before_[i], nullptr);
  }
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;
  bool take() { return came_.exchange(false); }
  bool ended() const { return ended_; }

  // Bytes to the terminal. One that takes them more slowly than they come has the program wait in the write, and there
  // the signal finds it: after Ctrl-C the rest follows, what a signal to end leaves is not shown.
  void show(const std::string& bytes) const {
    const std::string shown = printable(bytes, true);
    for (size_t at = 0; at < shown.size() && !ended_;) {
      const ssize_t put = ::write(STDOUT_FILENO, &shown[at], shown.size() - at);
      if (put < 0 && errno != EINTR) throw system_error("cannot write standard output", errno);
      at += static_cast<size_t>(std::max<ssize_t>(0, put));
    }
  }

 private:
  static constexpr int signals[] = {SIGINT, SIGHUP, SIGTERM};
  static inline std::atomic<bool> came_ = false, ended_ = false;
  static_assert(std::atomic<bool>::is_always_lock_free);
  struct sigaction before_[std::size(signals)] = {};
};

template <class Device>
class Talk {
 public:
  Talk(Device& device, const SavedRun& saved, const TalkSettings& settings, const std::vector<int32_t>& context)
      : tokenizer_(saved.tokenizer),
        s_(settings),
        model_(device, saved.settings.config, Use::inference),
        fields_(memory_fields(model_, saved.weights_crc())) {
    std::optional<MemoryFile> memory;
    if (!s_.load_memory.empty()) memory.emplace(s_.load_memory, fields_);
    const int64_t S = model_.config.chunk;
    chunks_ = (memory ? ceil_div(memory->slots(), S) : 0) + ceil_div(std::ssize(context) + s_.most_tokens, S - 1);
    readers_ = open_readers(saved, model_, {.chunks = chunks_, .segment_slots = s_.reading.batch_slots, .kept = 1},
                            s_.reading.memory, "a shorter --context or a smaller --talk-tokens");
    if (memory) load_memory(*memory, model_, rows());
    say(context);
    if (!unread_.empty()) read_all_but_last();
  }

  // Until Ctrl-D or a signal to end, or until there is no more room.
  void go_on() {
    print_error("Enter sends a line, Enter alone lets it go on, Ctrl-C ends an answer, Ctrl-D the talk\n");
    Interrupts interrupts;
    for (int32_t turn = 0;; turn++) {
      const std::optional<std::string> line = next_line(interrupts);
      if (!line) break;
      add(*line);
      const int64_t room = chunks_ * (model_.config.chunk - 1) - tokens_read() - std::ssize(unread_);
      if (room < 1) {
        unread_.clear();
        print_error("the talk has come to its ", s_.most_tokens,
                    " tokens: begin one with a larger --talk-tokens (--save-memory and --load-memory carry this on)\n");
        break;
      }
      answer(std::min(s_.count, room), turn, interrupts);
    }
    interrupts.show("\n");
    if (s_.save_memory.empty()) return;
    if (!unread_.empty()) read(unread_);
    save_memory(s_.save_memory, fields_, "", model_, rows());
  }

 private:
  RowReader<Device>& rows() { return *readers_[0]; }
  int64_t tokens_read() { return rows().slots() - rows().slots() / model_.config.chunk; }
  void read(std::span<const int32_t> ids) { TokenReader(model_, rows(), tokenizer_.landmark).read(ids); }

  // What is typed, to the end of a line or to a Ctrl-D behind it; nothing at a Ctrl-D alone, or a signal to end.
  static std::optional<std::string> next_line(Interrupts& interrupts) {
    interrupts.take();
    interrupts.show("> ");
    for (;;) {
      pollfd keys{STDIN_FILENO, POLLIN, 0};
      const int ready = poll(&keys, 1, 100);           // whichever thread has the signal, and when: it is looked for
      if (interrupts.take()) interrupts.show("\n> ");  // the terminal has forgotten the line: it is begun anew
      if (interrupts.ended()) return std::nullopt;
      if (ready <= 0) continue;
      char typed[1 << 16];
      const ssize_t got = ::read(STDIN_FILENO, typed, sizeof typed);
      if (got > 0) return std::string(typed, static_cast<size_t>(got));
      if (got == 0 || errno != EINTR) return std::nullopt;
    }
  }

  // A line as it stands on the terminal, below what was said. An empty one adds nothing where there is something.
  void add(const std::string& line) {
    if (line != "\n") {
      if (!ends_line_) say(tokenizer_.encode("\n"));
      say(tokenizer_.encode(line));
      ends_line_ = line.ends_with('\n');
    } else if (unread_.empty()) {
      if (rows().slots()) say(tokenizer_.encode(line));
      else say(std::span(&tokenizer_.end_of_text, 1));  // a document's beginning
    }
  }
  void say(std::span<const int32_t> ids) { unread_.insert(unread_.end(), ids.begin(), ids.end()); }

  void read_all_but_last() {
    const auto last = unread_.end() - 1;
    if (last != unread_.begin()) read(std::span(unread_).first(unread_.size() - 1));
    unread_.erase(unread_.begin(), last);
  }

  // All that was said is read, and at most `count` tokens follow. What the device reads ahead of those that were shown
  // is taken back: the last token before them is read again with them.
  void answer(int64_t count, int32_t turn, Interrupts& interrupts) {
    read_all_but_last();
    rows().keep();
    read(unread_);
    {
      Decoder decoder(model_, 1, tokenizer_.landmark, s_.choice);
      decoder.begin(0, rows(), count, turn);
      WholeCharacters characters;
      for (Chosen chosen; !interrupts.ended() && !interrupts.take() && (chosen = decoder.next()).text >= 0;) {
        unread_.push_back(chosen.token);
        if (chosen.token == tokenizer_.end_of_text) break;
        const std::string bytes = tokenizer_.decode(std::span(&chosen.token, 1));
        ends_line_ = bytes.ends_with('\n');
        interrupts.show(characters.take(bytes));
      }
      interrupts.show(characters.rest());
    }
    if (unread_.back() == tokenizer_.end_of_text) ends_line_ = true;
    rows().back();
    interrupts.show("\n");
  }

  const Tokenizer& tokenizer_;
  const TalkSettings& s_;
  DRT<Device> model_;
  MemoryFields fields_;
  int64_t chunks_ = 0;
  std::vector<std::unique_ptr<RowReader<Device>>> readers_;  // one
  std::vector<int32_t> unread_;                              // said, and not read yet
  bool ends_line_ = true;                                    // what was said last ended a line
};

}  // namespace gca
