"""RAFT's update block with what is the same at every iteration computed once.

Each gate of the recurrent unit (Teed and Deng 2020, equations 3 to 6) convolves the concatenation of hidden state,
context and motion features. A convolution of a concatenation is a sum of convolutions, and the context does not change
between iterations: its part is computed before the first. The update and the reset gate read the same input, so one
convolution gives both. That leaves 2/3 to 3/4 of the arithmetic of the largest part of RAFT; the sums are taken in
another order, so results agree to rounding and not to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Recurrence:
    """The update block of torchvision's RAFT, as it is (its motion encoder and flow head are used unchanged)."""

    def __init__(self, block: nn.Module) -> None:
        self.motion_encoder: nn.Module = block.motion_encoder  # type: ignore[assignment]
        self.flow_head: nn.Module = block.flow_head  # type: ignore[assignment]
        recurrent: nn.Module = block.recurrent_block  # type: ignore[assignment]
        hidden: int = block.hidden_state_size  # type: ignore[assignment]
        units = [getattr(recurrent, name) for name in ("convgru1", "convgru2")]
        self.units = [unit for unit in units if isinstance(unit, nn.Module)]  # RAFT-small has one
        self.hidden = hidden

    def start(self, context: Float[Tensor, "b c hz wz"]) -> Iterations:
        """Prepare the iterations over one batch of pairs."""
        return Iterations(self, context)


class Iterations:
    """The recurrence for one context: call it once an iteration."""

    def __init__(self, recurrence: Recurrence, context: Float[Tensor, "b c hz wz"]) -> None:
        self.recurrence = recurrence
        self.gates = [_Gates(unit, context, recurrence.hidden) for unit in recurrence.units]

    def __call__(
        self,
        hidden: Float[Tensor, "b ch hz wz"],
        window: Float[Tensor, "b taps hz wz"],
        flow: Float[Tensor, "b 2 hz wz"],
    ) -> tuple[Float[Tensor, "b ch hz wz"], Float[Tensor, "b 2 hz wz"]]:
        """The next hidden state and the change of the flow."""
        motion = self.recurrence.motion_encoder(flow, window)
        for gates in self.gates:
            hidden = gates(hidden, motion)
        return hidden, self.recurrence.flow_head(hidden)


class _Gates:
    """One convolutional GRU: ``h' = (1 - z) h + z q`` with gates z, r and candidate q."""

    def __init__(self, unit: nn.Module, context: Tensor, hidden: int) -> None:
        z, r, q = (getattr(unit, name) for name in ("convz", "convr", "convq"))
        self.padding = z.padding
        weights = torch.cat([z.weight, r.weight])
        bias = torch.cat([z.bias, r.bias])
        fixed = slice(hidden, hidden + context.shape[1])
        self.gates_of_context = F.conv2d(context, weights[:, fixed], bias, padding=self.padding)
        self.candidate_of_context = F.conv2d(context, q.weight[:, fixed], q.bias, padding=self.padding)
        self.gate_weights, self.candidate_weights = (
            torch.cat([w[:, :hidden], w[:, fixed.stop :]], dim=1).contiguous(memory_format=torch.channels_last)
            for w in (weights, q.weight)
        )

    def __call__(self, hidden: Tensor, motion: Tensor) -> Tensor:
        gates = F.conv2d(torch.cat([hidden, motion], dim=1), self.gate_weights, padding=self.padding)
        update, reset = gates.add_(self.gates_of_context).sigmoid_().chunk(2, dim=1)
        reset_state = torch.cat([reset * hidden, motion], dim=1)
        candidate = F.conv2d(reset_state, self.candidate_weights, padding=self.padding)
        candidate = candidate.add_(self.candidate_of_context).tanh_()
        return torch.lerp(hidden, candidate, update)
