"""teacher.py: DOVE's steps against a slow recomputation, feature targets, and a cache that survives kills."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

import teacher
from data import DataError, TrainingClips, loader, real_clips
from model import PRESETS as STUDENTS
from model import AdcVSR, HalfDecoder, WeightsError
from runtime import UserError, World
from teacher import (
    EMPTY_PROMPT,
    PRESETS,
    CachedClips,
    Config,
    DoveTeacher,
    FeatureEncoder,
    TeacherError,
    load_teacher,
    main,
    noise,
    write_clip,
)
from video import VideoWriter, read_clip, to_network, to_uint8

ROOT = Path(teacher.__file__).parent
SCHEDULER = dict(  # of CogVideoX1.5-5B
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0,
    timestep_spacing="trailing",
)  # fmt: skip
TINY_TRANSFORMER = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, patch_size=2,
    patch_size_t=2, text_embed_dim=24, time_embed_dim=16, max_text_seq_length=5, sample_width=300,
    sample_height=300, sample_frames=81, use_rotary_positional_embeddings=True, patch_bias=False,
)  # fmt: skip
TINY_VAE = dict(
    block_out_channels=(4, 4, 4, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    scaling_factor=0.7, sample_height=96, sample_width=96,
)  # fmt: skip
FULL_TRANSFORMER = dict(
    num_attention_heads=48, attention_head_dim=64, in_channels=16, out_channels=16, num_layers=42,
    patch_size=2, patch_size_t=2, text_embed_dim=4096, time_embed_dim=512, sample_width=300,
    sample_height=300, sample_frames=81, use_rotary_positional_embeddings=True, patch_bias=False,
)  # fmt: skip
FULL_VAE = dict(
    block_out_channels=(128, 256, 256, 512), latent_channels=16, layers_per_block=3, scaling_factor=0.7
)  # fmt: skip


@pytest.fixture(scope="module")
def dove(tmp_path_factory) -> Path:
    """A DOVE checkpoint folder in the official layout, small and random, its transformer in shards."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    place = tmp_path_factory.mktemp("checkpoints")
    folder = place / "DOVE"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = CogVideoXTransformer3DModel(**TINY_TRANSFORMER)
        for p in transformer.parameters():  # away from the initial values, most of which are near zero
            p.data += 0.1 * torch.randn_like(p)
        transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
        AutoencoderKLCogVideoX(**TINY_VAE).save_pretrained(folder / "vae")
        CogVideoXDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
        (place / "prompt_embeddings").mkdir()
        prompt = {"prompt_embedding": torch.randn(5, 24)}
        save_file(prompt, place / "prompt_embeddings" / f"{EMPTY_PROMPT}.safetensors")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) >= 4
    return folder


def load(folder: Path, **options) -> DoveTeacher:
    return DoveTeacher.from_pretrained(folder, **{"dtype": torch.float32, **options})


def clip_of(b: int, t: int, h: int, w: int) -> torch.Tensor:
    """8-bit frames in [-1, 1]: half noise, half a smooth picture."""
    rng = torch.Generator().manual_seed(h + 10 * t)
    smooth = 128 + 100 * torch.sin(torch.arange(h)[:, None] / 5 + torch.arange(w) / 7)
    return to_network((0.5 * smooth + 127 * torch.rand(b, t, 3, h, w, generator=rng)).byte())


# ----------------------------------------------------------------- DOVE, step by step


def bilinear_matrix(n: int) -> torch.Tensor:
    """(4n n): output i looks at (i + 0.5) / 4 - 0.5, between the two nearest inputs, clamped at the ends."""
    matrix = torch.zeros(4 * n, n)
    for i in range(4 * n):
        place = max((i + 0.5) / 4 - 0.5, 0.0)
        low = int(place)
        matrix[i, low] += 1 - (place - low)
        matrix[i, min(low + 1, n - 1)] += place - low
    return matrix


def rotary_by_hand(t: int, h: int, w: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position / 10000^(2k/d): a quarter of the head for time, three eighths for y and x."""
    rows = []
    for position in np.ndindex(t, h, w):
        angles = []
        for where, d in zip(position, (head // 4, head // 8 * 3, head // 8 * 3)):
            for k in range(d // 2):
                angles += 2 * [where / 10000 ** (2 * k / d)]
        rows.append(angles)
    angles = torch.tensor(rows, dtype=torch.float64)
    return angles.cos().float(), angles.sin().float()


def cumulative_alphas() -> list[float]:
    """CogVideoX1.5's: betas linear in their square root, square roots shifted and scaled to end at 0."""
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    roots = [math.prod(1 - b for b in betas[: i + 1]) ** 0.5 for i in range(1000)]
    return [((r - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for r in roots]


def slow_dove(dove: DoveTeacher, clip: torch.Tensor, seed: int | None) -> torch.Tensor:
    """The eight steps for one clip (t 3 h w) in [-1, 1], in the order and the ranges of DOVE itself."""
    t, _, h, w = clip.shape
    frames = [(frame + 1) * 127.5 for frame in clip]  # 0..255
    while (len(frames) - 1) % 8:
        frames.append(frames[-1])
    high, wide = -(-h // 16) * 16, -(-w // 16) * 16
    enlarged = []
    for frame in frames:
        padded = torch.zeros(3, high, wide)
        padded[:, :h, :w] = frame
        enlarged.append(bilinear_matrix(high) @ padded @ bilinear_matrix(wide).T)
    x = torch.stack(enlarged, dim=1)[None] / 255 * 2 - 1  # (1 3 t h w)
    z = dove.vae.encode(x).latent_dist
    if seed is not None:
        z = z.mean + z.std * torch.randn(z.mean.shape, generator=torch.Generator().manual_seed(seed))
    else:
        z = z.mean
    z = z * 0.7
    odd = z.shape[2] % 2
    if odd:
        z = torch.cat([z[:, :, :1], z], dim=2)
    _, _, n, y, x = z.shape
    v = dove.transformer(
        hidden_states=z.permute(0, 2, 1, 3, 4), encoder_hidden_states=dove.prompt[None],
        timestep=torch.tensor([399]), return_dict=False,
        image_rotary_emb=rotary_by_hand(n // 2, y // 2, x // 2, 16),
    )[0].permute(0, 2, 1, 3, 4)  # fmt: skip
    abar = cumulative_alphas()[399]
    z = abar**0.5 * z - (1 - abar) ** 0.5 * v
    sr = dove.vae.decode(z[:, :, odd:] / 0.7).sample[0].permute(1, 0, 2, 3)
    return (sr * 0.5 + 0.5).clamp(0, 1)[:t, :, : 4 * h, : 4 * w] * 2 - 1


LONG = [
    pytest.param(size, sample, marks=pytest.mark.slow)
    for size in ((6, 17, 31), (9, 16, 16), (25, 15, 31)) for sample in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("size", "sample"), [((1, 17, 9), False), ((6, 9, 13), True), *LONG])
def test_dove_equals_its_slow_recomputation(dove, size, sample):
    teacher_, clip = load(dove, sample=sample), clip_of(1, *size)
    fast = teacher_(clip, torch.Generator().manual_seed(42))
    with torch.no_grad():
        slow = slow_dove(teacher_, clip[0], 42 if sample else None)
    t, h, w = size
    assert fast.shape == (1, t, 3, 4 * h, 4 * w) and fast.abs().max() <= 1
    assert slow.std() > 0.05  # there is something to compare
    torch.testing.assert_close(fast[0], slow, atol=1e-4, rtol=0)


def test_each_clip_of_a_batch_is_taken_on_its_own(dove):
    teacher_, clips = load(dove, sample=False), clip_of(2, 1, 16, 16)
    both = teacher_(clips)
    for one, clip in zip(both, clips):
        torch.testing.assert_close(one, teacher_(clip[None])[0], atol=1e-5, rtol=0)


def test_the_posterior_follows_its_generator_alone(dove):
    teacher_, clip = load(dove), clip_of(1, 1, 16, 16)
    one = teacher_(clip, noise(seed=3, index=12))
    torch.rand(5)
    assert torch.equal(one, teacher_(clip, noise(seed=3, index=12)))
    others = [teacher_(clip, noise(3, 13)), teacher_(clip, noise(4, 12)), load(dove, sample=False)(clip)]
    assert not any(torch.equal(one, other) for other in others)


def test_the_step_has_the_constants_of_v_prediction_at_399(dove):
    scheduler = load(dove).scheduler
    assert scheduler.alphas_cumprod[399].item() == pytest.approx(0.393544, abs=1e-6)
    assert cumulative_alphas()[399] == pytest.approx(0.393544, abs=1e-6)
    one, zero, step = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([399])
    assert scheduler.get_velocity(zero, one, step).item() == pytest.approx(0.627331, abs=1e-6)  # of z
    assert scheduler.get_velocity(one, zero, step).item() == pytest.approx(-0.778753, abs=1e-6)  # of v
    one, zero = one.bfloat16(), zero.bfloat16()
    assert scheduler.get_velocity(zero, one, step).item() == 0.625
    assert scheduler.get_velocity(one, zero, step).item() == -0.78125


def test_the_full_size_networks_have_their_documented_parameters():
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    with torch.device("meta"):
        transformer, vae = CogVideoXTransformer3DModel(**FULL_TRANSFORMER), AutoencoderKLCogVideoX(**FULL_VAE)
    assert sum(p.numel() for p in transformer.parameters()) == 5_570_676_352
    assert sum(p.numel() for p in vae.parameters()) == 215_583_907


def test_dove_runs_in_bfloat16_and_stays_close(dove):
    clip = clip_of(1, 1, 16, 16)
    whole, half = (load(dove, dtype=dtype, sample=False) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {half.prompt.dtype} == {torch.bfloat16}
    assert half(clip).dtype == torch.float32
    assert (half(clip) - whole(clip)).abs().mean() < 0.02


def test_tiles_change_how_the_vae_works_and_keep_the_size(dove):
    clip = clip_of(2, 1, 16, 16)
    whole, tiled = load(dove, sample=False)(clip), load(dove, sample=False, tiling=True)(clip)
    assert whole.shape == tiled.shape and not torch.equal(whole, tiled)


def test_one_weight_file_loads_like_many(dove, tmp_path):
    network = load(dove)
    network.transformer.save_pretrained(tmp_path / "DOVE" / "transformer")
    network.vae.save_pretrained(tmp_path / "DOVE" / "vae")
    network.scheduler.save_pretrained(tmp_path / "DOVE" / "scheduler")
    inside = tmp_path / "DOVE" / "prompt_embeddings"
    inside.mkdir()
    save_file({"prompt_embedding": network.prompt.clone()}, inside / "empty.safetensors")
    clip = clip_of(1, 1, 16, 16)
    assert torch.equal(load(tmp_path / "DOVE")(clip, noise(0, 0)), network(clip, noise(0, 0)))


class Parent(nn.Module):
    def __init__(self, child: nn.Module):
        super().__init__()
        self.child = child


def assert_frozen(network: nn.Module) -> None:
    """No weight learns and no module leaves evaluation mode, whatever happens to the parent."""
    Parent(network).train()
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_the_teacher_and_the_encoder_stay_frozen(dove):
    clip = clip_of(1, 1, 16, 16).requires_grad_()
    for network in (load(dove), FeatureEncoder.seeded(STUDENTS["tiny"])):
        assert_frozen(network)
        assert not network(clip).requires_grad


# ----------------------------------------------------------------- folders that are not right


def assert_one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert isinstance(error.value, UserError) and "\n" not in text and all(w in text for w in words), text


@pytest.fixture
def copy(dove, tmp_path) -> Path:
    """The checkpoint folder, free to be damaged."""
    subprocess.run(["cp", "-r", str(dove.parent), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy" / "DOVE"


def test_no_transformer_is_one_line(copy):
    (copy / "transformer" / "config.json").unlink()
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "not a DOVE checkpoint", "transformer/config.json")


def test_half_of_the_shards_missing_is_one_line_with_their_number(copy):
    shards = sorted((copy / "transformer").glob("*-of-*.safetensors"))
    for shard in shards[::2]:
        shard.unlink()
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, f"{len(shards[::2])} of {len(shards)} weight files missing", shards[0].name)


def test_a_truncated_shard_is_one_line(copy):
    shard = sorted((copy / "transformer").glob("*-of-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "transformer", "Is the download complete?")


def test_weights_of_another_network_are_one_line(copy, capfd):
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "missing or unknown", "transformer_blocks.2")
    assert "newly initialized" not in capfd.readouterr().err


def test_an_embedding_of_the_wrong_width_or_absent_is_one_line(copy, tmp_path):
    wide = tmp_path / "wide.safetensors"
    save_file({"prompt_embedding": torch.zeros(5, 32)}, wide)
    with pytest.raises(TeacherError) as error:
        load(copy, prompt_embedding=wide)
    assert_one_line(error, "(5, 32)", "24")
    save_file({"something": torch.zeros(5, 24)}, wide)
    with pytest.raises(TeacherError) as error:
        load(copy, prompt_embedding=str(wide))
    assert_one_line(error, "prompt_embedding")
    (copy.parent / "prompt_embeddings" / f"{EMPTY_PROMPT}.safetensors").unlink()
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "prompt_embeddings/", "--prompt-embedding")


def test_teachers_are_gt_dove_or_results_with_a_cache(dove, tmp_path):
    assert load_teacher("gt") is None
    assert isinstance(load_teacher(str(dove), "", "cpu", torch.float32), DoveTeacher)
    with pytest.raises(TeacherError) as error:
        load_teacher(str(tmp_path))
    assert_one_line(error, "--teacher-cache")
    with pytest.raises(TeacherError) as error:
        load_teacher(str(tmp_path / "absent"))
    assert_one_line(error, "absent", "not a DOVE checkpoint")


# ----------------------------------------------------------------- feature targets


def sd_vae():
    """An AutoencoderKL of SD2.1's topology, narrow."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1, block_out_channels=[8, 8, 16, 16], norm_num_groups=4, latent_channels=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A VAE folder and a halfDecoder.ckpt of the official names and shapes, with the rest of its training."""
    place = tmp_path_factory.mktemp("sd")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        sd_vae().save_pretrained(place / "sd21" / "vae")
        decoder = HalfDecoder(STUDENTS["full"])
        state = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
        state |= {
            "decoder.conv_in.weight": torch.randn(256, 4, 3, 3),
            "decoder.conv_in.bias": torch.randn(256),
        }
    torch.save({"state_dict": state | {"encoder.x": torch.zeros(1)}}, place / "halfDecoder.ckpt")
    return {"vae": place / "sd21", "half_decoder": place / "halfDecoder.ckpt"}


def test_features_are_the_latent_mean_through_the_original_half_decoder(files):
    from diffusers import AutoencoderKL

    encoder, clip = FeatureEncoder.from_pretrained(**files), clip_of(2, 3, 64, 64)
    vae = AutoencoderKL.from_pretrained(files["vae"], subfolder="vae")
    state = torch.load(files["half_decoder"])["state_dict"]
    decoder = HalfDecoder(STUDENTS["full"])
    decoder.load_state_dict({k[8:]: v for k, v in state.items() if k[8:] in decoder.state_dict()})
    f = encoder(clip)
    assert f.shape == (2, 3, 256, 8, 8)
    with torch.no_grad():
        for i, j in np.ndindex(2, 3):
            z = vae.post_quant_conv(vae.encode(clip[i, j][None]).latent_dist.mean)
            z = nn.functional.conv2d(
                z, state["decoder.conv_in.weight"], state["decoder.conv_in.bias"], padding=1
            )
            torch.testing.assert_close(f[i, j], decoder.mid_block(z)[0], atol=1e-4, rtol=1e-4)


def test_the_vae_may_be_named_by_its_own_folder_or_its_parent(files):
    clip = clip_of(1, 1, 64, 64)
    one, other = (
        FeatureEncoder.from_pretrained(folder, files["half_decoder"])(clip)
        for folder in (files["vae"], str(files["vae"] / "vae"))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("lr", [(16, 32), (20, 30)], ids=["multiples of 16", "others"])
def test_features_lie_on_the_grid_of_the_students_own(lr):
    student = AdcVSR(**{**STUDENTS["tiny"], "unet_channels": [16] * 4, "heads": [1] * 4, "pixel_skip": False})
    encoder = FeatureEncoder.seeded(student.config)
    with torch.no_grad():
        _, f_s = student(clip_of(1, 2, *lr), return_features=True)
    assert encoder(clip_of(1, 2, 4 * lr[0], 4 * lr[1])).shape == f_s.shape


def test_the_seeded_encoder_follows_its_seed_and_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    one, again, other = (FeatureEncoder.seeded(STUDENTS["tiny"], seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    clip = clip_of(1, 1, 64, 64)
    assert torch.equal(one(clip), again(clip)) and not torch.equal(one(clip), other(clip))
    assert one(clip).std() > 0.05


def test_files_that_do_not_fit_the_encoder_are_one_line(files, tmp_path):
    with pytest.raises(TeacherError) as error:
        FeatureEncoder.from_pretrained(tmp_path / "absent", files["half_decoder"])
    assert_one_line(error, "--vae", "absent")
    state = torch.load(files["half_decoder"])["state_dict"]
    del state["decoder.mid_block.resnets.0.conv1.weight"]
    torch.save(state, tmp_path / "less.ckpt")
    with pytest.raises(WeightsError) as error:
        FeatureEncoder.from_pretrained(files["vae"], tmp_path / "less.ckpt")
    assert_one_line(error, "mid_block.resnets.0.conv1.weight", "missing")


# ----------------------------------------------------------------- the cache

SMOKE = replace(PRESETS["smoke"], frames=3, size=64, clips=5)


def make(cfg: Config, out: Path, **changes) -> Path:
    main(replace(cfg, out=str(out), **changes))
    return out


def clips_of(cfg: Config, **changes) -> TrainingClips:
    given = {"procedural": 1.0, "frames": cfg.frames, "size": cfg.size, "seed": cfg.seed, **changes}
    return TrainingClips(None, None, **given)


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def cached(dove, tmp_path_factory) -> Path:
    """A cache of DOVE's results."""
    return make(SMOKE, tmp_path_factory.mktemp("caches") / "dove", teacher=str(dove))


def test_the_cache_holds_what_training_would_have_computed_bit_for_bit(dove, cached):
    clips, network = clips_of(SMOKE), load(dove)
    assert len(files_of(cached)) == 3 * 5 + 1
    for number in (0, 4):
        sample = clips[number]
        x_t = to_uint8(network(to_network(sample["lr"][None]), noise(0, number)))[0]
        for kind, clip in {"lr": sample["lr"], "hr": sample["hr"], "teacher": x_t}.items():
            stored = read_clip(cached / kind / f"{number:08d}.mkv")
            assert np.array_equal(stored, rearrange(clip.numpy(), "t c h w -> t h w c"))


def test_any_colours_survive_the_file(tmp_path):
    clip = torch.randint(0, 256, (2, 3, 20, 36), dtype=torch.uint8)
    write_clip(tmp_path / "1.mkv", clip)
    assert torch.equal(rearrange(torch.from_numpy(read_clip(tmp_path / "1.mkv")), "t h w c -> t c h w"), clip)


def until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_cache_killed_and_resumed_equals_the_straight_one_and_nothing_is_made_twice(tmp_path):
    straight = make(SMOKE, tmp_path / "straight")
    killed = tmp_path / "killed"
    flags = "--preset smoke --frames 3 --clips 5 --out".split()
    process = subprocess.Popen([sys.executable, str(ROOT / "teacher.py"), *flags, str(killed)], stderr=-1)
    until(lambda: len(list(killed.glob("hr/0*[0-9].mkv"))) >= 2, process)
    process.kill()
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in killed.rglob("*[0-9].mkv") if "partial" not in p.name}
    assert 4 <= len(before) < 10, "the moment was missed"
    (killed / "lr" / "00000004.partial.mkv").write_bytes(b"half a clip")  # however far the kill let it come
    make(SMOKE, killed)
    assert files_of(killed) == files_of(straight)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_shares_of_two_processes_make_the_whole_cache(tmp_path, monkeypatch):
    straight = make(SMOKE, tmp_path / "straight")
    for rank in range(2):
        monkeypatch.setattr(teacher, "init_world", lambda rank=rank: World(rank, 2, torch.device("cpu")))
        make(SMOKE, tmp_path / "shared")
        assert len(list((tmp_path / "shared" / "hr").iterdir())) == (3, 5)[rank]
    assert files_of(straight) == files_of(tmp_path / "shared")


@pytest.mark.slow
def test_torchrun_makes_the_same_cache_as_one_process(dove, cached, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--preset", "smoke", "--frames", "3", "--clips", "5", "--teacher", str(dove)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(ROOT / "teacher.py"), *flags, "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, env=environment)
    assert files_of(tmp_path / "two") == files_of(cached)


def test_a_cache_of_other_settings_is_refused_and_left_alone(cached, dove):
    before = files_of(cached)
    with pytest.raises(TeacherError) as error:
        make(SMOKE, cached, teacher=str(dove), size=32, seed=1)
    assert_one_line(error, "size was 64, now 32", "seed was 0, now 1")
    with pytest.raises(TeacherError) as error:
        make(SMOKE, cached)
    assert_one_line(error, "teacher was DOVE, now gt")
    assert files_of(cached) == before


def test_a_full_disk_is_one_line_and_leaves_no_half_clip(tmp_path):
    make(SMOKE, tmp_path / "cache", clips=1)
    (tmp_path / "cache" / "hr" / "00000000.mkv").unlink()
    kept = files_of(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # the system refuses larger files
    try:
        with pytest.raises(UserError) as error:
            make(SMOKE, tmp_path / "cache", clips=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(error, "00000000.mkv", "cannot be written")
    assert files_of(tmp_path / "cache") == kept


# ----------------------------------------------------------------- training from the cache


def test_cached_samples_are_those_of_training_with_a_target(dove, cached):
    clips = CachedClips(cached, clips_of(SMOKE, real_types=True, seed=7), str(dove))
    batch = next(iter(loader(clips, 0, 1, rank=0, world=1, batch=2, workers=0)))
    plain = next(iter(loader(clips.clips, 0, 1, rank=0, world=1, batch=2, workers=0)))
    assert batch.keys() == plain.keys() | {"target"}
    shapes = {"lr": (2, 3, 3, 16, 16), "hr": (2, 3, 3, 64, 64), "target": (2, 3, 3, 64, 64)}
    assert {k: tuple(batch[k].shape) for k in shapes} == shapes
    assert all(batch[k].dtype == torch.uint8 for k in shapes)
    for name, clip in real_clips(plain).items():  # from the source files, as without a cache
        assert torch.equal(real_clips(batch)[name], clip)


def test_a_cached_sample_is_a_function_of_seed_and_index(dove, cached):
    clips, again, other = (CachedClips(cached, clips_of(SMOKE, seed=s), str(dove)) for s in (0, 0, 1))
    indices = range(6)
    assert all(torch.equal(clips[i]["lr"], again[i]["lr"]) for i in indices[::-1])
    assert any(not torch.equal(clips[i]["lr"], other[i]["lr"]) for i in indices)


def unflipped(clip: torch.Tensor) -> Iterator[torch.Tensor]:
    """The eight ways in which a clip (t c h w) can have been flipped."""
    for k in range(8):
        flipped = clip.flip([axis for bit, axis in ((1, 2), (2, 3)) if k & bit])
        yield flipped.transpose(2, 3) if k & 4 else flipped


def test_a_pass_shows_every_clip_once_flipped_alike_in_lr_hr_and_target(dove, cached):
    clips, seen, ways = CachedClips(cached, clips_of(SMOKE), str(dove)), [], set()
    stored = [[clips.read(kind, f"{n:08d}") for kind in ("lr", "hr", "target")] for n in range(5)]
    for index in range(15):
        sample = clips[index]
        triple = [sample[kind] for kind in ("lr", "hr", "target")]
        for number, way in np.ndindex(5, 8):
            if torch.equal(list(unflipped(stored[number][1]))[way], triple[1]):
                seen.append(number)
                ways.add(way)
                assert all(torch.equal(list(unflipped(a))[way], b) for a, b in zip(stored[number], triple))
        small = nn.functional.avg_pool2d(sample["hr"].float(), 4)
        pair = torch.stack([small.flatten(), sample["lr"].float().flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.5
    assert [sorted(seen[k : k + 5]) for k in range(0, 15, 5)] == [list(range(5))] * 3
    assert len(ways) > 4


def test_without_a_teacher_the_target_is_hr(tmp_path):
    sample = CachedClips(make(SMOKE, tmp_path / "gt"), clips_of(SMOKE), "gt")[3]
    assert torch.equal(sample["target"], sample["hr"])


def test_an_incomplete_cache_is_used_as_far_as_it_goes_and_an_empty_one_refused(tmp_path, capsys):
    cache = make(SMOKE, tmp_path / "gt")
    for number in (0, 3):
        (cache / "hr" / f"{number:08d}.mkv").unlink()
    (cache / "hr" / "00000000.partial.mkv").touch()
    capsys.readouterr()
    clips = CachedClips(cache, clips_of(SMOKE), "gt")
    assert clips.names == ["00000001", "00000002", "00000004"]
    assert capsys.readouterr().out.count("\n") == 1
    for file in (cache / "lr").iterdir():
        file.unlink()
    with pytest.raises(TeacherError) as error:
        CachedClips(cache, clips_of(SMOKE), "gt")
    assert_one_line(error, "no clip is in all of them")


def test_settings_that_change_the_clips_must_be_those_of_the_cache(dove, cached, tmp_path):
    with pytest.raises(TeacherError) as error:
        other = clips_of(SMOKE, frames=4, size=32, degradation="dove", stride=2, sharpen=True)
        CachedClips(cached, other, "elsewhere/STAR")
    assert_one_line(error, "frames", "size", "degradation", "stride", "sharpen", "teacher was DOVE, now STAR")
    sample = CachedClips(cached, clips_of(SMOKE), "gt")[3]  # every cache has HR and LR
    assert torch.equal(sample["target"], sample["hr"])
    with pytest.raises(TeacherError) as error:
        CachedClips(tmp_path, clips_of(SMOKE), "gt")
    assert_one_line(error, "not a cache")
    CachedClips(cached, clips_of(SMOKE, seed=5), str(dove))  # the seed only orders them


def write_results(cached: Path, folder: Path, suffix: str, frames: int = 3) -> None:
    """Another method's results: CACHE/lr with every pixel repeated."""
    folder.mkdir()
    for path in sorted((cached / "lr").iterdir()):
        big = read_clip(path)[:frames].repeat(4, axis=1).repeat(4, axis=2)
        with VideoWriter(folder / f"{path.stem}{suffix}", 64, 64, rate=25) as writer:
            for frame in big:
                writer.write(frame)


@pytest.mark.parametrize("suffix", ["", ".mp4"], ids=["folders of frames", "videos"])
def test_another_methods_results_become_the_targets(cached, tmp_path, suffix):
    write_results(cached, tmp_path / "seedvr2", suffix)
    sample = CachedClips(cached, clips_of(SMOKE), str(tmp_path / "seedvr2"))[1]
    expected = sample["lr"].repeat_interleave(4, 2).repeat_interleave(4, 3)
    difference = (sample["target"].float() - expected.float()).abs().mean()
    assert difference == 0 if suffix == "" else difference < 12  # H.264 loses a little


@pytest.mark.parametrize("workers", [0, 1])
def test_a_result_of_the_wrong_length_is_one_line_naming_the_clip(cached, tmp_path, workers):
    write_results(cached, tmp_path / "short", "", frames=2)
    clips = CachedClips(cached, clips_of(SMOKE), str(tmp_path / "short"))
    with pytest.raises(DataError) as error:
        next(iter(loader(clips, 0, 1, rank=0, world=1, batch=1, workers=workers)))
    assert_one_line(error, "short/0000000", "2 frames of 64x64", "expected 3")


@pytest.mark.slow
def test_importing_is_quick_since_diffusers_waits():
    code = "import sys, teacher; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
