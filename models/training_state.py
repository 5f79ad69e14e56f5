"""What a training run is at one moment: taken, put back, and kept in one file, so that a killed run can go on.

A run that is put back and goes on with the same batches ends with the weights, bit for bit, of one that never stopped
(on one kind of device, with as many threads). Kept are the weights and buffers of the model (without borrowed
modules), their average, the optimiser's moments, every random generator and the curves so far.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from data.errors import WeightsError
from models.checkpoint import state_digest
from models.predictor import Predictor


@dataclass
class TrainingState:
    """A run after ``step`` steps and ``seconds`` seconds; tensors are copies on the CPU.

    ``model`` is what `Predictor.own_state` gives, ``average`` the averaged parameters, ``optimiser`` its moments by
    the parameter's name, ``random`` the state of every generator, ``curves`` one value per step.
    """

    step: int
    seconds: float
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimiser: dict[str, dict[str, Tensor]]
    random: dict[str, Tensor]
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Keeping:
    """How a run outlives its process. None of it changes a result.

    It goes on from ``state``, with batches from number ``state.step`` on (the caller's affair). ``save`` is given the
    state every ``every_steps`` steps, or, where that is 0, about every ``every_seconds`` seconds. ``generators`` are
    those that the model draws from besides PyTorch's own.
    """

    state: TrainingState | None = None
    save: Callable[[TrainingState], None] | None = None
    every_steps: int = 0
    every_seconds: float = 60.0
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)


@dataclass
class Running:
    """Everything that a run changes, where it computes."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    average: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    device: torch.device
    generators: Mapping[str, torch.Generator]
    curves: dict[str, list[float]] = field(default_factory=dict)

    def snapshot(self, step: int, seconds: float) -> TrainingState:
        """A copy of all of it."""
        moments = {name: self.optimiser.state[parameter] for name, parameter in self.parameters.items()}
        return TrainingState(
            step=step,
            seconds=seconds,
            model=_copies(_own(self.model)),
            average=_copies(self.average),
            optimiser={name: _copies(values) for name, values in moments.items()},
            random=self._random(),
            curves={name: list(values) for name, values in self.curves.items()},
        )

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Put a copy back, in place."""
        for name, value in _own(self.model).items():
            value.copy_(state.model[name])
        for name, parameter in self.parameters.items():
            self.average[name].copy_(state.average[name])
            # A step count is a scalar that stays on the CPU; moments have the layout of their parameter.
            self.optimiser.state[parameter] = {
                key: value.clone() if value.ndim == 0 else torch.empty_like(parameter).copy_(value)
                for key, value in state.optimiser[name].items()
            }
        torch.set_rng_state(state.random["cpu"])
        if self.device.type == "cuda" and "cuda" in state.random:
            torch.cuda.set_rng_state(state.random["cuda"], self.device)
        for name, generator in self.generators.items():
            generator.set_state(state.random[f"generator {name}"])
        self.curves = {name: list(values) for name, values in state.curves.items()}

    def _random(self) -> dict[str, Tensor]:
        states = {f"generator {name}": generator.get_state() for name, generator in self.generators.items()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {"cpu": torch.get_rng_state(), **states}


def save_state(path: Path, state: TrainingState) -> None:
    """Write one safetensors file, atomically: after a kill there is the old one or the whole new one."""
    tensors = {f"{group}/{name}": value for group in _GROUPS for name, value in getattr(state, group).items()}
    tensors |= {
        f"optimiser/{name}/{key}": value for name, moments in state.optimiser.items() for key, value in moments.items()
    }
    tensors |= {f"curves/{name}": torch.tensor(curve, dtype=torch.float64) for name, curve in state.curves.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    about = {
        "step": state.step,
        "seconds": state.seconds,
        "curves": list(state.curves),  # their order
        "digest": state_digest(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    save_file(tensors, unfinished, metadata={_ABOUT: json.dumps(about)})
    with unfinished.open("rb") as stream:
        os.fsync(stream.fileno())
    unfinished.replace(path)


def load_state(path: Path) -> TrainingState | None:
    """Read it back; None where there is none. Raises WeightsError if it cannot be read or is not what was written."""
    if not path.exists():
        return None
    remedy = f"remove {path}: training then starts from the beginning"
    try:
        # In one piece: safetensors' own reader opens a file twice, and a run may replace it in between.
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"][_ABOUT])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"the training state {path} cannot be read: {error}", remedy=remedy) from error
    if (found := state_digest(tensors)) != about["digest"]:
        raise WeightsError(
            f"the training state {path} has the digest {found}, expected {about['digest']}", remedy=remedy
        )
    state = TrainingState(about["step"], about["seconds"], {}, {}, {}, {}, {name: [] for name in about["curves"]})
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        if group == "optimiser":
            parameter, _, key = rest.rpartition("/")
            state.optimiser.setdefault(parameter, {})[key] = value
        else:
            getattr(state, group)[rest] = value.tolist() if group == "curves" else value
    return state


_GROUPS = ("model", "average", "random")
_ABOUT = "clevrcast"


def _own(model: nn.Module) -> dict[str, Tensor]:
    return model.own_state() if isinstance(model, Predictor) else model.state_dict()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}
