# make         the program, for the GPU too where there is an nvcc: ./train_gca
# make cpu     the program for the CPU alone: build/cpu/train_gca
# make deps    installs what the tests need, or says how
# make test    everything that this machine can run
# make test-long   and the tests that take minutes each
# make demo    teaches a small model to find needles, and shows what it fetches
# make bench   timings
# make format  clang-format over all sources
# SANITIZE: address,undefined or thread: a build of its own, for the CPU's tests (make test NVCC= SANITIZE=thread).
SANITIZE ?=
CPU = build/cpu$(if $(SANITIZE),-$(SANITIZE))
CXXFLAGS ?= $(if $(SANITIZE),-O1 -g -fsanitize=$(SANITIZE) -fno-sanitize-recover=all,-O3)
LDFLAGS += $(if $(SANITIZE),-fsanitize=$(SANITIZE))
# clang tells of each `omp simd` loop that it leaves as it is (those of double with e^x); g++ 12 warns of "a" + std::string() where the
# library inlines it (GCC bug 105651).
NO_WARNING = $(if $(findstring clang,$(CXX)),-Wcomma -Wno-implicit-int-float-conversion -Wno-pass-failed,-Wno-restrict)
ALL_CXXFLAGS = -std=c++20 -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra -Wconversion $(NO_WARNING) $(CXXFLAGS) -I. -MMD -MP -pthread $(if $(CI),-Werror)
TESTS = $(basename $(notdir $(filter-out dev/test/test_gpu%,$(wildcard dev/test/test_*.cpp))))
NVCC ?= $(shell command -v nvcc 2>/dev/null)

ifneq ($(NVCC),)
all: train_gca
else
all: cpu
	ln -sf build/cpu/train_gca train_gca
endif
cpu: $(CPU)/train_gca

$(CPU)/train_gca: $(CPU)/train_gca.o
$(CPU)/test_gca: $(CPU)/test_gca.o $(TESTS:%=$(CPU)/%.o)
$(CPU)/bench: $(CPU)/bench.o
$(CPU)/train_gca $(CPU)/test_gca $(CPU)/bench:
	$(CXX) $(LDFLAGS) -pthread $^ -o $@

# .cu files without kernels are plain C++.
$(CPU)/%.o: %.cu Makefile
	@mkdir -p $(@D)
	$(CXX) $(ALL_CXXFLAGS) -x c++ -c $< -o $@
$(CPU)/%.o: dev/%.cu Makefile
	@mkdir -p $(@D)
	$(CXX) $(ALL_CXXFLAGS) -x c++ -c $< -o $@
$(CPU)/%.o: dev/test/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(ALL_CXXFLAGS) -c $< -o $@

ifneq ($(NVCC),)
# ARCH: what the kernels are compiled for. The cards that answer; where none does, 80 and 90a. PTX of compute_80 is always there,
# so that every newer card starts.
ARCH ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | sed 's/^90$$/90a/' | grep -E '^[0-9]+a?$$'),80 90a)
CUDA = $(abspath $(dir $(NVCC))/..)
GENCODE = $(foreach a,$(ARCH),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80
NVCCFLAGS = -std=c++20 -O3 $(GENCODE) --compiler-options -Wall,-Wextra -I. -MMD -MP $(if $(CI),-Werror all-warnings)
KERNELS = $(patsubst kernels/%.cu,build/gpu/kernels/%.o,$(wildcard kernels/*.cu))
GPU_LIBS = -L$(CUDA)/lib64 -Wl,-rpath,$(CUDA)/lib64 -lcudart -lcublasLt

train_gca: build/gpu/train_gca.o $(KERNELS)
	$(CXX) $(LDFLAGS) -pthread $^ $(GPU_LIBS) -o $@
build/gpu/test_gca: $(CPU)/test_gca.o $(TESTS:%=$(CPU)/%.o) $(patsubst dev/test/%.cpp,build/gpu/%.o,$(wildcard dev/test/test_gpu*.cpp)) $(KERNELS)
	$(CXX) $(LDFLAGS) -pthread $^ $(GPU_LIBS) -o $@
build/gpu/bench: build/gpu/bench.o $(KERNELS)
	$(CXX) $(LDFLAGS) -pthread $^ $(GPU_LIBS) -o $@
build/gpu/%.o: %.cu Makefile
	@mkdir -p $(@D)
	$(CXX) $(ALL_CXXFLAGS) -DGCA_CUDA -isystem $(CUDA)/include -x c++ -c $< -o $@
build/gpu/%.o: dev/%.cu Makefile
	@mkdir -p $(@D)
	$(CXX) $(ALL_CXXFLAGS) -DGCA_CUDA -isystem $(CUDA)/include -x c++ -c $< -o $@
build/gpu/%.o: dev/test/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(ALL_CXXFLAGS) -DGCA_CUDA -isystem $(CUDA)/include -c $< -o $@
build/gpu/kernels/%.o: kernels/%.cu Makefile
	@mkdir -p $(@D)
	@echo "for: $(ARCH)"
	$(NVCC) $(NVCCFLAGS) -c $< -o $@
endif
-include $(wildcard build/*/*.d build/*/*/*.d)

DEPS = doctest-dev python3-numpy
deps:
	@if dpkg -s $(DEPS) >/dev/null 2>&1; then echo "$(DEPS): installed"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -q -y $(DEPS); \
	else echo "The tests need doctest (and numpy for the oracle). Install them with: sudo apt-get install $(DEPS)"; \
	  echo '#include <doctest/doctest.h>' | $(CXX) -x c++ -fsyntax-only -; fi

# Oracle files are made where there is numpy; the tests that read them say so where there is none.
# Where a GPU answers, the program of tests has the GPU's too.
HERE = $(if $(and $(NVCC),$(shell nvidia-smi -L 2>/dev/null)),gpu,cpu)
TEST_PROGRAM = $(if $(findstring gpu,$(HERE)),build/gpu,$(CPU))/test_gca
test: $(CPU)/train_gca $(if $(findstring gpu,$(HERE)),train_gca) $(TEST_PROGRAM)
	@mkdir -p build/oracle
	@for python in python3 /usr/bin/python3; do $$python -c 'import numpy' 2>/dev/null && exec $$python dev/make_oracle.py --test-set build/oracle; done; \
	  echo "no python3 with numpy: no oracle files are made (make deps installs it)"
	TRAIN_GCA=$(CPU)/train_gca $(TEST_PROGRAM)

# What takes too long for every day.
test-long: test
	TRAIN_GCA=$(CPU)/train_gca $(TEST_PROGRAM) --no-skip --test-case="long: *"

demo: $(CPU)/train_gca
	dev/demo.sh

# PEER: a folder with a PyTorch DRT (peer_drt.py), timed in the same call where PYTHON has torch.
PEER ?= ../shared/peer
PYTHON ?= python3
bench: $(CPU)/bench $(if $(findstring gpu,$(HERE)),build/gpu/bench build/gpu/test_gca)
	$(CPU)/bench
	$(if $(findstring gpu,$(HERE)),build/gpu/bench && build/gpu/test_gca --op all --B 4 --C 260 --H 12 --F 2048 --V 50304 --layers 6 --dtype bf16 --check off)
	@if [ -e $(PEER)/peer_drt.py ]; then $(PYTHON) dev/bench_peer.py $(PEER) || true; else echo "no PyTorch peer in $(PEER): only this program is timed"; fi

format:
	clang-format -i $$(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' ':!tokenizer/unicode_classes.h') # the last is generated

# Parsers on random bytes (clang's libFuzzer): build/fuzz/NAME -max_len=2000 FOLDER
fuzz: $(patsubst dev/fuzz/%.cpp,build/fuzz/%,$(wildcard dev/fuzz/*.cpp))
build/fuzz/%: dev/fuzz/%.cpp Makefile
	@mkdir -p $(@D)
	clang++ -std=c++20 -fopenmp-simd -Wall -Wextra -Wno-pass-failed -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I. -pthread -MMD -MP $< -o $@

clean:
	rm -rf build train_gca

.PHONY: all cpu deps test test-long demo bench format fuzz clean
.DELETE_ON_ERROR:
