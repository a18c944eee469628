"""What an engine's front end must know about ensembles under speculation."""

from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

# Packages with workers that make an engine an ensemble.
OUR_PACKAGES = ("vllm.ensemble_decode.", "vllm.chef.")


def is_ensemble(vllm_config: "VllmConfig") -> bool:
    """Whether the engine runs an ensemble. Its worker decides that."""
    return vllm_config.parallel_config.worker_cls.startswith(OUR_PACKAGES)


@cache
def allow_all_sampling_params() -> None:
    """Make front ends accept `min_p` and `logit_bias` beside speculation, for ensembles only.

    vLLM refuses both, because older model runners could not apply them. The sampler of Model Runner
    V2 applies both at every verified position. vLLM's input processor refuses them if it has a
    `speculative_config`, and there is no hook. So an ensemble's input processor has none. It needs
    the configuration for one other check only, of replayed traces, which `check_ensemble` makes.

    The same front ends check what a request overrides of its ensemble (`request_args.py`).

    Our plugin calls this function in each process, before an engine is made.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    init = InputProcessor.__init__

    @wraps(init)
    def init_with_all_params(
        self: InputProcessor, vllm_config: "VllmConfig", *args: Any, **kwargs: Any
    ) -> None:
        init(self, vllm_config, *args, **kwargs)
        if is_ensemble(vllm_config):
            self.speculative_config = None
            self.validate_logits_processors_params = also_checking_overrides(
                self.validate_logits_processors_params, vllm_config
            )

    InputProcessor.__init__ = init_with_all_params


def also_checking_overrides(
    validate: Callable[["SamplingParams"], None], vllm_config: "VllmConfig"
) -> Callable[["SamplingParams"], None]:
    """vLLM's check of a request, and a check of the keys `ensemble_*` in its `extra_args`.

    The check raises VLLMValidationError, which the server answers with HTTP 400. Only that request
    fails.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm.ensemble_decode.config import EnsembleConfig
    from vllm.ensemble_decode.errors import ConfigFieldError
    from vllm.ensemble_decode.request_args import overrides, requested_coefficients

    @cache
    def function() -> Any:
        # Made for the first request that needs it: the workers report errors in the configuration.
        config = vllm_config.additional_config
        return EnsembleConfig.from_additional_config(config).make_function()

    def check(params: "SamplingParams") -> None:
        validate(params)
        if overrides(params.extra_args):
            try:
                requested_coefficients(function(), params.extra_args)
            except ConfigFieldError as error:
                raise VLLMValidationError(str(error)) from None

    return check
