// Collectives by NCCL. Nothing of it is linked or included: the functions used are looked up in the library by name, in
// one table, with the types that NCCL's own header gives them.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "ranks/collectives.h"

namespace gca {

namespace {

// As the headers of all versions 2 have them.
using NcclComm = struct NcclCommOpaque*;
using NcclResult = int;
struct NcclUniqueId {
  char internal[128];
};
constexpr NcclResult nccl_success = 0, nccl_in_progress = 7;
constexpr int nccl_int8 = 0, nccl_float32 = 7, nccl_float64 = 8, nccl_sum = 0;

struct Nccl {
  NcclResult (*get_version)(int*);
  NcclResult (*get_unique_id)(NcclUniqueId*);
  NcclResult (*comm_init_rank)(NcclComm*, int ranks, NcclUniqueId, int rank);
  NcclResult (*comm_destroy)(NcclComm);
  NcclResult (*comm_abort)(NcclComm);
  NcclResult (*comm_get_async_error)(NcclComm, NcclResult*);
  const char* (*get_error_string)(NcclResult);
  NcclResult (*all_reduce)(const void* from, void* to, size_t count, int type, int op, NcclComm, void* stream);
  NcclResult (*reduce_scatter)(const void* from, void* to, size_t slice, int type, int op, NcclComm, void* stream);
  NcclResult (*all_gather)(const void* from, void* to, size_t slice, int type, NcclComm, void* stream);
  NcclResult (*group_start)();
  NcclResult (*group_end)();

  Nccl() {
    const char* named = getenv("GCA_NCCL");
    const std::string file = named && *named ? named : "libnccl.so.2";
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays until the process ends
    if (!library) {
      const char* why = dlerror();
      throw Error(str("several GPUs need NVIDIA's NCCL: expected a library '", file, "', found none that loads (",
                      why ? why : "no reason given",
                      "); install NCCL (libnccl2, or the wheel nvidia-nccl-cu13) and set GCA_NCCL to the path of its "
                      "libnccl.so.2"));
    }
    const auto find = [&](auto& function, const char* name) {
      void* symbol = dlsym(library, name);
      if (!symbol) throw Error(str("'", file, "' is no NCCL 2: it has no ", name, "; set GCA_NCCL to another"));
      memcpy(&function, &symbol, sizeof symbol);
    };
    find(get_version, "ncclGetVersion");
    find(get_unique_id, "ncclGetUniqueId");
    find(comm_init_rank, "ncclCommInitRank");
    find(comm_destroy, "ncclCommDestroy");
    find(comm_abort, "ncclCommAbort");
    find(comm_get_async_error, "ncclCommGetAsyncError");
    find(get_error_string, "ncclGetErrorString");
    find(all_reduce, "ncclAllReduce");
    find(reduce_scatter, "ncclReduceScatter");
    find(all_gather, "ncclAllGather");
    find(group_start, "ncclGroupStart");
    find(group_end, "ncclGroupEnd");
  }
};

class NcclCollectives : public Collectives {
 public:
  NcclCollectives(Ranks& ranks, void* stream) : ranks_(ranks), stream_(stream) {
    NcclUniqueId id{};
    std::string words(sizeof id, '\0');
    if (ranks.first()) {
      check(nccl_.get_unique_id(&id), "making an id");
      memcpy(words.data(), &id, sizeof id);
    }
    words = ranks.broadcast(words);
    GCA_CHECK(words.size() == sizeof id, "an id of NCCL has ", sizeof id, " bytes");
    memcpy(&id, words.data(), sizeof id);
    NcclComm comm = nullptr;
    check(ranks.waiting([&] { return nccl_.comm_init_rank(&comm, ranks.size(), id, ranks.rank()); }),
          "making a communicator");
    comm_ = comm;
    ranks.look_after([this] { return error(); }, [this] { abort(); });
  }
  ~NcclCollectives() override {
    ranks_.look_after(nullptr, nullptr);
    if (NcclComm comm = comm_.exchange(nullptr)) {
      // Where an error is on its way, operations that the others no longer take part in would never end.
      if (failed_ || std::uncaught_exceptions() > 0) nccl_.comm_abort(comm);
      else nccl_.comm_destroy(comm);
    }
  }

  std::string description() const override {
    int version = 0;
    nccl_.get_version(&version);
    return str("NCCL ", version / 10000, ".", version / 100 % 100, ".", version % 100);
  }

  void all_reduce(double* data, int64_t count) override {
    check(nccl_.all_reduce(data, data, static_cast<size_t>(count), nccl_float64, nccl_sum, comm(), stream_),
          "an all-reduce");
  }
  void reduce_scatter(float* data, int64_t slice) override { scatter(data, slice, nccl_float32); }
  void reduce_scatter(double* data, int64_t slice) override { scatter(data, slice, nccl_float64); }
  void all_gather(void* data, int64_t slice_bytes) override {
    const char* mine = static_cast<const char*>(data) + ranks_.rank() * slice_bytes;
    check(nccl_.all_gather(mine, data, static_cast<size_t>(slice_bytes), nccl_int8, comm(), stream_), "an all-gather");
  }
  void begin_group() override { check(nccl_.group_start(), "a group of operations"); }
  void end_group() override { check(nccl_.group_end(), "a group of operations"); }

 private:
  template <class T>
  void scatter(T* data, int64_t slice, int type) {
    T* mine = data + ranks_.rank() * slice;
    check(nccl_.reduce_scatter(data, mine, static_cast<size_t>(slice), type, nccl_sum, comm(), stream_),
          "a reduce-scatter");
  }
  NcclComm comm() {
    const NcclComm comm = comm_;
    if (!comm) ranks_.tick();  // says why it was aborted
    GCA_CHECK(comm, "the communicator is gone");
    return comm;
  }
  void check(NcclResult result, const char* doing) {
    if (result == nccl_success || result == nccl_in_progress) return;
    failed_ = true;
    ranks_.tick();  // where the run has ended for a reason that is known, that one
    throw Error(str("NCCL, ", doing, ": ", nccl_.get_error_string(result),
                    "; NCCL_DEBUG=INFO in the environment makes it say more"));
  }
  // From the watch's thread.
  std::string error() {
    NcclResult result = nccl_success;
    const NcclComm comm = comm_;
    if (!comm || nccl_.comm_get_async_error(comm, &result) != nccl_success || result == nccl_success ||
        result == nccl_in_progress)
      return "";
    return str("NCCL: ", nccl_.get_error_string(result), "; NCCL_DEBUG=INFO in the environment makes it say more");
  }
  void abort() {
    failed_ = true;
    if (NcclComm comm = comm_.exchange(nullptr)) nccl_.comm_abort(comm);
  }

  const Nccl nccl_;
  Ranks& ranks_;
  void* stream_;
  std::atomic<NcclComm> comm_{nullptr};
  std::atomic<bool> failed_{false};
};

}  // namespace

std::unique_ptr<Collectives> nccl_collectives(Ranks& ranks, void* stream) {
  return std::make_unique<NcclCollectives>(ranks, stream);
}

}  // namespace gca
