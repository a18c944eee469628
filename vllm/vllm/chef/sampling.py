"""What the requests' sampling parameters make of logits."""

import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from vllm.chef.state import Cycle


def draw_proposals(
    logits: torch.Tensor,  # [num_reqs, vocab_size] of a member, raw
    cycle: Cycle,
    position: torch.Tensor,  # [num_reqs] of the token before
    requests: torch.Tensor,  # [at least num_reqs] 0, 1, ...
    use_fp64: bool,
) -> torch.Tensor:  # [num_reqs]
    """Draws from a member's distribution.

    Of the sampling parameters only the temperature counts here: the others may cost acceptance,
    never exactness.
    """
    return gumbel_sample(
        logits,
        requests[: cycle.num_reqs],
        cycle.temperature,
        cycle.seeds,
        position,
        apply_temperature=True,
        # Noise of its own: a replacement must not know how its proposal was drawn.
        is_drafting=True,
        use_fp64=use_fp64,
    )
