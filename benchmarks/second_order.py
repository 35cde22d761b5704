"""`python -m fastkd.benchmarks.second_order ENCODER`: how far the gradient of EGKD's gradient branch is from double
backward in fp64: by central differences in fp64, where the step is all that is left of it, and in fp32, for several
steps; and by double backward in fp32 and under bf16 autocast.

The teacher is the encoder with a fresh head; a student has its first layers, and is looked at before and while it
learns the labels of one batch of the docstring task by heart, without dropout. Errors are norms, relative to that of
the gradient of all parameters.
"""

import argparse
import copy
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from fastkd.data import load_docstring_task
from fastkd.explain import DistanceTo, GradientSettings, central_difference, distance, gradient_attribution
from fastkd.models import create_student
from fastkd.models.loading import load_tokenizer
from fastkd.recipes.egkd_teacher import classifier_of
from fastkd.recipes.task_recipe import with_head

STEPS = (1e-2, 3e-3, 1e-3)
FP64_STEP = 1e-4
LEARNT = (0, 5, 15, 30)  # optimizer steps
_SETTINGS = GradientSettings("gradient_x_input", score="log_probability", norm="l2")


def errors(student: PreTrainedModel, tokenizer, inputs: dict[str, Tensor], wanted: Tensor, classes: Tensor) -> dict:
    """Relative error of each form, by its name; `wanted`: the teacher's scores (B, L) of the classes (B,)."""
    mask = inputs["attention_mask"]

    def gradient(model: PreTrainedModel, form) -> Tensor:
        loss = form(classifier_of(model, tokenizer))
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads]).double()

    def exact(classifier) -> Tensor:
        scores = gradient_attribution(classifier, inputs, _SETTINGS, target=classes, create_graph=True)
        return distance(scores, wanted.to(scores.dtype), mask)

    def difference(step: float):
        return lambda classifier: central_difference(
            classifier, inputs, _SETTINGS, DistanceTo(wanted), target=classes, step=step
        )

    double = copy.deepcopy(student).double()
    truth = gradient(double, exact)
    found = {f"difference, fp64, step {FP64_STEP:g}": gradient(double, difference(FP64_STEP))}
    found |= {f"difference, fp32, step {step:g}": gradient(student, difference(step)) for step in STEPS}
    found["double backward, fp32"] = gradient(student, exact)
    with torch.autocast(mask.device.type, torch.bfloat16):
        found["double backward, bf16"] = gradient(student, exact)
    return {name: ((value - truth).norm() / truth.norm()).item() for name, value in found.items()}


def students(teacher: PreTrainedModel, layers: int, inputs: dict, labels: Tensor) -> Iterator[tuple[str, object]]:
    """Students and what they are: of random weights, and as they learn."""
    torch.manual_seed(0)
    blank = type(teacher)(copy.deepcopy(teacher.config))
    yield "random weights", create_student(blank, layers=layers).eval()
    student = create_student(teacher, layers=layers).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    for step in range(max(LEARNT) + 1):
        if step in LEARNT:
            yield f"first layers, {step} steps", student
        optimizer.zero_grad()
        student(**inputs, labels=labels).loss.backward()
        optimizer.step()


def table(encoder: str, layers: int, examples: int, max_length: int) -> list[tuple[str, dict]]:
    """Errors by student.

    Raises:
        ValueError: no such encoder.
    """
    task = load_docstring_task()
    tokenizer = load_tokenizer(encoder, "encoder")
    teacher = with_head(encoder, task, argument="encoder").eval()
    rows = (
        task.tokenize(tokenizer, max_length)["train"].shuffle(seed=0).select(range(examples)).remove_columns("length")
    )
    inputs = dict(DataCollatorWithPadding(tokenizer)(rows.to_list()))
    labels = inputs.pop("labels")
    classes = teacher(**inputs).logits.argmax(1)
    wanted = gradient_attribution(classifier_of(teacher, tokenizer), inputs, _SETTINGS, target=classes).detach()
    return [
        (name, errors(student, tokenizer, inputs, wanted, classes))
        for name, student in students(teacher, layers, inputs, labels)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m fastkd.benchmarks.second_order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("encoder", metavar="ENCODER", help="DIR_OR_HUB_ID")
    parser.add_argument("--layers", type=int, default=3, help="of the student (%(default)s)")
    parser.add_argument("--examples", type=int, default=32, help="of the batch (%(default)s)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens (%(default)s)")
    options = parser.parse_args()
    try:
        rows = table(options.encoder, options.layers, options.examples, options.max_length)
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    print("| student |", " | ".join(rows[0][1]), "|")
    print("|---" * (1 + len(rows[0][1])) + "|")
    for name, found in rows:
        print(f"| {name} |", " | ".join(f"{100 * error:.2g} %" for error in found.values()), "|")


if __name__ == "__main__":
    main()
