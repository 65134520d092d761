// The commands, one program a file: what a user types after train_gca. Each takes its arguments and returns the exit
// code.
#pragma once
#include <string>
#include <vector>

namespace gca {

int tokenizer_train_command(const std::vector<std::string>& arguments);
int tokenize_command(const std::vector<std::string>& arguments);
int encode_command(const std::vector<std::string>& arguments);
int decode_command(const std::vector<std::string>& arguments);
int eval_command(const std::vector<std::string>& arguments);
int passkey_command(const std::vector<std::string>& arguments);
int generate_command(const std::vector<std::string>& arguments);
int inspect_command(const std::vector<std::string>& arguments);
int export_command(const std::vector<std::string>& arguments);
int verify_command(const std::vector<std::string>& arguments);
int info_command(const std::vector<std::string>& arguments);

}  // namespace gca
