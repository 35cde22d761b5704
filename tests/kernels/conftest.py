"""Triton decides when a kernel is decorated whether it is interpreted: those tests have a process of their own.

The others compile without a GPU; what a kernel takes stands in tables under docs/kernels, which they compare.
"""

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

ROOT = Path(__file__).resolve().parents[2]
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1", torch.int8: "i8",
    torch.uint8: "u8", torch.uint16: "u16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass
class ResourceTable:
    """The table at the end of a page in docs/kernels, made by one version of a compiler: `columns`, the first `keys` of
    which say what was compiled. FASTKD_WRITE_TABLES=1 writes it anew."""

    page: str
    columns: tuple[str, ...]
    keys: int
    compiler: str

    @property
    def path(self) -> Path:
        return ROOT / "docs/kernels" / self.page

    def is_of(self, version: str) -> bool:
        return f"\n{self.compiler} {version}:\n" in self.path.read_text(encoding="utf-8")

    def read(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        lines = self.path.read_text(encoding="utf-8").rpartition(f"\n{self.compiler} ")[2].splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        assert tuple(rows[0]) == self.columns
        return {tuple(row[: self.keys]): tuple(row[self.keys :]) for row in rows[2:]}

    def write(self, found: dict[tuple[str, ...], tuple[str, ...]], version: str) -> None:
        head = self.path.read_text(encoding="utf-8").rpartition(f"\n{self.compiler} ")[0]
        rows = [self.columns, ["---"] * len(self.columns), *(key + numbers for key, numbers in found.items())]
        lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        self.path.write_text(f"{head}\n{self.compiler} {version}:\n\n{lines}", encoding="utf-8")

    @staticmethod
    def is_wanted_anew() -> bool:
        return os.environ.get("FASTKD_WRITE_TABLES") == "1"


@pytest.fixture(scope="session")
def resource_table():
    return ResourceTable


@pytest.fixture(scope="session")
def type_names():
    return TYPES


@dataclass
class Launch:
    """What a launcher would start: a Triton kernel, the value of each of its parameters, and options."""

    kernel: object
    values: dict
    options: dict

    def specialization(self) -> tuple:
        """What Triton compiles anew for: constants, types, alignments; and values, unless they are exempt."""
        return self.kernel.__name__, *(
            self.values[parameter.name] if parameter.is_constexpr
            else (self.values[parameter.name].dtype, self.values[parameter.name].data_ptr() % 16 == 0)
            if isinstance(self.values[parameter.name], torch.Tensor)
            else type(self.values[parameter.name])
            if parameter.do_not_specialize or isinstance(self.values[parameter.name], float)
            else self.values[parameter.name]
            for parameter in self.kernel.params
        )  # fmt: skip

    def compile(self, sm: int, folder: Path) -> tuple[str, tuple[str, ...]]:
        """For one architecture, nothing coming from an earlier run: PTX; and warps, registers per thread, shared and
        stack bytes as texts."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self.kernel, signature, constants, attributes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(folder))
            compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=self.options)
        ptx = compiled.asm["ptx"]
        assert f".target sm_{sm}" in ptx
        assert ("__assertfail" in ptx) == bool(self.kernel.debug)
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
        return ptx, (str(self.options["num_warps"]), registers, str(compiled.metadata.shared), stack)


@pytest.fixture(scope="session")
def recorded_launches():
    """A context: within, Triton kernels are not started but put into the list it gives."""

    @contextlib.contextmanager
    def recording():
        import triton

        launches = []

        def record(kernel, *arguments, grid, warmup, **named):
            values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
            options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
            launches.append(Launch(kernel, values, options | {"debug": bool(kernel.debug)}))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.JITFunction, "run", record)
            yield launches

    return recording
