// The only system calls of the module. See files.hpp.
#include "files.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#ifdef _WIN32
#include <io.h>
#include <windows.h>
#else
#include <unistd.h>
#endif

namespace shortlist {

namespace {

constexpr int64_t kMostAtOnce = int64_t{1} << 30;  // systems read at most 2 GiB in one call

// Bytes read, zero at the end of the file, or -1 with errno.
int64_t read_some(int64_t file, int64_t offset, uint8_t* to, int64_t bytes) {
#ifdef _WIN32
  OVERLAPPED place{};
  place.Offset = DWORD(offset);
  place.OffsetHigh = DWORD(offset >> 32);
  DWORD done = 0;
  if (ReadFile(reinterpret_cast<HANDLE>(_get_osfhandle(int(file))), to, DWORD(bytes), &done, &place)) return done;
  if (GetLastError() == ERROR_HANDLE_EOF) return 0;
  errno = EIO;
  return -1;
#else
  return pread(int(file), to, size_t(bytes), off_t(offset));
#endif
}

}  // namespace

bool read_at(int64_t file, int64_t offset, uint8_t* to, int64_t bytes, int& error) {
  error = 0;
  while (bytes > 0) {
    const int64_t done = read_some(file, offset, to, std::min(bytes, kMostAtOnce));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      error = done < 0 ? errno : 0;
      return false;
    }
    offset += done;
    to += done;
    bytes -= done;
  }
  return true;
}

ReadFailure read_rows(const RowRead& read, int64_t from, int64_t to) {
  const auto length = [&read](int64_t row) { return read.lengths ? read.lengths[row] : read.width; };
  int error = 0;
  while (from < to) {
    int64_t next = from + 1;
    while (next < to && length(next - 1) == read.width && read.starts[next] == read.starts[next - 1] + read.width)
      next++;
    const int64_t last = length(next - 1), bytes = (next - 1 - from) * read.width + last;
    uint8_t* const start = read.to + from * read.width;
    if (!read_at(read.file, read.starts[from], start, bytes, error)) {
      // Which row it was is told by reading one after another.
      if (next == from + 1) return {from, error};
      next = from + 1;
      if (!read_at(read.file, read.starts[from], start, read.width, error)) return {from, error};
    }
    std::memset(read.to + (next - 1) * read.width + length(next - 1), 0, size_t(read.width - length(next - 1)));
    from = next;
  }
  return {};
}

}  // namespace shortlist
