# Every target sets itself up: `make env` builds .venv once, and again only when the files it is made from change.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.7.1
TRANSFORMERS ?= 5.24.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-torch-$(TORCH)-triton-$(TRITON)
SOURCES := pyproject.toml setup.py requirements.txt $(wildcard csrc/*.* csrc/cpu/*)

.DEFAULT_GOAL := help
.PHONY: help env demo test quick test-hf gpu tune check audit mutants soak fuzz format bench golden wheel clean

help: ## This list.
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## Virtual environment with pinned versions, and the compiled extension.

$(STAMP): $(SOURCES)
	@echo "setting up $(VENV): torch $(TORCH), triton $(TRITON) and pinned packages (one to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) triton==$(TRITON) -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.ready-* && touch $@

demo: env ## Pretrain on real digits, sample, complete, probe; writes runs/demo/report.html (minutes on 2 cores).
	@$(BIN)/igpt demo --out runs/demo

# One thread to a worker: two workers of two threads on two cores wait for each other's OpenMP teams, 5 times longer.
test: env ## All tests (twenty minutes on two slow cores).
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $${JOBS:-2} --dist worksteal --durations=25 --durations-min=5 tests
	@$(MAKE) --no-print-directory test-hf

# Neither what is marked slow, nor kernels in the interpreter (make test), nor documents, whose examples train models.
quick: env ## Most tests, for daily work (under 90 seconds on two idle cores; 140 on slow ones).
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $${JOBS:-2} --dist worksteal -m "not slow and not gpu" tests

# The environment has one release of transformers; models of the newest are swapped too.
test-hf: env ## Tests of swapped Hugging Face models with another release (TRANSFORMERS=5.24.0).
	@test -d $(VENV)/transformers-$(TRANSFORMERS) || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --target $(VENV)/transformers-$(TRANSFORMERS) transformers==$(TRANSFORMERS)
	@PYTHONPATH=$(VENV)/transformers-$(TRANSFORMERS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $${JOBS:-2} \
		tests/igpt/kernels/test_huggingface.py tests/igpt/kernels/test_huggingface_swaps.py

gpu: ## With a GPU and torch: build, kernel variants, tests, sanitizers (six minutes; PARTS="build bench summary"). Installs nothing.
	@PYTHONPATH=. $(PYTHON) -m tools.gpu $(if $(PARTS),--parts $(PARTS))

tune: ## On a machine with a GPU: time and verify candidate configurations, write the table of this device.
	@PYTHONPATH=. $(PYTHON) -m tools.tune

check: env ## Format, lint, types, spelling, words; imports point one way; commit messages say why.
	@$(BIN)/ruff format --check --quiet . || ($(BIN)/ruff format --diff --quiet .; exit 1)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/codespell
	@$(BIN)/python -m pytest -q tests/test_imports.py tests/test_words.py tests/test_commits.py
	@echo "format, lint, types, spelling, words, imports and commit messages are clean"

audit: env ## Compile every shipped kernel configuration without a GPU: registers, spills, tensor core instructions, predicted speed on sm_90.
	@$(BIN)/python -m tools.audit && $(BIN)/python -m tools.audit_cuda

# Needs a compiler only. The flags of the build where they touch numbers, and every check of memory and of arithmetic.
SANITIZE := -std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -Werror -ffp-contract=off -fno-omit-frame-pointer \
	-fsanitize=address,undefined -fno-sanitize-recover=all
CPU_KERNELS := $(addprefix csrc/cpu/,kernels.cpp portable.cpp avx2.cpp avx512.cpp)
FUZZ ?= build/fuzz
$(FUZZ): tests/csrc/fuzz.cpp $(wildcard csrc/*.h) csrc/palette.cpp
	@mkdir -p $(dir $@)
	@$${CXX:-c++} $(SANITIZE) tests/csrc/fuzz.cpp csrc/palette.cpp -o $@

$(FUZZ)_cpu: tests/csrc/fuzz_cpu.cpp $(wildcard csrc/cpu/*)
	@mkdir -p $(dir $@)
	@$${CXX:-c++} $(SANITIZE) tests/csrc/fuzz_cpu.cpp $(CPU_KERNELS) -o $@

soak: $(FUZZ) $(FUZZ)_cpu ## The C++ of csrc under sanitizers, fuzzed for twice SECONDS_OF_SOAK (default 150), another seed each day.
	@$(FUZZ) $${SECONDS_OF_SOAK:-150} $${SEED:-$$(date +%Y%m%d)000000}
	@$(FUZZ)_cpu $${SECONDS_OF_SOAK:-150} $${SEED:-$$(date +%Y%m%d)000000}

# Calls of public functions with wrong values; each refusal must name its argument in one line.
fuzz: env ## Public functions with wrong arguments, CALLS of them (default 20,000; the suite makes 1,600).
	@IGPT_FUZZ_CALLS=$${CALLS:-20000} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $${JOBS:-2} \
		tests/igpt_kernels/test_checks.py tests/igpt/model/test_arguments.py

mutants: env ## Break the kernels one line at a time; each break must be caught by a named test (minutes).
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

format: env ## Rewrite the sources in the project's format.
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

bench: env ## Benchmarks beside peers, each case checked before it is timed (under ten minutes on two cores; BENCH=--quick: one).
	@$(BIN)/python -m benchmarks $(BENCH)

golden: env ## Regenerate the golden data of the tests.
	@$(BIN)/python tests/golden/regenerate.py

wheel: env ## A wheel in dist/.
	@$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean: ## Remove what the other targets made, the environment included.
	rm -rf $(VENV) build dist *.egg-info igpt_kernels/*.so runs .mypy_cache .ruff_cache .pytest_cache
