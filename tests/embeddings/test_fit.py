"""The solve and the choice of rows: exact where it can be, and each edge case as the method's description rules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkd
from fastkd.embeddings.code import decode_rows
from fastkd.embeddings.fit import importance_of, rank_tokens, round_weights, share_atoms, solve

quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**16)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fit(weight, counts=None, **options):
    """A fit whose rows are kept in the order of their ids unless counts say otherwise."""
    counts = torch.arange(len(weight)).flip(0) if counts is None else counts
    return fastkd.SparseCode.fit(weight, counts, **options)


def weights_of(code):
    return decode_rows(code.arrays.atom_weights, code.arrays.weight_scale)


# The solve


@quick
@given(seed=seeds, k=st.integers(1, 8))
def test_a_point_inside_the_simplex_of_its_atoms_is_met_exactly_without_ridge(seed, k):
    atoms = normal(5, k, 12, seed=seed, dtype=torch.float64)
    shares = normal(5, k, seed=seed + 1, dtype=torch.float64).softmax(1)
    x = (shares[..., None] * atoms).sum(1)
    torch.testing.assert_close(solve(x, atoms, ridge=0.0), shares, rtol=0, atol=1e-6)


@quick
@given(seed=seeds, k=st.integers(1, 8))
def test_with_the_ridge_such_a_point_is_off_by_no_more_than_the_ridge_allows(seed, k):
    """At the true weights w the objective is λ tr(C)/k ‖w‖² <= λ tr(C)/k, and the minimum is not above it."""
    atoms = normal(5, k, 12, seed=seed)
    x = (normal(5, k, seed=seed + 1).softmax(1)[..., None] * atoms).sum(1)
    off = (x - (solve(x, atoms).float()[..., None] * atoms).sum(1)).norm(dim=1)
    allowed = (1e-3 * (x[:, None] - atoms).square().sum(2).mean(1)).sqrt()
    assert (off <= allowed + 1e-5).all()


@quick
@given(seed=seeds, k=st.integers(1, 12))
def test_weights_are_the_minimiser_of_the_stated_objective(seed, k):
    """No step along the plane of weights that sum to one lowers it."""
    x, atoms = normal(4, 6, seed=seed, dtype=torch.float64), normal(4, k, 6, seed=seed + 1, dtype=torch.float64)

    def objective(w):
        ridge = 1e-3 * (x[:, None] - atoms).square().sum((1, 2)) / k
        return (x - (w[..., None] * atoms).sum(1)).square().sum(1) + ridge * w.square().sum(1)

    best = solve(x, atoms)
    step = normal(4, k, seed=seed + 2, dtype=torch.float64)
    step -= step.mean(1, keepdim=True)
    for size in (1e-3, -1e-3, 0.1, -0.1):
        assert (objective(best + size * step) >= objective(best) - 1e-12).all()


@quick
@given(seed=seeds, k=st.integers(1, 8), exponent=st.integers(-30, 30))
def test_weights_do_not_depend_on_the_unit_of_the_table(seed, k, exponent):
    x, atoms = normal(4, 12, seed=seed), normal(4, k, 12, seed=seed + 1)
    assert torch.equal(solve(x * 2.0**exponent, atoms * 2.0**exponent), solve(x, atoms))


@quick
@given(seed=seeds, position=st.integers(0, 3))
def test_a_row_that_equals_an_atom_takes_it_alone(seed, position):
    atoms = normal(2, 4, 12, seed=seed)
    expected = torch.eye(4, dtype=torch.float64)[position].expand(2, 4)
    assert torch.equal(solve(atoms[:, position], atoms), expected)


def test_atoms_that_all_equal_the_row_share_it():
    x = normal(2, 12)
    assert torch.equal(solve(x, x[:, None].expand(2, 4, 12)), torch.full((2, 4), 0.25, dtype=torch.float64))


def test_equal_atoms_take_equal_weights():
    atoms = normal(3, 4, 12)
    atoms[:, 2] = atoms[:, 1]
    weights = solve(normal(3, 12, seed=1), atoms)
    torch.testing.assert_close(weights[:, 2], weights[:, 1])


def test_more_atoms_than_dimensions_are_solved():
    x, atoms = normal(6, 3), normal(6, 9, 3, seed=1)
    weights = solve(x, atoms)
    assert weights.isfinite().all()
    torch.testing.assert_close((weights.float()[..., None] * atoms).sum(1), x, rtol=0, atol=0.2)


@quick
@given(seed=seeds, gap=st.sampled_from([1e-1, 1e-3, 1e-5, 0.0]), ridge=st.sampled_from([0.0, 1e-9, 1e-3]))
def test_no_weight_explodes_where_atoms_nearly_coincide(seed, gap, ridge):
    """Far from a cluster of atoms, the unconstrained answer would play them off against each other."""
    atoms = normal(4, 1, 12, seed=seed) + gap * normal(4, 5, 12, seed=seed + 1)
    weights = solve(normal(4, 12, seed=seed + 2), atoms, ridge)
    assert weights.abs().max() <= 10
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))


def test_a_row_of_zeros_has_weights():
    weights = solve(torch.zeros(1, 12), normal(1, 4, 12))
    assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1)


# Rounding


@quick
@given(seed=seeds, k=st.integers(1, 16), dtype=st.sampled_from([torch.float32, torch.float16, torch.int8]))
def test_stored_weights_sum_to_one_and_are_near(seed, k, dtype):
    exact = solve(normal(6, 20, seed=seed), normal(6, k, 20, seed=seed + 1))
    stored, scale = round_weights(exact, dtype)
    assert stored.dtype == dtype and (scale is not None) == (dtype == torch.int8)
    values = decode_rows(stored, scale).double()
    largest = exact.abs().amax(1)
    step = largest / 126 if dtype == torch.int8 else largest * torch.finfo(dtype).eps
    if dtype == torch.int8:  # whole numbers sum to the inverse of their scale, itself rounded to fp16
        assert torch.equal((1 / stored.double().sum(1)).half(), scale)
    else:  # the smallest weight, with what is carried into it, is the last to be rounded
        eps = torch.finfo(dtype).eps
        assert ((values.sum(1) - 1).abs() <= eps * (exact.abs().amin(1) + eps * largest) + 1e-7).all()
    assert ((values - exact).abs() <= 1.1 * step[:, None]).all()


def test_a_plain_rounding_would_not_sum_to_one():
    exact = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert exact.half().double().sum() != 1
    assert round_weights(exact, torch.float16)[0].double().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_zero_weights_stay_zero(dtype):
    exact = torch.tensor([[0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)
    stored, _ = round_weights(exact, dtype)
    assert stored[0, 1] == 0 and stored[0, 3] == 0


# Which rows are kept


def test_the_most_frequent_rows_are_kept_as_they_are():
    weight, counts = normal(50, 8), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    code = fit(weight, counts, keep=0.2, atoms=3)
    frequent = counts.argsort(descending=True)[:10]
    assert code.num_kept == 10
    assert torch.equal(code.dense()[frequent], weight[frequent])
    assert (code.arrays.slot[frequent].int() < 10).all()


def test_of_equal_counts_the_smaller_id_is_kept():
    order, num_kept = rank_tokens(torch.zeros(20), 20, 0.3, ())
    assert order.tolist() == list(range(20)) and num_kept == 6


def test_special_tokens_are_kept_whatever_their_count():
    order, num_kept = rank_tokens(torch.tensor([5, 9, 0, 7, 0, 0, 3, 1, 2, 4]), 10, 0.4, [5, 2, 2])
    assert order[:num_kept].tolist() == [2, 5, 1, 3]


@quick
@given(vocabulary=st.integers(1, 400), percent=st.integers(1, 100))
def test_the_kept_fraction_is_rounded_down(vocabulary, percent):
    expected = vocabulary * percent // 100
    if expected:
        assert rank_tokens(torch.zeros(vocabulary), vocabulary, percent / 100, ())[1] == expected


def test_all_rows_may_be_kept():
    weight = normal(20, 8)
    code = fit(weight, keep=1.0, atoms=3)
    assert torch.equal(code.dense(), weight) and len(code.error) == 0


# The table as a whole


def test_rows_made_of_kept_ones_are_found_again():
    kept = normal(40, 64)  # so wide that unrelated rows are far
    coded = torch.stack([0.6 * kept[i] + 0.4 * kept[i + 1] for i in range(39)])
    code = fit(torch.cat((kept, coded)), keep=40 / 79, atoms=2, ridge=0.0, weights="float32")
    assert code.error.max() < 1e-5


def test_a_coded_row_that_equals_a_kept_one_comes_back_exactly():
    weight = normal(40, 8)
    weight[30] = weight[4]
    code = fit(weight, keep=0.5, atoms=4)
    assert torch.equal(code.dense()[30], weight[4]) and code.error[10] == 0


def test_a_table_of_equal_rows_is_coded_without_loss():
    weight = normal(1, 8).expand(40, 8)
    code = fit(weight, keep=0.5, atoms=4)
    torch.testing.assert_close(code.dense(), weight)
    assert code.arrays.atom_ids[0].tolist() == [0, 1, 2, 3]


def test_a_table_of_zeros_is_coded_without_loss():
    code = fit(torch.zeros(40, 8), keep=0.5, atoms=4, rows="int8", weights="int8", residual_bytes=2)
    code.validate()
    assert not code.dense().any() and not code.error.any()


def test_the_same_table_gives_the_same_code():
    weight = normal(300, 16)
    first, second = (fit(weight, keep=0.3, atoms=4, residual_bytes=4) for _ in range(2))
    for one, other in zip(first.arrays, second.arrays, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_the_solve_sees_the_kept_rows_as_they_are_stored():
    """Rows that int8 changes much: against the stored rows the weights are better than those for the exact ones."""
    weight = normal(60, 12) * torch.logspace(0, 2, 12)
    rounded = fit(weight, keep=0.3, atoms=3, rows="int8", weights="float32")
    stored = decode_rows(rounded.arrays.kept, rounded.arrays.kept_scale)
    atoms = stored[rounded.arrays.atom_ids.long()]
    expected = solve(weight[18:], atoms)
    torch.testing.assert_close(weights_of(rounded).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "weights"), [("float32", "float32"), ("float16", "float16"), ("int8", "int8")])
def test_the_error_is_that_of_the_stored_code(rows, weights):
    weight = normal(60, 8)
    code = fit(weight, keep=0.3, atoms=3, rows=rows, weights=weights)
    left = weight[18:] - code.dense()[18:]
    torch.testing.assert_close(code.error, left.norm(dim=1) / weight[18:].norm(dim=1))


def test_a_coded_row_of_zeros_is_measured_against_the_mean_row():
    weight = normal(20, 8)
    weight[19] = 0
    code = fit(weight, keep=0.5, atoms=3)
    norms = weight.norm(dim=1)
    assert code.error[-1].item() == pytest.approx((code.dense()[19].norm() / norms.mean()).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_of_other_dtypes_give_nearly_the_same_code(dtype):
    weight = normal(60, 8).to(torch.bfloat16)
    exact, other = fit(weight.float(), keep=0.3, atoms=3), fit(weight.to(dtype), keep=0.3, atoms=3)
    assert torch.equal(other.arrays.atom_ids, exact.arrays.atom_ids)
    torch.testing.assert_close(other.dense(), exact.dense(), rtol=0, atol=2e-3)


def test_a_parameter_is_coded_without_a_gradient():
    code = fit(torch.nn.Parameter(normal(20, 8)), keep=0.5, atoms=3)
    assert not any(array.requires_grad for array in code.arrays if array is not None)


def test_indices_take_two_bytes_where_they_fit():
    small, large = fit(normal(20, 4), keep=0.5, atoms=2), fit(normal(2**16 + 1, 4), keep=0.001, atoms=2)
    assert small.arrays.slot.dtype == small.arrays.atom_ids.dtype == torch.uint16
    assert large.arrays.slot.dtype == torch.int32 and large.arrays.atom_ids.dtype == torch.uint16
    large.validate()


@pytest.mark.parametrize("mean_atoms", [1, 2.5, 4])
def test_shared_atoms_meet_their_budget_and_go_to_frequent_rows(mean_atoms):
    counts = torch.tensor([1000, 300, 100, 50, 20, 10, 5, 3, 1, 1, 0, 0, 0, 0])
    allotted = share_atoms(importance_of(counts), 4, mean_atoms)
    assert allotted.sum() == round(14 * mean_atoms)
    assert allotted.min() >= 1 and allotted.max() <= 4
    assert (allotted.diff() <= 0).all()


def test_a_row_uses_the_atoms_it_was_allotted():
    counts = (2.0 ** (30 - torch.arange(40))).long()
    code = fit(normal(40, 8), counts, keep=0.5, atoms=6, mean_atoms=3)
    used = (weights_of(code) != 0).sum(1)
    assert used.sum() == 60 and used[0] > used[-1]
    torch.testing.assert_close(weights_of(code).sum(1), torch.ones(20), rtol=0, atol=1e-3)


def test_atoms_are_of_the_row_s_own_type():
    types = torch.arange(60) % 3
    code = fit(normal(60, 8), keep=0.5, atoms=4, types=types)
    assert (types[:30][code.arrays.atom_ids.long()] == types[30:, None]).all()


# The sizes: fewer bytes than the fp32 table, of which a tenth is kept


@pytest.mark.parametrize(
    ("width", "atoms", "rows", "weights", "least"),
    [
        (768, 4, "float32", "float16", 9),
        (768, 8, "float16", "float16", 16),
        (768, 8, "int8", "int8", 25),
        (384, 4, "float32", "float16", 8.5),
        (384, 8, "float16", "float16", 14),
        (384, 8, "int8", "int8", 23),
    ],
)
def test_bytes_at_a_tenth_kept(tmp_path, width, atoms, rows, weights, least):
    weight = normal(30522, width)
    kinds = torch.arange(30522) % 16  # a search among a sixteenth of the rows is as good for this, and quick
    code = fit(weight, keep=0.1, atoms=atoms, rows=rows, weights=weights, types=kinds)
    code.save(tmp_path / "code.safetensors")
    assert weight.nbytes / code.nbytes >= least
    assert weight.nbytes / (tmp_path / "code.safetensors").stat().st_size >= least


# Bad input


GOOD = {"weight": normal(20, 8), "counts": torch.ones(20), "keep": 0.5, "atoms": 3}
BAD = {
    "NaN": ({"weight": torch.full((20, 8), math.nan)}, "weight holds NaN or infinite values, first in row 0"),
    "a vector": ({"weight": torch.ones(20)}, r"weight has shape \(20,\)"),
    "an integer table": ({"weight": torch.ones(20, 8, dtype=torch.int8)}, "torch.int8; .* floating is needed"),
    "counts of another length": ({"counts": torch.ones(19)}, r"counts has shape \(19,\), the table has 20 rows"),
    "negative counts": ({"counts": -torch.ones(20)}, "counts holds negative"),
    "infinite counts": ({"counts": torch.full((20,), math.inf)}, "counts holds negative values, infinite ones or NaN"),
    "nothing kept": ({"keep": 0.0}, r"keep=0.0; the kept fraction must lie in \(0, 1\]"),
    "more than all kept": ({"keep": 1.1}, "keep=1.1"),
    "a percentage": ({"keep": 10}, "keep=10"),
    "keep is NaN": ({"keep": math.nan}, "keep=nan"),
    "less than a row kept": ({"keep": 0.01}, "keep=0.01 of 20 rows is 0.*the least is 0.05"),
    "fewer rows than special ones": ({"keep": 0.1, "special_ids": range(5)}, "is 2, with 5 special.* least is 0.25"),
    "fewer rows than atoms": ({"keep": 0.1}, "atoms=3, but only 2 rows are kept"),
    "fewer rows than atoms of a type": ({"types": torch.arange(20) >= 9}, "atoms=3, but only 1 rows of type True"),
    "more atoms than dimensions": ({"atoms": 9}, "atoms=9; allowed are 1 to 8, the width"),
    "no atoms": ({"atoms": 0}, "atoms=0; allowed are 1 to 8"),
    "a strange special token": ({"special_ids": [20]}, "special_ids holds 20, which is no row of a table of 20"),
    "unknown rows": ({"rows": "int4"}, "rows='int4'; allowed are float32, float16, int8"),
    "unknown weights": ({"weights": "bfloat16"}, "weights='bfloat16'; allowed are"),
    "a residual that does not divide": ({"residual_bytes": 3}, r"residual_bytes=3; .* 0 \(none\) and 1, 2, 4, 8"),
    "too many mean atoms": ({"mean_atoms": 4}, "mean_atoms=4; it must lie between 1 and atoms=3"),
    "too few types": ({"types": torch.ones(3)}, r"types has shape \(3,\), the table has 20 rows"),
    "a negative ridge": ({"ridge": -1.0}, "ridge=-1.0"),
    "fp16 overflow": ({"weight": torch.full((20, 8), 7e4), "rows": "float16"}, "float16 cannot hold values up to"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fastkd.SparseCode.fit(**{**GOOD, **changes})


OF_ANOTHER_TYPE = {
    "a table of numpy": ({"weight": normal(20, 8).numpy()}, "weight is a ndarray; a torch tensor"),
    "no counts": ({"counts": None}, r"counts is a NoneType; a tensor \(V,\)"),
    "keep as text": ({"keep": "0.1"}, "keep='0.1'; a number is needed"),
    "keep as a flag": ({"keep": True}, "keep=True; a number is needed"),
    "atoms as text": ({"atoms": "8"}, "atoms='8'; a whole number is needed"),
    "atoms as a flag": ({"atoms": True}, "atoms=True; a whole number is needed"),
    "half an atom": ({"atoms": 2.5}, r"atoms=2\.5; a whole number is needed"),
    "bytes as text": ({"residual_bytes": "4"}, "residual_bytes='4'; a whole number is needed"),
    "mean atoms as text": ({"mean_atoms": "2"}, "mean_atoms='2'; a number is needed"),
    "no ridge": ({"ridge": None}, "ridge=None; a number is needed"),
    "special tokens as text": ({"special_ids": ["[CLS]"]}, r"special_ids=\['\[CLS\]'\]; a list or \(n,\) tensor"),
    "no special tokens": ({"special_ids": None}, "special_ids=None"),
}


@pytest.mark.parametrize("case", OF_ANOTHER_TYPE)
def test_an_argument_of_another_type_is_named(case):
    changes, message = OF_ANOTHER_TYPE[case]
    with pytest.raises(TypeError, match=message):
        fastkd.SparseCode.fit(**{**GOOD, **changes})


def test_special_ids_may_be_a_tensor_or_run_out_after_one_pass():
    listed = fit(normal(20, 8), keep=0.5, atoms=3, special_ids=[19, 17])
    for special_ids in (torch.tensor([17, 19]), iter([19, 17])):
        assert torch.equal(
            fit(normal(20, 8), keep=0.5, atoms=3, special_ids=special_ids).arrays.slot.int(), listed.arrays.slot.int()
        )
