"""`fastkd bench step`: whole training steps of a recipe. A file beside this one is one recipe."""

from fastkd.benchmarks.suite import Suite

SUITE = Suite("steps", option="recipe", ending="-step")
