"""One rank of a group over gloo, for test_cos_nce_processes.py: RANK PROCESSES FOLDER.

Computes the losses and gradients of its share of every case in FOLDER/cases.pt, and leaves them in FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastkd import cos_nce


def main(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=processes)
    found = []
    for case in torch.load(folder / "cases.pt"):
        rows, dim = case["rows"][rank], case["dim"]
        student = case["student"].narrow(dim, *rows).requires_grad_()
        options = {name: case[name].narrow(0, *rows) for name in ("mask", "exclude") if case[name] is not None}
        loss = cos_nce(
            student, case["teacher"].narrow(dim, *rows), tokens=case["tokens"], group=dist.group.WORLD,
            reduction=case["reduction"], **options,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss.sum(), student)
        found.append((loss.detach(), grad))
    alone = dist.new_group([0])  # made by all, entered by the first
    if rank:
        try:
            cos_nce(student, student.detach(), tokens=True, group=alone)
        except ValueError as error:
            found.append(str(error))
    found.append(refused_together(rank))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refused_together(rank: int) -> list[str]:
    """What this rank is told of a NaN that the last rank's teacher brings, and of lengths that differ."""
    teacher = torch.randn(3, 8)
    teacher[0, 0] = float("nan") if rank else 1.0
    tokens = torch.randn(2, 3 + rank, 8)
    told = []
    for call in (
        lambda: cos_nce(torch.randn(3, 8), teacher, group=dist.group.WORLD),
        lambda: cos_nce(tokens, tokens, tokens=True, exclude=torch.arange(2), group=dist.group.WORLD),
    ):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    return told


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
