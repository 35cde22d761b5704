"""The `fastkd` command: one file per subcommand, no logic of its own."""

import argparse
import importlib
import sys

# Subcommand, and the line `fastkd --help` shows for it. A file is imported only when its command is called.
COMMANDS = {
    "train": "run a recipe: fastkd train arc-sst2 teacher=DIR data=DIR [key=value ...]",
    "compress-embeddings": "a smaller embedding table: fastkd compress-embeddings MODEL --text FILE --out SMALL",
    "densify": "a compressed model back as an ordinary checkpoint: fastkd densify SMALL --out DENSE",
    "export": "to a file that runs elsewhere: fastkd export MODEL --to onnx --int8 --out model.onnx",
    "report": "latency, bytes and accuracy side by side: fastkd report TEACHER STUDENT model.onnx --out report/",
    "gate": "budgets for CI: fastkd gate model.onnx --against report.json --p95 8ms --size 14MB --max-drop 0.5",
    "bench": "time kernels and training steps against eager torch and torch.compile",
    "demo": "shrink a small encoder on the docstring task, with no download",
    "info": "versions, CPU and GPU, and which backend each op uses",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 where an error that is meant for people is shown as one line."""
    parser = argparse.ArgumentParser("fastkd", description="Small and fast Transformer encoders by distillation.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    arguments = sys.argv[1:] if arguments is None else arguments
    command = parser.parse_args(arguments[:1]).command
    subcommand = importlib.import_module(f"fastkd.cli.{command.replace('-', '_')}")
    options = argparse.ArgumentParser(
        f"fastkd {command}", description=subcommand.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommand.add_arguments(options)
    try:
        return subcommand.run(options.parse_args(arguments[1:])) or 0
    except (ValueError, TypeError, ConnectionError, FloatingPointError) as error:
        print(f"fastkd {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastkd {command}: stopped", file=sys.stderr)
        return 130  # what a shell gives for Ctrl-C
