"""What `benchmarks.codecs` compresses and how: the real arrays of every stage, and the codecs tried on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.codecs.numcodecs import Delta, PackBits

from data.clevrer import FRAMES, annotation_path, official_split, read_annotation, video_path
from data.labels import label_video
from data.store import FLOW_SCALE, ArraySpec, pack_flow
from data.video import VideoReader
from models.autoencoder import BlockVAE
from models.flow_teachers import FlowPair, build_teacher
from models.occlusion import visibility
from models.static_gate import gate_flow
from stages.fields import flow_specs, visible_spec
from stages.label import specs as label_specs

LABELLED = (0, 1000, 2000, 10000)
"""Videos of the real sample that have an annotation."""
KEPT = range(0, FRAMES, 2)
CLIP = 16
FIELD_GRID = (320, 480)


@dataclass(frozen=True)
class Candidate:
    """A codec chain; ``pack`` makes the stored array of a video, ``unpack`` brings it back to the unit of errors."""

    label: str
    compressors: tuple[Any, ...]
    filters: tuple[Any, ...] = ()
    pack: Callable[[np.ndarray], np.ndarray] = lambda x: x
    unpack: Callable[[np.ndarray], np.ndarray] = lambda x: x
    clip: int = CLIP
    comparable: bool = True
    """Holds the same values as the default, in codecs of the specification: may be chosen by the rule."""


@dataclass
class Sample:
    """Whole videos of one kind of array, as computed, and what is done to store them."""

    name: str
    kind: str
    spec: ArraySpec
    videos: list[np.ndarray]
    pack: Callable[[np.ndarray], np.ndarray] = lambda x: x
    unpack: Callable[[np.ndarray], np.ndarray] = lambda x: x
    variants: list[Candidate] = field(default_factory=list)

    def candidates(self, *, quick: bool) -> list[Candidate]:
        dtype, axes = np.dtype(self.spec.dtype), len(self.spec.item) + 1
        chains = list(chains_of(dtype, axes, quick=quick))
        return [*(replace(c, pack=self.pack, unpack=self.unpack) for c in chains), *self.variants]


def chains_of(dtype: np.dtype, axes: int, *, quick: bool) -> Iterator[Candidate]:
    """Every codec that is tried on arrays of this type, in zarr's own names."""
    for level in (3, 9) if quick else (1, 3, 6, 9, 12, 19):
        yield Candidate(f"zstd {level}", zstd(level))
    for name, shuffle, level in (
        ("zstd", "bitshuffle", 5),
        ("zstd", "shuffle", 5),
        ("zstd", "noshuffle", 5),
        ("lz4", "bitshuffle", 5),
        ("lz4", "shuffle", 5),
        ("zlib", "shuffle", 5),
        ("zstd", "bitshuffle", 9),
    )[: 2 if quick else None]:
        yield Candidate(f"blosc {name} {level} {shuffle}", blosc(name, level, shuffle))
    if quick:
        return
    yield Candidate("gzip 6", (GzipCodec(level=6), Crc32cCodec()))
    time_last = TransposeCodec(order=(0, *range(2, axes), 1))
    yield Candidate("time last, zstd 9", zstd(9), (time_last,))
    if dtype.kind in "iu":
        delta = Delta(dtype=dtype.str)
        yield Candidate("delta in x, zstd 9", zstd(9), (delta,), comparable=False)
        yield Candidate("delta in time, zstd 9", zstd(9), (time_last, delta), comparable=False)
        bits = blosc("zstd", 5, "bitshuffle")
        yield Candidate("delta in x, blosc zstd 5 bitshuffle", bits, (delta,), comparable=False)


def zstd(level: int) -> tuple[Any, ...]:
    return ZstdCodec(level=level), Crc32cCodec()


def blosc(name: Any, level: int, shuffle: Any) -> tuple[Any, ...]:
    return BloscCodec(cname=name, clevel=level, shuffle=shuffle), Crc32cCodec()


def frame_spec(h: int, w: int) -> ArraySpec:
    return ArraySpec("frames", (len(KEPT), h, w, 3), "uint8", ("time", "y", "x", "channel"), CLIP, "picture")


def latent_spec(h: int, w: int) -> ArraySpec:
    return ArraySpec("latents", (len(KEPT), 6, h, w), "float16", ("time", "latent", "y", "x"), CLIP, "picture")


def flow_variants(spec: ArraySpec) -> list[Candidate]:
    """Other steps of quantisation, and no quantisation but float16's own."""

    def at(scale: float) -> Candidate:
        def pack(flow: np.ndarray) -> np.ndarray:
            return np.rint(flow * scale).astype(np.int16)

        return Candidate(
            f"step 1/{scale:.0f} px, default codec",
            spec.compressors(),
            pack=pack,
            unpack=lambda x: x.astype(np.float32) / scale,
            comparable=False,
        )

    def half(flow: np.ndarray) -> np.ndarray:
        return flow.astype(np.float16)

    lossless = [
        Candidate("float16, zstd 9", zstd(9), pack=half, comparable=False),
        Candidate(
            "float16, blosc zstd 5 shuffle",
            blosc("zstd", 5, "shuffle"),
            pack=half,
            comparable=False,
        ),
    ]
    return [*(at(scale) for scale in (8, 16, 64)), *lossless]


def mask_variants(spec: ArraySpec) -> list[Candidate]:
    def levels(n: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: (np.rint(x * (n - 1)) * (255 // (n - 1))).astype(np.uint8)

    def hard(x: np.ndarray) -> np.ndarray:
        return x >= 0.5

    def plain(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    soft = Candidate(
        "16 levels, default codec", spec.compressors(), pack=levels(16), unpack=lambda x: x / 255, comparable=False
    )
    bools = Candidate("bool, default codec", spec.compressors(), pack=hard, unpack=plain, comparable=False)
    packed = replace(bools, label="bool, packbits, zstd 9", compressors=zstd(9), filters=(PackBits(),))
    return [soft, bools, packed]


def samples(root: Path, *, quick: bool, iterations: int) -> Iterator[Sample]:
    """The real arrays, one kind after the other so that only one is in memory."""
    labelled = LABELLED[:1] if quick else LABELLED
    everything = sorted(int(f.stem[-5:]) for f in root.rglob("video_*.mp4"))
    with VideoReader() as reader:

        def frames(video: int, h: int, w: int) -> np.ndarray:
            path = root / video_path(official_split(video), video)
            return reader.read(path, KEPT, height=h, width=w, expected_frames=FRAMES)

        for h, w in ((128, 192), (160, 240)):
            videos = [frames(v, h, w) for v in (labelled if quick else everything)]
            yield Sample(f"frames {h}x{w}", "frames", frame_spec(h, w), videos)
        yield latents(videos)
        yield from labels(root, labelled)
        natives = [torch.from_numpy(frames(v, *FIELD_GRID)) for v in labelled]
        for name in ("dis",) if quick else ("dis", "raft_small"):
            teacher = build_teacher(name, iterations=iterations, precision="bfloat16")
            chosen = natives if name == "dis" else natives[::2]
            raw = [teacher(native) for native in chosen]
            yield from fields(f"{name}, gated", [gate_flow(p, n) for p, n in zip(raw, chosen, strict=True)])
            yield from fields(name, raw)


def latents(videos: list[np.ndarray]) -> Sample:
    """Latents of an untrained frame VAE: its principal components, where training starts from."""
    torch.manual_seed(0)
    vae, pictures = BlockVAE(), [torch.from_numpy(v).permute(0, 3, 1, 2).float() / 255 for v in videos[:4]]
    with torch.inference_mode():
        vae.fit_basis(torch.cat([p[::8] for p in pictures]))
        vae.calibrate(p[::8] for p in pictures)
        encoded = [torch.cat([vae.to_latents(part) for part in p.split(CLIP)]).numpy() for p in pictures]
    return Sample("latents 160x240", "latents", latent_spec(80, 120), encoded, lambda x: x.astype(np.float16))


def labels(root: Path, videos: Sequence[int]) -> Iterator[Sample]:
    annotations = [read_annotation(root / annotation_path(official_split(v), v)) for v in videos]
    made = [label_video(a, KEPT, *FIELD_GRID) for a in annotations]
    by_name = {spec.name: spec for spec in label_specs(len(KEPT), *FIELD_GRID, CLIP)}
    yield Sample("instances", "masks", by_name["instances"], [m.instances for m in made])
    yield flow_sample("true flow", [m.flow_bwd for m in made])
    yield mask_sample("true visibility", [m.visible.astype(np.float32) for m in made])


def fields(name: str, pairs: Sequence[FlowPair]) -> Iterator[Sample]:
    """Backward flow and the visibility that the occlusion stage makes of the stored flows."""
    yield flow_sample(f"flow, {name}", [pair.flow_bwd.numpy() for pair in pairs])

    def stored(flow: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(unpack_flow(pack_flow(flow.numpy())))

    soft = [visibility(stored(pair.flow_fwd), stored(pair.flow_bwd)).numpy() for pair in pairs]
    yield mask_sample(f"visibility, {name}", soft)


def flow_sample(name: str, flows: list[np.ndarray]) -> Sample:
    spec = flow_specs(len(KEPT) - 1, *FIELD_GRID, CLIP)[1]
    return Sample(name, "flow", spec, flows, pack_flow, unpack_flow, flow_variants(spec))


def unpack_flow(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float32) / FLOW_SCALE


def mask_sample(name: str, masks: list[np.ndarray]) -> Sample:
    def pack(x: np.ndarray) -> np.ndarray:
        return np.rint(x * 255).astype(np.uint8)

    spec = visible_spec(len(KEPT) - 1, *FIELD_GRID, CLIP)
    return Sample(name, "masks", spec, masks, pack, lambda x: x.astype(np.float32) / 255, mask_variants(spec))
