// Reading stored sets from open files: nothing is mapped, so that memory stays what was asked for and
// a file that was cut off is an error instead of a signal.
#pragma once

#include <cstdint>

namespace shortlist {

// Rows of one width from a file. Where lengths are given, the rest of a row is zeroed.
struct RowRead {
  int64_t file;
  const int64_t* starts;   // [count], in bytes
  const int64_t* lengths;  // [count], at most the width; or null
  int64_t width;
  uint8_t* to;  // [count, width]
};

struct ReadFailure {
  int64_t row = -1;  // the first row that could not be read; -1 for none
  int error = 0;     // errno, or zero where the file ends too early
};

// Fills a buffer from an open file; false with errno, or with zero where the file ends too early.
bool read_at(int64_t file, int64_t offset, uint8_t* to, int64_t bytes, int& error);

// Reads the rows from..to - 1; neighbours in the file in one go.
ReadFailure read_rows(const RowRead& read, int64_t from, int64_t to);

}  // namespace shortlist
