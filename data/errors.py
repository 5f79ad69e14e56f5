"""Every error that a user of clevrcast can cause or meet, as one tree.

::

    ClevrcastError
    ├── AnnotationError      an annotation is missing, malformed or contradicts its video
    ├── VideoError           a video cannot be decoded as promised (path, expected, found)
    ├── StoreError           a store is absent, unfinished or does not match its manifest
    ├── SourceError          the raw data set is absent or not in CLEVRER's layout
    ├── WeightsError         weights are absent, of the wrong shape or of the wrong digest
    ├── NonFiniteError       a loss, prediction or metric is NaN or infinite
    ├── EmptyError           an evaluation, training set or split has nothing in it
    ├── MachineError         this machine ended a process at work: it is out of memory, or stops the job
    ├── PageSizeError        a report page would be larger than people can send and open
    ├── CompilerError        code is to be compiled and this machine has no compiler
    ├── DownloadError        a server cannot be reached, refuses, or does not send what it promised
    └── ArchiveError         an archive is damaged, or holds what no honest archive holds
        └── MemberError      the bytes of one member are damaged, the rest of the archive is not

Each carries a ``remedy``: one sentence that says what to do next. ``str(error)`` shows both.
"""

from __future__ import annotations


class ClevrcastError(Exception):
    """Base of all expected errors: what is wrong (with the values involved) and what to do about it."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  what to do: {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default pickling, and errors cross process boundaries here.
        return _rebuild, (type(self), self.message, self.remedy)


def _rebuild(kind: type[ClevrcastError], message: str, remedy: str) -> ClevrcastError:
    return kind(message, remedy=remedy)


class AnnotationError(ClevrcastError):
    """An annotation is missing, malformed or contradicts its video."""


class VideoError(ClevrcastError):
    """A video cannot be decoded as promised."""


class StoreError(ClevrcastError):
    """A store is absent, unfinished or does not match its manifest."""


class SourceError(ClevrcastError):
    """The raw data set is absent or not in CLEVRER's layout."""


class WeightsError(ClevrcastError):
    """Weights are absent, of the wrong shape or of the wrong digest."""


class NonFiniteError(ClevrcastError):
    """A loss, prediction or metric is NaN or infinite."""


class EmptyError(ClevrcastError):
    """An evaluation, training set or split has nothing in it."""


class MachineError(ClevrcastError):
    """This machine ended a process at work: it is out of memory, or stops the job."""


class PageSizeError(ClevrcastError):
    """A report page would be larger than people can send and open."""


class CompilerError(ClevrcastError):
    """Code is to be compiled and this machine has no compiler."""


class DownloadError(ClevrcastError):
    """A server cannot be reached, refuses, or does not send what it promised."""


class ArchiveError(ClevrcastError):
    """An archive is damaged, or holds what no honest archive holds."""


class MemberError(ArchiveError):
    """The bytes of one member are damaged, the rest of the archive is not."""
