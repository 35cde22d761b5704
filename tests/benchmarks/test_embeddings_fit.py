"""The benchmark of the fit."""

from fastkd.benchmarks.embeddings_fit import fit


def test_a_row_says_how_long_and_how_much():
    row = fit(400, 16, keep=0.2, atoms=4, threads=1)
    assert row["seconds"] >= 0
    assert row["peak_bytes"] > row["table_bytes"] == 400 * 16 * 4 > row["code_bytes"]
