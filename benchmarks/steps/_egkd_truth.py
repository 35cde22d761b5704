"""What a step of EGKD has to give, term by term and without the recipe, and the public way to its gradient branch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.explain import GradientSettings, distance, gradient_attribution, masked_logits, twice_differentiable
from fastkd.recipes.egkd_teacher import classifier_of


@dataclass
class Truth:
    """Terms of a step on one batch, each with its gradient, in the batch's own numbers and in fp64.

    Args:
        student, teacher: the models as a run gets them. tokenizer: names the special tokens.
        inputs: input_ids and attention_mask (B, L). labels: (B,).
        soft_weight, temperature: of plain distillation.
        explainer, target: of the gradient branch; `target` is "predicted", the teacher's class, or "all".
        autocast: makes the context for passes in these numbers.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module
    tokenizer: object
    inputs: dict[str, Tensor]
    labels: Tensor
    soft_weight: float
    temperature: float
    explainer: GradientSettings
    target: str
    autocast: Callable
    _found: dict = field(default_factory=dict)

    def of(self, branches: dict[str, float], kept: dict[str, Tensor]) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
        """`harness.Case.exact` of plain distillation and these branches, each by its weight; kept, (B, 1, L) bool,
        are the tokens that a branch leaves."""

        def exact(precision: torch.dtype) -> tuple[Tensor, Tensor]:
            loss, gradient = self._term("plain", precision, None)
            for name, weight in branches.items():
                further = self._term(name, precision, kept.get(name))
                loss, gradient = (a + weight * b for a, b in zip((loss, gradient), further, strict=True))
            return loss, gradient

        return exact

    def balance(self, precision: torch.dtype) -> float:
        """The weight at which the gradient branch's gradient is as long as that of plain distillation."""
        plain, branch = (self._term(name, precision, None)[1].norm() for name in ("plain", "gradient"))
        return (plain / branch).item()

    def _term(self, name: str, precision: torch.dtype, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and gradient, computed once for all ways that have the term."""
        key = (name, precision, None if kept is None else kept.cpu().numpy().tobytes())
        if key not in self._found:
            models = [self.student, self.teacher]
            if precision == torch.float64:
                models = [copy.deepcopy(model).double() for model in models]
            student, teacher = (classifier_of(model, self.tokenizer) for model in models)
            with self.autocast(precision):
                loss = self._loss(name, student, teacher, kept)
            grads = torch.autograd.grad(loss, list(models[0].parameters()), allow_unused=True, materialize_grads=True)
            self._found[key] = (loss.detach(), torch.cat([grad.flatten() for grad in grads]))
        return self._found[key]

    def _loss(self, name: str, student, teacher, kept: Tensor | None) -> Tensor:
        with torch.no_grad():
            whole = teacher.logits(self.inputs)
        if name == "gradient":
            which = whole.argmax(1) if self.target == "predicted" else self.target
            wanted = gradient_attribution(teacher, self.inputs, self.explainer, target=which)
            scores = gradient_attribution(student, self.inputs, self.explainer, target=which, create_graph=True)
            return distance(scores, wanted, self.inputs["attention_mask"])
        if name == "plain":
            logits = student.logits(self.inputs)
            task = F.cross_entropy(logits, self.labels)
            return (1 - self.soft_weight) * task + self.soft_weight * self.soft(logits, whole)
        with torch.no_grad():
            wanted = masked_logits(teacher, self.inputs, kept)[:, 0] if name == "perturbation" else whole
        return self.soft(masked_logits(student, self.inputs, kept)[:, 0], wanted)

    def soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        """τ² KL of logits (B, C)."""
        log_student, log_teacher = ((logits / self.temperature).log_softmax(1) for logits in (student, teacher))
        return self.temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def public_loss(truth: Truth, model: torch.nn.Module, weight: float, *, shared: bool) -> Tensor:
    """A step's loss as public code computes it, every class explained by integrated gradients from zero: a Python loop
    over classes and integration steps on the mathematical attention path, for the student, and at every step for the
    teacher too. `shared`: the classes of an integration step share a forward, as in AD-KD's code (Wu et al., ACL 2023).
    """
    student, teacher = (classifier_of(each, truth.tokenizer) for each in (model, truth.teacher))
    mask = truth.inputs["attention_mask"]
    with twice_differentiable():
        with torch.no_grad():
            whole = teacher.logits(truth.inputs)
        logits = student.logits(truth.inputs)
        soft = truth.soft(logits, whole)
        plain = (1 - truth.soft_weight) * F.cross_entropy(logits, truth.labels) + truth.soft_weight * soft
        wanted = _looped(truth, teacher, logits.shape[1], shared, learnt=False)
        scores = _looped(truth, student, logits.shape[1], shared, learnt=True)
    return plain + weight * sum(distance(*pair, mask) for pair in zip(scores, wanted, strict=True))


def _looped(truth: Truth, classifier, classes: int, shared: bool, learnt: bool) -> list[Tensor]:
    """Scores (B, L) of each class."""
    mask = truth.inputs["attention_mask"]
    embeddings = classifier.embed(truth.inputs)
    if not learnt:
        embeddings = embeddings.detach().requires_grad_()
    gradients = [0.0] * classes
    for step in range(1, truth.explainer.steps + 1):
        part = step / truth.explainer.steps
        log_probabilities = None
        for k in range(classes):
            if log_probabilities is None or not shared:
                points = part * embeddings
                log_probabilities = classifier.logits(truth.inputs, points).log_softmax(1)
            [slope] = torch.autograd.grad(
                log_probabilities[:, k].sum(), points, create_graph=learnt, retain_graph=learnt or shared
            )
            gradients[k] = gradients[k] + slope / truth.explainer.steps
    products = [(gradient * embeddings * mask[..., None]).norm(dim=2) for gradient in gradients]
    return [F.normalize(product, dim=1) if learnt else F.normalize(product, dim=1).detach() for product in products]
