"""Token-level ensembles of language models as one vLLM model.

`EnsembleDecodeWorker` (in `worker.py`) is what an engine names in `worker_cls`;
`EnsembleConfig` is what it carries in `additional_config["ensemble"]`.  Nothing here
knows of turns or of proposals: that is `vllm.chef`.
"""

from vllm.ensemble_decode.config import ENSEMBLE_TARGETS, EnsembleConfig
from vllm.ensemble_decode.functions import ENSEMBLE_FUNCTIONS

__all__ = ["ENSEMBLE_FUNCTIONS", "ENSEMBLE_TARGETS", "EnsembleConfig"]
