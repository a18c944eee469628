"""What an engine's front end must know about ensembles under speculation."""

from functools import cache, wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Packages with workers that make an engine an ensemble.
OUR_PACKAGES = ("vllm.ensemble_decode.", "vllm.chef.")


@cache
def allow_all_sampling_params() -> None:
    """Make front ends accept `min_p` and `logit_bias` beside speculation, for ensembles only.

    vLLM refuses both. The refusal is older than Model Runner V2, whose sampler applies both at
    every verified position. vLLM decides it from the input processor's `speculative_config`, and
    has no hook there. That configuration serves only one other refusal there, the replay of traces.
    `check_ensemble` makes that refusal for the whole engine.

    Our plugin calls this function in each process, before an engine is made.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    init = InputProcessor.__init__

    @wraps(init)
    def init_with_all_params(
        self: InputProcessor, vllm_config: "VllmConfig", *args: Any, **kwargs: Any
    ) -> None:
        init(self, vllm_config, *args, **kwargs)
        if vllm_config.parallel_config.worker_cls.startswith(OUR_PACKAGES):
            self.speculative_config = None

    InputProcessor.__init__ = init_with_all_params
