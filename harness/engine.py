"""A vLLM engine driven request by request: what finishes is handed out at once.

Knows prompts and sampling parameters; knows neither data sets nor files.
"""

import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import ConfigError, one_line
from harness.methods import MethodSpec


def configure_process(verbose: bool) -> None:
    """Settings of the process that vLLM reads when it is imported: call it before.

    The engine's own log is quiet unless `verbose`.
    """
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Hydra's root handler would show what vLLM's own one holds back.
        logging.getLogger("vllm").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Request:
    """One prompt: text, or chat messages for the model's chat template."""

    index: int
    prompt: str
    messages: tuple[dict[str, str], ...]
    seed: int | None


@dataclass(frozen=True)
class Completion:
    """What the engine made of a request; `latency_s` is from its submission to its last token."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    latency_s: float


class Engine:
    """A vLLM engine for one method.

    Raises (on construction): ConfigError, before any weight is loaded, for what vLLM or the
    ensemble cannot do.
    """

    def __init__(self, spec: MethodSpec, seed: int) -> None:
        from vllm import LLM

        arguments = {**spec.engine_args, "seed": seed}
        check_engine_args(arguments)
        self.llm = LLM(**arguments, use_tqdm_on_load=False, disable_log_stats=False)
        self.sampling_params = spec.sampling_params
        self._request_ids = map(str, itertools.count())

    def check_lengths(self, requests: Sequence[Request]) -> None:
        """Raise ConfigError if a prompt leaves no room for a token."""
        longest = self.llm.llm_engine.vllm_config.model_config.max_model_len
        for request in requests:
            num_tokens = len(self._prompt(request)["prompt_token_ids"])
            if num_tokens >= longest:
                raise ConfigError(
                    f"method.llm.max_model_len: example {request.index} has {num_tokens} prompt "
                    f"tokens and the members read {longest}; raise it, or use other members"
                )

    def warm_up(self, request: Request, num_tokens: int = 8) -> None:
        """Run everything once that compiles or allocates on first use; leaves no cached prefix."""
        list(self.generate([request], None, max_tokens=num_tokens, min_tokens=0))
        self.llm.reset_prefix_cache()
        self.synchronize()

    def generate(
        self, requests: Sequence[Request], batch_size: int | None, **overrides: Any
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish, `batch_size` requests in flight."""
        engine, waiting = self.llm.llm_engine, list(reversed(requests))
        started: dict[str, tuple[int, float]] = {}
        while waiting or started:
            while waiting and (batch_size is None or len(started) < batch_size):
                request = waiting.pop()
                started[self._submit(request, overrides)] = (request.index, time.perf_counter())
            for output in engine.step():
                if output.finished:
                    index, start = started.pop(output.request_id)
                    first = output.outputs[0]
                    yield Completion(
                        index=index,
                        text=first.text,
                        token_ids=list(first.token_ids),
                        finish_reason=str(first.finish_reason),
                        latency_s=time.perf_counter() - start,
                    )

    def synchronize(self) -> None:
        """Wait for the device, where the engine lives in this process."""
        import torch

        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def _submit(self, request: Request, overrides: dict[str, Any]) -> str:
        from vllm import SamplingParams

        params = {"seed": request.seed, **self.sampling_params, **overrides}
        request_id = next(self._request_ids)
        self.llm.llm_engine.add_request(request_id, self._prompt(request), SamplingParams(**params))
        return request_id

    def _prompt(self, request: Request) -> dict[str, Any]:
        tokenizer = self.llm.get_tokenizer()
        if request.messages:
            token_ids = tokenizer.apply_chat_template(
                list(request.messages), add_generation_prompt=True, return_dict=False
            )
        else:
            token_ids = tokenizer.encode(request.prompt)
        return {"prompt_token_ids": token_ids}


def check_engine_args(arguments: dict[str, Any]) -> None:
    """Let vLLM and the ensemble check the arguments while no weight is loaded yet."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm.ensemble_decode.members import check_ensemble

    unknown = set(arguments) - set(EngineArgs.__dataclass_fields__)
    if unknown:
        raise ConfigError(f"method.llm.{sorted(unknown)[0]}: vLLM has no such engine argument")
    try:
        vllm_config = EngineArgs(**arguments).create_engine_config()
        if "additional_config" in arguments:
            check_ensemble(vllm_config)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
