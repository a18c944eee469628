"""What a step does per request apart from logits: inputs, block tables and bookkeeping.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs. The grid is not among the arguments,
so `idx_mapping` gives the number of requests. The functions use NumPy for all requests at once.
Triton's interpreter takes one to two milliseconds for each request.
"""

from types import SimpleNamespace

import numpy as np
import torch

from vllm.cpu_kernels.rows import takes_launch_options


def segments(
    cumulative: torch.Tensor,  # [>= num_reqs + 1]
    num_reqs: int,
) -> tuple[np.ndarray, np.ndarray]:  # [num_reqs], [num_reqs]
    """Where each request's part of a ragged tensor starts, and its length."""
    bounds = cumulative[: num_reqs + 1].numpy()
    return bounds[:-1], bounds[1:] - bounds[:-1]


def unroll(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [sum(lengths)] each
    """By element of a ragged tensor: its request, and its place in that request's part."""
    ends = lengths.cumsum()
    owner = np.repeat(np.arange(lengths.size), lengths)
    return owner, np.arange(owner.size) - (ends - lengths)[owner]


def int32_at(address: int, *shape: int) -> np.ndarray:
    """The int32 array at an address. Kernels get several tensors as one tensor of pointers."""
    interface = {"data": (int(address), False), "shape": shape, "typestr": "<i4", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


# ----------------------------------------------------------------------------- before the forward


def apply_write_kernel(
    output: torch.Tensor,  # [num_rows, ...]; with MULTI_GROUP int32 pointers [num_groups]
    output_stride: int | torch.Tensor,  # with MULTI_GROUP [num_groups]
    write_indices: torch.Tensor,  # [num_writes], the row
    write_starts: torch.Tensor,  # [num_writes], the place in the row
    write_contents: torch.Tensor,  # [>= write_cu_lens[-1]]
    write_cu_lens: torch.Tensor,  # [num_writes], the ends, not the starts
    write_group_ids: torch.Tensor | None,  # [num_writes], with MULTI_GROUP
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Apply the staged writes in order. Of two writes to the same place, the later one stays."""
    ends = write_cu_lens.numpy()
    write, offset = unroll(np.diff(ends, prepend=0))
    contents = write_contents[: write.size].numpy()
    rows, starts = write_indices.numpy().astype(np.int64), write_starts.numpy()
    if not MULTI_GROUP:
        output.view(-1).numpy()[(rows * output_stride + starts)[write] + offset] = contents
        return
    groups, strides = write_group_ids.numpy(), output_stride.numpy()
    place = (rows * strides[groups] + starts)[write] + offset
    for group in np.unique(groups):
        chosen = groups[write] == group
        row_of_group = int32_at(output[group], place[chosen].max(initial=-1) + 1)
        row_of_group[place[chosen]] = contents[chosen]


def gather_block_tables_kernel(
    idx_mapping: torch.Tensor,  # [num_reqs]
    src_block_table_ptrs: torch.Tensor,  # [num_groups], to int32 [max_num_reqs, max_num_blocks]
    dst_block_table_ptrs: torch.Tensor,  # [num_groups], to int32 [max_num_reqs, max_num_blocks]
    block_table_strides: torch.Tensor,  # [num_groups], max_num_blocks of each
    num_blocks: torch.Tensor,  # [num_groups, max_num_reqs]
    _num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the requests' rows, and write zeros to all rows behind them.

    Only the grid would tell how many of those rows are padding.
    """
    num_groups, max_num_reqs = num_blocks.shape
    reqs = idx_mapping[:num_reqs].numpy()
    for group in range(num_groups):
        shape = (max_num_reqs, block_table_strides[group])
        source = int32_at(src_block_table_ptrs[group], *shape)
        destination = int32_at(dst_block_table_ptrs[group], *shape)
        lengths = num_blocks[group].numpy()[reqs]
        width = lengths.max(initial=0)
        filled = np.arange(width) < lengths[:, None]
        np.copyto(destination[:num_reqs, :width], source[reqs, :width], where=filled)
        destination[num_reqs:] = 0


def compute_slot_mappings_kernel(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,  # [num_reqs], -1 on padding rows
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    pos: torch.Tensor,  # [num_tokens]
    block_table_ptrs: torch.Tensor,  # [num_groups], to int32 [max_num_reqs, max_num_blocks]
    block_table_strides: torch.Tensor,  # [num_groups], max_num_blocks of each
    block_sizes: torch.Tensor,  # [num_groups]
    slot_mapping_enabled: torch.Tensor,  # [num_groups]
    dcp_sharded: torch.Tensor,  # [num_groups], read where CP_SIZE > 1
    slot_mappings: torch.Tensor,  # int64 [num_groups, max_num_tokens]
    _slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """The KV cache slot of each token. PAD_ID for tokens without a slot, and behind the
    last token.
    """
    starts, lengths = segments(query_start_loc, idx_mapping.shape[0])
    request, offset = unroll(lengths)
    tokens, req = starts[request] + offset, idx_mapping.numpy()[request]
    positions = pos.numpy()[tokens].astype(np.int64)
    end = int(query_start_loc[idx_mapping.shape[0]])
    for group, slots in enumerate(slot_mappings.numpy()):
        slots[end:max_num_tokens] = PAD_ID
        if not slot_mapping_enabled[group]:
            slots[tokens] = PAD_ID
            continue
        block_size, local, stored = int(block_sizes[group]), positions, req >= 0
        if CP_SIZE > 1 and dcp_sharded[group]:
            # The ranks take turns with CP_INTERLEAVE tokens each of a virtual block.
            virtual_block, within = np.divmod(positions, block_size * CP_SIZE)
            turn, remainder = np.divmod(within, CP_INTERLEAVE)
            rounds, rank = np.divmod(turn, CP_SIZE)
            local = virtual_block * block_size + rounds * CP_INTERLEAVE + remainder
            stored = stored & (rank == cp_rank)
        shape = (req.max(initial=-1) + 1, block_table_strides[group])
        block, within = np.divmod(local[stored], block_size)
        block_number = int32_at(block_table_ptrs[group], *shape)[req[stored], block]
        slots[tokens] = PAD_ID
        slots[tokens[stored]] = block_number.astype(np.int64) * block_size + within


def prepare_prefill_inputs_kernel(
    input_ids: torch.Tensor,  # [max_num_tokens]
    next_prefill_tokens: torch.Tensor,  # [num_lookahead, max_num_reqs]
    _next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping: torch.Tensor,  # [num_reqs]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    _all_token_ids_stride: int,
    prefill_lens: torch.Tensor,  # [max_num_reqs]
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """For prefilling requests: the prompt tokens of this step, and the ones that follow them."""
    starts, lengths = segments(query_start_loc, idx_mapping.shape[0])
    req = idx_mapping.numpy()
    prefilling = num_computed_tokens.numpy()[req] < prefill_lens.numpy()[req]
    starts, lengths, req = starts[prefilling], lengths[prefilling], req[prefilling]
    first, all_tokens = num_computed_tokens.numpy()[req], all_token_ids.numpy()

    request, offset = unroll(lengths)
    tokens = all_tokens[req[request], first[request] + offset]
    input_ids.numpy()[starts[request] + offset] = tokens
    ahead = first + lengths + np.arange(num_lookahead)[:, None]
    in_prefill = ahead < prefill_lens.numpy()[req]
    tokens = all_tokens[req, np.where(in_prefill, ahead, 0)]
    next_prefill_tokens.numpy()[:num_lookahead, req] = np.where(in_prefill, tokens, 0)


def prepare_pos_seq_lens_kernel(
    pos: torch.Tensor,  # [max_num_tokens]
    seq_lens: torch.Tensor,  # [max_num_reqs]
    idx_mapping: torch.Tensor,  # [num_reqs]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    num_reqs = idx_mapping.shape[0]
    starts, lengths = segments(query_start_loc, num_reqs)
    first = num_computed_tokens.numpy()[idx_mapping.numpy()]
    seq_lens.numpy()[:num_reqs] = first + lengths
    seq_lens.numpy()[num_reqs:max_num_reqs] = 0
    request, offset = unroll(lengths)
    pos.numpy()[starts[request] + offset] = first[request] + offset


def combine_sampled_and_draft_tokens_kernel(
    input_ids: torch.Tensor,  # [max_num_tokens]
    idx_mapping: torch.Tensor,  # [num_reqs]
    last_sampled_tokens: torch.Tensor,  # [max_num_reqs, 1]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    seq_lens: torch.Tensor,  # [num_reqs]
    prefill_len: torch.Tensor,  # [max_num_reqs]
    draft_tokens: torch.Tensor,  # [max_num_reqs, num_speculative_steps]
    _draft_tokens_stride: int,
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    logits_indices: torch.Tensor,  # [num_logits]
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Which tokens need logits, and the inputs of decodes: last sampled token, then drafts."""
    num_reqs = idx_mapping.shape[0]
    logits_starts, num_logits = segments(cu_num_logits, num_reqs)
    query_ends = query_start_loc[1 : num_reqs + 1].numpy()
    request, offset = unroll(num_logits)
    first = query_ends - num_logits
    logits_indices.numpy()[logits_starts[request] + offset] = first[request] + offset

    req, lengths = idx_mapping.numpy(), seq_lens[:num_reqs].numpy()
    prefill = prefill_len.numpy()[req]
    tokens = input_ids.numpy()
    if NUM_NEW_SAMPLED_TOKENS > 0:
        # A prompt's last tokens can be among the tokens with logits. They stay.
        generated = lengths - num_logits >= prefill
        tokens[first[generated]] = last_sampled_tokens.view(-1).numpy()[req[generated]]
    num_drafts = np.maximum(num_logits - NUM_NEW_SAMPLED_TOKENS, 0) * (lengths > prefill)
    request, offset = unroll(num_drafts)
    drafts = draft_tokens.numpy()[req[request], offset]
    tokens[(query_ends - num_drafts)[request] + offset] = drafts


def expand_idx_mapping_kernel(
    idx_mapping: torch.Tensor,  # [num_reqs]
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    expanded_local_pos: torch.Tensor,  # [num_logits]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    BLOCK_SIZE: int,
) -> None:
    starts, lengths = segments(cu_num_logits, idx_mapping.shape[0])
    request, offset = unroll(lengths)
    expanded_idx_mapping.numpy()[starts[request] + offset] = idx_mapping.numpy()[request]
    expanded_local_pos.numpy()[starts[request] + offset] = offset


# ------------------------------------------------------------------------------ after the forward


def get_num_sampled_and_rejected_kernel(
    num_sampled: torch.Tensor,  # [num_reqs]
    num_rejected: torch.Tensor,  # [num_reqs]
    seq_lens: torch.Tensor,  # [num_reqs]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    idx_mapping: torch.Tensor,  # [num_reqs]
    prefill_len: torch.Tensor,  # [max_num_reqs]
) -> None:
    """A request in the middle of its prompt has sampled nothing and rejected nothing."""
    num_reqs = idx_mapping.shape[0]
    _, num_logits = segments(cu_num_logits, num_reqs)
    sampling = seq_lens[:num_reqs].numpy() >= prefill_len.numpy()[idx_mapping.numpy()]
    sampled = num_sampled[:num_reqs].numpy()
    sampled *= sampling
    num_rejected.numpy()[:num_reqs] = (num_logits - sampled) * sampling


@takes_launch_options
def post_update_kernel(
    idx_mapping: torch.Tensor,  # [num_reqs], negative on rows to skip
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
    last_sampled_tokens: torch.Tensor,  # [max_num_reqs, 1]
    output_bin_counts: torch.Tensor | None,  # [max_num_reqs, vocab_size]
    _output_bin_counts_stride: int,
    sampled_tokens: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    _sampled_tokens_stride: int,
    num_sampled: torch.Tensor,  # [num_reqs]
    num_rejected: torch.Tensor,  # [num_reqs]
    query_start_loc: torch.Tensor | None,  # [num_reqs + 1], None where no query was computed
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    _all_token_ids_stride: int,
    total_len: torch.Tensor,  # [max_num_reqs]
    **_launch_options: object,
) -> None:
    """Append the sampled tokens, and count all tokens that were not rejected as computed."""
    rows = np.flatnonzero(idx_mapping.numpy() >= 0)
    req, counts = idx_mapping.numpy()[rows], num_sampled.numpy()[rows]
    total, sampled = total_len.numpy(), sampled_tokens.numpy()

    row, offset = unroll(counts)
    tokens = sampled[rows[row], offset]
    all_token_ids.numpy()[req[row], total[req[row]] + offset] = tokens
    if output_bin_counts is not None:
        np.add.at(output_bin_counts.numpy(), (req[row], tokens), 1)
    some = counts > 0
    last_sampled_tokens.view(-1).numpy()[req[some]] = sampled[rows[some], counts[some] - 1]
    total[req] += counts

    num_computed = num_computed_tokens.numpy()
    num_computed[req] -= num_rejected.numpy()[rows]
    if query_start_loc is not None:
        num_computed[req] += segments(query_start_loc, idx_mapping.shape[0])[1][rows]


def post_update_num_computed_tokens_kernel(
    idx_mapping: torch.Tensor,  # [num_reqs]
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
) -> None:
    _, lengths = segments(query_start_loc, idx_mapping.shape[0])
    num_computed_tokens.numpy()[idx_mapping.numpy()] += lengths
