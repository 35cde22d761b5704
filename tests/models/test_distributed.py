"""Data parallel in one process: a communication hook shows which gradients it would exchange."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.models import ReplacementSchedule
from fastkd.models.architectures import layers_of
from fastkd.models.student import all_but_layers


@pytest.fixture(autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _data_parallel(model):
    """The model under DDP, and a set that collects the sizes of the gradients it exchanges."""
    parallel, exchanged = DistributedDataParallel(model, find_unused_parameters=True), set()

    def hook(state, bucket):
        exchanged.update(id(parameter) for parameter in bucket.parameters())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook(None, hook)
    return parallel, exchanged


def test_gradients_of_a_stopped_student_are_exchanged(make_model, batch):
    student, exchanged = _data_parallel(make_model().train())
    for _ in range(2):  # a second step fails where the first did not end well
        student.zero_grad()
        with fastkd.tap(student, [-1], stop_after=True) as taps:
            student(**batch)
        sum(tensor.square().sum() for tensor in taps[-1].values()).backward()
    trained = [parameter for parameter in student.module.parameters() if parameter.grad is not None]
    assert layers_of(student)[0].output.dense.weight.grad is not None
    assert {id(parameter) for parameter in trained} <= exchanged


@pytest.mark.parametrize("train_head", [False, "after"])
def test_replacement_trains_under_data_parallel_though_the_layers_change(make_model, batch, train_head):
    student = fastkd.create_student(make_model(), layers=3)
    schedule = ReplacementSchedule("constant", 0.4, 6)
    encoder = fastkd.ReplaceableEncoder(make_model(), student, schedule, train_head=train_head).train()
    parallel, exchanged = _data_parallel(encoder)
    draws = []
    for step in range(8):
        encoder.set_step(step)
        encoder.zero_grad()
        parallel(**batch, labels=torch.tensor([0, 1])).loss.backward()
        draws.append(encoder.draw)
        for layer, drawn in zip(layers_of(student), encoder.draw, strict=True):
            assert all((p.grad is not None and p.grad.any()) == drawn for p in layer.attention.output.parameters())
    assert len(set(draws)) > 2
    head_trained = all(parameter.requires_grad for parameter in all_but_layers(student).values())
    assert head_trained == (train_head == "after")
    assert {id(parameter) for parameter in encoder.parameters() if parameter.grad is not None} <= exchanged


def test_stopping_inside_a_sharded_model_is_refused(make_model):
    model = make_model()
    fully_shard(model)
    with pytest.raises(ValueError, match="use stop_after=False"), fastkd.tap(model, [0], stop_after=True):
        pass
