"""seedvr2.py: equal to the official code, window by window, and what its structure promises at any size.

The golden file was made with the official code, in float32, at random weights under the official keys. A cut
of it lies beside this file; all of it is `../shared/data/seedvr2_golden.pt`.
"""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import InterpolationMode, resize

import train_stage1
import train_stage2
from cache import CachedClips
from data import Sources, TrainingClips
from runtime import UserError, WeightsError
from seedvr2 import LATENT_SCALE, PRESETS, NaDiT, VideoVAE, restore, window_size, windows
from teacher import SeedVR2Teacher, is_results, load_teacher, noise_of
from training import newest_checkpoint
from video import read_clip, to_frames, to_network, to_uint8

WHOLE = Path(__file__).parents[2] / "shared" / "data" / "seedvr2_golden.pt"
CUT = Path(__file__).with_name("seedvr2_golden.pt")
AREA = 45 * 80
SIZES = dict(width=64, heads=2, layers=4, text=48)  # of the golden file's networks
SEPARATE = {"3b": 2, "7b": 4}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(WHOLE if WHOLE.is_file() else CUT, weights_only=True)


def part(golden: dict, *path):
    for key in path:
        golden = golden[key] if isinstance(golden, list) else golden.get(key)
        if golden is None:
            pytest.skip("only in ../shared/data/seedvr2_golden.pt, which is not here")
    return golden


def in_float(weights: dict) -> dict:
    return {key: x.float() for key, x in weights.items()}


def nadit(golden: dict, name: str) -> NaDiT:
    net = NaDiT(**PRESETS[name] | SIZES | {"separate": SEPARATE[name]})
    net.load_state_dict(in_float(golden[name]["weights"]))
    return net.requires_grad_(False)


def video_vae(golden: dict) -> VideoVAE:
    vae = VideoVAE(widths=(16, 32, 32, 32), groups=8)
    vae.load_state_dict(in_float(part(golden, "vae", "weights")))
    return vae.requires_grad_(False)


def small(name: str, seed: int = 0, **sizes) -> NaDiT:
    torch.manual_seed(seed)
    net = NaDiT(**PRESETS[name] | SIZES | {"layers": 3, "separate": SEPARATE[name], "area": 36} | sizes)
    return net.requires_grad_(False)


def small_vae(seed: int = 0) -> VideoVAE:
    torch.manual_seed(seed)
    return VideoVAE(widths=(8, 8, 16, 16), groups=4).requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < tolerance)


# ------------------------------------------------------------------------------------------------------
# The official code


@pytest.mark.parametrize("case", [0, 1], ids=["clip", "image"])
@pytest.mark.parametrize("name", ["3b", "7b"])
def test_velocity_is_the_official_one(golden, name, case):
    case = part(golden, name, "cases", case)
    v = nadit(golden, name)(case["vid"][None].float(), case["txt"].float(), torch.tensor([case["timestep"]]))
    assert close(v[0], case["out"], 1e-4)


def test_one_step_is_the_official_samplers(golden):
    case = golden["sampler"]
    z0 = restore(nadit(golden, "3b"), case["blur"][None], case["noise"][None], case["txt"])
    assert close(z0[0], case["x0"], 1e-4)


@pytest.mark.parametrize("case", [0, 1], ids=["clip", "image"])
def test_vae_is_the_official_one(golden, case):
    case, vae = part(golden, "vae", "cases", case), video_vae(golden)
    z = vae.encode(rearrange(case["x"].float(), "c t h w -> 1 t c h w"))
    x = vae.decode(z)
    assert close(rearrange(z[0], "t c h w -> c t h w"), LATENT_SCALE * case["mean"], 1e-4)
    assert close(rearrange(x[0], "t c h w -> c t h w"), case["decoded"], 1e-4)


def test_windows_are_the_official_ones(golden):
    for (kind, *grid), official in golden["windows"].items():
        ours = [[s.start, s.stop] for window in windows(tuple(grid), AREA, kind == "shifted") for s in window]
        assert ours == [list(edges) for edges in official]


@pytest.mark.parametrize("name, parameters, tensors", [("3b", 3391475776, 635), ("7b", 8239607872, 1128)])
def test_transformer_has_the_papers_size(golden, name, parameters, tensors):
    """Paper: Table 6, 3391.5 M and 8239.6 M."""
    with torch.device("meta"):
        net = NaDiT(**PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
    assert nadit(golden, name).state_dict().keys() == golden[name]["weights"].keys()


def test_vae_has_the_official_size(golden):
    with torch.device("meta"):
        vae = VideoVAE()
    assert sum(p.numel() for p in vae.parameters()) == 250648227
    assert sum(p.numel() for p in vae.encoder.parameters()) == 100046496
    assert len(vae.state_dict()) == 250
    assert video_vae(golden).state_dict().keys() == golden["vae"]["weights"].keys()


def tera(function, *args) -> float:
    """Floating-point operations of a call, in 1e12."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops() / 1e12


def test_vae_costs_what_was_counted_on_the_official_one():
    with torch.device("meta"):
        vae = VideoVAE()
        assert tera(vae.encode, torch.empty(1, 25, 3, 512, 512)) == pytest.approx(59.6, abs=0.05)
        assert tera(vae.decode, torch.empty(1, 7, 16, 64, 64)) == pytest.approx(155.9, abs=0.05)


@pytest.mark.parametrize("name, cost", [("3b", 38.2), ("7b", 60.9)])
def test_transformer_costs_what_was_counted_on_the_official_one(name, cost):
    """25 frames of 512x512, 58 tokens of text; a regular and a shifted layer cost what any other two do."""
    with torch.device("meta"):
        call = torch.empty(1, 7, 64, 64, 33), torch.empty(58, 5120), torch.empty(1)
        two, four = (tera(NaDiT(**PRESETS[name] | {"layers": n}), *call) for n in (2, 4))
    assert two + (PRESETS[name]["layers"] - 2) / 2 * (four - two) == pytest.approx(cost, abs=0.1)


# ------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize(
    "grid, size, regular, shifted",
    [
        ((5, 24, 40), (2, 16, 26), 12, 18),
        ((3, 42, 18), (1, 31, 13), 12, 12),
        ((1, 6, 10), (1, 16, 26), 1, 1),
        ((4, 16, 16), (1, 20, 20), 4, 4),
        ((7, 32, 32), (2, 20, 20), 16, 36),
        ((9, 34, 60), (3, 15, 27), 27, 36),
        ((31, 67, 120), (8, 15, 27), 100, 125),
        ((33, 45, 80), (8, 15, 27), 45, 80),
        ((120, 45, 80), (8, 15, 27), 135, 256),  # no window is longer than a quarter of 30 frames
        ((4, 35, 60), (1, 16, 27), 36, 36),  # (1 15 26) if the proxy's sides were not rounded
    ],
)
def test_window_table(grid, size, regular, shifted):
    assert window_size(grid, AREA) == size
    assert len(windows(grid, AREA, False)) == regular
    assert len(windows(grid, AREA, True)) == shifted


def random_grids(count: int) -> list[tuple[int, int, int]]:
    draw = random.Random(0)
    return [(draw.randint(1, 45), draw.randint(1, 90), draw.randint(1, 90)) for _ in range(count)]


def test_every_token_is_in_exactly_one_window():
    for grid in [*random_grids(100), (1, 1, 1), (1, 1, 9000), (2, 9000, 1)]:
        for area in (AREA, PRESETS["tiny"]["area"]):
            for shifted in (False, True):
                seen = torch.zeros(grid, dtype=torch.int32)
                for window in windows(grid, area, shifted):
                    assert all(s.stop > s.start for s in window)
                    seen[window] += 1
                assert bool((seen == 1).all())


def test_a_larger_picture_has_more_windows_not_larger_ones():
    """Paper: Sec. 3.2, the point of Eq. 2."""
    for t, h, w in random_grids(1000):
        assert window_size((t, 2 * h, 2 * w), AREA) == window_size((t, h, w), AREA)


def test_shifted_windows_cross_the_regular_ones_borders():
    grid = (7, 32, 32)
    regular = {s.start for _, s, _ in windows(grid, AREA, False)} - {0}
    for _, rows, _ in windows(grid, AREA, True):
        assert rows.start not in regular
    assert any(rows.start < 20 < rows.stop for _, rows, _ in windows(grid, AREA, True))


def test_tiny_preset_uses_several_windows_on_its_crops():
    """12 x 12 tokens are a crop of 96 x 96 pixels."""
    assert window_size((4, 12, 12), PRESETS["tiny"]["area"]) == (1, 4, 4)
    assert len(windows((4, 12, 12), PRESETS["tiny"]["area"], True)) == 4 * 4 * 4


# ------------------------------------------------------------------------------------------------------
# The transformer


def inputs(b: int, t: int, h: int, w: int, seed: int = 0, latents: int = 16, text: int = 48):
    torch.manual_seed(seed)
    return torch.randn(b, t, h, w, 2 * latents + 1), torch.randn(5, text), torch.full((b,), 1000.0)


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_batch_of_two_clips_is_two_batches_of_one(name):
    net, (x, txt, step) = small(name), inputs(2, 3, 14, 10)
    step = torch.tensor([1000.0, 371.0])
    one_by_one = [net(x[i : i + 1], txt, step[i : i + 1]) for i in range(2)]
    assert close(net(x, txt, step), torch.cat(one_by_one), 1e-5)


def test_order_of_the_text_counts_where_its_tokens_have_places():
    x, txt, step = inputs(1, 3, 14, 10)
    other = txt[torch.randperm(5, generator=torch.Generator().manual_seed(1))]
    for name, counts in {"7b": False, "3b": True}.items():
        net = small(name)
        difference = (net(x, txt, step) - net(x, other, step)).abs().max()
        assert (difference > 1e-2) if counts else (difference < 1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 2, 40), (1, 66, 2), (9, 6, 8)])
@pytest.mark.parametrize("name", ["3b", "7b"])
def test_any_grid_of_whole_tokens(name, shape):
    x, txt, step = inputs(1, *shape)
    v = small(name)(x, txt, step)
    assert v.shape == (1, *shape, 16) and bool(v.isfinite().all())


def test_with_one_layer_a_token_sees_its_window_alone():
    """Layer 0 cuts from 0; with the text's own attention left out, nothing else carries news."""
    net = small("7b", layers=1)
    x, txt, step = inputs(1, 4, 24, 24)
    changed = x.clone()
    changed[:, 0, 0, 0] += 1
    moved = (net(x, txt, step) - net(changed, txt, step))[0].abs().amax(-1) > 0
    t, h, w = (2 * s.stop if i else s.stop for i, s in enumerate(windows((4, 12, 12), net.area, False)[0]))
    assert moved[:t, :h, :w].all()
    assert not (moved[t:].any() or moved[:, h:].any() or moved[:, :, w:].any())


def test_tiny_preset_runs_on_residual_pixels():
    net = NaDiT(**PRESETS["tiny"])
    x, txt, step = inputs(2, 4, 24, 24, latents=48, text=32)
    v = net(x, txt, step)
    assert v.shape == (2, 4, 24, 24, 48)
    v.square().mean().backward()
    idle = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(0.7e6, rel=0.02)


def test_taps_are_the_tokens_after_so_many_blocks():
    net, call = small("7b"), inputs(1, 3, 14, 10)
    v, (first, last) = net(*call, taps=(1, 3))
    assert torch.equal(v, net(*call)) and first.shape == last.shape == (1, 3, 7, 5, 64)
    out = net.vid_out["proj"](last)
    assert torch.equal(rearrange(out, "b t h w (p q c) -> b t (h p) (w q) c", p=2, q=2), v)
    short = small("7b", layers=1)
    short.load_state_dict({k: v for k, v in net.state_dict().items() if k in short.state_dict()})
    assert torch.equal(short(*call, taps=(1,))[1][0], first)


def test_dtype_follows_the_weights_and_rotation_stays_exact():
    net = small("3b")
    tables = {k: v for k, v in net.state_dict().items() if k.endswith("freqs")}
    v = net.to(torch.bfloat16)(*inputs(1, 3, 14, 10))
    assert v.dtype == torch.bfloat16
    after = {k: v for k, v in net.state_dict().items() if k.endswith("freqs")}
    assert len(after) == 3 and all(torch.equal(after[k], tables[k]) for k in tables)


# ------------------------------------------------------------------------------------------------------
# The video VAE


def clip(b: int, t: int, h: int = 16, w: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, t, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("t", [1, 5, 9, 25])
def test_frames_and_latents(t):
    vae = small_vae()
    z = vae.encode(clip(1, t))
    assert z.shape == (1, 1 + (t - 1) // 4, 16, 2, 3)
    assert vae.decode(z).shape == (1, t, 3, 16, 24)


def test_latents_know_nothing_of_later_frames():
    vae, x = small_vae(), clip(1, 21)
    other = torch.cat([x[:, :9], clip(1, 12, seed=1)], dim=1)
    assert torch.equal(vae.encode(x)[:, :3], vae.encode(other)[:, :3])
    assert not torch.equal(vae.encode(x)[:, 3], vae.encode(other)[:, 3])
    z = vae.encode(x)
    assert torch.equal(vae.decode(z)[:, :9], vae.decode(z[:, :3]))


def test_slices_of_time_give_the_whole():
    vae, x = small_vae(), clip(2, 25)
    z = vae.encode(x)
    y = vae.decode(z)
    for frames in (8, 1000):
        vae.SLICE = frames
        assert close(vae.encode(x), z, 1e-5)
        assert close(vae.decode(z), y, 1e-5)


def test_vae_batch_of_two_clips_is_two_batches_of_one():
    vae, x = small_vae(), clip(2, 9)
    z = vae.encode(x)
    assert close(z, torch.cat([vae.encode(x[:1]), vae.encode(x[1:])]), 1e-5)
    assert close(vae.decode(z), torch.cat([vae.decode(z[:1]), vae.decode(z[1:])]), 1e-5)


def test_sample_of_the_posterior():
    vae, x = small_vae(), clip(1, 9)
    moments = vae.sliced(vae.encoder, rearrange(x, "b t c h w -> b c t h w"), 4)
    mean, log_variance = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    expected = LATENT_SCALE * (mean + (log_variance / 2).exp() * noise)
    z = vae.encode(x, torch.Generator().manual_seed(3))
    assert close(z, rearrange(expected, "b c t h w -> b t c h w"), 1e-6)
    assert torch.equal(vae.encode(x), vae.encode(x)) and not torch.equal(vae.encode(x), z)


def test_vae_refuses_what_is_not_4k_plus_1():
    with pytest.raises(ValueError, match="3 frames; the VAE takes 4k \\+ 1"):
        small_vae().encode(clip(1, 3))


# ------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["3b", "7b"])
def test_file_makes_the_network(tmp_path, name, suffix):
    net = small(name, area=AREA)
    path, call = tmp_path / f"seedvr2_ema_{name}{suffix}", inputs(1, 3, 14, 10)
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    assert torch.equal(NaDiT.from_file(path)(*call), net(*call))
    assert NaDiT.from_file(path, torch.bfloat16)(*call).dtype == torch.bfloat16


def test_float16_file_gives_the_same_rotation(tmp_path):
    for name in ("3b", "7b"):
        net = small(name)
        tables = {k: v for k, v in net.state_dict().items() if k.endswith("freqs")}
        half = {k: v.half() for k, v in net.state_dict().items()}
        assert not all(torch.equal(half[k].float(), tables[k]) for k in tables)
        torch.save(half, tmp_path / "half.pth")
        loaded = NaDiT.from_file(tmp_path / "half.pth").state_dict()
        assert all(torch.equal(loaded[k], tables[k]) for k in tables)


def test_file_without_rotation_tables_is_complete(tmp_path):
    net, call = small("3b", area=AREA), inputs(1, 3, 14, 10)
    torch.save({k: v for k, v in net.state_dict().items() if "freqs" not in k}, tmp_path / "a.pth")
    assert torch.equal(NaDiT.from_file(tmp_path / "a.pth")(*call), net(*call))


def test_vae_file_with_new_or_old_names_of_the_attention(tmp_path):
    torch.manual_seed(0)
    vae, x = VideoVAE(widths=(8, 8, 16, 16), groups=4), clip(1, 5)
    old = vae.state_dict()
    for new, name in OLD_NAMES.items():
        old = {k.replace(f"attentions.0.{new}", f"attentions.0.{name}"): v for k, v in old.items()}
    assert len(old.keys() - vae.state_dict().keys()) == 16
    for state in (vae.state_dict(), old):
        torch.save(state, tmp_path / "ema_vae.pth")
        again = VideoVAE.from_file(tmp_path / "ema_vae.pth")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vae.parameters(), strict=True))
        assert close(again.encode(x), vae.encode(x), 1e-5)


def test_files_of_the_golden_weights_make_the_golden_networks(golden, tmp_path):
    """Of every size: heads, layers and groups are read off the tensors, or follow from them."""
    call, x, path = inputs(1, 3, 14, 10), clip(1, 5), tmp_path / "weights.pth"
    for name in ("3b", "7b"):
        torch.save(golden[name]["weights"], path)
        assert close(NaDiT.from_file(path)(*call), nadit(golden, name)(*call), 1e-5)
    torch.save(part(golden, "vae", "weights"), path)
    assert close(VideoVAE.from_file(path).encode(x), video_vae(golden).encode(x), 1e-5)


def test_files_that_do_not_fit_are_named_in_one_line(tmp_path):
    path = tmp_path / "seedvr2_ema_3b.pth"
    net = small("3b").state_dict()

    def message(loader=NaDiT) -> str:
        with pytest.raises(WeightsError) as error:
            loader.from_file(path)
        text = str(error.value)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 500
        return text

    assert "No such file" in message()
    torch.save(net, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in message()
    path.write_bytes(b"")
    assert "cannot be read" in message()
    torch.save([1, 2], path)
    assert "holds a list" in message()
    torch.save({k: v for k, v in net.items() if k != "blocks.1.mlp.txt.proj_in.weight"}, path)
    assert "blocks.1.mlp.txt.proj_in.weight" in message()
    torch.save(small_vae().state_dict(), path)
    assert "not a transformer of SeedVR2" in message()
    torch.save(net, path)
    assert "not the video VAE of SeedVR2" in message(VideoVAE)
    path.rename(tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    assert "cannot be read" in message()


# ------------------------------------------------------------------------------------------------------
# The teacher


def seedvr2(name: str = "3b") -> SeedVR2Teacher:
    return SeedVR2Teacher(small(name), small_vae(), torch.randn(5, 48, generator=seeded(9)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_teacher_is_the_pipeline_written_out():
    """Of the official code's steps in their order, with torchvision's resize, as there."""
    teacher, lr = seedvr2(), clip(1, 5, 8, 12)
    noise = torch.randn(1, 2, 4, 6, 16, generator=seeded(1))
    x = resize(lr[0] / 2 + 0.5, [32, 48], InterpolationMode.BICUBIC).clamp(0, 1) * 2 - 1
    blur = rearrange(teacher.vae.encode(x[None]), "b t c h w -> b t h w c")
    noisy = torch.cat([noise, blur, torch.ones(1, 2, 4, 6, 1)], dim=-1)
    v = teacher.net(noisy, teacher.txt, torch.tensor([1000.0]))
    expected = teacher.vae.decode(rearrange(noise - v, "b t h w c -> b t c h w")).clamp(-1, 1)
    assert close(teacher(lr, noise=noise), expected, 1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (2, 4, 4), (4, 3, 9), (5, 8, 8), (9, 4, 5)])
def test_teacher_takes_any_clip(shape):
    t, h, w = shape
    x_t = seedvr2()(clip(1, t, h, w))
    assert x_t.shape == (1, t, 3, 4 * h, 4 * w) and x_t.dtype == torch.float32
    assert x_t.isfinite().all() and x_t.abs().max() <= 1


def test_teacher_pads_and_cuts():
    """In time with the last frame, at the sides by reflection of the enlarged clip."""
    teacher, lr = seedvr2(), clip(1, 3, 4, 8)
    longer = torch.cat([lr, repeat(lr[:, -1], "b c h w -> b n c h w", n=2)], dim=1)
    assert torch.equal(teacher(lr), teacher(longer)[:, :3])
    x = teacher.enlarge(clip(1, 1, 3, 5))
    assert x.shape == (1, 1, 3, 16, 32)
    assert torch.equal(x[..., 12:16, :], x[..., 7:11, :].flip(-2))
    assert torch.equal(x[..., 20:32], x[..., 7:19].flip(-1))


def test_teachers_batch_of_two_clips_is_two_batches_of_one():
    teacher, lr, noise = seedvr2("7b"), clip(2, 5, 8, 12), torch.randn(2, 2, 4, 6, 16, generator=seeded(1))
    one_by_one = [teacher(lr[i : i + 1], noise=noise[i : i + 1]) for i in range(2)]
    assert close(teacher(lr, noise=noise), torch.cat(one_by_one), 1e-4)


def test_noise_of_a_sample_follows_seed_and_index_alone():
    """Whatever stands beside it in a batch, so that one process and eight see the same targets."""
    teacher, lr, index = seedvr2(), clip(2, 1, 8, 8), torch.tensor([5, 2])
    both = teacher(lr, index)
    torch.rand(5)
    for i in range(2):
        assert torch.equal(both[i], teacher(lr[i : i + 1], index[i : i + 1])[0])
        assert torch.equal(both[i], teacher(lr[i : i + 1], generator=noise_of(0, int(index[i])))[0])
    assert not torch.equal(both, teacher(lr, index + 1))
    assert torch.equal(teacher(lr), teacher(lr, torch.tensor([0, 1])))  # not told, it counts from 0
    teacher.seed = 1
    assert not torch.equal(both, teacher(lr, index))


def test_given_noise_alone_goes_with_the_posteriors_mean():
    teacher, lr, noise = seedvr2(), clip(1, 1, 8, 8), torch.randn(1, 1, 4, 4, 16, generator=seeded(1))
    mean, sample = teacher(lr, noise=noise), teacher(lr, noise=noise, generator=seeded(2))
    assert torch.equal(mean, teacher(lr, noise=noise)) and not torch.equal(mean, sample)
    with torch.no_grad():
        blur = rearrange(teacher.vae.encode(teacher.enlarge(lr), seeded(2)), "b t c h w -> b t h w c")
        z0 = restore(teacher.net, blur, noise, teacher.txt)
    expected = teacher.vae.decode(rearrange(z0, "b t h w c -> b t c h w")).clamp(-1, 1)
    assert torch.equal(sample, expected)


def test_teacher_never_learns():
    teacher = seedvr2()
    assert not list(teacher.parameters()) and not teacher.training
    assert not teacher(clip(1, 1, 4, 4)).requires_grad


def test_teacher_draws_posterior_then_noise_as_the_official_code():
    """There: a sample of the latents (c t h w), turned to (t h w c) and scaled, and noise like them."""
    teacher, lr = seedvr2(), clip(1, 9, 8, 12)
    x = rearrange(teacher.enlarge(lr), "b t c h w -> b c t h w")
    moments = teacher.vae.sliced(teacher.vae.encoder, x, 4)
    torch.manual_seed(5)
    mean, log_variance = moments.chunk(2, dim=1)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape)
    blur = rearrange(z, "b c ... -> b ... c") * LATENT_SCALE
    noise = torch.randn_like(blur[0])[None]
    z0 = restore(teacher.net, blur, noise, teacher.txt)
    expected = teacher.vae.decode(rearrange(z0, "b t h w c -> b t c h w")).clamp(-1, 1)
    assert close(teacher(lr, generator=seeded(5)), expected, 1e-4)


def test_teacher_in_half_precision():
    teacher, lr = seedvr2("7b"), clip(1, 5, 8, 8)
    exact = teacher(lr)
    rounded = teacher.to(torch.bfloat16)(lr)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.fixture
def folder(tmp_path) -> Path:
    """As the hub's SeedVR2-3B with the code repository's prompt."""
    folder = tmp_path / "SeedVR2-3B"
    folder.mkdir()
    torch.save(small("3b", area=AREA).state_dict(), folder / "seedvr2_ema_3b.pth")
    torch.manual_seed(0)
    torch.save(VideoVAE((8, 8, 16, 16), 4).half().state_dict(), folder / "ema_vae.pth")
    torch.save(torch.randn(5, 48).bfloat16(), folder / "pos_emb.pt")
    return folder


def test_folder_makes_the_teacher(folder, capsys):
    lr = clip(1, 5, 8, 8)
    teacher = load_teacher(str(folder), seed=4)
    assert isinstance(teacher, SeedVR2Teacher) and teacher.seed == 4
    gb = sum(x.nbytes for x in teacher.buffers()) / 1e9
    assert capsys.readouterr().out == f"{folder}: SeedVR2Teacher, {gb:.3g} GB of weights on cpu\n"
    teacher.seed = 0
    expected = SeedVR2Teacher(small("3b", area=AREA), small_vae().half().float(), teacher.txt)
    assert torch.equal(teacher(lr), expected(lr))
    (folder / "pos_emb.pt").rename(folder.parent / "pos_emb.pt")
    sharp = folder / "seedvr2_ema_3b_sharp.pth"
    torch.save(small("3b", seed=1).state_dict(), sharp)
    again = SeedVR2Teacher.from_pretrained(folder, torch.float32)
    assert torch.equal(again(lr), expected(lr))
    named = SeedVR2Teacher.from_pretrained(sharp, torch.float32)
    assert not torch.equal(named(lr), expected(lr))


def test_teachers_are_told_apart_by_what_is_in_their_folders(tmp_path):
    said = {
        "transformer/config.json": "not a DOVE checkpoint, vae/config.json is missing",
        "seedvr2_ema_3b.pth": "SeedVR2 without its VAE",
        "ema_vae.safetensors": "SeedVR2 has no transformer",
        "00000000.mkv": "neither DOVE nor SeedVR2",
        "00000000/0.png": "neither DOVE nor SeedVR2",
    }
    for number, (file, message) in enumerate(said.items()):
        folder = tmp_path / str(number)
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
        with pytest.raises(UserError, match=message):
            load_teacher(str(folder))
        assert is_results(str(folder)) == ("neither" in message)


def test_wrong_folders_are_named_in_one_line(folder):
    def message(path: Path = folder) -> str:
        with pytest.raises(UserError) as error:
            load_teacher(str(path), dtype=torch.float32)
        text = str(error.value)
        assert str(path.parent) in text and "\n" not in text and len(text) < 500
        return text

    transformer, vae, text = (folder / n for n in ("seedvr2_ema_3b.pth", "ema_vae.pth", "pos_emb.pt"))
    weights = torch.load(transformer)

    torch.save(torch.randn(5, 40), text)
    assert "(5, 40)" in message() and "48" in message()
    text.write_bytes(b"no pickle")
    assert "not a prompt embedding" in message()
    text.unlink()
    assert "no pos_emb.pt" in message() and "in it or beside it" in message()
    torch.save(torch.randn(5, 48), text)

    whole = vae.read_bytes()
    vae.write_bytes(whole[:-100])
    assert "ema_vae.pth: cannot be read" in message()
    vae.unlink()
    assert "ema_vae.pth is missing" in message()
    vae.write_bytes(whole)

    transformer.write_bytes(transformer.read_bytes()[:1000])
    assert "seedvr2_ema_3b.pth: cannot be read" in message()
    transformer.unlink()
    assert "seedvr2_ema_3b.pth: missing" in message()
    for other in ("3b_fp16", "7b"):
        torch.save(weights, folder / f"seedvr2_ema_{other}.pth")
    assert "several transformers" in message() and "seedvr2_ema_7b.pth" in message()


def test_many_step_weights_are_refused_by_name(folder):
    def refused() -> bool:
        with pytest.raises(UserError, match="SeedVR, which takes 50 steps"):
            load_teacher(str(folder), dtype=torch.float32)
        return True

    one_step, many_steps = folder / "seedvr2_ema_3b.pth", folder / "seedvr_ema_3b.pth"
    weights = torch.load(one_step)
    one_step.unlink()
    torch.save(weights, many_steps)
    assert refused()
    one_step.symlink_to(many_steps)
    assert refused()
    one_step.unlink()
    many_steps.rename(one_step)
    assert refused()
    torch.save(weights, one_step)
    assert isinstance(load_teacher(str(folder), dtype=torch.float32), SeedVR2Teacher)


# ------------------------------------------------------------------------------------------------------
# Its videos in training


def test_cache_of_its_videos_is_a_command_and_holds_what_training_would_compute(folder, tmp_path):
    out, script = tmp_path / "cache", Path(train_stage1.__file__).with_name("cache.py")
    flags = "--preset smoke --frames 3 --size 64 --clips 2 --teacher".split() + [str(folder)]
    subprocess.run([sys.executable, str(script), *flags, "--out", str(out)], check=True)
    assert json.loads((out / "cache.json").read_text())["teacher"] == "SeedVR2-3B"
    clips = TrainingClips(Sources(procedural=1.0, frames=3, size=64))
    teacher = load_teacher(str(folder))
    for number in range(2):
        x_t = teacher(to_network(clips[number]["lr"][None]), torch.tensor([number]))
        stored = read_clip(out / "teacher" / f"{number:08d}.mkv")
        assert np.array_equal(stored, to_frames(to_uint8(x_t)[0]))
    cached = CachedClips(out, clips, str(folder))
    assert cached[0]["target"].shape == (3, 3, 64, 64)


def logged(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_both_stages_learn_from_it_in_the_loop(folder, tmp_path, monkeypatch):
    """Table 4's row; stage 2 takes the teacher over from stage 1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small, pixel = dict(frames=2, size=64, batch=2, steps=1), {}
    for teacher in ("gt", str(folder)):
        out = str(tmp_path / Path(teacher).name)
        train_stage1.main(replace(train_stage1.PRESETS["smoke"], **small, teacher=teacher, out=out))
        pixel[teacher] = logged(out)[0]["pixel"]
    assert pixel["gt"] != pixel[str(folder)]  # of the same clips and student
    first, out = newest_checkpoint(out), str(tmp_path / "stage2")
    flags = "--preset smoke --steps 1 --init".split() + [str(first), "--out", out]
    cfg = train_stage2.configure(flags)
    assert cfg.teacher == str(folder)
    train_stage2.main(cfg)
    assert logged(out)[0]["pixel"] > 0 and newest_checkpoint(out).name == "step_000001"
