"""Product quantisation (Jégou, Douze and Schmid, 2011): a row is cut into m sub-vectors, and each is replaced by one of
256, so that a row takes m bytes. Here for what the atoms leave of a coded row, or for whole rows."""

import warnings

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from fastkd.embeddings.code import encode_rows

_CENTROIDS = 256
_TRAINED_ON = 2**16  # rows: 256 per centroid, beyond which centroids hardly move
_ROUNDS = 25
_ROWS_AT_ONCE = 8192


def product_quantise(
    rows: Tensor, sub_vectors: int, importance: Tensor | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(R, D) -> (R, m) uint8 and the codebook (m, 256, D / m) fp16; the same for the same rows and seed.

    Each sub-vector has k-means of its own (scikit-learn, on the CPU, on at most 65,536 rows), and each row takes the
    nearest sub-vectors as they are stored. `importance`, (R,), weighs what a row loses while centroids are sought.
    Raises ValueError where fp16 cannot hold the rows.
    """
    rows = rows.float()
    width = rows.shape[1] // sub_vectors
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:_TRAINED_ON].sort().values
    sample = rows[chosen.to(rows.device)].cpu()
    sample_weight = None if importance is None else importance.cpu()[chosen].double().numpy()
    codebook = torch.zeros(sub_vectors, _CENTROIDS, width)
    codes = torch.empty(len(rows), sub_vectors, dtype=torch.uint8, device=rows.device)
    for m in tqdm(range(sub_vectors), desc="product quantisation", unit=" sub-vectors", delay=1):
        columns = slice(m * width, (m + 1) * width)
        centroids = _centroids(sample[:, columns].contiguous(), sample_weight, seed)
        codebook[m, : len(centroids)] = encode_rows(centroids, torch.float16)[0].float()
        stored = codebook[m].to(rows.device)
        half_squares = stored.square().sum(1) / 2
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE, columns]
            codes[start : start + _ROWS_AT_ONCE, m] = (part @ stored.T - half_squares).argmax(1)
    return codes, codebook.half().to(rows.device)


def check_residual_bytes(residual_bytes: int, width: int) -> None:
    """Raise a ValueError that lists what is allowed unless rows of `width` can be cut into so many sub-vectors."""
    if residual_bytes not in range(width + 1) or (residual_bytes and width % residual_bytes):
        allowed = ", ".join(str(m) for m in range(1, width + 1) if width % m == 0)
        raise ValueError(f"residual_bytes={residual_bytes}; allowed at width {width} are 0 (none) and {allowed}")


def _centroids(points: Tensor, sample_weight: np.ndarray | None, seed: int) -> Tensor:
    # Drawn at random, 256 first centroids are as good here as k-means++, which takes longer than all the rest.
    kmeans = KMeans(min(_CENTROIDS, len(points)), init="random", n_init=1, max_iter=_ROUNDS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than centroids: some stand twice
        return torch.from_numpy(kmeans.fit(points.numpy(), sample_weight=sample_weight).cluster_centers_)
