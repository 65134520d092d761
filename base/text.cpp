// Text for people: what may be shown, which name was meant, sizes and times in words.
#include "base/text.h"

#include <algorithm>
#include <iterator>

#include "base/character_widths.h"

namespace gca {

size_t utf8_length(std::string_view text) {
  if (text.empty()) return 0;
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xC2 && lead < 0xE0   ? 2
                        : lead >= 0xE0 && lead < 0xF0 ? 3
                        : lead >= 0xF0 && lead < 0xF5 ? 4
                                                      : 0;
  if (length == 0 || text.size() < length) return 0;
  for (size_t i = 1; i < length; i++)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  if ((lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xED && byte(1) >= 0xA0)) return 0;
  if ((lead == 0xF0 && byte(1) < 0x90) || (lead == 0xF4 && byte(1) >= 0x90)) return 0;
  return length;
}

std::string WholeCharacters::take(std::string_view piece) {
  std::string text = std::exchange(held_, {}) + std::string(piece);
  // Up to three last bytes that begin a character: with continuation bytes behind them they may be one.
  for (size_t held = 1; held <= std::min<size_t>(3, text.size()); held++) {
    const std::string_view end = std::string_view(text).substr(text.size() - held);
    const auto lead = static_cast<unsigned char>(end[0]);
    if ((lead & 0xC0) == 0x80) continue;
    const size_t wanted = lead < 0xC2 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
    if (held < wanted) {
      held_ = end;
      text.resize(text.size() - held);
    }
    break;
  }
  return text;
}

std::string printable(std::string_view text, bool keep_lines) {
  std::string out;
  while (!text.empty()) {
    const unsigned char c = static_cast<unsigned char>(text[0]);
    const size_t length = utf8_length(text);
    const bool c1 = length == 2 && c == 0xC2 && static_cast<unsigned char>(text[1]) < 0xA0;  // control characters too
    if (keep_lines && (c == '\n' || c == '\t')) out += text[0];
    else if (c == '\n' || c == '\t' || c == '\r') out += c == '\n' ? "\\n" : c == '\t' ? "\\t" : "\\r";
    else if (length == 0 || c < 0x20 || c == 0x7F) out += str("\\x", hex(c, 2));
    else if (c1) out += str("\\xc2\\x", hex(static_cast<unsigned char>(text[1]), 2));
    else out += text.substr(0, length);
    text.remove_prefix(length ? length : 1);
  }
  return out;
}

size_t before_parted_character(std::string_view text, size_t at) {
  for (size_t back = 1; back <= std::min<size_t>(3, at); back++)
    if (utf8_length(text.substr(at - back)) > back) return at - back;
  return at;
}

namespace {

// Of the character, of that many bytes, that valid UTF-8 begins with.
size_t columns_of_first(std::string_view text, size_t length) {
  if (length == 1) return 1;
  uint32_t code = static_cast<unsigned char>(text[0]) & (0x7Fu >> length);
  for (size_t i = 1; i < length; i++) code = code << 6 | (static_cast<unsigned char>(text[i]) & 0x3F);
  const auto after = std::upper_bound(std::begin(character_widths), std::end(character_widths), code,
                                      [](uint32_t c, const CharacterWidth& range) { return c < range.first; });
  if (after == std::begin(character_widths) || code > (after - 1)->last) return 1;
  return (after - 1)->columns;
}

}  // namespace

std::string first_columns(std::string_view text, size_t count) {
  size_t at = 0;
  for (size_t taken = 0; at < text.size();) {
    const size_t length = std::max<size_t>(1, utf8_length(text.substr(at)));
    taken += columns_of_first(text.substr(at), length);
    if (taken > count) break;
    at += length;
  }
  return std::string(text.substr(0, at));
}

size_t columns(std::string_view text) {
  size_t count = 0;
  for (size_t at = 0, length; at < text.size(); at += length) {
    length = std::max<size_t>(1, utf8_length(text.substr(at)));
    count += columns_of_first(text.substr(at), length);
  }
  return count;
}

std::string padded(std::string_view text, size_t count) {
  const size_t taken = columns(text);
  return std::string(text) + std::string(taken < count ? count - taken : 0, ' ');
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); j++) row[j] = j;
  for (size_t i = 1; i <= a.size(); i++) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); j++) {
      const size_t change = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

std::string did_you_mean(const std::string& found, const std::vector<std::string>& names) {
  const auto nearest = std::min_element(names.begin(), names.end(), [&](const auto& a, const auto& b) {
    return edit_distance(found, a) < edit_distance(found, b);
  });
  return nearest != names.end() && edit_distance(found, *nearest) <= std::max<size_t>(2, found.size() / 3)
             ? ", did you mean " + *nearest + "?"
             : "";
}

constexpr std::string_view base64_digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

std::string base64(std::string_view bytes) {
  std::string text;
  for (size_t at = 0; at < bytes.size(); at += 3) {
    const size_t count = std::min<size_t>(3, bytes.size() - at);
    uint32_t bits = 0;
    for (size_t i = 0; i < 3; i++) bits = bits << 8 | (i < count ? static_cast<unsigned char>(bytes[at + i]) : 0u);
    for (size_t i = 0; i < 4; i++) text += i <= count ? base64_digits[bits >> (18 - 6 * i) & 63] : '=';
  }
  return text;
}

std::string from_base64(std::string_view text, const std::string& what) {
  const size_t padding = text.ends_with("==") ? 2 : text.ends_with("=") ? 1 : 0;
  std::string bytes;
  bool good = text.size() % 4 == 0;
  for (size_t at = 0; good && at < text.size(); at += 4) {
    const size_t count = at + 4 == text.size() ? 3 - padding : 3;
    uint32_t bits = 0;
    for (size_t i = 0; i < 4; i++) {
      const size_t digit = i <= count ? base64_digits.find(text[at + i]) : 0;
      good = good && digit != base64_digits.npos;
      bits = bits << 6 | static_cast<uint32_t>(digit & 63);
    }
    for (size_t i = 0; i < count; i++) bytes += static_cast<char>(bits >> (16 - 8 * i) & 255);
  }
  if (!good) throw Error(what + ": expected bytes in base64, found something else; the file is damaged: make it anew");
  return bytes;
}

std::string comma_list(const std::vector<int64_t>& numbers) {
  std::string text;
  for (const int64_t n : numbers) {
    if (!text.empty()) text += ',';
    text += std::to_string(n);
  }
  return text;
}

std::string mebibytes(int64_t n_bytes) { return str(fixed(static_cast<double>(n_bytes) / (1 << 20), 1), " MiB"); }

std::string duration(double seconds) {
  const int64_t s = static_cast<int64_t>(seconds + 0.5);
  return s < 3600 ? str(s / 60, ":", right(s % 60, 2, '0')) : str(s / 3600, "h", right(s / 60 % 60, 2, '0'));
}

}  // namespace gca
