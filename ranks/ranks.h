// The ranks of a run, as one of them sees them: how they meet, what they tell each other from host to host, and what
// ends all of them when one cannot go on. Every rank but rank 0 has two TCP connections, both to rank 0: one for data,
// one on which each side gives a sign of life (a beat) a few times a second. What ranks do with numbers on their
// devices is in ranks/collectives.h. Nothing that goes over the wire is encrypted.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common.h"
#include "ranks/sockets.h"
#include "ranks/world.h"

namespace gca {

// The run was ended by another rank, which has said why, or has rank 0 say it.
struct EndedElsewhere : Error {
  using Error::Error;
};

// What a rank is at. A rank that trains must get on; one that starts, saves or validates may take its time.
enum class Doing : uint32_t { starting, training, saving, validating };

class Ranks {
 public:
  // Meets the others: returns when all are there. Errors name who is missing, or why this one was sent away. A world of
  // one meets nobody, and all below is then at once done.
  explicit Ranks(const World& world);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int rank() const { return world_.rank; }
  int size() const { return world_.size; }
  bool first() const { return world_.rank == 0; }

  // ---- from host to host; all ranks call the same ones in the same order -----------------------------------------
  // data (count) becomes the sum over ranks, added in their order: the same bits on all.
  void sum(double* data, int64_t count);
  // Rank 0 gets what each rank gives; the others get nothing.
  std::vector<std::string> gather(const std::string& mine);
  // All get what rank 0 gives.
  std::string broadcast(const std::string& from_first);
  // Between rank 0 and another: both must say the same number of bytes.
  void send(int to, const void* data, int64_t bytes);
  void receive(int from, void* out, int64_t bytes);

  // ---- how it goes ------------------------------------------------------------------------------------------------
  // This rank has got on by a piece of work, and what it is at. An Error, as in all of the above, where the run has
  // ended.
  void at(Doing doing);
  void tick();
  // While call() waits for others, or for the device.
  template <class Call>
  auto waiting(Call&& call) {
    struct Mark {
      std::atomic<int>& waits;
      explicit Mark(std::atomic<int>& w) : waits(w) { waits++; }
      ~Mark() { waits--; }
    } mark(waits_);
    return call();
  }
  // Work of this process' CPU is progress too.
  void count_cpu_time() { counts_cpu_time_ = true; }
  // Called a few times a second from another thread: a sentence where something has failed that it looks after.
  // aborted() is called from there once the run has ended, so that nothing waits on a device for ever. Null: no more.
  void look_after(std::function<std::string()> probe, std::function<void()> abort);

  // This rank cannot go on: all end. True: rank 0 says why, this one need not.
  bool fail(const std::string& why) noexcept;
  // All have come to their end: nobody takes it for a failure.
  void leave();

 private:
  struct Peer {
    Socket control, data;
    std::string name = "";   // host and process
    std::string inbox = "";  // of control, what is no whole message yet
    double heard = 0;        // when
    uint64_t progress = 0;   // as it was told last
    Doing doing = Doing::starting;
    bool waits = false;
    int32_t transfers = 0;
    bool gone = false;
  };
  World world_;
  std::vector<Peer> peers_;  // by rank; only those of whom this one is connected to are filled
  std::atomic<uint64_t> ticks_{0};
  std::atomic<Doing> doing_{Doing::starting};
  std::atomic<int> waits_{0};
  std::atomic<bool> failed_{false}, leaving_{false}, done_{false}, counts_cpu_time_{false};
  std::mutex failure_mutex_, control_mutex_, device_mutex_;
  std::string failure_;
  bool told_by_first_ = false;
  double failed_at_ = 0;
  std::function<std::string()> probe_;
  std::function<void()> abort_;
  std::thread watch_, aborting_;

  void meet_as_first();
  void meet_first();
  template <class Move>
  void transfer(int with, int64_t bytes, bool sends, Move move);
  void check();
  void note_failure(const std::string& why, bool told_by_first);
  bool tell_failure(int to, const std::string& why) noexcept;
  std::string name_of(int rank) const;

  void watch();
  void read_control(int from);
  void send_beats(uint64_t progress);
  void look_for_silence(double now);
  uint64_t progress() const;
};

}  // namespace gca
