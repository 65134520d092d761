// Files of other programs, known by how they begin: so that a message can name what somebody has, and the way out.
#pragma once
#include <string>
#include <string_view>

namespace gca {

struct ForeignKind {
  const char *what, *mend;  // "compressed with gzip", "unpack it with gunzip"
  bool may_be_text;         // a text file may begin like that too
};

// nullptr: nothing that is known here.
const ForeignKind* foreign_kind(std::string_view content);

// "; it is compressed with gzip: unpack it with gunzip", the end of a message about content that was not what was
// expected; `otherwise` where nothing is known.
std::string foreign_remark(std::string_view content, const std::string& otherwise);

}  // namespace gca
