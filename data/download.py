"""Files from a web server: read by range, resumed after any break, never spliced from two versions.

`probe` asks what a file is (length, ETag, whether ranges are honoured). `fetch` streams a range of it and continues
after dropped, truncated and refused connections with growing pauses. `download` keeps what arrived in ``.part`` beside
its target, so that a kill costs nothing that was written. Only http and https are spoken; no code of ours starts here.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from data.errors import DownloadError

CHUNK: Final = 1 << 20
_AGAIN: Final = "run the same command again: what has arrived is kept"


@dataclass(frozen=True)
class Retry:
    """How long to insist. Seconds; pauses double from ``base`` to ``cap``, each cut by up to half at random."""

    attempts: int = 8
    """Tries in a row that bring not one new byte before giving up."""
    base: float = 1.0
    cap: float = 60.0
    timeout: float = 60.0
    """Without a byte from the server."""

    def pause(self, failures: int) -> float:
        return min(self.cap, self.base * 2 ** (failures - 1)) * random.uniform(0.5, 1)


RETRY: Final = Retry()


@dataclass(frozen=True)
class Remote:
    """A file on a server as `probe` found it."""

    url: str
    size: int
    """Bytes."""
    etag: str = ""
    modified: str = ""
    """Its Last-Modified header, as sent."""
    ranges: bool = True
    """Whether the server sends a part when asked for a part."""

    @property
    def validator(self) -> str:
        """What If-Range takes: a strong ETag, else Last-Modified, else "": then two versions cannot be told apart."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    @property
    def identity(self) -> str:
        """A short name of this version of the file, for names of local copies."""
        return hashlib.sha256(f"{self.url}\n{self.size}\n{self.validator}".encode()).hexdigest()[:12]


def probe(url: str, retry: Retry = RETRY) -> Remote:
    """Ask for one byte of ``url`` and learn what the file is.

    Raises:
        DownloadError: the server cannot be reached, refuses, or does not say how long the file is.
    """
    failures = 0
    while True:
        try:
            with closing(_request(url, {"Range": "bytes=0-0"}, retry)) as response:
                partial = response.status == http.client.PARTIAL_CONTENT
                size = _content_range(url, response)[1] if partial else _length(response)
                if size is None:
                    raise DownloadError(f"{url}: the server does not say how long it is", remedy="use another mirror")
                headers = response.headers
                return Remote(url, size, headers.get("ETag", ""), headers.get("Last-Modified", ""), partial)
        except (OSError, http.client.HTTPException) as error:
            failures += 1
            _pause_or_give_up(url, error, failures, retry)


def fetch(remote: Remote, first: int, end: int, retry: Retry = RETRY) -> Iterator[bytes]:
    """Bytes ``[first, end)`` of a file, in order, over as many connections as it takes.

    From a server that ignores ranges the beginning is read again and dropped, which costs time and changes nothing.

    Raises:
        DownloadError: the file changed since `probe`, the server refuses, or ``retry.attempts`` tries in a row
            brought nothing new.
    """
    position, failures = first, 0
    while position < end:
        before = position
        reason: Exception | str = "the connection ended early"
        try:
            headers = {"Range": f"bytes={position}-{end - 1}"}
            if remote.validator:
                headers["If-Range"] = remote.validator
            with closing(_request(remote.url, headers, retry)) as response:
                at = _start(remote, response, position)
                while position < end and (chunk := response.read1(CHUNK)):
                    new = chunk[max(0, position - at) : max(0, end - at)]
                    at += len(chunk)
                    position += len(new)
                    if new:
                        yield new
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if position < end:
            failures = failures + 1 if position == before else 0
            _pause_or_give_up(remote.url, reason, failures, retry, f" at byte {position} of {remote.size}")


def download(remote: Remote, target: Path, advance: Callable[[int], None], retry: Retry = RETRY) -> None:
    """Bring the whole file to ``target``, which appears when it is complete; ``advance`` is told of bytes as they come.

    What arrived is kept in ``<target>.part``; name the target by `Remote.identity`, so that parts of two versions never
    meet. Without a validator an old part is not trusted. A second process waits for the first and finds its file.

    Raises:
        DownloadError: see `fetch`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(target.with_name(f"{target.name}.lock")):
        if target.exists():
            return
        part = part_of(target)
        with part.open("ab" if remote.validator else "wb") as stream:
            if stream.tell() > remote.size:
                stream.truncate(0)
            for chunk in fetch(remote, stream.tell(), remote.size, retry):
                stream.write(chunk)
                stream.flush()  # a kill must not take what has been reported
                advance(len(chunk))
            os.fsync(stream.fileno())
        part.rename(target)
        _sync_folder(target.parent)


def part_of(target: Path) -> Path:
    """Where `download` keeps what has arrived of ``target`` so far."""
    return target.with_name(f"{target.name}.part")


def _request(url: str, headers: dict[str, str], retry: Retry) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()  # unlike the ready-made one it opens neither files nor ftp
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={**headers, "Accept-Encoding": "identity"})  # noqa: S310
    response = opener.open(request, timeout=retry.timeout)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise DownloadError(
            f"{url} comes encoded as {response.headers['Content-Encoding']}, its bytes cannot be counted",
            remedy="use another mirror, or a connection without a proxy that rewrites files",
        )
    return response


def _start(remote: Remote, response: http.client.HTTPResponse, wanted: int) -> int:
    """The file's offset at which the response begins, having checked that it is still the same file."""
    for header, known in (("ETag", remote.etag), ("Last-Modified", remote.modified)):
        found = response.headers.get(header, "")
        if known and found and found != known:
            _changed(remote, f"{header} was {known}, is {found}")
    if response.status == http.client.PARTIAL_CONTENT:
        start, size = _content_range(remote.url, response)
    else:
        start, size = 0, _length(response)
    if size not in (None, remote.size):
        _changed(remote, f"its length was {remote.size}, is {size}")
    if start not in (0, wanted):
        raise DownloadError(
            f"{remote.url}: asked for bytes from {wanted}, the server sent them from {start}",
            remedy="use another mirror",
        )
    return start


def _content_range(url: str, response: http.client.HTTPResponse) -> tuple[int, int | None]:
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", text)
    if match is None:
        raise DownloadError(f"{url}: Content-Range {text!r} cannot be understood", remedy="use another mirror")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _length(response: http.client.HTTPResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]+", text) else None


def _changed(remote: Remote, how: str) -> NoReturn:
    raise DownloadError(
        f"{remote.url} changed on the server while it was read: {how}",
        remedy="run the same command again: it starts with the new file, nothing of the two is mixed",
    )


def _pause_or_give_up(url: str, reason: Exception | str, failures: int, retry: Retry, where: str = "") -> None:
    """Sleep before the next try, or raise the DownloadError that ends the trying."""
    if isinstance(reason, urllib.error.HTTPError):
        reason.close()
        if reason.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise DownloadError(
                f"{url} is empty, or has become shorter{where}", remedy="run the same command again, or use a mirror"
            ) from reason
        if reason.code < 500 and reason.code not in (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS):
            raise DownloadError(
                f"{url}: the server answered {reason.code} {reason.reason}",
                remedy="check the address (acquire.url), or whether the data set has moved",
            ) from reason
    cause = getattr(reason, "reason", None)
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise DownloadError(f"{url}: {cause}", remedy="mend the machine's certificates or clock") from cause
    if failures >= retry.attempts:
        said = str(reason) or type(reason).__name__
        raise DownloadError(f"{url}: {failures} tries in a row brought nothing{where}: {said}", remedy=_AGAIN)
    time.sleep(retry.pause(max(1, failures)))


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Wait for the only right to write one file; the kernel takes it back however the holder ends."""
    with lock.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
