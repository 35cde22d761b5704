"""The layer: looks up like the table its code stands for, keeps its formats, trains, and saves what it stores."""

import copy

import pytest
import torch
from torch import nn

import fastkd
from fastkd.embeddings.module import STATE_NAMES

FORMATS = {
    "fp32 rows": {"rows": torch.float32, "weights": torch.float16},
    "fp16": {"rows": torch.float16, "weights": torch.float16},
    "bf16 rows, fp32 weights": {"rows": torch.bfloat16, "weights": torch.float32},
    "int8": {"rows": torch.int8, "weights": torch.int8},
    "int8 with a residual": {"rows": torch.int8, "weights": torch.int8, "residual": 8},
    "no atoms, residual only": {"rows": torch.float16, "atoms": 0, "residual": 8},
    "product quantisation of all rows": {"kept": 0, "atoms": 0, "residual": 8},
}


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def code(request, make_code, model):
    return make_code(model, **request.param)


@pytest.fixture
def ids():
    return torch.randint(90, (3, 7))


def formats_of(layer):
    return {name: array.dtype for name, array in layer.state_dict().items()}


def test_it_looks_up_the_rows_that_the_code_stands_for(code, ids):
    layer = fastkd.SparseEmbedding(code)
    torch.testing.assert_close(layer(ids), code.dense()[ids])
    assert (layer.num_embeddings, layer.embedding_dim) == (90, 32)
    assert layer.weight.shape == (code.num_kept, 32), "the kept rows go by the name of a dense table"


def test_frozen_it_has_no_parameter_and_its_state_is_the_code(code):
    layer = fastkd.SparseEmbedding(code)
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {
        STATE_NAMES[field] for field, array in code.arrays._asdict().items() if array is not None
    }


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_cast_changes_what_comes_out_and_no_stored_format(code, ids, cast, trainable):
    layer = fastkd.SparseEmbedding(code, dtype=torch.float16, trainable=trainable)
    before = formats_of(layer)
    getattr(layer, cast)()
    wanted = getattr(torch, {"half": "float16"}.get(cast, cast))
    assert layer(ids).dtype == wanted
    assert formats_of(layer) == before
    assert all(parameter.dtype == wanted for parameter in layer.parameters())


def test_casting_down_and_up_again_loses_nothing(code, ids):
    layer = fastkd.SparseEmbedding(code)
    before = layer(ids)
    assert torch.equal(layer.half().float()(ids), before)


def test_moving_to_another_device_takes_every_array_along(code):
    layer = fastkd.SparseEmbedding(code).to("meta", torch.float16)
    assert all(array.device.type == "meta" for array in layer.buffers())
    assert layer.weight.dtype == code.arrays.kept.dtype


def test_trainable_its_parameters_are_kept_rows_and_weights_in_fp32(code, ids):
    layer = fastkd.SparseEmbedding(code, trainable=True)
    assert {name: p.dtype for name, p in layer.named_parameters()} == {
        "weight": torch.float32,
        "atom_weights": torch.float32,
    }
    torch.testing.assert_close(layer(ids), code.dense()[ids])


def test_the_gradient_is_that_of_the_rows_it_was_made_of(make_code, model, ids):
    layer = fastkd.SparseEmbedding(make_code(model), trainable=True)
    upstream = torch.randn(3, 7, 32)
    layer(ids).backward(upstream)
    arrays = layer.arrays
    kept, weights = (parameter.detach().clone().requires_grad_() for parameter in layer.parameters())
    coded = (weights[:, :, None] * kept[arrays.atom_ids.long()]).sum(1)
    torch.cat([kept, coded])[arrays.slot.long()][ids].backward(upstream)
    torch.testing.assert_close(layer.weight.grad, kept.grad)
    torch.testing.assert_close(layer.atom_weights.grad, weights.grad)


def test_training_leaves_the_code_it_was_made_of_alone(make_code, model, ids):
    code = make_code(model)
    before = code.arrays.kept.clone()
    layer = fastkd.SparseEmbedding(code, trainable=True)
    layer(ids).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(code.arrays.kept, before)


def test_padding_takes_no_part_in_training(make_code, model):
    layer = fastkd.SparseEmbedding(make_code(model), padding_idx=5, trainable=True)
    layer(torch.full((2, 4), 5)).sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.parameters())


def test_switching_trainable_on_and_off_gives_the_same_code(code):
    layer = fastkd.SparseEmbedding(code)
    layer.trainable = True
    layer.trainable = False
    for before, after in zip(code.arrays, layer.arrays, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_a_trained_layer_saves_in_the_stored_formats_and_loads_again(code, ids):
    layer = fastkd.SparseEmbedding(code, trainable=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    frozen = fastkd.SparseEmbedding(copy.deepcopy(code))
    assert formats_of(layer) == formats_of(frozen)
    frozen.load_state_dict(layer.state_dict())
    torch.testing.assert_close(frozen(ids), layer(ids), atol=0.03, rtol=0.02)
    again = fastkd.SparseEmbedding(copy.deepcopy(code), trainable=True)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(ids), frozen(ids))


def test_loading_into_a_trainable_layer_keeps_the_parameters_an_optimizer_holds(code):
    layer = fastkd.SparseEmbedding(code, trainable=True)
    held = list(layer.parameters())
    layer.load_state_dict(fastkd.SparseEmbedding(code).state_dict())
    assert all(ours is theirs for ours, theirs in zip(layer.parameters(), held, strict=True))


@pytest.mark.parametrize("trainable", [False, True])
def test_on_the_meta_device_a_state_can_be_assigned(code, ids, trainable):
    layer = fastkd.SparseEmbedding(code, trainable=trainable).to("meta")
    layer.load_state_dict(fastkd.SparseEmbedding(code).state_dict(), assign=True)
    assert layer.trainable == trainable
    torch.testing.assert_close(layer(ids), code.dense()[ids])


def test_it_looks_up_in_the_arrays_of_the_moment(make_code, model, ids):
    """In those that functional_call, a deep copy or a parametrisation put in the place of its own."""
    layer = fastkd.SparseEmbedding(make_code(model), trainable=True)
    before = layer(ids)
    doubled = {"weight": 2 * layer.weight.detach()}
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (ids,)), 2 * before)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.mul_(2)
    torch.testing.assert_close(copied(ids), 2 * before)
    assert torch.equal(layer(ids), before)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(ids), 2 * before)


def spoiled(state, what):
    if what == "an atom that is no kept row":
        state["atom_ids"] = state["atom_ids"].clone()
        state["atom_ids"][0, 0] = 20
    elif what == "another format":
        state["weight"] = state["weight"].to(torch.bfloat16)
    elif what == "another size":
        state["slot"] = state["slot"][:-1]
    elif what == "a missing array":
        del state["atom_weights"]
    else:
        state["weight_scale"] = torch.ones(70, dtype=torch.float16)
    return state


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("an atom that is no kept row", "atom_ids"),
        ("another format", r"weight is \(20, 32\) bfloat16, this layer's is \(20, 32\) float32"),
        ("another size", r"slot is \(89,\)"),
        ("a missing array", "atom_weights is absent"),
        ("an array too many", "weight_scale is"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_taken_over(make_code, model, ids, what, message):
    layer, other = (fastkd.SparseEmbedding(make_code(model)) for _ in range(2))
    before = layer(ids)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(spoiled(other.state_dict(), what))
    assert torch.equal(layer(ids), before)


def test_an_empty_state_is_missing_its_arrays(make_code, model):
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        fastkd.SparseEmbedding(make_code(model)).load_state_dict({})


def test_it_takes_the_arrays_of_a_code_as_well(code, ids):
    assert torch.equal(fastkd.SparseEmbedding(code.arrays)(ids), fastkd.SparseEmbedding(code)(ids))


def test_a_table_is_no_code():
    with pytest.raises(TypeError, match=r"code is a Tensor; a fastkd.SparseCode is needed"):
        fastkd.SparseEmbedding(torch.randn(90, 32))


def test_arrays_that_disagree_are_refused(make_code, model):
    arrays = make_code(model).arrays
    with pytest.raises(ValueError, match="atom_weights has shape"):
        fastkd.SparseEmbedding(arrays._replace(atom_weights=arrays.atom_weights[:-1]))


def test_a_padding_index_outside_the_table_is_refused(make_code, model):
    with pytest.raises(ValueError, match="padding_idx=90 is outside the 90 tokens"):
        fastkd.SparseEmbedding(make_code(model), padding_idx=90)
    assert fastkd.SparseEmbedding(make_code(model), padding_idx=-1).padding_idx == 89


def test_an_id_outside_the_table_is_named(make_code, model):
    with pytest.raises(IndexError, match="90"):
        fastkd.SparseEmbedding(make_code(model))(torch.tensor([[3, 90]]))


def test_its_description_says_what_it_stores(make_code, model):
    layer = nn.Sequential(fastkd.SparseEmbedding(make_code(model), padding_idx=0))
    assert "90, 32, padding_idx=0, kept=20 x torch.float32, atoms=3 x torch.float16, trainable=False" in repr(layer)
