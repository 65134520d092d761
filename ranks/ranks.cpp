// Ranks at work: transfers over the data lines, and the watch, a thread that gives and hears signs of life on the
// control lines, ends the run where one is missing, and sees to it that no rank stays behind.
#include "ranks/ranks.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <ctime>

#include "base/text.h"
#include "ranks/meeting.h"

namespace gca {

Ranks::Ranks(const World& world) : world_(world), peers_(static_cast<size_t>(world.size)) {
  if (size() == 1) return;
  if (first()) meet_as_first();
  else meet_first();
  for (Peer& peer : peers_) peer.heard = monotonic_seconds();
  watch_ = std::thread([this] { watch(); });
}

// The last words of each side are read before the connection goes.
Ranks::~Ranks() {
  if (size() == 1) return;
  leaving_ = true;
  done_ = true;
  if (watch_.joinable()) watch_.join();
  if (aborting_.joinable()) aborting_.join();
  for (Peer& peer : peers_)
    if (peer.control) ::shutdown(peer.control.fd(), SHUT_WR);
  const double end = monotonic_seconds() + 1;
  char rest[4096];
  for (Peer& peer : peers_)
    while (peer.control && monotonic_seconds() < end &&
           peer.control.receive_some(rest, sizeof rest, end - monotonic_seconds()) >= 0) {}
}

std::string Ranks::name_of(int rank) const {
  return str("rank ", rank, " (", peers_[static_cast<size_t>(rank)].name, ")");
}

// ---- transfers ----------------------------------------------------------------------------------------------------
void Ranks::check() {
  if (!failed_) return;
  const std::lock_guard<std::mutex> lock(failure_mutex_);
  if (told_by_first_) throw EndedElsewhere(failure_);
  throw Error(failure_);
}

// move(socket, done): how many bytes more went, 0: none yet, -1: the other side is gone.
template <class Move>
void Ranks::transfer(int with, int64_t bytes, bool sends, Move move) {
  Peer& peer = peers_[static_cast<size_t>(with)];
  GCA_CHECK(peer.data, "rank ", rank(), " has no line to rank ", with);
  waiting([&] {
    const auto all = [&](int64_t n, auto step) {
      for (int64_t done = 0; done < n;) {
        check();
        const int64_t moved = step(done);
        done += std::max<int64_t>(moved, 0);
        if (moved >= 0) continue;
        // Why it has gone may be known in a moment.
        for (int i = 0; i < 100 && !failed_; i++) usleep(10000);
        check();
        throw Error(name_of(with) + " has closed its connection");
      }
    };
    constexpr double at_once = 0.1;
    const TransferHead mine{.number = peer.transfers++, .bytes = bytes};
    TransferHead head = mine;
    char* words = reinterpret_cast<char*>(&head);
    const int64_t head_bytes = sizeof head;
    if (sends) all(head_bytes, [&](int64_t at) { return peer.data.send_some(words + at, head_bytes - at, at_once); });
    else all(head_bytes, [&](int64_t at) { return peer.data.receive_some(words + at, head_bytes - at, at_once); });
    if (memcmp(&head, &mine, sizeof head) != 0)
      throw Error(str(name_of(with), " and rank ", rank(),
                      " are at different points of the program: expected transfer ", mine.number, " of ", mine.bytes,
                      " bytes, found ", head.number, " of ", head.bytes,
                      "; start all ranks from one build, with the same command"));
    all(bytes, [&](int64_t done) { return move(peer.data, done); });
  });
}
void Ranks::send(int to, const void* data, int64_t bytes) {
  transfer(to, bytes, true, [&](const Socket& socket, int64_t done) {
    return socket.send_some(static_cast<const char*>(data) + done, bytes - done, 0.1);
  });
}
void Ranks::receive(int from, void* out, int64_t bytes) {
  transfer(from, bytes, false, [&](const Socket& socket, int64_t done) {
    return socket.receive_some(static_cast<char*>(out) + done, bytes - done, 0.1);
  });
}

void Ranks::sum(double* data, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(double));
  if (!first()) {
    send(0, data, bytes);
    return receive(0, data, bytes);
  }
  std::vector<double> theirs(static_cast<size_t>(count));
  for (int r = 1; r < size(); r++) {
    receive(r, theirs.data(), bytes);
    for (size_t i = 0; i < theirs.size(); i++) data[i] += theirs[i];
  }
  for (int r = 1; r < size(); r++) send(r, data, bytes);
}
std::vector<std::string> Ranks::gather(const std::string& mine) {
  int64_t length = std::ssize(mine);
  if (!first()) {
    send(0, &length, sizeof length);
    send(0, mine.data(), length);
    return {};
  }
  std::vector<std::string> all = {mine};
  for (int r = 1; r < size(); r++) {
    receive(r, &length, sizeof length);
    GCA_CHECK(length >= 0 && length <= (int64_t{1} << 30), name_of(r), " gives ", length, " bytes");
    receive(r, all.emplace_back(static_cast<size_t>(length), '\0').data(), length);
  }
  return all;
}
std::string Ranks::broadcast(const std::string& from_first) {
  std::string text = from_first;
  int64_t length = std::ssize(text);
  for (int r = 1; r < size() && first(); r++) {
    send(r, &length, sizeof length);
    send(r, text.data(), length);
  }
  if (first()) return text;
  receive(0, &length, sizeof length);
  GCA_CHECK(length >= 0 && length <= (int64_t{1} << 30), "rank 0 gives ", length, " bytes");
  text.resize(static_cast<size_t>(length));
  receive(0, text.data(), length);
  return text;
}

// ---- how it goes --------------------------------------------------------------------------------------------------
void Ranks::at(Doing doing) {
  doing_ = doing;
  tick();
}
void Ranks::tick() {
  ticks_++;
  check();
}
void Ranks::look_after(std::function<std::string()> probe, std::function<void()> abort) {
  const std::lock_guard<std::mutex> lock(device_mutex_);
  probe_ = std::move(probe);
  abort_ = std::move(abort);
}
void Ranks::leave() {
  if (size() == 1) return;
  at(Doing::saving);
  leaving_ = true;  // before the others can know that this one has come to its end
  double nothing = 0;
  sum(&nothing, 1);
}

void Ranks::note_failure(const std::string& why, bool told_by_first) {
  const std::lock_guard<std::mutex> lock(failure_mutex_);
  if (failed_) return;
  failure_ = why;
  told_by_first_ = told_by_first;
  failed_at_ = monotonic_seconds();
  failed_ = true;
}
bool Ranks::tell_failure(int to, const std::string& why) noexcept {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  const Peer& peer = peers_[static_cast<size_t>(to)];
  if (!peer.control) return false;
  ControlHead head;
  head.kind = ControlHead::failure;
  head.bytes = static_cast<uint32_t>(std::min<size_t>(why.size(), ControlHead::most_bytes));
  return peer.control.send(&head, sizeof head, 1) && peer.control.send(why.data(), head.bytes, 1);
}
bool Ranks::fail(const std::string& why) noexcept {
  if (size() == 1) return false;
  for (int i = 0; i < 20 && !failed_; i++) usleep(10000);  // another's end may be why: that is then what is said
  if (failed_) {
    const std::lock_guard<std::mutex> lock(failure_mutex_);
    return told_by_first_;
  }
  note_failure(why, !first());
  bool told = false;
  for (int r = 0; r < size(); r++)
    if (r != rank()) told |= tell_failure(r, why);
  return told && !first();
}

// ---- the watch ----------------------------------------------------------------------------------------------------
uint64_t Ranks::progress() const {
  uint64_t sum = ticks_;
  if (counts_cpu_time_) {
    timespec used{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    sum += static_cast<uint64_t>(used.tv_sec) * 10 + static_cast<uint64_t>(used.tv_nsec) / 100'000'000;
  }
  return sum;
}

void Ranks::read_control(int from) {
  Peer& peer = peers_[static_cast<size_t>(from)];
  char piece[4096];
  const int64_t got = peer.control.receive_some(piece, sizeof piece, 0);
  if (got < 0) {
    peer.gone = true;
    if (!leaving_)
      note_failure(name_of(from) + " has ended without a word: killed, or out of memory; what ran it may know more",
                   false);
    return;
  }
  peer.inbox.append(piece, static_cast<size_t>(got));
  ControlHead head;
  while (peer.inbox.size() >= sizeof head) {
    memcpy(&head, peer.inbox.data(), sizeof head);
    if (head.magic != ControlHead::expected || head.bytes > ControlHead::most_bytes)
      return note_failure(name_of(from) + " sends what is no message of this program", false);
    if (peer.inbox.size() < sizeof head + head.bytes) return;
    const std::string words = peer.inbox.substr(sizeof head, head.bytes);
    peer.inbox.erase(0, sizeof head + head.bytes);
    peer.heard = monotonic_seconds();
    if (head.kind == ControlHead::failure)
      note_failure(first() ? name_of(from) + ": " + printable(words, true) : words, !first());
    if (Beat beat; head.kind == ControlHead::beat && words.size() == sizeof beat) {
      memcpy(&beat, words.data(), sizeof beat);
      peer.progress = beat.progress;
      peer.doing = static_cast<Doing>(beat.doing);
      peer.waits = beat.waits != 0;
    }
  }
}

void Ranks::send_beats(uint64_t progress) {
  const Beat beat{progress, static_cast<uint32_t>(doing_.load()), waits_ > 0};
  ControlHead head;
  head.bytes = sizeof beat;
  std::string words(reinterpret_cast<const char*>(&head), sizeof head);
  words.append(reinterpret_cast<const char*>(&beat), sizeof beat);
  const std::lock_guard<std::mutex> lock(control_mutex_);
  for (const Peer& peer : peers_)
    if (peer.control && !peer.gone) peer.control.send(words.data(), std::ssize(words), 0.05);
}

void Ranks::look_for_silence(double now) {
  for (int r = 0; r < size(); r++) {
    const Peer& peer = peers_[static_cast<size_t>(r)];
    if (!peer.control || peer.gone || now - peer.heard < world_.patience) continue;
    note_failure(str(name_of(r), " has given no sign of life for ", fixed(world_.patience, 1),
                     " s: stopped, or its host or the network to it is down"),
                 false);
  }
}

void Ranks::watch() {
  const double beat_seconds = std::min(0.25, world_.patience / 10), grace = std::max(1.0, world_.patience / 4);
  double woke = monotonic_seconds(), moved = woke, beaten = 0;
  uint64_t seen = 0;
  bool told = false;
  while (!done_) {
    std::vector<pollfd> lines;
    for (const Peer& peer : peers_) lines.push_back({peer.gone ? -1 : peer.control.fd(), POLLIN, 0});
    poll(lines.data(), lines.size(), static_cast<int>(std::min(beat_seconds, 0.05) * 1e3));
    const double now = monotonic_seconds();
    if (now - woke > world_.patience / 2) {  // it was this process that was stopped: the others did not fail meanwhile
      for (Peer& peer : peers_) peer.heard = now;
      moved = now;
    }
    woke = now;
    for (int r = 0; r < size(); r++)
      if (lines[static_cast<size_t>(r)].revents) read_control(r);
    const uint64_t mine = progress();
    if (now - beaten >= beat_seconds) {
      send_beats(mine);
      beaten = now;
    }
    if (!leaving_ && !failed_) {
      look_for_silence(now);
      const std::lock_guard<std::mutex> lock(device_mutex_);
      if (const std::string why = probe_ ? probe_() : ""; !why.empty()) fail(why);
    }
    // Whether anybody gets on: rank 0 sees it of all.
    uint64_t all = mine;
    bool may_take_time = doing_ != Doing::training;
    for (const Peer& peer : peers_) {
      all += peer.progress;
      may_take_time |= peer.control && peer.doing != Doing::training;
    }
    if (all != seen || may_take_time) moved = now;
    seen = all;
    if (first() && !failed_ && !leaving_ && now - moved > world_.patience) {
      std::string who;
      for (int r = 0; r < size(); r++)
        if (r ? !peers_[static_cast<size_t>(r)].waits : waits_ == 0)
          who += (who.empty() ? "" : ", ") + (r ? name_of(r) : std::string("rank 0"));
      fail(who.empty() ? str("all ranks have waited ", fixed(world_.patience, 1),
                             " s for a device or for each other: a GPU or the link between two hangs")
                       : str(who, " has not got on for ", fixed(world_.patience, 1),
                             " s, and the others wait for it; where a step takes so long set GCA_TIMEOUT to more"));
    }
    if (!failed_) continue;
    if (!told) {  // what the others do not know yet, and what would wait for ever
      told = true;
      if (first())
        for (int r = 1; r < size(); r++) tell_failure(r, failure_);
      aborting_ = std::thread([this] {  // apart: should it not come back, the lines below still end the process
        const std::lock_guard<std::mutex> lock(device_mutex_);
        if (abort_) abort_();
      });
    }
    if (doing_ != Doing::saving && now - failed_at_ > grace) {
      if (!told_by_first_) print_error("train_gca: ", failure_, "\n");
      _exit(1);
    }
  }
}

}  // namespace gca
