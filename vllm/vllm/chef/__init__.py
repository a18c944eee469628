"""Speculative ensembles by turns; and the plugin that vLLM loads in each of its processes."""


def register() -> None:
    """vLLM's general plugin, called once or more in every process.

    On CPU it puts torch implementations in the place of the Triton kernels whose cost grows
    with the vocabulary.  On CUDA it does nothing.
    """
    from vllm.cpu_kernels import register_cpu_kernels

    register_cpu_kernels()
