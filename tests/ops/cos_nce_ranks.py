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
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
