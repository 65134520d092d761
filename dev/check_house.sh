#!/bin/sh
# What must never be in this house: a room that includes what stands above it, two kernels of one name, lines over 120
# columns. Each finding is a line; exit 1 if there is one. Read doc/house.md for the reasons.
cd "$(dirname "$0")/.." || exit 1
bad=0
# never NAME FILES PATTERN: no #include "..." in these files may match the pattern (or, with !PATTERN, fail to match it).
never() {
  name=$1 files=$2 pattern=$3
  case $pattern in
    !*) found=$(grep -n '^ *#include "' $files | grep -vE "\"(${pattern#!})") ;;
    *) found=$(grep -nE "^ *#include \"($pattern)" $files) ;;
  esac
  [ -z "$found" ] && return
  echo "$found" | sed "s|^|$name: |"
  bad=1
}
above_model='gca_cpu|cpu/|gca_kernels|kernels/|runtime/|commands/'
never 'base/ knows base/ and common.h alone' "$(echo base/*)" '!base/|common\.h'
never 'ranks/ knows base/ and common.h alone' "$(echo ranks/*)" '!base/|common\.h|ranks/'
never 'tokenizer/ knows no shard and no model' "$(echo tokenizer/*)" "!base/|common\.h|tokenizer/"
never 'dataloader knows no model' "$(echo dataloader.*)" "model\.h|config\.h|ops\.h|$above_model"
never 'the model knows no backend, no file, no shard' "model.h model_backward.h model_stream.h config.h ops.h" "$above_model|dataloader|tokenizer/|base/(files|json|safetensors)"
never 'the CPU backend knows no GPU' "gca_cpu.h $(echo cpu/*)" 'gca_kernels|kernels/|runtime/|commands/'
never 'the GPU backend knows no CPU backend' "gca_kernels.cuh $(find kernels -type f)" 'gca_cpu|cpu/|runtime/|commands/'
never 'the two paths of kernels do not know each other' "$(echo kernels/plain/*)" 'kernels/mma/'
never 'the two paths of kernels do not know each other' "$(echo kernels/mma/*)" 'kernels/plain/'
never 'runtime/ knows no command' "$(echo runtime/*)" 'commands/'
never 'the program knows no test' "$(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' | grep -vE '^dev/|^test_gca.cu')" 'dev/'
# A profile, and a report of spills, tell kernels apart by name alone: a name, and the file it stands in.
kernel_names() {
  for source in $(find kernels -name '*.cu' -o -name '*.cuh'); do
    tr '\n' ' ' < "$source" | sed 's/__launch_bounds__([^()]*\(([^()]*)[^()]*\)*)//g' | grep -oE '__global__ +void +[A-Za-z0-9_]+' |
      sed "s|.* ||; s|\$| $source|"
  done
}
twice=$(kernel_names | sort | awk '$1 == name {print $2 ": kernel " name " has its name from " file} {name = $1; file = $2}')
[ -n "$twice" ] && echo "$twice" && bad=1
named=$(kernel_names | wc -l) kernels=$(grep -rho '__global__' kernels | wc -l)
[ "$named" != "$kernels" ] && echo "check_house: $kernels kernels in kernels/, names found of $named" && bad=1
wide=$(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' ':!tokenizer/unicode_classes.h' | xargs awk 'length > 120 {print FILENAME ":" FNR ": over 120 columns"}')
[ -n "$wide" ] && echo "$wide" && bad=1
exit $bad
