"""`python -m fastkd.benchmarks.kernels`, the same as `fastkd bench kernels`."""

import argparse
import sys

from fastkd.benchmarks.kernels import SUITE

parser = argparse.ArgumentParser("fastkd bench kernels")
SUITE.add_arguments(parser)
try:
    sys.exit(SUITE.run(parser.parse_args()))
except ValueError as error:
    sys.exit(f"fastkd bench kernels: {error}")
