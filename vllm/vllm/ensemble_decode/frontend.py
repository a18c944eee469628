"""What an engine's front end must know about ensembles under speculation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine


def allow_all_sampling_params(engine: "LLM | LLMEngine | AsyncLLM") -> None:
    """Accept `min_p` and `logit_bias`, which vLLM refuses beside any speculation.

    Call it for ensembles only, before the first request. The refusal is older than Model Runner V2,
    whose sampler applies both at every verified position. vLLM decides it from the input
    processor's `speculative_config`, and has no hook there. That configuration serves only one
    other refusal there, the replay of traces. `check_ensemble` makes that refusal for the whole
    engine.
    """
    engine.input_processor.speculative_config = None
