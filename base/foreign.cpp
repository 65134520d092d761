// The tables of beginnings and of fields.
#include "base/foreign.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <string>

#include "base/text.h"

namespace gca {
namespace {

struct Beginning {
  std::string_view bytes;
  ForeignKind kind;
};

using namespace std::string_view_literals;  // some hold zero bytes

constexpr const char *other_page = "fetch the file itself, not the page that shows it",
                     *save_weights_so = "save its weights as safetensors",
                     *no_such_file = "look at the address that it was fetched from, and fetch it again",
                     *gpt2_or_own = "take GPT-2's tokenizer.json, or learn one with tokenizer-train";

// The longer before the shorter.
constexpr Beginning beginnings[] = {
    {"version https://git-lfs.github.com/"sv, {"a Git LFS pointer", "fetch the file itself with git lfs pull", false}},
    {"/annex/objects/"sv, {"a pointer of git-annex", "fetch the file itself with git annex get", false}},
    {"outs:\n- md5:"sv, {"a pointer of DVC", "fetch the file itself with dvc pull", false}},
    {"\x1f\x8b"sv, {"compressed with gzip", "unpack it with gunzip", false}},
    {"\xfd\x37zXZ\0"sv, {"compressed with xz", "unpack it with unxz", false}},
    {"\x28\xb5\x2f\xfd"sv, {"compressed with zstd", "unpack it with unzstd", false}},
    {"\x04\x22\x4d\x18"sv, {"compressed with lz4", "unpack it with unlz4", false}},
    {"7z\xbc\xaf\x27\x1c"sv, {"a 7z archive", "unpack it with 7z x", false}},
    {"PK\3\4"sv, {"a zip archive, as PyTorch's checkpoints are", "unzip it, or save it as safetensors", false}},
    {"\x80\x02\x8a\x0al\xfc\x9c"sv, {"an old checkpoint of PyTorch", save_weights_so, false}},
    {"\x80\x02}"sv, {"a Python pickle, as PyTorch's checkpoints are", save_weights_so, false}},
    {"\x80\x02\x63"sv, {"a Python pickle, as PyTorch's checkpoints are", save_weights_so, false}},
    {"\x80\x03}"sv, {"a Python pickle, as PyTorch's checkpoints are", save_weights_so, false}},
    {"\x80\x04\x95"sv, {"a Python pickle, as PyTorch's checkpoints are", save_weights_so, false}},
    {"\x80\x05\x95"sv, {"a Python pickle, as PyTorch's checkpoints are", save_weights_so, false}},
    {"\x89HDF\r\n\x1a\n"sv, {"an HDF5 file, as Keras's weights are", save_weights_so, false}},
    {"\xff\xfe\0\0"sv, {"UTF-32", "convert it with iconv -f UTF-32 -t UTF-8", false}},
    {"\0\0\xfe\xff"sv, {"UTF-32", "convert it with iconv -f UTF-32 -t UTF-8", false}},
    {"\xff\xfe"sv, {"UTF-16", "convert it with iconv -f UTF-16 -t UTF-8", false}},
    {"\xfe\xff"sv, {"UTF-16", "convert it with iconv -f UTF-16 -t UTF-8", false}},
    {"%PDF-"sv, {"a PDF", "take its text out with pdftotext", false}},
    {"\x93NUMPY"sv, {"an array of NumPy", "save it as what is wanted here", false}},
    {"PAR1"sv, {"a Parquet table", "take its text out into text files (pandas.read_parquet reads it)", true}},
    {"ARROW1\0\0"sv, {"an Arrow table", "take its text out into text files (pyarrow reads it)", false}},
    {"MMIDIDX\0\0"sv, {"the index of a Megatron dataset", "tokenize the text that it was made from", false}},
    {"GGUF"sv, {"a GGUF file", "take the safetensors that it was made from", true}},
    {"\xc6\xd7\x34\x01"sv, {"a model of llm.c", save_weights_so, false}},
    {"\xc7\xd7\x34\x01"sv, {"a state of llm.c", save_weights_so, false}},
    {"\xc8\xd7\x34\x01"sv, {"a tokenizer of llm.c", gpt2_or_own, false}},
    {"\n\x0e\n\x05<unk>"sv, {"a SentencePiece model", gpt2_or_own, false}},
    {"IQ== 0\n"sv, {"a vocabulary of tiktoken", gpt2_or_own, true}},
    {"#version: 0."sv,
     {"GPT-2's merges.txt", "give the folder that has vocab.json beside it to --tokenizer, or tokenizer.json", true}},
    {"\x88\xd8\x34\x01\1\0\0\0"sv, {"a token shard", "give it to --data", false}},
    {"\xa1\xd9\x34\x01\7\0\0\0"sv, {"a token shard", "give it to --data", false}},
    {"gca-bpe\n"sv, {"a tokenizer of this program", "give it to --tokenizer", false}},
    {"Entry not found"sv, {"a server's word that it has no such file", no_such_file, true}},
    {"Repository not found"sv, {"a server's word that it has no such file", no_such_file, true}},
    {"404: Not Found"sv, {"a server's word that it has no such file", no_such_file, true}},
    {"Invalid username or password"sv, {"a server's word that you may not have the file", no_such_file, true}},
    {"Access to model"sv, {"a server's word that you may not have the file", no_such_file, true}},
};

// In lower case, white space before them left out.
constexpr Beginning pages[] = {
    {"<!doctype html"sv, {"a web page", other_page, true}},
    {"<html"sv, {"a web page", other_page, true}},
    {"<?xml"sv, {"XML, as a server's error may be", other_page, true}},
};

// A JSON file that has such a field near its beginning.
constexpr Beginning fields[] = {
    {"\"weight_map\""sv,
     {"the index of weights that are split into several files", "give it, or its folder, to train --init", true}},
    {"\"architectures\""sv,
     {"a model's config.json", "give the weights, model.safetensors, or the folder to train --init", true}},
    {"\"model_type\""sv,
     {"a model's config.json", "give the weights, model.safetensors, or the folder to train --init", true}},
    {"\"tokenizer_class\""sv, {"a tokenizer_config.json", "give tokenizer.json, or the folder", true}},
    {"\"added_tokens\""sv, {"a tokenizer.json", "give it to --tokenizer", true}},
    {"\"!\":0"sv,
     {"GPT-2's vocab.json", "give the folder that has merges.txt beside it to --tokenizer, or tokenizer.json", true}},
    {"\"!\": 0"sv,
     {"GPT-2's vocab.json", "give the folder that has merges.txt beside it to --tokenizer, or tokenizer.json", true}},
};

bool is_safetensors(std::string_view content) {
  uint64_t header_bytes = 0;
  if (content.size() < 10 || content[8] != '{') return false;
  memcpy(&header_bytes, content.data(), sizeof header_bytes);
  return header_bytes < uint64_t{1} << 32;
}

}  // namespace

const ForeignKind* foreign_kind(std::string_view content) {
  for (const Beginning& beginning : beginnings)
    if (content.starts_with(beginning.bytes)) return &beginning.kind;
  static constexpr ForeignKind bzip2 = {"compressed with bzip2", "unpack it with bunzip2", false},
                               tar = {"a tar archive", "unpack it with tar -xf", false},
                               safetensors = {"a safetensors file", "give it where weights are asked for", false};
  if (content.starts_with("BZh") && content.substr(std::min<size_t>(4, content.size())).starts_with("1AY&SY"))
    return &bzip2;
  if (content.size() >= 262 && content.substr(257, 5) == "ustar") return &tar;
  if (is_safetensors(content)) return &safetensors;
  if (content.starts_with(byte_order_mark)) content.remove_prefix(byte_order_mark.size());
  content.remove_prefix(std::min(content.find_first_not_of(" \t\r\n"), content.size()));
  std::string start(content.substr(0, 16));
  std::transform(start.begin(), start.end(), start.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  for (const Beginning& page : pages)
    if (start.starts_with(page.bytes)) return &page.kind;
  if (!content.starts_with('{')) return nullptr;
  for (const Beginning& field : fields)
    if (content.substr(0, foreign_head_bytes).find(field.bytes) != content.npos) return &field.kind;
  return nullptr;
}

std::string foreign_remark(std::string_view content, const std::string& otherwise) {
  if (content.empty()) return "; it is empty: make it anew or fetch it again";
  const ForeignKind* kind = foreign_kind(content);
  return kind ? std::string("; it is ") + kind->what + ": " + kind->mend : otherwise;
}

bool looks_like_text(std::string_view content) {
  while (!content.empty()) {
    const size_t length = utf8_length(content);
    if (length == 0 && content.size() >= 4) return false;  // a shorter rest may be a character that was cut
    const auto c = static_cast<unsigned char>(content[0]);
    if (c == 0x7F || (c < 0x20 && !std::isspace(c))) return false;
    content.remove_prefix(std::max<size_t>(1, length));
  }
  return true;
}

}  // namespace gca
