"""``manifest.json``: what a stage's output holds and the sha256 of every file, written last; the truth about a folder.

A manifest vouches for itself too: ``digest`` is the sha256 of everything else in it, so that no flipped bit in an id or
a quarantine entry goes unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from data.errors import StoreError
from data.files import file_digest, replace_file

FORMAT = 2
MANIFEST = "manifest.json"


class FileEntry(TypedDict):
    """What a manifest promises of one file."""

    bytes: int
    sha256: str


def file_entry(path: Path, sha256: str | None = None) -> FileEntry:
    """The promise about a file as it is now; ``sha256`` spares reading it where it is known."""
    return {"bytes": path.stat().st_size, "sha256": sha256 or file_digest(path)}


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Write JSON atomically: readers see the old file or the whole new one."""
    replace_file(path, (json.dumps(body, indent=1) + "\n").encode())


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest of ``folder``, last of all that is in it."""
    full = {"format": FORMAT, **body}
    write_json(folder / MANIFEST, {**full, "digest": _digest(full)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the stage output in ``folder``.

    Raises:
        StoreError: the folder has no manifest (the stage has not run, or was interrupted), one of another format, or
            one that is damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise StoreError(
            f"{folder} holds no {MANIFEST}: its stage has not run or did not finish",
            remedy=f"run `dvc repro` up to the stage that writes {folder}",
        )
    try:
        manifest = json.loads(file.read_bytes())
        found = manifest.get("format")
    except (ValueError, AttributeError) as error:
        raise _damaged(file, str(error)) from error
    if found != FORMAT:
        raise StoreError(
            f"{file} has format {found!r}, this version reads {FORMAT}",
            remedy="rebuild the stage with this version: `dvc repro --force` on it",
        )
    promised = manifest.pop("digest", None)
    if promised != _digest(manifest):
        raise _damaged(file, f"its digest is {_digest(manifest)}, it says {promised}")
    return manifest


def promised_files(manifest: Mapping[str, Any]) -> dict[str, FileEntry]:
    """Every file that a manifest vouches for, by path relative to its folder, shard by shard and otherwise."""
    files: dict[str, FileEntry] = dict(manifest.get("files", {}))
    for shard in manifest.get("shards", []):
        files |= shard["files"]
    return files


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damaged(file: Path, why: str) -> StoreError:
    return StoreError(f"{file} is damaged: {why}", remedy="run `clevrcast verify --repair`")
