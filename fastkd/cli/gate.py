"""Hold an artifact against budgets. The status is 0 when all pass, 1 with the lines that failed, 2 for wrong use.

  fastkd gate model.onnx --against report/report.json --p95 8ms --size 14MB --max-drop 0.5
  fastkd gate model.onnx --p50 5ms --memory 700MB --cell 1,32,1                            # measured now
  fastkd gate model.onnx --teacher TEACHER --task sst2 --data DIR --max-drop 0.5           # likewise
  fastkd gate model.onnx --against report/report.json --baseline baseline.json --max-ratio 1.1

A report whose artifact has changed since is refused. Figures relative to the teacher compare between machines.
"""


def add_arguments(parser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="a model's folder, or an exported file")

    budgets = parser.add_argument_group("budgets: at least one")
    for name in ("p50", "p90", "p95", "p99"):
        budgets.add_argument(f"--{name}", metavar="TIME", help="of a call, e.g. 8ms")
    budgets.add_argument("--size", metavar="BYTES", help="on disk, e.g. 14MB")
    budgets.add_argument("--memory", metavar="BYTES", help="peak of the process, Python included, e.g. 700MB")
    budgets.add_argument("--max-drop", type=float, metavar="POINTS", help="of the task's metric, against the teacher")
    budgets.add_argument("--max-ratio", type=float, metavar="X", help="to the baseline, each relative to its teacher")
    cell = "which times count (default: batch 1, the longest of the report or 128, 1 thread)"
    budgets.add_argument("--cell", metavar="BATCH,LENGTH,THREADS", help=cell)

    figures = parser.add_argument_group("where the figures come from; without --against they are measured now")
    figures.add_argument("--against", metavar="REPORT.JSON", help="a report that holds the artifact")
    figures.add_argument("--baseline", metavar="REPORT.JSON", help="an earlier report, for --max-ratio")
    figures.add_argument("--mode", default="eager", choices=("eager", "compile", "int8"), help="of a model's folder")
    figures.add_argument("--teacher", metavar="DIR", help="measured beside it, for --max-drop and --max-ratio")
    figures.add_argument("--task", metavar="TASK", help="scored, for --max-drop")
    figures.add_argument("--data", metavar="DIR", help="folder of that task; its usual hub data set by default")
    figures.add_argument("--max-length", type=int, default=128, metavar="N", help="tokens of an example (default: 128)")


def run(options) -> int:
    from fastkd.edge import gate

    return 0 if gate(**vars(options)).passed else 1
