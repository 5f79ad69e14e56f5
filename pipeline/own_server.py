"""A Prefect server for one run that ends with the run, however that ends.

Prefect would start one itself, but it lives on where the run is killed, has to answer within twenty seconds, and is not
started again where it dies.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from prefect.context import refresh_global_settings_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogHandler
from prefect.settings import get_current_settings

from pipeline.children import API, server_at
from pipeline.errors import StoppedError
from pipeline.process import meanwhile

LOOK_SECONDS = 1.0
SEND_SECONDS = 5.0


@contextmanager
def some_server(stopped: Callable[[], bool]) -> Iterator[None]:
    """That of Prefect's settings, else one of our own.

    Raises:
        StoppedError: ``stopped()`` while it was starting.
    """
    if get_current_settings().api.url:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        with server_at("127.0.0.1", port, lambda said: None, stopped) as server, ExitStack() as care:
            if stopped():
                raise StoppedError("stopped while the server was starting", remedy="the same command goes on")
            if server is not None:
                # Prefect's clients try for two minutes to reach it.
                care.enter_context(meanwhile(lambda: server.revive(lambda said: None), LOOK_SECONDS))
            refresh_global_settings_context()
            try:
                yield
            finally:  # what is still to be sent
                APILogHandler().flush()
                EventsWorker.drain_all(timeout=SEND_SECONDS)
    finally:
        os.environ.pop(API, None)
        refresh_global_settings_context()
