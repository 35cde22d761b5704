"""On what, with what and from which commit something was measured, and whether the machine is quiet enough for it."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

# Above this load average another program takes part in every timing.
QUIET = 0.5

# glibc gives large tensors back to the system on every free. Eager code, which allocates the most, is then timed by
# its page faults (up to 5 times slower): with these settings every provider reuses its pages.
PAGE_REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def allocators(device: str) -> dict[str, dict[str, str]]:
    """The environments to measure under, by name; the first is the one that ratios are quoted from."""
    if device == "cpu" and sys.platform == "linux":
        return {"page reuse": PAGE_REUSE, "default": {}}
    return {"default": {}}


def checked_load(anyway: bool) -> float:
    """The load average of the last minute.

    Raises:
        ValueError: it is above QUIET and `anyway` is false.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    if load > QUIET:
        message = f"the load average is {load:.2f}; times are trusted up to {QUIET}"
        if not anyway:
            raise ValueError(f"{message}. Wait until the machine is quiet, or pass --anyway to measure nevertheless")
        print(f"warning: {message}. The file records it", file=sys.stderr)
    return load


def facts(device: str, threads: int) -> dict[str, str | int]:
    """What every row of a result file says about its machine and its code.

    Raises:
        ValueError: the package that names the CPU is not installed.
    """
    cpu = _cpu_name()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "",
        "fastkd": version("fastkd"),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        from cpuinfo import get_cpu_info
    except ModuleNotFoundError as error:
        raise ValueError("py-cpuinfo names the CPU in result files; run `pip install fastkd[bench]`") from error
    return get_cpu_info().get("brand_raw") or platform.processor()


def _commit() -> str:
    """The commit of the source tree, `+` behind it where files differ from it; empty for an installed wheel."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--error-unmatch", str(here / "machine.py")):
            return ""  # site-packages may lie inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return ""
