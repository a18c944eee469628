"""Configurations with wrong values, for the tests of what is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

# Words that a shell, Hydra or YAML may leave in a value.
TEXTS = [
    "",
    " ",
    "x",
    "-1",
    "1e9",
    "auto",
    "null",
    "a,b",
    "[1",
    "{",
    "a=b",
    "../..",
    "/",
    "\n",
    "ü",
]
NUMBERS = [-1, 0, 1, 2, 3, 7, 5000, 2**31, 2**63, 2**70, -0.5, 0.5, 1.5, 1e300]
SPECIAL = [None, True, False, float("nan"), float("inf"), [], {}]
# Keys that vLLM has and the configurations do not list.
OF_VLLM = [
    *("method.llm.dtype", "method.llm.max_model_len", "method.llm.max_num_seqs"),
    *("method.llm.max_num_batched_tokens", "method.llm.max_num_scheduled_tokens"),
    *("method.llm.block_size", "method.llm.kv_cache_memory_bytes", "method.llm.kv_cache_dtype"),
    *("method.llm.tensor_parallel_size", "method.llm.quantization", "method.llm.load_format"),
    *("method.llm.enable_prefix_caching", "method.llm.gpu_memory_utilization"),
    *("method.llm.speculative_config", "method.llm.additional_config", "method.llm.worker_cls"),
    *("method.llm.hf_overrides", "method.llm.compilation_config", "method.llm.max_logprobs"),
    *("method.generate.top_k", "method.generate.min_p", "method.generate.seed"),
    *("method.generate.repetition_penalty", "method.generate.logprobs", "method.generate.n"),
    *("method.generate.bad_words", "method.generate.stop_token_ids", "method.generate.logit_bias"),
    *("method.generate.extra_args", "method.generate.structured_outputs"),
]
FLAGS = [
    *("--max-num-seqs", "--port", "--dtype", "--max-model-len", "--enforce-eager", "--seed"),
    *("--kv-cache-memory-bytes", "--additional-config", "--speculative-config", "--worker-cls"),
    *("--tool-call-parser", "--enable-auto-tool-choice", "--no-such-flag", "--chat-template"),
    *("--override-generation-config", "--compilation-config", "--enable-lora", "--model"),
    *("--gpu-memory-utilization", "--served-model-name", "--reasoning-parser", "--uds", "-cc.x=1"),
]
UNKNOWN = ["no_such_key", "method.no_such_key", "method.llm.no_such_key", "dataset.no_such_key"]

scalars = st.sampled_from(TEXTS) | st.sampled_from(NUMBERS) | st.sampled_from(SPECIAL)
lists = st.lists(scalars, max_size=3)
values = (
    scalars | lists | st.dictionaries(st.sampled_from(["model", "a", "1"]), scalars, max_size=2)
)


def leaves(plain: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration, of its groups too."""
    for key, value in plain.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
