"""The compiler half of the backend, which Triton wants to exist and never calls.

Under TRITON_INTERPRET=1 a kernel is run as Python, and without it the driver refuses before.
"""

from triton.backends.compiler import BaseBackend

from triton_cpu_interpreter import CANNOT_COMPILE


class InterpreterBackend(BaseBackend):
    """Stands where a compiler would stand."""

    @staticmethod
    def supports_target(target) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "triton-cpu-interpreter"

    def parse_options(self, options: dict):
        raise NotImplementedError(CANNOT_COMPILE)

    def add_stages(self, stages: dict, options, language=None) -> None:
        raise NotImplementedError(CANNOT_COMPILE)

    def load_dialects(self, context) -> None:
        """Nothing is compiled, so no dialect is needed."""

    def get_module_map(self) -> dict:
        return {}


# Triton refuses to import when a backend is abstract, on a CUDA machine too, and the list of
# abstract methods differs between its releases: a method that is new there must not break it.
InterpreterBackend.__abstractmethods__ = frozenset()
