"""What is compiled, and what happens where it is not: the package then works on its reference backend and says so."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, without anything that was built."""
    copy = tmp_path_factory.mktemp("tree") / "fastkd"
    for name in ("fastkd", "kernels", "benchmarks", "csrc", ".ci"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(tree, folder, **variables):
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, tree]
    finished = subprocess.run(
        list(map(str, command)), env={**os.environ, **variables}, capture_output=True, text=True, cwd=tree
    )
    return finished.returncode, finished.stdout + finished.stderr


def compiled_files(folder):
    (wheel,) = folder.glob("*.whl")
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".pyd"))]


NO_COMPILER = {"CXX": "no-such-compiler", "CC": "no-such-compiler"}


def test_without_a_compiler_the_package_is_built_pure_and_says_what_is_missing(tree, tmp_path):
    status, output = build(tree, tmp_path, FASTKD_BUILD="auto", **NO_COMPILER)
    assert status == 0, output[-3000:]
    assert "fastkd._cpu_default was not built" in output
    assert compiled_files(tmp_path) == []


def test_an_explicit_choice_fails_without_a_compiler(tree, tmp_path):
    status, output = build(tree, tmp_path, FASTKD_BUILD="cpu", **NO_COMPILER)
    assert status != 0
    assert "fastkd._cpu_default was not built" in output


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_cuda_fails_where_torch_is_built_without_it_and_says_so(tree, tmp_path):
    status, output = build(tree, tmp_path, FASTKD_BUILD="cuda")
    assert status != 0
    assert "FASTKD_BUILD=cuda: torch is built without CUDA" in output


def test_none_compiles_nothing(tree, tmp_path):
    status, output = build(tree, tmp_path, FASTKD_BUILD="none")
    assert status == 0, output[-3000:]
    assert compiled_files(tmp_path) == []


def test_an_unknown_choice_names_the_allowed_ones(tree, tmp_path):
    status, output = build(tree, tmp_path, FASTKD_BUILD="gpu")
    assert status != 0
    assert "FASTKD_BUILD='gpu'; allowed are auto, cpu, cuda, none" in output


WITHOUT_THE_COMPILED_PART = """
import logging, torch, fastkd
logging.basicConfig(format="%(message)s")
x = torch.randn(1, 5, 8)
fastkd.relation_kl(x, x, 2)
fastkd.relation_kl(x, x, 2)
try:
    fastkd.relation_kl(x, x, 2, backend="cpp")
except RuntimeError as error:
    print(error)
"""


def test_without_the_compiled_part_the_reference_runs_and_says_so_once(tree):
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_COMPILED_PART], env=environment, cwd=tree, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("relation_kl on cpu falls back from cpp: the compiled part") == 1
    assert "backend='cpp' was asked for but cannot run" in run.stdout
    assert "pip install --no-build-isolation -e ." in run.stdout
