"""The checks of `stages.doctor` that know data and models: codecs at work, and the weights that params.yaml needs."""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.health.checks import Finding, bad, good, listed, one_line, warning
from pipeline.health.packages import installed
from pipeline.health.server import ask

if TYPE_CHECKING:
    from pipeline.params import Params

FILM = (8, 48, 64, 3)
CODECS_AGAIN = "pip install --force-reinstall --no-deps -c constraints.txt av decord"
DECODE_SECONDS = 3.0
FAR = 12.0
"""Mean grey levels by which H.264 may change the film."""


def codecs(root: Path) -> Iterator[Finding]:
    """A film written as H.264 and read back by both decoders, as the stages do it."""
    try:
        answers = _written_and_read()
    except Exception as error:  # noqa: BLE001 - codecs raise anything
        yield bad(f"no film can be written or read: {type(error).__name__}: {one_line(str(error))}", CODECS_AGAIN)
        return
    faults = {name: fault for name, fault in answers.items() if fault}
    if not faults:
        versions = f"PyAV {installed('av')}, decord {installed('decord')}"
        yield good(f"{FILM[0]} frames written as H.264 and read back by {listed(list(answers))} ({versions})")
        return
    told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    if list(faults) == ["decord"]:
        yield warning(f"{told}; PyAV stands in for it, more slowly", CODECS_AGAIN)
    else:
        yield bad(told, CODECS_AGAIN)


def _written_and_read() -> dict[str, str]:
    """Decoder -> what is wrong with what it read, "" where nothing is."""
    import numpy as np

    from data.decoders import DECODERS
    from data.errors import VideoError
    from data.picture import write_video
    from data.video import VideoReader
    from data.world import FPS

    t, h, w, _ = FILM
    ramp = np.linspace(40, 200, h * w, dtype=np.float32).reshape(h, w, 1)
    film = np.stack([np.roll(ramp, 2 * k, axis=0).repeat(3, axis=2) for k in range(t)]).astype(np.uint8)
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, film, FPS)
        with VideoReader(timeout=DECODE_SECONDS) as reader:
            for name, decoder in DECODERS.items():
                reader.decoders = {name: decoder}
                try:
                    read = reader.read(path, range(t), height=h, width=w, expected_frames=t, native=(h, w))
                except VideoError as error:
                    answers[name] = error.message.removeprefix(f"{path}: ")
                    continue
                far = float(np.abs(read.astype(np.float32) - film).mean())
                answers[name] = "" if far < FAR else f"what it reads is {far:.0f} grey levels from what was written"
    return answers


def weights(root: Path) -> Iterator[Finding]:
    """What the present parameters need from elsewhere: there, to be downloaded, or missing."""
    from pipeline.errors import ParamsError
    from pipeline.params import load_params

    try:
        params = load_params(root / "params.yaml")
    except ParamsError:
        return  # said by another check
    found = [*_teacher(root, params), *_lpips(root, params), *_encoders(root, params)]
    found += [*_films(root, params), *_pretrained(root, params)]
    yield from found or [good(f"params.yaml needs none from elsewhere (flow.teacher is {params.flow.teacher})")]


def _teacher(root: Path, params: Params) -> Iterator[Finding]:
    name = params.flow.teacher
    if name.startswith("ptlflow:"):
        yield from _ptlflow(root, str(params.flow.weights))
    elif name.startswith("raft"):
        import torch

        from models.flow_teachers import _RAFT, _published_digest, load_raft_weights

        # Not `raft_weights_file`, which would download them.
        create, published = _RAFT[name]
        url = published.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not path.exists():
            ways = f"set TORCH_HOME to a folder that has hub/checkpoints/{path.name}, or choose flow.teacher: dis"
            yield _download(f"the weights of {name}", path, url, ways)
            return
        try:
            found = load_raft_weights(create(weights=None), name, path)
        except Exception as error:  # noqa: BLE001 - what is no pickle at all may raise anything
            why = getattr(error, "message", f"{type(error).__name__}: {error}")
            yield bad(f"{path} cannot be used as the weights of {name}: {one_line(why)}", f"rm {path}")
            return
        if found.startswith(_published_digest(path)):
            yield good(f"the weights of {name}: {path}")
        else:
            yield warning(
                f"the weights of {name} are not the published ones: {path} has the sha256 {found[:8]}...",
                f"if that is not meant: rm {path}, and the stage downloads it",
            )


def _ptlflow(root: Path, checkpoint: str) -> Iterator[Finding]:
    from models.ptlflow_server import RANDOM
    from models.ptlflow_teacher import PYTHON, interpreter

    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ptlflow') is None)"
    remedy = f"set {PYTHON} to the python of the environment that has ptlflow (docs/teachers.md)"
    try:
        asked = subprocess.run([interpreter(), "-c", program], capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield bad(f"{interpreter()}, which is to run ptlflow, cannot be run: {one_line(str(error))}", remedy)
        return
    if asked.returncode:
        yield bad(f"{interpreter()} has no ptlflow", remedy)
    elif checkpoint == RANDOM:
        yield warning("flow.weights is random: the flows will mean nothing", "name a checkpoint in flow.weights")
    elif set("/.") & set(checkpoint) and not (root / checkpoint).is_file():
        yield bad(f"flow.weights: there is no file {root / checkpoint}", "name the checkpoint's file in flow.weights")
    else:
        yield good(f"ptlflow is run by {interpreter()}, which finds (or downloads) flow.weights {checkpoint}")


def _lpips(root: Path, params: Params) -> Iterator[Finding]:
    files: dict[str, tuple[Any, Any]] = {"evaluate.lpips": (params.evaluate.lpips, params.evaluate.lpips_net)}
    for key, block in params.vae.items():
        if block.training.get("perceptual"):
            files[f"vae.{key}.training.perceptual_weights"] = (block.training.get("perceptual_weights"), "squeeze")
    for where, (file, net) in files.items():
        if file:
            from models.perceptual import load_lpips

            load_lpips(root / file, net)  # raises what is wrong, with its remedy
            yield good(f"{where}: {file}")


def _encoders(root: Path, params: Params) -> Iterator[Finding]:
    given = {
        f"predictors.{name}.options.encoder": str(block.options.get("encoder", "small_vit"))
        for name, block in params.predictors.items()
    }
    for name in ("subject_encoder", "background_encoder"):
        given[f"evaluate.{name}"] = getattr(params.evaluate, name) or "small_vit"
    for where, encoder in given.items():
        kind, _, place = encoder.partition(":")
        if encoder == "torchvision:vit_b_16":
            import torch
            from torchvision.models import ViT_B_16_Weights

            url = ViT_B_16_Weights.IMAGENET1K_V1.url
            path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
            if path.exists():
                yield good(f"{where}: {path}")
            else:  # this one is never downloaded
                yield bad(f"{where}: the weights are not at {path}", f"curl -o {path} {url}, or choose small_vit")
        elif kind in ("clip", "vit"):
            yield _transformers(root, where, place)


def _transformers(root: Path, where: str, place: str) -> Finding:
    if importlib.util.find_spec("transformers") is None:
        return bad(
            f"{where}: transformers is not installed",
            "pip install -c constraints.txt -e '.[encoders]', or choose small_vit",
        )
    folder = root / place
    if folder.is_dir():
        absent = [file for file in ("config.json", "preprocessor_config.json") if not (folder / file).exists()]
        absent += [] if any(folder.glob("*.safetensors")) else ["model.safetensors"]
        if absent:
            return bad(
                f"{where}: {folder} has no {listed(absent)}", "save the model there in full, or choose small_vit"
            )
        return good(f"{where}: {folder}")
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    cached: Any = try_to_load_from_cache(place, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
        return good(f"{where}: {Path(cached).parent}")
    ways = "give a folder with config.json, model.safetensors and preprocessor_config.json, or choose small_vit"
    return _download(f"{where}: {place}", Path(constants.HF_HUB_CACHE), hf_hub_url(place, "config.json"), ways)


def _films(root: Path, params: Params) -> Iterator[Finding]:
    """The networks of FVD and JEDi: their packages and files."""
    fvd, jedi = params.evaluate.fvd, params.evaluate.jedi
    for where, package, install, files in (
        ("evaluate.fvd", "cdfvd", "pip install -c constraints.txt -e '.[fvd]'", [fvd] if fvd else []),
        (
            "evaluate.jedi",
            "vjepa",
            "pip install --no-deps vjepa==0.1.2",
            [f"{jedi}/{file}" for file in ("vith16.pth.tar", "ssv2-probe.pth.tar")] if jedi else [],
        ),
    ):
        if not files:
            continue
        if importlib.util.find_spec(package) is None:
            yield bad(f"{where}: the package {package} is not installed", install)
        elif absent := [str(root / file) for file in files if not (root / file).is_file()]:
            yield bad(f"{where}: there is no file {listed(absent)}", "download it, see docs/evaluation.md")
        else:
            yield good(f"{where}: {listed(files)}")


def _pretrained(root: Path, params: Params) -> Iterator[Finding]:
    for key, vae in params.vae.items():
        if vae.pretrained is not None:
            from models.autoencoder import CONFIG, WEIGHTS

            remedy = "give the folder of an autoencoder, or leave it out (and train: training.steps)"
            yield _whole(f"vae.{key}.pretrained", root, vae.pretrained, (CONFIG, WEIGHTS), remedy)
    for name, block in params.predictors.items():
        if block.pretrained is not None:
            from models.checkpoint import META, WEIGHTS

            remedy = "give the folder of a finished train@NAME, or leave it out"
            yield _whole(f"predictors.{name}.pretrained", root, block.pretrained, (META, WEIGHTS), remedy)


def _whole(where: str, root: Path, place: str, files: Sequence[str], remedy: str) -> Finding:
    """Whether a folder below the checkout has all the files."""
    absent = [file for file in files if not (root / place / file).is_file()]
    return bad(f"{where}: {root / place} has no {listed(absent)}", remedy) if absent else good(f"{where}: {place}")


def _download(what: str, path: Path, url: str, ways: str) -> Finding:
    """Of weights that are not at ``path``: whether the stage will be able to fetch them."""
    answer = ask(url, method="HEAD")
    if 200 <= answer.status < 400:
        return warning(f"{what} are not at {path} yet: the stage will download {url}", f"nothing, or {ways}")
    why = f"HTTP {answer.status}" if answer.status else answer.text
    return bad(f"{what} are not at {path}, and {url} cannot be reached: {why}", f"connect to the network, or {ways}")
