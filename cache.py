"""The teacher's videos on disk, made once: a call of DOVE costs eight times the student's.

    torchrun --nproc_per_node=8 cache.py --teacher PATH_TO_DOVE --videos FOLDER --images FOLDER
    python cache.py --preset tiny --videos FOLDER --images FOLDER      HR is its own teacher

    CACHE/lr/00000012.mkv   hr/00000012.mkv   teacher/00000012.mkv   cache.json

Or PATH_TO_SEEDVR2. Each process makes its share; the same command again resumes. Training with
`--teacher-cache CACHE` takes the clips or random pieces of them. Another method becomes the teacher by
running it on CACHE/lr: its results, clips or folders of frames under the same names, are `--teacher FOLDER
--teacher-cache CACHE` in training.

Clips are FFV1 RGB, which loses nothing: 5.1 MB for 25 frames of 512x512 (raw 19.7, PNG 9.0, lossless H.264
4.8 to 8.9), written in 0.26 s and read in 0.35 s of one core. With their LR that is 11 GB for 1,000 clips.
"""

import json
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data import PICK, PIECE, Sources, TrainingClips
from degrade import one_thread
from files import DataError
from model import SCALE
from runtime import complete, explained, init_world, run
from teacher import is_results, load_teacher
from training import parse
from video import (
    FOLDER_RATE,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    VideoError,
    read_clip,
    to_clip,
    to_frames,
    to_network,
    to_uint8,
)

RATIO = 0.27  # bytes of an FFV1 file for a raw byte, measured on photographed clips


# fmt: off
@dataclass(frozen=True)
class Config(Sources):
    teacher: str = "weights/DOVE"  # a DOVE or SeedVR2 folder, or gt (HR itself)
    clips: int = 20_000            # clips in it   Choice: 220 GB, each seen 80 times in 200K steps of 8
    seed: int = 0                  # seed of the clips and of the noise in the teacher
    out: str = "cache"             # the cache's folder
    workers: int = 4               # processes that make clips, for each process that runs the teacher
# fmt: on


TINY = Config(teacher="gt", procedural=0.1, frames=12, size=256, clips=1200, out="tiny_cache", workers=2)
PRESETS = {
    "full": Config(),
    "tiny": TINY,  # of which training shows pieces: made in minutes, they serve for hours
    "smoke": replace(TINY, procedural=1.0, frames=5, size=96, clips=4, out="runs/smoke/cache", workers=0),
}


# ------------------------------------------------------------------------------------------------------
# The cache on disk


def write_clip(path: Path, clip: Tensor) -> None:
    """clip (t 3 h w) uint8 as FFV1 RGB; `path` appears once it is complete. Raises `DataError`."""
    failed = f"{path}: cannot be written", "Check the disk.", DataError, (OSError, av.error.FFmpegError)
    with explained(*failed), complete(path) as partial:
        # Bitexact: no random identifiers, so that the same clip is the same file.
        options = {"format": "matroska", "container_options": {"fflags": "+bitexact"}}
        with av.open(f"file:{partial}", "w", **options) as container:
            stream = container.add_stream("ffv1", rate=Fraction(FOLDER_RATE))
            stream.height, stream.width, stream.pix_fmt = *clip.shape[2:], "bgr0"
            for frame in to_frames(clip):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def clip_file(cache: Path, kind: str, number: int) -> Path:
    return cache / kind / f"{number:08d}.mkv"


def numbered(folder: Path) -> dict[str, Path]:
    """The clips and folders of frames with a number as their name."""
    suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES | {""}
    files = folder.iterdir() if folder.is_dir() else ()
    return {p.stem: p for p in files if p.stem.isdigit() and p.suffix.lower() in suffixes}


def base_name(path: str) -> str:
    """How cache.json knows a teacher and a validation set: folders move between machines."""
    return path if path in ("", "gt") else Path(path).absolute().name


def settings_of(cache: Path, **now) -> dict:
    """The settings a cache was made with. Raises `DataError` where those of `now` differ."""
    if not (cache / "cache.json").is_file():
        raise DataError(f"{cache}: no cache.json, so it is not a cache. Make one with cache.py.")
    with explained(f"{cache / 'cache.json'}: cannot be read", "Copy the cache again.", DataError):
        saved = dict(json.loads((cache / "cache.json").read_text()))
    if changed := [f"{k} was {saved.get(k)!r}, now {now[k]!r}" for k in now if saved.get(k) != now[k]]:
        way_out = "Use these settings, or another cache."
        raise DataError(f"{cache} was made with other settings: {', '.join(changed)}. {way_out}")
    return saved


# ------------------------------------------------------------------------------------------------------
# Training from it


class CachedClips(torch.utils.data.Dataset):
    """Samples by global index like TrainingClips, from a cache: lr, hr, index, and unless the teacher is gt
    `target` (t 3 size size) uint8. In each pass through the cache every clip comes up once: a random piece of
    the frames and size asked for, flipped anew.

    clips: gives these, seed and stage, and with `real_types` the real clips of Eq. 5, which are not cached.
    teacher: the cache's own, or a folder of another method's results on CACHE/lr. validation: the cache's
    own, or training would see what it holds out. Raises `DataError`.
    """

    def __init__(self, cache: str | Path, clips: TrainingClips, teacher: str, validation: str = ""):
        cache, self.clips, results = Path(cache), clips, is_results(teacher)
        # HR and LR, which gt and results need, are in every cache.
        made_by = {} if results or teacher == "gt" else {"teacher": base_name(teacher)}
        self.made = settings_of(cache, validation=base_name(validation), **made_by)
        for name in "frames", "size":
            if getattr(clips, name) > self.made[name]:
                what = f"{cache} has clips of {self.made['frames']} frames of {self.made['size']}"
                raise DataError(f"--{name} {getattr(clips, name)}: {what}. Take less, or make another.")
        folders = {"lr": cache / "lr", "hr": cache / "hr"}
        if teacher != "gt":
            folders["target"] = Path(teacher) if results else cache / "teacher"
        self.files = {kind: numbered(folder) for kind, folder in folders.items()}
        self.names = sorted(set.intersection(*(set(files) for files in self.files.values())))
        if not self.names:
            places = ", ".join(map(str, folders.values()))
            raise DataError(f"{places}: no clip is in all of them. Make them with cache.py.")
        if len(self.names) < self.made["clips"]:
            print(f"{cache}: {len(self.names)} of {self.made['clips']} clips are there; training uses these")

    @one_thread()
    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        turn, place = divmod(index, len(self.names))
        name = self.names[self.clips.rng(turn, PICK).permutation(len(self.names))[place]]
        rng, t, side = self.clips.rng(index, PIECE), self.clips.frames, self.clips.size // SCALE
        spare = self.made["size"] // SCALE - side
        i, y, x = rng.integers([self.made["frames"] - t, spare, spare], endpoint=True)  # in LR
        across, down, transposed = rng.random(3) < 0.5
        sample = {"index": index}
        for kind in self.files:
            n = 1 if kind == "lr" else SCALE
            clip = self.read(kind, name)[i : i + t, :, n * y : n * (y + side), n * x : n * (x + side)]
            clip = clip.flip([axis for axis, on in ((3, across), (2, down)) if on])
            sample[kind] = rearrange(clip, "t c h w -> t c w h") if transposed else clip
        return sample | (self.clips.real(index) if self.clips.real_types else {})

    def read(self, kind: str, name: str) -> Tensor:
        """A whole clip: (t 3 size size), of LR (t 3 size/4 size/4), uint8."""
        path, side = self.files[kind][name], self.made["size"] // (SCALE if kind == "lr" else 1)
        try:
            clip = to_clip(read_clip(path))
        except VideoError as error:
            raise DataError(f"{path.parent}: {error}") from None
        if clip.shape != (self.made["frames"], 3, side, side):
            t, _, h, w = clip.shape
            expected = f"expected {self.made['frames']} of {side}x{side}. Make it again."
            raise DataError(f"{path}: {t} frames of {w}x{h}, {expected}")
        return clip


def training_clips(cfg, stage: int, real_types: bool = False) -> TrainingClips | CachedClips:
    """The clips of a training run: from its teacher's cache if it has one, or made anew. cfg: `Data`,
    `Teacher` and a seed."""
    if not cfg.teacher_cache:
        return TrainingClips(cfg, cfg.seed, stage, real_types)
    # A cache needs no sources but for real clips.
    sources = cfg if real_types else replace(cfg, procedural=1.0)
    clips = TrainingClips(sources, cfg.seed, stage, real_types)
    return CachedClips(cfg.teacher_cache, clips, cfg.teacher, cfg.validation)


# ------------------------------------------------------------------------------------------------------
# Making it


def main(cfg: Config) -> None:
    # world, data, settings
    world, cache = init_world(), Path(cfg.out)
    clips = TrainingClips(cfg, cfg.seed)
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "workers")}
    settings |= {k: base_name(getattr(cfg, k)) for k in ("teacher", "validation")}
    begun = (cache / "cache.json").is_file()
    if begun:
        settings_of(cache, **settings)
    # network
    teacher = load_teacher(cfg.teacher, world.device, seed=cfg.seed)
    kinds = ["lr", "hr"] + ["teacher"] * (teacher is not None)
    with explained(f"--out {cache}: cannot be written", "Check the disk.", DataError, OSError):
        for kind in kinds:
            (cache / kind).mkdir(parents=True, exist_ok=True)
        if world.is_main and not begun:
            with complete(cache / "cache.json") as partial:
                partial.write_text(json.dumps(settings, indent=1) + "\n")
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
            x_t = teacher(to_network(clip["lr"][None]).to(world.device), torch.tensor([number]))
            clip["teacher"] = to_uint8(x_t[0]).cpu()
        for kind in kinds:
            if not (file := clip_file(cache, kind, number)).is_file():
                write_clip(file, clip[kind])


if __name__ == "__main__":
    run(lambda: main(parse(PRESETS, __doc__)))
