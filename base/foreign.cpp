// The table of beginnings.
#include "base/foreign.h"

#include <algorithm>
#include <string>

namespace gca {
namespace {

struct Beginning {
  std::string_view bytes;
  ForeignKind kind;
};

using namespace std::string_view_literals;  // some hold zero bytes

// The longer before the shorter.
constexpr Beginning beginnings[] = {
    {"version https://git-lfs.github.com/"sv, {"a Git LFS pointer", "fetch the file itself with git lfs pull", false}},
    {"\x1f\x8b"sv, {"compressed with gzip", "unpack it with gunzip", false}},
    {"\xfd\x37zXZ\0"sv, {"compressed with xz", "unpack it with unxz", false}},
    {"\x28\xb5\x2f\xfd"sv, {"compressed with zstd", "unpack it with unzstd", false}},
    {"\x04\x22\x4d\x18"sv, {"compressed with lz4", "unpack it with unlz4", false}},
    {"7z\xbc\xaf\x27\x1c"sv, {"a 7z archive", "unpack it with 7z x", false}},
    {"PK\3\4"sv, {"a zip archive, as PyTorch's checkpoints are", "unzip it, or save it as safetensors", false}},
    {"\x80\x02\x8a\x0al\xfc\x9c"sv, {"an old checkpoint of PyTorch", "save it as safetensors", false}},
    {"\xff\xfe\0\0"sv, {"UTF-32", "convert it with iconv -f UTF-32 -t UTF-8", false}},
    {"\0\0\xfe\xff"sv, {"UTF-32", "convert it with iconv -f UTF-32 -t UTF-8", false}},
    {"\xff\xfe"sv, {"UTF-16", "convert it with iconv -f UTF-16 -t UTF-8", false}},
    {"\xfe\xff"sv, {"UTF-16", "convert it with iconv -f UTF-16 -t UTF-8", false}},
    {"%PDF-"sv, {"a PDF", "take its text out with pdftotext", false}},
    {"\x93NUMPY"sv, {"an array of NumPy", "save it as what is wanted here", false}},
    {"GGUF"sv, {"a GGUF file", "take the safetensors that it was made from", true}},
    {"<!DOCTYPE html"sv, {"a web page", "fetch the file itself, not the page that shows it", true}},
    {"<!doctype html"sv, {"a web page", "fetch the file itself, not the page that shows it", true}},
    {"<html"sv, {"a web page", "fetch the file itself, not the page that shows it", true}},
};

}  // namespace

const ForeignKind* foreign_kind(std::string_view content) {
  for (const Beginning& beginning : beginnings)
    if (content.starts_with(beginning.bytes)) return &beginning.kind;
  static constexpr ForeignKind bzip2 = {"compressed with bzip2", "unpack it with bunzip2", false};
  return content.starts_with("BZh") && content.substr(std::min<size_t>(4, content.size())).starts_with("1AY&SY")
             ? &bzip2
             : nullptr;
}

std::string foreign_remark(std::string_view content, const std::string& otherwise) {
  const ForeignKind* kind = foreign_kind(content);
  return kind ? std::string("; it is ") + kind->what + ": " + kind->mend : otherwise;
}

}  // namespace gca
