"""Training data: real clips, photos and a procedural world become pairs (LR, HR) and the real clips of Eq. 5.

Paper: Sec. 4.1 (OpenVid-1M videos, LSDIR images, RealBasicVSR degradation, 25 frames of 512x512) and Eq. 5.

    datasets/videos    25 frames, shrink, crop ──┐
    datasets/images    still or moving crop ─────┼── flip ──> hr ── degrade.py ──> lr
    dead-leaves world  rendered ─────────────────┘

A sample is a pure function of (seed, stage, global sample index): each draw comes from a generator seeded
with these and its purpose. Ranks take slices of the index, so processes, workers and restarts change no
sample.
"""

import gc
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from dead_leaves import PAN, SWING, procedural_clip, smooth_path, view
from degrade import SCALE, degrade, one_thread
from files import DataError, held_out, list_files, name_hash
from runtime import World
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
FINER = 2  # moving crops are drawn on a finer grid and averaged, which keeps them equally sharp everywhere


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


# Purposes with a generator of their own; from 1 on, since a 0 at the end of a NumPy seed is not seen.
KIND, PAIR, DEGRADE, VIDEO, ORDER, IMAGE, IMAGES, PICK, PIECE, NOISE = range(1, 11)


def generator(*key: int) -> Generator:
    """The generator of one draw: the same key gives the same numbers in every process."""
    if min(key) < 0:
        raise DataError(f"seed {min(key)}: take one from 0 on")
    return np.random.default_rng(key)


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
