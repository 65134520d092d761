// Command lines: how each kind of flag is read, the help, and what a checkpoint remembers.
#include "base/flags.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <functional>

#include "base/json.h"
#include "base/text.h"

namespace gca {

namespace {

UsageError wrong(const char* name, const std::string& expected, const std::string& found) {
  return UsageError(str("--", name, ": expected ", expected, ", found '", found, "'"));
}

int64_t size(const char* name, const std::string& text, int64_t low, int64_t high) {
  const std::string expected = str("a whole number from ", low, " to ", high, " (K, M, G stand for 2^10, 2^20, 2^30)");
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  int64_t unit = 1;
  if (end + 1 == text.data() + text.size()) {
    const char letter = static_cast<char>(std::toupper(*end));
    unit = letter == 'K' ? int64_t{1} << 10 : letter == 'M' ? int64_t{1} << 20 : letter == 'G' ? int64_t{1} << 30 : 0;
  } else if (end != text.data() + text.size()) {
    unit = 0;
  }
  if (error != std::errc() || !unit || __builtin_mul_overflow(value, unit, &value) || value < low || value > high)
    throw wrong(name, expected, text);
  return value;
}

std::string on_or_off(bool value) { return value ? "on" : "off"; }

}  // namespace

struct Flags::Flag {
  const char *name, *value, *help;
  Role role;
  std::function<std::string()> get;
  std::function<void(const std::string&)> set;
  std::string initial = "";
  const char* heading = "";
  bool given = false;
};

Flags::Flags(std::string command, std::string summary) : command_(std::move(command)), summary_(std::move(summary)) {}
Flags::Flags(Flags&&) noexcept = default;
Flags::~Flags() = default;

// ---- the table ----------------------------------------------------------------------------------------------------
void Flags::add_flag(Flag flag) {
  flag.initial = flag.get();
  flag.heading = heading_;
  flags_.push_back(std::move(flag));
}

void Flags::add(const char* name, int64_t& field, int64_t low, int64_t high, const char* help, Role role) {
  add_flag({name, "N", help, role, [&field] { return std::to_string(field); },
            [name, &field, low, high](const std::string& text) { field = size(name, text, low, high); }});
}

void Flags::add(const char* name, double& field, double low, double high, const char* help, Role role) {
  add_flag({name, "X", help, role, [&field] { return Json(field).dump(); },
            [name, &field, low, high](const std::string& text) {
              char* end = nullptr;
              const double value = strtod(text.c_str(), &end);
              if (text.empty() || *end || !(value >= low && value <= high))
                throw wrong(name, str("a number from ", low, " to ", high), text);
              field = value;
            }});
}

void Flags::add(const char* name, std::string& field, const char* value, const char* help, Role role) {
  add_flag({name, value, help, role, [&field] { return field; }, [&field](const std::string& text) { field = text; }});
}

void Flags::add_choice(const char* name, std::string& field, const char* choices, const char* help, Role role) {
  add_flag({name, choices, help, role, [&field] { return field; },
            [name, &field, choices](const std::string& text) {
              if (text.empty() || ("|" + std::string(choices) + "|").find("|" + text + "|") == std::string::npos)
                throw wrong(name, choices, text);
              field = text;
            }});
}

void Flags::add_on_off(const char* name, bool& field, const char* help, Role role) {
  add_flag({name, "on|off", help, role, [&field] { return on_or_off(field); },
            [name, &field](const std::string& text) {
              if (text != "on" && text != "off") throw wrong(name, "on or off", text);
              field = text == "on";
            }});
}

void Flags::add_switch(const char* name, bool& field, const char* help, Role role) {
  add_flag({name, "", help, role, [&field] { return on_or_off(field); },
            [&field](const std::string& text) { field = text == "on"; }});
}

void Flags::add(const char* name, std::vector<int64_t>& field, int64_t low, int64_t high, const char* help, Role role) {
  add_flag({name, "N,N,...", help, role, [&field] { return comma_list(field); },
            [name, &field, low, high](const std::string& text) {
              std::vector<int64_t> values;
              for (size_t at = 0; !text.empty() && at <= text.size();) {
                const size_t comma = std::min(text.find(',', at), text.size());
                values.push_back(size(name, text.substr(at, comma - at), low, high));
                at = comma + 1;
              }
              field = values;
            }});
}

void Flags::add_rest(std::vector<std::string>& field, const char* what, bool required) {
  rest_ = &field;
  rest_name_ = what;
  rest_required_ = required;
}

Flags::Flag* Flags::look_up(const std::string& name) {
  for (Flag& flag : flags_)
    if (flag.name == name) return &flag;
  return nullptr;
}

Flags::Flag& Flags::find(const std::string& name) {
  if (Flag* flag = look_up(name)) return *flag;
  std::vector<std::string> names;
  for (const Flag& flag : flags_) names.push_back(std::string("--") + flag.name);
  throw UsageError(str(command_, " has no flag --", name, did_you_mean("--" + name, names), "; see train_gca ",
                       command_, " --help"));
}

// ---- reading a command line ---------------------------------------------------------------------------------------
void Flags::parse(const std::vector<std::string>& arguments) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const std::string& argument = arguments[i];
    if (!argument.starts_with("--") || argument.size() == 2) {
      if (!rest_)
        throw UsageError(
            str(command_, " takes flags only, found '", argument, "'; see train_gca ", command_, " --help"));
      rest_->push_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    Flag& flag = find(name);
    if (flag.given) throw UsageError("--" + name + " is given twice; leave one out");
    flag.given = true;
    if (!*flag.value) {
      if (equals != std::string::npos)
        throw UsageError("--" + name + " takes no value, found '" + argument.substr(equals + 1) + "'");
      flag.set("on");
    } else if (equals != std::string::npos) {
      flag.set(argument.substr(equals + 1));
    } else {
      if (++i == arguments.size() || arguments[i].starts_with("--"))
        throw UsageError("--" + name + " needs a value: " + flag.value + " (" + flag.help + ")");
      flag.set(arguments[i]);
    }
  }
  if (rest_ && rest_required_ && rest_->empty())
    throw UsageError(str(command_, " needs ", rest_name_, "; see train_gca ", command_, " --help"));
}

bool Flags::given(const std::string& name) { return find(name).given; }

std::string Flags::all_given() const {
  std::string all;
  for (const Flag& flag : flags_)
    if (flag.given) all += str(all.empty() ? "--" : " --", flag.name);
  return all;
}

std::string Flags::peek(const std::vector<std::string>& arguments, const std::string& name) {
  for (size_t i = 0; i < arguments.size(); i++) {
    if (arguments[i] == "--" + name && i + 1 < arguments.size()) return arguments[i + 1];
    if (arguments[i].starts_with("--" + name + "=")) return arguments[i].substr(name.size() + 3);
  }
  return "";
}

void Flags::need(const char* name) {
  const Flag& flag = find(name);
  if (flag.get().empty()) throw UsageError(str(command_, " needs --", name, " ", flag.value, ": ", flag.help));
}

// ---- help ---------------------------------------------------------------------------------------------------------
std::string Flags::help() const {
  std::string text = "train_gca " + command_ + (flags_.empty() ? "" : " [flags]") +
                     (rest_ ? std::string(" ") + rest_name_ : "") + "\n  " + summary_ + "\n";
  std::vector<std::string> headings = {""};  // each once, as they came
  for (const Flag& flag : flags_)
    if (std::find(headings.begin(), headings.end(), flag.heading) == headings.end()) headings.push_back(flag.heading);
  for (const std::string& heading : headings) {
    if (!heading.empty()) text += "\n  " + heading + "\n";
    for (const Flag& flag : flags_) {
      if (flag.heading != heading) continue;
      const std::string spelling = std::string("  --") + flag.name + (*flag.value ? std::string(" ") + flag.value : ""),
                        value = *flag.value ? flag.initial : "";
      text += str(left(spelling, 34), " ", flag.help, value.empty() ? "" : (" [" + value + "]"), "\n");
    }
  }
  return text;
}

// ---- what a checkpoint remembers ----------------------------------------------------------------------------------
std::string Flags::line() const {
  constexpr std::string_view plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+.,/:=@%";
  std::string all;
  for (const Flag& flag : flags_) {
    const std::string value = flag.get();
    if (flag.role == setup || value == flag.initial) continue;
    std::string quoted = value;
    if (value.empty() || value.find_first_not_of(plain) != value.npos) {
      quoted = "'";
      for (const char c : value) quoted += c == '\'' ? "'\\''" : std::string(1, c);
      quoted += "'";
    }
    all += str(all.empty() ? "--" : " --", flag.name, " ", quoted);
  }
  return all;
}

Json Flags::values() const {
  Json all = Json::object();
  for (const Flag& flag : flags_)
    if (flag.role != setup) all[flag.name] = flag.get();
  return all;
}

void Flags::restore(const JsonField& saved) {
  for (const auto& [name, value] : saved.members()) {
    Flag* flag = look_up(name);
    if (!flag || flag->role == setup)
      throw Error(saved.where() + ": the setting \"" + name +
                  "\" is not known: a newer train_gca made this checkpoint; use that one");
    try {
      flag->set(saved.at(name).string());
    } catch (const UsageError& error) {
      throw Error(saved.where() + ": " + error.what());
    }
  }
}

void Flags::check_unchanged(const JsonField& saved) const {
  for (const Flag& flag : flags_) {
    if (flag.role != run || !flag.given) continue;
    // A checkpoint older than the flag was made as by the flag's default.
    const std::string before = saved.has(flag.name) ? saved.at(flag.name).string() : flag.initial;
    if (before != flag.get())
      throw UsageError(str("--", flag.name, ": the run was started with '", before, "', found '", flag.get(),
                           "'; leave it out to resume, or start a new run from the weights with --init"));
  }
}

}  // namespace gca
