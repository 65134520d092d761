// How the ranks of a run meet: rank 0 listens, the others come, with two connections each.
#include "ranks/meeting.h"

#include <sys/socket.h>
#include <unistd.h>

#include "base/text.h"
#include "ranks/ranks.h"

namespace gca {

namespace {

constexpr double hello_seconds = 5;  // that a stranger may take for its first words

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "a host without a name";
}
uint64_t job_hash(const World& world) { return name_hash(world.job) | uint64_t{name_hash(world.job + "*")} << 32; }

void answer(const Socket& socket, bool accepted, const std::string& reason) {
  Answer words;
  memcpy(words.magic, Answer::expected, sizeof words.magic);
  words.accepted = accepted;
  put_text(words.reason, reason);
  socket.send(&words, sizeof words, hello_seconds);
}

}  // namespace

void Ranks::meet_as_first() {
  const Socket door = world_.listening >= 0 ? Socket(world_.listening) : Socket::listen(world_.address, world_.port);
  world_.listening = -1;
  const double wait = 5 * world_.patience, end = monotonic_seconds() + wait;
  int missing = 2 * (size() - 1);
  std::string turned_away;
  while (missing > 0 && monotonic_seconds() < end) {
    std::string from;
    Socket socket = door.accept(end - monotonic_seconds(), from);
    if (!socket) continue;
    Hello hello;
    if (!socket.receive(&hello, sizeof hello, hello_seconds) || !hello.is_ours()) {
      print_error("a connection from ", from, " is no rank's and was closed\n");
      continue;
    }
    const std::string name = printable(text_of(hello.host)) + str(", process ", hello.process);
    const auto refuse = [&](const std::string& why) {
      answer(socket, false, why);
      turned_away += str("; rank ", hello.rank, " (", name, ") was sent away: ", why);
    };
    if (hello.job != job_hash(world_) || hello.size != size())
      refuse(str("rank 0 at ", world_.address, " port ", world_.port, " is another run's, of ", size(),
                 " ranks: two runs on one port; set GCA_PORT to another for one of them"));
    else if (hello.rank < 1 || hello.rank >= size() || (hello.line != Line::control && hello.line != Line::data))
      refuse("its number is not one of this world's");
    else {
      Peer& peer = peers_[static_cast<size_t>(hello.rank)];
      Socket& place = hello.line == Line::control ? peer.control : peer.data;
      if (place)
        refuse(str("rank ", hello.rank, " is there already (", peer.name,
                   "): two runs on one port, or two processes with one number; set GCA_PORT to another for one run"));
      else {
        place = std::move(socket);
        peer.name = name;
        missing--;
      }
    }
  }
  std::string who;
  for (int r = 1; r < size(); r++)
    if (!peers_[static_cast<size_t>(r)].control || !peers_[static_cast<size_t>(r)].data)
      who += str(who.empty() ? "" : ", ", r);
  const std::string why =
      who.empty() ? ""
                  : str("expected ", size(), " ranks at ", world_.address, " port ", world_.port, ", found in ",
                        fixed(wait, 0), " s that these have not come: ", who, turned_away,
                        "; were they started, with the same MASTER_ADDR, MASTER_PORT and GCA_PORT? (GCA_TIMEOUT=",
                        fixed(2 * world_.patience, 0), " waits twice as long)");
  for (int r = 1; r < size(); r++)
    for (const Socket* socket : {&peers_[static_cast<size_t>(r)].control, &peers_[static_cast<size_t>(r)].data})
      if (*socket) answer(*socket, why.empty(), why);
  if (!why.empty()) throw Error(why);
}

void Ranks::meet_first() {
  const double wait = 5 * world_.patience, end = monotonic_seconds() + wait;
  const std::string where = str(world_.address, " port ", world_.port);
  Hello hello;
  memcpy(hello.magic, Hello::expected, sizeof hello.magic);
  hello.rank = rank();
  hello.size = size();
  hello.process = static_cast<int32_t>(getpid());
  hello.job = job_hash(world_);
  put_text(hello.host, host_name());
  Peer& peer = peers_[0];
  for (const Line line : {Line::control, Line::data}) {
    Socket& socket = line == Line::control ? peer.control : peer.data;
    while (!(socket = Socket::connect(world_.address, world_.port))) {
      if (monotonic_seconds() > end)
        throw Error(str("rank ", rank(), ": expected rank 0 at ", where, ", found nobody there in ", fixed(wait, 0),
                        " s; was it started, and is that the address (MASTER_ADDR) and port (GCA_PORT, else "
                        "MASTER_PORT + 1) of its host?"));
      usleep(50000);
    }
    hello.line = line;
    if (!socket.send(&hello, sizeof hello, hello_seconds))
      throw Error(str("rank ", rank(), ": whoever listens at ", where,
                      " has closed the connection; set GCA_PORT to a "
                      "port of this run's own"));
  }
  for (const Socket* socket : {&peer.control, &peer.data}) {
    Answer words;
    if (!socket->receive(&words, sizeof words, wait + hello_seconds) || !words.is_ours())
      throw Error(str("rank ", rank(), ": expected rank 0 at ", where,
                      " to answer, found that it has ended, or is no rank of this program; see its own message, or set "
                      "GCA_PORT to a port of this run's own"));
    if (!words.accepted) throw Error(str("rank ", rank(), ": ", printable(text_of(words.reason))));
  }
  peer.name = str("at ", where);
}

}  // namespace gca
