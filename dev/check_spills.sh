#!/bin/sh
# Fails where a kernel spills registers into memory and is not on the list below, or spills more than it says. What the compiler spilled
# stands in the reports that make leaves beside the kernels' objects: make train_gca ARCH="80 90a" && dev/check_spills.sh
set -eu
cd "$(dirname "$0")/.."
reports=${1:-build/gpu/kernels}

# file | kernel, ACT being float or bf16 | architecture bytes (stored and loaded, at most), ... | reason
allowed() {
  plain='128 registers, so that a multiprocessor holds two blocks; the plain path, for shapes that tensor cores do not take'
  full='all 255 registers hold the sums of 32 rows; of the forms tried on an H100 the fastest (gca_plan)'
  any_row='one block of 1,024 threads, 64 registers; rows of logits at any address, which no model here has (V is padded)'
  window='168 registers, so that a multiprocessor holds three blocks; chosen by measurement on an H100 (forward_plan, query_plan)'
  cat <<END
plain/chunk_attention_ACT | attention_forward_plain_kernel<ACT, InChunk<ACT>, 1> | sm_80 32 | $plain
plain/chunk_attention_ACT | attention_backward_query_plain_kernel<ACT, InChunk<ACT>, 1> | sm_80 104, sm_90a 72 | $plain
plain/chunk_attention_ACT | attention_backward_key_plain_kernel<ACT, InChunk<ACT>, 1> | sm_80 272, sm_90a 180 | $plain
plain/sliding_attention_ACT | attention_backward_query_plain_kernel<ACT, Sliding<ACT>, 1> | sm_80 96, sm_90a 144 | $plain
plain/sliding_attention_ACT | attention_backward_key_plain_kernel<ACT, Sliding<ACT>, 1> | sm_80 320, sm_90a 288 | $plain
plain/gca_ACT | gca_backward_memory_plain_kernel<ACT, 1> | sm_80 136, sm_90a 188 | $plain
choose_token | choose_token_kernel<ACT, 1, true> | sm_80 104 | $any_row
mma/gca | gca_backward_query_mma_kernel<64> | sm_80 40, sm_90a 24 | $full
mma/gca | gca_backward_memory_mma_kernel<64> | sm_80 32, sm_90a 88 | $full
mma/sliding_attention_forward | sliding_attention_forward_mma_kernel<64, true> | sm_80 80 | $window
mma/sliding_attention_backward | sliding_attention_backward_query_mma_kernel<64> | sm_80 16, sm_90a 8 | $window
END
}

{
  allowed
  for source in $(find kernels -name "*.cu" | sort); do
    name=${source#kernels/}
    name=${name%.cu}
    echo "report of $name"
    [ ! -e "$reports/$name.ptxas" ] || c++filt < "$reports/$name.ptxas"
  done
} | awk '
  # What helps: more registers (launch bounds), less to hold at once, or a line in the list, with the reason.
  function complain(text) {
    print "check_spills: " text
    bad = 1
  }
  function report_ends() {
    if (file != "" && !reported) complain("no report on kernels/" file ".cu in '"$reports"': make train_gca first")
  }
  /^report of / {
    report_ends()
    file = $3
    reported = 0
    next
  }
  file == "" {
    split($0, field, " [|] ")
    n = split(field[3], limits, ", ")
    for (i = 1; i <= n; i++) {
      split(limits[i], limit, " ")
      at_most[field[1] "|" field[2] "|" limit[1]] = limit[2]
    }
    next
  }
  /^ptxas info/ { reported = 1 }  # also of a file without a kernel
  # ptxas info    : Compiling entry function "void gca::(anonymous namespace)::NAME<...>(...)" for "sm_90a", in single quotes
  /Compiling entry function/ {
    arch = $NF
    gsub(/[^a-z0-9_]/, "", arch)
    kernel = $0
    sub(/^.*entry function .(void )?/, "", kernel)
    gsub(/gca::|\(anonymous namespace\)::/, "", kernel)
    sub(/\(.*$/, "", kernel)
    while (sub(/> >/, ">>", kernel));
    all++
  }
  /bytes spill stores/ {
    spilled = $5 + $9
    listed = file "|" kernel "|" arch
    gsub(/__nv_bfloat16|bf16|float/, "ACT", listed)
    if (spilled > at_most[listed] + 0)
      complain("kernels/" file ".cu, " kernel " for " arch ": " $5 " bytes of spills stored, " $9 " loaded, " \
               (at_most[listed] ? at_most[listed] " in all are allowed" : "none are allowed") \
               " by the list in dev/check_spills.sh")
  }
  END {
    report_ends()
    if (!bad) print "check_spills: " all " kernels (of all architectures), none spills but those of the list"
    exit bad
  }'
