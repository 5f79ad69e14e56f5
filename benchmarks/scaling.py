"""What all of CLEVRER takes on so many GPUs: hours, gigabytes, network and money per stage, from a table of rates.

    python -m benchmarks.scaling [--gpus 1,8,64] [--rate NAME=VALUE ...] [--workspace DIR] [--price DOLLARS]
                                 [--markdown docs/scaling.md]

How much there is to do follows from ``params.yaml`` and ``profiles/clevrer.yaml``; how fast it goes from
`benchmarks.rates`, where every figure has its source. ``--rate`` replaces one, ``--workspace`` those that the records
of a workspace's own runs (``.work/runs``) give; they have to be of the same profile. Stages are taken one after the
other; what a stage consists of goes side by side as far as it can be divided. ``--markdown`` puts the tables between
the markers of a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.codecs import put
from benchmarks.rates import Rate, from_records, rates_of
from benchmarks.work import Amounts, amounts_of

PRICE = 2.0
"""Dollars per GPU-hour where none is given: a number to replace, not an offer."""
MB = 1e6


@dataclass(frozen=True)
class Task:
    """One indivisible piece of bookkeeping around ``seconds`` of divisible work. Bytes are those moved to and from the
    shared store."""

    name: str
    seconds: float
    """Of one worker."""
    pieces: int = 1
    """Most workers that can share it."""
    cores: bool = False
    """Whether a worker is a core; else it is a GPU with the core that feeds it."""
    read: float = 0.0
    written: float = 0.0
    files: int = 0
    limit: str = ""
    """What one worker spends most of its time on."""


@dataclass(frozen=True)
class Timing:
    """A stage on a cluster: ``parallel`` and ``serial`` seconds of wall time."""

    parallel: float
    serial: float
    busy: int
    """GPUs at work."""
    limit: str

    @property
    def seconds(self) -> float:
        return self.parallel + self.serial


def stages(a: Amounts, r: Mapping[str, float], count: int) -> dict[str, list[Task]]:
    """The tasks of every stage; those of training depend on how many GPUs share a predictor."""
    ids, annotated = a.videos, a.annotated
    download = a.raw / MB / r["download_mb_per_second"]
    flow = a.pairs * 2 / r["flow_evaluations_per_second"] + r["flow_cpu_seconds"]
    vae = {key: a.vae_steps[key] * a.vae_batch[key] for key in a.vae_steps}
    return {
        "acquire": [Task("acquire", download, written=a.raw, files=ids + annotated, limit="download")],
        "decode": [
            Task("decode", ids * r["decode_seconds"], a.shards, True, a.raw, a.stored["decode"], a.shards, "cores")
        ],
        "label": [
            Task("label", annotated * r["label_seconds"], a.shards, True, 0, a.stored["label"], 9 * a.shards, "cores")
        ],
        "flow": [
            Task("flow", ids * flow, a.shards, False, a.raw, a.stored["flow"], 2 * a.shards, "GPUs"),
        ],
        "occlusion": [
            Task(
                "occlusion",
                ids * r["occlusion_seconds"],
                a.shards,
                True,
                a.stored["flow"],
                a.stored["occlusion"],
                a.shards,
                "cores",
            )
        ],
        "vae": [
            Task(
                f"vae@{key}",
                images * (1 / r[f"vae_images_per_second.{key}"] + r[f"load_image.{key}"]),
                read=images * a.bytes_of_image[key],
                limit="one process each",
            )
            for key, images in vae.items()
        ],
        "encode": [
            Task(
                f"encode@{key}",
                ids * a.kept / r[f"encode_images_per_second.{key}"],
                a.shards,
                read=a.stored["decode" if key == "frame" else "flow"],
                written=a.stored[f"encode@{key}"],
                files=a.shards,
                limit="GPUs",
            )
            for key in vae
        ],
        "train": [training(a, r, name, share(a, count)) for name in a.trained],
        "evaluate": [
            Task(
                f"evaluate@{name}",
                a.predicted * (r["evaluate_load"] + r["evaluate_metrics"] + 1 / r[f"rollout_frames_per_second.{name}"]),
                read=a.predicted * a.bytes_of_truth,
                limit="one process each",
            )
            for name in a.predictors
        ],
    }


def share(a: Amounts, count: int) -> int:
    """GPUs that one predictor is trained on: as many as there are for each, if they divide its batch."""
    return max(n for n in range(1, max(1, count // len(a.trained)) + 1) if a.batch % n == 0)


def step_seconds(a: Amounts, r: Mapping[str, float], name: str, each: int) -> tuple[float, float]:
    """(computing, loading) of one step: clips are loaded between the steps, by the process that trains."""
    slower = 1.0 if each == 1 else r["training_efficiency"]
    return r[f"step_seconds.{name}"] / each / slower, a.batch / each * r[f"load_window.{name}"]


def training(a: Amounts, r: Mapping[str, float], name: str, each: int) -> Task:
    compute, load = step_seconds(a, r, name, each)
    read = a.steps * a.batch * a.bytes_of_window[name]
    limit = "loading of clips" if load > compute else "GPUs"
    # Already divided among its GPUs, all of which are busy for so long.
    return Task(f"train@{name}", a.steps * (compute + load), read=read, limit=limit)


def timing(tasks: Sequence[Task], r: Mapping[str, float], count: int, each: int = 1) -> Timing:
    """Tasks side by side on the cluster, the longest first; ``each``: GPUs that one task takes."""
    serial = sum(t.written for t in tasks) / MB / r["hash_mb_per_second"]
    serial += sum(t.files for t in tasks) / r["publish_files_per_second"]
    longest = max(tasks, key=lambda t: t.seconds)
    if longest.pieces > 1:
        workers = min(count * (int(r["cores_per_gpu"]) if longest.cores else 1), longest.pieces)
        busy = count
        parallel = sum(t.seconds for t in tasks) / workers
    else:
        places = [0.0] * max(1, count // each)
        for task in sorted(tasks, key=lambda t: -t.seconds):
            places[places.index(min(places))] += task.seconds
        busy = min(len(tasks), len(places)) * each
        parallel = max(places)
    return Timing(parallel, serial, busy, "DVC and links" if serial > parallel else longest.limit)


def timings(a: Amounts, r: Mapping[str, float], count: int) -> dict[str, Timing]:
    """Every stage on ``count`` GPUs."""
    made = stages(a, r, count)
    return {name: timing(tasks, r, count, share(a, count) if name == "train" else 1) for name, tasks in made.items()}


def hours_table(a: Amounts, r: Mapping[str, float], counts: Sequence[int]) -> list[str]:
    columns = {n: timings(a, r, n) for n in counts}
    heads = " | ".join(f"{gpus(n)}, h" for n in counts)
    lines = [
        f"| stage | {heads} | of it serial, h | limited at {gpus(counts[-1])} by |",
        "|---" * (len(counts) + 3) + "|",
    ]
    for name, last in columns[counts[-1]].items():
        cells = [f"{columns[n][name].seconds / 3600:,.2f}" for n in counts]
        lines.append(f"| {name} | {' | '.join(cells)} | {last.serial / 3600:.2f} | {last.limit} |")
    totals = [total(columns[n]) / 3600 for n in counts]
    serial = sum(t.serial for t in columns[counts[-1]].values()) / 3600
    lines.append(f"| all | {' | '.join(f'{t:,.1f}' for t in totals)} | {serial:.2f} | |")
    lines.append(f"| times faster | {' | '.join(f'{totals[0] / t:.1f}' for t in totals)} | | |")
    shares = [held(columns[n]) / total(columns[n]) / n for n in counts]
    lines.append(f"| GPUs that are held by a stage | {' | '.join(f'{share:.0%}' for share in shares)} | | |")
    return lines


def gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def total(stages: Mapping[str, Timing]) -> float:
    return sum(t.seconds for t in stages.values())


def held(stages: Mapping[str, Timing]) -> float:
    """GPU-seconds without those of GPUs for which a stage has no use."""
    return sum(t.parallel * t.busy for t in stages.values())


def money_table(a: Amounts, r: Mapping[str, float], counts: Sequence[int], price: float) -> list[str]:
    columns = [timings(a, r, n) for n in counts]
    rented = [total(column) / 3600 * n for column, n in zip(columns, counts, strict=True)]
    used = [held(column) / 3600 for column in columns]
    lines = [f"| | {' | '.join(gpus(n) for n in counts)} |", "|---" * (len(counts) + 1) + "|"]
    for what, hours in (("rented all the time", rented), ("given back where a stage has no use for them", used)):
        lines.append(f"| GPU-hours, {what} | {' | '.join(f'{h:,.0f}' for h in hours)} |")
        lines.append(f"| dollars, at {price:g} a GPU-hour | {' | '.join(f'{h * price:,.0f}' for h in hours)} |")
    return lines


def network_table(a: Amounts, r: Mapping[str, float], counts: Sequence[int]) -> list[str]:
    heads = [f"MB/s a GPU, at {n} | all, MB/s" for n in counts]
    lines = ["| stage | read, GB | written, GB | " + " | ".join(heads) + " |", "|---" * (2 * len(counts) + 3) + "|"]
    for name, tasks in stages(a, r, counts[-1]).items():
        read, written = (sum(getattr(t, what) for t in tasks) for what in ("read", "written"))
        cells = []
        for n in counts:
            t = timings(a, r, n)[name]
            rate = (read + written) / MB / max(t.parallel, 1e-9)
            cells.append(f"{rate / t.busy:,.1f} | {rate:,.0f}")
        lines.append(f"| {name} | {read / 1e9:,.1f} | {written / 1e9:,.1f} | {' | '.join(cells)} |")
    return lines


def steps_table(a: Amounts, r: Mapping[str, float], counts: Sequence[int]) -> list[str]:
    """What a predictor's processes exchange in every step, each, and how its step divides."""
    lines = [
        "| predictor | parameters | step on one GPU: computing, s | loading, s | "
        + " | ".join(f"GPUs each, of {n} | step, s | gradients, MB/s a GPU" for n in counts[1:])
        + " |",
        "|---" * (4 + 3 * len(counts[1:])) + "|",
    ]
    for name in a.trained:
        compute, load = step_seconds(a, r, name, 1)
        cells = []
        for n in counts[1:]:
            g = share(a, n)
            step = sum(step_seconds(a, r, name, g))
            traffic = 2 * (g - 1) / g * a.parameters[name] * 4 / step
            cells.append(f"{g} | {step:.2f} | {traffic / MB:,.0f}")
        lines.append(
            f"| {name} | {a.parameters[name] / 1e6:.1f} M | {compute:.2f} | {load:.2f} | {' | '.join(cells)} |"
        )
    return lines


def disk_table(a: Amounts) -> list[str]:
    lines = [
        "| | GB |",
        "|---|---|",
        f"| acquire (twice that while it runs: archives and videos) | {a.raw / 1e9:.1f} |",
    ]
    lines += [f"| {name} | {size / 1e9:.1f} |" for name, size in a.stored.items()]
    return [*lines, f"| all, once the archives are gone | {(a.raw + sum(a.stored.values())) / 1e9:.1f} |"]


def rate_table(rates: Mapping[str, Rate]) -> list[str]:
    lines = ["| rate | value | kind | source |", "|---|---|---|---|"]
    return lines + [f"| `{name}` | {rate.shown} | {rate.kind} | {rate.source} |" for name, rate in rates.items()]


def tables(counts: Sequence[int], price: float, given: Mapping[str, Rate]) -> dict[str, list[str]]:
    """Every table, by the name of its markers."""
    a = amounts_of(Path(__file__).resolve().parents[1])
    rates = rates_of(a, given)
    r = {name: rate.value for name, rate in rates.items()}
    return {
        "hours": hours_table(a, r, counts),
        "money": money_table(a, r, counts, price),
        "network": network_table(a, r, counts),
        "steps": steps_table(a, r, counts),
        "disk": disk_table(a),
        "rates": rate_table(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,8,64", help="how many, more than once")
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=VALUE", help="replaces one rate")
    parser.add_argument("--workspace", type=Path, help="take what its .work/runs records, of the same profile")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars per GPU-hour")
    parser.add_argument("--markdown", type=Path, help="replace the tables between the markers of this file")
    arguments = parser.parse_args()
    given = from_records(arguments.workspace) if arguments.workspace else {}
    for text in arguments.rate:
        name, _, value = text.partition("=")
        given[name] = Rate(float(value), "given", "the command line")
    for name, lines in tables([int(n) for n in arguments.gpus.split(",")], arguments.price, given).items():
        print("\n".join(lines), end="\n\n")
        if arguments.markdown:
            put(arguments.markdown, name, lines)


if __name__ == "__main__":
    main()
