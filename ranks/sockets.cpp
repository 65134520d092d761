// Sockets by POSIX's calls. None raises a signal, and none waits longer than it says.
#include "ranks/sockets.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <memory>

namespace gca {

namespace {

#ifndef MSG_NOSIGNAL
constexpr int MSG_NOSIGNAL = 0;  // there it is an option of the socket, SO_NOSIGPIPE
#endif

// A socket that a call has just made (or -1): no program that is started has it, and writing to one whose other end is
// gone raises no signal.
int prepared(int fd, bool blocking) {
  if (fd < 0) return fd;
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  if (!blocking) fcntl(fd, F_SETFL, O_NONBLOCK);
#ifdef SO_NOSIGPIPE
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
  return fd;
}

using Addresses = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

// Those of a host; none where that cannot be said now. An Error where there is none of that name.
Addresses look_up(const std::string& address, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  const int code = getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (code) found = nullptr;
  if (code && code != EAI_AGAIN)
    throw Error(str("MASTER_ADDR: expected the name or address of rank 0's host, found '", address, "' (",
                    gai_strerror(code), ")"));
  return {found, [](addrinfo* list) {
            if (list) freeaddrinfo(list);
          }};
}

// Small messages are not held back.
void send_at_once(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// Whether the event comes within the time; a signal does not end the wait.
bool wait_for(int fd, short event, double seconds) {
  const double end = monotonic_seconds() + seconds;
  for (;;) {
    pollfd watched{fd, event, 0};
    const double left = std::max(0.0, end - monotonic_seconds());
    const int ready = poll(&watched, 1, static_cast<int>(std::ceil(left * 1e3)));
    if (ready > 0) return true;
    if (ready == 0 || errno != EINTR) return false;
  }
}

}  // namespace

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}
Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

Socket Socket::listen(const std::string& address, int port) {
  const Addresses found = look_up(address, port);
  int code = EADDRNOTAVAIL;
  for (const addrinfo* one = found.get(); one; one = one->ai_next) {
    Socket socket(prepared(::socket(one->ai_family, SOCK_STREAM, 0), true));
    const int on = 1;  // a port that a run has just left may be taken again at once
    setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (socket && ::bind(socket.fd(), one->ai_addr, one->ai_addrlen) == 0 && ::listen(socket.fd(), 1024) == 0)
      return socket;
    code = errno;
  }
  if (code == EADDRINUSE)
    throw Error(str("port ", port, " of ", address,
                    ": expected a free one for the ranks to meet on, found it in use, by another run perhaps; set "
                    "GCA_PORT to another, the same for all ranks"));
  throw Error(str("MASTER_ADDR: expected the address of the host that rank 0 runs on, found '", address,
                  "', on which it cannot listen (", strerror(code), ")"));
}

int Socket::port() const {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &length) < 0) return 0;
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

Socket Socket::connect(const std::string& address, int port) {
  const Addresses found = look_up(address, port);
  for (const addrinfo* one = found.get(); one; one = one->ai_next) {
    Socket socket(prepared(::socket(one->ai_family, SOCK_STREAM, 0), false));
    if (!socket) continue;
    if (::connect(socket.fd(), one->ai_addr, one->ai_addrlen) < 0) {
      int code = errno;
      socklen_t length = sizeof code;
      if (code != EINPROGRESS || !wait_for(socket.fd(), POLLOUT, 5) ||
          getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &code, &length) < 0 || code != 0)
        continue;
    }
    send_at_once(socket.fd());
    return socket;
  }
  return Socket();
}

Socket Socket::accept(double seconds, std::string& from) const {
  if (!wait_for(fd_, POLLIN, seconds)) return Socket();
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  Socket socket(prepared(::accept(fd_, reinterpret_cast<sockaddr*>(&address), &length), false));
  if (!socket) return socket;
  char host[256] = "an unknown address", port[16] = "";
  getnameinfo(reinterpret_cast<sockaddr*>(&address), length, host, sizeof host, port, sizeof port,
              NI_NUMERICHOST | NI_NUMERICSERV);
  from = str(host, " port ", port);
  send_at_once(socket.fd());
  return socket;
}

int64_t Socket::receive_some(void* out, int64_t bytes, double seconds) const {
  if (!wait_for(fd_, POLLIN, seconds)) return 0;
  const ssize_t got = ::recv(fd_, out, static_cast<size_t>(bytes), MSG_DONTWAIT);
  if (got > 0) return got;
  return got < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}
int64_t Socket::send_some(const void* data, int64_t bytes, double seconds) const {
  if (!wait_for(fd_, POLLOUT, seconds)) return 0;
  const ssize_t sent = ::send(fd_, data, static_cast<size_t>(bytes), MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent >= 0) return sent;
  return errno == EAGAIN || errno == EINTR ? 0 : -1;
}
bool Socket::receive(void* out, int64_t bytes, double seconds) const {
  const double end = monotonic_seconds() + seconds;
  for (int64_t done = 0; done < bytes;) {
    const int64_t got = receive_some(static_cast<char*>(out) + done, bytes - done, end - monotonic_seconds());
    if (got < 0 || (got == 0 && monotonic_seconds() >= end)) return false;
    done += got;
  }
  return true;
}
bool Socket::send(const void* data, int64_t bytes, double seconds) const {
  const double end = monotonic_seconds() + seconds;
  for (int64_t done = 0; done < bytes;) {
    const int64_t sent = send_some(static_cast<const char*>(data) + done, bytes - done, end - monotonic_seconds());
    if (sent < 0 || (sent == 0 && monotonic_seconds() >= end)) return false;
    done += sent;
  }
  return true;
}

}  // namespace gca
