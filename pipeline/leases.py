"""Which process may use which device: a lock on a file for each, which the kernel gives back when its holder dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.errors import BusyError
from pipeline.journal import lease

FOLDER = Path(".work/devices")
PATIENCE = 0.2
"""Seconds between two looks for a free device."""


@contextmanager
def leased(
    devices: Sequence[str], count: int, *, stopped: Callable[[], bool] = lambda: False, folder: Path = FOLDER
) -> Iterator[tuple[str, ...]]:
    """``count`` of the devices for the length of the block, waiting until they are free; all, if there are fewer.

    They are taken all at once or not at all, so that two who wait for several each do not starve one another. Where
    there are no devices none are waited for. Raises InterruptedError once ``stopped()`` is true.
    """
    wanted = min(count, len(devices))
    while True:
        with ExitStack() as held:
            names: list[str] = []
            for name in devices:
                if len(names) == wanted:
                    break
                with suppress(BusyError):
                    held.enter_context(lease(folder / f"{name}.lock", f"the device {name}"))
                    names.append(name)
            if len(names) == wanted:
                yield tuple(names)
                return
        if stopped():
            raise InterruptedError("stopped while waiting for a device")
        time.sleep(PATIENCE)
