"""Which kernel of vLLM each CPU kernel replaces, and the replacement itself.

This module uses vLLM's own registry, which is made for platforms that bring their own kernels.
"""

import warnings
from collections.abc import Callable

from vllm.cpu_kernels import (
    acceptance,
    drafts,
    logits,
    logprobs,
    rejection,
    sampling,
    steps,
    token_ids,
)

_REPLACED_KERNELS: dict[str, tuple[Callable[..., None], ...]] = {
    "vllm.v1.sample.ops.topk_topp_triton": (sampling.topk_topp_kernel,),
    "vllm.v1.worker.gpu.block_table": (
        steps.gather_block_tables_kernel,
        steps.compute_slot_mappings_kernel,
    ),
    "vllm.v1.worker.gpu.buffer_utils": (steps.apply_write_kernel,),
    "vllm.v1.worker.gpu.input_batch": (
        steps.prepare_prefill_inputs_kernel,
        steps.prepare_pos_seq_lens_kernel,
        steps.combine_sampled_and_draft_tokens_kernel,
        steps.expand_idx_mapping_kernel,
        steps.get_num_sampled_and_rejected_kernel,
        steps.post_update_kernel,
        steps.post_update_num_computed_tokens_kernel,
    ),
    "vllm.v1.worker.gpu.metrics.logits": (logits.num_nans_kernel,),
    "vllm.v1.worker.gpu.sample.bad_words": (token_ids.bad_words_kernel,),
    "vllm.v1.worker.gpu.sample.gumbel": (
        sampling.temperature_kernel,
        sampling.gumbel_sample_kernel,
    ),
    "vllm.v1.worker.gpu.sample.logit_bias": (logits.bias_kernel,),
    "vllm.v1.worker.gpu.sample.logprob": (
        logprobs.topk_log_softmax_kernel,
        logprobs.ranks_kernel,
        token_ids.fill_logprob_token_ids_kernel,
    ),
    "vllm.v1.worker.gpu.sample.min_p": (sampling.min_p_kernel,),
    "vllm.v1.worker.gpu.sample.penalties": (logits.penalties_kernel, logits.bincount_kernel),
    "vllm.v1.worker.gpu.sample.prompt_logprob": (token_ids.prompt_logprobs_token_ids_kernel,),
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator": (
        drafts.ngram_scan_kernel,
        drafts.ngram_finalize_kernel,
    ),
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler": (
        drafts.gather_draft_sampled_kernel,
        drafts.flatten_sampled_kernel,
    ),
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils": (
        rejection.compute_local_logits_stats_kernel,
        rejection.compute_local_residual_mass_kernel,
        rejection.resample_kernel,
        acceptance.compute_cumulative_log_p_kernel,
        acceptance.rejection_kernel,
        acceptance.insert_resampled_kernel,
    ),
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator": (
        drafts.prepare_prefill_inputs_kernel,
    ),
    "vllm.v1.worker.gpu.structured_outputs": (logits.apply_grammar_bitmask_kernel,),
}

_registered = False


def kernels_by_name() -> dict[str, Callable[..., None]]:
    """The CPU kernels, each under the full name of the kernel that it replaces."""
    return {
        f"{module}._{kernel.__name__}": kernel
        for module, kernels in _REPLACED_KERNELS.items()
        for kernel in kernels
    }


def register_cpu_kernels() -> None:
    """Replace the kernels in this process. Does nothing on a GPU, or when called again.

    Call it after `import vllm`. The engine's own modules may be imported before or after it,
    because the registry also reaches kernels that other modules have imported by name.
    """
    global _registered
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if _registered or not current_platform.is_cpu() or not HAS_TRITON:
        return
    from vllm.triton_utils.dispatcher import register_kernels

    with warnings.catch_warnings():
        # The registry looks at every object of every module, including deprecated ones of torch.
        warnings.simplefilter("ignore", FutureWarning)
        register_kernels(kernels_by_name())
    _registered = True
