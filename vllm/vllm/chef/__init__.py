"""Speculative ensembles by turns, and the plugin that vLLM loads in each of its processes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.chef.arguments import ensemble_args

__all__ = ["ensemble_args", "register"]


def __getattr__(name: str) -> Any:
    # Imported late: vLLM loads this plugin while it imports the modules that the function needs.
    if name == "ensemble_args":
        from vllm.chef.arguments import ensemble_args

        return ensemble_args
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def register() -> None:
    """vLLM's general plugin. vLLM calls it once or more in every process.

    On CPU, the plugin replaces Triton kernels that the interpreter runs slowly with torch and NumPy
    code. On CUDA it does nothing.
    """
    from vllm.cpu_kernels import register_cpu_kernels

    register_cpu_kernels()
