"""The demo's figures. Drawn without pyplot, so that nothing global is touched and no display is needed."""

from pathlib import Path

from matplotlib.figure import Figure

_DPI = 120


def plot_losses(logs: dict[str, list[dict]], path: Path) -> None:
    """Every logged loss term over optimizer steps, one panel for each of the three steps of ARC.

    logs: by training ("teacher", "stage A", "stage B", "labels only"), a Trainer's `state.log_history`.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, ("teacher", "stage A", "stage B"), strict=True):
        for term in _terms(logs[name]):
            axes.plot(*_series(logs[name], term), label=term.removeprefix("loss_"))
        axes.set(title=name, xlabel="step", ylabel="relation KL" if name == "stage A" else "cross-entropy")
    panels[2].plot(*_series(logs["labels only"], "loss_task"), color="0.6", label="task, labels only", zorder=0)
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=_DPI)


def plot_replacement(log: list[dict], path: Path) -> None:
    """Nominal and effective replacement rate over the steps of stage B, and the share of layers that was drawn."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_series(log, "rate_drawn"), ".", color="0.6", label="drawn, mean since the last log")
    axes.plot(*_series(log, "rate_effective"), label="effective (an empty draw is repeated)")
    axes.plot(*_series(log, "rate_nominal"), "--", label="nominal")
    axes.set(xlabel="step", ylabel="replacement rate", ylim=(0, 1.05))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=_DPI)


def plot_accuracy_latency(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Balanced accuracy with one standard error against the median latency of one sentence, for each model."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, of in figures.items():
        axes.errorbar(
            of["latency_ms"],
            100 * of["balanced_accuracy"],
            yerr=100 * of["standard_error"],
            fmt="o",
            capsize=3,
            label=name,
        )
    axes.set(xlabel="p50 latency of one sentence, one thread (ms)", ylabel="balanced accuracy (%)")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=_DPI)


def _terms(log: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for entry in log for key in entry if key.startswith("loss_")))


def _series(log: list[dict], key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]
