"""The best k tokens: drawn and relaxed, hard, and a selector that learns them from a frozen teacher."""

import dataclasses

import pytest
import torch
from torch import nn

from fastkd.explain import (
    Classifier,
    Fingerprint,
    Selector,
    SelectorSettings,
    TeacherResults,
    hard_top_k,
    relaxed_top_k,
    train_selector,
)
from fastkd.explain.selection import chosen_counts

MASKABLE = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize(("ratio", "counts"), [(0.1, [1, 1, 0]), (0.4, [2, 2, 0]), (1.0, [5, 3, 0])])
def test_k_is_rounded_up(ratio, counts):
    assert chosen_counts(MASKABLE, ratio).tolist() == counts


def test_a_tenth_of_thirty_is_three():
    assert chosen_counts(torch.ones(1, 30).bool(), 0.1).tolist() == [3]


def test_relaxed_draws_lie_between_0_and_1_and_keep_what_is_not_maskable():
    drawn = relaxed_top_k(torch.randn(3, 8), MASKABLE, 0.4, 0.5)
    assert (drawn >= 0).all() and (drawn <= 1).all() and drawn.isfinite().all()
    assert (drawn[~MASKABLE] == 1).all() and (drawn[MASKABLE] < 1).any()


def test_cold_draws_are_hard_and_follow_strong_logits():
    logits = torch.tensor([[0.0, -90.0, 90.0, -90.0, 90.0, -90.0, 0.0, 0.0]]).repeat(300, 1)
    drawn = relaxed_top_k(logits, MASKABLE[:1].expand(300, -1), 0.4, 0.01)
    assert ((drawn < 0.01) | (drawn > 0.99)).float().mean() > 0.97
    assert not (drawn[:, [1, 3, 5]] > 0.01).any() and (drawn[:, 2] > 0.99).float().mean() > 0.5


def test_a_cold_draw_keeps_no_more_than_k_words_of_each_sequence():
    drawn = torch.stack([relaxed_top_k(torch.zeros(3, 8), MASKABLE, 0.6, 0.005) for _ in range(200)])
    kept = ((drawn > 0.5) & MASKABLE).sum(2)
    assert kept.amax(0).tolist() == [3, 2, 0]


def test_relaxed_draws_of_one_token_are_gumbel_max_samples():
    logits = torch.tensor([[2.0, 0.0, 1.0]]).log_softmax(1).repeat(20_000, 1)
    drawn = relaxed_top_k(logits, torch.ones(20_000, 3).bool(), 0.3, 0.05)
    shares = torch.bincount(drawn.argmax(1), minlength=3) / 20_000
    torch.testing.assert_close(shares, logits[0].exp(), rtol=0, atol=0.015)


def test_relaxed_draws_have_the_gradient_of_their_largest_softmax():
    """dL/dw = 1/t (diag(s) - s sᵀ) dv for one draw; padding and special tokens get none."""
    logits = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 8, dtype=torch.float64)
    drawn = relaxed_top_k(logits, MASKABLE[:1], 0.2, 0.5)
    [found] = torch.autograd.grad((drawn * upstream).sum(), logits)
    soft, pull = drawn[MASKABLE[:1]].detach(), upstream[MASKABLE[:1]]
    torch.testing.assert_close(found[MASKABLE[:1]], (soft * pull - soft * (soft @ pull)) / 0.5)
    assert not found[~MASKABLE[:1]].any()


def test_hard_masks_keep_exactly_k_words():
    logits = torch.randn(3, 8)
    kept = hard_top_k(logits, MASKABLE, 0.4)
    assert (kept & MASKABLE).sum(1).tolist() == [2, 2, 0] and kept[~MASKABLE].all()
    assert logits[0][kept[0] & MASKABLE[0]].min() > logits[0][~kept[0]].max()


def test_of_equal_logits_the_first_are_kept():
    kept = hard_top_k(torch.zeros(3, 8), MASKABLE, 0.4)[0] & MASKABLE[0]
    assert kept.nonzero()[:, 0].tolist() == [1, 2]


class KeyWords(nn.Module):
    """A teacher that counts words 5 and 6, which have a dimension each, and sees no other."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        with torch.no_grad():
            self.embedding.weight[:, :2] = 0
            self.embedding.weight[5, 0] = self.embedding.weight[6, 1] = 1

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask):
        return 4 * self.embedding(input_ids)[..., :2].sum(1)


def _key_word_batches(count=12):
    ids = torch.randint(7, 30, (count, 8, 10))
    ids[:, :, 0] = 1
    places = torch.randint(1, 10, (count, 8, 1))
    ids.scatter_(2, places, torch.randint(5, 7, (count, 8, 1)))
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids]


@pytest.fixture
def teacher():
    return Classifier(KeyWords(), special_ids=(0, 1))


SETTINGS = SelectorSettings(ratio=0.1, epochs=20, learning_rate=1e-2, hidden=16)


def test_a_selector_finds_the_words_that_the_teacher_looks_at(teacher):
    batches = _key_word_batches()
    selector = train_selector(teacher, batches, SETTINGS)
    hits = []
    for batch in _key_word_batches(4):
        chosen = selector.select(teacher, batch, 0.1) & teacher.maskable(batch)
        hits.append((chosen & (batch["input_ids"] < 7)).any(1).float().mean())
    assert torch.stack(hits).mean() > 0.9


def test_training_a_selector_leaves_the_teacher_and_the_generator_alone(teacher):
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    batches = _key_word_batches(1)
    state = torch.get_rng_state()
    train_selector(teacher, batches, SelectorSettings(epochs=1))
    torch.testing.assert_close(teacher.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_selector(teacher):
    batches = _key_word_batches(2)
    first, second = (train_selector(teacher, batches, SelectorSettings(epochs=1)).state_dict() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("baseline", ["zero", "mask"])
def test_a_berts_selector_gives_scores_and_masks_of_words_alone(classifier, batch, baseline):
    selector = train_selector(classifier, [batch], SelectorSettings(epochs=2, baseline=baseline))
    scores = selector.probabilities(classifier, batch)
    maskable = classifier.maskable(batch)
    torch.testing.assert_close(scores.sum(1), torch.ones(3))
    assert not scores[~maskable].any()
    torch.testing.assert_close(selector.probabilities(classifier, batch, norm="l2").norm(dim=1), torch.ones(3))
    assert (selector.select(classifier, batch, 0.3) & maskable).sum(1).tolist() == [3, 2, 2]


def test_a_saved_selector_is_read_for_what_it_was_trained_on_and_nothing_else(classifier, batch, tmp_path):
    selector = train_selector(classifier, [batch], SelectorSettings(epochs=1))
    fingerprint = Fingerprint("teacher", "tokenizer", "data", {"selection": {"ratio": 0.3}})
    selector.save(tmp_path / "selector.safetensors", fingerprint)
    state = torch.get_rng_state()
    read = Selector.load(tmp_path / "selector.safetensors", fingerprint)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(read.probabilities(classifier, batch), selector.probabilities(classifier, batch))
    other = dataclasses.replace(fingerprint, settings={"selection": {"ratio": 0.5}})
    with pytest.raises(ValueError, match=r"selection\.ratio: 0.3 is stored, 0.5 given"):
        Selector.load(tmp_path / "selector.safetensors", other)
    TeacherResults(fingerprint, torch.ones(1, dtype=torch.int64), {}, {}).save(tmp_path / "results.safetensors")
    with pytest.raises(ValueError, match="holds no selector"):
        Selector.load(tmp_path / "results.safetensors", fingerprint)


def test_padding_does_not_change_a_selection(classifier, batch):
    selector = train_selector(classifier, [batch], SelectorSettings(epochs=1))
    short = {name: value[1:, :7] for name, value in batch.items()}
    expected = selector.probabilities(classifier, batch)[1:, :7]
    torch.testing.assert_close(selector.probabilities(classifier, short), expected)


@pytest.mark.parametrize(
    "settings", [{"ratio": 0.0}, {"ratio": 1.5}, {"baseline": "noise"}, {"temperature": 0.0}, {"epochs": 0}]
)
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        SelectorSettings(**settings)


def test_a_selector_needs_batches(teacher):
    with pytest.raises(ValueError, match="no batches"):
        train_selector(teacher, [])


def test_a_loss_that_is_not_finite_stops_the_training(teacher):
    with torch.no_grad():
        teacher.model.embedding.weight[9] = torch.nan
    with pytest.raises(ValueError, match="selector, epoch 0, step 0: the loss is nan"):
        train_selector(teacher, _key_word_batches(1))
