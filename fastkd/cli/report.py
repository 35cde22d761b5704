"""Measure artifacts side by side on this machine: latency, memory, bytes, accuracy. The first one is the teacher, which
the others are compared with.

  fastkd report TEACHER STUDENT SMALL model.onnx --out report/
  fastkd report TEACHER STUDENT model.onnx --task sst2 --data DIR --lengths 16,32,128 --batches 1,8 --threads 1,2 \\
    --out report/

An artifact is a model's folder, or a file that `fastkd export` wrote. Each runs in a process of its own, in turns.
"""

import signal


def add_arguments(parser) -> None:
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="the teacher, then what is compared with it")
    parser.add_argument("--out", required=True, metavar="DIR", help="report.json, report.md and plots: a new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands in --out")

    task = parser.add_argument_group("accuracy")
    task.add_argument("--task", metavar="TASK", help="score a task's validation split, e.g. sst2 (default: none)")
    task.add_argument("--data", metavar="DIR", help="folder of that task; its usual hub data set by default")
    task.add_argument("--max-length", type=int, default=128, metavar="N", help="tokens of an example (default: 128)")

    cells = parser.add_argument_group("what is timed: every combination")
    cells.add_argument("--lengths", default="16,32,128", metavar="LIST", help="in tokens (default: 16,32,128)")
    cells.add_argument("--batches", default="1,8", metavar="LIST", help="sentences a call (default: 1,8)")
    cells.add_argument("--threads", default="1", metavar="LIST", help="(default: 1)")
    cells.add_argument("--modes", default="eager", metavar="LIST", help="of folders: eager, compile, int8 (torch's)")
    cells.add_argument("--rounds", type=int, default=10, metavar="N", help="turns at each cell (default: 10)")


def run(options) -> None:
    from fastkd.edge import report

    # A build that runs out of time is sent SIGTERM: what was measured is kept, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report(**vars(options))
