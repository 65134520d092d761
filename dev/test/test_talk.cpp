// A talk through a terminal of its own: what is said stays in memory, keys end answers and the talk.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <thread>

#include "base/text.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

// The program on a terminal; what is typed is not shown.
class Terminal {
 public:
  Terminal(const std::string& program, const std::string& arguments) : keys_(::posix_openpt(O_RDWR | O_NOCTTY)) {
    REQUIRE(keys_ >= 0);
    REQUIRE(::grantpt(keys_) == 0);
    REQUIRE(::unlockpt(keys_) == 0);
    const std::string name = ::ptsname(keys_);
    id_ = fork();
    REQUIRE(id_ >= 0);
    if (id_ > 0) return;
    ::setsid();
    const int terminal = ::open(name.c_str(), O_RDWR);
    ::ioctl(terminal, TIOCSCTTY, 0);
    termios settings{};
    ::tcgetattr(terminal, &settings);
    settings.c_lflag &= ~static_cast<tcflag_t>(ECHO);
    settings.c_oflag &= ~static_cast<tcflag_t>(OPOST);
    ::tcsetattr(terminal, TCSANOW, &settings);
    for (int fd = 0; fd < 3; fd++) ::dup2(terminal, fd);
    ::close(keys_);
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) signal(number, SIG_DFL);
    execl("/bin/sh", "sh", "-c", ("exec " + program + " " + arguments).c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  ~Terminal() {
    if (id_ > 0) {
      kill(id_, SIGKILL);
      waitpid(id_, nullptr, 0);
    }
    ::close(keys_);
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  void send(int signal) const { REQUIRE(kill(id_, signal) == 0); }
  void type(const std::string& keys) {
    REQUIRE(::write(keys_, keys.data(), keys.size()) == static_cast<ssize_t>(keys.size()));
  }
  // What it shows up to these words, less what it showed before; all there is, where it ends or a minute goes by.
  std::string shown_until(const std::string& words) {
    while (shown_.find(words) == shown_.npos && more()) {}
    const size_t found = shown_.find(words), end = found == shown_.npos ? shown_.size() : found + words.size();
    const std::string piece = shown_.substr(0, end);
    shown_.erase(0, end);
    return piece;
  }
  // At least so many bytes of what it shows, as far as there are so many.
  std::string shown_bytes(size_t bytes) {
    while (shown_.size() < bytes && more()) {}
    return std::exchange(shown_, {});
  }
  // What it answers to what is typed, up to where the next line is asked for.
  std::string answer(const std::string& keys) {
    type(keys);
    const std::string shown = shown_until("\n> ");
    CHECK_MESSAGE(shown.ends_with("\n> "), shown);
    return shown.substr(0, shown.size() - std::min<size_t>(3, shown.size()));
  }
  // Until it ends: its exit status, or minus the signal that ended it.
  int wait() {
    shown_until("\n\n\n\nnever shown");
    int status = 0;
    REQUIRE(waitpid(std::exchange(id_, -1), &status, 0) > 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  bool more() {
    pollfd watched{keys_, POLLIN, 0};
    char piece[4096];
    if (poll(&watched, 1, 60000) <= 0) return false;
    const ssize_t got = ::read(keys_, piece, sizeof piece);  // EIO: nobody has the terminal any more
    if (got <= 0) return false;
    shown_.append(piece, static_cast<size_t>(got));
    return true;
  }

  int keys_;
  pid_t id_ = -1;
  std::string shown_;
};

struct TalkShop : Workshop {
  TalkShop() { REQUIRE(run(training("run", {{"steps", "30"}, {"eval-every", "30"}})).exit == 0); }
  std::string talk(const std::string& more) const {
    return "generate --checkpoint " + path + "/run --temperature 0 --count 20 --threads 1 " + more;
  }
  // What follows a text, without a talk.
  std::string after(const std::string& text, const std::string& more = "") const {
    const Result result = run(talk(more + " --prompt '" + text + "'"));
    CHECK_MESSAGE(result.exit == 0, result.out);
    CHECK(result.out.starts_with(text));
    return result.out.substr(text.size(), result.out.size() - text.size() - 1);
  }
};

const std::string greeting = "Ctrl-D the talk\n> ";

}  // namespace

TEST_CASE("talk: what was said stays in memory, as if it were one text; it is saved and goes on") {
  const TalkShop shop;
  const std::string context = shop.path + "/context", memory = shop.path + "/memory";
  std::string said;
  for (int i = 0; i < 30; i++) said += "the sea 3; a ship 5; ";
  write_file(context, said);
  {
    Terminal terminal(shop.program, shop.talk("--context " + context + " --save-memory " + memory));
    CHECK(terminal.shown_until(greeting).ends_with(greeting));
    for (const std::string line : {"a ship\n", "the sea 7; the\n", "", "and\n"}) {
      CAPTURE(line);
      const std::string typed = line.empty() ? "\n" : line, before = said.ends_with('\n') || line.empty() ? "" : "\n";
      said += before + line;
      const std::string answer = terminal.answer(typed);
      CHECK(answer.size() >= 5);
      CHECK(answer == shop.after(said));
      said += answer;
    }
    // A line that Ctrl-D sends goes on in itself.
    said += (said.ends_with('\n') ? "" : "\n") + std::string("the s");
    const std::string answer = terminal.answer("the s\x04");
    CHECK(answer == shop.after(said));
    said += answer;
    terminal.type("\x04");
    CHECK(terminal.wait() == 0);
  }
  const std::string next = (said.ends_with('\n') ? "" : "\n") + std::string("a ship 2\n");
  CHECK(shop.after(next, "--load-memory " + memory) == shop.after(said + next));
  Terminal again(shop.program, shop.talk("--load-memory " + memory));
  again.shown_until(greeting);
  CHECK(again.answer(next.substr(next.size() - 9)) == shop.after(said + next.substr(next.size() - 9)));
  again.type("\x04");
  CHECK(again.wait() == 0);
}

TEST_CASE("talk: Ctrl-C ends an answer, or the line that is typed; what was shown of it stays") {
  const TalkShop shop;
  Terminal terminal(shop.program, "generate --checkpoint " + shop.path +
                                      "/run --temperature 0 --count 1M --talk-tokens 1M --threads 1");
  terminal.shown_until(greeting);
  terminal.type("never sent\x03");
  CHECK(terminal.shown_until("\n> ") == "\n> ");
  terminal.type("the sea\n");
  std::string answer = terminal.shown_bytes(10);
  terminal.type("\x03");
  answer += terminal.shown_until("\n> ");
  REQUIRE(answer.ends_with("\n> "));
  answer.resize(answer.size() - 3);
  CHECK(answer.size() < 1000000);
  const std::string said = "the sea\n" + answer + (answer.ends_with('\n') ? "" : "\n") + "a ship\n";
  terminal.type("a ship\n");
  const std::string next = terminal.shown_bytes(20);
  CHECK(next.substr(0, 20) == shop.after(said).substr(0, 20));
  terminal.type("\x03");
  terminal.shown_until("\n> ");
  terminal.type("\x04");
  CHECK(terminal.wait() == 0);
}

TEST_CASE("talk: a signal to end saves the talk, at the prompt and in an answer") {
  const TalkShop shop;
  const std::string memory = shop.path + "/memory";
  for (const int signal : {SIGHUP, SIGTERM}) {
    CAPTURE(signal);
    Terminal terminal(shop.program, shop.talk("--save-memory " + memory));
    terminal.shown_until(greeting);
    const std::string said = "the sea\n" + terminal.answer("the sea\n"), next = "\na ship\n";
    terminal.send(signal);
    CHECK(terminal.wait() == 0);
    CHECK(shop.after(next, "--load-memory " + memory) == shop.after(said + next));
  }
  Terminal terminal(shop.program, "generate --checkpoint " + shop.path +
                                      "/run --count 1M --talk-tokens 1M --threads 1" + " --save-memory " + memory +
                                      "2");
  terminal.shown_until(greeting);
  terminal.type("the sea\n");
  terminal.shown_bytes(10);
  terminal.send(SIGTERM);
  CHECK(terminal.wait() == 0);
  CHECK(std::filesystem::exists(memory + "2"));
}

// Ctrl-S has the terminal take no more, as one does that is slower than the answer: the program waits in a write.
TEST_CASE("talk: a signal that finds the terminal full ends the answer, or saves the talk, and not the program") {
  const TalkShop shop;
  const std::string memory = shop.path + "/memory";
  Terminal terminal(shop.program, "generate --checkpoint " + shop.path +
                                      "/run --count 1M --talk-tokens 1M --threads 1 --save-memory " + memory);
  terminal.shown_until(greeting);
  const auto fill = [&] {
    terminal.type("the sea\n");
    terminal.shown_bytes(10);
    terminal.type("\x13");
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
  };
  fill();
  terminal.type("\x03");
  CHECK(terminal.shown_until("\n> ").ends_with("\n> "));
  fill();
  terminal.send(SIGTERM);
  CHECK(terminal.wait() == 0);
  CHECK(std::filesystem::exists(memory));
}

TEST_CASE("talk: it begins from nothing, ends where its tokens end, and is for a terminal alone") {
  const TalkShop shop;
  {
    Terminal terminal(shop.program, shop.talk("--talk-tokens 50"));
    terminal.shown_until(greeting);
    const std::string first = terminal.answer("\n");  // a document's beginning
    CHECK(first == printable(shop.run(shop.talk("< /dev/null")).out.substr(0, 20), true));
    terminal.type(std::string(80, 'a') + "\n");
    CHECK(has(terminal.shown_until("carry this on)\n"), "the talk has come to its 50 tokens"));
    CHECK(terminal.wait() == 0);
  }
  Terminal at_once(shop.program, shop.talk(""));
  at_once.shown_until(greeting);
  at_once.type("\x04");
  CHECK(at_once.wait() == 0);
  // As ever, where a prompt is given or standard input is no terminal.
  Terminal prompted(shop.program, shop.talk("--prompt ''"));
  CHECK(prompted.wait() == 0);
  const Workshop::Result piped =
      shop.run("generate --temperature 0 --count 20 --checkpoint " + shop.path + "/run < /dev/null");
  CHECK(piped.exit == 0);
  CHECK_FALSE(says(piped, "> "));
  shop.fails(shop.talk("--talk-tokens 9 < /dev/null"), 2, "--talk-tokens is of a talk");
}
