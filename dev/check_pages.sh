#!/bin/sh
# Every page and source that a comment, a message or a page of this project cites is here: a path as it stands, a bare
# name in any room. Each citation of nothing is a line; exit 1 if there is one. Includes are left to the compiler.
cd "$(dirname "$0")/.." || exit 1
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
    gsub(/https?:[^ )]*/, "", text)
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
  END { exit bad }' - $(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' '*.md' '*.py' '*.sh' Makefile)
