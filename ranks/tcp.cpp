// Collectives over TCP: every rank sends to rank 0, which adds in the order of ranks and sends back.
#include <algorithm>
#include <vector>

#include "ranks/collectives.h"

namespace gca {

namespace {

class TcpCollectives : public Collectives {
 public:
  explicit TcpCollectives(Ranks& ranks) : ranks_(ranks) { ranks.count_cpu_time(); }
  std::string description() const override { return "TCP"; }

  void all_reduce(double* data, int64_t count) override { ranks_.sum(data, count); }
  void reduce_scatter(float* data, int64_t slice) override { add_and_scatter(data, slice); }
  void reduce_scatter(double* data, int64_t slice) override { add_and_scatter(data, slice); }
  void all_gather(void* data, int64_t slice_bytes) override {
    char* slices = static_cast<char*>(data);
    const int64_t all_bytes = ranks_.size() * slice_bytes;
    if (!ranks_.first()) {
      ranks_.send(0, slices + ranks_.rank() * slice_bytes, slice_bytes);
      return ranks_.receive(0, data, all_bytes);
    }
    for (int r = 1; r < ranks_.size(); r++) ranks_.receive(r, slices + r * slice_bytes, slice_bytes);
    for (int r = 1; r < ranks_.size(); r++) ranks_.send(r, data, all_bytes);
  }

 private:
  template <class T>
  void add_and_scatter(T* data, int64_t slice) {
    const int64_t n_bytes = static_cast<int64_t>(sizeof(T)), all = ranks_.size() * slice;
    if (!ranks_.first()) {
      for (int64_t done = 0; done < all; done += piece)
        ranks_.send(0, data + done, std::min(piece, all - done) * n_bytes);
      return ranks_.receive(0, data + ranks_.rank() * slice, slice * n_bytes);
    }
    std::vector<T> theirs(static_cast<size_t>(std::min(piece, all)));
    for (int r = 1; r < ranks_.size(); r++)
      for (int64_t done = 0; done < all; done += piece) {
        const int64_t here = std::min(piece, all - done);
        ranks_.receive(r, theirs.data(), here * n_bytes);
        for (int64_t i = 0; i < here; i++) data[done + i] += theirs[static_cast<size_t>(i)];
      }
    for (int r = 1; r < ranks_.size(); r++) ranks_.send(r, data + r * slice, slice * n_bytes);
  }

  static constexpr int64_t piece = 1 << 16;  // numbers at once: what rank 0 holds beside its own
  Ranks& ranks_;
};

}  // namespace

std::unique_ptr<Collectives> tcp_collectives(Ranks& ranks) { return std::make_unique<TcpCollectives>(ranks); }

}  // namespace gca
