"""Anyone's videos: which files are videos, and reading them in a process that can be killed (`data.film`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from data.errors import SourceError, VideoError
from data.film import Film, Refusal, Request, load_decoder, read_film, read_pictures
from data.worker import NoAnswerError, Worker

# fmt: off
VIDEOS = frozenset({
    ".mp4", ".m4v", ".mov", ".qt", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts",
    ".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp", ".vob", ".mxf", ".h264", ".hevc",
})
# fmt: on
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
_OTHER_FILE = "check that it plays, or give another video"
STILL = "set it in motion with `clevrcast animate --image`, or give a video, or a folder of frames"


@dataclass(frozen=True)
class Footage:
    """One video: a file, or the pictures of a folder in order."""

    path: Path
    pictures: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Found:
    """The videos of a path, and the files beside them that are none."""

    videos: tuple[Footage, ...]
    others: tuple[Path, ...] = ()


def find_videos(path: Path) -> Found:
    """A file as it is; the videos of a folder (not of folders in it), by their endings; a folder of pictures as one.

    Raises:
        SourceError: there is nothing there, or nothing that could be a video.
    """
    if path.is_file():
        return Found((Footage(path),))
    if not path.is_dir():
        what = "there is no such file or folder" if not path.exists() else "it is neither a file nor a folder"
        raise SourceError(f"{path}: {what}", remedy="check the path of the video")
    files = sorted((f for f in path.iterdir() if not f.name.startswith(".")), key=_natural)
    videos = tuple(Footage(f) for f in files if f.is_file() and f.suffix.lower() in VIDEOS)
    pictures = tuple(f for f in files if f.is_file() and f.suffix.lower() in PICTURES)
    if not videos and not pictures:
        raise SourceError(
            f"{path}: none of the {len(files)} entries of this folder is a video",
            remedy="give a folder that holds videos (mp4, mov, webm, avi, gif, ...), or the frames of one as pictures",
        )
    taken = {v.path for v in videos} or set(pictures)
    return Found(videos or (Footage(path, pictures),), tuple(f for f in files if f not in taken))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Names in order, numbers in them by value: frame2 before frame10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(1, int(part), "") if part.isdecimal() and part.isascii() else (0, 0, part) for part in parts]


class FootageReader:
    """Reads videos one after another. ``timeout`` in seconds for each; see `data.worker.Worker`."""

    def __init__(self, *, timeout: float) -> None:
        self.worker = Worker(load_decoder, timeout=timeout)

    def __enter__(self) -> FootageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker; reading starts another."""
        self.worker.close()

    def read(self, footage: Footage, request: Request) -> Film:
        """What ``request`` asks for, as far as it is there.

        Raises:
            VideoError: nothing can be read, saying why: no video, a still picture, only sound, a decoder that hangs.
        """
        path = footage.path
        if not footage.pictures and path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty (0 bytes)", remedy=_OTHER_FILE)
        try:
            if footage.pictures:
                answer = self.worker.ask(read_pictures, [str(p) for p in footage.pictures], request)
            else:
                answer = self.worker.ask(read_film, str(path), request)
        except NoAnswerError as error:
            raise VideoError(f"{path}: {error}", remedy=_OTHER_FILE + "; --timeout gives a slow one longer") from None
        if isinstance(answer, Refusal):
            raise VideoError(f"{path}: {answer.reason}", remedy=STILL if answer.still else _OTHER_FILE)
        return answer
