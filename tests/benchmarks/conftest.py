"""Four tasks of GLUE and a teacher, in kilobytes."""

import random

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fastkd.data.wordpiece import train_wordpiece

_PAIRS = ("mrpc", "stsb")


def examples(task: str, count: int, seed: int) -> pd.DataFrame:
    draw = random.Random(seed)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ado", "eli", "iru", "ona")]
    texts = [[" ".join(draw.choices(words, k=draw.randint(3, 6))) for _ in range(count)] for _ in "12"]
    named = {"sentence1": texts[0], "sentence2": texts[1]} if task in _PAIRS else {"sentence": texts[0]}
    labels = [5 * draw.random() for _ in range(count)] if task == "stsb" else [row % 2 for row in range(count)]
    return pd.DataFrame(named | {"label": labels})


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory):
    """A folder with four tasks of 96 examples, and `teacher`, of random weights."""
    folder = tmp_path_factory.mktemp("glue")
    for seed, task in enumerate(("sst2", "mrpc", "stsb", "cola")):
        (folder / task).mkdir()
        examples(task, 96, seed).to_parquet(folder / task / "train.parquet")
        examples(task, 24, seed + 9).to_parquet(folder / task / "validation.parquet")
    tokenizer = train_wordpiece(examples("sst2", 60, 5)["sentence"], 120, max_length=128)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder
