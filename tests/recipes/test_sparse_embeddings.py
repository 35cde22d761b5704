"""The parts of the compression recipe that need no model: sizes, and settings that contradict each other."""

import pytest

from fastkd.recipes.sparse_embeddings import CompressEmbeddings, parse_bytes


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("12MB", 12_000_000),
        ("12 mb", 12_000_000),
        ("1.5MiB", 1_572_864),
        ("800kB", 800_000),
        ("2GB", 2_000_000_000),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_a_size_is_read(size, nbytes):
    assert parse_bytes(size) == nbytes


@pytest.mark.parametrize("size", ["", "MB", "-3MB", "12 MBit", "1e6", "0", "0.2B", "nan"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match=r"budget=.*such as 12MB"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "svd"}, "method='svd'; allowed are sparse, residual, pq"),
        ({"rows": "fp8"}, "rows='fp8'; allowed are fp32, fp16, int8"),
        ({"weights": "bf16"}, "weights='bf16'; allowed are fp32, fp16, int8"),
        ({"keep": 0.0}, r"keep=0\.0; the share"),
        ({"budget": "1MB", "atoms": 4}, "keep and atoms are chosen"),
    ],
)
def test_settings_are_checked_when_they_are_given(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressEmbeddings(**{"model": "any", "out": "new", "text": ["corpus.txt"]} | settings)
