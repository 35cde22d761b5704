"""Attention with a second derivative.

The fused kernels behind `scaled_dot_product_attention` (flash, memory-efficient, cuDNN) have no derivative of their
backward, nor have cuDNN's recurrent layers. What is differentiated twice is composed of plain operations instead.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_logger = logging.getLogger("fastkd")


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within, attention runs on the mathematical path and recurrent layers without cuDNN; said once in the log. A
    forward outside keeps the fast ones."""
    _tell_once()
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


@functools.cache
def _tell_once() -> None:
    _logger.info(
        "explanations with a second derivative run attention on the mathematical path, and recurrent layers without "
        "cuDNN: fused kernels have none. All other passes keep the fused ones"
    )
