# Two commands for everybody: `make demo` and `make test`. Each makes .venv, installs and compiles what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py .ci/constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

# OpenMP's threads spin while they wait; beside another busy program that made two threads 12 times slower than one.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/fastkd demo --out demo-out

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch comes first and the build is not isolated: the compiled part belongs to the torch that is installed.
$(STAMP): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c .ci/constraints.txt torch "setuptools>=77" wheel pybind11 ninja
	$(BIN)/pip install --quiet -c .ci/constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out fastkd/*.so
