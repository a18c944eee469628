"""Speculative ensembles by turns, and the plugin that vLLM loads in each of its processes."""


def register() -> None:
    """vLLM's general plugin. vLLM calls it once or more in every process.

    On CPU, the plugin replaces Triton kernels that the interpreter runs slowly with torch and NumPy
    code. On CUDA it does nothing.
    """
    from vllm.cpu_kernels import register_cpu_kernels

    register_cpu_kernels()
