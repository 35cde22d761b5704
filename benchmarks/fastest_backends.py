"""The order of an op's backends by replay, for each class that fastkd/ops/fastest.py has an entry for."""

from collections import defaultdict
from statistics import geometric_mean

from fastkd.ops.fastest import LENGTHS, WIDTHS


def orders_by_replay(rows: list[dict]) -> list[str]:
    """One sentence per class, the fastest backend first, by the geometric mean over the cases that fall into it.

    Counted are the cases in which every backend that was replayed in the class was replayed.
    """
    classes = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["role"] == "fastkd" and row.get("width") is not None and "replay_ms" in row:
            bounds = _bound(row["width"], WIDTHS), _bound(row["length"], LENGTHS)
            case = classes[row["op"], row["dtype"], *bounds][tuple(row["shape"].items())]
            case[row["provider"].removeprefix("fastkd ")] = row["replay_ms"]
    sentences = []
    for (op, dtype, width, length), cases in classes.items():
        backends = set().union(*cases.values())
        complete = [case for case in cases.values() if backends <= set(case)]
        if complete:
            means = {name: geometric_mean(case[name] for case in complete) for name in backends}
            order = ", ".join(f"{name} {means[name]:.3g} ms" for name in sorted(means, key=means.get))
            sentences.append(f"{op}, {dtype}, width ≤ {width}, length ≤ {length}: {order} (cases: {len(complete)})")
    return sentences


def _bound(size: int, bounds: tuple[int, ...]) -> int:
    """Beyond the last class the last one counts."""
    return next((bound for bound in bounds if size <= bound), bounds[-1])
