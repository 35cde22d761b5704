"""Every way to store a table keeps to its bytes."""

import pytest
import torch

from fastkd.benchmarks.tables.stored_embeddings import METHODS, candidates, code_bytes, disk_bytes, store

VOCABULARY, WIDTH = 3000, 64
SPECIAL = [0, 1, 2]


@pytest.fixture(scope="module")
def weight():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def counts():
    return torch.arange(VOCABULARY, 0, -1)


def budget_of(ratio: float) -> int:
    return int(VOCABULARY * WIDTH * 4 / ratio)


@pytest.mark.parametrize("ratio", [6, 3.9])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_takes_more_than_the_budget(method, ratio, weight, counts):
    budget = budget_of(ratio)
    tried = candidates(method, VOCABULARY, WIDTH, budget, len(SPECIAL))
    assert tried
    for setting in (tried[0], tried[-1]):
        stored = store(method, setting, weight, counts, budget, special_ids=SPECIAL, unknown_id=1)
        assert stored.nbytes <= budget
        assert stored.dense().shape == weight.shape


@pytest.mark.parametrize("method", ["sparse", "residual", "pq_rare"])
def test_bytes_are_known_before_the_fit_and_one_more_row_would_not_fit(method, weight, counts):
    budget = budget_of(4.5)
    for setting in candidates(method, VOCABULARY, WIDTH, budget, len(SPECIAL))[:2]:
        code = store(method, setting, weight, counts, budget, special_ids=SPECIAL, unknown_id=1)
        layout = {name: value for name, value in setting.items() if name != "keep"}
        assert code_bytes(code.num_kept, VOCABULARY, WIDTH, **layout) == code.nbytes
        assert code_bytes(code.num_kept + 1, VOCABULARY, WIDTH, **layout) > budget


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_is_too_small_leaves_nothing_to_try(method):
    assert candidates(method, VOCABULARY, WIDTH, 100, len(SPECIAL)) == []


def test_the_file_is_little_larger_than_the_arrays(weight, counts):
    for method in ("sparse", "svd"):
        budget = budget_of(4)
        [setting, *_] = candidates(method, VOCABULARY, WIDTH, budget, len(SPECIAL))
        stored = store(method, setting, weight, counts, budget, special_ids=SPECIAL, unknown_id=1)
        assert stored.nbytes < disk_bytes(stored) < stored.nbytes + 2000


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"no method 'zip'; allowed are sparse, residual"):
        candidates("zip", VOCABULARY, WIDTH, 1000, 3)
