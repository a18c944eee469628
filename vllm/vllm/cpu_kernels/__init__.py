"""Model Runner V2 without a GPU: the Triton kernels of its steps in torch and NumPy.

Triton's interpreter runs kernels without a GPU (see `triton_cpu_interpreter`). A kernel over the
vocabulary takes up to a second there, and any other kernel takes a millisecond per request. Some
kernels do not run at all. This package replaces the kernels of vLLM's steps. It knows only vLLM: no
ensemble, no members, no turns.
"""

from vllm.cpu_kernels.registration import kernels_by_name, register_cpu_kernels

__all__ = ["kernels_by_name", "register_cpu_kernels"]
