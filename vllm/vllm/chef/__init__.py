"""Speculative ensembles by turns, and the plugin that vLLM loads in each of its processes."""

import sys
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

    It does two things:

    - On a CPU, it replaces Triton kernels that the interpreter runs slowly with torch and NumPy
      code.
    - In a process that may be a front end, it checks ensembles and what requests override, and
      lifts a refusal of sampling parameters.
    """
    from vllm.cpu_kernels import register_cpu_kernels
    from vllm.ensemble_decode.frontend import allow_all_sampling_params

    register_cpu_kernels()
    # A front end makes EngineArgs, which load the plugins (`load_general_plugins`). Processes that
    # inspect a model class have no EngineArgs. There, importing the front end would take seconds.
    if "vllm.engine.arg_utils" in sys.modules:
        allow_all_sampling_params()
