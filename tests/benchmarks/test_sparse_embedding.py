"""The benchmark of sparse_embedding compares providers that compute the same thing, on the ids it says."""

import pytest
import torch

from fastkd.benchmarks.harness import measure
from fastkd.benchmarks.kernels.sparse_embedding import SHAPES, case, draw_ids, random_code


@pytest.mark.parametrize("shape", SHAPES["tiny"], ids=lambda shape: shape.kind)
@pytest.mark.parametrize("rows", [torch.float32, torch.float16, torch.int8], ids=str)
def test_all_providers_agree(shape, rows):
    made = case(shape._replace(rows=rows), "cpu")
    made.providers[:] = [provider for provider in made.providers if "torch.compile" not in provider.name]
    measured = measure(made, budget=0.0)
    assert {row["status"] for row in measured} == {"ok"}
    assert {"fastkd reference", "copy of the bytes"} <= {row["provider"] for row in measured}


def test_the_issues_shapes_are_measured():
    lookups = [s for s in SHAPES["small"] if s.kind == "lookup" and s.sequences == 32 and s.rows == torch.float32]
    assert [s.rare_percent for s in lookups] == [5, 15, 30]
    assert {(s.length, s.width, s.vocabulary) for s in lookups} == {(128, 768, 30522)}


def test_ids_are_zipf_over_kept_rows_and_uniform_over_the_others():
    code = random_code(1000, 100, 4, 2)
    place = code.slot[draw_ids(code, 100, 1000, rare_percent=15).flatten()].long()
    common, rare = place[place < 100], place[place >= 100]
    assert len(rare) / len(place) == pytest.approx(0.15, abs=0.01)
    counts = torch.bincount(common, minlength=100) / len(common)
    zipf = 1 / torch.arange(1, 101)
    torch.testing.assert_close(counts, zipf / zipf.sum(), rtol=0.2, atol=1e-3)
    assert torch.bincount(rare - 100, minlength=900).float().std() < 8
