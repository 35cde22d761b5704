"""`python -m fastkd.info` answers what a user who reports a problem is asked."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd.info import report
from fastkd.ops import backends


def facts(text):
    """The report with its columns one space apart."""
    return re.sub(" +", " ", text)


def test_it_runs_as_a_module(tmp_path):
    run = subprocess.run([sys.executable, "-m", "fastkd.info"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"fastkd {fastkd.__version__}" in facts(run.stdout)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_it_names_the_versions(package):
    assert f"{package} {importlib.metadata.version(package)}" in facts(report())


def test_it_says_which_library_serves_the_cpu():
    assert (backends.cpu_library or backends.cpu_library_missing) in report()


def test_it_says_which_backend_each_op_uses_and_why_not_the_others():
    text = facts(report())
    chosen = backends.resolve("relation_kl", "auto", torch.device("cpu"), torch.float32)
    assert f"relation_kl on cpu {chosen} for float32" in text
    assert "not triton: the Triton kernel runs on CUDA devices" in text
    assert "not cpp: the C++ kernel takes float32, bfloat16 and float16, not torch.float64" in text


def test_it_says_why_the_compiled_part_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "cpu_library", None)
    monkeypatch.setattr(backends, "cpu_library_missing", "the compiled part was not built; build it so")
    text = facts(report())
    assert "not cpp: the compiled part was not built; build it so" in text
    assert "relation_kl on cpu reference for float32" in text


def test_a_package_that_is_not_installed_is_named_so(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "triton not installed" in facts(report())


def test_a_name_and_its_value_never_touch():
    assert all(re.search(r"\S {2,}\S", line) for line in report().splitlines() if not line.startswith(" "))
