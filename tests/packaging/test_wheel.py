"""A wheel built from the tree works where the tree is not: in a fresh environment, from another folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SMOKE = """
import importlib.resources, pathlib, sys
import fastkd, fastkd.kernels, fastkd.info, torch
from fastkd.ops import backends

package = pathlib.Path(fastkd.__file__).parent
assert package.is_relative_to(sys.prefix), f"fastkd came from {package}, not from the wheel"
assert pathlib.Path(fastkd.kernels.__file__).parent == package / "kernels"
assert any(file.name.endswith(".yaml") for file in importlib.resources.files("fastkd.recipes").iterdir())

student, teacher = torch.randn(2, 70, 32, requires_grad=True), torch.randn(2, 70, 48)
if backends.cpu_library_missing is None:
    loss = fastkd.relation_kl(student, teacher, 4, backend="cpp")
    loss.backward()
    assert torch.allclose(loss, fastkd.relation_kl(student.detach(), teacher, 4, backend="reference"), atol=1e-5)
    assert student.grad.abs().max() > 0
print(fastkd.info.report())
print("library:", backends.cpu_library)
"""


def run(*command, **options):
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # The objects of the installation lie in build/objects: nothing is compiled a second time.
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python_of_a_fresh_environment(wheel, tmp_path_factory):
    """Only the wheel is installed; fastkd's dependencies come from the running interpreter's packages."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # Of a folder added by a .pth file, the .pth files are not read: an editable fastkd there stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_works_from_another_folder(python_of_a_fresh_environment, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    output = run(python_of_a_fresh_environment, "-c", SMOKE, cwd=tmp_path, env=environment)
    assert "relation_kl on cpu" in output


def test_the_wheel_holds_the_same_libraries_as_this_installation(wheel):
    from fastkd.ops import backends

    if backends.cpu_library_missing is not None:
        pytest.skip(backends.cpu_library_missing)
    from fastkd import _build

    names = zipfile.ZipFile(wheel).namelist()
    for library in _build.cpu_libraries:
        assert any(name.startswith(f"fastkd/_cpu_{library}.") for name in names), f"{library} is not in the wheel"
    assert any(name.startswith("fastkd/_build.") for name in names)


@pytest.mark.parametrize(
    "name", ["fastkd/kernels/__init__.py", "fastkd/benchmarks/__init__.py", "fastkd/ops/backends.py"]
)
def test_the_wheel_holds_every_room(wheel, name):
    assert name in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_every_python_file_and_recipe_of_the_tree(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in (("fastkd", "fastkd"), ("kernels", "fastkd/kernels"), ("benchmarks", "fastkd/benchmarks")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml") and "results" not in path.parts:
                expected = f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
                assert expected in names, f"{expected} is not in the wheel: is its folder listed in pyproject.toml?"
