"""Curves to watch while a model trains: TensorBoard's event files.

They hold times of day and are no result: they stay below ``.work``. What a stage publishes is its ``curves.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

FLUSH_SECONDS = 5


@contextmanager
def live_curves(folder: Path, *, after: int = 0) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield what is called with the number of every step and its values; ``after`` is the last step that counts of
    those that an earlier process wrote there."""
    from torch.utils.tensorboard import SummaryWriter  # imported late: it takes a second

    writer = SummaryWriter(str(folder), purge_step=after + 1, flush_secs=FLUSH_SECONDS)

    def show(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield show
    finally:
        writer.close()
