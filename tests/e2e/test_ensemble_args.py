"""The Python API: `LLM(**ensemble_args(...))`, and the same for vLLM's asynchronous engine."""

import asyncio
from collections.abc import Iterator

import pytest
from engines import engine, generate, greedy, sampled
from tiny_models import VOCAB_SIZE, llama_config, save_model, save_noisy_copy
from vllm import LLM
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from vllm.chef import ensemble_args

NUM_TOKENS = 24
FUNCTION = dict(ensemble_fn="contrastive", ensemble_target="raw-logits", alpha=0.3)
SETTINGS = dict(
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    kv_cache_memory_bytes=32 << 20,
    gpu_memory_utilization=0.05,
    max_num_seqs=8,
)
PROMPTS = [[5, 6, 7, 8], [3], [(7 * i) % VOCAB_SIZE for i in range(50)]]
PARAMS = [
    greedy(NUM_TOKENS),
    # vLLM drops min_p at temperature 0. At 1 it leaves the likeliest token only.
    sampled(NUM_TOKENS, temperature=1.0, min_p=1.0, seed=0),
    greedy(NUM_TOKENS, logit_bias={7: 4.0, 11: -100.0}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(), seed=0)
    return [first, save_noisy_copy(root / "1", first, 1, 0.02)]


@pytest.fixture(scope="module")
def expected(models: list[str]) -> list[list[int]]:
    """The plain ensemble's tokens."""
    with engine(models[0], dict(extra_model=models[1:], **FUNCTION)) as llm:
        return [list(out.token_ids) for out in generate(llm, PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def arguments(models: list[str]) -> dict:
    found = ensemble_args(
        models[0],
        extra_model=models[1],
        ensemble_fn="contrastive",
        alpha=0.3,
        gamma=5,
        **SETTINGS,
    )
    assert found["speculative_config"]["num_speculative_tokens"] == 5
    return found


@pytest.fixture
def llm(arguments: dict) -> Iterator[LLM]:
    llm = LLM(**arguments)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def test_llm_by_turns_emits_what_the_plain_ensemble_emits(llm, expected):
    assert [list(out.token_ids) for out in generate(llm, PROMPTS, PARAMS)] == expected
    stats = llm.collective_rpc("turn_stats")[0]
    assert sum(map(sum, stats["num_accepted"])) > 0


@pytest.mark.slow  # its engine is a process of its own, which imports vLLM again
def test_the_asynchronous_engine_takes_the_same(arguments, expected):
    async def tokens(llm: AsyncLLM, at: int) -> list[int]:
        prompt = {"prompt_token_ids": PROMPTS[at]}
        async for output in llm.generate(prompt, PARAMS[at], request_id=str(at)):
            last = output
        return list(last.outputs[0].token_ids)

    async def run() -> list[list[int]]:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        try:
            return list(await asyncio.gather(*(tokens(llm, at) for at in range(len(PROMPTS)))))
        finally:
            llm.shutdown()

    assert asyncio.run(run()) == expected
