"""Compiles kernels for a GPU that the machine need not have.

A test runs a module's kernels in the interpreter and records the launches (`recorded`). It then
compiles each kernel for the types that it was launched with (`compile_launches`). Compiling needs a
process without Triton's interpreter, which runs this file: `compile_for_cuda.py LAUNCHES`.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CAPABILITIES = (80, 90)


class Recorder:
    """Launches a kernel, and records the kernel's parameters."""

    def __init__(self, module: str, name: str, kernel: Any, launches: list[dict[str, Any]]) -> None:
        self.module, self.name, self.kernel, self.launches = module, name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            self.kernel[grid](*args, num_warps=num_warps, **constants)
            names = inspect.signature(self.kernel.fn).parameters
            given = dict(zip(names, args, strict=False))
            constants |= {name: None for name, value in given.items() if value is None}
            types = {name: triton_type(value) for name, value in given.items() if value is not None}
            launch = {"module": self.module, "kernel": self.name, "num_warps": num_warps}
            launch |= {"types": types, "constants": constants}
            if launch not in self.launches:
                self.launches.append(launch)

        return launch


def triton_type(value: Any) -> Any:  # as JSON has it, with lists for tuples
    if isinstance(value, tuple):
        return [triton_type(part) for part in value]
    if isinstance(value, int):
        return "i32"
    names = {torch.bool: "i1", torch.int32: "i32", torch.int64: "i64", torch.float32: "fp32"}
    return f"*{(names | {torch.bfloat16: 'bf16'})[value.dtype]}"


def recorded(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the launches of the module's kernels from now on, each kind once.

    A launch is `{"module", "kernel", "types", "constants", "num_warps"}`, with types as Triton
    writes them.
    """
    launches: list[dict[str, Any]] = []
    for name in kernels_of(module):
        recorder = Recorder(module.__name__, name, getattr(module, name), launches)
        monkeypatch.setattr(module, name, recorder)
    return launches


def kernels_of(module: ModuleType) -> set[str]:
    return {name for name in vars(module) if name.endswith("_kernel")}


def compile_launches(launches: list[dict[str, Any]], module: ModuleType, folder: Path) -> None:
    """Compile the launches for `CAPABILITIES`; each of the module's kernels must be among them."""
    assert {launch["kernel"] for launch in launches} == kernels_of(module)
    file = folder / "launches.json"
    file.write_text(json.dumps(launches))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    subprocess.run([sys.executable, __file__, str(file)], check=True, env=environment)


def compile_launch(launch: dict[str, Any]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    constants = {places[name]: as_tuple(value) for name, value in launch["constants"].items()}
    types = {name: as_tuple(value) for name, value in launch["types"].items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    for capability in CAPABILITIES:
        triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": launch["num_warps"]},
        )


def as_tuple(value: Any) -> Any:
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    for launch in json.loads(Path(sys.argv[1]).read_text()):
        compile_launch(launch)
