"""What an engine's front end must know about ensembles under speculation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


def allow_all_sampling_params(llm_engine: "LLMEngine") -> None:
    """Accept `min_p` and `logit_bias`, which vLLM refuses beside any speculation.

    The refusal is older than Model Runner V2, whose sampler applies both at every verified
    position. vLLM decides it from the input processor's `speculative_config`. That configuration
    serves only one other refusal there, the replay of traces. `check_ensemble` makes that refusal
    for the whole engine.
    """
    llm_engine.input_processor.speculative_config = None
