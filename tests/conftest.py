"""What every test starts from: an installed fastkd, fixed seeds, reproducible property tests."""

import os

import pytest

try:
    import fastkd.kernels  # noqa: F401  looked for by importing it
except ModuleNotFoundError as error:
    # kernels/ and benchmarks/ are mapped into the package by its metadata: a bare checkout lacks them.
    raise pytest.UsageError(
        f"fastkd is not installed ({error}); run `make test`, or `pip install --no-build-isolation -e '.[dev]'`"
    ) from error

import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Property tests draw the same examples on every machine, and a slow machine is no failure.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fixed")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def train_bpe():
    """Makes a tokenizer as RoBERTa's, with spaces that belong to the token behind them, from texts."""

    def train(texts, vocab_size: int) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "mask_token": "<mask>"}
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special.values()),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    return train


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
