"""Token-level ensembles of language models as one vLLM model.

An engine names `EnsembleDecodeWorker` (in `worker.py`) in `worker_cls`, and carries
`EnsembleConfig` in `additional_config["ensemble"]`. This package knows neither turns nor proposals.
`vllm.chef` does.
"""

from vllm.ensemble_decode.config import ENSEMBLE_TARGETS, EnsembleConfig
from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.functions import ENSEMBLE_FUNCTIONS, capturable, row_coefficients

__all__ = [
    "ENSEMBLE_FUNCTIONS",
    "ENSEMBLE_TARGETS",
    "ConfigFieldError",
    "EnsembleConfig",
    "capturable",
    "row_coefficients",
]
