# make demo   train, extract and analyse on real images; ends with demo/report.html
# make test   lint, then all tests: what a change must pass
#
# Both make a virtual environment and install what they need into it. To be overridden on the command line:
#   PYTHON=python3.12     the interpreter, 3.11 or later
#   TORCH=torch           what pip is asked for, for example another version of torch
#   VENV=elsewhere        folder of the virtual environment
#   PYTEST_ARGS="-k zones"   or "-m 'not slow'", which takes some minutes
#   TEST_JOBS=1           test files at a time; default: processors, at most 8
#   DEMO_ARGS="--help"    options of `rnndyn demo`

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
TEST_JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet --quiet
STAMPS := $(VENV)/.stamps
# What the native module is built from. Python files are not: the install is editable, so they are used where they lie.
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
# One stamp per requirement, so that `make test TORCH=...` installs what it says. (A target's name must not hold a "=".)
TORCH_STAMP := $(STAMPS)/torch-$(shell printf %s '$(TORCH)' | cksum | cut -d ' ' -f 1)

.PHONY: help demo test lint format bench docs clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(STAMPS)/cli
	@if [ -f demo/report.html ] && [ -z '$(DEMO_ARGS)' ]; then \
	  echo "The demo has been run; make demo DEMO_ARGS=--overwrite runs it anew"; \
	else \
	  sh scripts/fashion_mnist.sh && $(BIN)/rnndyn demo --out demo $(DEMO_ARGS); \
	fi
	@sh scripts/show_report.sh demo/report.html

# Files run side by side, each with one thread (tests of threads set their number); the longest begin first (tests/conftest.py).
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

# All of them, so that one run shows all there is to mend.
lint: $(STAMPS)/test
	@status=0; \
	for command in 'ruff check .' 'ruff format --check .' 'mypy' 'clang-format --dry-run -Werror $(CXX_FILES)'; do \
	  echo "$${command%% csrc/*}"; $(BIN)/$$command || status=1; \
	done; \
	exit $$status

format: $(STAMPS)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The machine should have nothing else to do meanwhile.
bench: $(STAMPS)/test
	sh scripts/bench.sh $(BIN)/python
	$(BIN)/python scripts/benchmark_tables.py --update README.md docs/kernels.md docs/training.md docs/benchmarks.md

# Warnings are errors (mkdocs.yml). The site is in build/site.
docs: $(STAMPS)/docs
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf build $(VENV)

$(STAMPS)/venv:
	@sh scripts/system.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# The API reference is read from the sources: nothing needs to be compiled for it.
$(STAMPS)/docs: $(STAMPS)/venv pyproject.toml
	@$(PIP) install 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26'
	@touch $@

# First and alone: with torch in place nothing else pulls another build of it (and CUDA with it) in.
$(TORCH_STAMP): $(STAMPS)/venv
	@echo "Installing $(TORCH) (some minutes the first time)"
	@$(PIP) install '$(TORCH)'
	@rm -f $(STAMPS)/torch-*
	@touch $@

# Build requirements are installed by hand because an editable install with build isolation would leave a build folder whose
# CMake cache points into a folder that is gone.
$(STAMPS)/build: $(TORCH_STAMP)
	@$(PIP) install 'scikit-build-core>=0.10' 'pybind11>=2.13' cmake ninja
	@touch $@

# Editable, so that what is imported has its native module beside it wherever Python is started, the repository's root included.
$(STAMPS)/cli: $(STAMPS)/build $(NATIVE)
	@echo "Installing rnndyn-fast (compiles the native core: some minutes the first time)"
	@$(PIP) install --no-build-isolation --editable '.[cli]'
	@touch $@

$(STAMPS)/test: $(STAMPS)/build $(NATIVE)
	@echo "Installing rnndyn-fast with what its tests need (compiles the native core: some minutes the first time)"
	@$(PIP) install --no-build-isolation --editable '.[test,lint]'
	@touch $@ $(STAMPS)/cli
