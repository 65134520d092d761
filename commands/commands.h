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
int explain_command(const std::vector<std::string>& arguments);
int export_command(const std::vector<std::string>& arguments);
int verify_command(const std::vector<std::string>& arguments);
int info_command(const std::vector<std::string>& arguments);
// Of info: what a RUN is, one of its checkpoints, or an exported file. 1 where a checkpoint is damaged.
int show_saved(const std::string& path);

}  // namespace gca
