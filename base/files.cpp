// Files, folders and the lock of a run: the system calls, and the hint for each way they fail.
#include "base/files.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <new>
#include <set>
#include <sstream>

#include "base/text.h"

namespace gca {

Error system_error(const std::string& doing, int code) {
  const char* hint = code == ENOENT                     ? "check the path"
                     : code == EACCES || code == EPERM  ? "check the permissions, or choose another place"
                     : code == ENOSPC || code == EDQUOT ? "free some space, or choose another disk"
                     : code == EFBIG ? "raise the limit on a file's size (ulimit -f), or choose another disk"
                     : code == EROFS ? "choose a place that can be written"
                     : code == EMFILE || code == ENFILE    ? "raise the limit on open files (ulimit -n)"
                     : code == EIO                         ? "check the disk"
                     : code == ELOOP                       ? "a link is not followed here: give the file itself"
                     : code == ENOTDIR || code == EISDIR   ? "check which part of the path is a file and which a folder"
                     : code == EEXIST || code == ENOTEMPTY ? "remove or rename what is there"
                                                           : "check the path and the disk";
  return Error(doing + ": " + strerror(code) + "; " + hint);
}

void flush_output() {
  if (!try_flush_output()) throw system_error("cannot write standard output", output_error);
}

void keep_standard_places() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(fd, F_GETFD) < 0 && ::open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) < 0) return;
}

std::string parent_folder(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

bool is_file_name(const std::string& name) {
  const bool bad = std::any_of(name.begin(), name.end(),
                               [](char c) { return c == '/' || static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
  return !name.empty() && name.size() <= 200 && !bad && name != "." && name != "..";
}

namespace {

struct stat status_of(int fd, const std::string& path) {
  struct stat result;
  if (::fstat(fd, &result) < 0) throw system_error("cannot look at '" + path + "'", errno);
  return result;
}

// What a system call says that a file system does not have, as Lustre and FUSE without locks, or a share whose folders
// cannot be written through.
bool is_missing(int code) {
  return code == ENOSYS || code == EINVAL || code == ENOTSUP || code == EOPNOTSUPP || code == ENOLCK || code == EBADF;
}

// Said once: what is made is only as safe as the file system is.
void warn_of_no_sync(const std::string& path, int code) {
  static std::atomic<bool> said = false;
  if (!said.exchange(true))
    print_error("'", path, "' cannot be written through to the disk (", strerror(code),
                "): this file system has no such thing; after a power cut the newest files may be damaged\n");
}

// What a shell pattern matches, in no order. unread, code: the first folder that could not be read, and why.
std::vector<std::string> matches_of(const std::string& pattern, std::string& unread, int& code) {
  static thread_local std::string folder_unread;  // glob's function takes no argument of its caller's
  static thread_local int why;
  why = 0;
  glob_t found;
  const int result = ::glob(
      pattern.c_str(), GLOB_NOSORT,
      [](const char* folder, int error) {
        if (error == ENOENT || error == ENOTDIR) return 0;
        folder_unread = folder;
        why = error;
        return 1;
      },
      &found);
  std::vector<std::string> paths;
  if (result == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  ::globfree(&found);
  if (result == GLOB_NOSPACE) throw std::bad_alloc();
  unread = folder_unread;
  code = result == GLOB_ABORTED ? why : 0;
  return paths;
}

// Of a path or pattern that leads nowhere: as far as it is there, and what is not.
std::string what_is_there(const std::string& pattern) {
  const std::filesystem::path whole(pattern);
  std::filesystem::path there;
  std::string unread;
  int code;
  std::error_code none;
  for (auto part = whole.begin(); part != whole.end(); there /= *part++) {
    const std::string path = (there / *part).string(), name = part->string(),
                      folder = (there.empty() ? std::filesystem::path(".") : there).string();
    const bool in_pattern = path.find_first_of("*?[") != path.npos;
    if (std::filesystem::exists(path, none) || (in_pattern && !matches_of(path, unread, code).empty())) continue;
    if (std::filesystem::is_symlink(path, none)) return "'" + path + "' is a link to something that is not there";
    if (std::filesystem::exists(there, none) && !std::filesystem::is_directory(there, none))
      return "'" + folder + "' is a file, no folder";
    std::vector<std::string> names;
    for (std::filesystem::directory_iterator entry(folder, none), last; !none && entry != last; entry.increment(none))
      names.push_back(entry->path().filename().string());
    const bool is_pattern = name.find_first_of("*?[") != name.npos;
    return str(there.empty() ? "here, in '" + std::filesystem::current_path(none).string() + "', "
                             : "'" + folder + "' is there, but in it ",
               is_pattern ? "nothing matches '" : "is no '", name, "'", is_pattern ? "" : did_you_mean(name, names));
  }
  return "check the path";
}

}  // namespace

size_t files_to_keep_open() {
  rlimit limit{};
  return ::getrlimit(RLIMIT_NOFILE, &limit) == 0 ? static_cast<size_t>(std::min<rlim_t>(limit.rlim_cur, 1 << 20)) / 4
                                                 : 16;
}

// O_NONBLOCK: a pipe must not hang.
File File::open(const std::string& path) { return File(path, O_RDONLY | O_NONBLOCK, "cannot open"); }

File File::create(const std::string& path) { return File(path, O_WRONLY | O_CREAT | O_EXCL, "cannot create"); }

int64_t File::size_bytes() const { return static_cast<int64_t>(status_of(fd_, path_).st_size); }

static FileId id_of(const struct stat& status) {
  return {static_cast<uint64_t>(status.st_dev), static_cast<uint64_t>(status.st_ino)};
}

FileId File::id() const { return id_of(status_of(fd_, path_)); }

Found look_at(const std::string& path) {
  struct stat status;
  if (::stat(path.c_str(), &status) < 0) {
    if (errno == ENOENT || errno == ELOOP || errno == ENOTDIR) return {Found::none, {}, 0};
    throw system_error("cannot look at '" + path + "'", errno);
  }
  const Found::Kind kind = S_ISREG(status.st_mode)   ? Found::file
                           : S_ISDIR(status.st_mode) ? Found::folder
                                                     : Found::other;
  return {kind, id_of(status), static_cast<int64_t>(status.st_size)};
}

File& File::operator=(File&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  return *this;
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

void File::read(void* out, size_t bytes, int64_t offset_bytes) const {
  for (size_t done = 0; done < bytes;) {
    const off_t at = static_cast<off_t>(offset_bytes) + static_cast<off_t>(done);
    const ssize_t n = uninterrupted([&] { return ::pread(fd_, static_cast<char*>(out) + done, bytes - done, at); });
    if (n < 0) throw system_error(str("cannot read '", path_, "' at byte ", at), errno);
    if (n == 0)
      throw Error(str("'", path_, "' ends at byte ", at, ": expected ", bytes - done,
                      " bytes more; it has been cut off: make it anew or fetch it again"));
    done += n;
  }
}

void File::write(const void* data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = uninterrupted([&] { return ::write(fd_, static_cast<const char*>(data) + done, bytes - done); });
    if (n < 0) throw system_error("cannot write '" + path_ + "'", errno);
    done += n;
  }
}

bool File::lock() const {
  uninterrupted([&] { return ::flock(fd_, LOCK_EX); });  // who looks whether it is a leftover holds it for an instant
  return status_of(fd_, path_).st_nlink > 0;
}

void File::sync() const {
  if (uninterrupted([&] { return ::fsync(fd_); }) == 0) return;
  if (!is_missing(errno)) throw system_error("cannot write '" + path_ + "' through to the disk", errno);
  warn_of_no_sync(path_, errno);
}

File::File(const std::string& path, int flags, const char* doing) : path_(path) {
  fd_ = uninterrupted([&] { return ::open(path.c_str(), flags | O_CLOEXEC, 0666); });
  if (fd_ < 0 && errno == ENOENT)
    throw Error(str(doing, " '", path, "': ", strerror(ENOENT), "; ", what_is_there(path)));
  if (fd_ < 0) throw system_error(str(doing, " '", path, "'"), errno);
  struct stat status = {};
  if (::fstat(fd_, &status) < 0 || !S_ISREG(status.st_mode)) {
    ::close(fd_);
    throw Error("'" + path + "' is a folder, a pipe or a device: expected a regular file; check the path");
  }
}

std::string File::beginning(size_t bytes) const {
  std::string content(std::min(bytes, static_cast<size_t>(size_bytes())), '\0');
  read(content.data(), content.size(), 0);
  return content;
}

std::string read_file(const std::string& path, size_t max_bytes) {
  const File file = File::open(path);
  const size_t bytes = file.size_bytes();
  if (bytes > max_bytes)
    throw Error(
        str("'", path, "': expected at most ", max_bytes, " bytes, found ", bytes, ": is this the right file?"));
  std::string content(bytes, '\0');
  file.read(content.data(), bytes, 0);
  return content;
}

void sync_folder(const std::string& path) {
  const int fd = uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (fd < 0) throw system_error("cannot open the folder '" + path + "'", errno);
  const int code = uninterrupted([&] { return ::fsync(fd); }) < 0 ? errno : 0;
  ::close(fd);
  if (code && !is_missing(code) && code != EACCES && code != EPERM)
    throw system_error("cannot write the folder '" + path + "' through to the disk", code);
  if (code && code != EINVAL) warn_of_no_sync(path, code);  // EINVAL: not needed there
}

void rename_path(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) < 0) throw system_error("cannot rename '" + from + "' to '" + to + "'", errno);
}

// ---- files that appear whole --------------------------------------------------------------------------------------
namespace {

// The file that is to be written: where a link leads, since renaming onto a link would replace the link.
std::string target_of(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return path;
  if (!std::filesystem::is_regular_file(status))
    throw Error("'" + path +
                "' is a folder, a pipe or a device: expected a regular file or a new name; choose another");
  if (!std::filesystem::is_symlink(std::filesystem::symlink_status(path, error))) return path;
  const std::string target = std::filesystem::canonical(path, error).string();
  if (error) throw system_error("cannot follow the link '" + path + "'", error.value());
  return target;
}

// A lock says that somebody writes: it goes with the process, on whatever machine that shares the disk. even_without:
// removed where the file system has no locks, too.
bool remove_leftover(const std::string& path, bool even_without) {
  const int fd = uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK); });
  if (fd < 0) return false;
  const bool free = ::flock(fd, LOCK_EX | LOCK_NB) == 0 || (even_without && errno != EWOULDBLOCK);
  const bool removed = free && ::unlink(path.c_str()) == 0;
  ::close(fd);
  return removed;
}

File create_temporary(const std::string& path) {
  const std::string folder = parent_folder(path), name = std::filesystem::path(path).filename().string();
  remove_leftovers(folder, [&](const std::string& other) { return other == name; });
  const std::string temporary = str(folder, "/.", name, ".", ::getpid(), ".partial");
  for (;;) {
    remove_leftover(temporary, true);  // of our own number: a process that has had it before, and is dead
    File file = File::create(temporary);
    if (file.lock()) return file;
  }
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path)
    : path_(target_of(path)), file_(create_temporary(path_)), temporary_(file_->path()) {}

AtomicFile::~AtomicFile() {
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicFile::close() {
  file_->sync();
  file_.reset();
}

void AtomicFile::commit() {
  if (file_) file_->sync();
  rename_path(temporary_, path_);
  committed_ = true;
  sync_folder(parent_folder(path_));
}

bool remove_if_unlocked(const std::string& path) { return remove_leftover(path, false); }

void remove_leftovers(const std::string& folder, const std::function<bool(const std::string& name)>& ours) {
  constexpr std::string_view end = ".partial";
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), last; !error && entry != last;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();  // .NAME.PROCESS.partial
    if (!name.starts_with('.') || !name.ends_with(end)) continue;
    const size_t point = name.rfind('.', name.size() - end.size() - 1);
    if (point != name.npos && point > 0 && ours(name.substr(1, point - 1))) remove_leftover(folder + "/" + name, false);
  }
}

void write_file(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content.data(), content.size());
  file.commit();
}

static int open_to_append(const std::string& path) {
  const int fd =
      uninterrupted([&] { return ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0666); });
  if (fd < 0) throw system_error("cannot open '" + path + "'", errno);
  return fd;
}

// What a regular file begins with; "" where there is none.
static std::string beginning_of(const std::string& path, size_t most) {
  std::error_code none;
  return std::filesystem::is_regular_file(path, none) ? File::open(path).beginning(most) : "";
}

void check_can_append(const std::string& path) {
  if (const std::string begin = beginning_of(path, 1); !begin.empty() && begin != "{")
    throw Error("'" + path +
                "' is there already: expected lines of JSON to go on after, found something else; choose another name");
  ::close(open_to_append(path));
}

void check_can_replace(const std::string& path, std::string_view mark, const std::string& what) {
  if (const std::string begin = beginning_of(path, 1 << 16); !begin.empty() && begin.find(mark) == begin.npos)
    throw Error("'" + path + "' is there already: expected " + what +
                " to be replaced, found something else; choose another name, or remove it");
  AtomicFile probe(path);  // not committed: it goes
}

void append_line(const std::string& path, const std::string& line) {
  const int fd = open_to_append(path);
  const std::string text = line + "\n";
  const off_t size = ::lseek(fd, 0, SEEK_END);
  int code = 0;
  for (size_t done = 0; done < text.size() && !code;) {
    const ssize_t n = uninterrupted([&] { return ::write(fd, text.data() + done, text.size() - done); });
    if (n < 0) code = errno;
    else done += n;
  }
  if (code && ::ftruncate(fd, size) < 0 && errno != EINVAL) code = errno;  // EINVAL: a device has no size
  if (::close(fd) < 0 && !code) code = errno;  // a disk over the network may say it only here
  if (code) throw system_error("cannot write '" + path + "'", code);
}

// ---- checksums ----------------------------------------------------------------------------------------------------
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
  // table[k][b]: what byte b does to the remainder when k more bytes follow it; so eight bytes take eight independent
  // look-ups.
  static constexpr auto table = [] {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t b = 0; b < 256; b++) {
      t[0][b] = b;
      for (int bit = 0; bit < 8; bit++) t[0][b] = (t[0][b] >> 1) ^ (t[0][b] & 1 ? 0x82f63b78u : 0);
    }
    for (size_t k = 1; k < 8; k++)
      for (size_t b = 0; b < 256; b++) t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 255];
    return t;
  }();
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t x;
    memcpy(&x, p, 8);
    x ^= crc;
    crc = 0;
    for (size_t k = 0; k < 8; k++) crc ^= table[7 - k][(x >> (8 * k)) & 255];
  }
  for (; bytes; bytes--, p++) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 255];
  return ~crc;
}

uint32_t crc32c(const File& file) {
  std::vector<char> piece(size_t{1} << 20);
  uint32_t crc = 0;
  for (int64_t at = 0, size = file.size_bytes(); at < size;) {
    const size_t bytes = std::min(size - at, static_cast<int64_t>(piece.size()));
    file.read(piece.data(), bytes, at);
    crc = crc32c(piece.data(), bytes, crc);
    at += static_cast<int64_t>(bytes);
  }
  return crc;
}

// ---- folders ------------------------------------------------------------------------------------------------------
void make_folder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (!error && !std::filesystem::is_directory(path, error)) error = std::make_error_code(std::errc::not_a_directory);
  if (error) throw system_error("cannot make the folder '" + path + "'", error.value());
}

std::vector<std::string> list_folder(const std::string& path) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(path, error), last; !error && entry != last; entry.increment(error))
    names.push_back(entry->path().filename().string());
  if (error) throw system_error("cannot list the folder '" + path + "'", error.value());
  std::sort(names.begin(), names.end());
  return names;
}

void remove_tree(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) throw system_error("cannot remove '" + path + "'", error.value());
}

static std::vector<std::string> matches_or_error(const std::string& pattern) {
  std::error_code none;
  if (std::filesystem::exists(pattern, none)) return {pattern};
  std::string unread;
  int code;
  std::vector<std::string> paths = matches_of(pattern, unread, code);
  if (code) throw system_error("cannot look for '" + pattern + "': the folder '" + unread + "' cannot be read", code);
  if (paths.empty()) throw Error("no file matches '" + pattern + "': " + what_is_there(pattern));
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::vector<std::string> glob_files(const std::string& patterns) {
  std::vector<std::string> paths;
  std::set<FileId> there;
  std::istringstream lines(patterns);
  for (std::string pattern; std::getline(lines, pattern);)
    for (std::string& path : matches_or_error(pattern)) {
      const Found found = look_at(path);
      if (found.kind == Found::none || there.insert(found.id).second) paths.push_back(std::move(path));
    }
  return paths;
}

// ---- the lock of a run --------------------------------------------------------------------------------------------
RunLock::RunLock(const std::string& folder) {
  const std::string path = folder + "/lock";
  fd_ =
      uninterrupted([&] { return ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666); });
  if (fd_ < 0) throw system_error("cannot open '" + path + "'", errno);
  const int code = ::flock(fd_, LOCK_EX | LOCK_NB) < 0 ? errno : 0;
  if (is_missing(code)) {
    print_error("'", path, "' cannot be locked (", strerror(code),
                "): this file system has no locks; see that no other run writes '", folder, "'\n");
  } else if (code) {
    char text[20] = {};
    const ssize_t length = ::pread(fd_, text, sizeof text, 0);
    ::close(fd_);
    if (code != EWOULDBLOCK) throw system_error("cannot lock '" + path + "'", code);
    long process = 0;
    std::from_chars(text, text + std::max<ssize_t>(length, 0), process);
    throw Error(str("'", folder, "' is being written by another run, process ", process,
                    ": wait for it or stop it, or choose another folder"));
  }
  const std::string process = std::to_string(::getpid()) + "\n";  // for that message only
  if (::ftruncate(fd_, 0) < 0 || ::pwrite(fd_, process.data(), process.size(), 0) < 0) {
    const int failed = errno;
    ::close(fd_);
    throw system_error("cannot write '" + path + "'", failed);
  }
}

RunLock::~RunLock() { ::close(fd_); }

}  // namespace gca
