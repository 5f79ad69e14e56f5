"""Whether weights fit a network, said in words that name what does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data.errors import WeightsError


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], *, source: str, remedy: str) -> None:
    """Copy ``weights`` into every parameter and buffer of ``module``, in place.

    Raises WeightsError, which says that ``source`` is at fault, naming up to five entries that are missing, unknown
    or of another shape; the module is then unchanged.
    """
    own = module.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in weights]
    wrong += [f"{key} is unknown" for key in weights if key not in own]
    wrong += [
        f"{key} is {list(weights[key].shape)} instead of {list(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{source} does not fit: {', '.join(wrong[:5])}{more}", remedy=remedy)
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(weights[key])
