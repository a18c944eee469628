"""What an engine's front end must know about ensembles under speculation."""

import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

# Packages with workers that make an engine an ensemble, and what checks their configuration.
CHECKS = {
    "vllm.ensemble_decode.": "vllm.ensemble_decode.members.check_ensemble",
    "vllm.chef.": "vllm.chef.config.check_chef",
}


def is_ensemble(vllm_config: "VllmConfig") -> bool:
    """Whether the engine runs an ensemble. Its worker decides that."""
    return vllm_config.parallel_config.worker_cls.startswith(tuple(CHECKS))


def check_engine(vllm_config: "VllmConfig") -> None:
    """Check an ensemble's configuration in the front end, before it starts an engine.

    The worker makes the same check. But it runs in a process of its own, and its errors reach the
    user between two tracebacks.

    Raises:
        ConfigFieldError: what the worker would refuse.
        SystemExit: the same in vLLM's own programs, such as its server. They then end with this
            line and no traceback.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm.ensemble_decode.errors import ConfigFieldError

    worker = vllm_config.parallel_config.worker_cls
    (check,) = (check for package, check in CHECKS.items() if worker.startswith(package))
    try:
        resolve_obj_by_qualname(check)(vllm_config)
    except ConfigFieldError as error:
        if is_vllms_program():
            raise SystemExit(f"error: {error}") from error
        raise


def is_vllms_program() -> bool:
    """Whether the process runs the command `vllm`, or one of vLLM's modules (`python -m`)."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return spec.name.startswith("vllm.entrypoints.")
    return file is not None and Path(file).name == "vllm"


@cache
def allow_all_sampling_params() -> None:
    """Make front ends check ensembles, and accept `min_p` and `logit_bias` beside speculation.

    vLLM refuses both, because older model runners could not apply them. The sampler of Model Runner
    V2 applies both at every verified position. vLLM's input processor refuses them if it has a
    `speculative_config`, and there is no hook. So an ensemble's input processor has none. It needs
    the configuration for one other check only, of replayed traces, which `check_ensemble` makes.

    An input processor is made in every front end, before the engine starts. So the configuration is
    checked there as well (`check_engine`), and so is what a request overrides of its ensemble
    (`request_args.py`).

    Our plugin calls this function in each process, before an engine is made.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    init = InputProcessor.__init__

    @wraps(init)
    def init_with_all_params(
        self: InputProcessor, vllm_config: "VllmConfig", *args: Any, **kwargs: Any
    ) -> None:
        if is_ensemble(vllm_config):
            check_engine(vllm_config)
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
