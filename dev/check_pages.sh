#!/bin/sh
# Every page, source and name that this project cites is here. Each citation of nothing is a line; exit 1 if there is one.
cd "$(dirname "$0")/.." || exit 1
bad=0
# Pages and sources that a comment, a message or a page cites: a path as it stands, a bare name in any room. Includes are
# left to the compiler.
git ls-files | awk '
  BEGIN {
    # OP for any op, what a user or a build makes, what lies outside or after a $VARIABLE, a dependency.
    elsewhere = "(^|/)OP\\.cuh?$|^(build|data|runs)?/|^doctest/"
  }
  FILENAME == "-" || FILENAME == "" {  # the list of what is here
    here[$0] = 1
    while (sub(/^[^\/]*\//, "")) here[$0] = 1  # from any folder on its way
    next
  }
  /^ *#include/ { next }
  {
    text = $0
    if (FILENAME ~ /\.(h|cuh|cu|cpp)$/) {  # strings and comments only: in code a point and h may be a member
      line = $0
      text = ""
      gsub(/\047"\047|\\[nt]/, " ", line)
      while (match(line, /"([^"\\]|\\.)*"|\/\/.*/)) {
        text = text " " substr(line, RSTART, RLENGTH)
        line = substr(line, RSTART + RLENGTH)
      }
    }
    gsub(/https?:[^ )]*|[$][A-Za-z_]+/, "", text)
    while (match(text, /[A-Za-z0-9_\/.-]+/)) {
      name = substr(text, RSTART, RLENGTH)
      text = substr(text, RSTART + RLENGTH)
      sub(/[.-]+$/, "", name)
      sub(/^\.\//, "", name)
      if (name !~ /[A-Za-z0-9_]\.(md|py|sh|h|cuh|cu|cpp)$/ || name ~ elsewhere || name in here) continue
      print FILENAME ":" FNR ": cites " name ", which is not here"
      bad = 1
    }
  }
  END { exit bad }' - $(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' '*.md' '*.py' '*.sh' Makefile) || bad=1

# Names in backquotes on the pages of doc/ (`like_this`, `Like::this`) are words of some source; `what: it does` is a test.
awk '
  FILENAME ~ /^doc\// {
    text = $0
    while (match(text, /`[^`]*`/)) {
      name = substr(text, RSTART + 1, RLENGTH - 2)
      text = substr(text, RSTART + RLENGTH)
      sub(/\(\)$/, "", name)
      if (name ~ /^[A-Za-z ]+: [a-z]/ && !(name in test)) {
        print FILENAME ":" FNR ": names the test \047" name "\047, which is not here"
        bad = 1
      }
      if (name !~ /^[A-Za-z][A-Za-z0-9]*(_|::)[A-Za-z0-9_:]*$/) continue
      sub(/.*::/, "", name)
      if (name in word) continue
      print FILENAME ":" FNR ": names " name ", which no source has"
      bad = 1
    }
    next
  }
  match($0, /^TEST_CASE[A-Z_]*\("[^"]*"/) { test[substr($0, index($0, "\"") + 1, RLENGTH - index($0, "\"") - 1)] = 1 }
  {
    n = split($0, words, /[^A-Za-z0-9_]+/)
    for (i = 1; i <= n; i++) word[words[i]] = 1
  }
  END { exit bad }' $(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' '*.py' '*.sh' Makefile) $(git ls-files 'doc/*.md') || bad=1

# The table of names in doc/ops.md: what a column names is defined where the column says.
awk -F ' *[|] *' '
  /^[|] op [|]/ { for (i = 2; i < NF; i++) column[i] = $i; next }
  NF && column[2] && /^[|] [^-]/ {
    for (i = 3; i < NF; i++) for (n = split($i, parts, "`"); n > 1; n -= 2) print column[i] "|" parts[n - 1]
  }' doc/ops.md | sort -u | {
  while IFS='|' read -r column name; do
    case $column in
      'by hand') set -- dev/by_hand.h -E "^ *(inline )?[A-Za-z:]+ $name\(" ;;
      'CPU') set -- gca_cpu.h -F "Cpu<real, bf16>::$name(" ;;
      *' kernel') set -- kernels -E "(void|^) *(__launch_bounds__\(.*\) )?$name\(" ;;
      'oracle') set -- dev/make_oracle.py -F "def $name(" ;;
      'test') set -- dev/test -F "TEST_CASE(\"$name\")" ;;
      *) set -- /dev/null -F "$name" ;;
    esac
    grep -rq "$2" -- "$3" "$1" && continue
    echo "doc/ops.md: names \`$name\` under '$column', which $1 does not define"
    bad=1
  done
  exit $bad
} || bad=1
exit $bad
