"""Which backend runs: explicit choices run or raise, `auto` falls back and says so once."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from fastkd import relation_kl, use_backend
from fastkd.ops import backends

CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    return torch.randn(2, 5, 8), torch.randn(2, 5, 8), 2


@pytest.fixture
def no_cpp(monkeypatch):
    """A machine on which the compiled part was not built, and a log that has said nothing yet."""
    monkeypatch.setattr(backends, "cpu_library_missing", "the compiled part was not built; build it so")
    monkeypatch.setattr(backends, "_told", set())


def chosen(backend="auto", dtype=torch.float32, device=CPU):
    return backends.resolve("relation_kl", backend, device, dtype)


def test_auto_takes_the_compiled_kernel_where_it_is_built(monkeypatch):
    monkeypatch.setattr(backends, "cpu_library_missing", None)
    assert chosen() == "cpp"


def test_auto_falls_back_and_says_so_once(no_cpp, caplog):
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        assert chosen() == chosen() == "reference"
    (record,) = caplog.records
    assert "relation_kl on cpu falls back from cpp: the compiled part was not built; build it so" in record.message


def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(no_cpp, inputs):
    with pytest.raises(
        RuntimeError, match="backend='cpp' was asked for but cannot run: the compiled part was not built"
    ):
        relation_kl(*inputs, backend="cpp")
    with pytest.raises(RuntimeError, match="Triton kernel runs on CUDA devices, the tensors are on cpu"):
        relation_kl(*inputs, backend="triton")
    with pytest.raises(RuntimeError, match="CUDA kernel runs on CUDA devices, the tensors are on cpu"):
        relation_kl(*inputs, backend="cuda")


def test_double_precision_runs_on_the_reference(monkeypatch, inputs):
    monkeypatch.setattr(backends, "cpu_library_missing", None)
    student, teacher, heads = inputs
    assert chosen(dtype=torch.float64) == "reference"
    with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 and float16, not .*float64"):
        relation_kl(student.double(), teacher, heads, backend="cpp")
    with pytest.raises(RuntimeError, match="not torch"):
        relation_kl(student, teacher.double(), heads, backend="cpp")
    assert relation_kl(student, teacher.double(), heads).dtype == torch.float32


def test_use_backend_holds_inside_its_block_only(no_cpp, inputs):
    with use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was asked for"):
        relation_kl(*inputs)
    with use_backend("cpp"), use_backend("reference"):
        relation_kl(*inputs)
    with pytest.raises(KeyError), use_backend("cpp"):
        raise KeyError
    relation_kl(*inputs)


def test_the_argument_wins_over_use_backend(no_cpp, inputs):
    with use_backend("cpp"):
        relation_kl(*inputs, backend="reference")


def test_unknown_names_are_refused(inputs):
    with pytest.raises(ValueError, match="use_backend='fast' is not a backend; allowed are 'auto', 'reference'"):
        with use_backend("fast"):
            pass
    with pytest.raises(ValueError, match="backend='fast' is not a backend"):
        relation_kl(*inputs, backend="fast")


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        ("reference", "ran"),
        ("fast", "ValueError: FASTKD_BACKEND='fast' is not a backend"),
    ],
)
def test_the_environment_variable_chooses_for_the_whole_process(value, outcome):
    code = "import torch, fastkd; x = torch.randn(1, 3, 4); fastkd.relation_kl(x, x, 2); print('ran')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTKD_BACKEND": value}, capture_output=True, text=True
    )
    assert outcome in (done.stdout if outcome == "ran" else done.stderr)


def test_every_op_has_a_reference_for_every_device_and_dtype():
    for op in backends.registered_ops():
        for device in ("cpu", "cuda", "mps"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                assert backends.missing_reason(op, "reference", torch.device(device), dtype) is None
                assert backends.resolve(op, "reference", torch.device(device), dtype) == "reference"


def test_compile_guards_the_choice(inputs, no_cpp):
    """A function compiled under one choice must not go on with it under another."""
    student, teacher, heads = inputs
    compiled = torch.compile(lambda s, t: relation_kl(s, t, heads), backend="eager")
    with use_backend("reference"):
        compiled(student, teacher)
    with use_backend("triton"), pytest.raises(Exception, match="'triton' was asked for but cannot run"):
        compiled(student, teacher)
