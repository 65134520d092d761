// Files of other programs, and this one's where another kind is wanted, known by how they begin: so that a message can
// name what somebody has, and the way out.
#pragma once
#include <string>
#include <string_view>

namespace gca {

struct ForeignKind {
  const char *what, *mend;  // "compressed with gzip", "unpack it with gunzip"
  bool may_be_text;         // a text file may begin like that too
};

// A byte order mark, which some editors put before UTF-8.
constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";

constexpr size_t foreign_head_bytes = 8192;  // of a file are enough for what follows

// content: a file's, or its first foreign_head_bytes. nullptr: nothing that is known here.
const ForeignKind* foreign_kind(std::string_view content);

// "; it is compressed with gzip: unpack it with gunzip", the end of a message about content that was not what was
// expected; `otherwise` where nothing is known.
std::string foreign_remark(std::string_view content, const std::string& otherwise);

// Whether the beginning of a file is UTF-8 without control characters but white space.
bool looks_like_text(std::string_view content);

}  // namespace gca
