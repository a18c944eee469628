"""The noise of vLLM's samplers on the CPU: the same bits for a seed, a position and a token.

This module knows the hash, the uniforms and the Gumbel noise of vLLM's `sample/gumbel.py`. It also
knows the argmax by blocks in which the kernels return a draw. It uses NumPy, which has the unsigned
32-bit arithmetic that torch lacks. Triton's interpreter computes with NumPy too, so the draws are
equal.
"""

from functools import lru_cache

import numpy as np

# Keeps a draft's noise apart from the noise of its verification.
DRAFT_NOISE_SALT = 1 << 30
# Mixed into the hash for the upper half of a 64-bit draw.
_UPPER_HALF_DOMAIN = 0x9E3779B9
_NUM_HASHED_BYTES = 16


def _rotate_left(words: np.ndarray, shift: int) -> np.ndarray:
    return (words << shift) | (words >> (32 - shift))


def _scramble(key: np.ndarray) -> np.ndarray:
    """The part of a murmur3 round that depends only on the key."""
    return _rotate_left(key * 0xCC9E2D51, 15) * 0x1B873593


def _absorb(
    state: np.ndarray,  # uint32, broadcastable with scrambled_key
    scrambled_key: np.ndarray,  # uint32
) -> np.ndarray:
    return _rotate_left(state ^ scrambled_key, 13) * 5 + 0xE6546B64


def _finish(state: np.ndarray) -> np.ndarray:
    """The murmur3 finalizer. It works in place, because it runs over the whole vocabulary."""
    state ^= _NUM_HASHED_BYTES
    state ^= state >> 16
    state *= 0x85EBCA6B
    state ^= state >> 13
    state *= 0xC2B2AE35
    state ^= state >> 16
    return state


@lru_cache(maxsize=4)
def _scrambled_tokens(vocab_size: int) -> np.ndarray:  # [vocab_size]
    tokens = _scramble(np.arange(vocab_size, dtype=np.uint32))
    tokens.flags.writeable = False  # shared by every later draw
    return tokens


def hash_tokens(seed: int, pos: int, vocab_size: int, domain: int = 0) -> np.ndarray:  # [vocab]
    """32 random bits per token. `seed` has 64 bits. `pos` has 64 bits too, but only its low half
    counts.
    """
    # One-element arrays, because NumPy warns when a scalar wraps around. Here wrapping is intended.
    state = np.array([domain], dtype=np.uint32)
    for word in (seed, seed >> 32, pos):
        state = _absorb(state, _scramble(np.array([word & 0xFFFFFFFF], dtype=np.uint32)))
    return _finish(_absorb(state, _scrambled_tokens(vocab_size)))


def uniform32(random32: np.ndarray) -> np.ndarray:  # uint32 [vocab] -> float32 [vocab] in (0, 1]
    """(random32 + 0.5) / 2**32, rounded once. Both halves are exact in float32."""
    low = (random32 & 0xFFFF).astype(np.float32)
    low += 0.5
    low *= 2.0**-32
    high = (random32 >> 16).astype(np.float32)
    high *= 2.0**-16
    high += low
    return high


def uniform64(low: np.ndarray, high: np.ndarray) -> np.ndarray:  # float64 [vocab] in (0, 1)
    """53 random bits as float64. The one value that would round to 1 is lowered below 1."""
    random53 = ((high.astype(np.uint64) << 32) | low) >> 11
    uniform = (random53.astype(np.float64) + 0.5) * 2.0**-53
    return np.where(uniform == 1.0, uniform - 2.0**-53, uniform)


def _log1m(value: np.ndarray) -> np.ndarray:  # float32 [vocab]
    """log(1 - value) as the kernel computes it.

    Below 1/4, where the largest noise comes from, it is a series of degree 8.
    """
    series = value * 0.125
    for divisor in range(7, 1, -1):
        series += 1.0 / divisor
        series *= value
    series += 1.0
    series *= -value
    direct = np.log(np.maximum(1.0 - value, np.float32(2.0**-24)))
    return np.where(value < 0.25, series, direct)


def gumbel_noise(
    seed: int, pos: int, vocab_size: int, use_fp64: bool = False
) -> np.ndarray:  # float32, or float64 with use_fp64: [vocab_size]
    """Gumbel noise of one draw. The largest values come from u near 0, where floats are dense."""
    low = hash_tokens(seed, pos, vocab_size)
    if use_fp64:
        high = hash_tokens(seed, pos, vocab_size, domain=_UPPER_HALF_DOMAIN)
        return -np.log(-np.log(uniform64(low, high)))
    noise = _log1m(uniform32(low))
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def in_blocks(
    values: np.ndarray,  # [..., vocab_size]
    block_size: int,
    padding: float = -np.inf,
) -> np.ndarray:  # [..., num_blocks, block_size]
    """The vocabulary in blocks, as the kernels see it. A view of `values` where the blocks fit."""
    *rows, vocab_size = values.shape
    num_blocks = -(-vocab_size // block_size)
    if vocab_size != num_blocks * block_size:
        padded = np.full((*rows, num_blocks * block_size), padding, dtype=values.dtype)
        padded[..., :vocab_size] = values
        values = padded
    return values.reshape(*rows, num_blocks, block_size)


def block_argmax(
    scores: np.ndarray,  # [vocab_size]
    block_size: int,
) -> tuple[np.ndarray, np.ndarray]:  # [num_blocks] token ids, [num_blocks] their scores
    """The best token of each block: the lowest id among equals, and never a NaN."""
    blocks = in_blocks(scores, block_size)
    rows = np.arange(blocks.shape[0])
    best = blocks.argmax(axis=1)
    values = blocks[rows, best]
    if np.isnan(values).any():
        blocks = np.where(np.isnan(blocks), -np.inf, blocks)
        best = blocks.argmax(axis=1)
        values = blocks[rows, best]
    return rows * block_size + best, values
