"""An ensemble spread over two GPUs by vLLM's tensor parallelism: the same greedy tokens."""

import pytest
import torch
from engines import engine, generate, greedy
from tiny_models import (
    assert_same_tokens,
    greedy_loop,
    llama_config,
    load_reference,
    save_model,
    save_noisy_copy,
)

NUM_TOKENS = 10
PROMPTS = [[1, 2, 3, 4], [9], list(range(40))]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("policy", [{}, dict(chef={"gamma": [1, 3]}, window=3)])
def test_greedy_tokens_on_two_gpus(policy, tmp_path):
    first = save_model(tmp_path / "0", llama_config(num_key_value_heads=2), seed=0)
    if policy:
        second = save_noisy_copy(tmp_path / "1", first, seed=1)
    else:
        config = llama_config(layers=1, num_key_value_heads=2)
        second = save_model(tmp_path / "1", config, seed=1)
    paths = [first, second]
    references = [load_reference(path) for path in paths]
    ensemble = dict(extra_model=paths[1:], ensemble_fn="weighted", weights=[0.7, 0.3])

    def combine(logits: list[torch.Tensor]) -> torch.Tensor:
        return (0.7 * logits[0].softmax(-1) + 0.3 * logits[1].softmax(-1)).log()

    with engine(paths[0], ensemble, tensor_parallel_size=2, **policy) as llm:
        outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = greedy_loop(references, combine, prompt, NUM_TOKENS)
        assert_same_tokens(list(output.token_ids), expected, references, combine, prompt)
