"""What all of fastkd's trainers share, on top of transformers' own.

Defaults that matter on any machine, an order of batches that is a pure function of (seed, epoch), every loss term
logged under its own name, and a stop with a name when a loss is not finite.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from fastkd.models.architectures import embeddings_of
from fastkd.recipes.perturbation import NORMS, PERTURBATIONS, EmbeddingPerturbation

_NAMED = 8  # ids by which a message names a batch
_NEVER = 2**62  # later than any step
_AT_LEAST = {  # settings that torch and transformers refuse at the first step, if at all
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "adam_epsilon": 0,
}


def bf16_pays() -> bool:
    """Whether autocast to bf16 is faster here: a GPU with bf16, or a CPU with bf16 dot products or tiles."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class DistillationArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults below; every other field is theirs.

    Args:
        bf16: true, false or "auto": wherever bf16 is faster in hardware.
        optim: fused AdamW; on a CPU the unfused one takes a third of a small student's step.
        train_sampling_strategy: batches of similar length. Padding SST-2 to random batches costs two to three times.
        perturbation: "embedding" takes every training step from perturbed embeddings, at the cost of a second forward
            and most of a second backward (`fastkd.recipes.perturbation`); null takes it from where the student stands.
        perturbation_norm: over what the perturbation has length 1: "token", "sequence" or "batch".

    Raises:
        ValueError: a number that cannot be, such as a negative rate or a run of no steps (`max_steps` is -1, by
            `num_train_epochs`, or 1 at least); an unknown word.
    """

    bf16: bool | str = "auto"
    optim: str = "adamw_torch_fused"
    train_sampling_strategy: str = "group_by_length"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup_steps: float = 0.1
    logging_steps: float = 50
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = 1
    report_to: str | list[str] | None = "none"
    dataloader_pin_memory: bool = False
    perturbation: str | None = None
    perturbation_norm: str = "token"

    def __post_init__(self):
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be {least} at least")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must lie in [0, 1)")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps}; it must be 1 at least, or -1: by num_train_epochs")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} and max_steps=-1: nothing would be trained")
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(f"perturbation={self.perturbation!r}; allowed are embedding and null")
        if self.perturbation_norm not in NORMS:
            raise ValueError(f"perturbation_norm={self.perturbation_norm!r}; allowed are {', '.join(NORMS)}")
        if self.perturbation and self.torch_compile:
            raise ValueError("perturbation=embedding works by hooks, which torch_compile=true skips; choose one")
        if self.bf16 not in (True, False, "auto"):
            raise ValueError(f"bf16={self.bf16!r}; allowed are true, false and auto")
        if self.bf16 == "auto":
            self.bf16 = not self.fp16 and bf16_pays()
        # transformers refuses bf16 without a GPU unless it is told that the CPU is meant.
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()


class LengthGroupedBatches(Sampler[int]):
    """Indices in which neighbours have similar lengths, shuffled anew each epoch by (seed, epoch) alone.

    transformers' own sampler draws from the global generator, so that the order after a resume depends on how much
    randomness dropout has used before; here a resumed run sees the batches it would have seen. The epoch is asked for
    and not told: when a run of several processes is resumed, accelerate's wrappers do not pass it on.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int] = lambda: 0):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # Within a group transformers sorts from long to short: whole batches are shuffled, or lengths would drift.
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter([i for b in [*(batches[k] for k in order), *last] for i in b])


class NotFiniteError(FloatingPointError):
    """A loss or a parameter became NaN or infinite; the message names the step, the batch and what to look at."""


class DistillationTrainer(Trainer):
    """A Trainer whose subclasses give `loss_terms`: the terms of one batch by name, each a scalar mean over the batch.

    The sum of `weights[name] * term` is what is minimised, as a mean over the sequences of an optimizer step however
    they are cut into accumulated batches. Each term is logged as `loss_<name>`, averaged since the last log.

    Raises:
        ValueError: several GPUs in one process (DataParallel).
        NotFiniteError: while training, see there. What is on disk by then is finite.
    """

    weights: dict[str, float]

    def __init__(self, model, args: DistillationArguments, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one per GPU (torchrun --nproc-per-node {args.n_gpu} ...), "
                "or show it a single one (CUDA_VISIBLE_DEVICES=0)"
            )
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True  # by compute_loss, which knows how many sequences the step has
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0
        self._first_bad: Tensor | None = None
        self._perturbation = EmbeddingPerturbation(args.perturbation_norm) if args.perturbation else None
        self._targets = (None, None)  # the batch that is being worked on, and what the teacher gave for it

    def loss_terms(self, model, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], object]:
        """The unweighted loss terms of a batch, and the model's output."""
        raise NotImplementedError

    def compute_targets(self, inputs: dict[str, Tensor]):
        """What the teacher gives for a batch, called without gradient and under the student's autocast."""

    def targets(self, inputs: dict[str, Tensor]):
        """`compute_targets(inputs)`, computed once for a batch however often the student runs on it."""
        if self._targets[0] is not inputs:
            with torch.no_grad(), self.accelerator.autocast():  # the student's own stands inside the wrapped model
                self._targets = (inputs, self.compute_targets(inputs))
        return self._targets[1]

    def embeddings(self) -> nn.Module:
        """The student's, which are perturbed."""
        return embeddings_of(self.model)

    def extra_logs(self) -> dict[str, float]:
        """Further figures to log beside the loss terms."""
        return {}

    def description(self) -> dict[str, str]:
        """What the run is about to do, by topic: printed before the first step. Subclasses add their own lines."""
        lengths = self._lengths()
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lines = {
            "batch": f"{batch} sequences per optimizer step ({self.args.train_batch_size} x "
            f"{self.args.gradient_accumulation_steps} accumulated x {self.args.world_size} processes)"
        }
        if lengths:
            grouped = self.args.train_sampling_strategy == "group_by_length"
            share = padding_share(lengths, self.args.train_batch_size, grouped)
            tokens = batch * sum(lengths) / len(lengths)
            lines["tokens"] = f"{tokens:.0f} per step without padding; {share:.0%} of each batch is padding"
        lines["numbers"] = "bf16 autocast" if self.args.bf16 else "fp16 autocast" if self.args.fp16 else "fp32"
        lines["loss"] = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        if self._perturbation:
            lines["perturbed"] = f"embeddings, by 1 per {self.args.perturbation_norm} up their gradient"
        return lines

    def train(self, *args, **kwargs):
        if self.is_world_process_zero():
            lines = self.description()
            width = max(map(len, lines)) + 2
            print("\n".join(f"  {topic:<{width}}{text}" for topic, text in lines.items()), flush=True)
        return super().train(*args, **kwargs)

    def _lengths(self) -> list[int] | None:
        """Tokens of each training example; None for a stream."""
        if not isinstance(self.train_dataset, Dataset):
            return None
        # From the full dataset: what reaches the sampler has lost the columns that the model does not take.
        name = self.args.length_column_name
        data = self.train_dataset
        return list(data[name]) if name in data.column_names else [len(ids) for ids in data["input_ids"]]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # What a mean over the step divides by: sequences, where the Trainer counts labels.
        return batches, sum(len(batch["input_ids"]) for batch in batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        try:
            terms, outputs = (self._perturbed_terms if self._perturbation else self.loss_terms)(model, inputs)
        except ValueError as error:
            if "is not finite" not in str(error):
                raise
            raise self._stopped(self.state.global_step, inputs["input_ids"][0, :_NAMED], str(error)) from error
        finally:
            self._targets = (None, None)
        loss = self._weighted(terms)
        self._remember_if_not_finite(loss, inputs)
        # The last batch of an epoch is a short one: a mean of means would weigh its sequences more than others.
        share = len(inputs["input_ids"]) / (num_items_in_batch or len(inputs["input_ids"]))
        with torch.no_grad():
            for name, term in terms.items():
                self._sums[name] = self._sums.get(name, 0) + term.detach().float() * share
            self._steps += share
        return (loss * share, outputs) if return_outputs else loss * share

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(self.weights[name] * term for name, term in terms.items())

    def _perturbed_terms(self, model, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], object]:
        def scaled_loss() -> Tensor:
            # Data parallel must not wait for gradients that this pass does not make.
            with self.accelerator.no_sync(model):
                loss = self._weighted(self.loss_terms(model, inputs)[0])
            scaler = self.accelerator.scaler  # of fp16, whose gradients underflow without it
            return loss if scaler is None else scaler.scale(loss)

        self.targets(inputs)  # before anything is hooked: a teacher may share the student's embeddings
        return self._perturbation(
            self.embeddings(), inputs.get("attention_mask"), scaled_loss, lambda: self.loss_terms(model, inputs)
        )

    @torch.no_grad()
    def _remember_if_not_finite(self, loss: Tensor, inputs: dict[str, Tensor]) -> None:
        """Keep (step, first ids) of the first bad batch on the device: to look at once would make the host wait."""
        ids = inputs["input_ids"][0, :_NAMED].long()
        here = F.pad(ids, (1, _NAMED - len(ids)), value=-1)
        here[0] = self.state.global_step
        if self._first_bad is None:
            self._first_bad = torch.full_like(here, _NEVER)
        bad = ~torch.isfinite(loss) & (self._first_bad[0] == _NEVER)
        self._first_bad = torch.where(bad, here, self._first_bad)
        if self._reads_losses_at_once(loss):
            self._stop_if_not_finite(self._first_bad)

    def _reads_losses_at_once(self, loss: Tensor) -> bool:
        """Where nobody waits: neither a device for the host, nor another process for one that has stopped."""
        return loss.device.type == "cpu" and self.args.world_size == 1

    def _stop_if_not_finite(self, *found: Tensor) -> None:
        step, *ids = min((record.tolist() for record in found), default=[_NEVER])
        if step != _NEVER:
            raise self._stopped(step, [i for i in ids if i >= 0], "the loss is not finite")

    def _stopped(self, step: int, ids, problem: str) -> NotFiniteError:
        return NotFiniteError(
            f"step {step}, the batch whose first sequence begins with the ids {list(map(int, ids))}: {problem}. The "
            f"run stops; checkpoints in {self.args.output_dir} are from before. Look at the teacher and the learning "
            "rate"
        )

    def _stop_everywhere_if_not_finite(self) -> None:
        """On every rank alike, or those that go on would wait for the one that stopped."""
        if self._first_bad is not None:
            self._stop_if_not_finite(*self.accelerator.gather(self._first_bad[None]))

    def log(self, logs, start_time=None):
        if "loss" in logs and self._steps:
            self._stop_everywhere_if_not_finite()
            means = self.accelerator.reduce(torch.stack(list(self._sums.values())) / self._steps, "mean").tolist()
            logs |= {f"loss_{name}": mean for name, mean in zip(self._sums, means, strict=True)}
            if self._perturbation:
                skipped = torch.as_tensor(self._perturbation.skipped, device=self.args.device)
                logs["perturbation_skipped"] = int(self.accelerator.reduce(skipped, "sum"))
                self._perturbation.skipped = 0
            logs |= self.extra_logs()
            self._sums, self._steps = {}, 0.0
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        self._stop_everywhere_if_not_finite()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        # A finite loss can have had a gradient that was not: such a step must not take a good checkpoint's place.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise NotFiniteError(
                    f"{name} holds NaN or infinity after step {self.state.global_step}: it is not saved; checkpoints "
                    f"in {self.args.output_dir} are from before. Look at the learning rate"
                )
        super().save_model(output_dir, _internal_call)

    def _get_train_sampler(self, train_dataset=None):
        lengths = self._lengths()
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedBatches(lengths, together, seed, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset):
        # transformers groups here too, and `predict` would return its predictions in that order.
        return None


def padding_share(lengths: list[int], batch_size: int, grouped: bool) -> float:
    """Share of padding among the tokens of batches of `batch_size`, in [0, 1], grouped by length or not."""
    order = list(LengthGroupedBatches(lengths, batch_size, 0)) if grouped else range(len(lengths))
    batches = [[lengths[i] for i in order[k : k + batch_size]] for k in range(0, len(order), batch_size)]
    padded = sum(max(b) * len(b) for b in batches)
    return 1 - sum(map(sum, batches)) / padded if padded else 0.0


def check_vocabulary(tokenizer, **models) -> None:
    """Raise a ValueError where the tokenizer can give ids that a model's embedding does not hold."""
    for name, model in models.items():
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the {name}'s embedding {rows} rows; "
                "use the tokenizer that belongs to the model, or model.resize_token_embeddings"
            )
