// GPT-2's own encodings of texts in which every branch of its pattern and every class of characters occurs: its words,
// their tokens, and of its 50,000 merges, in their order, those whose token is a part of one of these words. No other
// can apply, so these merges give what GPT-2 gives. The words are those that the documented pattern says, by the
// general categories of Unicode.
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
#pragma once
#include <string>
#include <vector>

namespace gca::test {

// clang-format off
// A token of two parts: left~right|
inline constexpr char gpt2_merges[] =
    " ~t| ~a|h~e|i~n|r~e|o~n| t~he|e~r|a~t| ~w| ~o|e~n| ~c|i~t|i~s|o~r| ~b| ~f|o~u| ~d|i~c|l~e| t~h|l~l| ~n| ~l|"
    "s~t| ~re|v~e|r~o| ~T| ~I|e~t|a~m|o~w|s~e| ~y|v~er|u~r|l~d|'~s| ~it| y~ou|i~l| ~1| w~e| ~(|i~ll| ~D|i~f| ~r|"
    " T~he|u~m| d~e|a~b| ~N|t~h|e~l|q~u|n~t|-~-|\xE2~\x80|T~he| d~o|'~t| ~j| w~or|o~k| the~y|p~l|u~e|o~g| ~-|"
    " T~h|r~y|ow~n|in~t|ic~k| o~ver| ~qu|\n~\n|--~--| ~0|o~ve|w~n|c~k|e~ll|am~p|ur~n| ~'|o~v|w~e|se~l|at~h| ~=|"
    "ro~w|T~h|'~re| de~f|he~n| d~on|=~=|p~s| b~r|e~f|t~t|um~p|sel~f|----~----| wor~ld|/~/| re~t|a~z|'~ve|1~2|e~x|"
    "'~m| 1~2|o~x|p~le|t~he|*~*|'~ll|re~t|2~0| c~a| ~<| ~i|O~N| ~+|:~//| b~ro| ~{|amp~le|==~==| ret~urn|H~e|'~d|"
    " ~\xC2| ~*|f~or|l~f|b~r|or~ld| ~}|\xE3~\x82|\xC2~\xA0|a~i|a~f|er~y|2~3|ro~wn| qu~ick|4~5| ~\xE2|or~g|**~**|"
    "o~ver|\xE3~\x81|)~:|n~a|\xC3~\xA9|3~4|h~tt|d~e|e~y|L~L|6~7|m~p| do~g|7~8|E~L|5~6|htt~p|qu~e|d~ef|h~t| j~ump|"
    "****~****|d~o| b~row|+~+|l~a|\xE3~\x80|l~o|htt~ps|y~ou|U~L|--~-|f~o| =~=|c~a|w~orld|p~ath|b~a|el~f|a~a|z~y|"
    " j~u| bro~wn|ret~urn|b~ro|p~at|um~ps|**~*|y~o| D~O|\xF0~\x9F| l~a|p~a|u~i|d~on|\xE2\x80~\x8B|d~og|the~y|"
    "U~LL|12~3|\xE4~\xB8|'~:| ~q|qu~er|ell~o| f~o|az~y|H~el|f~ox| o~k|\xD8~\xA7|H~E|:~/|j~u|t~urn|H~ello|ab~a|"
    "u~er| N~ULL| +~=| l~azy| 12~3| j~umps|D~O|==~=|ll~o|\xE4~\xBD| o~v| ca~f| +~+|t~i|he~y|ex~ample|w~o| f~ox|"
    "L~O|\xE3\x82~\x93|qu~ery|----~--|\xC2~\xBD|E~LL| D~ON|qu~ick|st~ill|\xE0~\xA5|23~4| w~o|aa~aa|\xE5~\xA5|"
    "b~row|\xD9~\x85|----~---|\xD8~\xB1| y~o|3~45|x~a|t~u|H~ell|\xE3\x81~\xAB|45~6|tt~p|67~8|----~-|\xC2~\xB2|"
    " o~ve|\xE3\x81~\xAF|b~rown|N~ULL|t~p|****~*|r~n|--------~--|t~ur| l~az|n~ai|\xD8~\xA8| caf~\xC3\xA9|D~ON|"
    "r~g|\xF0\x9F~\x91|j~ump|\x81~\xAB|--------~-| qu~i|r~l|\xE7~\x95|\xE3\x81~\x93|aa~a|t~il|\xF0\x9F~\x98|+~=|"
    "t~is";

// A text: words parted by |, the tokens of a word by ~.
inline constexpr const char* gpt2_texts[] = {
    "",
    " ",
    "a",
    "Hello| world",
    "Hello|,| world|!",
    "a| | b",
    "a| ~ | b",
    "a|\n| b",
    "a| b| ~ ",
    "'t|hen| '|tis| '|still",
    "HE~LL~O|'|S| DON|'|T| don|'t| we|'ll| I|'d| they|'ve| you|'re| I|'m| it|'s",
    "x|\xC2\xA0|\xC2\xA0|y",
    " |\xC2~\x85|b",
    "\xC2\xBD| \xC2~\xB2",
    "nai|\xCC~\x88|ve| caf\xC3\xA9",
    "123~45~678| 1|,|234|.|56",
    " |\t|x",
    "\r~\n~\r|\n|x",
    "don|\xE2\x80~\x99|t",
    "\xE4\xBD~\xA0~\xE5\xA5~\xBD|\xEF~\xBC~\x8C|\xE4\xB8~\x96~\xE7\x95~\x8C",
    "\xE3\x81\x93~\xE3\x82\x93~\xE3\x81\xAB~\xE3\x81~\xA1~\xE3\x81\xAF",
    "\xD9\x85~\xD8\xB1~\xD8~\xAD~\xD8\xA8~\xD8\xA7| 123",
    "\xF0\x9F\x98~\x80~\xF0\x9F\x91~\xA8~\xE2\x80~\x8D~\xF0\x9F\x91~\xA9~\xE2\x80~\x8D~\xF0\x9F\x91~\xA7| ok",
    "for| (|int| i| =| 0|;| i| <| n|;| ++|i|)| {| a|[|i|]| +=| b|[|i|]| *| 0|.|5|f|;| }",
    "\t|\t|if| (|x| ==| NULL|)|\n~\t~\t|\t|return| -|1|;|\n",
    " ~ ~ | def| f|(|self|):|\n~ ~ ~ ~ ~ ~ ~ | return| {~'|a|':| 1|}|\n\n~\n",
    "https|://|example|.|org|/|path|?|query|=|1|&|x|=~%|20",
    "----------~====~********",
    "\xE2\x80~\xA8|\xE2\x80~\xA9|x",
    "\xE1~\x9A~\x80|y|\xE3\x80~\x80|z",
    "\xE0\xA5~\xA7~\xE0\xA5~\xA8~\xE0\xA5~\xA9| \xE2~\x85~\xA7",
    "e|\xCC~\x81~\xCC~\x81~\xCC~\x81",
    "A|\xE2\x80\x8B|B|\xEF~\xBB~\xBF|C",
};
// clang-format on

inline std::string repeated(int times, const std::string& part) {
  std::string text;
  for (int i = 0; i < times; i++) text += part;
  return text;
}
// The same with texts that repeat themselves.
inline std::vector<std::string> all_gpt2_texts() {
  std::vector<std::string> all(std::begin(gpt2_texts), std::end(gpt2_texts));
  all.push_back(repeated(249, "aaaa~") + "aaaa");
  all.push_back(repeated(256, " ~") + " ");
  all.push_back(repeated(16, "\n\n~") + "\n");
  all.push_back(repeated(299, "ab~") + "ab");
  const std::string sentence = "The| quick| brown| fox| jumps| over| the| lazy| dog|.| ";
  all.push_back(repeated(20, sentence));
  return all;
}

}  // namespace gca::test
