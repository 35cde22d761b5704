"""EGKD: a whole training step, from token ids to the optimizer, with each branch and without.

The step is the recipe's: each way is an `EgkdTrainer` that has trained for one step, and what is timed is its loss of a
batch that its own collator has made, the backward and the optimizer. Teacher and student are BERT classifiers of random
weights, without dropout; the learning rate is zero, so that every step begins at the same weights. "stored": the
teacher does not run, its results lie beside the batch. Truth is each way's loss put together from its terms.

Times are multiples of the plain step, whose teacher runs. What is stored saves the plain step its teacher too: that a
stored way is cheaper than a plain step and the student's further passes says that "plain, stored" is cheaper than
"plain".

With 3 classes, all explained, the public way is a loop over classes and integration steps.
"""

import copy
import io
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from fastkd.benchmarks.harness import Case, Provider
from fastkd.benchmarks.steps._egkd_truth import Truth, public_loss
from fastkd.data.wordpiece import train_wordpiece
from fastkd.recipes import EgkdConfig, EgkdTrainer, teacher_results
from fastkd.recipes.egkd_branches import Explained, PerturbationBranch, SelectionBranch
from fastkd.recipes.training import bf16_pays

_TINY = ((2, 16, 2), (1, 8, 2))  # layers, width, attention heads of teacher and student
_MINILM = ((6, 384, 12), (3, 384, 12))
# the case, sequences, padded length, integration steps, whether every sequence is that long, and the two models
SHAPES = {
    "tiny": [("branches", 4, 16, 1, False, *_TINY), ("classes", 4, 16, 2, True, *_TINY)],
    "small": [("branches", 32, 64, 1, True, *_MINILM), ("classes", 32, 64, 1, True, *_MINILM)],
}
SHAPES["full"] = [
    *SHAPES["small"], ("branches", 32, 64, 1, False, *_MINILM), ("classes", 32, 64, 4, True, *_MINILM),
]  # fmt: skip


@dataclass(frozen=True)
class _Way:
    """A way to train: the branches, how the student's scores are differentiated, whether the teacher runs, and at most
    how many times the step that it is compared with it may take."""

    name: str
    branches: tuple[str, ...] = ()
    stored: bool = True
    goal: float | None = None
    second_order: str = "central_difference"


def _both(name: str, *branches: str, goal: float, **how) -> list[_Way]:
    return [_Way(name, branches, False, goal, **how), _Way(f"{name}, stored", branches, **how)]


_DIFFERENCE, _EXACT = "gradient, central difference", "gradient, exact"
_WAYS = {
    "branches": [
        _Way("plain", stored=False),
        _Way("plain, stored", goal=1.0),
        *_both(_DIFFERENCE, "gradient", goal=2.2),
        *_both(_EXACT, "gradient", goal=3.0, second_order="exact"),
        *_both("perturbation, one mask", "perturbation", goal=1.9),
        *_both("selection", "selection", goal=1.9),
        _Way("all three, stored", ("gradient", "perturbation", "selection"), second_order="exact"),
    ],
    "classes": [
        _Way(f"{_DIFFERENCE}, stored", ("gradient",), goal=1 / 3),
        _Way(f"{_EXACT}, stored", ("gradient",), goal=1 / 3, second_order="exact"),
    ],
}
_PUBLIC = "public loop"

# With that of the gradient branch, which depends on the models, they make an error in any term's gradient one in all.
_WEIGHTS = {"perturbation": 10.0, "selection": 10.0}
# Errors of the ways themselves, relative to the largest gradient: results are stored in fp16, and a central difference
# is one in fp32.
_OF_STORING, _OF_DIFFERENCE = 2e-3, 5e-3


def cases(shapes: str, device: str):
    """In fp32 and, where it is faster, in bf16 autocast; the passes of a central difference always without autocast."""
    for shape in SHAPES[shapes]:
        yield case(*shape, dtype=torch.float32, device=device)
        if bf16_pays():
            yield case(*shape, dtype=torch.bfloat16, device=device)


def case(
    kind: str, batch: int, length: int, steps: int, whole: bool, teacher, student, *, dtype: torch.dtype, device: str
) -> Case:
    """`kind`: "branches", each of the recipe's with 2 classes; "classes", the gradient branch for every one of 3, by
    `steps` of integrated gradients, beside the public way. `whole`: no padding."""
    classes = {"branches": 2, "classes": 3}[kind]
    tokenizer = train_wordpiece(["a sentence"], 60)
    data = _sentences(batch, length, whole, classes, tokenizer)
    frozen = _classifier(*teacher, classes, 0).eval().requires_grad_(False).to(device)
    learnt = _classifier(*student, classes, 1).to(device)

    def settings(branches: tuple[str, ...], second_order: str = "central_difference") -> EgkdConfig:
        explained = {"method": "integrated_gradients", "steps": steps} if kind == "classes" else {}
        return EgkdConfig(
            output_dir=folder, max_steps=1, learning_rate=0.0, per_device_train_batch_size=batch, explain_after=0.0,
            branches={name: weights[name] for name in branches}, second_order=second_order, gradient=explained,
            target="all" if kind == "classes" else "predicted", selector={"epochs": 1}, pool={"samples": 8},
            bf16=dtype == torch.bfloat16, use_cpu=device == "cpu",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip

    def trained(way: _Way) -> EgkdTrainer:
        trainer = EgkdTrainer(
            copy.deepcopy(learnt), settings(way.branches, way.second_order), teacher=results if way.stored else frozen,
            processing_class=tokenizer, train_dataset=data,
        )  # fmt: skip
        with redirect_stdout(io.StringIO()):
            trainer.train()
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        weights = {"gradient": 1.0, **_WEIGHTS}
        args = settings(("gradient",))
        given = DataCollatorWithPadding(tokenizer)(list(data)).to(device)
        truth = Truth(
            learnt, frozen, tokenizer, {name: given[name] for name in ("input_ids", "attention_mask")}, given["labels"],
            args.soft_weight, args.temperature, args.explainer, args.target, partial(_autocast, device),
        )  # fmt: skip
        weights["gradient"] = truth.balance(dtype)
        needed = dict.fromkeys(name for way in _WAYS[kind] for name in way.branches)
        results = teacher_results(frozen, tokenizer, data, settings(tuple(needed)), Path(folder) / "results")
        providers = [_provider(way, trained(way), truth) for way in _WAYS[kind]]
    if kind == "classes":
        public = partial(_public, truth, weights["gradient"], dtype)
        providers[:0] = [public(_PUBLIC, shared=False), public(f"{_PUBLIC}, shared forwards", shared=True)]
    tokens = int(given["attention_mask"].sum())
    return Case(
        op=f"egkd, {kind}",
        shape={
            "sequences": batch, "length": length, "tokens": tokens, "classes": classes,
            "steps": steps, "teacher": "x".join(map(str, teacher[:2])), "student": "x".join(map(str, student[:2])),
        },
        length=length,
        tokens=tokens,
        dtype=dtype,
        device=device,
        exact=truth.of({}, {}),
        providers=providers,
        evaluated=False,
        compared_with=_PUBLIC if kind == "classes" else "plain",
        least_rounds=3,
    )  # fmt: skip


def _provider(way: _Way, trainer: EgkdTrainer, truth: Truth) -> Provider:
    [batch] = trainer.get_train_dataloader()
    model = trainer.model_wrapped.train()
    differs = "gradient" in way.branches and way.second_order == "central_difference"
    return Provider(
        way.name,
        lambda: trainer.compute_loss(model, batch),
        partial(_step, trainer.model, trainer.optimizer, trainer.accelerator.backward),
        "fastkd",
        exact=lambda precision: truth.of(trainer.args.explaining, _kept(way, trainer, batch))(precision),
        tolerance=_OF_STORING * way.stored + _OF_DIFFERENCE * differs,
        goal=way.goal,
    )


def _public(truth: Truth, weight: float, dtype: torch.dtype, name: str, *, shared: bool) -> Provider:
    model = copy.deepcopy(truth.student)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def forward() -> Tensor:
        with truth.autocast(dtype):
            return public_loss(truth, model, weight, shared=shared)

    step = partial(_step, model, optimizer, Tensor.backward)
    return Provider(name, forward, step, exact=truth.of({"gradient": weight}, {}))


def _step(model, optimizer, backward, loss: Tensor) -> tuple[Tensor]:
    backward(loss)
    optimizer.step()
    grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    optimizer.zero_grad()
    return (grads,)


def _kept(way: _Way, trainer: EgkdTrainer, batch: dict) -> dict[str, Tensor]:
    """The tokens that the branches of this way leave, (B, 1, L) bool, in the order of the data: those of a draw, and
    those that a selector has learnt."""
    kept = {}
    for branch in trainer.branches:
        if isinstance(branch, PerturbationBranch):
            step = trainer.state.global_step
            now = Explained(batch, {}, batch["example"], batch["masks"], step, way.stored, None, None, False)
            kept["perturbation"] = branch.kept(now)
        if isinstance(branch, SelectionBranch):
            kept["selection"] = trainer.targets(batch)["selection"][:, None]
    order = batch["example"].argsort()
    return {name: tokens[order] for name, tokens in kept.items()}


def _classifier(layers: int, width: int, heads: int, classes: int, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=classes,
    ))  # fmt: skip


def _sentences(batch: int, length: int, whole: bool, classes: int, tokenizer) -> Dataset:
    """Random ids between [CLS] and [SEP], and random labels; lengths are `length`, or from a quarter of it up."""
    draw = torch.Generator().manual_seed(2)
    lengths = [length if whole else length - 3 * length * i // (4 * batch) for i in range(batch)]
    ids = [torch.randint(1000, 30522, (n - 2,), generator=draw).tolist() for n in lengths]
    ids = [[tokenizer.cls_token_id, *words, tokenizer.sep_token_id] for words in ids]
    labels = torch.randint(0, classes, (batch,), generator=draw).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "labels": labels})


def _autocast(device: str, dtype: torch.dtype):
    return torch.autocast(device, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
