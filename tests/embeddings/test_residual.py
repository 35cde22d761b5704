"""Product quantisation: what is stored is the nearest that the stored codebook has."""

import pytest
import torch

import fastkd
from fastkd.embeddings.fit import importance_of
from fastkd.embeddings.residual import check_residual_bytes, product_quantise


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(codes, codebook):
    return torch.cat([codebook[m][codes[:, m].long()] for m in range(codes.shape[1])], 1).float()


def test_every_sub_vector_is_the_nearest_of_its_codebook():
    rows = normal(700, 12)
    codes, codebook = product_quantise(rows, 3)
    assert codes.shape == (700, 3) and codes.dtype == torch.uint8
    assert codebook.shape == (3, 256, 4) and codebook.dtype == torch.float16
    chosen = (decoded(codes, codebook) - rows).view(700, 3, 4).norm(dim=2)
    for m in range(3):
        nearest = (rows[:, None, 4 * m : 4 * m + 4] - codebook[m].float()).norm(dim=2).amin(1)
        torch.testing.assert_close(chosen[:, m], nearest, rtol=0, atol=1e-5)


def test_the_same_rows_and_seed_give_the_same_code():
    rows = normal(600, 8)
    for first, second in zip(product_quantise(rows, 2), product_quantise(rows, 2), strict=True):
        assert torch.equal(first, second)


def test_more_bytes_lose_less():
    rows = normal(1000, 16)
    lost = [(decoded(*product_quantise(rows, m)) - rows).norm().item() for m in (1, 2, 4, 8)]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.2 * lost[0]


def test_important_rows_lose_less():
    rows, importance = normal(1000, 8), torch.ones(1000)
    importance[:100] = 100
    lost = (decoded(*product_quantise(rows, 2, importance)) - rows)[:100].norm()
    assert lost < 0.8 * (decoded(*product_quantise(rows, 2)) - rows)[:100].norm()


@pytest.mark.parametrize("number", [1, 100, 256])
def test_no_more_rows_than_centroids_are_stored_up_to_fp16(number):
    rows = normal(number, 8)
    torch.testing.assert_close(decoded(*product_quantise(rows, 2)), rows, rtol=1e-3, atol=1e-4)


def test_rows_that_are_all_equal_are_stored():
    rows = torch.ones(500, 4)
    assert torch.equal(decoded(*product_quantise(rows, 2)), rows)


def test_a_row_beyond_fp16_is_refused():
    with pytest.raises(ValueError, match="float16 cannot hold"):
        product_quantise(torch.full((10, 4), 1e6), 2)


def test_widths_that_do_not_divide_list_those_that_do():
    with pytest.raises(ValueError, match=r"residual_bytes=5; allowed at width 12 are 0 \(none\) and 1, 2, 3, 4, 6, 12"):
        check_residual_bytes(5, 12)


@pytest.mark.parametrize("residual_bytes", [-1, 13, 24, 1.5])
def test_no_other_number_of_bytes_is_allowed(residual_bytes):
    with pytest.raises(ValueError, match="residual_bytes="):
        check_residual_bytes(residual_bytes, 12)


def test_a_residual_brings_coded_rows_nearer_and_leaves_kept_ones_alone():
    weight, counts = normal(900, 16), torch.arange(900).flip(0)
    plain = fastkd.SparseCode.fit(weight, counts, atoms=4)
    better = fastkd.SparseCode.fit(weight, counts, atoms=4, residual_bytes=4)
    assert torch.equal(better.dense()[:90], weight[:90])
    assert better.error.mean() < 0.8 * plain.error.mean()
    assert better.nbytes == plain.nbytes + 810 * 4 + 256 * 16 * 2


def test_without_atoms_the_coded_rows_themselves_are_quantised():
    weight, counts = normal(900, 16), torch.arange(900).flip(0)
    code = fastkd.SparseCode.fit(weight, counts, atoms=0, weights="int8", residual_bytes=8)
    assert code.num_atoms == 0 and code.arrays.weight_scale is None
    assert torch.equal(code.dense()[:90], weight[:90])
    codes, codebook = product_quantise(weight[90:], 8, importance_of(counts[90:]))
    assert torch.equal(code.dense()[90:], decoded(codes, codebook))
