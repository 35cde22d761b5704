"""What a measurement ran on: the CPU and what it can do, memory, load, versions."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

from fastkd.edge.extras import required

# Where the name in the CPU's flags and the usual name differ, both; py-cpuinfo gives the first.
_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "amx_fp16": "amx_fp16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "asimdhp": "fp16",
    "bf16": "bf16",
    "sve": "sve",
}
_PACKAGES = "fastkd torch transformers tokenizers numpy onnx onnxruntime openvino nncf executorch".split()
# Which of them limits a runtime depends on how it was built.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Machine:
    """cpu: the model's name. features: of the instruction set, those that decide how fast int8, bf16 and fp16 run;
    empty where the system does not tell. cores: physical ones; cpus: logical ones this process may use.
    memory_bytes: of the machine. load_average: of the last minute, before anything was measured; None where the system
    has none. threads_environment: the variables that limit threads, None where unset."""

    cpu: str
    architecture: str
    features: list[str]
    cores: int
    cpus: int
    memory_bytes: int
    platform: str
    load_average: float | None
    threads_environment: dict[str, str | None]


def this_machine() -> Machine:
    """Raises ValueError where psutil or py-cpuinfo is missing."""
    psutil = required("psutil")
    cpu = required("cpuinfo").get_cpu_info()
    flags = set(cpu.get("flags", ()))
    return Machine(
        cpu=cpu.get("brand_raw") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        features=[name for flag, name in _FEATURES.items() if flag in flags],
        cores=psutil.cpu_count(logical=False) or usable_cpus(),
        cpus=usable_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        platform=platform.platform(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        threads_environment={name: os.environ.get(name) for name in THREAD_VARIABLES},
    )


def usable_cpus() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Python and of the installed packages that take part."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
