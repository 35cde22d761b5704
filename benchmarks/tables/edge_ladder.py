"""The README's ladder from teacher to shipped file, and what exports are held against.

  python -m fastkd.benchmarks.tables.edge_ladder teacher=DIR student=DIR data=DIR [output_dir=DIR] [--parts ...]

ladder: `teacher` and `student` (both fine-tuned on SST-2, the student smaller), the student's table sparse-coded, then
  int8, step by step, with the accuracy of each.
bert: a 12 x 768 teacher against a 4 x 312 student, both of random weights: time and bytes, no accuracy.
same-encoder: the teacher's encoder in int8, with a dense and with a sparse-coded table.

Models and exports that are in output_dir are not made again; each part is measured anew, and its report is kept as
benchmarks/results/edge-PART.json. `--show` prints the tables of those. One thread, batch 1.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fastkd.edge import export, report
from fastkd.edge.report_schema import Report, Row, read_report, to_json
from fastkd.recipes import from_settings
from fastkd.recipes.sparse_embeddings import CompressEmbeddings

RESULTS = Path(__file__).parent.parent / "results"
PARTS = ("ladder", "bert", "same-encoder")
LENGTHS = (16, 32, 128)
_HEADINGS = {
    "ladder": ("accuracy", "95 % interval of the difference to the teacher"),
    "bert": (),
    "same-encoder": ("accuracy", "95 % interval of the difference to the teacher"),
}


@dataclasses.dataclass
class Sources:
    """What the command is given. keep, atoms, rows: of the sparse code, as in `fastkd compress-embeddings`."""

    teacher: str
    student: str
    data: str
    keep: float = 0.1
    atoms: int = 8
    rows: str = "fp16"
    output_dir: str = "runs/edge"


class Bench:
    """Makes what is missing, and measures."""

    def __init__(self, sources: Sources):
        self.sources, self.folder = sources, Path(sources.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)

    def compressed(self, model: str | Path, name: str) -> Path:
        out = self.folder / name
        if not out.is_dir():
            CompressEmbeddings(
                model=str(model), out=str(out), text=[], task="sst2", data=self.sources.data,
                keep=self.sources.keep, atoms=self.sources.atoms, rows=self.sources.rows,
            ).run()  # fmt: skip
        return out

    def exported(self, model: str | Path, name: str, *, int8: bool) -> Path:
        """An ONNX file in a folder of its own, because the files of two models do not mix."""
        out = self.folder / name / f"{name}.onnx"
        if not out.is_file():
            export(str(model), str(out), to="onnx", int8=int8)
        return out

    def random_bert(self, name: str, layers: int, width: int, ffn: int) -> Path:
        out = self.folder / name
        if not out.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(self.sources.teacher)
            torch.manual_seed(0)
            BertForSequenceClassification(
                BertConfig(
                    vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=width, num_attention_heads=12,
                    intermediate_size=ffn, num_labels=2,
                )
            ).save_pretrained(out)  # fmt: skip
            tokenizer.save_pretrained(out)
        return out

    def artifacts(self, part: str) -> list[Path | str]:
        teacher, student = self.sources.teacher, self.sources.student
        if part == "ladder":
            small = self.compressed(student, "student-sparse")
            return [
                teacher, student, small,
                self.exported(student, "student-fp32", int8=False),
                self.exported(student, "student-int8", int8=True),
                self.exported(small, "student-sparse-fp32", int8=False),
                self.exported(small, "student-sparse-int8", int8=True),
            ]  # fmt: skip
        if part == "bert":
            small = self.random_bert("bert-4x312", 4, 312, 1200)
            coded = self.compressed(small, "bert-4x312-sparse")
            return [
                self.random_bert("bert-12x768", 12, 768, 3072), small,
                self.exported(small, "bert-4x312-int8", int8=True),
                self.exported(coded, "bert-4x312-sparse-int8", int8=True),
            ]  # fmt: skip
        coded = self.compressed(teacher, "teacher-sparse")
        return [
            teacher,
            self.exported(teacher, "teacher-int8", int8=True),
            self.exported(coded, "teacher-sparse-int8", int8=True),
        ]

    def measure(self, part: str) -> None:
        artifacts, out = self.artifacts(part), self.folder / f"report-{part}"
        scored = {"task": "sst2", "data": self.sources.data} if _HEADINGS[part] else {}
        modes = ("eager", "compile", "int8") if part == "bert" else ("eager",)
        found = report(
            artifacts, out, overwrite=out.is_dir(), lengths=LENGTHS, batches=(1,), threads=(1,), modes=modes, **scored
        )
        (RESULTS / f"edge-{part}.json").write_text(to_json(published(found, self.sources)), encoding="utf-8")


def show(found: Report, part: str) -> str:
    """A part's table as Markdown."""
    headings = [
        "step",
        "bytes",
        "times smaller",
        *(f"p50 at {length}, ms" for length in LENGTHS),
        "times faster at 128",
    ]
    lines = [
        "| " + " | ".join([*headings, *_HEADINGS[part]]) + " |",
        "|---" * len([*headings, *_HEADINGS[part]]) + "|",
    ]
    for row in found.artifacts:
        total = row.bytes["total"]
        cells = [row.cell((1, length, 1)) for length in LENGTHS]
        times = [f"{cell.p50_ms:.2f}" if cell and cell.p50_ms else "failed" for cell in cells]
        faster = f"{cells[-1].speedup:.1f}" if cells[-1] and cells[-1].speedup else ""
        values = [
            _name(row),
            f"{total / 1e6:.1f} MB",
            f"{row.smaller:.1f}" if row.smaller else "",
            *times,
            faster,
        ]
        if _HEADINGS[part] and row.accuracy:
            against = row.accuracy.against_teacher
            values += [
                f"{100 * row.metric:.1f}",
                f"{against.low:+.1f} to {against.high:+.1f}" if against and against.low is not None else "",
            ]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _name(row: Row) -> str:
    stem = Path(row.path).stem
    return f"{stem}, torch {row.mode}" if row.mode else f"{stem}, {(row.runtime or row.format).split()[0]}"


def published(found: Report, sources: Sources) -> Report:
    """The report with what lies where on this machine left out."""
    given = {sources.teacher: "teacher", sources.student: "student"}
    settings = found.settings | {"artifacts": [given.get(a, Path(a).name) for a in found.settings["artifacts"]]}
    rows = [dataclasses.replace(row, path=given.get(row.path, Path(row.path).name)) for row in found.artifacts]
    return dataclasses.replace(found, settings=settings | {"data": None}, artifacts=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of: %(default)s")
    parser.add_argument("--show", action="store_true", help="print the tables of what was measured")
    options = parser.parse_intermixed_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {','.join(unknown)}; allowed are {', '.join(PARTS)}")
    if not options.show:
        words = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in options.settings)}
        bench = Bench(from_settings(Sources, words, "edge_ladder"))
        for part in parts:
            bench.measure(part)
    for part in parts:
        path = RESULTS / f"edge-{part}.json"
        print(f"\n{part}\n\n{show(read_report(path), part) if path.is_file() else 'not run'}")


if __name__ == "__main__":
    main()
