"""`auto` on a GPU follows the shipped table of measurements, and the op's own order where nobody has measured."""

import pytest
import torch

from fastkd.ops import backends, fastest

CUDA, bf16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture
def table(monkeypatch):
    """A table with one class in it: heads up to 32 wide, 129 to 512 tokens, bf16 on compute capability 9.0."""
    orders = dict.fromkeys(fastest.WIDTHS, (None,) * len(fastest.LENGTHS))
    orders[32] = (None, ("cuda", "triton"), None, None)
    monkeypatch.setattr(fastest, "_ORDERS", {("relation_kl", (9, 0), bf16): orders})
    monkeypatch.setattr(fastest, "_MEASURED", {("relation_kl", bf16)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(("width", "length"), [(17, 129), (32, 512)])
def test_a_measured_class_gives_its_order(table, width, length):
    assert backends.preferences("relation_kl", CUDA, bf16, width, length) == ("cuda", "triton")


@pytest.mark.parametrize(("width", "length"), [(16, 512), (33, 512), (32, 128), (32, 513), (200, 100_000)])
def test_any_other_class_gives_the_order_of_the_op(table, width, length):
    assert backends.preferences("relation_kl", CUDA, bf16, width, length) == ("triton", "cuda", "reference")


def test_another_dtype_or_device_gives_the_order_of_the_op(table, monkeypatch):
    assert backends.preferences("relation_kl", CUDA, torch.float32, 32, 512)[0] == "triton"
    assert backends.preferences("relation_kl", torch.device("cpu"), bf16, 32, 512)[0] == "cpp"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backends.preferences("relation_kl", CUDA, bf16, 32, 512)[0] == "triton"


def test_the_shipped_table_names_backends_of_its_ops_in_every_class():
    for (op, _, _), by_width in fastest._ORDERS.items():
        assert tuple(by_width) == fastest.WIDTHS
        for by_length in by_width.values():
            assert len(by_length) == len(fastest.LENGTHS)
            assert all(set(order) <= set(backends.registered_backends(op)) for order in by_length if order)
