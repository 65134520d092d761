// Command lines: one table of flags that parses, prints the help, and is what a checkpoint remembers of a run's
// settings.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common.h"

namespace gca {

class Json;
class JsonField;

class Flags {
 public:
  // What a flag means to a run that resumes: setup is told anew each time, remembered is kept but may be changed, run
  // may not be.
  enum Role { setup, remembered, run };

  Flags(std::string command, std::string summary);
  Flags(Flags&&) noexcept;
  ~Flags();

  // The flags that are added from here on stand under this heading in the help, with those that an earlier call of the
  // same name has put there; the ones before any heading come first, without one.
  void heading(const char* name) { heading_ = name; }

  // An integer; K, M, G stand for 2^10, 2^20, 2^30.
  void add(const char* name, int64_t& field, int64_t low, int64_t high, const char* help, Role role = setup);
  void add(const char* name, double& field, double low, double high, const char* help, Role role = setup);
  void add(const char* name, std::string& field, const char* value, const char* help, Role role = setup);
  // One of the words in choices, "a|b|c".
  void add_choice(const char* name, std::string& field, const char* choices, const char* help, Role role = setup);
  void add_on_off(const char* name, bool& field, const char* help, Role role = setup);
  // A flag without a value: being there turns it on.
  void add_switch(const char* name, bool& field, const char* help, Role role = setup);
  // Integers with commas between; "" is none.
  void add(const char* name, std::vector<int64_t>& field, int64_t low, int64_t high, const char* help,
           Role role = setup);
  // The arguments that are no flags, named `what` in the help.
  void add_rest(std::vector<std::string>& field, const char* what, bool required);

  // Arguments after the command. Errors are UsageErrors; --help is the caller's.
  void parse(const std::vector<std::string>& arguments);
  bool given(const std::string& name);
  // The flags that were given, as --NAME; "" for none.
  std::string all_given() const;
  // The value of a flag in arguments that are not parsed yet; "" if it is not among them.
  static std::string peek(const std::vector<std::string>& arguments, const std::string& name);
  // Throws a UsageError for a flag that must be given.
  void need(const char* name);

  std::string help() const;

  // As much of a command line as makes the values what they are, but those of setup and what is as by default; quoted
  // for a shell.
  std::string line() const;

  // All values by name, and back: what a checkpoint keeps. Names that restore() does not know are an Error (a newer
  // file).
  Json values() const;
  void restore(const JsonField& saved);
  // After restore() and parse(): a UsageError where the command line changes what the saved run was made of.
  void check_unchanged(const JsonField& saved) const;

 private:
  struct Flag;
  std::string command_, summary_;
  std::vector<Flag> flags_;
  const char* heading_ = "";
  std::vector<std::string>* rest_ = nullptr;
  const char* rest_name_ = "";
  bool rest_required_ = false;

  void add_flag(Flag flag);
  Flag* look_up(const std::string& name);
  Flag& find(const std::string& name);  // a UsageError that names the nearest if there is none
};

}  // namespace gca
