"""Whether a CUDA graph can hold a function of the user's own.

A graph repeats the kernels of one call. It repeats no Python. So a graph is wrong for a function
that reads values on the host, or that changes from call to call. The function is captured once, and
the graph is compared with calls on fresh inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm.ensemble_decode.functions import Custom
from vllm.ensemble_decode.ops import combine

NUM_ROWS, NUM_INPUTS = 3, 3


class Captured(NamedTuple):
    """A call in a graph."""

    replay: Callable[[], None]
    output: torch.Tensor  # each replay writes it


Capture = Callable[[Callable[[], torch.Tensor]], Captured]


def obstacle_to_capture(
    function: Custom,
    vocab_size: int,
    combines_probs: bool,
    device: torch.device,
    capture: Capture | None = None,
) -> str | None:
    """Why no graph can hold the function. None if one can.

    Args:
        combines_probs: see `ops.combine`.
        capture: makes a graph of a call. None: a CUDA graph.
    """
    if function.is_capturable is False:
        return "it declares itself not capturable"
    generator = torch.Generator(device).manual_seed(0)
    size = (function.num_members, NUM_ROWS, vocab_size)
    inputs = [torch.randn(size, generator=generator, device=device) for _ in range(NUM_INPUTS)]

    def call(scores: torch.Tensor) -> torch.Tensor:
        return combine(function, scores, combines_probs)

    fixed = inputs[0].clone()
    try:
        graph = (capture or cuda_graph)(lambda: call(fixed))
        if function.is_capturable:
            return None
        for scores in inputs:
            fixed.copy_(scores)
            graph.replay()
            if not _same(graph.output, call(scores)):
                return "its results in a graph differ from those of calls"
        # A batch may be filled up with rows of no request.
        alone = call(fixed[:, :1].contiguous())
        if not _same(graph.output[:1], alone):
            return "the result of a row depends on other rows"
    except Exception as error:  # the user's function may raise anything
        return f"it cannot be captured ({type(error).__name__}: {_first_line(error)})"
    return None


def cuda_graph(call: Callable[[], torch.Tensor]) -> Captured:
    """A CUDA graph of a call. What the call reads must stay where it is."""
    # Libraries set themselves up in a first call, which no graph can hold.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return Captured(graph.replay, output)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # Kernels may add up in another order if a batch has another size.
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
