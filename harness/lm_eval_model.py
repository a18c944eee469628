"""An lm-evaluation-harness model over our engine: it generates and scores texts with the ensemble.

This module knows what lm-eval asks of a model, in texts and tokens. It knows neither lm-eval's
tasks nor any file.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from harness.engine import Completion, Engine, Request
from harness.errors import ConfigError, one_line
from harness.proposals import Counts, add

logger = logging.getLogger(__name__)

NAME = "speculative-ensemble"
# lm-eval's own default, for tasks that set no limit.
DEFAULT_MAX_GEN_TOKS = 256
# Scoring needs only the log-probabilities of the prompt, but the engine must generate a token. For
# each token of the prompt, vLLM returns its log-probability and the one of the likeliest token. The
# two tell whether the token is the likeliest.
SCORING = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1, "detokenize": False}
# As in lm-eval's own models: a stop string may be a special token.
SHOW_SPECIAL_TOKENS = {"skip_special_tokens": False, "spaces_between_special_tokens": False}

# (lm-eval's key to cache the answer, or None; tokens of the context; tokens to score)
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model(NAME)
class SpeculativeEnsembleLM(TemplateLM):
    """Answers lm-eval's requests.

    Args:
        start: starts the engine. It is called with the first request, so that lm-eval refuses bad
            input before weights are loaded. The engine must have no sampling parameters of its own,
            because they would count for scored texts too.
        tokenizer: the tokenizer of all members.
        max_model_len: the most tokens that all members read, prompt and continuation together.
        sampling_params: vLLM's parameters by name, where a task leaves them open. They apply to
            generated texts only.
        seed: seed of the first generated text. Each text has a seed of its own.
        batch_size: requests in flight; None: all.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        tokenizer: Any,
        max_model_len: int,
        sampling_params: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_model_len
        self.num_tokens, self.time_s = 0, 0.0
        """Of generated texts: tokens, and seconds around the engine"""
        self.counts: Counts = {}
        """Counts of the tokens proposed for generated texts"""
        self._start = start
        self._sampling_params = dict(sampling_params or {})
        self._seed, self._batch_size = seed, batch_size

    @functools.cached_property
    def engine(self) -> Engine:
        return self._start()

    @property
    def is_started(self) -> bool:
        return "engine" in vars(self)

    # Tokens

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context begins with."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ConfigError(
            "method.model: texts without context need a BOS or an EOS token before them, and its "
            "tokenizer has neither; choose other tasks or members"
        )

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            # Chat templates write the BOS token themselves.
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except (ValueError, TemplateError) as error:
            raise ConfigError(
                f"apply_chat_template: {one_line(error)}; set it to false, or system_instruction "
                "to null if the template knows no system"
            ) from error

    # Scores

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The summed log-probability of each continuation, and whether it is the likeliest.

        A continuation is the likeliest if each of its tokens is a likeliest one at its position.
        """
        # An empty continuation needs no engine: its probability is one.
        answers = [(0.0, True)] * len(requests)
        prompts = self._cut(
            (context or [self.prefix_token_id]) + continuation
            for _, context, continuation in requests
        )
        scored = [
            Request(index, prompt, seed=None, sampling_params=SCORING)
            for index, (prompt, (_, _, continuation)) in enumerate(
                zip(prompts, requests, strict=True)
            )
            if self._has_tokens(continuation)
        ]
        for completion in self._completions(scored, "scores", disable_tqdm):
            key, _, continuation = requests[completion.index]
            answers[completion.index] = answer = _score(completion, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _has_tokens(self, continuation: Sequence[int]) -> bool:
        # One position is for the token that the engine generates. Another is for a context token,
        # which the first scored token depends on.
        if len(continuation) > self.max_length - 2:
            raise ConfigError(
                f"tasks: {len(continuation)} tokens are to be scored, and a context of "
                f"{self.max_length} has room for {self.max_length - 2}; raise "
                "method.llm.max_model_len, or choose other tasks or members"
            )
        return bool(continuation)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The summed log-probability of all tokens of each text; every token is predicted once.

        lm-eval's own models differ in one point. If a tokenizer begins texts with a BOS token, they
        add a second one, which would be scored. This model does not.
        """
        windows: list[TokenRequest] = []
        owners = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            # `length` is two less, because it counts neither the one context token nor the
            # generated token.
            length = self.max_length - 2
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generated texts

    def sampling_params(self, gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """vLLM's sampling parameters for a task's `generation_kwargs`.

        A task decides on:
        - its stop strings,
        - the number of tokens that it wants,
        - whether tokens are sampled.

        The run's parameters apply to everything else, and to whatever of these the task leaves
        open.

        Raises:
            ConfigError: no room is left for a prompt.
        """
        ours = {"temperature": 0, "max_tokens": DEFAULT_MAX_GEN_TOKS, **self._sampling_params}
        given = dict(normalize_gen_kwargs(dict(gen_kwargs), ours["max_tokens"]))
        # `normalize_gen_kwargs` always sets `do_sample`, even if the task does not.
        del given["do_sample"]
        if gen_kwargs.get("do_sample") and "temperature" not in gen_kwargs:
            given["temperature"] = ours["temperature"] or 1
        stop = [text for text in given.pop("until") if text] or ours.get("stop")
        max_tokens = given.pop("max_gen_toks")
        if given.get("num_beams") == 1:
            del given["num_beams"]  # transformers' name; the value says that there is no search
        if max_tokens >= self.max_length:
            raise ConfigError(
                f"tasks: {max_tokens} tokens are to be generated and the members read "
                f"{self.max_length} in all; give a smaller gen_kwargs.max_gen_toks"
            )
        return ours | SHOW_SPECIAL_TOKENS | given | {"stop": stop, "max_tokens": max_tokens}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each text, in their order, cut before its first stop string."""
        params = [self.sampling_params(request.args[1]) for request in requests]
        prompts = self._cut(
            (self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests),
            [p["max_tokens"] for p in params],
        )
        submitted = [
            Request(index, prompt, self._seed + index, sampling_params=params[index])
            for index, prompt in enumerate(prompts)
        ]
        self.engine.warm_up(submitted[0])
        self.engine.synchronize()
        start = time.perf_counter()
        texts = [""] * len(requests)
        for completion in self._completions(submitted, "texts", disable_tqdm):
            text = _cut_at_stop(completion.text, params[completion.index]["stop"] or ())
            texts[completion.index] = text
            self.num_tokens += len(completion.token_ids)
            self.cache_hook.add_partial("generate_until", requests[completion.index].args, text)
        self.time_s += time.perf_counter() - start
        self.counts = add(self.counts, self.engine.proposals())
        return texts

    # Both

    def _cut(
        self, prompts: Iterable[list[int]], num_generated: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The end of each prompt, with room for the tokens to generate (one by default)."""
        prompts = list(prompts)
        rooms = [self.max_length - num for num in num_generated or [1] * len(prompts)]
        too_long = sum(len(p) > room for p, room in zip(prompts, rooms, strict=True))
        if too_long:
            logger.warning(
                "%d of %d prompts are longer than the %d tokens that the members read allow; their "
                "beginnings are left out",
                too_long,
                len(prompts),
                self.max_length,
            )
        return [prompt[-room:] for prompt, room in zip(prompts, rooms, strict=True)]

    def _completions(
        self, requests: Sequence[Request], shown: str, disable_tqdm: bool
    ) -> Iterator[Completion]:
        completions = self.engine.generate(requests, self._batch_size) if requests else ()
        return tqdm(completions, shown, len(requests), disable=disable_tqdm, unit="request")


def _score(completion: Completion, continuation: Sequence[int]) -> tuple[float, bool]:
    rows = completion.prompt_logprobs[-len(continuation) :]
    own = [row[token] for token, row in zip(continuation, rows, strict=True)]
    likeliest = (max(row.values()) for row in rows)
    return sum(own), all(a >= b for a, b in zip(own, likeliest, strict=True))


def _cut_at_stop(text: str, stop: Iterable[str]) -> str:
    # vLLM has cut the text already, unless `min_tokens` did not let it stop yet.
    for string in [stop] if isinstance(stop, str) else stop:
        text = text.partition(string)[0]
    return text
