"""An ensemble spread over two GPUs by vLLM's tensor parallelism: the same greedy tokens."""

import pytest
import torch
from engines import engine, generate, greedy
from tiny_models import assert_same_tokens, greedy_loop, llama_config, load_reference, save_model

NUM_TOKENS = 10
PROMPTS = [[1, 2, 3, 4], [9], list(range(40))]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_greedy_tokens_on_two_gpus(tmp_path):
    paths = [
        save_model(tmp_path / str(seed), llama_config(layers=1 + seed, num_key_value_heads=2), seed)
        for seed in range(2)
    ]
    references = [load_reference(path) for path in paths]
    ensemble = dict(extra_model=paths[1:], ensemble_fn="weighted", weights=[0.7, 0.3])

    def combine(logits: list[torch.Tensor]) -> torch.Tensor:
        return (0.7 * logits[0].softmax(-1) + 0.3 * logits[1].softmax(-1)).log()

    with engine(paths[0], ensemble, tensor_parallel_size=2) as llm:
        outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = greedy_loop(references, combine, prompt, NUM_TOKENS)
        assert_same_tokens(list(output.token_ids), expected, references, combine, prompt)
