"""The compiler half of the backend. Triton requires it and never calls it.

With TRITON_INTERPRET=1 a kernel runs as Python. Without it, the driver raises an error before the
compiler is called.
"""

from triton.backends.compiler import BaseBackend

from triton_cpu_interpreter import CANNOT_COMPILE


class InterpreterBackend(BaseBackend):
    """Takes the place of a compiler."""

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


# Triton refuses to import if a backend is abstract, also on a CUDA machine. The list of abstract
# methods differs between Triton's releases. A new abstract method must not break the import.
InterpreterBackend.__abstractmethods__ = frozenset()
