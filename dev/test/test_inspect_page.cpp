// inspect --html: what the page holds, what a text may do to it, and the page in a browser.
#include <numeric>

#include "base/json.h"
#include "base/text.h"
#include "dataloader.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

constexpr const char* data_begins = "<script type=\"application/json\" id=\"data\">";

// Of inspect --html: what it printed, the file, and the data in it.
struct Page {
  Workshop::Result result;
  std::string html;
  Json data;
  JsonField field() const { return {data, "the page"}; }
  std::span<const Json> chunks() const { return field().at("chunks").items(); }
  JsonField chunk(size_t c) const { return field().at("chunks").at(c); }
};

// inspect of checkpoints that a shop has trained.
struct PageShop : Workshop {
  std::string text;
  PageShop() : text(path + "/some.txt") { REQUIRE(run(training("run", {{"steps", "30"}})).exit == 0); }
  std::string inspect(const std::string& name = "run") const {
    return "inspect --checkpoint " + path + "/" + name + " --text '" + text + "'";
  }
  Page page(const std::string& flags = "", const std::string& name = "run") const {
    const std::string file = path + "/page.html";
    Page page{run(inspect(name) + " --html " + file + " " + flags), "", nullptr};
    CAPTURE(page.result.out);
    REQUIRE(page.result.exit == 0);
    page.html = read_file(file, size_t{1} << 26);
    const size_t begin = page.html.find(data_begins) + std::string(data_begins).size();
    page.data = parse_json(page.html.substr(begin, page.html.find("</script>", begin) - begin), "the page");
    return page;
  }
  // A text of that many chunks of 8 slots, and one token.
  std::string sea(int64_t chunks) const {
    const std::string all = read_file(path + "/text.txt", size_t{1} << 24);
    return all.substr(100, static_cast<size_t>(chunks * 7 + 1));
  }
};

// What inspect prints of a page's chunks; whole texts.
std::string lines_of(const Page& page) {
  std::string lines;
  const auto words = [&](size_t c) {
    std::string all;
    for (const Json& token : page.chunk(c).at("t").items()) all += JsonField(token, "a token").string();
    return all;
  };
  for (size_t c = 0; c < page.chunks().size(); c++) {
    lines += str("chunk ", c, ": ", words(c), "\n");
    const JsonField groups = page.chunk(c).at("f");
    for (size_t g = 0; g < groups.items().size(); g++)
      for (size_t k = 0; k < groups.at(g).items().size(); k++) {
        const int64_t pick = groups.at(g).at(k).at(0).integer();
        lines += str("  group ", g, " fetches ", right(pick, 5), "  ", fixed(groups.at(g).at(k).at(1).number(), 3),
                     "  ", words(pick), "\n");
      }
  }
  return lines;
}

// The sum of a chunk's losses in a reading.
double sum_of(const Page& page, size_t c, size_t reading) {
  double sum = 0;
  for (const Json& loss : page.chunk(c).at("l").at(reading).items())
    if (!loss.is_null()) sum += JsonField(loss, "a loss").number();
  return sum;
}

std::string browser() {
  for (const char* name : {"chromium", "chromium-browser", "google-chrome"})
    if (system(("command -v " + std::string(name) + " > /dev/null").c_str()) == 0) return name;
  return "";
}

// What a browser makes of a page, and what it says meanwhile.
struct Rendered {
  int exit;
  std::string dom, errors;
};
Rendered render(const std::string& folder, const std::string& address) {
  const std::string command =
      "timeout 100 " + browser() +
      " --headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=3000 "
      "--user-data-dir=" +
      folder + "/profile --dump-dom '" + address + "' > " + folder + "/dom 2> " + folder + "/errors";
  const int status = system(command.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder + "/dom", size_t{1} << 26),
          read_file(folder + "/errors", size_t{1} << 26)};
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = 0; (at = text.find(part, at)) != text.npos; at += part.size()) n++;
  return n;
}

}  // namespace

TEST_CASE("inspect --html: its picks, weights and words are those that inspect prints, its losses those of eval") {
  const PageShop shop;
  const int64_t C = 40;
  write_file(shop.text, shop.sea(C));
  const Page page = shop.page();
  REQUIRE(std::ssize(page.chunks()) == C);
  const std::string printed = shop.run(shop.inspect() + " --columns 10000").out;
  CHECK(printed.substr(printed.find('\n') + 1) == lines_of(page));
  CHECK(says(page.result, "wrote " + shop.path + "/page.html"));
  // The same bits in segments.
  CHECK(shop.page("--batch-slots 24").html == page.html);

  // The losses of eval on these tokens as a shard.
  const Tokenizer tokenizer = Tokenizer::load("bytes");
  ShardWriter shard(shop.path + "/shards/same", tokenizer, 1 << 20);
  shard.append(tokenizer.encode(shop.sea(C)));
  ShardWriter::commit({&shard});
  size_t reading = 0;
  for (const char* picks : {"learned", "none"}) {
    const Workshop::Result eval = shop.run(str("eval --checkpoint ", shop.path, "/run --chunks ", C, " --picks ", picks,
                                               " --data '", shop.path, "/shards/same*'"));
    const std::string mean = fixed(page.field().at("loss").at(reading).number(), 4);
    CAPTURE(eval.out);
    CHECK(says(eval, "\nloss " + mean + " "));
    CHECK(says(page.result, mean));
    double sum = 0;
    for (int64_t c = 0; c < C; c++) sum += sum_of(page, c, reading);
    CHECK(sum / static_cast<double>(C * 7) ==
          doctest::Approx(page.field().at("loss").at(reading).number()).epsilon(1e-3));
    CHECK(page.field().at("picks").at(reading).string() == picks);
    reading++;
  }
  // It opens with the chunk whose slots gain most, which is said.
  std::vector<double> gains;
  for (int64_t c = 0; c < C; c++) gains.push_back(sum_of(page, c, 1) - sum_of(page, c, 0));
  const int64_t best = page.field().at("best").integer();
  CHECK(gains[best] >= *std::max_element(gains.begin(), gains.end()) - 7e-3);
  CHECK(says(page.result, str("chunk ", best, " gains most: ")));
  // No chunk serves the first two; the last token's slot has a target, as the text goes on.
  CHECK(gains[0] == 0);
  CHECK(gains[1] == 0);
  CHECK_FALSE(page.chunk(C - 1).at("l").at(0).items().back().is_null());
  write_file(shop.text, shop.sea(C).substr(0, static_cast<size_t>(C * 7)));
  CHECK(shop.page().chunk(C - 1).at("l").at(0).items().back().is_null());
  // Against other picks.
  CHECK(shop.page("--against random --seed 2").data != shop.page("--against random --seed 3").data);
  CHECK(shop.page("--picks newest --against random").field().at("picks").at(0).string() == "newest");

  REQUIRE(shop.run(shop.training("baseline", {{"steps", "1"}, {"groups", ""}})).exit == 0);
  const Page baseline = shop.page("", "baseline");
  CHECK(baseline.field().at("groups").integer() == 0);
  CHECK(baseline.chunk(3).at("f").items().empty());
  CHECK(baseline.chunk(3).at("l").items().size() == 1);
}

TEST_CASE("inspect --html: no text breaks the page") {
  PageShop shop;
  std::string text =
      "</script><script>document.title='broken'</script><!-- <script> \xE2\x80\xAE"
      "abc\xE2\x80\xAC ";
  text +=
      "\xD7\xA9\xD7\x9C\xD7\x95\xD7\x9D \xF0\x9F\x99\x82\xE6\x9D\xB1 \\n\n\t\r\xE2\x80\xA8 \xC2\x9B \xED\xA0\x80 "
      "\xF5\xFE\xC0 &lt; \"'`";
  for (int byte = 1; byte < 256; byte++) text += static_cast<char>(byte);
  text += shop.sea(3);
  shop.text = shop.path + "/<!--<script>.txt";
  write_file(shop.text, text);
  const Page page = shop.page();
  CHECK(count(page.html, "</script") == 2);
  CHECK(count(page.html, "<!--") == 0);
  for (size_t at = 0; at < page.html.size(); at += utf8_length(std::string_view(page.html).substr(at))) {
    REQUIRE(utf8_length(std::string_view(page.html).substr(at)) > 0);
    REQUIRE((static_cast<unsigned char>(page.html[at]) >= 0x20 || page.html[at] == '\n'));
  }
  std::string words;
  for (size_t c = 0; c < page.chunks().size(); c++)
    for (const Json& token : page.chunk(c).at("t").items()) words += JsonField(token, "a token").string();
  CHECK(words == printable(text, true).substr(0, words.size()));
  CHECK(words.size() > text.size() - 16);
}

TEST_CASE("inspect --html: what does not go together, or does not fit, is refused, and a page that was there stays") {
  const PageShop shop;
  REQUIRE(shop.run(shop.training("baseline", {{"steps", "1"}, {"groups", ""}})).exit == 0);
  write_file(shop.text, shop.sea(4));
  const std::string page = " --html " + shop.path + "/page.html";
  REQUIRE(shop.run(shop.inspect() + page).exit == 0);
  const std::string as_it_was = read_file(shop.path + "/page.html", size_t{1} << 26);
  shop.fails(shop.inspect() + " --against random", 2, "--against: expected --html");
  shop.fails(shop.inspect() + page + " --columns 20", 2, "--columns: expected no --html");
  shop.fails(shop.inspect() + page + " --picks none", 2, "--against none: expected other picks than --picks none");
  shop.fails(shop.inspect() + page + " --against learned", 2, "none|random|newest");
  shop.fails(shop.inspect("baseline") + page + " --against none", 2, "expected a model that retrieves");
  shop.fails(shop.inspect("baseline") + page + " --picks random", 2, "expected a model that retrieves");
  shop.fails(shop.inspect("baseline"), 1, "or its losses with --html FILE");
  shop.fails(shop.inspect() + " --html " + shop.path + "/none/page.html", 1, "No such file or directory");
  shop.fails(shop.inspect() + page + " --haystack x", 2, "found both: leave one out");
  shop.fails(shop.inspect() + page + " --chunks 9", 2, "--chunks: expected --haystack");
  shop.fails("inspect --checkpoint " + shop.path + "/run", 2, "found none: give one");
  shop.fails("inspect --checkpoint " + shop.path + "/run --haystack x", 2, "trained on needles (train --task)");
  write_file(shop.text, "abc");
  shop.fails(shop.inspect() + page, 1, "expected at least the 7 tokens of one chunk");
  write_file(shop.text, std::string(7 << 19, 'a') + "aaaaaaa");
  shop.fails(shop.inspect() + page, 1,
             "expected at most 4194304 slots for a page that a browser can open, found 4194312");
  CHECK(read_file(shop.path + "/page.html", size_t{1} << 26) == as_it_was);
  for (const std::string& name : list_folder(shop.path)) CHECK(name.find(".partial") == name.npos);
}

TEST_CASE("inspect --haystack: the row of a model that looks for needles, in lines and as a page") {
  const Workshop shop;
  const FlagMap needles = {
      {"chunk", "16"},       {"task", "recall"}, {"haystack", shop.path + "/text.txt"}, {"batch", "2"}, {"steps", "2"},
      {"value-tokens", "3"}, {"chunks", "8"},    {"out", shop.path + "/needles"}};
  REQUIRE(shop.run("train" + written(with(tiny_model, needles))).exit == 0);
  const std::string inspect = "inspect --checkpoint " + shop.path + "/needles --haystack " + shop.path + "/text.txt";
  const Workshop::Result row = shop.run(inspect);
  CHECK(says(row, "8 chunks of 16 slots"));
  CHECK(says(row, "<|KEY|>"));
  CHECK(says(row, "<|ASK|>"));
  CHECK(row.out != shop.run(inspect + " --seed 2").out);
  CHECK(says(shop.run(inspect + " --chunks 12"), "12 chunks of 16 slots"));
  shop.fails(inspect + " --chunks 2", 2, "--chunks: expected at least 3, for needle, question and answer, found 2");
  CHECK(shop.run(inspect + " --html " + shop.path + "/page.html").exit == 0);
}

TEST_CASE(
    "inspect --html in a browser: the chosen chunk shows its picks; nothing is complained of; thousands of chunks") {
  if (browser().empty()) return skip("no chromium (apt-get install chromium)");
  const PageShop shop;
  if (render(shop.path, "about:blank").exit != 0) return skip(browser() + " does not start here");
  const std::string address = "file://" + shop.path + "/page.html";
  const auto shown = [&](const std::string& choice) {
    const Rendered result = render(shop.path, address + choice);
    CAPTURE(result.errors);
    CHECK(result.exit == 0);
    CHECK(count(result.errors, "CONSOLE") == 0);
    return result.dom;
  };
  // As if it were said of chunk c what the chunk before it fetched.
  const auto shows = [&](const Page& page, const std::string& dom, size_t c) {
    CHECK(has(dom, str("aria-valuenow=\"", c, "\"")));
    CHECK(has(dom, str("id=\"c", c, "\" role=\"option\" aria-selected=\"true\"")));
    size_t picks = 0;
    const JsonField groups = page.chunk(c - 1).at("f");
    for (size_t g = 0; g < groups.items().size(); g++)
      for (size_t k = 0; k < groups.at(g).items().size(); k++, picks++) {
        const JsonField pick = groups.at(g).at(k);
        CHECK(has(dom, str("<li data-group=\"", g, "\" data-chunk=\"", pick.at(0).integer(), "\" data-weight=\"",
                           fixed(pick.at(1).number(), 3), "\">")));
      }
    CHECK(count(dom, "<li data-group=") == picks);
    CHECK(count(dom, "<path ") >= picks);
  };
  write_file(shop.text, "</script><script>document.title='broken'</script> " + shop.sea(20));
  const Page page = shop.page();
  const std::string dom = shown("#chunk=5");
  shows(page, dom, 5);
  CHECK(has(dom, "<title>What each chunk of some.txt fetched</title>"));
  CHECK(has(dom, "Chunk 5 "));
  CHECK(has(shown("#chunk=5&colour=loss"), "Tokens that are lost most on"));
  CHECK(has(shown("#chunk=nothing"), "Nothing: no chunk was whole before the row began."));
  shows(page, shown(""), page.field().at("best").integer());

  // Hands: keys in the text and on the map, buttons, the field, a place on the map; what is chosen after each.
  const std::string hands = R"(<script>
    const key = (id, key) => at(id).dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    const now = [];
    const then = () => now.push(at('map').getAttribute('aria-valuenow') + (at('row').getAttribute(
      'aria-activedescendant') === 'c' + chosen && at('said').textContent.startsWith('Chunk ' + chosen + ' ')));
    for (const [id, name] of [['row', 'ArrowDown'], ['map', 'ArrowLeft'], ['row', 'PageDown'], ['map', 'End'],
        ['row', 'ArrowRight'], ['row', 'Home'], ['map', 'ArrowUp']]) { key(id, name); then(); }
    at('after').click(); then();
    at('number').value = '7'; at('number').dispatchEvent(new Event('change')); then();
    const pick = document.querySelector('[data-chunk] button'), picked = pick.closest('li').dataset.chunk;
    pick.click(); then();
    document.title = now.join(' ') + ' ' + (document.activeElement === at('row')) + ' ' + picked;
    at('c9').lastChild.click();
    at('map').dispatchEvent(new PointerEvent('pointerdown',
      {clientX: at('map').getBoundingClientRect().left + at('map').clientWidth * 0.5, bubbles: true}));
    document.querySelector('[value=loss]').click();
    document.title += ' ' + chosen + ' ' + colour + ' ' + location.hash;
  </script>)";
  write_file(shop.path + "/hands.html", page.html + hands);
  const Rendered touched = render(shop.path, "file://" + shop.path + "/hands.html#chunk=5");
  CHECK(count(touched.errors, "CONSOLE") == 0);
  const int64_t C = std::ssize(page.chunks()), picked = page.chunk(6).at("f").at(0).at(0).at(0).integer();
  CHECK(has(touched.dom, str("<title>6true 5true 15true ", C - 1, "true ", C - 1, "true 0true 0true 1true 7true ",
                             picked, "true true ", picked, " ", C / 2, " loss #chunk=", C / 2, "&amp;colour=loss")));

  // Thousands of chunks: columns of the map stand for several, those out of sight are plain text.
  write_file(shop.text, shop.sea(5000));
  const Page longer = shop.page();
  const std::string many = shown("#chunk=4321");
  shows(longer, many, 4321);
  CHECK(count(many, "role=\"option\"") == 5000);
  CHECK(count(many, "<rect ") < 1000);
  CHECK(count(many, "<span title=") < 5000);

  REQUIRE(shop.run(shop.training("baseline", {{"steps", "1"}, {"groups", ""}})).exit == 0);
  write_file(shop.text, shop.sea(20));
  shop.page("", "baseline");
  CHECK(has(shown("#chunk=7"), "Chunk 7: a loss of "));
}
