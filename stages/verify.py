"""``clevrcast verify [STAGE ...] [--repair]``: every stored byte against its digest; damaged shards built again, alone.

A stage's manifest promises the sha256 of every file. Finished units that no manifest speaks of yet (of a stage that was
interrupted) are compared with their own record. An artifact, its unit in ``.work`` and its object in DVC's cache are
hard links of one file, so a damaged file is removed from all three before ``dvc repro`` builds its unit again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from data.errors import StoreError
from data.files import file_digest
from data.manifest import MANIFEST, promised_files, read_manifest
from pipeline.errors import PipelineError
from pipeline.journal import MARKER
from pipeline.progress import progress
from pipeline.stage import ARTIFACTS, WORK
from pipeline.upkeep import newest, titles

CACHE = Path(".dvc/cache")
THREADS = 4
"""Hashing gives the interpreter lock back, so threads read and hash side by side."""


@dataclass(frozen=True)
class Promise:
    """A file that some record vouches for."""

    stage: str
    file: Path
    sha256: str


@dataclass(frozen=True)
class Damage:
    stage: str
    file: Path
    found: str
    """What is there instead: "missing", or the sha256 of what was read, or why a manifest cannot be read."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything is as recorded (or was repaired); 1: something is damaged."""
    arguments = _parser().parse_args(argv)
    promises, damaged = promises_of(set(arguments.stages))
    unknown = set(arguments.stages) - {p.stage for p in promises} - {d.stage for d in damaged}
    if unknown:
        print(f"nothing is stored of {', '.join(sorted(unknown))}: run `dvc repro` first", file=sys.stderr)
        return 1
    damaged += check(promises)
    if arguments.json:
        print(json.dumps([{**asdict(d), "file": str(d.file)} for d in damaged], indent=1))
    else:
        _print(promises, damaged)
    if not damaged or not arguments.repair:
        return 1 if damaged else 0
    return repair(damaged)


def promises_of(stages: set[str]) -> tuple[list[Promise], list[Damage]]:
    """Everything that manifests and records vouch for, of these stages (none: of all), and records that are damaged."""
    promises, damaged = [], []
    for manifest in sorted(ARTIFACTS.rglob(MANIFEST)):
        stage = "@".join(manifest.parent.relative_to(ARTIFACTS).parts)
        if stages and stage not in stages:
            continue
        try:
            files = promised_files(read_manifest(manifest.parent))
        except StoreError as error:
            damaged.append(Damage(stage, manifest, error.message))
            continue
        promises += [Promise(stage, manifest.parent / name, entry["sha256"]) for name, entry in files.items()]
    for stage in titles(WORK):
        if not stages or stage in stages:
            promises += _units(stage)
    return promises, damaged


def _units(stage: str) -> Iterator[Promise]:
    folder = newest(WORK, stage)
    for marker in sorted(folder.glob(f"*/{MARKER}")) if folder else []:
        for name, entry in json.loads(marker.read_text())["files"].items():
            yield Promise(stage, marker.parent / name, entry["sha256"])


def check(promises: Sequence[Promise]) -> list[Damage]:
    """Read every file once, however many names it has."""
    by_inode: dict[tuple[int, int], Promise] = {}
    damaged, first = [], {}
    for promise in promises:
        if not promise.file.exists():
            damaged.append(Damage(promise.stage, promise.file, "missing"))
            continue
        status = promise.file.stat()
        first[promise.file] = by_inode.setdefault((status.st_dev, status.st_ino), promise).file
    with progress("verify", len(by_inode), "files") as tick, ThreadPoolExecutor(THREADS) as pool:
        digests = {}
        for promise, digest in zip(by_inode.values(), pool.map(_digest, by_inode.values()), strict=True):
            digests[promise.file] = digest
            tick(1, promise.stage)
    found = [(p, digests[first[p.file]]) for p in promises if p.file in first]
    return damaged + [Damage(p.stage, p.file, digest) for p, digest in found if digest != p.sha256]


def _digest(promise: Promise) -> str:
    return file_digest(promise.file)


def repair(damaged: Sequence[Damage]) -> int:
    """Remove every name of what is damaged, build it again, and look again.

    Raises:
        PipelineError: whole shards would be lost with the damaged ones, a stage could not be built, or is damaged
            still.
    """
    published = list(dict.fromkeys(d.stage for d in damaged if d.file.is_relative_to(ARTIFACTS)))
    for stage in published:
        _refuse_to_lose_shards(stage)
    for damage in damaged:
        remove_everywhere(damage.file)
        if damage.file.is_relative_to(WORK):  # .work/stage/fingerprint/unit: a unit without all its files is none
            shutil.rmtree(Path(*damage.file.parts[:4]), ignore_errors=True)
    for stage in _in_order(published):
        print(f"building again what was damaged of {stage}", flush=True)
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
        if subprocess.run(command, check=False).returncode:
            raise PipelineError(f"{stage} could not be built again", remedy="mend what it says, then verify once more")
    promises, left = promises_of({d.stage for d in damaged})
    left += check(promises)
    if left:
        raise PipelineError(
            f"{len(left)} files are still damaged, the first is {left[0].file} ({left[0].found})",
            remedy="look at the disk (`dmesg`, `smartctl`), then verify once more",
        )
    print(f"repaired: {', '.join(sorted({d.stage for d in damaged}))}")
    return 0


def _refuse_to_lose_shards(stage: str) -> None:
    """DVC removes a stage's output before it runs: shards that .work does not hold would be computed again too."""
    manifest = ARTIFACTS.joinpath(*stage.split("@"), MANIFEST)
    try:
        shards = read_manifest(manifest.parent).get("shards", [])
    except StoreError:
        shards = []
    keys = {shard["key"] for shard in shards}
    gone = [key for key in keys if not any(WORK.glob(f"{stage}/*/{key}/{MARKER}"))]
    if gone:
        raise PipelineError(
            f"{stage}: {len(gone)} of {len(keys)} shards are not in {WORK / stage} (another machine built them, or it "
            "was cleaned), and would be built again too",
            remedy=f"fetch what is damaged from a DVC remote (`dvc fetch {stage}`, `dvc checkout --force {stage}`), or "
            f"remove {manifest.parent} and run `dvc repro {stage}` to build all of it",
        )


def remove_everywhere(file: Path) -> None:
    """Remove a file under all its names in artifacts, .work and DVC's cache, so that nothing links it again."""
    if not file.exists():
        return
    status = file.stat()
    names = _same_file(status, (WORK, ARTIFACTS, CACHE)) if status.st_nlink > 1 else [file]
    for name in names:
        name.unlink()


def _same_file(status: os.stat_result, folders: Iterable[Path]) -> list[Path]:
    same = []
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for entry in (Path(parent, name) for name in names):
                found = entry.lstat()
                if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                    same.append(entry)
    return same


def _in_order(stages: Iterable[str]) -> list[str]:
    """Upstream first, as `titles` of the DAG go."""
    order = ("acquire", "decode", "label", "flow", "occlusion", "vae", "encode", "train", "evaluate", "report")
    return sorted(stages, key=lambda stage: order.index(stage.partition("@")[0]))


def _print(promises: Sequence[Promise], damaged: Sequence[Damage]) -> None:
    for damage in damaged:
        print(f"{damage.stage}: {damage.file}: {damage.found}")
    stages = sorted({p.stage for p in promises})
    print(f"{len(promises)} records of {', '.join(stages)} compared, {len(damaged)} damaged")
    if damaged:
        print("what to do: run `clevrcast verify --repair`")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clevrcast verify", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="for example flow or encode@frame; none: all")
    parser.add_argument("--repair", action="store_true", help="build damaged shards again")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
