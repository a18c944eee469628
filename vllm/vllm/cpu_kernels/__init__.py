"""Model Runner V2 without a GPU: the Triton kernels of its steps in torch and NumPy.

Triton's interpreter runs kernels without a GPU (see `triton_cpu_interpreter`). It takes up to a
second for a kernel that goes over the vocabulary and a millisecond per request for any other. Some
kernels it cannot run at all. This package replaces the kernels of vLLM's steps. It knows vLLM only:
no ensemble, no members, no turns.
"""

from vllm.cpu_kernels.registration import kernels_by_name, register_cpu_kernels

__all__ = ["kernels_by_name", "register_cpu_kernels"]
