"""Everything between a method's configuration and an engine that runs it.

`prepare` refuses everything that can be refused; `start` loads the weights.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.engine import Engine, Request, configure_process
from harness.engine_config import check_sampling_params, make_engine_config
from harness.errors import RunError, one_line
from harness.methods import MethodSpec, make_spec
from harness.prompts import load_tokenizer, make_requests
from tasks import Example, Task

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Session:
    """A method that is ready to run.

    Args:
        spec: what the method runs.
        engine_config: vLLM's configuration.
        tokenizer: the tokenizer of all members.
        seed: the seed of the run.
        verbose: whether errors of vLLM are shown with all they say.
    """

    spec: MethodSpec
    engine_config: "VllmConfig"
    tokenizer: Any
    seed: int
    verbose: bool = False

    @classmethod
    def prepare(
        cls, method: Mapping[str, Any], seed: int, num_slots: int, verbose: bool = False
    ) -> "Session":
        """Check everything.

        Args:
            method: the configuration group, as plain data.
            num_slots: the most requests in flight.

        Raises:
            ConfigError: vLLM or the ensemble cannot do this.
        """
        configure_process(verbose)
        spec = make_spec(method)
        engine_config = make_engine_config(spec, seed, num_slots)
        tokenizer = load_tokenizer(engine_config.model_config)
        check_sampling_params(spec.sampling_params, engine_config, tokenizer)
        return cls(spec, engine_config, tokenizer, seed, verbose)

    @property
    def max_model_len(self) -> int:
        return self.engine_config.model_config.max_model_len

    def requests(self, task: Task, examples: Sequence[Example]) -> list[Request]:
        return make_requests(task, examples, self.tokenizer, self.max_model_len, self.seed)

    @contextlib.contextmanager
    def start(self) -> Iterator[Engine]:
        """The engine, with its weights loaded.

        Raises:
            RunError: the engine does not start, or its process dies.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        takes_turns = self.spec.turns is not None
        try:
            engine = Engine.start(self.engine_config, self.spec.sampling_params, takes_turns)
        except Exception as error:  # of vLLM, of the device, of a file
            if self.verbose:
                raise
            raise RunError(
                f"the engine did not start: {one_line(error)} (verbose=true shows more)"
            ) from error
        with contextlib.closing(engine):
            try:
                yield engine
            except EngineDeadError as error:
                raise RunError(
                    "the engine's process has died; the lines above say why, unless it was "
                    "killed; run the same command again"
                ) from error
