"""Several experiments: every combination of some values, side by side, and their table."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table
from ruamel.yaml import YAML, YAMLError

from pipeline.errors import ParamsError, PipelineError, StoppedError
from pipeline.experiment import Trial, carry_out, replace_leaves
from pipeline.params import parse_params, read_yaml
from pipeline.process import Said

EVERY = "*"
"""In a key under ``predictors``: each of them in turn."""


@dataclass(frozen=True)
class Result:
    """How an experiment ended: the skill of every predictor that it evaluated, or the error."""

    trial: Trial
    skills: Mapping[str, float] = field(default_factory=dict)
    error: PipelineError | None = None


def assignment(text: str) -> tuple[str, Any]:
    """``key=value`` of the command line; the value is YAML. Raises ParamsError for anything else."""
    key, found, value = text.partition("=")
    try:
        if found and key:
            return key, YAML(typ="safe").load(value)
    except YAMLError:
        pass
    raise ParamsError(f"{text!r} is no KEY=VALUE", remedy="for example flow.iterations=8, or decode.frames=[40,44]")


def trials(
    root: Path,
    name: str,
    changes: Mapping[str, Any],
    over: Mapping[str, Sequence[Any]] | None = None,
    targets: Sequence[str] = (),
) -> list[Trial]:
    """The experiments of a sweep: every combination of the values in ``over``, each with ``changes`` as well.

    A key ``predictors.*.REST`` is a sweep over the predictors too: one experiment for each, that changes it alone and
    wants its evaluation. Without ``over`` there is one experiment, called ``name``; else they are ``name-1`` and so on.

    Raises:
        ParamsError: a key that is not in ``params.yaml``, a value that it does not take, or a name that is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ParamsError(f"{name!r} cannot name an experiment", remedy="use letters, digits, '-', '_' and '.'")
    params = read_yaml(root / "params.yaml")
    axes = [[(key, value) for value in values] for key, values in (over or {}).items()]
    if empty := [key for key, values in (over or {}).items() if not values]:
        raise ParamsError(f"the sweep over {empty[0]} has no values", remedy=f"give some, as in {empty[0]}=[1,2]")
    plain = dict(changes)
    combinations = [plain | dict(choice) for choice in product(*axes)]
    found: list[Trial] = []
    for combination in combinations:
        if not any(EVERY in key.split(".") for key in combination):
            found.append(Trial(name, combination, tuple(targets)))
            continue
        for predictor in params["predictors"]:
            own = {key.replace(EVERY, predictor): value for key, value in combination.items()}
            found.append(Trial(name, own, tuple(targets) or (f"evaluate@{predictor}",)))
    if len(found) > 1:
        found = [Trial(f"{name}-{k}", trial.changes, trial.targets) for k, trial in enumerate(found, start=1)]
    for trial in found:
        copy = deepcopy(params)
        replace_leaves(copy, trial.changes)
        parse_params(copy, f"params.yaml with {trial.told}")
    return found


def attempt(root: Path, trial: Trial, *, stopped: Callable[[], bool], said: Said) -> Result:
    """Run one experiment; it never raises what a user can mend."""
    try:
        if stopped():
            raise StoppedError(f"the experiment {trial.name} was not begun", remedy="start the sweep again")
        return Result(trial, carry_out(root, trial, stopped=stopped, said=said))
    except PipelineError as error:
        return Result(trial, error=error)


def side_by_side(
    root: Path,
    wanted: Sequence[Trial],
    *,
    jobs: int,
    stopped: Callable[[], bool] = lambda: False,
    said: Said = lambda line: None,
) -> list[Result]:
    """Run the experiments, ``jobs`` at once. One that fails stops no other."""
    speaking = threading.Lock()

    def run(trial: Trial) -> Result:
        def say(line: str) -> None:
            with speaking:
                said(line if len(wanted) == 1 else f"{trial.name} | {line}")

        return attempt(root, trial, stopped=stopped, said=say)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(run, wanted))


def check(results: Sequence[Result]) -> None:
    """Raise for those that failed: the one error, or an error of the first one's kind with every message."""
    errors = [result.error for result in results if result.error]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise type(errors[0])("\n".join(error.message for error in errors), remedy=errors[0].remedy)


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One mapping per experiment: its name, what it changed, the skill of each predictor."""
    found = []
    for result in results:
        skills = {name: round(skill, 4) for name, skill in result.skills.items()}
        failed = {"error": result.error.message.splitlines()[0]} if result.error else {}
        found.append({"experiment": result.trial.name, "changes": result.trial.told, **skills, **failed})
    return found


def as_table(results: Sequence[Result]) -> Table:
    """For people."""
    told = rows(results)
    table = Table(title="skill by experiment")
    for name in (names := list(dict.fromkeys(key for row in told for key in row))):
        table.add_column(name, overflow="fold")
    for row in told:
        table.add_row(*(str(row.get(name, "")) for name in names))
    return table
