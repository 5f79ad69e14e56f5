"""RAFT's update block without the work that its iterations repeat.

Each gate of the recurrent unit (Teed and Deng 2020, equations 3 to 6) convolves the concatenation of hidden state,
context and motion features. The update and the reset gate read the same input, so one convolution gives both.

`ExactRecurrence` keeps every rounding of torchvision's block: it writes what changes into buffers that already hold the
context instead of concatenating. `FastRecurrence` goes further: a convolution of a concatenation is a sum of
convolutions, and that of the context is computed once. It leaves 2/3 to 3/4 of the arithmetic of the largest part of
RAFT; the sums are taken in another order, so results agree to rounding and not to the bit.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class Gates(Protocol):
    """One convolutional GRU, for one context: ``h' = (1 - z) h + z q`` with gates z, r and candidate q."""

    def __call__(self, hidden: Tensor, motion: Tensor) -> Tensor: ...


class Recurrence:
    """The update block of torchvision's RAFT; its motion encoder and flow head are used as they are."""

    def __init__(self, block: nn.Module, *, exact: bool) -> None:
        self.motion_encoder: nn.Module = block.motion_encoder  # type: ignore[assignment]
        self.flow_head: nn.Module = block.flow_head  # type: ignore[assignment]
        recurrent: nn.Module = block.recurrent_block  # type: ignore[assignment]
        hidden: int = block.hidden_state_size  # type: ignore[assignment]
        units = [getattr(recurrent, name) for name in ("convgru1", "convgru2")]
        kind = _ExactUnit if exact else _FastUnit
        # RAFT-small has one unit, the second is a function that does nothing.
        self.units = [kind(unit, hidden) for unit in units if isinstance(unit, nn.Module)]

    def start(self, context: Float[Tensor, "b c hz wz"]) -> Iterations:
        """Prepare the iterations over one batch of pairs."""
        return Iterations(self.motion_encoder, self.flow_head, [unit.start(context) for unit in self.units])


class Iterations:
    """The recurrence for one context: call it once an iteration."""

    def __init__(self, motion_encoder: nn.Module, flow_head: nn.Module, gates: list[Gates]) -> None:
        self.motion_encoder, self.flow_head, self.gates = motion_encoder, flow_head, gates

    def __call__(
        self,
        hidden: Float[Tensor, "b ch hz wz"],
        window: Float[Tensor, "b taps hz wz"],
        flow: Float[Tensor, "b 2 hz wz"],
    ) -> tuple[Float[Tensor, "b ch hz wz"], Float[Tensor, "b 2 hz wz"]]:
        """The next hidden state and the change of the flow."""
        motion = self.motion_encoder(flow, window)
        for gates in self.gates:
            hidden = gates(hidden, motion)
        return hidden, self.flow_head(hidden)


class _Unit:
    """Weights of one GRU, those of the gates z and r together."""

    def __init__(self, unit: nn.Module, hidden: int) -> None:
        z, r, q = (getattr(unit, name) for name in ("convz", "convr", "convq"))
        self.hidden, self.padding = hidden, z.padding
        self.gate_weight, self.gate_bias = torch.cat([z.weight, r.weight]), torch.cat([z.bias, r.bias])
        self.candidate_weight, self.candidate_bias = q.weight, q.bias


class _ExactUnit(_Unit):
    def start(self, context: Tensor) -> Gates:
        return _ExactGates(self, context)


class _ExactGates:
    def __init__(self, unit: _ExactUnit, context: Tensor) -> None:
        self.unit = unit
        b, c, h, w = context.shape
        self.first = slice(0, unit.hidden)
        self.last = slice(unit.hidden + c, None)
        channels = unit.gate_weight.shape[1]
        self.input, self.reset_input = (context.new_empty(b, channels, h, w) for _ in range(2))
        for buffer in (self.input, self.reset_input):
            buffer[:, unit.hidden : unit.hidden + c] = context

    def __call__(self, hidden: Tensor, motion: Tensor) -> Tensor:
        unit = self.unit
        self.input[:, self.first], self.input[:, self.last] = hidden, motion
        gates = F.conv2d(self.input, unit.gate_weight, unit.gate_bias, padding=unit.padding)
        update, reset = gates.sigmoid_().chunk(2, dim=1)
        torch.mul(reset, hidden, out=self.reset_input[:, self.first])
        self.reset_input[:, self.last] = motion
        candidate = F.conv2d(self.reset_input, unit.candidate_weight, unit.candidate_bias, padding=unit.padding)
        return ((1 - update) * hidden).add_(update * candidate.tanh_())


class _FastUnit(_Unit):
    def start(self, context: Tensor) -> Gates:
        return _FastGates(self, context)


class _FastGates:
    def __init__(self, unit: _FastUnit, context: Tensor) -> None:
        self.padding = unit.padding
        fixed = slice(unit.hidden, unit.hidden + context.shape[1])
        both = ((unit.gate_weight, unit.gate_bias), (unit.candidate_weight, unit.candidate_bias))
        self.gates_of_context, self.candidate_of_context = (
            F.conv2d(context, weight[:, fixed], bias, padding=unit.padding) for weight, bias in both
        )
        self.gate_weight, self.candidate_weight = (
            torch.cat([w[:, : fixed.start], w[:, fixed.stop :]], dim=1).contiguous(memory_format=torch.channels_last)
            for w, _ in both
        )

    def __call__(self, hidden: Tensor, motion: Tensor) -> Tensor:
        gates = F.conv2d(torch.cat([hidden, motion], dim=1), self.gate_weight, padding=self.padding)
        update, reset = gates.add_(self.gates_of_context).sigmoid_().chunk(2, dim=1)
        reset_input = torch.cat([reset * hidden, motion], dim=1)
        candidate = F.conv2d(reset_input, self.candidate_weight, padding=self.padding)
        return torch.lerp(hidden, candidate.add_(self.candidate_of_context).tanh_(), update)
