// The command verify: oracle files through the real forward, backward and optimiser; picks in segments.
#include <string>
#include <utility>

#include "commands/commands.h"
#include "commands/device.h"
#include "commands/pick_check.h"
#include "commands/shared.h"
#include "commands/verifier.h"

namespace gca {

template bool Verifier::run(Cpu<double>&);
template bool Verifier::run(Cpu<float>&);
template bool Verifier::run(Cpu<float, true>&);

namespace {

// What rounding may make of the oracle files; beyond it something is wrong.
constexpr std::pair<const char*, double> tolerances[] = {{"bf16", 0.2}, {"double", 1e-10}, {"float", 1e-4}};

double tolerance_of(const std::string& precision) {
  for (const auto& [name, tolerance] : tolerances)
    if (name == precision) return tolerance;
  throw Error("no tolerance for " + precision);
}

}  // namespace

int verify_command(const std::vector<std::string>& arguments) {
  std::vector<std::string> files;
  std::string precision = "double", device = "cpu";
  int64_t threads = 0;
  bool retrieval = false;
  VerifyOptions options{.tolerance = 0};
  std::string tolerance_help = "largest difference over a tensor's largest entry; 0: that of the precision";
  for (const auto& [name, tolerance] : tolerances) tolerance_help += str(", ", name, " ", tolerance);
  Flags flags("verify",
              "Runs oracle files (dev/make_oracle.py makes them) through the real forward, backward and optimiser; "
              "or checks the retrieval in segments.");
  flags.add_rest(files, "FIXTURE...", false);
  flags.add_choice("precision", precision, "double|float|bf16",
                   "double on the CPU only; bf16 on the CPU rounds as a GPU would");
  flags.add_choice("device", device, "auto|cpu|cuda", "where to run");
  flags.add("tolerance", options.tolerance, 0, 1e9, tolerance_help.c_str());
  flags.add_switch("use-picks", options.use_picks, "take the file's picks, so that rounding cannot change them");
  flags.add_switch(
      "retrieval", retrieval,
      "reads rows of 260 chunks of random numbers (D=768, K=8) whole and in segments, and counts the picks "
      "that differ from the whole's and from double's: 1 in 1,000 at most, by rounding");
  flags.add_switch("quiet", options.quiet, "a line a file");
  flags.add("threads", threads, 0, 4096, "CPU threads; 0: one a processor");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  if (files.empty() && !retrieval)
    throw UsageError("verify needs FIXTURE... or --retrieval; see train_gca verify --help");
  if (options.tolerance == 0) options.tolerance = tolerance_of(precision);
  auto run = [&](auto& backend) {
    int failed = 0;
    for (const std::string& path : files) failed += !Verifier(path, options).run(backend);
    if (retrieval) failed += !report(check_picks(backend));
    return failed ? 1 : 0;
  };
  if (device != "cuda" && precision != "float") {
    if (precision == "double") {
      Cpu<double> cpu(static_cast<int>(threads));
      return run(cpu);
    }
    if (device == "cpu") {
      Cpu<float, true> cpu(static_cast<int>(threads));
      return run(cpu);
    }
  }
  if (precision == "double") throw UsageError("--precision double runs on the CPU only: leave --device out");
  return with_device(device, precision, threads, run);
}

}  // namespace gca
