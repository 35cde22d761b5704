"""What every test starts from: an installed fastkd, fixed seeds, reproducible property tests."""

import os

import pytest

try:
    import fastkd.kernels  # noqa: F401  looked for by importing it
except ModuleNotFoundError as error:
    # kernels/ and benchmarks/ are mapped into the package by its metadata: a bare checkout lacks them.
    raise pytest.UsageError(
        f"fastkd is not installed ({error}); run `make test`, or `pip install --no-build-isolation -e '.[dev]'`"
    ) from error

import torch
from hypothesis import settings

# Property tests draw the same examples on every machine, and a slow machine is no failure.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fixed")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
