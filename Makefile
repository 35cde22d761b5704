# Two commands for everybody: `make demo` and `make test`. Each makes .venv, installs and compiles what it needs. `make gpu`
# is for machines with a CUDA device.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py .ci/constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

# OpenMP's threads spin while they wait; beside another busy program that made two threads 12 times slower than one.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint clean gpu gpu-build gpu-test gpu-sanitize gpu-bench

demo: $(STAMP)
	$(BIN)/fastkd demo --out demo-out

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Each step takes less than ten minutes and can be run alone. `make gpu PYTHON=python3` builds into that interpreter's
# environment, which must hold torch and what the tests need, and asks no package index; without PYTHON it is .venv.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
gpu-build: $(STAMP)
endif
GPU_JOBS ?= 8
GPU_SHAPES ?= small
GPU_OPS ?= relation_kl sparse_embedding cos_nce attribution_distance
GPU_RECIPES ?= arc egkd
SANITIZED := tests/ops/test_relation_kl.py tests/ops/test_sparse_embedding.py tests/ops/test_cos_nce.py \
  tests/ops/test_attribution_distance.py \
  -k "cuda and not reference and (both_operands or peaked or differ_in_dtype or storage_format or any_mask)"

gpu: gpu-build gpu-test gpu-sanitize gpu-bench

gpu-build:
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu: torch sees no CUDA device')"
	FASTKD_BUILD=cuda $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -m fastkd.info

gpu-test: gpu-build
	$(GPU_PYTHON) -m pytest -m gpu -n $(GPU_JOBS) tests

# memcheck finds what lies outside an allocation, so torch must not keep its own; racecheck finds a missing barrier.
gpu-sanitize: gpu-build
	@command -v compute-sanitizer > /dev/null || echo "make gpu: no compute-sanitizer here, this step is left out"
	! command -v compute-sanitizer > /dev/null || PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
	  --error-exitcode 1 $(GPU_PYTHON) -m pytest -p no:xdist $(SANITIZED)
	! command -v compute-sanitizer > /dev/null || compute-sanitizer --tool racecheck \
	  --error-exitcode 1 $(GPU_PYTHON) -m pytest -p no:xdist $(SANITIZED) --maxfail 1

# The steps before have left a load average behind: --anyway, which the results record. The bench of all ops and recipes
# takes longer than ten minutes; GPU_OPS=relation_kl GPU_RECIPES= runs a part.
gpu-bench: gpu-build
	for op in $(GPU_OPS); do $(GPU_PYTHON) -m fastkd.cli bench kernels --op $$op --device cuda --shapes $(GPU_SHAPES) \
	  --anyway --out benchmarks/results || exit 1; done
	for recipe in $(GPU_RECIPES); do $(GPU_PYTHON) -m fastkd.cli bench step --recipe $$recipe --device cuda --anyway \
	  --out benchmarks/results || exit 1; done

# torch comes first and the build is not isolated: the compiled part belongs to the torch that is installed.
$(STAMP): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c .ci/constraints.txt torch "setuptools>=77" wheel pybind11 ninja
	$(BIN)/pip install --quiet -c .ci/constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out fastkd/*.so
