"""Every artifact is called in the same way, and refuses the same input, before its runtime sees it."""

import numpy as np
import pytest
import torch

from fastkd.edge import load_runtime, open_artifact


@pytest.fixture(params=["transformers", "onnx", "openvino", "torch"])
def runtime(request, exported, edge_folder):
    if request.param == "transformers":
        return load_runtime(open_artifact(edge_folder("bert", "sparse")))
    return load_runtime(exported("bert", "sparse", request.param))


def test_token_types_that_are_not_given_are_0(runtime, ids_and_mask):
    zeros = np.zeros_like(ids_and_mask["input_ids"])
    np.testing.assert_array_equal(runtime(**ids_and_mask), runtime(**ids_and_mask, token_type_ids=zeros))


def test_token_types_count(runtime, ids_and_mask):
    ones = np.ones_like(ids_and_mask["input_ids"])
    assert np.abs(runtime(**ids_and_mask) - runtime(**ids_and_mask, token_type_ids=ones)).max() > 1e-5


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 5000]], [[1, 1]], "input_ids holds 5000, outside"),
        ([[1, -1]], [[1, 1]], "input_ids holds -1, outside"),
        ([[1] * 41], [[1] * 41], "41 tokens a text; the model has 40 positions"),
        ([[1, 2]], [[1, 1, 1]], "all inputs alike"),
        ([1, 2], [1, 1], r"integers of shape \(batch, length\)"),
        ([[1.0]], [[1]], "integers of shape"),
    ],
)
def test_input_that_does_not_fit_is_refused_before_it_runs(runtime, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        runtime(ids, mask)


def test_a_token_type_that_the_model_has_not_is_refused(runtime):
    with pytest.raises(ValueError, match="token_type_ids holds 2, outside the 2 token types"):
        runtime([[1, 2]], [[1, 1]], [[0, 2]])


@pytest.mark.parametrize("mode", ["int8"])
def test_a_transformers_folder_runs_in_other_modes(mode, edge_folder, ids_and_mask):
    artifact = open_artifact(edge_folder("bert", "sparse"))
    eager, other = load_runtime(artifact), load_runtime(artifact, mode=mode)
    assert mode in other.name
    expected = eager(**ids_and_mask)
    assert np.abs(other(**ids_and_mask) - expected).max() <= 0.2 * np.abs(expected).max()


def test_modes_are_for_transformers_folders(exported):
    with pytest.raises(ValueError, match="mode='compile' for an artifact of format onnx; allowed is only 'eager' here"):
        load_runtime(exported("bert", "sparse"), mode="compile")


def test_threads_are_pinned(edge_folder):
    before = torch.get_num_threads()
    try:
        load_runtime(open_artifact(edge_folder("bert")), threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads=0; 1 or more"):
        load_runtime(open_artifact(edge_folder("bert")), threads=0)
