"""What a request may change of its ensemble: `SamplingParams.extra_args`, on the device by slot.

A request overrides a parameter of the ensemble's function with the key `ensemble_` and the
parameter's name. This works for functions that are sums, because such an override only gives the
request other coefficients. This module knows no batch and no model.
"""

from collections.abc import Mapping
from dataclasses import replace
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d

from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.functions import REQUEST_KEYS, EnsembleFunction

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = init_logger(__name__)

PREFIX = "ensemble_"
# Coefficients other than 0 lie in this range, so that no score leaves float32.
SMALLEST, LARGEST = 1e-30, 1e30


class RowCoefficients(NamedTuple):
    """The coefficients of each row of scores. Nothing is copied: kernels look them up by slot."""

    table: torch.Tensor  # [max_num_reqs, num_members] float32
    slots: torch.Tensor  # [num_rows / rows_per_slot]; a row with slot -1 is never read
    rows_per_slot: int

    def by_row(self) -> torch.Tensor:  # [num_rows, num_members]
        return self.table[self.slots.clamp(min=0)].repeat_interleave(self.rows_per_slot, dim=0)


class SlotCoefficients:
    """The coefficients of all requests, in memory that does not move.

    A request that overrides nothing costs nothing: its slot is written only if the request before
    it left other coefficients there.
    """

    def __init__(self, function: EnsembleFunction, max_num_reqs: int, device: torch.device) -> None:
        self.function, self.device = function, device
        self.is_used = bool(function.request_keys)
        default = function.coefficients if self.is_used else (0.0,) * function.num_members
        self._default = np.array(default, dtype=np.float32)
        self._rows_np = np.tile(self._default, (max_num_reqs, 1))
        self.table = torch.from_numpy(self._rows_np.copy()).to(device)
        """[max_num_reqs, num_members] float32"""
        self._changed: set[int] = set()

    def add_request(self, slot: int, params: "SamplingParams | None") -> None:
        row = self._default
        try:
            asked = requested_coefficients(self.function, params and params.extra_args)
            if asked is not None:
                row = np.array(asked, dtype=np.float32)
        except ConfigFieldError as error:
            # The front end has refused such a request, unless it runs without our plugin. No
            # request may end the engine.
            logger.error("A request gets the coefficients of the configuration. %s", error)
        if (self._rows_np[slot] != row).any():
            self._rows_np[slot] = row
            self._changed.add(slot)

    def apply_staged_writes(self) -> None:
        """Write the slots that have changed, before the step that reads them."""
        if not self._changed:
            return
        slots = sorted(self._changed)
        self._changed.clear()
        at = async_tensor_h2d(slots, self.device, torch.int64)
        rows = async_tensor_h2d(self._rows_np[slots], self.device, torch.float32)
        self.table.index_copy_(0, at, rows)

    def of(
        self,
        slots: torch.Tensor,  # [num_reqs or num_rows]
        rows_per_slot: int = 1,
    ) -> RowCoefficients | None:
        """Of rows of scores. None if no request can override anything."""
        return RowCoefficients(self.table, slots, rows_per_slot) if self.is_used else None


def overrides(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a request's `extra_args` that is ours."""
    items = (extra_args or {}).items()
    return {key: value for key, value in items if isinstance(key, str) and key.startswith(PREFIX)}


def requested_coefficients(
    function: EnsembleFunction, extra_args: Mapping[str, Any] | None
) -> tuple[float, ...] | None:  # [num_members]
    """The coefficients that a request asks for. None if it overrides nothing.

    Args:
        function: the configuration's.
        extra_args: the request's. Keys that do not begin with `ensemble_` are not ours.

    Raises:
        ConfigFieldError: one line that names the key, for a request that must be refused.
    """
    asked = overrides(extra_args)
    if not asked:
        return None
    for key, value in asked.items():
        _check_key(function, key)
        _check_numbers(key, value)
    parameters = {key.removeprefix(PREFIX): value for key, value in asked.items()}
    try:
        own = replace(function, **parameters)
    except ConfigFieldError as error:
        # The request's words: `ensemble_weights` for `ensemble.weights`.
        raise error.renamed(lambda field: PREFIX + field.rpartition(".")[2]) from None
    key = next(iter(asked))
    for member, (was_counted, is_counted) in enumerate(
        zip(function.counted, own.counted, strict=True)
    ):
        if is_counted and not was_counted:
            raise ConfigFieldError(
                key,
                f"member {member} (counted from 0) has weight 0 in the engine's configuration, so "
                "decisions do not wait for it; a request must leave its weight at 0",
            )
    if any(c != 0 and not SMALLEST <= abs(c) <= LARGEST for c in own.coefficients):
        raise ConfigFieldError(
            key, f"out of range; use 0, or numbers between {SMALLEST} and {LARGEST}"
        )
    return own.coefficients


def _check_key(function: EnsembleFunction, key: str) -> None:
    parameter = key.removeprefix(PREFIX)
    if parameter not in REQUEST_KEYS:
        known = ", ".join(PREFIX + name for name in REQUEST_KEYS)
        raise ConfigFieldError(key, f"no such parameter of a request; there are {known}")
    if parameter not in function.request_keys:
        takes = ", ".join(PREFIX + name for name in function.request_keys) or "no such parameter"
        raise ConfigFieldError(
            key,
            f"the engine's ensemble function ({function.name}) does not take it; "
            f"a request may set {takes}",
        )


def _check_numbers(key: str, value: Any) -> None:
    """Stricter than the configuration: no numbers in strings, and none that float cannot hold."""
    values = value if isinstance(value, list | tuple) else [value]
    for number in values:
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise ConfigFieldError(key, f"{shortened(number)} is not a number")
        if isinstance(number, int) and abs(number) > LARGEST:
            raise ConfigFieldError(key, f"out of range; numbers must be at most {LARGEST}")
