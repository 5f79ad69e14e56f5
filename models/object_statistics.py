"""Statistics of boxes and collisions: how well objects are followed, and whether what happens is seen coming.

Like those of `models.statistics`, they are sums and counts per (window, step) that add up exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.statistics import Statistic, statistic_of

SURE = 0.5
"""A slot counts as present, and a step as a predicted collision, from this probability on."""
LEAST_IOU = 0.5
TOLERANCES = (2, 5)
"""In frames of the source video."""
BINS_PER_LOGIT, LARGEST_LOGIT = 20, 8
BINS = 2 * BINS_PER_LOGIT * LARGEST_LOGIT + 1


def box_statistics(
    boxes: Float[Tensor, "b y s 4"],
    presence: Float[Tensor, "b y s"] | None,
    true_boxes: Float[Tensor, "b y n 4"],
    true_presence: Float[Tensor, "b y n"],
) -> dict[str, Statistic]:
    """Boxes (x0, y0, x1, y1), ends exclusive, of ``s`` predicted slots against ``n`` objects.

    A slot counts at a step where its presence is at least `SURE` (everywhere, for a predictor without presence), an
    object where its true presence is 1.

    ``box_iou``: intersection over union summed over present objects. Slots are assigned to objects once per window,
    by the one-to-one assignment with the greatest sum over the horizon (Kuhn 1955), so that a slot which changes from
    one object to another loses. An object without a slot, or whose slot does not count at that step, adds 0.

    ``box_hit``, ``box_false``, ``box_miss``: present slots and objects matched anew at every step, as many pairs as
    there can be with an IoU of at least `LEAST_IOU`; slots and objects without a partner. Identities are not looked
    at here. These are the counts of CLEAR MOT (Bernardin and Stiefelhagen 2008), without its switches.
    """
    sure = torch.ones_like(boxes[..., 0]) if presence is None else presence
    slots, objects = (sure >= SURE).cpu().numpy(), (true_presence >= SURE).cpu().numpy()
    counting = slots[..., :, None] & objects[..., None, :]
    iou = np.where(counting, box_iou(boxes.double(), true_boxes.double()).cpu().numpy(), 0.0)
    followed, hits = np.zeros(iou.shape[:2]), np.zeros(iou.shape[:2])
    for window, overlaps in enumerate(iou):
        slot, thing = linear_sum_assignment(overlaps.sum(axis=0), maximize=True)
        followed[window] = overlaps[:, slot, thing].sum(axis=1)
        for step, overlap in enumerate(overlaps >= LEAST_IOU):
            hits[window, step] = overlap[linear_sum_assignment(overlap, maximize=True)].sum()
    said, true, ones = slots.sum(axis=2), objects.sum(axis=2), np.ones(iou.shape[:2])
    return {
        "box_iou": _from_numpy(followed, true),
        "box_hit": _from_numpy(hits, ones),
        "box_false": _from_numpy(said - hits, ones),
        "box_miss": _from_numpy(true - hits, ones),
    }


def box_iou(a: Float[Tensor, "b y s 4"], b: Float[Tensor, "b y n 4"]) -> Float[Tensor, "b y s n"]:
    """Intersection over union of every pair, in [0, 1]; 0 where a box has no area (its ends may be swapped)."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = sides.prod(dim=-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(dim=-1) for box in (a, b)]
    union = areas[0] + areas[1] - intersection
    return torch.where(union > 0, intersection / union.where(union > 0, torch.ones_like(union)), 0.0)


def collision_statistics(
    collision: Float[Tensor, "b y"], true_collision: Float[Tensor, "b y"], *, frame_stride: int
) -> dict[str, Statistic]:
    """Probabilities per step against the steps with a collision; a step is ``frame_stride`` frames of the source.

    ``collision_base``: the share of steps with a collision. ``collision_hit_T``, ``collision_false_T`` and
    ``collision_miss_T`` for T in `TOLERANCES`: predicted and true events of a window matched one to one where they
    lie at most T source frames apart (at a stride of 2: one step for 2 frames, two steps for 5), as many pairs as
    there can be. Every step with a collision is a true event. A predicted event is a step of at least `SURE` whose
    neighbours are no likelier: a wide bump is one event, while equal steps are one each. Hits and misses are counted
    at the step of the true event, false alarms at that of the predicted one; a collision just outside of the window
    excuses nothing.
    """
    true, said = true_collision >= SURE, _peaks(collision)
    ones = np.ones(true.shape)
    out = {"collision_base": _from_numpy(true.double().cpu().numpy(), ones)}
    for tolerance in TOLERANCES:
        cells = np.zeros((3, *true.shape))
        for window in range(len(true)):
            events = (row.nonzero()[:, 0].cpu().numpy() for row in (said[window], true[window]))
            for cell, steps in zip(cells, match_events(*events, within=tolerance // frame_stride), strict=True):
                cell[window, steps] = 1
        for name, cell in zip(("hit", "false", "miss"), cells, strict=True):
            out[f"collision_{name}_{tolerance}"] = _from_numpy(cell, ones)
    return out


def match_events(
    said: Int[np.ndarray, " p"], true: Int[np.ndarray, " q"], *, within: int
) -> tuple[list[int], list[int], list[int]]:
    """True steps that are hit, predicted steps that hit nothing, true steps that are missed; both ascending.

    Of two sequences on a line, matching the earliest that may be matched gives the most pairs.
    """
    hit, false, miss = [], [], []
    p = q = 0
    while p < len(said) and q < len(true):
        if abs(int(said[p]) - int(true[q])) <= within:
            hit.append(int(true[q]))
            p, q = p + 1, q + 1
        elif said[p] < true[q]:
            false.append(int(said[p]))
            p += 1
        else:
            miss.append(int(true[q]))
            q += 1
    return hit, false + said[p:].tolist(), miss + true[q:].tolist()


def collision_histograms(
    collision: Float[Tensor, "b y"], true_collision: Float[Tensor, "b y"]
) -> dict[str, Float64[np.ndarray, "b bins"]]:
    """How often each probability was given, over all steps: ``collision_positives`` to steps with a collision,
    ``collision_negatives`` to the others.

    `BINS` bins of equal width in log-odds, a twentieth of a unit, out to probabilities of 0.0003 and 0.9997: rare
    events are told apart among small probabilities, where equal bins of probability would lump them together.
    """
    logits = torch.logit(collision.double()).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    bins = ((logits + LARGEST_LOGIT) * BINS_PER_LOGIT).round().long()
    true = (true_collision >= SURE).double()
    empty = torch.zeros(len(bins), BINS, dtype=torch.float64, device=bins.device)
    return {
        "collision_positives": empty.scatter_add(1, bins, true).cpu().numpy(),
        "collision_negatives": empty.scatter_add(1, bins, 1 - true).cpu().numpy(),
    }


def _peaks(probability: Float[Tensor, "b y"]) -> Bool[Tensor, "b y"]:
    padded = torch.nn.functional.pad(probability, (1, 1), value=-1.0)
    return (probability >= SURE) & (probability >= padded[:, :-2]) & (probability >= padded[:, 2:])


def _from_numpy(total: np.ndarray, count: np.ndarray) -> Statistic:
    return statistic_of(torch.from_numpy(total).double(), torch.from_numpy(count).double())
