"""What the front of an engine must know about ensembles under speculation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


def allow_all_sampling_params(llm_engine: "LLMEngine") -> None:
    """Let `min_p` and `logit_bias` through, which vLLM refuses beside any speculation.

    The refusal is older than Model Runner V2, whose sampler applies both at every position that
    is verified.  It is made where requests come in, from a configuration that serves only one other
    refusal there, of traces to replay, which `check_ensemble` makes for the whole engine.
    """
    llm_engine.input_processor.speculative_config = None
