"""The compact student: the 2D network it starts as, what time adds, how the rest of the house calls it."""

import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compact import Anchors, CompactVSR, load_anchors, warping_loss
from memory import queue_bytes
from perceptual import DISTS, dists_loss
from runtime import UserError, WeightsError
from stream import stream

SMALL = dict(features=8, layers=4, every=2)
WEIGHTS = Path(__file__).parent.parent / "weights" / "realesr-general-x4v3.pth"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 1e-5 if DEVICE == "cpu" else 1e-4  # cuDNN's convolutions of one input differ by more


@pytest.fixture
def anywhere(monkeypatch):
    """On the GPU where there is one, in all of float32's bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def srvgg(state: dict) -> nn.Module:
    """Real-ESRGAN's SRVGGNetCompact as its authors describe it, on frames (n 3 h w) in [0, 1]."""
    last = max(int(k.split(".")[1]) for k in state)
    layers = []
    for i in range(last + 1):
        w = state[f"body.{i}.weight"]
        layers.append(nn.PReLU(len(w)) if w.ndim == 1 else nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1))
    body = nn.Sequential(*layers)
    body.double().load_state_dict({k.removeprefix("body."): v for k, v in state.items()})
    return lambda x: F.pixel_shuffle(body(x), 4) + F.interpolate(x, scale_factor=4, mode="nearest")


def moved(net: CompactVSR) -> CompactVSR:
    """net with temporal blocks that do something, as after training."""
    for block in net.temporal.values():
        nn.init.normal_(block.conv2.weight, std=0.1)
        nn.init.normal_(block.conv2.bias, std=0.1)
    return net


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 3, 5, 7), (2, 3, 3, 8, 6), (1, 4, 3, 16, 1)])
def test_at_start_it_is_the_2d_network(anywhere, shape):
    net = CompactVSR.from_realesrgan(WEIGHTS).double()
    state = torch.load(WEIGHTS, weights_only=True)["params"]
    lr = torch.rand(shape, dtype=torch.float64) * 2 - 1
    expected = srvgg(state)(lr.flatten(0, 1) / 2 + 0.5) * 2 - 1
    torch.testing.assert_close(net(lr).flatten(0, 1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.float()(lr.float()).flatten(0, 1), expected.float(), rtol=0, atol=ROUNDING)


def test_it_says_that_it_has_no_attention_to_cut_into_windows():
    with pytest.raises(UserError, match="windows: CompactVSR has no attention over a frame"):
        CompactVSR(**SMALL).for_inference(torch.float32, "windows")


def test_the_2d_network_has_the_published_size():
    net = CompactVSR.from_realesrgan(WEIGHTS)
    assert sum(p.numel() for p in net.body.parameters()) == 1_213_296
    assert len(net.temporal) == 8 and net.lag == 16


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 5), (9,), (2, 0, 7)])
def test_a_stream_is_the_whole_clip(anywhere, chunks):
    net = moved(CompactVSR(**SMALL)).double()
    lr = torch.rand(1, 9, 3, 6, 5, dtype=torch.float64) * 2 - 1
    streamed = torch.cat(list(stream(net, lr.split(chunks, dim=1))), dim=1)
    torch.testing.assert_close(streamed, net(lr), rtol=0, atol=1e-12)


@torch.no_grad()
def test_only_temporal_blocks_look_at_other_frames(anywhere):
    lr = torch.rand(1, 5, 3, 6, 6) * 2 - 1
    other = lr.clone()
    other[:, 0] = 0
    for net, reaches in (CompactVSR(**SMALL), False), (moved(CompactVSR(**SMALL)), True):
        assert (not torch.equal(net(lr)[:, 2], net(other)[:, 2])) == reaches


def test_a_folder_holds_it_and_says_which_network_it_is(tmp_path):
    from compact import load_student
    from model import PRESETS, AdcVSR

    for net in moved(CompactVSR(**SMALL)), AdcVSR(**PRESETS["tiny"]):
        net.save_pretrained(tmp_path / type(net).__name__)
        again = load_student(tmp_path / type(net).__name__)
        assert type(again) is type(net) and again.config == net.config
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_queues_are_counted():
    net = CompactVSR(**SMALL)
    frames = net.lag + 2
    assert 0 < queue_bytes(net, 6, 5) < 4 * frames * 8 * 6 * 5 * 2 * (len(net.temporal) + 1)


@pytest.mark.parametrize(
    "state, what",
    [
        ({"params": {}}, "missing"),
        ({"params_ema": {}}, "missing"),
        ({"params": torch.load(WEIGHTS, weights_only=True)["params"] | {"extra": torch.zeros(1)}}, "extra"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, state, what):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=what) as error:
        CompactVSR.from_realesrgan(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


def test_at_start_nothing_pulls_it_back_to_the_2d_network_and_later_something_does():
    dists, lr = DISTS.seeded(), torch.rand(1, 3, 3, 16, 16) * 2 - 1
    anchors = Anchors(dists, lambda_2d=1.0, lambda_warp=0.0)
    net = CompactVSR.from_realesrgan()
    assert anchors(net(lr), {"lr": lr}).abs() < 1e-5
    x_s = moved(net)(lr)
    expected = dists_loss(dists, x_s, CompactVSR.from_realesrgan()(lr))
    assert anchors(x_s, {"lr": lr}).item() == pytest.approx(expected.item()) and expected > 1e-3


def test_flicker_costs_along_the_motion_alone():
    """A picture that moves by whole pixels, and a result that moves with it, stands still, or flickers."""
    rng = np.random.default_rng(0)
    world = cv2.GaussianBlur(rng.uniform(-6, 6, (96, 96, 3)), (0, 0), 3).clip(-1, 1)
    world = torch.from_numpy(world).float().permute(2, 0, 1)
    hr = torch.stack([world[:, 8:72, 2 * i : 64 + 2 * i] for i in range(4)])[None]
    moves, stays = warping_loss(hr, hr), warping_loss(hr[:, :1].expand_as(hr), hr)
    noise = 0.2 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    flickers = warping_loss(hr + noise, hr)
    assert moves < 0.1 * min(stays, flickers)
    # Independent noise of deviation s in two frames differs by 2 s / pi^0.5; warping calms it.
    assert 0.5 < flickers / (0.2 * 2 / math.pi**0.5) < 1 and warping_loss(0 * hr + 0.3, hr) < 1e-6


def test_its_settings_must_go_together():
    settings = SimpleNamespace(lambda_2d=1.0, lambda_warp=0.0)
    with pytest.raises(UserError, match="--lambda-2d: .* --dists, which is none"):
        load_anchors(settings, None)
    assert load_anchors(SimpleNamespace(lambda_2d=0.0, lambda_warp=0.0), None) is None


@torch.no_grad()
@pytest.mark.parametrize("kind, blocks", [("none", 0), ("conv", 8), ("double", 8), ("attention", 8)])
def test_every_row_of_table_5_starts_as_the_2d_network(kind, blocks):
    lr = torch.rand(1, 3, 3, 6, 6) * 2 - 1
    net = CompactVSR.from_realesrgan(temporal_kind=kind)
    assert len(net.temporal) == blocks
    torch.testing.assert_close(net(lr), CompactVSR.from_realesrgan()(lr), rtol=0, atol=1e-6)
