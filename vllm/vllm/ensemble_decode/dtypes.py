"""Members of different dtypes."""

from collections.abc import Iterable
from functools import reduce

import torch


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds the values of all."""
    return reduce(torch.promote_types, dtypes)
