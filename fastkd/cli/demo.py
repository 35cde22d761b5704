"""Train a small BERT on the docstrings of installed packages, shrink it with ARC, and compare. Nothing is downloaded.

Takes about three minutes on two cores. The exit status is 1 if the student is not as good and faster than it must be.
"""


def add_arguments(parser) -> None:
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="models, plots, results (default: demo-out)")
    parser.add_argument("--seed", type=int, default=0, help="of every weight, batch and draw (default: 0)")


def run(options) -> int:
    from fastkd.recipes.demo import run_demo

    return 0 if run_demo(options.out, options.seed)["passed"] else 1
