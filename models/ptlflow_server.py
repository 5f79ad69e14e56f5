"""The program that runs a network of ptlflow, in whatever environment has it; `models.ptlflow_teacher` starts it.

    PYTHON models/ptlflow_server.py OPTIONS      (OPTIONS: the fields of `Options` as JSON)

It imports nothing of ours, and outside `Network` nothing but the standard library: the environment has other versions
of everything. Messages go through standard input and output, what libraries print goes to
standard error. A message is two lengths (8 bytes each, big-endian), a header in JSON and a payload of raw bytes:

- first, from here: what is known of network and weights before the network is built (`Network.about`);
- a request: ``{"shape": [t, h, w, 3], "threads": n}`` and RGB frames as uint8;
- its answers, one per batch until all 2 (t - 1) flows are sent: ``{"shape": [n, 2, h, w]}`` and flows as float32,
  those from every frame to the next in order, then those from every frame but the first to the one before;
- instead of any of these: ``{"error": message, "remedy": ..., "weights": whether weights are at fault}``.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import json
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

RANDOM = "random"
_CONNECT_SECONDS = 20.0
_LENGTHS = struct.Struct(">QQ")


@dataclass(frozen=True)
class Options:
    """``weights`` is `RANDOM`, a path (it has a slash or a dot) or the name of a published checkpoint; ``parent`` the
    process that this one ends with; ``batch`` the most pairs at once."""

    model: str
    weights: str
    device: str
    precision: str
    batch: int
    parent: int


class Refusal(Exception):  # noqa: N818 - an answer, not a defect
    """What the other side is told instead of an answer."""

    def __init__(self, message: str, remedy: str, weights: bool = False) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.weights = weights


def send(stream: BufferedIOBase, header: Any, payload: Any = b"") -> None:
    """Write one message; ``payload`` is anything with bytes in it."""
    text, body = json.dumps(header).encode(), memoryview(payload).cast("B")
    stream.write(_LENGTHS.pack(len(text), body.nbytes) + text)
    stream.write(body)
    stream.flush()


def receive(stream: BufferedIOBase) -> tuple[Any, bytearray] | None:
    """Header and payload of one message, or None where the stream ends before or inside it."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header, payload = (bytearray(stream.read(n)) for n in _LENGTHS.unpack(lengths))
    complete = (len(header), len(payload)) == _LENGTHS.unpack(lengths)
    return (json.loads(header.decode()), payload) if complete else None


class Network:
    """One of ptlflow's networks: known at once, built at the first use."""

    def __init__(self, options: Options) -> None:
        try:
            import ptlflow  # pyright: ignore[reportMissingImports] - it is in the other environment
        except ImportError as error:
            raise Refusal(
                f"{sys.executable} cannot import ptlflow: {error}",
                "install ptlflow 0.4 in an environment of its own and set CLEVRCAST_PTLFLOW_PYTHON to its python "
                "(docs/teachers.md), or choose another flow.teacher",
            ) from error
        names = ptlflow.get_model_names()
        if options.model not in names:
            near = difflib.get_close_matches(options.model, names, n=3, cutoff=0.5)
            raise Refusal(
                f"ptlflow {ptlflow.__version__} has no model {options.model!r}",
                (f"did you mean {' or '.join(near)}? " if near else "") + f"it has {', '.join(names)}",
            )
        import torch

        self.options, self.ptlflow, self.torch, self.built = options, ptlflow, torch, None
        self.reference = ptlflow.get_model_reference(options.model)
        self.file = None if options.weights == RANDOM else self._find()

    def about(self) -> dict[str, str]:
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest() if self.file else ""
        return {
            "ptlflow": str(self.ptlflow.__version__),
            "torch": str(self.torch.__version__),
            "weights_sha256": digest,
            "licence": licence(Path(str(sys.modules[self.reference.__module__].__file__)).parent, self.options.model),
        }

    def flows(self, frames: bytearray, shape: list[int]) -> Iterator[Any]:
        """The flows of both directions as float32 arrays, batch by batch."""
        torch, (t, h, w, _) = self.torch, shape
        if self.built is None:
            self.built = self._build()
        rgb = torch.frombuffer(frames, dtype=torch.uint8).reshape(shape).to(self.options.device)
        images = rgb.flip(-1).permute(0, 3, 1, 2).contiguous().float() / 255  # ptlflow wants BGR in [0, 1]
        here = [*range(t - 1), *range(1, t)]
        there = [*range(1, t), *range(t - 1)]
        kind, half = torch.device(self.options.device).type, self.options.precision == "bfloat16"
        for first in range(0, len(here), self.options.batch):
            batch = slice(first, first + self.options.batch)
            pairs = torch.stack([images[here[batch]], images[there[batch]]], dim=1)
            with torch.inference_mode(), torch.autocast(kind, dtype=torch.bfloat16, enabled=half):
                flows = self.built({"images": pairs})["flows"]
            if tuple(flows.shape) != (len(pairs), 1, 2, h, w):
                raise Refusal(
                    f"ptlflow:{self.options.model} answered {len(pairs)} pairs of {h}x{w} (h x w) with flows of shape "
                    f"{tuple(flows.shape)}, not {(len(pairs), 1, 2, h, w)}",
                    "choose a model that takes pairs of frames",
                )
            if not bool(flows.isfinite().all()):
                raise Refusal(
                    f"ptlflow:{self.options.model} found a flow that is not finite",
                    "try flow.precision float32, or other weights",
                )
            yield flows[:, 0].float().contiguous().cpu().numpy()

    def _build(self) -> Any:
        """Raises `Refusal` where the file is damaged or of another model, or a part of it cannot be fetched."""
        self.torch.manual_seed(0)  # random weights are the same ones every time
        try:
            model = self.ptlflow.get_model(self.options.model, ckpt_path=None if self.file is None else str(self.file))
        except Exception as error:  # networks raise anything; the reason is passed on
            what = f"weights {self.options.weights} ({self.file})" if self.file else "random weights"
            raise Refusal(
                f"ptlflow:{self.options.model} cannot be built with {what}: {type(error).__name__}: {error}",
                "give the checkpoint of this very model; a file that was downloaded in part is to be deleted; where "
                "a backbone is missing, connect to the network once or put it below TORCH_HOME",
                weights=True,
            ) from error
        return model.to(self.options.device).eval()

    def _find(self) -> Path:
        """The checkpoint's file, downloaded to where torch.hub keeps them if it is a published one."""
        name, published = self.options.weights, dict(getattr(self.reference, "pretrained_checkpoints", {}))
        ways = f"published for {self.options.model}: {', '.join(published) or 'none'}; or give a path"
        if re.search(r"[/.]", name):
            if not Path(name).is_file():
                raise Refusal(f"flow.weights: there is no file {Path(name).absolute()}", ways, weights=True)
            return Path(name)
        if name not in published:
            near = difflib.get_close_matches(name, list(published), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise Refusal(
                f"flow.weights: {name!r} is no published checkpoint of {self.options.model}", hint + ways, weights=True
            )
        url = str(published[name])
        file = Path(self.torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not file.exists():
            try:
                download(url, file)
            except (OSError, ValueError) as error:  # no network, no such address; or not the published file
                raise Refusal(
                    f"the weights {name} of {self.options.model} are not at {file} and {url} cannot be downloaded: "
                    f"{error}",
                    f"connect to the network, or set TORCH_HOME to a folder that has hub/checkpoints/{file.name}, "
                    "or choose another flow.teacher",
                    weights=True,
                ) from error
        return file


def download(url: str, file: Path) -> None:
    """Fetch ``url`` to ``file``, which appears only when whole and of the digest that its name promises, if any."""
    file.parent.mkdir(parents=True, exist_ok=True)
    promised = re.search(r"-([0-9a-f]{8,})\.[^.]+$", file.name)
    socket.setdefaulttimeout(_CONNECT_SECONDS)
    with tempfile.NamedTemporaryFile(dir=str(file.parent), suffix=".partial") as partial:
        digest = hashlib.sha256()
        with urllib.request.urlopen(url) as source:  # noqa: S310 - the addresses that ptlflow publishes
            while block := source.read(2**20):
                digest.update(block)
                partial.write(block)
        if promised and not digest.hexdigest().startswith(promised.group(1)):
            raise ValueError(f"its sha256 is {digest.hexdigest()}, its name says {promised.group(1)}")
        partial.flush()
        with suppress(FileExistsError):  # another worker was faster
            os.link(partial.name, str(file))


def licence(folder: Path, model: str) -> str:
    """What ptlflow says of the licences of code and weights, in the README and files of the model's folder."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    found = {}
    for part in ("code", "pretrained weights"):
        match = re.search(rf"^#+ {part} license[^\n]*\n+(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
        said = " ".join(match.group(1).split()) if match else ""
        linked = re.fullmatch(r"See \[[^]]*\]\(([^)/]+)\)\.?", said)
        if linked and (folder / linked.group(1)).exists():
            lines = (folder / linked.group(1)).read_text(encoding="utf-8", errors="replace").splitlines()
            said = next((line.strip(" #") for line in lines if line.strip(" #")), said)
        found[part.split()[-1]] = said.rstrip(".")
    if not any(found.values()):
        return f"see the model's authors; ptlflow {model}"
    return "; ".join(f"{part}: {said or 'not said'}" for part, said in found.items()) + f" (ptlflow {model})"


def serve(options: Options, requests: BufferedIOBase, answers: BufferedIOBase) -> None:
    """Answer requests until there are no more."""
    try:
        network = Network(options)
        send(answers, network.about())
    except Refusal as refusal:
        send(answers, {"error": str(refusal), "remedy": refusal.remedy, "weights": refusal.weights})
        return
    while (request := receive(requests)) is not None:
        header, frames = request
        try:
            network.torch.set_num_threads(header["threads"])
            for flows in network.flows(frames, header["shape"]):
                send(answers, {"shape": flows.shape}, flows)
        except Refusal as refusal:
            send(answers, {"error": str(refusal), "remedy": refusal.remedy, "weights": refusal.weights})
        except Exception as error:  # noqa: BLE001 - networks raise anything; the reason goes to the other side
            t, h, w, _ = header["shape"]
            send(
                answers,
                {
                    "error": f"ptlflow:{options.model} failed on {t} frames of {h}x{w} (h x w): "
                    f"{type(error).__name__}: {error}",
                    "remedy": "try another flow.resolution or flow.precision, or another model: not all take pairs",
                    "weights": False,
                },
            )


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere the end of standard input has to do."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request
        raise SystemExit(1)


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage, which ends this process
    die_with_parent(options.parent)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not land among the answers
    try:
        serve(options, os.fdopen(0, "rb"), answers)
    except BrokenPipeError:  # nobody reads any more
        raise SystemExit(1) from None


if __name__ == "__main__":
    # Python puts this file's folder first, where our statistics.py would stand in for the standard library's.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    main()
