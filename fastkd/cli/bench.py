"""Time the fused kernels, or whole training steps, against eager torch, torch.compile and what cannot be avoided."""


def add_arguments(parser) -> None:
    from fastkd.benchmarks import kernels, steps

    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, suite, summary in (
        ("kernels", kernels.SUITE, "the ops, one by one"),
        ("step", steps.SUITE, "training steps of a recipe, models included"),
    ):
        sub = kinds.add_parser(kind, help=summary)
        suite.add_arguments(sub)
        sub.set_defaults(suite=suite)


def run(options) -> int:
    return options.suite.run(options)
