"""What stands beside an exported file: NAME.onnx.json and its like. The fields are described in docs/edge.md."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

SCHEMA = 1
PARTS = ("embedding", "encoder", "head", "other")


@dataclass(frozen=True)
class Manifest:
    """What an exported file is, where it comes from, and how far it differs from torch.

    source: the folder name or hub id that was exported. source_digest: of its config and weights, by which two exports
    of one model know each other. inputs, outputs: names to shapes, with "batch" and "length" where they vary.
    verification: what `verify` found. bytes: by part, summing to the bytes of the files.
    parameters: {"stored": numbers in the files, "effective": numbers they stand for}.
    """

    format: str
    precision: str
    source: str
    source_digest: str
    task: str
    labels: list[str] | None
    pooling: dict | None
    inputs: dict[str, list]
    outputs: dict[str, list]
    max_length: int | None
    opset: int | None
    verification: dict
    bytes: dict[str, int]
    parameters: dict[str, int]
    versions: dict[str, str]
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def manifest_path(artifact: Path) -> Path:
    """NAME.onnx -> NAME.onnx.json."""
    return artifact.with_name(f"{artifact.name}.json")


def read_manifest(artifact: Path) -> Manifest | None:
    """The manifest beside an exported file, None where there is none. Raises ValueError on another schema version."""
    path = manifest_path(artifact)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema = found["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of an export ({error!r}); export the model again") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema version {schema}, this fastkd reads {SCHEMA}: export the model again")
    try:
        return Manifest(**found)
    except TypeError as error:
        raise ValueError(f"{path} is no manifest of schema version {SCHEMA} ({error}); export it again") from error
