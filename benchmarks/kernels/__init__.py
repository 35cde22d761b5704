"""`fastkd bench kernels`: every op on its shapes against its peers. A file beside this one is one op."""

from fastkd.benchmarks.suite import Suite

SUITE = Suite("kernels", option="op")
