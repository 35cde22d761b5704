"""Time the fused kernels against eager torch, torch.compile and the bare matrix products."""


def add_arguments(parser) -> None:
    from fastkd.benchmarks.kernels import add_arguments as add_kernel_arguments

    kinds = parser.add_subparsers(dest="kind", required=True)
    add_kernel_arguments(kinds.add_parser("kernels", help="the ops, one by one"))


def run(options) -> int:
    from fastkd.benchmarks.kernels import run as run_kernels

    return run_kernels(options)
