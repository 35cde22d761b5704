"""What the sparse code is judged against: each method keeps its budget, and does what its name says."""

import pytest
import torch

import fastkd
from fastkd.embeddings import baselines

VOCABULARY, WIDTH = 600, 24


@pytest.fixture
def weight():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counts():
    return torch.arange(VOCABULARY).flip(0)


METHODS = {
    "rare_as_unknown": lambda w, c, budget: baselines.rare_as_unknown(w, c, budget, unknown_id=3),
    "rare_as_unknown, int8": lambda w, c, budget: baselines.rare_as_unknown(w, c, budget, unknown_id=3, rows="int8"),
    "low_rank": lambda w, c, budget: baselines.low_rank(w, budget),
    "product_quantised": lambda w, c, budget: baselines.product_quantised(w, budget),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [20_000, 30_000])
def test_a_budget_is_kept(weight, counts, method, budget):
    stored = METHODS[method](weight, counts, budget)
    assert budget / 2 < stored.nbytes <= budget
    assert stored.dense().shape == weight.shape and stored.dense().dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_nothing_fits_is_refused_with_the_least(weight, counts, method):
    with pytest.raises(ValueError, match=r"budget=100 bytes; the least for this table is \d+"):
        METHODS[method](weight, counts, 100)


@pytest.mark.parametrize("method", METHODS)
def test_the_least_budget_is_enough(weight, counts, method):
    with pytest.raises(ValueError) as refused:
        METHODS[method](weight, counts, 100)
    assert METHODS[method](weight, counts, int(str(refused.value).split()[-1])).nbytes


def test_rare_rows_are_those_of_the_unknown_token(weight, counts):
    stored = baselines.rare_as_unknown(weight, counts, 20_000, unknown_id=599, special_ids=[598])
    table = stored.dense()
    frequent = [*range(stored.size - 2), 598, 599]
    assert torch.equal(table[frequent], weight[frequent])
    assert (table[stored.size - 2 : 598] == weight[599]).all()


def test_a_low_rank_table_is_the_best_of_its_rank(weight):
    stored = baselines.low_rank(weight, 10_000)
    singular = torch.linalg.svdvals(weight.double())
    best = singular[stored.size :].square().sum().sqrt().item()
    assert (stored.dense() - weight).norm().item() == pytest.approx(best, rel=1e-3)


def test_a_full_rank_table_is_exact_up_to_fp16(weight):
    torch.testing.assert_close(baselines.low_rank(weight, 10**6).dense(), weight, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_integer_rows_are_off_by_half_a_step(weight, bits, steps):
    stored = baselines.integer_rows(weight, bits)
    step = weight.abs().amax(1, keepdim=True) / steps
    assert ((stored.dense() - weight).abs() <= 0.51 * step).all()
    assert stored.nbytes == VOCABULARY * (WIDTH * bits // 8 + (4 if bits == 8 else 2))


def test_other_numbers_of_bits_are_refused(weight):
    with pytest.raises(ValueError, match="bits=2 for a width of 24; allowed are 8, and 4 for an even width"):
        baselines.integer_rows(weight, 2)


def test_product_quantisation_is_a_sparse_code_without_kept_rows(weight, tmp_path):
    code = baselines.product_quantised(weight, 20_000)
    assert (code.num_kept, code.num_atoms, code.num_embeddings) == (0, 0, VOCABULARY)
    code.save(tmp_path / "code.safetensors")
    assert torch.equal(fastkd.SparseCode.load(tmp_path / "code.safetensors").dense(), code.dense())


def test_random_neighbours_lose_more_than_the_nearest(weight, counts):
    drawn = baselines.random_neighbours(weight, counts, keep=0.3, atoms=4)
    nearest = fastkd.SparseCode.fit(weight, counts, keep=0.3, atoms=4)
    assert drawn.nbytes == nearest.nbytes
    assert drawn.error.mean() > nearest.error.mean()
    assert all(len(set(ids)) == 4 for ids in drawn.arrays.atom_ids.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_a_table_with_nan_is_refused(weight, counts, method):
    weight[5, 3] = float("nan")
    with pytest.raises(ValueError, match="first in row 5"):
        METHODS[method](weight, counts, 20_000)
