"""Versions, CPU features, GPUs, and for each op which backend would run and why not the others."""


def add_arguments(parser) -> None:
    pass


def run(options) -> None:
    from fastkd.info import report

    print(report())
