"""Videos that never were: CLEVRER's kind of scene, played by the Bullet engine and annotated in its schema.

Objects slide into view or rest on the ground and collide. What released annotations show was measured and is
reproduced (8 released annotations beside 40 simulated ones; ``tests/test_physics.py`` holds both to it)::

    a video                                released     simulated
    objects, of them entering              5.0, 2.6     4.8, 2.6
    collisions; part of frames             2.5; 2.0 %   2.7; 2.1 %
    speed at the start                     2.84         2.85
    speed in view: 10, 50, 90 %            0.4 1.1 2.4  0.5 1.2 2.4
    speed lost a frame, sphere             0.33 %       0.34 %
    speed lost a frame, cylinder and cube  0.9, 0.8 %   0.8, 0.8 %
    spin (rad/s): 50, 90, 99 %             0.1 0.5 2.4  0.0 0.3 1.9
    seen in (objects x frames)             90 %         88 %
    enters in frame: 50, 90 %              12, 55       19, 50
    greatest height of a centre            0.221        0.222

Spheres slide without rolling, as released ones do; cubes and cylinders are slowed by friction too, and an upright
cylinder keeps its spin. Physics differ from the released videos in nothing a label depends on: every label is
computed from the annotation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float64

from data.camera import Camera
from data.raycast import Scene, image_boxes
from data.world import COLORS, FRAMES, MATERIALS, SHAPES, Annotation, Collision, ObjectProperty, Shape

#: Simulated seconds per frame: location step = SECONDS x velocity, measured.
SECONDS: Final = 0.0279
HALF_HEIGHT: Final = 0.2
#: Speeds at which objects set out, and where they may rest (x and y, in view), world units.
SPEED: Final = (2.7, 3.0)
REST: Final = ((-2.4, 1.0), (-1.5, 1.6))
#: Loss of speed per frame: v -> v - drag v - rub (drag, and friction on the ground).
DRAG: Final[dict[Shape, float]] = {"sphere": 0.0034, "cylinder": 0.0052, "cube": 0.0052}
RUB: Final[dict[Shape, float]] = {"sphere": 0.0, "cylinder": 0.005, "cube": 0.005}
#: Part of the spin that remains after one second.
SPIN: Final[dict[Shape, float]] = {"sphere": 0.9, "cylinder": 0.8, "cube": 0.1}
RESTITUTION: Final = 0.72
_GRAVITY: Final = 9.81
_SUBSTEPS: Final = 10
_APART: Final = 0.7
_COUNTS: Final = {3: 0.05, 4: 0.2, 5: 0.55, 6: 0.2}
_ATTEMPTS: Final = 300


@dataclass(frozen=True)
class _Start:
    """Where an object begins: on the ground, with a yaw and a velocity."""

    position: Float64[np.ndarray, "2"]
    yaw: float
    velocity: Float64[np.ndarray, "2"]


def simulate(
    rng: np.random.Generator, scene_index: int = 0, *, frames: int = FRAMES, collisions: tuple[int, int] = (1, 4)
) -> Annotation:
    """One random scene as an annotation: 3 to 6 objects, no two alike, at least one of them moving.

    ``collisions`` bounds (inclusive) how many may happen; scenes outside it are played again with new draws from
    ``rng``. Equal generators give equal annotations, in any process. Raises RuntimeError when 300 scenes in a row
    miss the bounds.
    """
    for _ in range(_ATTEMPTS):
        properties = _properties(rng)
        starts = _starts(rng, [p.shape for p in properties])
        annotation = _play(scene_index, properties, starts, frames)
        if collisions[0] <= len(annotation.collisions) <= collisions[1]:
            return annotation
    raise RuntimeError(f"no scene with {collisions[0]} to {collisions[1]} collisions in {_ATTEMPTS} attempts")


def _properties(rng: np.random.Generator) -> tuple[ObjectProperty, ...]:
    """Different (shape, colour, material) triples."""
    n = int(rng.choice(list(_COUNTS), p=list(_COUNTS.values())))
    every = [(s, c, m) for s in SHAPES for c in COLORS for m in MATERIALS]
    chosen = rng.choice(len(every), size=n, replace=False)
    return tuple(ObjectProperty(k, every[i][1], every[i][2], every[i][0]) for k, i in enumerate(chosen))


def _starts(rng: np.random.Generator, shapes: list[Shape]) -> list[_Start]:
    """Up to half of the objects rest in view; the others start out of view and aim at a resting one, or between."""
    n = len(shapes)
    resting = int(rng.integers(1, n - 1)) if n > 3 else 1
    kept: list[_Start] = []
    for k in rng.permutation(n).tolist():
        still = len(kept) < resting
        for _ in range(_ATTEMPTS):
            start = _rest(rng, shapes[k]) if still else _enter(rng, shapes[k], [s.position for s in kept[:resting]])
            if all(np.linalg.norm(start.position - other.position) > _APART for other in kept):
                kept.append(start)
                break
        else:
            raise RuntimeError(f"no free place for {n} objects")
    return [kept[k] for k in range(n)]


def _yaw(rng: np.random.Generator, shape: Shape) -> float:
    return float(rng.uniform(0, np.pi / 2)) if shape == "cube" else 0.0


def _rest(rng: np.random.Generator, shape: Shape) -> _Start:
    place = np.array([rng.uniform(*REST[0]), rng.uniform(*REST[1])])
    return _Start(place, _yaw(rng, shape), np.zeros(2))


def _enter(rng: np.random.Generator, shape: Shape, aims: list[np.ndarray]) -> _Start:
    """Arrives at its aim after 15 to 110 frames, from outside the view."""
    camera = Camera.clevrer()
    while True:
        aim = aims[int(rng.integers(len(aims)))] if rng.random() < 0.75 else _rest(rng, shape).position
        aim = aim + rng.normal(0, 0.15, 2)
        heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEED)
        towards = np.array([np.cos(heading), np.sin(heading)])
        place = aim - towards * _distance(shape, speed, int(rng.integers(15, 110)))
        pixel, depth = camera.project(torch.tensor([*place, HALF_HEIGHT]))
        x, y = pixel.tolist()
        margin = 12
        if depth < 0 or not (-margin < x < camera.width + margin and -margin < y < camera.height + margin):
            return _Start(place, _yaw(rng, shape), speed * towards)


def _distance(shape: Shape, speed: float, frames: int) -> float:
    """How far an object slides freely."""
    total = 0.0
    for _ in range(frames):
        total += speed * SECONDS
        speed = max(0.0, speed * (1 - DRAG[shape]) - RUB[shape])
    return total


def inside_view(annotation: Annotation) -> np.ndarray:
    """(t, n) bool: whether any of an object's image box lies on the picture (agrees with released annotations on
    99.2 % of entries)."""
    camera = Camera.clevrer()
    boxes = image_boxes(Scene.of(annotation, range(annotation.frames)), camera)
    x0, y0, x1, y1 = boxes.unbind(-1)
    inside = (x1 > 0) & (x0 < camera.width) & (y1 > 0) & (y0 < camera.height) & (x1 > x0)
    return inside.numpy()


# --- Bullet -------------------------------------------------------------------------------------------------------


def _play(scene_index: int, properties: tuple[ObjectProperty, ...], starts: list[_Start], frames: int) -> Annotation:
    """Runs one scene in a Bullet client of its own, closed afterwards."""
    import pybullet  # on use: it greets on standard output when it is imported

    client = pybullet.connect(pybullet.DIRECT)
    try:
        bodies = _build(pybullet, client, properties, starts)
        return _record(pybullet, client, scene_index, properties, bodies, frames)
    finally:
        pybullet.disconnect(client)


def _build(p: Any, client: int, properties: tuple[ObjectProperty, ...], starts: list[_Start]) -> list[int]:
    p.setPhysicsEngineParameter(
        fixedTimeStep=SECONDS / _SUBSTEPS, deterministicOverlappingPairs=1, physicsClientId=client
    )
    p.setGravity(0, 0, -_GRAVITY, physicsClientId=client)
    floor = p.createCollisionShape(p.GEOM_PLANE, physicsClientId=client)
    ground = p.createMultiBody(0, floor, physicsClientId=client)
    p.changeDynamics(ground, -1, lateralFriction=1.0, restitution=0.0, physicsClientId=client)
    bodies = []
    for entry, start in zip(properties, starts, strict=True):
        h = HALF_HEIGHT
        form = {
            "sphere": {"shapeType": p.GEOM_SPHERE, "radius": h},
            "cylinder": {"shapeType": p.GEOM_CYLINDER, "radius": h, "height": 2 * h},
            "cube": {"shapeType": p.GEOM_BOX, "halfExtents": [0.195, 0.195, h]},
        }[entry.shape]
        shape = p.createCollisionShape(**form, physicsClientId=client)
        turn = p.getQuaternionFromEuler([0, 0, start.yaw])
        body = p.createMultiBody(1.0, shape, -1, [*start.position, h], turn, physicsClientId=client)
        p.changeDynamics(
            body,
            -1,
            # Friction multiplies over a pair: the ground's is 1, so this is what each slides with.
            lateralFriction=RUB[entry.shape] / (SECONDS * _GRAVITY),
            restitution=RESTITUTION,
            linearDamping=0.0,  # Bullet's grows with the square of the speed; `_slow` applies the measured one
            angularDamping=0.0,
            activationState=p.ACTIVATION_STATE_DISABLE_SLEEPING,
            physicsClientId=client,
        )
        p.resetBaseVelocity(body, [*start.velocity, 0.0], [0.0, 0.0, 0.0], physicsClientId=client)
        bodies.append(body)
    return bodies


def _record(
    p: Any, client: int, scene_index: int, properties: tuple[ObjectProperty, ...], bodies: list[int], frames: int
) -> Annotation:
    n = len(bodies)
    motion = np.zeros((4, frames, n, 3))
    contacts: list[Collision] = []
    last_touch: dict[tuple[int, int], int] = {}
    for t in range(frames):
        for _ in range(_SUBSTEPS if t else 0):
            p.stepSimulation(physicsClientId=client)
            _slow(p, client, properties, bodies)
            for pair, place in _touching(p, client, bodies):
                if t - last_touch.get(pair, -100) > 10:
                    contacts.append(Collision(pair, t, place))
                last_touch[pair] = t
        for k, body in enumerate(bodies):
            place, quaternion = p.getBasePositionAndOrientation(body, physicsClientId=client)
            velocity, spin = p.getBaseVelocity(body, physicsClientId=client)
            turn = np.array(p.getMatrixFromQuaternion(quaternion)).reshape(3, 3)
            motion[:, t, k] = place, _euler(turn, properties[k].shape), velocity, spin
    motion = np.round(motion, 4)
    annotation = Annotation(
        scene_index=scene_index,
        properties=properties,
        object_ids=np.arange(n, dtype=np.int64),
        location=motion[0],
        orientation=motion[1],
        velocity=motion[2],
        angular_velocity=motion[3],
        inside_camera_view=np.ones((frames, n), dtype=bool),
        collisions=tuple(contacts),
    )
    return _seen(annotation)


def _slow(p: Any, client: int, properties: tuple[ObjectProperty, ...], bodies: list[int]) -> None:
    """Takes one substep's drag and loss of spin from every body."""
    for entry, body in zip(properties, bodies, strict=True):
        velocity, spin = p.getBaseVelocity(body, physicsClientId=client)
        keep = (1 - DRAG[entry.shape]) ** (1 / _SUBSTEPS)
        turn = SPIN[entry.shape] ** (SECONDS / _SUBSTEPS)
        slower = [v * keep for v in velocity], [w * turn for w in spin]
        p.resetBaseVelocity(body, *slower, physicsClientId=client)


def _seen(annotation: Annotation) -> Annotation:
    """With ``inside_camera_view`` filled in, and only the collisions that happen in view, as CLEVRER lists them."""
    inside = inside_view(annotation)
    visible = tuple(c for c in annotation.collisions if inside[c.frame, list(c.object_ids)].all())
    return replace(annotation, inside_camera_view=inside, collisions=visible)


def _touching(p: Any, client: int, bodies: list[int]) -> list[tuple[tuple[int, int], tuple[float, float, float]]]:
    """Pairs of objects that press on each other, and where (world units, 4 decimals)."""
    slots = {body: k for k, body in enumerate(bodies)}
    found = []
    for contact in p.getContactPoints(physicsClientId=client):
        a, b, place, force = slots.get(contact[1]), slots.get(contact[2]), contact[5], contact[9]
        if a is not None and b is not None and force > 0:
            found.append(((min(a, b), max(a, b)), tuple(round(float(v), 4) for v in place)))
    return found


def _euler(turn: np.ndarray, shape: Shape) -> tuple[float, float, float]:
    """XYZ Euler angles as CLEVRER writes them: a cylinder's mesh lies along y, Bullet's along z."""
    if shape == "cylinder":
        turn = turn @ np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    pitch = np.arcsin(np.clip(-turn[2, 0], -1, 1))
    return float(np.arctan2(turn[2, 1], turn[2, 2])), float(pitch), float(np.arctan2(turn[1, 0], turn[0, 0]))
