"""Benchmarks: one harness, one accuracy rule, and a folder for each kind of thing that is timed."""
