"""The measurement of second-order gradients."""

from transformers import AutoTokenizer, BertConfig, BertModel

from fastkd.benchmarks.second_order import FP64_STEP, LEARNT, STEPS, table


def test_every_form_is_measured_for_every_student(glue_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(glue_folder / "teacher")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = table(str(tmp_path), layers=1, examples=4, max_length=16)
    assert [name for name, _ in rows] == ["random weights", *(f"first layers, {step} steps" for step in LEARNT)]
    for _, errors in rows:
        assert len(errors) == len(STEPS) + 3
        assert 0 < errors[f"difference, fp64, step {FP64_STEP:g}"] < 1e-5
        differences = {errors[f"difference, fp32, step {step:g}"] for step in STEPS}
        assert len(differences) == len(STEPS) and 0 < min(differences) <= max(differences) < 0.1
        assert 0 < errors["double backward, fp32"] < 1e-4 < errors["double backward, bf16"] < 0.1
