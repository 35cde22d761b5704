"""The search for atoms: nearest by cosine, the smaller id first where rows are equally near, at every batch size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.embeddings.neighbours import SPARE_CANDIDATES, Neighbours


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_definition(x, candidates, k):
    """One row after another in fp64, nothing clever."""
    found = []
    for row in x.double():
        if row.any():
            similarity = torch.nn.functional.cosine_similarity(row[None], candidates.double(), dim=1)
            similarity[~candidates.any(1)] = -torch.inf
        else:
            similarity = -candidates.double().norm(dim=1)
        found.append(sorted(range(len(candidates)), key=lambda i, s=similarity: (-s[i].item(), i))[:k])
    return torch.tensor(found)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), number=st.integers(4, 60), k=st.integers(1, 4))
def test_they_are_the_nearest_by_cosine(seed, number, k):
    x, candidates = normal(7, 10, seed=seed), normal(number, 10, seed=seed + 1)
    assert torch.equal(Neighbours(candidates).nearest(x, k), by_definition(x, candidates, k))


@pytest.mark.parametrize("copies", [2, SPARE_CANDIDATES + 4])
def test_of_equal_rows_the_first_are_taken(copies):
    """Also where there are more of them than the search looks at closely."""
    candidates = normal(5, 33).repeat(copies, 1)
    found = Neighbours(candidates).nearest(candidates[:5], 3)
    nearest = [[row + 5 * copy for copy in range(copies)][:3] for row in range(5)]
    assert [ids[: min(3, copies)] for ids in found.tolist()] == [ids[: min(3, copies)] for ids in nearest]


def test_the_same_rows_are_found_whatever_the_batch():
    x, candidates = normal(64, 48), normal(10, 48, seed=1).repeat(7, 1)
    neighbours = Neighbours(candidates)
    at_once = neighbours.nearest(x, 8)
    assert torch.equal(at_once, torch.cat([neighbours.nearest(row[None], 8) for row in x]))


def test_a_row_of_zeros_is_the_farthest_candidate():
    candidates = normal(6, 8)
    candidates[0] = 0
    assert Neighbours(candidates).nearest(-candidates[1:], 6)[:, -1].tolist() == [0] * 5


def test_the_nearest_of_a_row_of_zeros_are_the_shortest():
    candidates = normal(40, 8)
    candidates[7] = 0
    x = torch.zeros(2, 8)
    assert torch.equal(Neighbours(candidates).nearest(x, 4), by_definition(x, candidates, 4))
    assert Neighbours(candidates).nearest(x, 4)[0, 0] == 7


@pytest.mark.parametrize("exponent", [-100, 100])
def test_very_small_and_very_large_tables_are_searched_like_others(exponent):
    x, candidates, scale = normal(7, 10), normal(40, 10, seed=1), 2.0**exponent
    found = Neighbours(candidates * scale).nearest(x * scale, 4)
    assert torch.equal(found, Neighbours(candidates).nearest(x, 4))
