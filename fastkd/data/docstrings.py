"""The embedded docstring task: which package does a sentence of documentation come from?

It needs no download: English sentences are taken from the docstrings of the standard library, NumPy, torch and
transformers as they are installed. Sources are parsed, never imported. The task is close to a bag of words (logistic
regression does as well as a small Transformer), so it proves machinery, not methods.

Three things would make it too easy and are prevented: package names in the text (masked), the same sentence twice
(dropped), and sentences of one module on both sides of the split (a random split leaks 4.5 points).
"""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import os
import platform
import re
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import datasets
import pandas as pd
from datasets import Dataset

from fastkd.data.tasks import Task

PACKAGES = ("python", "numpy", "torch", "transformers")
MASK = "PACKAGE"
_EXTRACTION = 1  # part of the cache's name: raise it with every change of what is extracted
_MAX_PER_CLASS, _MIN_TOTAL, _VALIDATION_SHARE = 6000, 8000, 0.2

_NAMES = re.compile(r"\b\w*(?:torch|numpy|transformer|hugging[ -]?face|python)\w*|\b(?:np|hf)\b", re.IGNORECASE)
_UNDERLINED = re.compile(r"^[^\n]*\n[-=~^*]{3,}[ ]*(?:\n|$)", re.MULTILINE)
_NOT_PROSE = re.compile(r"^(?:[@:*+•|#=~\\-]|\.\. |\d+[.)] )|```|>>>|::$|https?://|[{}\\|<>]", re.MULTILINE)
_MARKUP = re.compile(r"(?::[\w:]+:)?\[?`+[~!]?([^`]+)`+\]?_*|\*\*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo"}
_FUNCTION_WORDS = set(
    "a an and are as at be by can for from has if in is it not of on or that the this to was when which with".split()
)


def load_docstring_task(cache_dir: str | Path | None = None) -> Task:
    """The docstring task of the installed versions: four classes, at most 6,000 sentences each.

    The first call parses the sources (some seconds) and keeps the result as a parquet file whose name holds every
    version, so it is the same for the same versions.

    Args:
        cache_dir: where that file goes; by default beside the `datasets` library's caches.

    Raises:
        ValueError: a package is not installed, or fewer than 8,000 sentences are found (the counts are named).
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES[1:]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(f"the docstring task reads {', '.join(PACKAGES)}; {package} is not installed") from error
    folder = Path(datasets.config.HF_DATASETS_CACHE, "fastkd") if cache_dir is None else Path(cache_dir).expanduser()
    name = "-".join([f"docstrings-v{_EXTRACTION}", *(f"{package}{version}" for package, version in versions.items())])
    path = folder / f"{name}.parquet"
    if not path.exists():
        rows = _extract()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:  # so that no half-written file is ever found
            rows.to_parquet(Path(unfinished, path.name))
            os.replace(Path(unfinished, path.name), path)
    rows = pd.read_parquet(path)
    train, validation = (
        Dataset.from_pandas(rows[rows.split == split].drop(columns="split"), preserve_index=False)
        for split in ("train", "validation")
    )
    return Task(
        name="docstrings",
        train=train,
        validation=validation,
        text_columns=("sentence",),
        label_names=PACKAGES,
        metrics=("balanced_accuracy", "accuracy"),
        group_column="module",
    )


def sentences_of(docstring: str) -> Iterator[str]:
    """The English sentences of 5 to 40 words in a docstring, package names masked.

    Code, doctests, lists and parameter tables are left out.
    """
    prose = _UNDERLINED.sub("\n", inspect.cleandoc(docstring))
    for paragraph in re.split(r"\n\s*\n", prose):
        # Indented text is code or the description of a parameter.
        if re.search(r"^[ \t]", paragraph, re.MULTILINE) or _NOT_PROSE.search(paragraph):
            continue
        text = " ".join(_NAMES.sub(MASK, _MARKUP.sub(r"\1", paragraph)).split())
        for sentence in _SENTENCE_END.split(text):
            words = sentence.lower().split()
            plain = sum(word.strip(".,;:!?\"'()").isalpha() for word in words)
            if (
                5 <= len(words) <= 40
                and sentence[0].isupper()
                and sentence[-1] in ".!?"
                and plain >= 0.8 * len(words)
                and not _FUNCTION_WORDS.isdisjoint(words)
            ):
                yield sentence


def _extract() -> pd.DataFrame:
    """Columns sentence, label, module, split; in an order that depends on nothing but the sources."""
    keyed: list[tuple[str, tuple[str, int, str]]] = []
    owners: dict[str, set[int]] = {}
    for label, package in enumerate(PACKAGES):
        modules = _modules(package)
        found: dict[str, tuple[str, int, str]] = {}
        # An order of its own for the cap, else the validation modules, which have the smallest hashes, would fill it.
        for module in sorted(modules, key=lambda name: _uniform(f"cap {name}")):
            for docstring in _docstrings(modules[module]):
                for sentence in sentences_of(docstring):
                    found.setdefault(_without_digits_and_punctuation(sentence), (sentence, label, module))
            if len(found) >= _MAX_PER_CLASS:
                break
        for key, row in list(found.items())[:_MAX_PER_CLASS]:
            owners.setdefault(key, set()).add(label)
            keyed.append((key, row))
    # A sentence that two packages have in common has no right label.
    rows = [row for key, row in keyed if len(owners[key]) == 1]
    frame = pd.DataFrame(rows, columns=["sentence", "label", "module"])
    held_out = frame.module.map(lambda module: _uniform(f"split {module}") < _VALIDATION_SHARE)
    frame["split"] = held_out.map({True: "validation", False: "train"})
    counts = Counter(PACKAGES[label] for label in frame.label)
    if len(frame) < _MIN_TOTAL or len(frame.groupby(["label", "split"])) < 2 * len(PACKAGES):
        raise ValueError(
            f"the docstring task needs {_MIN_TOTAL} sentences and every package in both splits; the sources of the "
            f"installed packages hold {', '.join(f'{counts[package]} ({package})' for package in PACKAGES)}"
        )
    return frame


def _modules(package: str) -> dict[str, Path]:
    """Name (its path below the package's parent) to source file, of what pip or Python itself installed; no tests."""
    if package == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [
            path for name in sys.stdlib_module_names for path in (root / f"{name}.py", *(root / name).rglob("*.py"))
        ]
        named = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    else:
        installed = importlib.metadata.distribution(package)
        files = [file for file in installed.files or () if file.suffix == ".py" and file.parts[0] == package]
        named = {file.as_posix(): Path(str(installed.locate_file(file))) for file in files}
    return {name: path for name, path in named.items() if _SKIPPED_FOLDERS.isdisjoint(PurePosixPath(name).parts)}


def _docstrings(path: Path) -> Iterator[str]:
    source = path.read_bytes()
    # A third of transformers is generated from its modular files, whose docstrings it repeats.
    if (b'"""' not in source and b"'''" not in source) or b"automatically generated" in source[:1000]:
        return
    collecting = gc.isenabled()
    gc.disable()  # the collector takes most of the time of building a syntax tree, and finds nothing
    try:
        with warnings.catch_warnings():  # about escape sequences in other people's strings
            warnings.simplefilter("ignore")
            nodes: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):  # written for another Python, or a template
        return
    finally:
        if collecting:
            gc.enable()
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node, clean=False):
                yield text
            nodes.extend(reversed(node.body))


def _without_digits_and_punctuation(sentence: str) -> str:
    return " ".join(re.findall(r"[^\W\d_]+", sentence.lower()))


def _uniform(text: str) -> float:
    """A number in [0, 1) that is the same in every process, which `hash` is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
