"""The rows of a report: what an artifact is before it has run, and how its figures compare with the other rows'."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastkd.edge.artifact import Artifact
from fastkd.edge.report_schema import Row


def rows_of(paths: Sequence[str], artifacts: Sequence[Artifact], modes: Sequence[str]) -> list[Row]:
    """A row for each file, and one for each folder and mode; the teacher's first is eager.

    Raises ValueError on an artifact that is given twice.
    """
    twice = [path for path, count in Counter(artifact.path.resolve() for artifact in artifacts).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0].name} is given twice")
    names = _names(paths)
    rows = []
    for i, (path, artifact) in enumerate(zip(paths, artifacts, strict=True)):
        asked = list(modes) if artifact.format == "torch" else [None]
        if i == 0 and artifact.format == "torch":
            asked = ["eager", *(mode for mode in modes if mode != "eager")]
        rows += [_row(names[i], path, artifact, mode) for mode in asked]
    for row in rows:
        row.fp32 = _own_fp32(row, rows, dict(zip(paths, artifacts, strict=True)))
        row.smaller = rows[0].bytes["total"] / row.bytes["total"]
    return rows


def digest(artifact: Artifact) -> str:
    """SHA-256 over the files of weights and graph."""
    found = hashlib.sha256()
    for path in artifact.files():
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def fill_speedups(rows: Sequence[Row]) -> None:
    """The teacher's p50 over each row's, cell by cell."""
    for row in rows:
        for cell in row.cells:
            teacher = rows[0].cell(cell.key)
            if cell.p50_ms and teacher.p50_ms:
                cell.speedup = teacher.p50_ms / cell.p50_ms


def _row(name: str, path: str, artifact: Artifact, mode: str | None) -> Row:
    stored, effective = artifact.parameters()
    return Row(
        name=name if mode in (None, "eager") else f"{name} ({mode})",
        path=path,
        format=artifact.format,
        precision="int8" if mode == "int8" else artifact.precision,
        mode=mode,
        sha256=digest(artifact),
        bytes={"total": artifact.nbytes, **artifact.bytes_by_part()},
        smaller=None,
        parameters={"stored": stored, "effective": effective},
        verification=None if artifact.manifest is None else artifact.manifest.verification,
    )


def _names(paths: Sequence[str]) -> list[str]:
    """Last parts of the paths, or the paths where two end alike."""
    last = [Path(path).expanduser().resolve().name for path in paths]
    return [path if last.count(name) > 1 else name for name, path in zip(last, paths, strict=True)]


def _own_fp32(row: Row, rows: Sequence[Row], artifacts: dict[str, Artifact]) -> str | None:
    """The row of the same model in fp32: of the same format and source, or the folder that was exported."""
    if row.precision == "fp32":
        return None
    manifest = artifacts[row.path].manifest
    for other in sorted(rows, key=lambda other: other.format != row.format):
        if other.precision != "fp32" or other.mode not in (None, "eager"):
            continue
        of_other = artifacts[other.path].manifest
        same_folder = other.path == row.path
        exported_here = manifest is not None and of_other is None and _is_source(manifest.source, artifacts[other.path])
        same_source = manifest is not None and of_other is not None and manifest.source_digest == of_other.source_digest
        if same_folder or exported_here or same_source:
            return other.name
    return None


def _is_source(source: str, artifact: Artifact) -> bool:
    return artifact.format == "torch" and artifact.path.resolve().name == Path(source).name
