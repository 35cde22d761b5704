"""What all of fastkd's trainers share, on top of transformers' own.

Defaults that matter on any machine, an order of batches that is a pure function of (seed, epoch), every loss term
logged under its own name, and a stop with a name when a loss is not finite.
"""

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


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

    def __post_init__(self):
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
    randomness dropout has used before; here a resumed run sees the batches it would have seen.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # Within a group transformers sorts from long to short: whole batches are shuffled, or lengths would drift.
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter([i for b in [*(batches[k] for k in order), *last] for i in b])


class NotFiniteError(RuntimeError):
    """A loss became NaN or infinite; the message names the step and what to look at."""


class DistillationTrainer(Trainer):
    """A Trainer whose subclasses give `loss_terms`: the terms of one batch by name, each a scalar mean over the batch.

    The sum of `weights[name] * term` is what is minimised. Each term is logged as `loss_<name>`, averaged since the
    last log.
    """

    weights: dict[str, float]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Terms are means over a batch: the Trainer divides them by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._first_bad_step: Tensor | None = None

    def loss_terms(self, model, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], object]:
        """The unweighted loss terms of a batch, and the model's output."""
        raise NotImplementedError

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
        return lines

    def train(self, *args, **kwargs):
        if self.is_world_process_zero():
            print("\n".join(f"  {topic:<12}{text}" for topic, text in self.description().items()), flush=True)
        return super().train(*args, **kwargs)

    def _lengths(self) -> list[int] | None:
        """Tokens of each training example; None for a stream."""
        if not isinstance(self.train_dataset, Dataset):
            return None
        # From the full dataset: what reaches the sampler has lost the columns that the model does not take.
        name = self.args.length_column_name
        data = self.train_dataset
        return list(data[name]) if name in data.column_names else [len(ids) for ids in data["input_ids"]]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        try:
            terms, outputs = self.loss_terms(model, inputs)
        except ValueError as error:
            if "is not finite" not in str(error):
                raise
            raise NotFiniteError(f"step {self.state.global_step}, {self._batch_name(inputs)}: {error}") from error
        loss = sum(self.weights[name] * term for name, term in terms.items())
        with torch.no_grad():
            for name, term in terms.items():
                self._sums[name] = self._sums.get(name, 0) + term.detach().float()
            self._batches += 1
            # Kept on the device: the host reads it at logging steps and before a checkpoint, where it waits anyway.
            bad = torch.where(torch.isfinite(loss.detach()), torch.inf, float(self.state.global_step))
            self._first_bad_step = bad if self._first_bad_step is None else torch.minimum(self._first_bad_step, bad)
        return (loss, outputs) if return_outputs else loss

    def _batch_name(self, inputs: dict[str, Tensor]) -> str:
        ids = inputs.get("input_ids")
        if ids is None:
            return "batch"
        return f"batch of shape {tuple(ids.shape)} that starts with ids {ids[0, :8].tolist()}"

    def _stop_if_not_finite(self) -> None:
        if self._first_bad_step is not None and torch.isfinite(self._first_bad_step):
            raise NotFiniteError(
                f"the loss was not finite at step {int(self._first_bad_step)}; the run stops, the last checkpoint in "
                f"{self.args.output_dir} is from before it. Look at the teacher's outputs and the learning rate"
            )

    def log(self, logs, start_time=None):
        if "loss" in logs and self._batches:
            self._stop_if_not_finite()
            logs |= {f"loss_{name}": round((total / self._batches).item(), 6) for name, total in self._sums.items()}
            logs |= self.extra_logs()
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        self._stop_if_not_finite()
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset=None):
        lengths = self._lengths()
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedBatches(lengths, together, seed)


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
