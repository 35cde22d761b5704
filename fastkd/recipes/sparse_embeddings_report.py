"""What a compression did, in figures and on the terminal."""

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.embeddings.budget import Candidate, pareto_front, reconstruction_error
from fastkd.embeddings.code import SparseCode


def bytes_of(model: PreTrainedModel) -> int:
    """Bytes of a model's weights in the formats they are in."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def figures(
    model: PreTrainedModel, compressed: PreTrainedModel, code: SparseCode, counts: Tensor
) -> dict[str, int | float]:
    """Bytes of table and model before and after, errors, kept tokens, and the share of coded tokens in the text.

    model, compressed: in the formats in which they are stored.
    counts: (V,) how often each token stands in the text.
    """
    table = model.get_input_embeddings().weight.detach()
    coded = code.arrays.slot.to(torch.int64) >= code.num_kept
    return {
        "table_bytes_before": table.nbytes,
        "table_bytes_after": code.nbytes,
        "model_bytes_before": bytes_of(model),
        "model_bytes_after": bytes_of(compressed),
        "error_of_coded_rows": float(code.error.mean()),
        "error_in_text": reconstruction_error(table, code, counts),
        "tokens": code.num_embeddings,
        "kept_tokens": code.num_kept,
        "coded_share_of_text": float(counts[coded].sum() / counts.sum()),
    }


def show(found: dict, out: str) -> None:
    """Print what `figures` found, the bytes of the files, and the scores if there are any."""
    lines = Table.grid(padding=(0, 2))
    for what, name in (("table", "embedding table"), ("model", "whole model")):
        before, after = found[f"{what}_bytes_before"], found[f"{what}_bytes_after"]
        lines.add_row(name, f"{_megabytes(before)} -> {_megabytes(after)} MB, {before / after:.1f}x smaller")
    lines.add_row("files of weights", _files(found["file_bytes_before"], found["file_bytes_after"]))
    lines.add_row("tokens kept whole", f"{found['kept_tokens']:,} of {found['tokens']:,}")
    lines.add_row("coded tokens", f"{found['coded_share_of_text']:.1%} of the text")
    lines.add_row(
        "reconstruction error",
        f"{found['error_of_coded_rows']:.3f} of a coded row's norm (mean), {found['error_in_text']:.3f} over the text",
    )
    if "metric" in found:
        before, after = 100 * found["score_before"], 100 * found["score_after"]
        lines.add_row(f"{found['metric']}, held out", f"{before:.2f} -> {after:.2f} ({after - before:+.2f} points)")
    lines.add_row("written to", out)
    Console().print(lines)


def show_densified(before: int, after: int, file_before: int, file_after: int, out: str) -> None:
    """Print what going back to a dense table cost, in bytes of weights and of the files that hold them."""
    lines = Table.grid(padding=(0, 2))
    lines.add_row("whole model", f"{_megabytes(before)} MB compressed, {_megabytes(after)} MB dense")
    lines.add_row("files of weights", _files(file_before, file_after))
    lines.add_row("written to", f"{out}; it loads without fastkd")
    Console().print(lines)


def show_front(candidates: list[Candidate], chosen: Candidate, metric: str | None) -> None:
    """Print the Pareto front; quality is `metric`, or where that is None minus the error over the text."""
    front = pareto_front(candidates)
    table = Table(box=box.SIMPLE, title=f"Pareto front of {len(candidates)} codes")
    for column in ("", "kept %", "atoms", "residual", "rows, weights", "MB", metric or "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for candidate in front:
        of = candidate.setting
        table.add_row(
            "->" if candidate is chosen else "",
            f"{100 * of['keep']:g}",
            str(of["atoms"]),
            str(of["residual_bytes"]),
            f"{of['rows']}, {of['weights']}",
            _megabytes(candidate.nbytes),
            f"{100 * candidate.quality:.2f}" if metric else f"{-candidate.quality:.3f}",
        )
    Console().print(table)


def _files(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} bytes on disk" if before else f"{after:,} bytes on disk"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g}" if nbytes < 1e8 else f"{nbytes / 1e6:.0f}"
