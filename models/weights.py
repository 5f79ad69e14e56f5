"""Whether weights fit a network, said in words that name what does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from data.errors import WeightsError


def fit_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, source: str, remedy: str) -> None:
    """Copy ``weights`` into the tensors of ``own`` (a module's state), in place.

    Raises WeightsError, which says that ``source`` is at fault, naming what is missing, unknown or of another shape;
    nothing is changed then.
    """
    misshapen = [
        f"{key} is {list(weights[key].shape)} instead of {list(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    refuse_misfits(own.keys() - weights.keys(), weights.keys() - own.keys(), misshapen, source=source, remedy=remedy)
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(weights[key])


def refuse_misfits(
    missing: Iterable[str], unknown: Iterable[str], others: Iterable[str] = (), *, source: str, remedy: str
) -> None:
    """Raise a WeightsError that says what does not fit, the first five in words, unless there is nothing."""
    wrong = [f"{key} is missing" for key in sorted(missing)]
    wrong += [f"{key} is unknown" for key in sorted(unknown)]
    wrong += others
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{source} does not fit: {', '.join(wrong[:5])}{more}", remedy=remedy)
