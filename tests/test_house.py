"""The house keeps its order: one file per op and room, imports one way, files of one idea, names that say something."""

import ast
import re
import sys
from pathlib import Path

import pytest

from fastkd.ops import backends

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for room in ("fastkd", "kernels", "benchmarks", "csrc", "tests")
    for path in (ROOT / room).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]

# Where an op's files stand; their name is the op's name. A compiled backend adds a room.
ROOMS_OF_AN_OP = ("fastkd/ops/{}.py", "tests/ops/test_{}.py", "benchmarks/kernels/{}.py")
ROOM_OF_A_BACKEND = {"cpp": "csrc/cpu/{}.cpp", "triton": "kernels/{}.py", "cuda": "csrc/cuda/{}.cu"}

# Left to right: a room imports only rooms further right. Rooms that share a place do not import each other.
ORDER = (
    ("cli",),
    ("edge",),
    ("recipes",),
    ("data", "models", "embeddings", "explain"),
    ("losses",),
    ("ops",),
    ("kernels",),
)
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str | None:
    """The room a library file belongs to; None for fastkd's own top level, which stands before them all."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if parts[0] == "fastkd" and len(parts) > 2 else None


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, relative ones resolved from where it is installed."""
    parts = path.relative_to(ROOT).parts
    package = list(parts[:-1]) if parts[0] == "fastkd" else ["fastkd", *parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("op", backends.registered_ops())
def test_an_op_has_its_file_in_every_room(op):
    kernels = [ROOM_OF_A_BACKEND[name] for name in backends.registered_backends(op) if name in ROOM_OF_A_BACKEND]
    missing = [room.format(op) for room in (*ROOMS_OF_AN_OP, *kernels) if not (ROOT / room.format(op)).exists()]
    assert not missing, f"{op} lacks {', '.join(missing)}"


@pytest.mark.parametrize("room", ["kernels", "benchmarks/kernels", "csrc/cpu", "csrc/cuda"])
def test_a_kernel_belongs_to_a_registered_op(room):
    """Pieces that several files share are headers or carry a leading underscore."""
    stems = {path.stem for path in (ROOT / room).iterdir() if path.suffix in {".py", ".cpp", ".cu"}}
    strangers = {stem for stem in stems if not stem.startswith("_")} - set(backends.registered_ops())
    assert not strangers, f"{room} holds {strangers}, which fastkd.ops does not register"


LIBRARY = [path for path in PYTHON if room_of(path) in PLACE]


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_a_room_imports_only_rooms_further_right(path):
    room = room_of(path)
    imported = {module.split(".")[1] for module in imports_of(path) if module.startswith("fastkd.")} & set(PLACE)
    wrong = {other for other in imported if other != room and PLACE[other] <= PLACE[room]}
    assert not wrong, f"{name_of(path)} (in {room}) imports {sorted(wrong)}"


def test_every_room_has_its_place():
    rooms = {path.name for path in (ROOT / "fastkd").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(PLACE), f"{sorted(rooms - set(PLACE))} stand in no order"


@pytest.mark.parametrize(
    "path", [path for path in LIBRARY if room_of(path) in ("losses", "ops", "kernels")], ids=name_of
)
def test_losses_ops_and_kernels_know_no_transformers(path):
    roots = {module.split(".")[0] for module in imports_of(path)}
    assert not roots & {"transformers", "datasets", "accelerate"}


@pytest.mark.parametrize("path", [path for path in LIBRARY if room_of(path) == "kernels"], ids=name_of)
def test_kernels_import_relatively_and_nothing_but_torch_and_triton(path):
    """So that they can be shipped alone, and are never loaded a second time as a top-level `kernels`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} | {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level
    }
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    assert not {module for module in absolute if module.split(".")[0] not in allowed}


def test_the_kernels_package_is_empty():
    """Other libraries probe for a package called `kernels` by importing it."""
    tree = ast.parse((ROOT / "kernels/__init__.py").read_text(encoding="utf-8"))
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body)


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nobody_imports_a_bare_kernels_or_benchmarks(path):
    assert not {module for module in imports_of(path) if module.split(".")[0] in ("kernels", "benchmarks")}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_one_idea_on_a_few_screens(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{name_of(path)} has {lines} lines"


VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "stuff", "tools", "base"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_say_what_a_file_is_for(path):
    names = {part for name in path.relative_to(ROOT).parts for part in re.split(r"[_.]", name)}
    assert not names & VAGUE


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_path_of_one_machine_stands_in_a_source(path):
    found = re.findall(r"/(?:home|root|Users|work|mnt)/\w+", path.read_text(encoding="utf-8"))
    assert not found, f"{name_of(path)} names {found}"
