"""From a dense model to a compressed one, and back."""

import copy

from transformers import PreTrainedModel

from fastkd.embeddings.code import SparseCode
from fastkd.embeddings.input_embedding import input_embedding
from fastkd.embeddings.module import SparseEmbedding
from fastkd.embeddings.quantizer import (
    SparseEmbeddingConfig,
    SparseEmbeddingQuantizer,
    dense_embedding,
    mark_as_compressed,
    unmark,
)


def compress_embeddings(model: PreTrainedModel, code: SparseCode) -> PreTrainedModel:
    """A copy of `model` whose input embedding looks up in `code`; `save_pretrained` and `from_pretrained` take it.

    code: a code of the model's own table, e.g. `SparseCode.fit(model.get_input_embeddings().weight, counts)`.

    Raises:
        TypeError: not a transformers model.
        ValueError: no embedding that can be coded (see `input_embedding`), or a code of another shape.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: a transformers model is needed, got {type(model).__name__}")
    dense = input_embedding(model)
    shapes = (code.num_embeddings, code.embedding_dim), (dense.num_embeddings, dense.embedding_dim)
    if shapes[0] != shapes[1]:
        raise ValueError(f"code: it stands for a table of shape {shapes[0]}, the model's is {shapes[1]}")
    sparse = SparseEmbedding(
        code.to(dense.weight.device), padding_idx=dense.padding_idx, dtype=dense.weight.dtype
    ).train(dense.training)
    compressed = copy.deepcopy(model, {id(dense): sparse})
    return mark_as_compressed(compressed, SparseEmbeddingQuantizer(SparseEmbeddingConfig.of(code.arrays)))


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a compressed model with an ordinary input embedding: the table that its code stands for, in the dtype
    of the rest of the model. It is saved and loaded without fastkd.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model that is not compressed.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: a transformers model is needed, got {type(model).__name__}")
    sparse = model.get_input_embeddings()
    if not isinstance(sparse, SparseEmbedding):
        raise ValueError(f"this {type(model).__name__} is not compressed: its input embedding is dense")
    return unmark(copy.deepcopy(model, {id(sparse): dense_embedding(sparse).train(sparse.training)}))
