// What ranks do together with the numbers on their devices: a table of three operations with two makers, TCP for
// processes on CPUs and NCCL for GPUs. All ranks call the same ones in the same order; the same world gives the same
// bits again.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "ranks/ranks.h"

namespace gca {

class Collectives {
 public:
  virtual ~Collectives() = default;
  virtual std::string description() const = 0;

  // data (count) becomes the sum over ranks.
  virtual void all_reduce(double* data, int64_t count) = 0;
  // data (size,slice): slice `rank` becomes the sum over ranks of theirs; the other slices are then undefined.
  virtual void reduce_scatter(float* data, int64_t slice) = 0;
  virtual void reduce_scatter(double* data, int64_t slice) = 0;
  // data (size,slice_bytes): slice r becomes that of rank r.
  virtual void all_gather(void* data, int64_t slice_bytes) = 0;
  // Several all_gathers in between may be done as one.
  virtual void begin_group() {}
  virtual void end_group() {}
};

// Over the ranks' own connections, through rank 0, on memory of the host; done when a call returns.
std::unique_ptr<Collectives> tcp_collectives(Ranks& ranks);

// NCCL, loaded here: the library that GCA_NCCL names, else libnccl.so.2. stream: a cudaStream_t of this rank's GPU, on
// which the operations are put; calls return at once. An Error where there is no such library or NCCL reports one.
std::unique_ptr<Collectives> nccl_collectives(Ranks& ranks, void* stream);

}  // namespace gca
