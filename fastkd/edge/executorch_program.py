"""A torch.export program as an ExecuTorch program, lowered to XNNPACK; its portable kernels alone are slow."""

from pathlib import Path

from torch.export import ExportedProgram

from fastkd.edge.capture import does_not_export, quiet
from fastkd.edge.extras import required

LARGEST_BATCH = 16  # sentences: the runtime sets aside memory for the largest batch at the largest length


def save(program: ExportedProgram, path: Path) -> None:
    """NAME.pte. Raises ValueError where ExecuTorch is not installed, or has no such operator."""
    lower = required("executorch.exir").to_edge_transform_and_lower
    partitioner = required("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner
    with quiet():
        try:
            lowered = lower(program, partitioner=[partitioner()]).to_executorch()
        except Exception as error:  # of many kinds
            raise does_not_export(program, error) from error
    with path.open("wb") as file:
        lowered.write_to_file(file)
