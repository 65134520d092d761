// TCP between ranks: a socket that is closed when it goes, whole reads and writes with a time limit, addresses in
// words.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

#include "base/progress.h"
#include "common.h"

namespace gca {

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept;
  ~Socket();
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

  // Listens on that address alone; port 0: one that is free. An Error where it is taken, or is not this host's.
  static Socket listen(const std::string& address, int port);
  int port() const;  // that it listens on

  // One try; without a connection, false as a bool.
  static Socket connect(const std::string& address, int port);
  // The next one that comes within so many seconds; false as a bool: none came. from: its address.
  Socket accept(double seconds, std::string& from) const;

  // At most so many bytes that are there or arrive within the time: their number; 0: nothing came; -1: the other side
  // has closed.
  int64_t receive_some(void* out, int64_t bytes, double seconds) const;
  // The same of what is taken from data.
  int64_t send_some(const void* data, int64_t bytes, double seconds) const;
  // All of the bytes within the time, or false.
  bool receive(void* out, int64_t bytes, double seconds) const;
  bool send(const void* data, int64_t bytes, double seconds) const;

 private:
  int fd_ = -1;
};

}  // namespace gca
