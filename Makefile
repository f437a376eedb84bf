# Everything from a fresh machine with Python >= 3.11:
#
#   make demo        install what running needs, then tools/demo.py
#   make test        install with the developers' tools, lint, quick tests
#   make test-slow   the long tests
#   make test-oldest the quick tests on the oldest versions that pyproject.toml promises
#   make bench       every benchmark that this machine can run
#   make lint | venv | clean
#
# PYTHON=python3.12        the interpreter .venv is made with
# HEPTAPOD_CUDA=0          leave the CUDA operators out although nvcc is there
# TORCH_INDEX=URL          another package index for torch, such as
#                          https://download.pytorch.org/whl/cpu (smaller, no GPU)
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# One thread each, as the tests' tensors are small; a process more than there are cores, as some
# tests wait for others' processes.
CORES := $(shell nproc 2>/dev/null || echo 2)
WORKERS := $(shell n=$$(( $(CORES) + 1 )); echo $$(( n < 8 ? n : 8 )))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
QUIET := -qq --disable-pip-version-check
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
SAY := printf '\n== %s\n'

.PHONY: venv demo test test-slow test-oldest tests-alone bench lint clean

venv: $(VENV)/.dev
demo: $(VENV)/.core
	@$(BIN)/python tools/demo.py
test: lint tests-alone
tests-alone: $(VENV)/.dev
	$(PYTEST) -m "not slow" tests
# TORCH_INDEX spares the download of CUDA: the index of torch 2.11 has CPU builds of their own.
test-oldest:
	@$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt tests-alone
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow tests
bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench/ --benchmark-only
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
clean:
	rm -rf .venv .venv-oldest build heptapod_fast/*.so heptapod_fast/_build_note.txt *.egg-info

# The stamps below say what is done already; a second run of any target installs nothing.
$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python >= 3.11" \
	  "or say which: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "Python %d.%d is too old, 3.11 is needed: make PYTHON=/path/to/python3.12" % v[:2])'
	@$(SAY) "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(CONSTRAINTS) $(VENV)/.python
	@$(SAY) "Installing torch $$(sed -n 's/^torch==//p' $(CONSTRAINTS)) (the largest download)"
	@$(PIP) install $(QUIET) -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(SAY) "Installing the build tools"
	@$(PIP) install $(QUIET) "setuptools>=64" wheel
	@command -v cmake >/dev/null || $(PIP) install $(QUIET) cmake ninja || \
	  echo "CMake could not be installed: the compiled operators will be left out"
	@touch $@

$(VENV)/.core: $(VENV)/.torch $(BUILD_FILES)
	@$(SAY) "Installing heptapod_fast and compiling its operators (about a minute)"
	@$(PIP) install $(QUIET) -c $(CONSTRAINTS) --no-build-isolation -e .
	@$(BIN)/python -c 'from heptapod_fast.ops import library; print(library.status())'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(SAY) "Installing the developers' tools"
	@$(PIP) install $(QUIET) -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	@touch $@
