"""Training data: real clips, photos and a procedural world become pairs (LR, HR) and the real clips of Eq. 5.

Paper: Sec. 4.1 (OpenVid-1M videos, LSDIR images, RealBasicVSR degradation, 25 frames of 512x512) and Eq. 5.

    datasets/videos    25 frames, shrink, crop ──┐
    datasets/images    still or moving crop ─────┼── flip ──> hr ── degrade.py ──> lr
    dead-leaves world  rendered ─────────────────┘

A sample is a pure function of (seed, stage, global sample index): each draw comes from a generator seeded
with these and its purpose. Ranks take slices of the index, so processes, workers and restarts change no
sample.

Points are complex numbers, x + iy in pixels: turn z + shift zooms by |turn|, rotates by its angle and shifts.
"""

import csv
import gc
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, takewhile, zip_longest
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from filelock import FileLock
from numpy.random import Generator
from torch import Tensor

from degrade import SCALE, degrade, one_thread
from runtime import UserError, World, complete, explained
from shots import in_shots
from video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError, VideoReader, read_clip, to_clip, to_network

# Choice: all of these; the paper says neither how clips and crops are drawn nor how photos are used.
CANDIDATES = 64  # files tried for one sample before giving up
IMAGE_SHARE = 0.5  # of the pairs made from files, those made from photos
MOVING_SHARE = 0.75  # of those, the share seen by a moving camera
SHRINK = 0.5  # crops are shrunk by up to this: it hides the compression of the source
FLAT = 2.5  # mean step between neighbouring pixels, in grey levels, below which a crop is too flat
CROPS = 8  # crops tried to find one that is not
STARTS = 8  # windows of a video tried to find one without a cut
PAN = 3 + 3j  # pixels a frame that a camera drifts along x and y, at most
SWING = 0.004 + 0.004j  # log scale a frame that it zooms, radians a frame that it turns, at most
FINER = 2  # moving crops are drawn on a finer grid and averaged, which keeps them equally sharp everywhere
HELD_OUT_SHARE = 500  # one file of so many is held out for validation,
HELD_OUT = 8  # but at least so many of each kind, where that is no more than a quarter of them


# fmt: off
@dataclass(frozen=True)
class Sources:
    """Where clips come from, and their shape."""

    videos: str = "datasets/videos"  # training videos: a folder, a list (.txt), OpenVid-1M's CSV
    images: str = "datasets/images"  # training photos: a folder, a list
    procedural: float = 0.0          # share of clips from the procedural world
    validation: str = ""             # held out: a folder of clips, a list of names; else one file in 500
    frames: int = 25                 # clip length t                                  Paper: Sec. 4.1
    size: int = 512                  # side of the HR crop in pixels                  Paper: Sec. 4.1


@dataclass(frozen=True)
class Data(Sources):
    """What a training run takes of them."""

    batch: int = 8                   # clips a step, over all processes               Paper: Sec. 4.1
    micro_batch: int = 1             # of them at a time through a process's networks, gradients accumulated
# fmt: on


class DataError(UserError):
    """Training data that cannot be used; the message is one line and says what to do."""

    def __init__(self, message: str):
        # PyTorch raises a worker's error again, the worker's traceback as its message; the last line is ours.
        super().__init__(message.splitlines()[-1].split(f"{type(self).__name__}: ")[-1])


# Purposes with a generator of their own; from 1 on, since a 0 at the end of a NumPy seed is not seen.
KIND, PAIR, DEGRADE, VIDEO, ORDER, IMAGE, IMAGES, PICK, PIECE, NOISE = range(1, 11)


def generator(*key: int) -> Generator:
    """The generator of one draw: the same key gives the same numbers in every process."""
    if min(key) < 0:
        raise DataError(f"seed {min(key)}: take one from 0 on")
    return np.random.default_rng(key)


# --- files --------------------------------------------------------------------------------------------------

NOT_HR = {"X2", "X3", "X4", "val1"}  # LSDIR's bicubic LR images and its validation images
INDEXES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adcvsr"
INDEXED = 10_000  # files, from which on a list of them is kept there


class Files(Sequence):
    """Paths below one folder, ordered by a hash of their names, in one array of bytes: a million of them take
    some 50 MB, once for all processes of a machine; as Python's objects they would take 400 MB in each."""

    def __init__(self, folder: Path, names: np.ndarray):
        self.folder, self.names, self.ends = folder, names, np.flatnonzero(names == 0)  # a 0 ends each name

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, k: int) -> Path:
        if not 0 <= k < len(self):
            raise IndexError(k)
        start = self.ends[k - 1] + 1 if k else 0
        return self.folder / os.fsdecode(self.names[start : self.ends[k]].tobytes())


def name_hash(path: str) -> bytes:
    """What decides whether a file is held out: its name's, wherever it lies."""
    return hashlib.sha256(os.fsencode(os.path.basename(path))).digest()[:8]


def list_files(source: str | Path, suffixes: set[str]) -> Files:
    """Files of a folder and its subfolders, of a list (.txt, a path a line) or of OpenVid-1M's CSV (the
    videos that it names and that are unpacked beside it). Hidden files are none. Raises DataError.

    A large set is read once, by the first process, and again when one of its folders or the list has changed.
    """
    source = Path(source)
    of = repr((str(Path.home()), str(source.absolute()), sorted(suffixes)))
    index = INDEXES / hashlib.sha256(of.encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"adcvsr-{index.name}.lock"):
        return kept_files(index, source) or read_files(index, source, suffixes)


def kept_files(index: Path, source: Path) -> Files | None:
    """What `read_files` has kept, unless something has changed since."""
    with suppress(OSError, ValueError):
        times = json.loads(index.with_suffix(".json").read_text())
        if all(os.stat(place).st_mtime_ns == then for place, then in times.items()):
            return Files(top_folder(source), np.memmap(index, np.uint8, "r"))
    return None


def read_files(index: Path, source: Path, suffixes: set[str]) -> Files:
    """The files, read; kept if they are many and nothing has changed in the last seconds: the clocks of file
    systems may be too coarse to tell."""
    times: dict[str, int] = {}
    way_out = "Name a folder, a list (.txt) or OpenVid-1M's CSV, with its column 'video'"
    with explained(f"{source}: cannot be read", way_out, DataError, (OSError, ValueError, csv.Error)):
        names = [name for name in names_in(source, times) if os.path.splitext(name)[1].lower() in suffixes]
    names.sort(key=lambda name: (name_hash(name), name))
    packed = b"".join(os.fsencode(name) + b"\0" for name in names if os.path.basename(name)[0] != ".")
    if len(names) >= INDEXED and time.time_ns() - max(times.values()) > 2_000_000_000:
        with suppress(OSError):  # a home that cannot be written to: read again next time
            INDEXES.mkdir(parents=True, exist_ok=True)
            for path, content in (index, packed), (index.with_suffix(".json"), json.dumps(times).encode()):
                with complete(path) as partial:
                    partial.write_bytes(content)
    return Files(top_folder(source), np.frombuffer(packed, np.uint8))


def top_folder(source: Path) -> Path:
    """What the names of a source are relative to."""
    on_hub = source.suffix == ".csv" and source.parts[-3:-1] == ("data", "train")  # OpenVid-1M's own place
    return source.parents[2] if on_hub else source if source.is_dir() else source.parent


def names_in(source: Path, times: dict[str, int]) -> Iterator[str]:
    """Relative paths that a source names; to `times`, when each folder and list of them was last changed."""
    if source.is_dir():
        yield from walk(source, times)
        return
    times[str(source)] = os.stat(source).st_mtime_ns
    with source.open(newline="", encoding="utf-8-sig") as file:  # written by Windows, too
        if source.suffix != ".csv":
            yield from (line.strip() for line in file if line.strip())
            return
        rows = csv.reader(file)
        column = next(rows, []).index("video")
        named = {row[column] for row in rows if row}
    yield from (name for name in walk(top_folder(source), times) if os.path.basename(name) in named)


def walk(folder: Path, times: dict[str, int]) -> Iterator[str]:
    def refuse(error: OSError):
        raise error

    seen = set()  # a symbolic link may lead back
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (here := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(here)
        times[place] = os.stat(place).st_mtime_ns
        folders[:] = [name for name in folders if name[0] != "." and name not in NOT_HR]
        inside = os.path.relpath(place, folder)
        yield from files if inside == "." else (os.path.join(inside, name) for name in files)


def held_out(files: Files, suffixes: set[str], validation: str) -> list[Path]:
    """Files of one kind that training never sees: those of the folder `validation`, or of `files` those that
    the list `validation` names, or one in 500, by a hash of the name."""
    if validation and Path(validation).is_dir():
        return list(list_files(validation, suffixes))
    if validation:
        names = {path.name for path in list_files(validation, suffixes)}
        return [path for path in files if path.name in names]
    enough, limit = min(HELD_OUT, len(files) // 4), (2**64 // HELD_OUT_SHARE).to_bytes(8, "big")
    first = takewhile(lambda k: k < enough or name_hash(files[k]) < limit, range(len(files)))
    return [files[k] for k in first]


# --- crops --------------------------------------------------------------------------------------------------


def detailed(windows: Iterable[tuple[slice, slice]], frame: np.ndarray) -> tuple[slice, slice]:
    """The first of a few windows in which `frame` is not flat (sky, bokeh, a wall), else the best."""
    luma, scored = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32), []
    for window in windows:
        down, across = (np.abs(np.diff(luma[window], axis=axis)).mean() for axis in (0, 1))
        scored.append((float(down + across) / 2, window))
        if scored[-1][0] >= FLAT:
            break
    return max(scored, key=lambda pair: pair[0])[1]


def random_crop(clip: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """(t size size 3): a square window, the same in all frames of a clip (t h w 3), as it is or shrunk."""
    h, w = clip.shape[1:3]
    if min(h, w) < size:
        raise DataError(f"{w}x{h} is smaller than the crop, {size}x{size}")
    sides = (int(size / rng.uniform(max(SHRINK, size / min(h, w)), 1.0)) for _ in range(CROPS))
    squares = ((rng.integers(h - side + 1), rng.integers(w - side + 1), side) for side in sides)
    window = detailed((np.s_[y : y + side, x : x + side] for y, x, side in squares), clip[len(clip) // 2])
    return np.stack([cv2.resize(f[window], (size, size), interpolation=cv2.INTER_AREA) for f in clip])


def video_clip(path: Path, frames: int, size: int, rng: Generator) -> np.ndarray:
    """(t size size 3) uint8: `frames` consecutive frames of one shot of a video, at random, cropped."""
    with VideoReader(path) as reader:
        there, cuts = max(frames, reader.frames or 0), 0  # so the header says, and headers are often wrong
        while there >= frames and cuts < STARTS:
            start = int(rng.integers(there - frames + 1))
            reader.start = reader.time_of(start)
            clip = list(islice(reader, frames))
            if len(clip) < frames:
                there = start + len(clip)
            elif any(shot for shot, _ in in_shots(clip)):
                cuts += 1
            else:
                return random_crop(np.stack([frame.rgb for frame in clip]), size, rng)
    found = f"a cut in each of {cuts} windows" if cuts == STARTS else f"{there} frames decode"
    raise DataError(f"{path}: {found}, {frames} frames are needed")


def smooth_path(frames: int, step: complex, rng: Generator) -> np.ndarray:
    """A smooth path (t,) around 0: along either axis a drift of at most `step` a frame and a slow sway."""
    time = np.arange(frames) - (frames - 1) / 2
    low, high = (20, 0, -1, 0), (60, 2 * np.pi, 1, 5)  # Choice: frames, radians, steps a frame, steps
    period, phase, drift, sway = rng.uniform(low, high, (2, 4)).T[..., None]
    x, y = drift * time + sway * np.sin(2 * np.pi * time / period + phase)
    return step.real * x + 1j * (step.imag * y)


def view(image, turn: complex, shift: complex, size, how=cv2.INTER_LINEAR, border=cv2.BORDER_REFLECT_101):
    """A frame of `size` (w, h) whose pixel z shows the image at turn z + shift."""
    matrix = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    return cv2.warpAffine(image, matrix, size, flags=how | cv2.WARP_INVERSE_MAP, borderMode=border)


def moving_crop(photo: np.ndarray, frames: int, size: int, rng: Generator) -> np.ndarray:
    """A smooth pan, zoom and rotation over a photo (h w 3), exact below a pixel: (t size size 3) uint8."""
    h, w = photo.shape[:2]
    if min(h, w) < size:
        raise DataError(f"{w}x{h} is smaller than the crop, {size}x{size}")
    reach = np.array([w - 1, h - 1])
    corners = np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j]) * (size - 1) / 2
    for gentle in (rng.random(), 0.3, 0.1, 0.0):  # a small photo leaves no room for large moves
        turn, pan = np.exp(smooth_path(frames, gentle * SWING, rng)), smooth_path(frames, gentle * PAN, rng)
        seen = (turn[:, None] * corners + pan[:, None]).ravel()
        low, extent = complex(seen.real.min(), seen.imag.min()), (np.ptp(seen.real), np.ptp(seen.imag))
        if (room := (reach / extent).min()) >= 1:
            break
    step = rng.uniform(1, min(room, 1 / SHRINK))  # photo pixels for a pixel of the crop
    tall, wide = step * extent[1], step * extent[0]
    starts = (rng.random(2) * (reach - (wide, tall)) for _ in range(CROPS))
    windows = (np.s_[int(y) : int(y + tall) + 1, int(x) : int(x + wide) + 1] for x, y in starts)
    rows, columns = detailed(windows, photo)
    middle = complex(columns.start, rows.start) - step * low
    clip, fine = [], size * FINER
    for turn_i, pan_i in zip(step * turn, middle + step * pan, strict=True):
        corner = pan_i - turn_i / FINER * (fine - 1) / 2 * (1 + 1j)
        frame = view(photo, turn_i / FINER, corner, (fine, fine), cv2.INTER_CUBIC)
        clip.append(cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA))
    return np.stack(clip)


# --- what training takes ------------------------------------------------------------------------------------


class TrainingClips(torch.utils.data.Dataset):
    """Samples by global index: lr (t 3 size/4 size/4) and hr (t 3 size size), uint8 RGB, and the `index`;
    with `real_types` also what Eq. 5's real clips are made of: video, random_images (t 3 size size), one
    image (1 3 size size) and the `order` (t,) in which the video is shuffled. Each stage has samples of its
    own.

    At a procedural share of 1 no files are needed: the dead-leaves world stands in for videos and photos too.
    Raises DataError where no file, or none of CANDIDATES, can be used."""

    def __init__(self, sources: Sources, seed: int = 0, stage: int = 1, real_types: bool = False):
        videos, images, self.procedural = sources.videos, sources.images, sources.procedural
        self.frames, self.size = sources.frames, sources.size
        self.seed, self.stage, self.real_types = seed, stage, real_types
        if self.size % SCALE or self.frames < 1 + real_types:
            what = f"{self.frames} frames, size {self.size}"
            raise DataError(f"{what}: take a multiple of {SCALE}, 2 frames to permute")
        need = "clip types 4 and 5 of Eq. 5 are photos" if real_types else "name --videos or --images"
        way_out = f"{need}; --procedural 1 needs no files"
        if self.procedural < 1 and not (videos and images if real_types else videos or images):
            raise DataError(f"no folder of {'videos' if images else 'images'} is named: {way_out}")
        self.videos, self.images, self.held_out = (), (), set()
        if self.procedural < 1:
            try:
                self.videos = self.files(videos, VIDEO_SUFFIXES, sources.validation)
                self.images = self.files(images, IMAGE_SUFFIXES, sources.validation)
            except DataError as error:
                raise DataError(f"{error}; {way_out}") from None

    def files(self, source: str, suffixes: set[str], validation: str) -> Sequence[Path]:
        """All of a source, () if none is named; the names of those that are held out are noted."""
        files = list_files(source, suffixes) if source else ()
        if source and not files:
            raise DataError(f"{source}: nothing to train on; it should hold {', '.join(sorted(suffixes))}")
        self.held_out |= {path.name for path in held_out(files, suffixes, validation)}
        return files

    @one_thread()  # a worker a core, each with one thread, is the fastest way through many small steps
    def __getitem__(self, index: int) -> dict[str, Tensor | np.ndarray | int]:
        return self.pair(index) | (self.real(index) if self.real_types else {}) | {"index": index}

    def rng(self, *key: int) -> Generator:
        return generator(self.seed, self.stage, *key)

    def pair(self, index: int) -> dict[str, Tensor]:
        """lr and hr."""
        kind, photo = self.rng(index, KIND).random(2)
        from_photo = self.images and (photo < IMAGE_SHARE or not self.videos)
        files = () if kind < self.procedural else self.images if from_photo else self.videos
        # Choice: clips made of a photo take the video chain too, codec included.
        hr = self.draw(files, self.frames, index, PAIR)
        return {"lr": to_clip(degrade(hr, self.rng(index, DEGRADE))), "hr": to_clip(hr)}

    def real(self, index: int) -> dict[str, Tensor | np.ndarray]:
        """The real clips of Eq. 5."""
        # Choice: drawn independently of the pair; to take its HR where that is a video saves 13 % of loading.
        unrelated = [self.draw(self.images, 1, index, IMAGES, k)[0] for k in range(self.frames)]
        return {
            "video": to_clip(self.draw(self.videos, self.frames, index, VIDEO)),
            "image": to_clip(self.draw(self.images, 1, index, IMAGE)),
            "random_images": to_clip(unrelated),
            "order": permutation(self.frames, self.rng(index, ORDER)),
        }

    def draw(self, files: Sequence[Path], frames: int, *key: int) -> np.ndarray:
        """A clip (t size size 3) of the first usable file, or of the world."""
        if not files:
            return procedural_clip(self.rng(*key), frames, (self.size, self.size)).frames
        order = self.rng(*key).choice(len(files), min(CANDIDATES, len(files)), replace=False)
        for tried, path in enumerate((files[k] for k in order), 1):
            rng = self.rng(*key, tried)  # never depends on the files before
            try:
                if path.name in self.held_out:
                    raise DataError(f"{path} is held out for validation")
                if files is self.videos:
                    clip = video_clip(path, frames, self.size, rng)
                elif frames > 1 and rng.random() < MOVING_SHARE:
                    clip = moving_crop(read_clip(path, 0, 1)[0], frames, self.size, rng)
                else:
                    clip = np.repeat(random_crop(read_clip(path, 0, 1), self.size, rng), frames, axis=0)
                across, down, transposed = rng.random(3) < 0.5  # flips, alike in all frames
                clip = clip[:, :: -1 if down else 1, :: -1 if across else 1]
                return np.ascontiguousarray(clip.swapaxes(1, 2) if transposed else clip)
            except (VideoError, DataError, OSError) as error:
                reason = str(error)
        raise DataError(f"none of {tried} files under {path.parent} can be used; the last: {reason}")


def permutation(frames: int, rng: Generator) -> np.ndarray:
    """A random order (t,) of at least two frames that is not the one they have. Paper: Eq. 5, video*."""
    order = np.arange(frames)
    while (order == np.arange(frames)).all():
        order = rng.permutation(frames)
    return order


def indices(step: int, rank: int, processes: int, batch: int) -> range:
    """Global sample indices of one rank at a step, both from 0; `batch` is that of all ranks together."""
    if batch % processes:
        what = f"{processes} processes cannot share a batch of {batch}"
        raise DataError(f"{what}; take a multiple of {processes}")
    return range(step * batch + rank, (step + 1) * batch, processes)


def loader(clips, first: int, cfg, world: World) -> torch.utils.data.DataLoader:
    """This rank's batches for steps first, ..., cfg.steps - 1, the same wherever the run began. cfg: `Data`
    with steps and workers."""
    steps = [indices(step, world.rank, world.size, cfg.batch) for step in range(first, cfg.steps)]
    gc.collect()  # a forked worker that freed its parent's decoders would wait for threads it has not
    return torch.utils.data.DataLoader(
        clips, batch_sampler=steps, num_workers=cfg.workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=own_group,
    )  # fmt: skip


def own_group(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach whole process groups, and the parent needs its workers until it has
    saved; it ends them itself."""
    os.setpgid(0, 0)


def micro_batches(batch: dict[str, Tensor], size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """A batch cut into parts of `size` clips, the last of what is left, on the device."""
    parts = zip(*(x.to(device, non_blocking=True).split(size) for x in batch.values()))
    return [dict(zip(batch, clips)) for clips in parts]


def to_inputs(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Frames (uint8) in the networks' range [-1, 1], anything else as it is."""
    return {name: to_network(x) if x.dtype == torch.uint8 else x for name, x in clips.items()}


def held_out_clips(cfg, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Up to `count` clips that training never sees, the same every time: name, hr (t size size 3), lr, uint8;
    of videos and, under a moving camera, of photos by turns, or procedural ones where no file is held out.
    cfg: `Sources`."""
    kinds, clips = [], []
    for source, suffixes in (cfg.videos, VIDEO_SUFFIXES), (cfg.images, IMAGE_SUFFIXES):
        there = source and cfg.procedural < 1 and Path(source).exists()  # beside a teacher cache it need not
        kinds.append(held_out(list_files(source, suffixes) if there else (), suffixes, cfg.validation))
    if cfg.validation and not any(kinds):
        what = f"neither a folder with clips nor a list of files in {cfg.videos} or {cfg.images}"
        raise DataError(f"--validation {cfg.validation}: {what}")
    for path in filter(None, chain.from_iterable(zip_longest(*kinds))):
        if len(clips) == count:
            break
        key = int.from_bytes(name_hash(path.name), "big")
        with suppress(VideoError, DataError, OSError):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                hr = video_clip(path, cfg.frames, cfg.size, generator(key, PAIR))
            else:
                hr = moving_crop(read_clip(path, 0, 1)[0], cfg.frames, cfg.size, generator(key, PAIR))
            clips.append((path.stem, hr, degrade(hr, generator(key, DEGRADE))))
    for seed in range(0 if clips else count):
        hr = procedural_clip(generator(seed), cfg.frames, (cfg.size, cfg.size)).frames
        clips.append((f"procedural_{seed}", hr, degrade(hr, generator(seed, DEGRADE))))
    return clips


# --- the dead-leaves world ----------------------------------------------------------------------------------
# Texture samples per output pixel: textures hold nothing finer than a pixel, so that drawing them anywhere
# between pixels by linear interpolation neither aliases nor changes their sharpness.
TEXELS = 2
BAND_LIMIT = 1.0  # sigma in texels of the blur behind that: it leaves 0.29 at the Nyquist of the pixels
PATTERN = 768  # texels a side of a pattern, at most
LEAVES = 70  # Choice, as the next four: shapes for 256x256 pixels, which hide most of the background
RADIUS = (8.0, 100.0)  # pixels, uniform in the logarithm
DRIFT, SPIN = 2 + 2j, 0.004 + 0.02j  # a leaf's own PAN and SWING, at most
NEAR = (0.6, 1.4)  # share of the camera's pan in the farthest and the nearest leaf: parallax


class Rendered(NamedTuple):
    """A rendered clip with its ground truth; `flow` and `visible` are None unless asked for."""

    frames: np.ndarray  # (t h w 3) uint8
    flow: np.ndarray | None  # (t-1 h w 2): what frame i shows at (x, y), the next shows at (x, y) + flow
    visible: np.ndarray | None  # (t-1 h w): that point is inside one shape, in view, uncovered in both


class Leaf(NamedTuple):
    """A shape whose point u, counted from its middle, is at turn u + shift on the screen."""

    colour: np.ndarray  # (th tw 3), times cover
    cover: np.ndarray  # (th tw) in [0, 1]
    turn: np.ndarray  # (t,) complex
    shift: np.ndarray


def procedural_clip(rng: Generator, frames: int, size: tuple[int, int], truth=False) -> Rendered:
    """A clip of `size` (h, w) of textured shapes that hide each other and move, as does the camera."""
    leaves = make_leaves(rng, frames, size)
    clip, owners = zip(*(draw_leaves(leaves, i, size) for i in range(frames)))
    if not truth:
        return Rendered(np.stack(clip), None, None)
    flow, visible = zip(*(exact_flow(leaves, i, owners) for i in range(frames - 1)))
    return Rendered(np.stack(clip), np.stack(flow), np.stack(visible))


def make_leaves(rng: Generator, frames: int, size: tuple[int, int]) -> list[Leaf]:
    """The background and the leaves, farthest first, with their motion on the screen."""
    h, w = size
    middle = complex(w - 1, h - 1) / 2
    gentle = rng.random()  # Choice: from almost still to fast
    zoom, pan = np.exp(smooth_path(frames, gentle * SWING, rng)), smooth_path(frames, gentle * PAN, rng)
    room = round(1.5 * TEXELS * h), round(1.5 * TEXELS * w)  # of the background, for the camera to move
    patterns = make_patterns(rng, min(PATTERN, max(room)))
    ground = paint(rng, patterns, room)
    leaves = [Leaf(ground, np.ones(room, np.float32), zoom, middle + zoom * pan * NEAR[0])]
    for k in range(count := round(LEAVES * h * w / 256**2)):
        cover = outline(rng, np.exp(rng.uniform(*np.log(RADIUS))))
        place = complex(*(rng.uniform(-0.7, 0.7, 2) * (w, h)))
        moves = gentle * (rng.random() < 0.5) * rng.random()  # Choice: half of them stand still in the world
        path = place + smooth_path(frames, moves * DRIFT, rng)
        turn = np.exp(smooth_path(frames, moves * SPIN, rng))
        near = NEAR[0] + (NEAR[1] - NEAR[0]) * (k + 1) / count
        colour = paint(rng, patterns, cover.shape) * cover[..., None]
        leaves.append(Leaf(colour, cover, zoom * turn, middle + zoom * (path + pan * near)))
    return leaves


def draw_leaves(leaves: list[Leaf], i: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frame i (h w 3) uint8 and the leaf that owns each pixel (h w) int16, -1 where several share it."""
    frame, owner = np.zeros((*size, 3), np.float32), np.zeros(size, np.int16)
    for k, leaf in enumerate(leaves):
        turn, shift = leaf.turn[i], leaf.shift[i]
        th, tw = leaf.cover.shape
        reach = np.abs([turn.real, turn.imag]) @ np.array([[tw, th], [th, tw]]) / 2 / TEXELS + 1
        place, border = np.array([shift.real, shift.imag]), cv2.BORDER_CONSTANT
        if k == 0:  # the background has no border
            reach, border = np.inf, cv2.BORDER_REFLECT_101
        low = np.maximum(0, np.floor(place - reach)).astype(int)
        high = np.minimum(size[::-1], np.ceil(place + reach) + 1).astype(int)
        if (low >= high).any():
            continue
        m = TEXELS / turn  # screen to texture: texel = m * (pixel - shift) + middle of the texture
        origin = m * (complex(*low) - shift) + complex(tw - 1, th - 1) / 2
        colour, cover = (view(x, m, origin, high - low, border=border) for x in (leaf.colour, leaf.cover))
        inside = np.s_[low[1] : high[1], low[0] : high[0]]
        frame[inside] *= cv2.cvtColor(1 - cover, cv2.COLOR_GRAY2RGB)
        frame[inside] += colour
        owner[inside][cover > 0.002] = -1
        owner[inside][cover > 0.998] = k
    return np.rint(frame).clip(0, 255).astype(np.uint8), owner


def exact_flow(leaves: list[Leaf], i: int, owners: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Flow (h w 2) from frame i to i + 1 and its visibility (h w), from the motion of each pixel's owner."""
    owner, after = owners[i : i + 2]
    h, w = owner.shape
    turn = np.array([leaf.turn[i + 1] / leaf.turn[i] for leaf in leaves])
    before, now = np.array([leaf.shift[i : i + 2] for leaf in leaves]).T
    here = np.arange(w) + 1j * np.arange(h)[:, None]
    there = turn[owner] * (here - before[owner]) + now[owner]
    move = np.where(owner >= 0, there - here, 0)
    x, y = np.floor(there.real).astype(int), np.floor(there.imag).astype(int)
    visible = (owner >= 0) & (x >= 0) & (y >= 0) & (x < w - 1) & (y < h - 1)
    x, y = x.clip(0, w - 2), y.clip(0, h - 2)
    for dy, dx in np.ndindex(2, 2):
        visible &= after[y + dy, x + dx] == owner
    return np.stack([move.real, move.imag], axis=-1).astype(np.float32), visible


def make_patterns(rng: Generator, side: int) -> list[np.ndarray]:
    """What leaves are made of: clouds, grain, veins, bent stripes and text, (side side) in [0, 1]."""
    octaves = [rng.standard_normal((max(2, side >> k), max(2, side >> k)), np.float32) for k in range(7)]
    octaves = [cv2.resize(octave, (side, side), interpolation=cv2.INTER_CUBIC) for octave in octaves]
    cloud = sum(octaves) / len(octaves) ** 0.5  # equal octaves: amplitude 1/f, as in photographs
    grain, veins = octaves[0] + octaves[1] + cloud, 4 * np.abs(cloud) - 2
    phase = np.arange(side) / rng.uniform(5, 20) + sum(octaves[3:]) * rng.uniform(0, 0.3)
    stripes = 3 * np.sin(2 * np.pi * phase)
    page, row = np.zeros((side, side), np.uint8), 0
    alphabet = list("abcdefghijklmnoprstuvwxyzABCDEFGHKLMNRST0123456789   .,-")
    while row < side:
        scale, font, stroke = rng.uniform(0.4, 1.2), int(rng.integers(5)), int(rng.integers(1, 3))
        row += int(34 * scale)  # pixels between the lines of OpenCV's fonts at scale 1
        cv2.putText(page, "".join(rng.choice(alphabet, 90)), (0, row), font, scale, 255, stroke, cv2.LINE_AA)
    text = page / 32.0 - 4 + 0.5 * cloud
    return [1 / (1 + np.exp(-1.5 * x.astype(np.float32))) for x in (cloud, grain, veins, stripes, text)]


def paint(rng: Generator, patterns: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """A piece of a pattern, turned and stretched, in two colours: (h w 3) float32, 0..255."""
    pattern, turn = patterns[rng.integers(len(patterns))], rng.uniform(0.6, 1.4) * 1j ** rng.uniform(0, 4)
    piece = view(pattern, turn, complex(*rng.uniform(0, len(pattern), 2)), size[::-1])[..., None]
    first, second = (rng.uniform(20, 235, (2, 1)) + rng.normal(0, 30, (2, 3))).astype(np.float32)
    return cv2.GaussianBlur((first + (second - first) * piece).clip(0, 255), (0, 0), BAND_LIMIT)


def outline(rng: Generator, radius: float) -> np.ndarray:
    """Coverage (h w) float32 of an ellipse, a box or a diamond of about this radius in pixels, in texels."""
    (a, b), turn = radius * TEXELS * rng.uniform(0.3, 1, 2), 1j ** rng.uniform(0, 4)
    half = np.abs([(turn.real, turn.imag), (turn.imag, turn.real)]) @ (a, b)  # its sides once it is turned
    x, y = (np.arange(-int(side) - 5, int(side) + 6) for side in half)  # room for the blur
    inside = (x + 1j * y[:, None]) * turn.conjugate()
    distance = np.linalg.norm([inside.real / a, inside.imag / b], ord=rng.choice([1, 2, np.inf]), axis=0)
    mask = (0.5 + (1 - distance) * min(a, b)).clip(0, 1).astype(np.float32)  # the edge is a texel wide
    return cv2.GaussianBlur(mask, (0, 0), BAND_LIMIT)
