import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.models.architectures import find_encoder, layers_of, projections_of

PROJECTIONS = ("query", "key", "value")


def _layer_inputs(model, batch):
    """Input of the attention of each layer, recorded without taps."""
    seen = {}
    hooks = []
    for number, layer in enumerate(layers_of(model)):

        def record(module, args, number=number):
            seen.setdefault(number, args[0])

        hooks.append(projections_of(model, layer)["query"].register_forward_pre_hook(record))
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def _calls(model, batch_call):
    """Names of the leaf modules that ran."""
    ran, hooks = [], []
    for name, module in model.named_modules():
        if not list(module.children()):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)))
    try:
        batch_call()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_projections_equal_a_recomputation_from_the_layers_input(architecture, make_model, batch):
    model = make_model(architecture)
    inputs = _layer_inputs(model, batch)
    with fastkd.tap(model, [0, 2, -1]) as taps:
        model(**batch)
    for number in (0, 2, 3):
        modules = projections_of(model, layers_of(model)[number])
        for i, what in enumerate(PROJECTIONS):
            expected = modules[what](inputs[number])
            if architecture == "modernbert":
                expected = expected[..., 32 * i : 32 * (i + 1)]
            assert taps[number][what].shape == (2, 11, 32)
            torch.testing.assert_close(taps[number][what], expected)


def test_hidden_states_equal_those_of_transformers(architecture, make_model, batch):
    model = make_model(architecture)
    expected = model(**batch, output_hidden_states=True).hidden_states
    with fastkd.tap(model, [0, 2], what=("hidden",)) as taps:
        model(**batch)
    for number in (0, 2):
        torch.testing.assert_close(taps[number]["hidden"], expected[number + 1])


@pytest.mark.parametrize("head", ["sequence", "token", "answer", "masked", "bare"])
def test_any_head_can_be_tapped_and_stopped(architecture, head, make_model, batch):
    model = make_model(architecture, head)
    with fastkd.tap(model, [-2]) as whole:
        model(**batch)
    with fastkd.tap(model, [-2], stop_after=True) as stopped:
        model(**batch)
    for what in PROJECTIONS:
        torch.testing.assert_close(stopped[-2][what], whole[-2][what])


def test_stop_after_runs_nothing_above_the_last_projection(architecture, make_model, batch):
    model = make_model(architecture)
    with fastkd.tap(model, [1], stop_after=True):
        ran = _calls(model, lambda: model(**batch))
    last = list(projections_of(model, layers_of(model)[1]).values())[-1]
    names = {module: name for name, module in model.named_modules()}
    assert ran[-1] == names[last]
    assert ran.count(names[last]) == 1
    assert not any(name.startswith(names[layers_of(model)[2]]) for name in ran)


def test_stop_after_a_hidden_state_runs_that_layer_and_no_other(architecture, make_model, batch):
    model = make_model(architecture)
    with fastkd.tap(model, [1], what=("query", "hidden"), stop_after=True) as taps:
        ran = _calls(model, lambda: model(**batch))
    names = {module: name for name, module in model.named_modules()}
    assert ran[-1].startswith(names[layers_of(model)[1]])
    assert taps[1].keys() == {"query", "hidden"}


def test_a_stopped_call_returns_the_taps_and_the_code_after_it_goes_on(make_model, batch):
    model = make_model()
    with fastkd.tap(model, [1, -1], stop_after=True) as taps:
        returned = model(**batch)
        reached = True
    assert reached
    assert returned.keys() == {1, 3}
    assert returned[3]["value"] is taps[-1]["value"]


def test_sdpa_stays_on(make_model, batch):
    model = make_model()
    model.set_attn_implementation("sdpa")
    with (
        fastkd.tap(model, [-1]) as taps,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        model(**batch)
    assert any("scaled_dot_product" in event.key for event in profile.key_averages())
    assert taps[-1]["query"].shape == (2, 11, 32)


def test_gradients_flow_through_the_taps_and_nothing_above_them(architecture, make_model, batch):
    model = make_model(architecture).train()
    with fastkd.tap(model, [-1], stop_after=True) as taps:
        model(**batch)
    sum(taps[-1][what].square().sum() for what in PROJECTIONS).backward()
    modules = projections_of(model, layers_of(model)[-1])
    assert all(module.weight.grad.abs().sum() > 0 for module in modules.values())
    assert all(parameter.grad is not None for parameter in layers_of(model)[0].parameters())
    assert all(parameter.grad is None for parameter in model.classifier.parameters())


def test_each_forward_replaces_what_the_last_one_left(make_model, batch):
    model = make_model()
    other = {"input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"].flip(0)}
    with fastkd.tap(model, [0]) as taps:
        model(**batch)
        first = taps[0]["query"]
        model(**other)
    torch.testing.assert_close(taps[0]["query"], first.flip(0))
    assert taps[0]["query"] is not first


def test_deberta_with_shared_keys_gives_the_projection_and_not_the_position_table(make_model, batch):
    model = make_model("deberta-v2")
    calls = []
    key = projections_of(model, layers_of(model)[0])["key"]
    hook = key.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    with fastkd.tap(model, [0]) as taps:
        model(**batch)
    hook.remove()
    assert calls == [(2, 11, 32), (1, 16, 32)]
    assert taps[0]["key"].shape == (2, 11, 32)


def test_a_compiled_model_is_refused(make_model):
    with pytest.raises(ValueError, match="compiled"), fastkd.tap(torch.compile(make_model()), [0]):
        pass


def test_a_model_compiled_in_place_is_refused(make_model):
    model = make_model()
    model.compile()
    with pytest.raises(ValueError, match="compiled"), fastkd.tap(model, [0]):
        pass


def test_a_compiled_layer_is_refused_by_name(make_model):
    model = make_model()
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1])
    with pytest.raises(ValueError, match=r"encoder\.layer\.1"), fastkd.tap(model, [0]):
        pass


def test_reading_taps_without_a_forward_says_so(make_model):
    with fastkd.tap(make_model(), [0]) as taps:
        pass
    with pytest.raises(RuntimeError, match="no forward of the tapped model ran"):
        taps[0]


def test_reading_taps_of_a_forward_that_broke_off_says_so(make_model, batch):
    model = make_model()
    hook = layers_of(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), fastkd.tap(model, [0, 1]) as taps:
        model(**batch)
    hook.remove()
    assert taps[0]["query"].shape == (2, 11, 32)
    with pytest.raises(RuntimeError, match="layer 1 captured no query, key, value"):
        taps[1]


def _checkpointing(model, use_reentrant):
    # The first name is the one that stays, the second the only one that the oldest supported transformers has.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    else:
        enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model.train()


def test_reentrant_checkpointing_is_refused(make_model, batch):
    model = _checkpointing(make_model(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), fastkd.tap(model, [0]):
        model(**batch)


def test_reentrant_checkpointing_of_ones_own_is_refused(make_model, batch):
    model = make_model().train()
    layer = layers_of(model)[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(lambda *a: forward(*a, **kwargs), *args, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), fastkd.tap(model, [0]):
        model(**batch)


def _relation_gradients(model, batch, stop_after, backward_inside):
    with fastkd.tap(model, [1, -1], stop_after=stop_after) as taps:
        model(**batch)
        before = taps.as_dict()
        if backward_inside:
            sum(x.square().sum() for tensors in before.values() for x in tensors.values()).backward()
            after = taps.as_dict()
    if not backward_inside:
        sum(x.square().sum() for tensors in before.values() for x in tensors.values()).backward()
        after = taps.as_dict()
    same = all(after[layer][what] is before[layer][what] for layer in before for what in before[layer])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads, same


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("stop_after", [True, False])
def test_recomputation_by_checkpointing_changes_neither_taps_nor_gradients(
    make_model, batch, stop_after, backward_inside
):
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    expected, _ = _relation_gradients(model, batch, stop_after, backward_inside)
    grads, same = _relation_gradients(_checkpointing(model, False), batch, stop_after, backward_inside)
    assert same
    assert grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name])


def test_the_layer_at_which_the_forward_stops_is_not_checkpointed(make_model, batch):
    model = _checkpointing(make_model(), use_reentrant=False)
    calls = [0, 0, 0, 0]
    for number, layer in enumerate(layers_of(model)):

        def count(module, args, number=number):
            calls[number] += 1

        projections_of(model, layer)["query"].register_forward_pre_hook(count)
    with fastkd.tap(model, [-1], stop_after=True) as taps:
        model(**batch)
    taps[-1]["query"].sum().backward()
    assert calls == [2, 2, 2, 1]  # the others run again in backward


def test_checkpointing_is_on_again_after_a_stopped_block(make_model, batch):
    model = _checkpointing(make_model(), use_reentrant=False)
    with fastkd.tap(model, [-1], stop_after=True):
        model(**batch)
    assert all(layer.gradient_checkpointing for layer in layers_of(model))


def test_hooks_are_removed_after_the_block(architecture, make_model, batch):
    model = make_model(architecture)
    expected, before = model(**batch).logits, _hooks(model)
    with fastkd.tap(model, [-1], stop_after=True):
        model(**batch)
    assert _hooks(model) == before
    assert "forward" not in vars(model)
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("stop_after", [True, False])
def test_hooks_are_removed_after_an_error_in_the_block(make_model, stop_after):
    model = make_model()
    before = _hooks(model)
    with pytest.raises(KeyError), fastkd.tap(model, [-1], stop_after=stop_after):
        raise KeyError
    assert _hooks(model) == before
    assert "forward" not in vars(model)


def test_a_forward_that_somebody_set_on_the_instance_is_put_back(make_model, batch):
    model = make_model()
    model.forward = own = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    with fastkd.tap(model, [-1], stop_after=True) as taps:
        model(**batch)
    assert model.forward is own
    assert taps[-1]["query"].dtype == torch.bfloat16


def test_two_taps_of_one_model_do_not_disturb_each_other(make_model, batch):
    model = make_model()
    with fastkd.tap(model, [0]) as outer, fastkd.tap(model, [2], stop_after=True) as inner:
        model(**batch)
    assert outer[0]["query"].shape == inner[2]["query"].shape


def test_the_inner_of_two_stops_ends_the_forward_for_both(make_model, batch):
    model = make_model()
    with fastkd.tap(model, [2], stop_after=True) as outer, fastkd.tap(model, [0], stop_after=True) as inner:
        assert model(**batch).keys() == {0}
    assert inner[0]["query"].shape == (2, 11, 32)
    with pytest.raises(RuntimeError, match="the forward ended before reaching it"):
        outer[2]


def test_a_projection_called_outside_a_forward_is_not_captured(make_model):
    model = make_model()
    with fastkd.tap(model, [0]) as taps:
        projections_of(model, layers_of(model)[0])["query"](torch.zeros(1, 1, 32))
    with pytest.raises(RuntimeError, match="no forward of the tapped model ran"):
        taps[0]


def test_the_model_inside_a_sentence_encoder_is_found(make_model, batch):
    class SentenceEncoder(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, **inputs):
            return self.encoder(**inputs).last_hidden_state.mean(1)

    model = SentenceEncoder(make_model(head="bare"))
    with fastkd.tap(model, [-1], stop_after=True) as taps:
        model(**batch)
    assert taps[-1]["query"].shape == (2, 11, 32)


def test_two_models_in_one_are_refused(make_model):
    both = nn.ModuleList([make_model(), make_model()])
    with pytest.raises(ValueError, match="holds 2 transformers models"), fastkd.tap(both, [0]):
        pass


def test_data_parallel_of_one_process_is_refused(make_model):
    with pytest.raises(ValueError, match="torchrun"), fastkd.tap(nn.DataParallel(make_model()), [0]):
        pass


def test_negative_and_positive_numbers_name_the_same_layer(make_model, batch):
    model = make_model()
    with fastkd.tap(model, [-1, 3]) as taps:
        model(**batch)
    assert taps[3]["query"] is taps[-1]["query"]
    with pytest.raises(ValueError, match=r"layer 0 is not tapped; tapped layers: \[3\]"):
        taps[0]


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_out_of_range_is_refused_with_the_range(make_model, layer):
    with pytest.raises(ValueError, match="4 layers: 0 to 3, or -4 to -1"), fastkd.tap(make_model(), [layer]):
        pass


@pytest.mark.parametrize("layers", [-1, "1", [1.0], [True]])
def test_layers_that_are_no_list_of_numbers_are_refused(make_model, layers):
    with pytest.raises(TypeError, match="layer"), fastkd.tap(make_model(), layers):
        pass


def test_no_layer_is_refused(make_model):
    with pytest.raises(ValueError, match="at least one layer"), fastkd.tap(make_model(), []):
        pass


@pytest.mark.parametrize("what", ["query", (), ("query", "query"), ("attention",)])
def test_an_unknown_kind_is_refused(make_model, what):
    with pytest.raises(ValueError, match="'query', 'key', 'value', 'hidden'"), fastkd.tap(make_model(), [0], what):
        pass


def test_the_base_encoder_is_found_under_every_head(architecture, make_model):
    assert find_encoder(make_model(architecture, "masked")).config.model_type == architecture
