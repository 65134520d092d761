# make         the program, for the GPU too where there is an nvcc: ./train_gca
# make cpu     the program for the CPU alone: build/cpu/train_gca
# make deps    installs what the tests need, or says how
# make test    everything that this machine can run
# make test-long   and the tests that take minutes each
# make install the program, into PREFIX/bin (/usr/local; DESTDIR goes before it); make uninstall removes it
# make demo    teaches a small model to find needles, and shows what it fetches
# make bench   timings
# make format  clang-format over all sources
# SANITIZE: address,undefined or thread: a build of its own, for the CPU's tests (make test NVCC= SANITIZE=thread).
SANITIZE ?=
CPU = build/cpu$(if $(SANITIZE),-$(SANITIZE))
GPU = build/gpu
CXXFLAGS ?= $(if $(SANITIZE),-O1 -g -fsanitize=$(SANITIZE) -fno-sanitize-recover=all,$(OPTIMISE))
# What computes is worth its compilation; of the rest more than -O1 makes nothing faster but the compiler slower.
OPTIMISE = -O1
$(CPU)/base/%.o $(CPU)/cpu/%.o $(CPU)/tokenizer/%.o $(CPU)/dataloader.o: OPTIMISE = -O3
$(CPU)/dev/test/%.o: OPTIMISE = -O0
LDFLAGS += $(if $(SANITIZE),-fsanitize=$(SANITIZE))
# clang tells of each `omp simd` loop that it leaves as it is (those of double with e^x); g++ 12 warns of "a" + std::string() where the
# library inlines it (GCC bug 105651). Conversions that lose something are warned of; a signed size handed on as a size_t is not.
CLANG := $(findstring clang,$(shell $(CXX) --version 2>/dev/null))
WARNINGS = -Wall -Wextra -Wconversion $(if $(CLANG),-Wcomma -Wno-sign-conversion -Wno-implicit-int-float-conversion -Wno-pass-failed,-Wno-restrict)
ALL_CXXFLAGS = -std=c++20 -fopenmp-simd $(WARNINGS) $(CXXFLAGS) $(EXACT) -fno-math-errno -fno-trapping-math -I. -MMD -MP -pthread $(if $(CI),-Werror)
# After the user's own: what of fast math common.h cannot see (it refuses the rest).
EXACT = -fno-unsafe-math-optimizations -fno-associative-math -fno-reciprocal-math
# What --version says. The commit: where this is a checkout of its own.
VERSION = 1.0
COMMIT = $(or $(shell [ -e .git ] && GIT_OPTIONAL_LOCKS=0 git -c safe.directory='*' describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null),unknown)
# A path, or a command with flags (nvcc -ccbin g++-12). Where it is not told and not in PATH, a CUDA that is installed is named.
ifeq ($(origin NVCC),undefined)
NVCC := $(shell command -v nvcc 2>/dev/null)
ifeq ($(NVCC)$(filter-out all test bench,$(MAKECMDGOALS)),)
CUDA_FOUND := $(shell for nvcc in "$$CUDA_HOME/bin/nvcc" "$$CUDA_PATH/bin/nvcc" /usr/local/cuda/bin/nvcc /usr/local/cuda-*/bin/nvcc /opt/cuda/bin/nvcc; do \
  test -x "$$nvcc" && echo "$$nvcc" && break; done)
$(if $(CUDA_FOUND),$(info CUDA is installed ($(CUDA_FOUND)) but nvcc is not in PATH: this builds for the CPU alone. For the GPU too: make NVCC='$(CUDA_FOUND)'))
endif
endif
# All processors, unless told otherwise with -j.
ifeq ($(filter -j%,$(MAKEFLAGS)),)
MAKEFLAGS += -j$(or $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null),2)
endif

ifneq ($(NVCC),)
all: train_gca
else
all: cpu
	ln -sf build/cpu/train_gca train_gca
endif
cpu: $(CPU)/train_gca

# ---- what a program is linked from ----
# ROOMS know nothing of GPUs and are compiled once. The commands and main() choose a backend: once for the CPU alone, once for both.
ROOMS = $(patsubst %.cpp,$(CPU)/%.o,$(wildcard base/*.cpp ranks/*.cpp tokenizer/*.cpp *.cpp cpu/*.cpp runtime/*.cpp))
COMMANDS = $(patsubst %.cpp,%.o,$(wildcard commands/*.cpp))
TESTS = $(patsubst %.cpp,$(CPU)/%.o,$(filter-out dev/test/test_gpu%,$(wildcard dev/test/*.cpp)))
$(CPU)/train_gca: $(CPU)/train_gca.o $(COMMANDS:%=$(CPU)/%) $(ROOMS)
$(CPU)/test_gca: $(CPU)/test_gca.o $(TESTS) $(COMMANDS:%=$(CPU)/%) $(ROOMS) | $(CPU)/train_gca # which it runs
$(CPU)/bench: $(CPU)/dev/bench.o $(ROOMS)
$(CPU)/train_gca $(CPU)/test_gca $(CPU)/bench:
	$(CXX) $(LDFLAGS) -pthread $^ -ldl -o $@

# ---- what --version says: one header a build, which changes with what it says, and one object that includes it ----
$(CPU)/commands/version.o $(GPU)/commands/version.o: WITH = -include $(@D)/../version.h
$(CPU)/commands/version.o: $(CPU)/version.h
$(GPU)/commands/version.o: $(GPU)/version.h
$(CPU)/version.h $(GPU)/version.h: OPTIMISE = -O3
FLAGS_USED = $(CXX) $(filter-out -W% -M% -I%,$(ALL_CXXFLAGS))$(if $(findstring $(GPU),$@),; $(NVCC) $(NVCCFLAGS) $(GENCODE))
# A text as a string of C++ inside a shell's quotes.
string = '"$(subst ','\'',$(subst ",\",$(subst \,\\,$(strip $(1)))))"'
$(CPU)/version.h $(GPU)/version.h: FORCE
	@mkdir -p $(@D)
	@printf '#define %s %s\n' GCA_VERSION $(call string,$(VERSION)) GCA_COMMIT $(call string,$(COMMIT)) GCA_FLAGS $(call string,$(FLAGS_USED)) > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# ---- one rule a kind of source; .cu files without kernels are C++ ----
define COMPILE
$(if $(filter $(GPU)/%,$@),$(OLD_CUDA))@mkdir -p $(@D)
$(CXX) $(ALL_CXXFLAGS) $(if $(filter $(GPU)/%,$@),-DGCA_CUDA $(CUDA_INCLUDE)) $(WITH) -x c++ -c $< -o $@
endef
$(CPU)/%.o: %.cpp Makefile
	$(COMPILE)
$(CPU)/%.o: %.cu Makefile
	$(COMPILE)

ifneq ($(NVCC),)
# ARCH: what the kernels are compiled for. The cards that answer; where none does, 80 and 90a. PTX of compute_80 is always there,
# so that every newer card starts.
ARCH ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | sed 's/^90$$/90a/' | grep -E '^[0-9]+a?$$'),80 90a)
# As one word for the shell, whatever it has in it.
quoted = '$(subst ','\'',$(1))'
# A path with spaces is one word, a command with flags several.
NVCC_IS_PATH := $(shell test -x $(call quoted,$(NVCC)) && echo yes)
RUN_NVCC := $(if $(NVCC_IS_PATH),$(call quoted,$(NVCC)),$(NVCC))
NVCC_FILE := $(if $(NVCC_IS_PATH),$(NVCC),$(or $(filter %nvcc,$(NVCC)),$(firstword $(NVCC))))
# The toolkit: above the file that a link leads to, above the link, or what nvcc itself (behind a wrapper) says; the first that has headers.
CUDA := $(shell given=$$(command -v $(call quoted,$(NVCC_FILE)) || echo $(call quoted,$(NVCC_FILE))); file=$$(readlink -f "$$given"); \
  for top in "$${file%/*/*}" "$${given%/*/*}" "$$($(RUN_NVCC) --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^.. *TOP=//p')"; do \
    for header in "$$top"/include/cuda_runtime.h "$$top"/targets/*/include/cuda_runtime.h; do \
      test -f "$$header" && cd "$$top" && pwd -P && exit; done; done; echo "$${file%/*/*}")
# Its folders, at the top or, as conda's, in targets/; those of a distribution, in /usr, every compiler knows.
CUDA_INCLUDE_IN := $(shell cd $(call quoted,$(CUDA)) && for folder in include targets/*/include; do test -f "$$folder"/cuda_runtime.h && echo $$folder && break; done)
CUDA_LIBS_IN := $(shell cd $(call quoted,$(CUDA)) && for folder in lib64 lib targets/*/lib; do test -e "$$folder"/libcudart.so && echo $$folder && break; done)
ifneq ($(CUDA),/usr)
CUDA_INCLUDE := -isystem $(call quoted,$(CUDA)/$(or $(CUDA_INCLUDE_IN),include))
CUDA_LIBS := $(call quoted,$(CUDA)/$(or $(CUDA_LIBS_IN),lib64))
endif
# As "11 8"; nothing where nvcc does not say.
CUDA_VERSION := $(shell $(RUN_NVCC) --version 2>/dev/null | sed -n 's/.*release \([0-9][0-9]*\)\.\([0-9][0-9]*\).*/\1 \2/p')
OLD_CUDA = $(if $(filter 1 2 3 4 5 6 7 8 9 10 11,$(firstword $(CUDA_VERSION))),$(error CUDA 12.0 or newer is needed, $(NVCC) is of $(subst $() ,.,$(CUDA_VERSION)): install a newer one and give it with NVCC=, or build for the CPU alone with make NVCC=))
GENCODE = $(foreach a,$(ARCH),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80
NVCCFLAGS ?= -O3
ALL_NVCCFLAGS = -std=c++20 $(NVCCFLAGS) -lineinfo $(GENCODE) --compiler-options -Wall,-Wextra -Xptxas -v -I. -MMD -MP $(if $(CI),-Werror all-warnings)
# What would change the kernels' numbers without a word, as `-ftz true` or `-ftz=true`; nvcc reads two of these variables by itself.
NVCC_ASKED = $(strip $(subst =, ,$(if $(NVCC_IS_PATH),,$(NVCC)) $(NVCCFLAGS) $(NVCC_PREPEND_FLAGS) $(NVCC_APPEND_FLAGS)))
FAST_MATH = $(strip $(foreach flag,use_fast_math ftz=true prec-div=false prec-sqrt=false ffast-math Ofast,$(if $(findstring $(subst =, ,-$(flag)),$(NVCC_ASKED)),-$(flag))))
# kernels/: the ops; kernels/plain/: kernels for every type and shape; kernels/mma/: those on tensor cores.
KERNELS = $(patsubst %.cu,$(GPU)/%.o,$(wildcard kernels/*.cu kernels/plain/*.cu kernels/mma/*.cu)) \
  $(patsubst %.cpp,$(GPU)/%.o,$(wildcard kernels/*.cpp))
GPU_TESTS = $(patsubst %.cpp,$(GPU)/%.o,$(wildcard dev/test/test_gpu*.cpp))
GPU_LIBS = $(if $(CUDA_LIBS),-L$(CUDA_LIBS) -Xlinker -rpath -Xlinker $(CUDA_LIBS)) -lcudart -lcublasLt

train_gca: $(GPU)/train_gca.o $(COMMANDS:%=$(GPU)/%) $(ROOMS) $(KERNELS)
$(GPU)/test_gca: $(CPU)/test_gca.o $(TESTS) $(GPU_TESTS) $(COMMANDS:%=$(GPU)/%) $(ROOMS) $(KERNELS) | $(CPU)/train_gca
$(GPU)/bench: $(GPU)/dev/bench.o $(ROOMS) $(KERNELS)
train_gca $(GPU)/test_gca $(GPU)/bench:
	$(CXX) $(LDFLAGS) -pthread $^ $(GPU_LIBS) -ldl -o $@
$(GPU)/%.o: %.cpp Makefile
	$(COMPILE)
$(GPU)/%.o: %.cu Makefile
	$(COMPILE)
# Registers and spills of each kernel go into a report beside the object (dev/check_spills.sh reads it), all else is printed.
PTXAS_REPORT = ^ptxas info +: (Compiling|Function properties|Used|Compile time|[0-9]+ bytes)|^ +[0-9]+ bytes stack frame
$(GPU)/kernels/%.o: kernels/%.cu Makefile
	$(if $(FAST_MATH),$(error nvcc is asked for $(FAST_MATH): the kernels' numbers would differ, and nothing would say so (bits of saved runs, tolerances of tests). Take it out of NVCCFLAGS, NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS, in the environment too))
	$(OLD_CUDA)@mkdir -p $(@D)
	$(RUN_NVCC) $(ALL_NVCCFLAGS) -c $< -o $@ 2>$(@:.o=.ptxas); status=$$?; grep -vE '$(PTXAS_REPORT)' $(@:.o=.ptxas) >&2; exit $$status
endif
-include $(shell find build -name '*.d' 2>/dev/null)

# `make deps test` installs before it compiles tests and makes oracle files.
$(TESTS) $(CPU)/test_gca.o $(GPU_TESTS) build/oracle/made: | $(filter deps,$(MAKECMDGOALS))
DEPS = doctest-dev python3-numpy
deps:
	@if dpkg -s $(DEPS) >/dev/null 2>&1; then echo "$(DEPS): installed"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -q -y $(DEPS); \
	else echo "The tests need doctest (and numpy for the oracle). Install them with: sudo apt-get install $(DEPS)"; \
	  echo '#include <doctest/doctest.h>' | $(CXX) -x c++ -fsyntax-only -; fi

# Oracle files are made where there is numpy; the tests that read them say so where there is none.
# Where a GPU answers, the program of tests has the GPU's too.
HERE = $(if $(and $(NVCC),$(shell nvidia-smi -L 2>/dev/null)),gpu,cpu)
TEST_PROGRAM = $(if $(findstring gpu,$(HERE)),$(GPU),$(CPU))/test_gca
test: $(CPU)/train_gca $(if $(findstring gpu,$(HERE)),train_gca) $(TEST_PROGRAM) build/oracle/made
	TRAIN_GCA=$(CPU)/train_gca $(TEST_PROGRAM)

# Made once, and anew when the maker has changed: it takes seconds.
build/oracle/made: dev/make_oracle.py
	@mkdir -p $(@D) && rm -f $@ $(@D)/*.safetensors
	@for python in python3 /usr/bin/python3; do \
	  $$python -c 'import numpy' 2>/dev/null && { $$python $< --test-set $(@D) && touch $@; exit; }; done; \
	  echo "no python3 with numpy: no oracle files are made (make deps installs it)"

# What takes too long for every day.
test-long: test
	TRAIN_GCA=$(CPU)/train_gca $(TEST_PROGRAM) --no-skip --test-case="long: *"

PREFIX ?= /usr/local
install: all
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 train_gca '$(DESTDIR)$(PREFIX)/bin/train_gca'
uninstall:
	rm -f '$(DESTDIR)$(PREFIX)/bin/train_gca'

demo: $(CPU)/train_gca
	dev/demo.sh

# The same model in PyTorch (dev/drt_torch.py) is timed in the same call where PYTHON has torch.
PYTHON ?= python3
bench: $(CPU)/bench $(if $(findstring gpu,$(HERE)),$(GPU)/bench)
	$(CPU)/bench
	$(if $(findstring gpu,$(HERE)),$(GPU)/bench && $(GPU)/bench --op all --B 4 --C 260 --H 12 --F 2048 --V 50304 --layers 6 --dtype bf16 --check off)
	$(if $(findstring gpu,$(HERE)),$(GPU)/bench --ranks all)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) dev/bench_peer.py; else echo "$(PYTHON) has no torch (PYTHON= names one that has): only this program is timed"; fi

format:
	clang-format -i $$(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' ':!tokenizer/unicode_classes.h') # the last is generated

# Parsers on random bytes (clang's libFuzzer), linked with rooms of their own: build/fuzz/NAME -max_len=2000 FOLDER
fuzz: $(patsubst dev/fuzz/%.cpp,build/fuzz/%,$(wildcard dev/fuzz/*.cpp))
FUZZ_CXX = clang++ -fsanitize=$(1),address,undefined -fno-sanitize-recover=all -pthread
FUZZ_ROOMS = $(ROOMS:$(CPU)/%=build/fuzz/rooms/%)
build/fuzz/rooms/%.o: %.cpp Makefile
	@mkdir -p $(@D)
	$(call FUZZ_CXX,fuzzer-no-link) -std=c++20 -fopenmp-simd -Wall -Wextra -Wno-pass-failed -O1 -g -I. -MMD -MP -c $< -o $@
.PRECIOUS: build/fuzz/rooms/%.o
build/fuzz/%: build/fuzz/rooms/dev/fuzz/%.o $(FUZZ_ROOMS)
	$(call FUZZ_CXX,fuzzer) $^ -o $@

clean:
	rm -rf build train_gca

.PHONY: FORCE all cpu deps test test-long install uninstall demo bench format fuzz clean
.DELETE_ON_ERROR:
