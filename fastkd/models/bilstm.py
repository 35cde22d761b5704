"""A student of another architecture: a bidirectional LSTM on the teacher's tokenizer (as in Tang et al. 2019).

    e_i = LayerNorm(word embedding of token i)
    h_i = [LSTM→(e)_i, LSTM←(e)_i]                       layer by layer
    z   = W · 1/n Σ_i h_i + b                            n tokens

The mean over time is smooth, where a maximum would have kinks that spoil central differences.

The valid tokens are gathered to the front, and read from their end for the direction ←, instead of being packed:
packing needs every length on the host, which a GPU would wait for, and leaves oneDNN's fused LSTM, which on a CPU takes
half the time even though it reads the padding.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class BiLstmConfig(PretrainedConfig):
    """Sizes of a BiLSTM; `num_labels`, `id2label` and `problem_type` are those of every config.

    Args:
        vocab_size: rows of the table of word embeddings.
        embedding_size: their width.
        hidden_size: of each direction; a layer gives vectors twice as wide.
        num_hidden_layers: layers, of two directions each.
        hidden_dropout_prob: on the embeddings, between layers, and before the classifier.
        initializer_range: standard deviation of random embeddings and of the classifier.
        layer_norm_eps: of the embeddings' norm.
        pad_token_id: the row of padding, which learns nothing.
    """

    model_type = "bilstm"

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 384,
        hidden_size: int = 256,
        num_hidden_layers: int = 1,
        hidden_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        **kwargs,
    ):
        self.vocab_size, self.embedding_size, self.hidden_size = vocab_size, embedding_size, hidden_size
        self.num_hidden_layers, self.hidden_dropout_prob = num_hidden_layers, hidden_dropout_prob
        self.initializer_range, self.layer_norm_eps = initializer_range, layer_norm_eps
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class BiLstmEmbeddings(nn.Module):
    """Word embeddings (B, L, D) under a norm: a Transformer's are far smaller than what an LSTM's weights are drawn
    for."""

    def __init__(self, config: BiLstmConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self.dropout(self.LayerNorm(words))


class BiLstmLayer(nn.Module):
    """Both directions of a layer: (B, L, 2 H) of (B, L, D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.forwards = nn.LSTM(width, hidden, batch_first=True)
        self.backwards = nn.LSTM(width, hidden, batch_first=True)

    def forward(self, states: Tensor, mirror: Tensor) -> Tensor:
        """mirror: (B, L), the place that each place has when its sequence is read from its end."""
        onward, _ = self.forwards(states)
        back, _ = self.backwards(_taken(states, mirror))
        return torch.cat([onward, _taken(back, mirror)], dim=2)


class BiLstmForSequenceClassification(PreTrainedModel):
    """A BiLSTM with a head for classes or a score, made by `create_bilstm` and loaded with
    `AutoModelForSequenceClassification.from_pretrained`.

    Has a second derivative within `fastkd.explain.twice_differentiable`, as on a CPU anywhere. Any mask is right:
    padding on either side, or tokens left out in the middle.
    """

    config_class = BiLstmConfig
    base_model_prefix = ""

    def __init__(self, config: BiLstmConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.embeddings = BiLstmEmbeddings(config)
        widths = [config.embedding_size, *[2 * config.hidden_size] * (config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList(BiLstmLayer(width, config.hidden_size) for width in widths)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        input_ids: (B, L) int64, or in their place inputs_embeds: (B, L, D), word embeddings before the norm.
        attention_mask: (B, L), nonzero at tokens; all are by default. A sequence without a token has the head's bias.
        token_type_ids: taken, and not looked at: [SEP] stands between the texts of a pair.
        labels: (B,) for transformers' loss by `config.problem_type`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeddings = self.embeddings(input_ids, inputs_embeds)
        if attention_mask is None:
            valid = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        else:
            valid = attention_mask != 0
        with _differentiable_in(self.training, embeddings):
            logits = self.classifier(self.dropout(self._pooled(embeddings, valid)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _pooled(self, embeddings: Tensor, valid: Tensor) -> Tensor:
        """(B, 2 H), the mean over the valid tokens."""
        place = torch.arange(valid.shape[1], device=valid.device)[None]
        count = valid.sum(1, keepdim=True)
        padding = (place >= count)[..., None]
        mirror = torch.where(place < count, count - 1 - place, place)
        front = valid.long().argsort(dim=1, descending=True, stable=True)
        states = _taken(embeddings, front).masked_fill(padding, 0)
        for layer in self.layers[:-1]:
            states = self.dropout(layer(states, mirror))
        return self.layers[-1](states, mirror).masked_fill(padding, 0).sum(1) / count.clamp(min=1)


def create_bilstm(
    teacher: PreTrainedModel,
    *,
    layers: int,
    hidden: int,
    width: int | None = None,
    dropout: float = 0.1,
    init: str = "teacher",
    seed: int = 0,
) -> BiLstmForSequenceClassification:
    """A BiLSTM student on the teacher's tokenizer, with the teacher's labels, dtype and device.

        student = fastkd.create_bilstm(teacher, layers=1, hidden=256)

    teacher: a transformers model with word embeddings, of whatever architecture.
    layers: number of layers.
    hidden: width of each direction.
    width: of the word embeddings; the teacher's by default.
    dropout: on the embeddings, between layers, and before the classifier, in [0, 1).
    init: "teacher" copies its word embeddings E (V, D); narrower ones are E U, U (D, width) the eigenvectors of Eᵀ E
        with the largest eigenvalues, which keep the dot products of words as well as that width can (Eckart and Young
        1936). "random" copies nothing.
    seed: of all weights that are not copied; the global random state is not touched.

    The teacher stays as it is. Raises TypeError or ValueError, before any work, for what is no model with a table of
    word embeddings and for sizes that do not fit.
    """
    table = _table(teacher)
    width = table.shape[1] if width is None else width
    for name, size in (("layers", layers), ("hidden", hidden), ("width", width)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}={size!r}: a positive whole number is needed")
    if init not in ("teacher", "random"):
        raise ValueError(f'init={init!r}: give "teacher" or "random"')
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: it must lie in [0, 1)")
    if init == "teacher" and width > table.shape[1]:
        raise ValueError(f"width={width}: the teacher's embeddings are {table.shape[1]} wide; use init='random'")
    config = BiLstmConfig(
        vocab_size=len(table),
        embedding_size=width,
        hidden_size=hidden,
        num_hidden_layers=layers,
        hidden_dropout_prob=dropout,
        pad_token_id=teacher.config.pad_token_id,
        id2label=dict(teacher.config.id2label),
        label2id=dict(teacher.config.label2id),
        problem_type=teacher.config.problem_type,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        student = BiLstmForSequenceClassification(config)
    if init == "teacher":
        with torch.no_grad():
            student.get_input_embeddings().weight.copy_(_narrowed(table, width))
    return student.to(device=teacher.device, dtype=teacher.dtype).train(teacher.training)


def _table(teacher: PreTrainedModel) -> Tensor:
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher: a transformers model is needed, got {type(teacher).__name__}")
    embeddings = teacher.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise ValueError(
            f"the teacher's word embeddings are a {type(embeddings).__name__}; a BiLSTM copies a plain table "
            "(nn.Embedding)"
        )
    return embeddings.weight.detach()


def _narrowed(table: Tensor, width: int) -> Tensor:
    """E U, (V, width) of E (V, D); the sign of each column of U is such that its largest entry is positive."""
    if width == table.shape[1]:
        return table
    wide = table.double()
    axes = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)[:, :width]
    return wide @ (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign())


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """(B, L, D): of each sequence the vectors at these places (B, L)."""
    return states.gather(1, places[..., None].expand_as(states))


def _differentiable_in(training: bool, states: Tensor) -> AbstractContextManager:
    """cuDNN's LSTM has a backward in training mode only; one that is explained in eval mode runs without cuDNN."""
    if states.is_cuda and torch.is_grad_enabled() and not training:
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


AutoConfig.register(BiLstmConfig.model_type, BiLstmConfig, exist_ok=True)
AutoModelForSequenceClassification.register(BiLstmConfig, BiLstmForSequenceClassification, exist_ok=True)
