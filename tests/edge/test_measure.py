"""Processes in turns, with a stand-in for the worker: what order they run in, and what becomes of one that fails."""

import json

import numpy as np
import pytest

from fastkd.edge import measure as measuring
from fastkd.edge.measure import Plan, measure
from fastkd.edge.report_schema import Row

# A worker that loads nothing. Its artifact's path says how it behaves, and it notes every request in a common file.
STAND_IN = """
import json, os, pathlib, signal, sys

job = json.loads(pathlib.Path(sys.argv[1]).read_text())
kind = job["path"]
log = pathlib.Path(os.environ["STAND_IN_LOG"])
if kind == "unloadable":
    print(json.dumps({"error": "no weights here"}), flush=True)
    sys.exit(1)
start = {"import_s": 1.0, "load_s": 2.0, "cold_start_s": 4.0, "memory_imports_bytes": 10}
print(json.dumps(start | {"runtime": "stand-in on " + os.environ["OMP_NUM_THREADS"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    with log.open("a") as file:
        file.write(json.dumps([kind, job["threads"], request]) + "\\n")
    if kind == "killed" and request["do"] == "time" and log.read_text().count('"killed"') > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "crash":
        sys.exit("terminate called: std::bad_alloc")
    if kind == "long" and request.get("length") == 32:
        print(json.dumps({"error": "MemoryError: 32 tokens"}), flush=True)
        continue
    if request["do"] == "predict":
        import numpy
        numpy.save(request["out"], numpy.full((2, 2), float(len(request["columns"][0]))))
    answers = {"time": {"ms": [1.0, 2.0, 3.0], "tokenize_ms": 0.5}, "memory": {"peak_bytes": 30}, "predict": {}}
    print(json.dumps(answers[request["do"]]), flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("good", "killed", threads=[1]): the rows of artifacts of these kinds, the outputs, and the requests."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(measuring, "_WORKER", "stand_in")

    def measured(*kinds, threads=(1,), lengths=(16, 32), rounds=2, predict=None):
        rows = [Row(kind, kind, "torch", "fp32", "eager", "", {}, None, {}) for kind in kinds]
        outputs = {}
        plan = Plan([1], list(lengths), list(threads), rounds, ["a text"], predict=predict)
        measure(rows, plan, outputs)
        log = tmp_path / "log"
        requests = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return rows, outputs, requests

    return measured


def test_every_cell_has_its_figures(run):
    [row], _, _ = run("good", threads=(1, 2))
    assert [cell.key for cell in row.cells] == [(1, 16, 1), (1, 32, 1), (1, 16, 2), (1, 32, 2)]
    for cell in row.cells:
        assert (cell.calls, cell.p50_ms, cell.tokenize_ms, cell.failed) == (6, 2.0, 0.5, None)


def test_artifacts_take_turns_and_each_round_begins_with_another(run):
    _, _, requests = run("a", "b", "c", lengths=(16,), rounds=3)
    turns = [kind for kind, _, request in requests if request["do"] == "time"]
    assert "".join(turns) == "abcbcacab"


def test_a_number_of_threads_is_a_process_of_its_own_whose_libraries_are_told(run):
    [row], _, _ = run("good", threads=(1, 2))
    assert [process.threads for process in row.processes] == [1, 2]
    assert row.runtime == "stand-in on 2", "of the last process"


def test_start_and_memory_are_kept(run):
    [row], _, _ = run("good")
    [process] = row.processes
    assert (process.import_s, process.load_s, process.cold_start_s) == (1, 2, 4)
    assert (process.memory_imports_bytes, process.memory_peak_bytes, process.failed) == (10, 30, None)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("unloadable", "no weights here"),
        ("crash", "its process ended with status 1: terminate called: std::bad_alloc"),
    ],
)
def test_an_artifact_that_fails_says_why_and_the_others_are_measured(run, kind, reason):
    (broken, good), outputs, _ = run(kind, "good", predict=[["x", "y"]])
    assert {cell.failed for cell in broken.cells} == {reason}
    assert broken.processes[0].failed == outputs[kind] == reason
    assert all(cell.p50_ms == 2.0 and cell.failed is None for cell in good.cells)
    assert outputs["good"].tolist() == [[2, 2], [2, 2]]


def test_a_process_that_the_system_kills_keeps_what_it_gave_before(run):
    (killed, good), _, _ = run("killed", "good", rounds=3)
    reason = "its process was killed (SIGKILL), as the system does where memory runs out"
    assert {cell.failed for cell in killed.cells} == {reason}
    assert [cell.calls for cell in killed.cells] == [3, 3], "the first round"
    assert [cell.calls for cell in good.cells] == [9, 9]


def test_a_cell_that_fails_is_not_asked_again_and_the_artifact_lives_on(run):
    [row], _, requests = run("long", rounds=3)
    short, long = row.cells
    assert (short.calls, short.failed) == (9, None)
    assert (long.calls, long.p50_ms, long.failed) == (0, None, "MemoryError: 32 tokens")
    assert sum(request.get("length") == 32 for _, _, request in requests) == 1
    assert row.processes[0].memory_peak_bytes == 30


def test_an_interruption_leaves_the_figures_of_the_rounds_before(run, monkeypatch):
    taken = measuring._take_turn
    turns = []

    def interrupted(*args):
        turns.append(args)
        if len(turns) == 4:
            raise KeyboardInterrupt
        taken(*args)

    rows = [Row("good", "good", "torch", "fp32", "eager", "", {}, None, {})]
    monkeypatch.setattr(measuring, "_take_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(rows, Plan([1], [16, 32], [1, 2], 2, ["a text"]), {})
    assert [cell.calls for cell in rows[0].cells] == [6, 3, 0, 0]
    assert [cell.failed for cell in rows[0].cells] == [None, None, "not run", "not run"]


def test_outputs_are_asked_for_once_on_the_most_threads(run):
    _, outputs, requests = run("good", threads=(1, 2), predict=[["x", "y"]])
    asked = [threads for _, threads, request in requests if request["do"] == "predict"]
    assert asked == [2]
    assert np.array_equal(outputs["good"], np.full((2, 2), 2.0))
