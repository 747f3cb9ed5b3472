"""teacher.py: DOVE's steps against a slow recomputation, its noise on every rank, and feature targets."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_model import Convolutions
from torch import nn

import teacher
from data import Sources, TrainingClips, loader, micro_batches, to_inputs
from model import PRESETS as STUDENTS
from model import AdcVSR, HalfDecoder
from runtime import UserError, WeightsError, World
from teacher import (
    EMPTY_PROMPT,
    DoveTeacher,
    FeatureEncoder,
    TeacherError,
    VAEEncoder,
    load_teacher,
    noise_of,
)
from video import to_network

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
    return write_dove(tmp_path_factory.mktemp("checkpoints"))


def write_dove(place: Path) -> Path:
    """A DOVE checkpoint folder in the official layout, small and random, its transformer in shards."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

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


def slow_dove(dove: DoveTeacher, clip: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
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
    if generator:
        z = z.mean + z.std * torch.randn(z.mean.shape, generator=generator)
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
    seed = 42 if sample else None
    teacher_, clip = load(dove, seed=seed), clip_of(1, *size)
    fast = teacher_(clip, torch.tensor([7]))
    with torch.no_grad():
        slow = slow_dove(teacher_, clip[0], noise_of(seed, 7) if sample else None)
    t, h, w = size
    assert fast.shape == (1, t, 3, 4 * h, 4 * w) and fast.abs().max() <= 1
    assert slow.std() > 0.05  # there is something to compare
    torch.testing.assert_close(fast[0], slow, atol=1e-4, rtol=0)


def test_each_clip_of_a_batch_is_taken_on_its_own(dove):
    teacher_, clips = load(dove), clip_of(2, 1, 16, 16)
    both = teacher_(clips, torch.tensor([5, 2]))
    for one, clip, index in zip(both, clips, (5, 2)):
        torch.testing.assert_close(one, teacher_(clip[None], torch.tensor([index]))[0], atol=1e-5, rtol=0)


def test_the_posterior_follows_seed_and_index_alone(dove):
    teacher_, clip, twelve = load(dove, seed=3), clip_of(1, 1, 16, 16), torch.tensor([12])
    one = teacher_(clip, twelve)
    torch.rand(5)
    assert torch.equal(one, teacher_(clip, twelve))
    others = [teacher_(clip, twelve + 1), teacher_(clip), load(dove, seed=4)(clip, twelve)]
    assert not any(torch.equal(one, other) for other in [*others, load(dove, seed=None)(clip)])
    assert torch.equal(teacher_(clip), teacher_(clip, torch.tensor([0])))  # not told, it counts from 0


def targets(dove: Path, rank: int, processes: int) -> dict[int, torch.Tensor]:
    """x_T by sample, as a process of a run sees them whose teacher is in the loop."""
    cfg, world = SimpleNamespace(steps=2, batch=4, workers=0), World(rank, processes, torch.device("cpu"))
    clips, network, seen = TrainingClips(Sources(procedural=1, frames=1, size=64), seed=9), load(dove), {}
    for step, batch in enumerate(loader(clips, 0, cfg, world)):
        torch.manual_seed(hash((step, rank)))  # as training does
        for part in map(to_inputs, micro_batches(batch, 2 // processes, world.device)):
            seen |= dict(zip(part["index"].tolist(), network(part["lr"], part["index"])))
    return seen


def test_one_process_and_two_see_the_same_targets(dove):
    alone, shared = targets(dove, 0, 1), targets(dove, 0, 2) | targets(dove, 1, 2)
    assert alone.keys() == shared.keys() == set(range(8))
    for index, x_t in alone.items():
        torch.testing.assert_close(shared[index], x_t, atol=1e-5, rtol=0)
        assert not torch.equal(x_t, alone[(index + 1) % 8])


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
    whole, half = (load(dove, dtype=dtype, seed=None) for dtype in (torch.float32, torch.bfloat16))
    assert {x.dtype for x in half.buffers() if x.is_floating_point()} == {torch.bfloat16}
    assert half(clip).dtype == torch.float32
    assert (half(clip) - whole(clip)).abs().mean() < 0.02


def test_the_vae_works_in_tiles_where_the_reference_does(dove):
    """Up to the size of a tile, 48x48 here, the VAE is whole; larger frames are the reference's tiles."""
    from diffusers import AutoencoderKLCogVideoX

    teacher_ = load(dove, seed=None)
    whole = AutoencoderKLCogVideoX.from_pretrained(dove / "vae")
    tiled = AutoencoderKLCogVideoX.from_pretrained(dove / "vae")
    tiled.enable_tiling()
    for side, equal in (48, True), (64, False):
        clip = clip_of(1, 1, side, side)
        with torch.no_grad():
            z = teacher_.encode(clip, [0]).transpose(1, 2) / 0.7
            means = [vae.encode(clip.transpose(1, 2)).latent_dist.mean for vae in (tiled, whole)]
        far = [(z - mean).abs().max() for mean in means]
        assert far[0] < 1e-6 and (far[1] < 1e-6) == equal


def test_at_the_papers_size_the_reference_tiles(dove):
    from diffusers import AutoencoderKLCogVideoX

    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(**FULL_VAE)
    teacher_ = DoveTeacher(nn.Identity(), vae, None, torch.zeros(5, 24), 0)
    assert teacher_.vae.use_tiling and teacher_.vae.use_slicing
    assert (vae.tile_sample_min_height, vae.tile_sample_min_width) == (240, 360)  # of 512x512


def test_one_weight_file_loads_like_many(dove, tmp_path):
    from diffusers import CogVideoXTransformer3DModel

    whole = tmp_path / "DOVE"
    CogVideoXTransformer3DModel.from_pretrained(dove / "transformer").save_pretrained(whole / "transformer")
    for part in "vae", "scheduler":
        (whole / part).symlink_to(dove / part)
    (whole / "prompt_embeddings").mkdir()  # inside the folder, and under another name
    prompt = {"prompt_embedding": load(dove).prompt.clone()}
    save_file(prompt, whole / "prompt_embeddings" / "empty.safetensors")
    assert len(list((whole / "transformer").glob("*.safetensors"))) == 1
    one, many, clip = load(whole), load(dove), clip_of(1, 1, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), many.buffers(), strict=True))
    # Where in memory a file's weights lie decides which kernels a CPU takes: the last bits may differ.
    torch.testing.assert_close(one(clip), many(clip), rtol=0, atol=1e-5)


def test_the_teacher_and_the_encoder_stay_frozen(dove):
    """Whatever happens to a parent: no weight to learn, and training mode changes nothing."""
    clip = clip_of(1, 1, 16, 16).requires_grad_()
    for network in load(dove), FeatureEncoder.seeded(STUDENTS["tiny"]):
        before = network(clip)
        parent = nn.ModuleList([network])
        parent.train().requires_grad_(True)
        assert not list(parent.parameters())
        assert not before.requires_grad and torch.equal(network(clip), before)


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


def test_an_embedding_of_the_wrong_width_or_absent_is_one_line(copy):
    prompt = copy.parent / "prompt_embeddings" / f"{EMPTY_PROMPT}.safetensors"
    save_file({"prompt_embedding": torch.zeros(5, 32)}, prompt)
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "(5, 32)", "24")
    save_file({"something": torch.zeros(5, 24)}, prompt)
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "prompt_embedding")
    prompt.unlink()
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "no files in prompt_embeddings/", prompt.name)  # where to put it
    for name in "one", "two":
        save_file({"prompt_embedding": torch.zeros(5, 24)}, prompt.with_name(f"{name}.safetensors"))
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "2 files in prompt_embeddings/", prompt.name)


def test_another_version_of_the_transformer_is_one_line(copy):
    from diffusers import CogVideoXTransformer3DModel

    shape = TINY_TRANSFORMER | {"patch_size_t": None, "sample_frames": 9, "patch_bias": True}
    CogVideoXTransformer3DModel(**shape).save_pretrained(copy / "old")
    (copy / "transformer").rename(copy / "new")
    (copy / "old").rename(copy / "transformer")
    with pytest.raises(TeacherError) as error:
        load(copy)
    assert_one_line(error, "CogVideoX 1.0", "patch_size_t")


def test_teachers_are_gt_dove_or_results_with_a_cache(dove, tmp_path):
    assert load_teacher("gt") is None
    network = load_teacher(str(dove), seed=4)
    assert isinstance(network, DoveTeacher) and network.seed == 4
    assert network.prompt.dtype == torch.float32  # on a CPU
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


@pytest.mark.parametrize("h, w", [(8, 8), (24, 40)])
def test_the_vaes_encoder_is_diffusers(h, w):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2, block_out_channels=[8, 16, 24, 24], norm_num_groups=4,
    ).double()  # fmt: skip
    ours = VAEEncoder(vae.config).double()
    ours.load_state_dict(vae.encoder.state_dict())
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), vae.encoder(x), atol=1e-12, rtol=1e-12)


def test_no_convolution_of_the_feature_encoder_has_to_copy_its_input(files):
    encoder = FeatureEncoder.from_pretrained(**files).to(memory_format=torch.channels_last)
    with Convolutions() as convolutions:
        encoder(clip_of(1, 5, 64, 64))
    # But for pictures as they come, of three channels, and half of the moments, four: copies of no weight.
    convolutions.pictures = [(shape, stride) for shape, stride in convolutions.pictures if shape[1] > 4]
    convolutions.assert_dense_channels_last(more_than=40)


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


@pytest.mark.slow
def test_importing_is_quick_since_diffusers_waits():
    code = "import sys, teacher; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
