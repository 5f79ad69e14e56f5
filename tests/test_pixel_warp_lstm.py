"""Approach 1: starts as its baselines, feeds its predictions back, one state for every head; encoders by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from data.errors import WeightsError
from data.world import MAX_OBJECTS
from models.blocks import ConvLSTMCell
from models.checkpoint import load_predictor, save_checkpoint
from models.image_encoder import SmallViT, TorchvisionViT, build_pretrained, build_tokens, positions
from models.predictor import Predictor, build
from models.predictors.pixel_warp_lstm import PixelWarpLSTM, _median
from models.training import TrainingOptions, autocast, train
from models.warp import advect_flow, backward_warp, resize_flow
from tests.test_predictors import CONTEXT, HEIGHT, HORIZON, SMALL, WIDTH, observed, scene, shaken


def made(**options: Any) -> PixelWarpLSTM:
    torch.manual_seed(0)
    every = {**SMALL["pixel_warp_lstm"], **options}
    predictor = build("pixel_warp_lstm", every, vaes={}, height=HEIGHT, width=WIDTH, context=CONTEXT)
    assert isinstance(predictor, PixelWarpLSTM)
    return predictor


def moved(**options: Any) -> PixelWarpLSTM:
    """Away from its zeros."""
    predictor = made(**options)
    shaken(predictor)
    return predictor


def rolled(predictor: Predictor) -> Any:
    with torch.no_grad():
        return predictor.rollout(observed(scene()), HORIZON, torch.Generator())


def test_the_cell_is_an_lstm_at_every_place() -> None:
    torch.manual_seed(0)
    cell = ConvLSTMCell(3, 4)
    x, hidden, memory = torch.randn(1, 3, 5, 6), torch.randn(1, 4, 5, 6), torch.randn(1, 4, 5, 6)
    after, kept = cell(x, hidden, memory)
    weight, bias = cell.gates.weight, cell.gates.bias
    assert bias is not None
    padded = F.pad(torch.cat([x, hidden], dim=1), (1, 1, 1, 1))
    for row in range(5):
        for column in range(6):
            around = padded[0, :, row : row + 3, column : column + 3].flatten()
            i, f, o, g = (weight.flatten(1) @ around + bias).split(4)
            c = torch.sigmoid(f) * memory[0, :, row, column] + torch.sigmoid(i) * torch.tanh(g)
            torch.testing.assert_close(kept[0, :, row, column], c)
            past = F.pad(x[0, :, row, column], (0, 1))  # three channels into four
            torch.testing.assert_close(after[0, :, row, column], torch.sigmoid(o) * torch.tanh(c) + past)


def test_it_starts_as_advect() -> None:
    out = rolled(made())
    expected: Any = build("advect", {}, vaes={}, height=HEIGHT, width=WIDTH, context=CONTEXT).rollout(
        observed(scene()), HORIZON, torch.Generator()
    )
    assert torch.equal(out.frames, expected.frames)
    assert torch.equal(out.flow_bwd, expected.flow_bwd)


def test_without_prior_it_starts_as_copy_last() -> None:
    out = rolled(made(motion_prior="none"))
    for k in range(HORIZON):
        torch.testing.assert_close(out.frames[:, k], observed(scene()).frames[:, -1], atol=1e-5, rtol=0)
    assert torch.equal(out.flow_bwd, torch.zeros_like(out.flow_bwd))


def test_flow_on_a_coarser_grid_starts_as_advection_there() -> None:
    out, context = rolled(made(flow_stride=2)), observed(scene())
    frame, flow_bwd = context.frames[:, -1], resize_flow(context.flow_bwd[:, -1], HEIGHT // 2, WIDTH // 2)
    for k in range(HORIZON):
        flow_bwd = advect_flow(flow_bwd)
        frame = backward_warp(frame, resize_flow(flow_bwd, HEIGHT, WIDTH))
        torch.testing.assert_close(out.frames[:, k], frame)
        torch.testing.assert_close(out.flow_bwd[:, k], resize_flow(flow_bwd, HEIGHT, WIDTH))


def test_matching_needs_no_teacher() -> None:
    predictor, context = made(motion_prior="matching"), observed(scene())
    with torch.no_grad():
        out = predictor.rollout(context, HORIZON, torch.Generator())
        blind = replace(context, flow_bwd=torch.full_like(context.flow_bwd, 9.0))
        again = predictor.rollout(blind, HORIZON, torch.Generator())
    assert torch.equal(out.frames, again.frames)


def test_matches_are_flow_in_pixels() -> None:
    blocks = torch.rand(1, 3, HEIGHT // 4, WIDTH // 4, generator=torch.Generator().manual_seed(0))
    first = F.interpolate(blocks, (HEIGHT, WIDTH), mode="nearest")
    frames = torch.stack([first.roll(4 * k, dims=3) for k in range(CONTEXT)], dim=1)  # four pixels to the right
    predictor = made(motion_prior="matching")
    with torch.no_grad():
        state, _ = predictor.observe(frames, torch.zeros(1, CONTEXT - 1, 2, HEIGHT, WIDTH))
    inside = state.flow_bwd[0, :, 8:-8, 16:-16]
    torch.testing.assert_close(inside[0], torch.full_like(inside[0], -4.0), atol=0.2, rtol=0)
    assert inside[1].abs().max() < 0.2


@pytest.mark.parametrize("prior", ["none", "matching"])
def test_the_loss_reaches_every_parameter_with_other_priors(prior: str) -> None:
    predictor = shaken(made(motion_prior=prior, recolour=True)).train()
    predictor(scene())[0].backward()
    silent = [n for n, p in predictor.own_parameters().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_predicted_frames_are_what_the_encoder_sees_next() -> None:
    predictor: Any = shaken(made())
    before = rolled(predictor)
    calls: list[tuple[Tensor, ...]] = []

    def disturb(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append(inputs)
        return output if len(calls) == 1 else output + 3.0  # the first call sees the observed frames

    handle = predictor.tokens.register_forward_hook(disturb)
    after = rolled(predictor)
    handle.remove()
    assert len(calls) == HORIZON  # the last predicted frame is looked at by nobody
    for field in ("frames", "flow_bwd", "collision"):
        a, b = getattr(before, field), getattr(after, field)
        assert torch.equal(a[:, 0], b[:, 0])
        assert not torch.equal(a[:, 1], b[:, 1])
    for k in range(1, HORIZON - 1):
        assert not torch.equal(before.frames[:, k], after.frames[:, k])
    assert torch.equal(calls[1][0], after.frames[:, 0])
    assert torch.equal(calls[2][0], after.frames[:, 1])


def test_every_head_reads_the_same_hidden_state() -> None:
    predictor: Any = shaken(made())
    before = rolled(predictor)
    handle = predictor.lstm.register_forward_hook(lambda m, i, o: (o[0] + 1.0, o[1]))
    after = rolled(predictor)
    handle.remove()
    for field in ("frames", "flow_bwd", "boxes", "presence", "collision"):
        assert not torch.equal(getattr(before, field)[:, 0], getattr(after, field)[:, 0])


def test_gradients_pass_through_the_frames_that_are_fed_back() -> None:
    predictor, clip = moved(), scene()
    state, _ = predictor.observe(clip.require("frames")[:, :CONTEXT], clip.require("flow_bwd")[:, : CONTEXT - 1])
    steps = predictor.unroll(state, HORIZON)
    (grad,) = torch.autograd.grad(predictor.sight(steps[-1].hidden).contact.sum(), steps[0].residual)
    assert grad.abs().sum() > 0


def test_unlabelled_windows_do_not_train_boxes_and_collisions() -> None:
    predictor, clip = moved(), scene()
    none = replace(clip, labelled=torch.zeros(2))
    loss, logs = predictor(none)
    assert logs["boxes"] == 0
    assert logs["collision"] == 0
    loss.backward()
    for head in (predictor.detection_head, predictor.collision_head):
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in head.parameters())
    assert predictor(clip)[1]["boxes"] > 0


def test_frozen_modules_keep_their_weights_and_let_gradients_pass() -> None:
    predictor = moved()
    predictor.freeze(["tokens", "lstm"])
    own = predictor.own_parameters()
    assert own
    assert not any(name.startswith(("tokens.", "lstm.")) for name in own)
    before = {name: value.clone() for name, value in predictor.own_state().items()}
    options = TrainingOptions(steps=2, warmup=0, precision="float32", ema=0.0)
    train(predictor, iter([scene()] * 2), options)
    changed = {name for name, value in predictor.own_state().items() if not torch.equal(value, before[name])}
    assert changed == set(own)
    with pytest.raises(ValueError, match="no module token to freeze; there are: tokens, lstm"):
        moved().freeze(["token"])


def test_boxes_and_collisions_are_those_of_the_frame_that_comes_next() -> None:
    predictor, clip = made(flip=False), scene()
    _, logs = predictor(clip)
    for field, term in (("boxes", "boxes"), ("collision_pairs", "collision")):
        first, second = (clip.require(field).clone() for _ in range(2))
        first[:, 0], second[:, 1] = 1 - first[:, 0], 1 - second[:, 1]
        assert predictor(replace(clip, **{field: first}))[1][term] == logs[term]
        assert predictor(replace(clip, **{field: second}))[1][term] != logs[term]


def test_a_step_in_bfloat16_is_nearly_that_in_float32() -> None:
    predictor, clip = shaken(made()), scene()
    with torch.no_grad():
        plain = predictor(clip)[0]
        with autocast("cpu", "bfloat16"):
            half = predictor(clip)[0]
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0)


def test_the_median_of_an_even_number_is_between_the_middle_two() -> None:
    frames = torch.rand(2, 4, 3, 4, 5)
    torch.testing.assert_close(_median(frames), frames.quantile(0.5, dim=1))
    torch.testing.assert_close(_median(frames[:, :3]), frames[:, :3].quantile(0.5, dim=1))


def test_sides_and_context_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="width 44 must be divisible by 8"):
        build("pixel_warp_lstm", {}, vaes={}, height=32, width=44, context=4)
    with pytest.raises(ValueError, match="context is 1"):
        build("pixel_warp_lstm", {}, vaes={}, height=32, width=48, context=1)
    with pytest.raises(ValidationError, match="encoder"):
        made(encoder="resnet50")
    with pytest.raises(ValueError, match="divisible by heads=3"):
        made(heads=3)


def test_tokens_know_where_they_are() -> None:
    table = positions((4, 6), 16)
    assert len(torch.unique(table, dim=0)) == 24
    assert torch.equal(table[0, :8], table[5, :8])  # the same row
    assert torch.equal(table[1, 8:], table[7, 8:])  # the same column
    vit = SmallViT((4, 6), dim=16, depth=1, heads=2)
    flat = vit(torch.full((1, 3, 32, 48), 0.5))
    assert flat.shape == (1, 16, 4, 6)
    assert not torch.equal(flat[..., 0, 0], flat[..., 3, 5])


def small_clip(folder: Path, seed: int = 0, whole: bool = False) -> str:
    """A tiny random CLIP in ``folder``: its image tower, or both towers as they are published."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = transformers.CLIPVisionConfig(**tower, image_size=32, patch_size=8)
    if whole:
        text = transformers.CLIPTextConfig(**tower, vocab_size=100)
        config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.CLIPVisionModel(vision)
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)
    return f"clip:{folder}"


def test_clip_is_frozen_and_not_saved_but_gradients_pass_through(tmp_path: Path) -> None:
    predictor = moved(encoder=small_clip(tmp_path))
    predictor.train()
    assert not any(n.startswith("pretrained.") for n in {**predictor.own_parameters(), **predictor.own_state()})
    assert not predictor.get_submodule("pretrained").training
    predictor(scene())[0].backward()
    assert all(p.grad is None for p in predictor.pretrained.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.own_parameters().values())
    frames = torch.rand(1, 3, HEIGHT, WIDTH, requires_grad=True)
    predictor.look(frames).sum().backward()
    assert frames.grad is not None
    assert frames.grad.abs().sum() > 0


def test_clip_sees_normalised_squares(tmp_path: Path) -> None:
    encoder = build_pretrained(small_clip(tmp_path))
    assert encoder is not None
    frames = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in _CLIP_SCALING)
    expected = encoder.get_submodule("model")(pixel_values=(frames - mean) / std).last_hidden_state
    found = encoder(frames)
    assert found.shape == (2, 16, 4, 4)
    torch.testing.assert_close(found[:, :, 1, 2], expected[:, 1 + 4 * 1 + 2])
    tokens = build_tokens(encoder, height=32, width=48, dim=8, depth=1, heads=2)
    assert tokens(encoder(torch.rand(1, 3, 32, 48))).shape == (1, 8, 4, 6)


# Radford et al. 2021, as released.
_CLIP_SCALING = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def test_the_image_tower_of_a_whole_clip_is_found(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = build_pretrained(small_clip(tmp_path, whole=True))
    assert encoder is not None
    frames = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in _CLIP_SCALING)
    whole = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    expected = whole.vision_model(pixel_values=(frames - mean) / std).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(frames).flatten(2).transpose(1, 2), expected)


def test_a_checkpoint_refuses_another_encoder_of_the_same_name(tmp_path: Path) -> None:
    options = {**SMALL["pixel_warp_lstm"], "encoder": small_clip(tmp_path / "clip")}
    predictor = shaken(made(**options))
    save_checkpoint(tmp_path / "saved", predictor, name="pixel_warp_lstm", options=options, steps=1)
    loaded: Any = load_predictor(tmp_path / "saved")
    assert torch.equal(rolled(loaded).frames, rolled(predictor).frames)
    small_clip(tmp_path / "clip", seed=1)
    other: Any = load_predictor(tmp_path / "saved")
    with pytest.raises(WeightsError, match=r"digest .*, expected"):
        rolled(other)


def test_encoders_that_cannot_be_had_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(WeightsError, match="small_vit"):
        build_pretrained(f"clip:{tmp_path}")
    with pytest.raises(WeightsError, match="incomplete"):
        build_pretrained(f"vit:{small_clip(tmp_path).removeprefix('clip:')}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="TORCH_HOME"):
        build_pretrained("torchvision:vit_b_16")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vit_b_16-c867db91.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="does not hold the weights of vit_b_16"):
        build_pretrained("torchvision:vit_b_16")


def test_torchvisions_transformer_gives_its_own_tokens() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5).eval()
    nn.init.normal_(model.heads[0].weight)  # pyright: ignore[reportArgumentType]  # a Linear
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    model.encoder.register_forward_hook(keep)
    encoder = TorchvisionViT(model, [0.5] * 3, [0.5] * 3)
    frames = torch.rand(2, 3, 32, 32)
    found = encoder(frames)
    model((frames - 0.5) / 0.5)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), seen[-1][:, 1:])


def test_eight_slots_come_out() -> None:
    out = rolled(shaken(made()))
    assert out.boxes.shape == (2, HORIZON, MAX_OBJECTS, 4)
