"""The driver half of the backend: it says whether the interpreter is active, and activates it.

Triton imports this module when it looks for backends, before any kernel is defined. That is the
last moment at which TRITON_INTERPRET takes effect.
"""

import os

from triton.backends.driver import DriverBase

from triton_cpu_interpreter import CANNOT_COMPILE, is_cpu_build

# Read once, because Triton and vLLM ask for the active driver many times.
_ACTIVE = is_cpu_build()

if _ACTIVE:
    os.environ.setdefault("TRITON_INTERPRET", "1")


class InterpreterDriver(DriverBase):
    """Active on the CPU build of vLLM and nowhere else."""

    @classmethod
    def is_active(cls) -> bool:
        return _ACTIVE

    @staticmethod
    def target_name() -> str:
        return "cpu"

    def get_current_device(self) -> int:
        """Triton calls this first when it is about to compile a kernel."""
        raise NotImplementedError(CANNOT_COMPILE)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError(CANNOT_COMPILE)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench


# The reason is given in `compiler.py`.
InterpreterDriver.__abstractmethods__ = frozenset()
