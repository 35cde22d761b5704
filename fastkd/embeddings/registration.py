"""Compressed models among those that transformers loads."""

from fastkd.registration import on_import


def register() -> None:
    """Have `sparse_embedding` among transformers' quantization methods, now or as soon as transformers is imported."""
    on_import("transformers.quantizers.auto", "fastkd.embeddings.quantizer")
