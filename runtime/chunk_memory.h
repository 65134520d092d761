// The memory of chunks where it does not fit the device: CK | CV of all chunks in host memory, of those at work in the
// device's. Which chunk is where is decided here, once for every backend.
//
//   host:    slab 0 | slab 1 | ..           every chunk, in slabs that a thread makes ready ahead
//   device:  place 0 | place 1 | ..         the chunks used most recently
//
// Time is counted in rounds: what one round fetches is read in the next, while another fetch is under way. So a place
// is given to another chunk only when its own was needed neither in this round nor in the last one: the two rounds'
// places are the two buffers, the others hold what may be asked for again.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/progress.h"
#include "common.h"

namespace gca {

// Host memory in slabs, made ready one after another by a thread of its own: the first can be used at once.
template <class Device>
class HostSlabs {
 public:
  HostSlabs(Device& device, int64_t slabs, int64_t slab_bytes)
      : device_(device), slab_bytes_(slab_bytes), slabs_(slabs), worker_([this] { make(); }) {}
  ~HostSlabs() {
    stop_ = true;
    worker_.join();
    for (void* slab : slabs_)
      if (slab) device_.release_host(slab, slab_bytes_);
  }
  HostSlabs(const HostSlabs&) = delete;
  HostSlabs& operator=(const HostSlabs&) = delete;
  // Waits until it is there. An Error where the host has no memory left for it.
  char* operator[](int64_t i) {
    std::unique_lock lock(mutex_);
    const auto is_there = [&] { return slabs_[i] || !error_.empty(); };
    if (!is_there()) {
      const Stopwatch clock;
      made_.wait(lock, is_there);
      wait_seconds_ += clock.seconds();
    }
    if (!slabs_[i]) throw Error(error_);
    return static_cast<char*>(slabs_[i]);
  }
  // Waits for all of them.
  void ready() {
    if (!slabs_.empty()) (*this)[std::ssize(slabs_) - 1];
  }
  double wait_seconds() const { return wait_seconds_; }  // that its user has waited so far

 private:
  void make() {
    for (void*& slab : slabs_) {
      if (stop_) return;
      void* made = nullptr;
      std::string error;
      try {
        made = device_.allocate_host(slab_bytes_);
      } catch (const Error& caught) {
        error = caught.what();
      }
      const std::lock_guard lock(mutex_);
      slab = made;
      error_ = error;
      made_.notify_all();
      if (!made) return;
    }
  }

  Device& device_;
  int64_t slab_bytes_;
  std::vector<void*> slabs_;
  std::string error_;
  double wait_seconds_ = 0;
  std::mutex mutex_;
  std::condition_variable made_;
  std::atomic<bool> stop_{false};
  std::thread worker_;
};

struct ChunkRounds {
  // Places that rounds need which append and fetch so many chunks at most.
  static int64_t fewest_places(int64_t of_round) { return 2 * of_round; }
};

// What a memory has done since it was made.
struct MemoryFigures {
  int64_t asked = 0, fetched_bytes = 0, stored_bytes = 0;
  double copy_seconds = 0;  // in which copies to the host or from it were under way
  double wait_seconds = 0;  // for host memory that was not ready when it was needed
};

template <class Device>
class ChunkMemory {
 public:
  // `chunks` chunks of chunk_bytes bytes in host memory; room for `places` of them in the device's, (places,
  // chunk_bytes), which must outlive this.
  ChunkMemory(Device& device, int64_t chunks, int64_t chunk_bytes, void* device_places, int64_t places)
      : device_(device),
        chunk_bytes_(chunk_bytes),
        copy_seconds_before_(device.side_copy_seconds()),
        chunks_of_slab_(std::max<int64_t>(1, std::min(chunks, slab_bytes / chunk_bytes))),
        slabs_(device, ceil_div(chunks, chunks_of_slab_), chunks_of_slab_ * chunk_bytes),
        places_(static_cast<char*>(device_places)),
        place_of_(chunks, -1),
        chunk_in_(places, -1),
        used_(places, never),
        newer_(places + 1),
        older_(places + 1) {
    for (int32_t p = 0; p <= places; p++) {  // a ring: the last entry is its head, between newest and oldest
      newer_[p] = p ? p - 1 : static_cast<int32_t>(places);
      older_[p] = p < places ? p + 1 : 0;
    }
  }
  // Waits until all host memory is ready.
  void ready() { slabs_.ready(); }

  // All chunks are forgotten.
  void clear() {
    std::fill(place_of_.begin(), place_of_.end(), -1);
    std::fill(chunk_in_.begin(), chunk_in_.end(), -1);
    std::fill(used_.begin(), used_.end(), never);
  }
  // Chunks first .. last - 1 are forgotten, and others may be appended in their place. What is on its way to or from
  // theirs is let finish: a place is given away no sooner than it would have been.
  void forget(int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; chunk++) {
      if (place_of_[chunk] >= 0) chunk_in_[place_of_[chunk]] = -1;
      place_of_[chunk] = -1;
    }
  }
  // A round begins: its copies wait for what the device has been given to do up to here.
  void next_round() {
    round_++;
    device_.side_waits();
  }
  // What the device is given to do from here on waits for all copies begun so far.
  void arrive() { device_.wait_for_side(); }
  // Chunks first .. first + n - 1, new, from the device's memory, (n, chunk_bytes), into places.
  void append(const void* from, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      GCA_CHECK(place_of_[first + i] < 0, "chunk ", first + i, " is new");
      device_.copy_bytes(at(take_place(first + i)), static_cast<const char*>(from) + i * chunk_bytes_, chunk_bytes_);
    }
  }
  // These from their places to the host, once the device has done what it was given so far.
  void store(int64_t first, int64_t n) {
    copies_.clear();
    for (int64_t chunk = first; chunk < first + n; chunk++) copies_.push_back({on_host(chunk), at(place_of_[chunk])});
    device_.side_waits();
    device_.side_copies(copies_, chunk_bytes_);
    figures_.stored_bytes += n * chunk_bytes_;
  }
  // places = where the chunks of a table of picks lie or will lie (-1 stays): chunk `offset + pick`. Copies of those
  // that were not there begin. picks, places (count)
  void fetch(int32_t* places, const int32_t* picks, int64_t count, int64_t offset) {
    copies_.clear();
    for (int64_t i = 0; i < count; i++) {
      places[i] = -1;
      if (picks[i] < 0) continue;
      const int64_t chunk = offset + picks[i];
      figures_.asked++;
      if (place_of_[chunk] < 0) {
        take_place(chunk);
        copies_.push_back({at(place_of_[chunk]), on_host(chunk)});
      } else {
        use(place_of_[chunk]);
      }
      places[i] = place_of_[chunk];
    }
    device_.side_copies(copies_, chunk_bytes_);
    figures_.fetched_bytes += std::ssize(copies_) * chunk_bytes_;
  }

  // n_bytes of the host's memory, chunks one after the other, from byte `first` on: out of it and into it. The device
  // has no copies under way.
  void get(void* out, int64_t first, int64_t n_bytes) {
    in_chunks(first, n_bytes, [&](char* there, int64_t done, int64_t n) {
      memcpy(static_cast<char*>(out) + done, there, static_cast<size_t>(n));
    });
  }
  void put(const void* in, int64_t first, int64_t n_bytes) {
    in_chunks(first, n_bytes, [&](char* there, int64_t done, int64_t n) {
      memcpy(there, static_cast<const char*>(in) + done, static_cast<size_t>(n));
    });
  }

  MemoryFigures figures() {
    figures_.copy_seconds = device_.side_copy_seconds() - copy_seconds_before_;
    figures_.wait_seconds = slabs_.wait_seconds();
    return figures_;
  }

 private:
  static constexpr int64_t slab_bytes = int64_t{1} << 30, never = -2;

  char* at(int32_t place) const { return places_ + place * chunk_bytes_; }
  char* on_host(int64_t chunk) { return slabs_[chunk / chunks_of_slab_] + chunk % chunks_of_slab_ * chunk_bytes_; }

  template <class Copy>
  void in_chunks(int64_t first, int64_t n_bytes, Copy copy) {
    for (int64_t done = 0; done < n_bytes;) {
      const int64_t at = first + done, inside = at % chunk_bytes_, n = std::min(n_bytes - done, chunk_bytes_ - inside);
      copy(on_host(at / chunk_bytes_) + inside, done, n);
      done += n;
    }
  }

  // The place becomes the most recently used.
  void use(int32_t place) {
    used_[place] = round_;
    newer_[older_[place]] = newer_[place];
    older_[newer_[place]] = older_[place];
    const int32_t head = static_cast<int32_t>(chunk_in_.size());
    older_[place] = older_[head];
    newer_[place] = head;
    newer_[older_[head]] = place;
    older_[head] = place;
  }
  // The least recently used place, for this chunk.
  int32_t take_place(int64_t chunk) {
    const int32_t place = newer_[chunk_in_.size()];
    GCA_CHECK(used_[place] < round_ - 1, "rounds need more places than the ", std::ssize(chunk_in_));
    if (chunk_in_[place] >= 0) place_of_[chunk_in_[place]] = -1;
    chunk_in_[place] = chunk;
    place_of_[chunk] = place;
    use(place);
    return place;
  }

  Device& device_;
  int64_t chunk_bytes_;
  double copy_seconds_before_;  // the device's, when this was made
  MemoryFigures figures_;
  int64_t chunks_of_slab_, round_ = 0;
  HostSlabs<Device> slabs_;
  char* places_;
  std::vector<int32_t> place_of_;                      // of each chunk, or -1
  std::vector<int64_t> chunk_in_;                      // of each place, or -1
  std::vector<int64_t> used_;                          // the last round that needed it
  std::vector<int32_t> newer_, older_;                 // neighbours in the order of use
  std::vector<std::pair<void*, const void*>> copies_;  // to, from
};

}  // namespace gca
