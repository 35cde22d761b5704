"""Which teacher vectors are negatives of which sample: ids that samples share, and the samples of other processes."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Classes(NamedTuple):
    """Samples that are not negatives of each other share a class; −1 stands for having none.

    of_samples: (N,) int32, None where nothing is excluded.
    of_negatives: the same of the vectors that are summed.
    count: how many classes there are, or on CUDA how many there could be.
    """

    of_samples: Tensor | None
    of_negatives: Tensor | None
    count: int


def checked_ids(exclude, samples: int, of_negatives: tuple[int, ...] | None) -> tuple[Tensor, Tensor | None]:
    """Ids of the samples, and of the explicit negatives where there are any: those have the shape `of_negatives`.

    Raises:
        ValueError, TypeError: they do not fit the batch or the negatives.
    """
    if of_negatives is None:
        if not isinstance(exclude, Tensor):
            raise TypeError(f"exclude must be a tensor of ids ({samples},), not {type(exclude).__name__}")
        _check_ids("exclude", exclude, (samples,))
        return exclude, None
    if not isinstance(exclude, (tuple, list)) or len(exclude) != 2 or not all(isinstance(x, Tensor) for x in exclude):
        raise TypeError("with explicit negatives, exclude must be a pair of tensors (ids, ids of the negatives)")
    ids, ids_of_negatives = exclude
    _check_ids("exclude[0]", ids, (samples,))
    _check_ids("exclude[1]", ids_of_negatives, of_negatives)
    return ids, ids_of_negatives.to(ids.device)


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} is {ids.dtype}; ids are integers")
    if ids.shape != shape:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected {tuple(shape)}")


def check_member(group) -> None:
    """Raise unless `group` is a process group and this process belongs to it."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group was given, but torch.distributed is not initialised")
    if group == dist.GroupMember.NON_GROUP_MEMBER or (
        isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0
    ):
        raise ValueError(f"this process (rank {dist.get_rank()}) is no member of the process group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, not {type(group).__name__}")


def classes_of(ids: Tensor, ids_of_negatives: Tensor | None, group, vectors: Tensor) -> Classes:
    """The ids that need a sum of their own, numbered in ascending order.

    In a batch those are the ids that occur twice or more, in all processes of the group; beside explicit negatives
    those that occur among them.

    Raises ValueError, in every process, where the processes bring vectors (M, N, L, D) that differ in more than N.
    """
    device = vectors.device
    samples = ids.to(device if group is not None else ids.device, torch.int64)
    numbered = (samples if group is None else _of_all_processes(samples, vectors, group).cpu()).sort().values
    if ids_of_negatives is None:
        same = numbered[1:] == numbered[:-1]
        needed = torch.cat([same, same.new_zeros(1)]) | torch.cat([same.new_zeros(1), same])
        needed = needed[: numbered.shape[0]]
        most = numbered.shape[0] // 2
    else:
        pool = ids_of_negatives.to(torch.int64).sort().values
        needed = torch.searchsorted(pool, numbered, right=True) > torch.searchsorted(pool, numbered)
        most = min(numbered.shape[0], pool.shape[0])
    first = torch.searchsorted(numbered, numbered) == torch.arange(numbered.shape[0], device=numbered.device)
    number = (first & needed).cumsum(0) - 1
    if numbered.device.type == "cpu" and not torch.compiler.is_compiling():
        most = int(number[-1]) + 1 if number.numel() else 0
    if most == 0:
        return Classes(None, None, 0)

    def classes(ids: Tensor) -> Tensor:
        ids = ids.to(numbered.device, torch.int64)
        at = torch.searchsorted(numbered, ids).clamp(max=numbered.shape[0] - 1)
        found = (numbered[at] == ids) & needed[at]
        return torch.where(found, number[at], -1).to(device, torch.int32)

    of_samples = classes(samples)
    return Classes(of_samples, of_samples if ids_of_negatives is None else classes(ids_of_negatives), most)


def _of_all_processes(ids: Tensor, vectors: Tensor, group) -> Tensor:
    layers, _, *position = vectors.shape
    brought = torch.tensor([ids.shape[0], layers, *position], device=ids.device)
    all_brought = [torch.empty_like(brought) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_brought, brought, group=group)
    sizes, shapes = zip(*((size, shape) for size, *shape in (each.tolist() for each in all_brought)), strict=True)
    # Sums of different sizes would end the processes inside the all-reduce, without a word of why.
    if other := next((rank for rank, shape in enumerate(shapes) if shape != shapes[0]), None):
        raise ValueError(
            f"the processes bring vectors of (layers, positions, width) {tuple(shapes[0])} in the first and "
            f"{tuple(shapes[other])} in number {other}; only the number of samples may differ"
        )
    padded = ids.new_zeros(max(sizes))
    padded[: ids.shape[0]] = ids
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return torch.cat([ids[:size] for ids, size in zip(found, sizes, strict=True)])


def counts(vectors: Tensor, mask: Tensor | None, classes: Classes, dtype: torch.dtype) -> Tensor:
    """How many of the vectors (M, N, L, D) each of their sums holds: (1 + classes, L), counted in floats."""
    samples, positions = vectors.shape[1:3]
    if mask is None and not classes.count:
        return torch.full((1, positions), samples, dtype=dtype, device=vectors.device)
    counted = torch.ones(samples, positions, dtype=dtype, device=vectors.device) if mask is None else mask.to(dtype)
    if not classes.count:
        return counted.sum(0, keepdim=True)
    found = counted.new_zeros(1 + classes.count, positions)
    found.index_add_(0, classes.of_negatives.long() + 1, counted)  # of whole numbers: the order does not matter
    found[0] = counted.sum(0)
    return found


def over_all_processes(sums: Tensor, counts: Tensor, samples: int, group) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and counts of all processes, and processes / samples of all, in one all-reduce."""
    number = torch.full((1,), samples, dtype=sums.dtype, device=sums.device)
    buffer = torch.cat([sums.flatten(), counts.flatten(), number])
    dist.all_reduce(buffer, group=group)
    all_sums, all_counts, all_samples = buffer.split([sums.numel(), counts.numel(), 1])
    share = dist.get_world_size(group) / all_samples.clamp(min=1)
    return all_sums.view(sums.shape), all_counts.view(counts.shape), share
