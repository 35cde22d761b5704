"""The process that runs one artifact: reads a request a line from its input, writes an answer a line to its output.

Its parent is `fastkd.edge.measure.Worker`, which names the job's file as the only argument. The first answer comes
unasked, when the artifact has given its first result. For an exported file `fastkd.edge.measure_without_torch` starts
it, and it may import nothing of fastkd that imports torch.
"""

import json
import os
import sys
import time
from pathlib import Path

from fastkd.edge.artifact import Artifact, open_artifact
from fastkd.edge.measure_texts import encode, texts_of_length
from fastkd.edge.runtimes import import_library, load_runtime

_PREDICTED_TOGETHER = 32
_TURN_SECONDS, _TURN_CALLS, _LEAST_CALLS = 0.25, 20, 2
_WARM_UP, _WARM_AGAIN = 3, 1


def peak_memory() -> int:
    """High-water mark of this process' resident set, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage gives a child the mark of the process that started it
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return memory.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class Measured:
    """An artifact that is loaded, and what can be asked of it."""

    def __init__(self, job: dict, artifact: Artifact):
        self.job, self.cells = job, {}
        self.tokenizer = artifact.tokenizer()
        self.runtime = load_runtime(artifact, threads=job["threads"], mode=job["mode"] or "eager")

    def first_answer(self) -> None:
        self.runtime(**encode(self.tokenizer, self.job["texts"][:1], min(self.job["lengths"])))

    def time(self, batch: int, length: int) -> dict:
        """A turn at one cell: milliseconds of each call, and of tokenising its texts once."""
        warm = _WARM_AGAIN
        if (batch, length) not in self.cells:
            texts = texts_of_length(self.tokenizer, self.job["texts"], batch, length)
            self.cells[batch, length] = texts, encode(self.tokenizer, texts, length)
            warm = _WARM_UP
        texts, inputs = self.cells[batch, length]
        encode(self.tokenizer, texts, length)
        tokenize_ms = _milliseconds(lambda: encode(self.tokenizer, texts, length))
        for _ in range(warm):
            self.runtime(**inputs)
        found, end = [], time.perf_counter() + _TURN_SECONDS
        while len(found) < _LEAST_CALLS or (len(found) < _TURN_CALLS and time.perf_counter() < end):
            found.append(_milliseconds(lambda: self.runtime(**inputs)))
        return {"ms": found, "tokenize_ms": tokenize_ms}

    def memory(self) -> dict:
        return {"peak_bytes": peak_memory()}

    def predict(self, out: str, columns: list[list[str]], max_length: int) -> dict:
        """Outputs for all examples as an .npy file, (N, labels) fp32 in the examples' order.

        Sorted by length, so that few tokens are padding.
        """
        import numpy as np

        order = sorted(range(len(columns[0])), key=lambda row: -sum(len(column[row]) for column in columns))
        outputs = None
        for start in range(0, len(order), _PREDICTED_TOGETHER):
            rows = order[start : start + _PREDICTED_TOGETHER]
            texts, *pairs = ([column[row] for row in rows] for column in columns)
            answer = self.runtime(**encode(self.tokenizer, texts, max_length, *pairs))
            outputs = np.empty((len(order), answer.shape[1]), np.float32) if outputs is None else outputs
            outputs[rows] = answer
        np.save(out, outputs)
        return {}


def serve(job: dict, requests, answer) -> None:
    """Answer until the requests end. A request that fails is answered with its error, and the next one is read."""
    artifact = open_artifact(job["path"])
    import_library(artifact.format)
    imported, imports_bytes = time.time(), peak_memory()
    measured = Measured(job, artifact)
    loaded = time.time()
    measured.first_answer()
    answer(
        {
            "import_s": imported - job["started"],
            "load_s": loaded - imported,
            "cold_start_s": time.time() - job["started"],
            "memory_imports_bytes": imports_bytes,
            "runtime": measured.runtime.name,
        }
    )
    for line in requests:
        request = json.loads(line)
        try:
            answer(getattr(measured, request.pop("do"))(**request))
        except Exception as error:
            answer({"error": said(error)})


def said(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def _milliseconds(call) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def main() -> int:
    # Libraries print to the standard output, where only answers may stand.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        serve(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.stdin, answer)
    except Exception as error:
        answer({"error": said(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
