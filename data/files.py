"""Files as a whole: written so that a reader never sees half of one, and their digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` atomically, making its folder: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
