import datasets
import pytest

from fastkd.data import train_wordpiece


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture(scope="session")
def tokenizer():
    words = "the cat sat on a mat and dog ran to its big red house when it was late"
    return train_wordpiece([words] * 3, vocab_size=200)
