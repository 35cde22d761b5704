"""Where the parts of a supported encoder are: a few names per `model_type` of transformers.

To add one, name its list of layers and the linear maps that make queries, keys and values:

    fastkd.models.register_architecture("my-bert", Architecture(layers="encoder.layer", projections=("attn.qkv",)))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Dotted names of the parts of an encoder.

    layers: the `nn.ModuleList` of layers, as seen from the base model (the model without its head).
    projections: the linear maps of query, key and value, as seen from a layer: three names, or one where a fused map
        writes them side by side in this order; none for an encoder without attention.
    embeddings: the module whose output is a vector for each token, as seen from the base model.
    ffn: the config field with the width of the feed-forward block.
    width: config fields that hold the width beside `hidden_size`.
    per_layer: config fields that hold a list with one entry per layer.
    droppable: names in a layer's state that it has in some positions only.
    """

    layers: str = "encoder.layer"
    projections: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    embeddings: str = "embeddings"
    ffn: str = "intermediate_size"
    width: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ()
    droppable: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.projections) not in (0, 1, 3):
            raise ValueError(
                f"projections={self.projections!r}: give the names of the query, key and value projection, "
                "or one name where a single linear map makes all three"
            )


_ARCHITECTURES = {
    "bert": Architecture(),
    "roberta": Architecture(),
    "xlm-roberta": Architecture(),
    "electra": Architecture(),
    "distilbert": Architecture(
        layers="transformer.layer",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        ffn="hidden_dim",
    ),
    "mpnet": Architecture(projections=("attention.attn.q", "attention.attn.k", "attention.attn.v")),
    "deberta-v2": Architecture(
        projections=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        width=("pooler_hidden_size",),
    ),
    "bilstm": Architecture(layers="layers", projections=()),
    # Layer 0 has no attn_norm: the embeddings end in a norm of their own.
    "modernbert": Architecture(
        layers="layers",
        projections=("attn.Wqkv",),
        per_layer=("layer_types",),
        droppable=("attn_norm.weight", "attn_norm.bias"),
    ),
}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Make an encoder known to taps, students and layer replacement under its `config.model_type`."""
    _ARCHITECTURES[model_type] = architecture


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The table entry for a config. Raises ValueError for an unknown `model_type`, with the list of known ones."""
    if config.model_type not in _ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {config.model_type!r}; supported: {', '.join(sorted(_ARCHITECTURES))}. To add it, "
            "name its layers and its query, key and value projections: fastkd.models.register_architecture("
            f"{config.model_type!r}, fastkd.models.Architecture(layers='encoder.layer', "
            "projections=('attention.query', 'attention.key', 'attention.value')))"
        )
    return _ARCHITECTURES[config.model_type]


def find_encoder(model: nn.Module) -> PreTrainedModel:
    """The transformers base encoder inside a model with any head, also within DDP or a sentence encoder.

    Raises ValueError when `model` holds no transformers model, or several.
    """
    outermost, pending = [], [model]
    while pending:
        module = pending.pop()
        if isinstance(module, PreTrainedModel):
            outermost.append(module)
        else:
            pending.extend(module.children())
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(outermost)} transformers models, one is needed: pass the model itself"
        )
    encoder = outermost[0].base_model
    architecture_of(encoder.config)
    return encoder


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers of a model with any head."""
    encoder = find_encoder(model)
    return attrgetter(architecture_of(encoder.config).layers)(encoder)


def embeddings_of(model: nn.Module) -> nn.Module:
    """The embeddings of a model with any head: their output is what layer 0 works on (Electra widens it first)."""
    encoder = find_encoder(model)
    return attrgetter(architecture_of(encoder.config).embeddings)(encoder)


def projections_of(model: nn.Module, layer: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are query, key and value; the same module three times where they are fused."""
    config = find_encoder(model).config
    names = architecture_of(config).projections
    if not names:
        raise ValueError(f"{config.model_type} has no attention: there are no queries, keys and values to tap")
    return {what: attrgetter(names[i % len(names)])(layer) for i, what in enumerate(("query", "key", "value"))}


def resolve_layers(layers: Sequence[int], count: int, what: str = "layers") -> list[int]:
    """Layer numbers from 0, negative ones counted from the end. Raises ValueError where one is out of range."""
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"{what}={layers!r}: a list of layer numbers is needed, such as [-1]")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"{what}={list(layers)!r}: {layer!r} is not a layer number (an int)")
        if not -count <= layer < count:
            raise ValueError(
                f"{what}={list(layers)!r}: layer {layer} is out of range; this model has {count} layers: "
                f"0 to {count - 1}, or -{count} to -1 from the end"
            )
    return [layer % count for layer in layers]
