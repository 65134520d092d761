// The page of inspect --html: its data, between the page's own text before and after it.
#include "commands/inspect_page.h"

#include <cmath>

#include "base/files.h"
#include "base/json.h"
#include "base/text.h"
#include "commands/inspect_page_text.h"

namespace gca {
namespace {

// Over these a browser has no string that holds the data.
constexpr int64_t most_slots = int64_t{1} << 22;

// JSON that cannot end the element of a page that it stands in.
std::string json_in_page(const std::string& dumped) {
  std::string out;
  for (const char c : dumped) {
    if (c == '<') out += "\\u003c";
    else out += c;
  }
  return out;
}

std::string number(double x) { return std::isfinite(x) ? fixed(x, 3) : "null"; }

// [first, ...]: item(i) for i < n.
template <class Item>
std::string list(int64_t n, Item item) {
  std::string out = "[";
  for (int64_t i = 0; i < n; i++) out += (i ? "," : "") + item(i);
  return out + "]";
}

// t: what each token says, a character that lies in several where it ends; l: its slot's loss, a reading; f: what the
// chunk fetched, a group, as [chunk, weight]. A loss that is no number, or of no target, is null.
std::string chunk_line(const InspectedRow& row, const std::vector<InspectedReading>& readings, int64_t c,
                       const Tokenizer& tokenizer, WholeCharacters& characters) {
  const int64_t first = c * row.S, tokens = row.S - 1;
  const auto text = [&](int64_t j) {
    const std::string whole = characters.take(tokenizer.decode(std::span(row.slots).subspan(first + j, 1)));
    return json_in_page(Json(printable(whole, true)).dump());
  };
  const auto losses = [&](int64_t r) {
    return list(tokens, [&](int64_t j) {
      return row.targets[first + j] < 0 ? "null" : number(static_cast<double>(readings[r].loss[first + j]));
    });
  };
  const auto fetched = [&](int64_t g) {
    std::vector<std::string> picks;
    for (int64_t i = c * readings[0].K; i < (c + 1) * readings[0].K; i++)
      if (const auto& [pick, weight] = readings[0].fetched[g][i]; pick >= 0)
        picks.push_back(str("[", pick, ",", number(static_cast<double>(weight)), "]"));
    return list(std::ssize(picks), [&](int64_t k) { return picks[k]; });
  };
  return "{\"t\":" + list(tokens, text) + ",\"l\":" + list(std::ssize(readings), losses) +
         ",\"f\":" + list(std::ssize(readings[0].fetched), fetched) + "}";
}

}  // namespace

InspectedLosses losses_of(const InspectedRow& row, const std::vector<InspectedReading>& readings) {
  InspectedLosses result;
  int64_t targets = 0;
  result.mean.resize(readings.size());
  for (int64_t c = 0; c < row.chunks; c++) {
    double sum = 0;
    for (int64_t slot = c * row.S; slot < (c + 1) * row.S; slot++) {
      if (row.targets[slot] < 0) continue;
      targets++;
      for (size_t r = 0; r < readings.size(); r++) result.mean[r] += static_cast<double>(readings[r].loss[slot]);
      const double loss = static_cast<double>(readings[0].loss[slot]);
      sum += readings.size() > 1 ? static_cast<double>(readings[1].loss[slot]) - loss : loss;
    }
    if (c && !(sum > result.of_best)) continue;
    result.best = c;
    result.of_best = sum;
  }
  for (double& mean : result.mean) mean /= static_cast<double>(targets);
  return result;
}

void check_fits_page(const InspectedRow& row) {
  if (row.T() > most_slots)
    throw Error(str(row.name, ": expected at most ", most_slots, " slots for a page that a browser can open, found ",
                    row.T(), "; give a shorter text or fewer --chunks, or leave --html out"));
}

void check_can_save_page(const std::string& path) {
  check_can_replace(path, std::string_view(inspect_page_before).substr(0, 256), "a page of inspect --html");
}

void save_inspect_page(const std::string& path, const InspectedRow& row, const std::vector<InspectedReading>& readings,
                       const InspectedLosses& losses, const std::string& checkpoint, const Tokenizer& tokenizer) {
  Json head = Json::object();
  head["text"] = row.name;
  head["checkpoint"] = checkpoint;
  head["slots"] = row.S;
  head["groups"] = readings[0].fetched.size();
  for (const InspectedReading& reading : readings) head["picks"].push_back(reading.picks);
  head["loss"] = losses.mean;
  head["best"] = losses.best;
  std::string begin = json_in_page(head.dump());
  begin.back() = ',';  // in place of the brace
  AtomicFile file(path);
  const auto write = [&](std::string_view text) { file.write(text.data(), text.size()); };
  write(inspect_page_before);
  write(begin + "\"chunks\":[\n");
  WholeCharacters characters;
  for (int64_t c = 0; c < row.chunks; c++)
    write(chunk_line(row, readings, c, tokenizer, characters) + (c + 1 < row.chunks ? ",\n" : "\n"));
  write("]}");
  write(inspect_page_after);
  file.commit();
}

}  // namespace gca
