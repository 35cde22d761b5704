"""Finds the table that is to be coded in a transformers model, and says so where there is none that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fastkd.embeddings.module import SparseEmbedding

if TYPE_CHECKING:  # the quantizer is imported by transformers, when its models are not there yet
    from transformers import PreTrainedModel


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The dense input embedding of a model with any head.

    Raises:
        ValueError: no input embedding is recognised, it is compressed already, it is not a plain `nn.Embedding`, or a
            head or another embedding is tied to its table.
    """
    kind = type(model).__name__
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError as error:
        raise ValueError(f"{kind}: no input embedding is recognised ({error})") from error
    if isinstance(embedding, SparseEmbedding):
        raise ValueError(
            f"{kind}: its input embedding is compressed already; fastkd.embeddings.densify(model), or "
            "`fastkd densify`, gives a dense model back"
        )
    # A subclass may scale what it looks up, and max_norm changes the table at every lookup.
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        found = "an nn.Embedding with max_norm" if type(embedding) is nn.Embedding else f"a {type(embedding).__name__}"
        raise ValueError(f"{kind}: its input embedding is {found}; only a plain nn.Embedding can be coded")
    tied = _tied_to(model, embedding)
    if tied:
        raise ValueError(
            f"{kind} ties {', '.join(tied)} to its input embedding, and a tied head needs the dense table: give the "
            "model another head, or take its encoder alone (AutoModel), and compress that. A model that is compressed "
            "already can have this head after `fastkd densify`"
        )
    return embedding


def _tied_to(model: PreTrainedModel, embedding: nn.Module) -> list[str]:
    """Names of the parameters that share `embedding`'s table, or will once the model's weights are tied."""
    [own] = [f"{name}.weight" for name, module in model.named_modules() if module is embedding]
    declared = {name for pair in model.all_tied_weights_keys.items() if own in pair for name in pair}
    shared = {name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding.weight}
    return sorted((declared | shared) - {own})
