"""The functions that combine the members' score vectors into one.

A function sees scores only: `[num_members, num_rows, vocab_size]`, in the user's order of members,
float32. The `ensemble_target` decides whether they are logits or probabilities, and what was
applied to them before (`ops/eager.py`).
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch

from vllm.ensemble_decode.errors import ConfigFieldError

NEG_INF = float("-inf")
# Parameters that are fields of `EnsembleConfig`. All others are given in `ensemble_args`.
FIELD_PARAMETERS = ("alpha", "weights")


@dataclass(frozen=True)
class EnsembleFunction:
    """A function of the members' scores. Subclasses declare their parameters as fields.

    Raises:
        ConfigFieldError: on construction, for parameters out of range. It names the field.
    """

    num_members: int

    # If True and the target is `probs`, the function gets `x_i = log p_i` as logits.
    log_space: ClassVar[bool] = False
    # Parameters that a request may override. Only for functions with `coefficients`.
    request_keys: ClassVar[tuple[str, ...]] = ()
    # Whether coefficients may be negative.
    subtracts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_members < 2:
            raise ConfigFieldError(
                "ensemble.extra_model", "an ensemble needs at least two members; name another model"
            )

    @property
    def name(self) -> str:
        """As `ensemble_fn` has it."""
        return next(name for name, cls in ENSEMBLE_FUNCTIONS.items() if cls is type(self))

    @property
    def counted(self) -> tuple[bool, ...]:
        """By member, whether its scores have any influence."""
        return (True,) * self.num_members

    @property
    def coefficients(self) -> tuple[float, ...] | None:
        """By member, `c_i` of a function that is `sum_i c_i x_i`. None for any other function.

        With logits, a token that is removed from a subtracted member gets the member's lowest
        logit.
        """
        return None

    def __call__(
        self,
        scores: torch.Tensor,  # [num_members, num_rows, vocab_size]
        are_probs: bool,  # scores are probabilities; otherwise logits, -inf where removed
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        raise NotImplementedError


def sum_by_row(
    scores: torch.Tensor,  # [num_members, num_rows, vocab_size]
    coefficients: torch.Tensor,  # [num_rows, num_members]
    floors: bool,
) -> torch.Tensor:  # [num_rows, vocab_size]
    """`sum_i c_i x_i` with coefficients of each row's own.

    Args:
        floors: give a token that is removed from a subtracted member the member's lowest logit.
    """
    total = torch.zeros_like(scores[0])
    for x, coefficient in zip(scores, coefficients.unsqueeze(-1).unbind(1), strict=True):
        if floors:
            x = torch.where(coefficient < 0, _floor_removed(x), x)
        # Leave out members of weight 0, because 0 * -inf is not a number.
        total += torch.where(coefficient != 0, coefficient * x, 0.0)
    return total


def _weighted_sum(
    scores: Sequence[torch.Tensor],  # num_members x [num_rows, vocab_size]
    weights: Sequence[float],
) -> torch.Tensor:  # [num_rows, vocab_size]
    # Add member by member, in the user's order: the order of a float sum is part of the result.
    # Leave out members of weight 0, because 0 * -inf is not a number.
    total = torch.zeros_like(scores[0])
    for weight, member_scores in zip(weights, scores, strict=True):
        if weight != 0:
            total.add_(member_scores, alpha=weight)
    return total


@dataclass(frozen=True)
class Weighted(EnsembleFunction):
    """`sum_i w_i x_i`. The weights are used as given (default: 1 / num_members)."""

    weights: Sequence[float] | None = None
    request_keys: ClassVar[tuple[str, ...]] = ("weights",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None:
            weights = (self._default_weight(),) * self.num_members
        else:
            weights = _check_weights(self.weights, self.num_members)
        object.__setattr__(self, "weights", weights)

    def _default_weight(self) -> float:
        return 1.0 / self.num_members

    @property
    def counted(self) -> tuple[bool, ...]:
        return tuple(weight != 0 for weight in self.weights)

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.weights

    def __call__(self, scores: torch.Tensor, are_probs: bool) -> torch.Tensor:
        return _weighted_sum(scores, self.weights)


@dataclass(frozen=True)
class Mean(EnsembleFunction):
    """`sum_i x_i / num_members`. With logits, a geometric mean of the members' distributions."""

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (1.0 / self.num_members,) * self.num_members

    def __call__(self, scores: torch.Tensor, are_probs: bool) -> torch.Tensor:
        return _weighted_sum(scores, self.coefficients)


@dataclass(frozen=True)
class Product(Weighted):
    """Product of experts, `prod_i p_i ** w_i` (default: every `w_i` is 1).

    Hinton 2002, "Training Products of Experts by Minimizing Contrastive Divergence". It is computed
    as a sum of logarithms, because the probabilities would vanish in float32 at low temperatures.
    """

    log_space: ClassVar[bool] = True

    def _default_weight(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Contrastive(EnsembleFunction):
    """Contrastive decoding, `x_expert - alpha * x_amateur`. The first member is the expert.

    Li et al. 2023 (arXiv 2210.15097) and O'Brien and Lewis 2023 (arXiv 2309.09117), without their
    plausibility mask. With more than two members, the amateur is the mean of the others.
    """

    alpha: float = 0.1
    request_keys: ClassVar[tuple[str, ...]] = ("alpha",)
    subtracts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("ensemble.alpha", self.alpha, low_open=False)

    @property
    def coefficients(self) -> tuple[float, ...] | None:
        num_amateurs = self.num_members - 1
        return (1.0, *(-self.alpha / num_amateurs,) * num_amateurs)

    def __call__(self, scores: torch.Tensor, are_probs: bool) -> torch.Tensor:
        expert, amateurs = scores[0], scores[1:]
        if self.alpha == 0:
            return expert.clone()
        if not are_probs:
            amateurs = _floor_removed(amateurs)
        return expert.sub(amateurs.mean(dim=0), alpha=self.alpha)


@dataclass(frozen=True)
class ContrastivePlausible(Contrastive):
    """Contrastive decoding among plausible tokens: `p_expert >= plausibility * max p_expert`.

    The adaptive plausibility constraint of Li et al. 2023 (arXiv 2210.15097, section 3.2). All
    other tokens get no probability.
    """

    plausibility: float = 0.1
    request_keys: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("ensemble.ensemble_args.plausibility", self.plausibility, low_open=True)

    @property
    def coefficients(self) -> None:
        return None

    def __call__(self, scores: torch.Tensor, are_probs: bool) -> torch.Tensor:
        contrast = super().__call__(scores, are_probs)
        expert = scores[0]
        best = expert.amax(dim=-1, keepdim=True)
        # p >= c * max p  <=>  logit >= max logit + log c
        bar = best * self.plausibility if are_probs else best + math.log(self.plausibility)
        return contrast.masked_fill(expert < bar, 0.0 if are_probs else NEG_INF)


@dataclass(frozen=True)
class ProxyTuning(EnsembleFunction):
    """Proxy tuning, `l_0 + scale * (l_1 - l_2)`, on logits or log-probabilities.

    Liu et al. 2024 (arXiv 2401.08565). The first member is the large model. The others are a small
    model that was tuned, and the same small model before.
    """

    log_space: ClassVar[bool] = True
    request_keys: ClassVar[tuple[str, ...]] = ("scale",)
    subtracts: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_members != 3:
            raise ConfigFieldError(
                "ensemble.extra_model",
                f"proxy_tuning takes three members, not {self.num_members}: "
                "the large model, the tuned small one, and the small one before tuning",
            )
        field, scale = "ensemble.ensemble_args.scale", self.scale
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            raise ConfigFieldError(field, f"{scale!r} is not a number; give one that is 0 or more")
        if not math.isfinite(scale) or scale < 0:
            raise ConfigFieldError(
                field, f"{scale} is out of range; it must be finite and 0 or more"
            )

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (1.0, float(self.scale), -float(self.scale))

    def __call__(self, scores: torch.Tensor, are_probs: bool) -> torch.Tensor:
        *added, subtracted = scores
        if not are_probs:
            subtracted = _floor_removed(subtracted)
        return _weighted_sum([*added, subtracted], self.coefficients)


@dataclass(frozen=True)
class Custom(EnsembleFunction):
    """The user's own `function(scores, **args) -> [num_rows, vocab_size]`.

    If it is marked with `row_coefficients`, it returns `[num_rows, num_members]` instead. These are
    the coefficients of a sum, for each row.
    """

    function: partial[torch.Tensor] = None  # type: ignore[assignment]

    @property
    def name(self) -> str:
        return "one of your own"

    @property
    def is_capturable(self) -> bool | None:
        """What the function declares with `capturable`. None: nothing."""
        return getattr(self.function.func, _CAPTURABLE, None)

    @property
    def gives_coefficients(self) -> bool:
        return getattr(self.function.func, _COEFFICIENTS, False)

    def __call__(self, scores: torch.Tensor, are_probs: bool) -> torch.Tensor:
        result = self.function(scores)
        if not self.gives_coefficients:
            return result
        if result.shape != (scores.shape[1], scores.shape[0]):
            raise ValueError(
                f"row coefficients of shape {list(result.shape)}; "
                f"it must be {[scores.shape[1], scores.shape[0]]}, one per row and member"
            )
        return sum_by_row(scores, result, floors=not are_probs)


# Attributes of a function of the user's own. `capturable` and `row_coefficients` set them.
_CAPTURABLE, _COEFFICIENTS = "_ensemble_is_capturable", "_ensemble_gives_coefficients"
Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


def capturable(function: Function | None = None, *, is_so: bool = True) -> Any:
    """Declare that CUDA graphs may hold a function of your own, or may not (`is_so=False`).

    Without this declaration, the engine captures the function once and compares the graph with
    calls. With it, nothing is compared. A graph repeats the kernels of one call and repeats no
    Python, so the function must not read values on the host.
    """

    def mark(marked: Function) -> Function:
        setattr(marked, _CAPTURABLE, is_so)
        return marked

    return mark if function is None else mark(function)


def row_coefficients(function: Function) -> Function:
    """Declare that a function of your own returns coefficients, `[num_rows, num_members]`.

    The ensemble is then `sum_i c_i x_i`, with coefficients of each row's own. With logits, a token
    that is removed from a subtracted member gets the member's lowest logit.
    """
    setattr(function, _COEFFICIENTS, True)
    return function


ENSEMBLE_FUNCTIONS: dict[str, type[EnsembleFunction]] = {
    "weighted": Weighted,
    "mean": Mean,
    "product": Product,
    "contrastive": Contrastive,
    "contrastive_plausible": ContrastivePlausible,
    "proxy_tuning": ProxyTuning,
}
# All parameters that requests may override, with some function.
REQUEST_KEYS = tuple(
    dict.fromkeys(key for cls in ENSEMBLE_FUNCTIONS.values() for key in cls.request_keys)
)


def make_function(name: str, num_members: int, args: Mapping[str, Any]) -> EnsembleFunction:
    """The function of a registry name, or of a dotted path `package.module:function`.

    Raises:
        ConfigFieldError: one line that names the field. The cause is an unknown name, a path
            that does not import, or parameters that the function does not have or cannot take.
    """
    if not isinstance(name, str):
        raise ConfigFieldError(
            "ensemble.ensemble_fn",
            f"{name!r} is not a name; choose one of "
            f"{', '.join(ENSEMBLE_FUNCTIONS)}, or write 'package.module:function'",
        )
    if ":" in name:
        return Custom(num_members, partial(_import_function(name), **args))
    if name not in ENSEMBLE_FUNCTIONS:
        raise ConfigFieldError(
            "ensemble.ensemble_fn",
            f"unknown function '{name}'; choose one of "
            f"{', '.join(ENSEMBLE_FUNCTIONS)}, or write 'package.module:function'",
        )
    cls = ENSEMBLE_FUNCTIONS[name]
    known = {f.name for f in fields(cls)} - {"num_members"}
    for key in args:
        if key not in known:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes no parameters"
            where = key if key in FIELD_PARAMETERS else f"ensemble_args.{key}"
            raise ConfigFieldError(
                f"ensemble.{where}",
                f"the ensemble function '{name}' has no parameter '{key}' "
                f"({takes}); remove it or choose another ensemble.ensemble_fn",
            )
    return cls(num_members, **args)


def _import_function(path: str) -> Callable[..., torch.Tensor]:
    module_name, _, attribute = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's module may raise anything
        raise ConfigFieldError(
            "ensemble.ensemble_fn",
            f"'{path}' does not import ({type(error).__name__}: {error}); "
            "write 'package.module:function' of a module on PYTHONPATH",
        ) from error
    if not callable(function):
        raise ConfigFieldError("ensemble.ensemble_fn", f"'{path}' is not callable")
    return function


def _floor_removed(
    logits: torch.Tensor,  # [..., vocab_size]
) -> torch.Tensor:
    """Give tokens that are removed from a subtracted member the member's lowest logit.

    Top-k, top-p or min-p has removed them. `x - alpha * -inf` would give all probability to tokens
    that the amateur holds impossible.
    """
    removed = logits == NEG_INF
    lowest = logits.masked_fill(removed, float("inf")).amin(dim=-1, keepdim=True)
    return torch.where(removed, lowest, logits)


def _check_weights(weights: Sequence[float], num_members: int) -> tuple[float, ...]:
    try:
        values = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise ConfigFieldError(
            "ensemble.weights", f"{weights!r} is not a list of numbers; give one per member"
        ) from None
    if len(values) != num_members:
        raise ConfigFieldError(
            "ensemble.weights",
            f"{len(values)} weights for {num_members} members; "
            "give one weight per member, in the order of the members",
        )
    if any(not math.isfinite(w) or w < 0 for w in values) or sum(values) == 0:
        raise ConfigFieldError(
            "ensemble.weights",
            f"{list(values)} is out of range; weights must be finite, not negative, and not all 0",
        )
    return values


def _check_fraction(field: str, value: float, low_open: bool) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigFieldError(field, f"{value!r} is not a number; give one between 0 and 1")
    if not (0 < value <= 1 if low_open else 0 <= value <= 1):
        lowest = "above 0" if low_open else "at least 0"
        raise ConfigFieldError(field, f"{value} is out of range; it must be {lowest} and at most 1")
