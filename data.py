"""Training data: real clips, photos and a procedural world become pairs (LR, HR) and the clip types of Eq. 5.

Paper: Sec. 4.1 (OpenVid-1M videos, LSDIR images, RealBasicVSR degradation, 25 frames of 512x512) and Eq. 5.

    datasets/videos    25 frames, shrink, crop ──┐
    datasets/images    still or moving crop ─────┼── flip ──> hr ── degrade.py ──> lr
    dead-leaves world  rendered ─────────────────┘

A sample is a pure function of (seed, global sample index): each draw comes from a generator seeded with these
two and its purpose. Ranks take slices of the index, so processes, workers and restarts change no sample.
Points are complex numbers, x + iy in pixels: turn z + shift zooms by |turn|, rotates by its angle and shifts.
"""

import argparse
import csv
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from einops import rearrange, repeat
from numpy.random import Generator
from torch import Tensor

from degrade import SCALE, VARIANTS, degrade, one_thread, unsharp
from runtime import UserError, run
from video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError, VideoReader, VideoWriter, read_clip, to_network

NOT_HR = {"X2", "X3", "X4", "val1"}  # LSDIR's bicubic LR images and its validation images
# The validation split, by source: what these files show is in no other file, and training never sees them.
HELD_OUT_VIDEOS = (
    "park_00.mp4", "park_01.mp4", "bee_00.mp4", "bee_01.mp4", "train_00.mp4", "train_01.mp4", "train_02.mp4",
)  # fmt: skip
HELD_OUT_IMAGES = (
    "mdn_ultra-hdr.jpg", "mdn_wide-background.jpg", "human_person-vlado.jpg", "human_person-vlado1.jpg",
    "recurser_Landscape_1.jpg", "recurser_Portrait_1.jpg", "oiio_tahoe-gps.jpg", "sam_groceries.jpg",
    "dali_antennas-1335762_960_720.jpg", "dali_badger-44204_1280.jpg", "linku_hato.jpg",
    "dali_abandoned-2179173_1280.jpg",
)  # fmt: skip

# Choice: all of these; the paper says neither how clips and crops are drawn nor how photos are used.
CANDIDATES = 64  # files tried for one sample before giving up
IMAGE_SHARE = 0.5  # of the pairs made from files, those made from photos
MOVING_SHARE = 0.75  # of those, the share seen by a moving camera
SHRINK = 0.5  # crops are shrunk by up to this: it hides the compression of the source
FLAT = 2.5  # mean step between neighbouring pixels, in grey levels, below which a crop is too flat
CROPS = 8  # crops tried to find one that is not
PAN = 3 + 3j  # pixels a frame that a camera drifts along x and y, at most
SWING = 0.004 + 0.004j  # log scale a frame that it zooms, radians a frame that it turns, at most
FINER = 2  # moving crops are drawn on a finer grid and averaged, which keeps them equally sharp everywhere
Place = str | Path | None  # of files: a folder, a list or a CSV


class DataError(UserError):
    """Training data that cannot be used; the message is one line and says what to do."""

    def __init__(self, message: str):
        # PyTorch raises a worker's error again, the worker's traceback as its message; the last line is ours.
        super().__init__(message.splitlines()[-1].split(f"{type(self).__name__}: ")[-1])


def generator(*key: int) -> Generator:
    """The generator of one draw: the same key gives the same numbers in every process."""
    if min(key) < 0:
        raise DataError(f"seed {min(key)}: take one from 0 on")
    return np.random.default_rng(key)


def as_tensor(clip: np.ndarray) -> Tensor:
    """(t h w 3) -> (t 3 h w)"""
    return torch.from_numpy(rearrange(clip, "t h w c -> t c h w").copy())


def list_files(source: Place, suffixes: set[str]) -> list[Path]:
    """Sorted files, held-out ones left out, of a folder and its subfolders, a list (.txt, a path a line) or
    OpenVid-1M's CSV (the videos that it names and that are unpacked beside it). Raises DataError for none."""
    source = Path(source)
    try:
        if source.is_dir():
            next(source.iterdir(), None)  # rglob passes over a folder that it may not read
            paths = [p for p in source.rglob("*") if not NOT_HR & set(p.relative_to(source).parts)]
        elif source.suffix == ".csv":
            with source.open(newline="", encoding="utf-8") as file:
                names = {row["video"] for row in csv.DictReader(file)}
            on_hub = source.parts[-3:-1] == ("data", "train")  # its place in the dataset's repository
            folder = source.parents[2] if on_hub else source.parent
            paths = [p for p in folder.rglob("*") if p.name in names]
        else:
            paths = [source.parent / line.strip() for line in source.read_text().splitlines()]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        reason = getattr(error, "strerror", None) or "not a text file or no column 'video'"
        raise DataError(f"{source}: {reason}; name a folder, a list (.txt) or OpenVid-1M's CSV") from None
    held_out = HELD_OUT_VIDEOS + HELD_OUT_IMAGES
    paths = sorted(p for p in paths if p.suffix.lower() in suffixes and p.name not in held_out)
    if not paths:
        raise DataError(f"{source}: nothing to train on; it should hold {', '.join(sorted(suffixes))}")
    return paths


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


def video_clip(path: Path, frames: int, size: int, stride: int, rng: Generator) -> np.ndarray:
    """(t size size 3) uint8: `frames` frames of a video, each `stride`-th from a random one on, cropped."""
    span = (frames - 1) * stride + 1
    with VideoReader(path) as reader:
        starts = max(0, (reader.frames or 0) - span) + 1
        reader.start = reader.time_of(int(rng.integers(starts)))
        clip = [frame.rgb for frame in islice(reader, 0, span, stride)]
    if len(clip) < frames:
        raise DataError(f"{path}: {len(clip)} of {frames} frames decode")
    return random_crop(np.stack(clip), size, rng)


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
# Purposes with a generator of their own; from 1 on, since a 0 at the end of a NumPy seed is not seen.
POOLED = ("lr", "hr", "video", "image", "random_images")  # what a pool keeps of a sample
KIND, PAIR, DEGRADE, VIDEO, ORDER, IMAGE, IMAGES, PIECE = range(1, 9)


class TrainingClips(torch.utils.data.Dataset):
    """Samples by global index: lr (t 3 size/4 size/4) and hr (t 3 size size), uint8 RGB, and `skipped`, the
    number of corrupt, short or small files passed over; with `real_types` also what `real_clips` takes.
    `sharpen` makes pairs of sharpened HR, as RealBasicVSR does. `procedural` is the share of pairs from the
    dead-leaves world; at 1 no files are needed, it stands in for real videos and
    images too. Raises DataError where no file, or none of CANDIDATES, can be used."""

    def __init__(
        self, videos: Place = "datasets/videos", images: Place = "datasets/images", frames: int = 25,
        size: int = 512, seed: int = 0, degradation: str = "realbasicvsr", procedural: float = 0.0,
        stride: int = 1, real_types: bool = False, sharpen: bool = False,
    ):  # fmt: skip
        if degradation not in VARIANTS:
            raise DataError(f"degradation {degradation}: there are {', '.join(VARIANTS)}")
        if size % SCALE or frames < 1 + real_types:
            raise DataError(f"{frames} frames, size {size}: take a multiple of {SCALE}, 2 frames to permute")
        need = "clip types 4 and 5 of Eq. 5 are photos" if real_types else "name --videos or --images"
        way_out = f"{need}; --procedural 1 needs no files"
        if procedural < 1 and not (videos and images if real_types else videos or images):
            raise DataError(f"no folder of {'videos' if images else 'images'} is named: {way_out}")
        self.videos = list_files(videos, VIDEO_SUFFIXES) if videos and procedural < 1 else []
        try:
            self.images = list_files(images, IMAGE_SUFFIXES) if images and procedural < 1 else []
        except DataError as error:
            raise DataError(f"{error}; {way_out}") from None
        self.frames, self.size, self.seed, self.stride = frames, size, seed, stride
        self.procedural, self.real_types, self.sharpen = procedural, real_types, sharpen
        # Choice: clips made of a photo take the video chain too, codec included; single frames have no codec.
        self.degradation = degradation if frames > 1 else "image"

    @one_thread()  # a worker a core, each with one thread, is the fastest way through many small steps
    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.pair(index) | (self.real(index) if self.real_types else {})

    def pair(self, index: int) -> dict[str, Tensor | int]:
        """lr, hr and `skipped`."""
        kind, photo = generator(self.seed, index, KIND).random(2)
        from_photo = self.images and (photo < IMAGE_SHARE or not self.videos)
        files = [] if kind < self.procedural else self.images if from_photo else self.videos
        hr, skipped = self.draw(files, self.frames, index, PAIR)
        hr = unsharp(hr) if self.sharpen else hr
        lr = degrade(hr, generator(self.seed, index, DEGRADE), self.degradation)
        return {"lr": as_tensor(lr), "hr": as_tensor(hr), "skipped": skipped}

    def real(self, index: int) -> dict[str, Tensor | np.ndarray]:
        """What `real_clips` takes, drawn independently of the pair."""
        unrelated = [self.draw(self.images, 1, index, IMAGES, k)[0] for k in range(self.frames)]
        return {
            "video": as_tensor(self.draw(self.videos, self.frames, index, VIDEO)[0]),
            "image": as_tensor(self.draw(self.images, 1, index, IMAGE)[0]),
            "random_images": as_tensor(np.concatenate(unrelated)),
            "order": permutation(self.frames, generator(self.seed, index, ORDER)),
        }

    def draw(self, files: list[Path], frames: int, *key: int) -> tuple[np.ndarray, int]:
        """A clip (t size size 3) of the first usable file, or of the world; how many were passed over."""
        if not files:
            return procedural_clip(generator(self.seed, *key), frames, (self.size, self.size)).frames, 0
        order = generator(self.seed, *key).choice(len(files), min(CANDIDATES, len(files)), replace=False)
        for skipped, path in enumerate(files[k] for k in order):
            rng = generator(self.seed, *key, 1 + skipped)  # never depends on the files before
            try:
                if files is self.videos:
                    clip = video_clip(path, frames, self.size, self.stride, rng)
                elif frames > 1 and rng.random() < MOVING_SHARE:
                    clip = moving_crop(read_clip(path)[0], frames, self.size, rng)
                else:
                    clip = np.repeat(random_crop(read_clip(path), self.size, rng), frames, axis=0)
                across, down, transposed = rng.random(3) < 0.5  # flips, alike in all frames
                clip = clip[:, :: -1 if down else 1, :: -1 if across else 1]
                return np.ascontiguousarray(clip.swapaxes(1, 2) if transposed else clip), skipped
            except (VideoError, DataError, OSError) as error:
                reason = str(error)
        raise DataError(f"none of {len(order)} files under {files[0].parent} can be used; the last: {reason}")


class ClipPool(torch.utils.data.Dataset):
    """Random pieces, lr (t 3 size/4 size/4) and hr (t 3 size size), of `count` samples made once, for
    a machine too slow to make every sample anew (AdcSR and Real-ESRGAN draw pairs from a pool, too); with
    `clips.real_types` what `real_clips` takes, too. A piece, too, is a pure function of seed and index.
    """

    def __init__(self, clips: TrainingClips, count: int, frames: int, size: int, workers: int):
        self.seed, self.frames, self.size, self.real_types = clips.seed, frames, size, clips.real_types
        if frames > clips.frames or size > clips.size:
            pool = f"the pool's {clips.frames} frames of {clips.size}"
            raise DataError(f"{frames} frames of {size} do not fit {pool}: see --pool-frames, --pool-size")
        made = torch.utils.data.DataLoader(clips, batch_size=None, sampler=range(count), num_workers=workers)
        # Cloned: what workers make is in shared memory, which is scarce.
        self.clips = [{k: v.clone() for k, v in clip.items() if k in POOLED} for clip in made]

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        rng = generator(self.seed, index, PIECE)
        clip = self.clips[rng.integers(len(self.clips))]
        sample = self.piece(clip, ("hr", "lr"), rng) | {"skipped": 0}
        if self.real_types:
            for name in ("video", "image", "random_images"):  # each from a sample of its own
                sample |= self.piece(self.clips[rng.integers(len(self.clips))], (name,), rng)
            sample["order"] = permutation(self.frames, rng)
        return sample

    def piece(self, clip: dict[str, Tensor], names: tuple[str, ...], rng: Generator) -> dict[str, Tensor]:
        """The same piece of the named clips; only `lr` is SCALE times smaller."""
        frames, _, h, w = clip[names[0]].shape
        t, side = min(self.frames, frames), self.size // SCALE
        room = (frames - t, h // SCALE - side, w // SCALE - side)
        i, y, x = (rng.integers(space + 1) for space in room)
        n = {name: 1 if name == "lr" else SCALE for name in names}
        down, across = ({k: slice(m * start, m * (start + side)) for k, m in n.items()} for start in (y, x))
        return {k: clip[k][i : i + t, :, down[k], across[k]] for k in names}


def permutation(frames: int, rng: Generator) -> np.ndarray:
    """A random order (t,) of at least two frames that is not the one they have. Paper: Eq. 5, video*."""
    order = np.arange(frames)
    while (order == np.arange(frames)).all():
        order = rng.permutation(frames)
    return order


def real_clips(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The four real clip types of Eq. 5, (b t ...), keyed as `discriminators.LABELS`.

    batch: order (b t), and of video, random_images (b t ...), image (b 1 ...) those that are wanted: all
    frames, or all maps made frame by frame. The shuffled clip's maps are the shuffled maps, made once.
    """
    order, types = batch["order"], {}
    if "video" in batch:
        types["video"] = batch["video"]
        shuffled = [clip[i] for clip, i in zip(batch["video"], order, strict=True)]
        types["shuffled_video"] = torch.stack(shuffled)
    if "image" in batch:
        types["image"] = repeat(batch["image"], "b 1 ... -> b t ...", t=order.shape[1])
    if "random_images" in batch:
        types["random_images"] = batch["random_images"]
    return types


def indices(step: int, rank: int, world: int, batch: int) -> range:
    """Global sample indices of one rank at a step, both from 0; `batch` is that of all ranks together."""
    if batch % world:
        raise DataError(f"{world} processes cannot share a batch of {batch}; take a multiple of {world}")
    return range(step * batch + rank, (step + 1) * batch, world)


def loader(clips, first: int, last: int, rank: int, world: int, batch: int, workers: int, overfit: int = 0):
    """DataLoader of this rank's batches for steps first, ..., last - 1, the same wherever the run began.

    overfit: how many different clips there are, again and again; 0: all of them."""
    steps = [indices(step, rank, world, batch) for step in range(first, last)]
    if overfit:
        steps = [[index % overfit for index in step] for step in steps]
    gc.collect()  # a forked worker that freed its parent's decoders would wait for threads it has not
    return torch.utils.data.DataLoader(
        clips, batch_sampler=steps, num_workers=workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=own_group,
    )  # fmt: skip


def own_group(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach whole process groups, and the parent needs its workers until it has
    saved; it ends them itself."""
    os.setpgid(0, 0)


def micro_batches(batch: dict[str, Tensor], size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """A batch cut into parts of `size` clips, on the device; `skipped` is left out."""
    names = [name for name in batch if name != "skipped"]
    parts = zip(*(batch[name].to(device, non_blocking=True).split(size) for name in names))
    return [dict(zip(names, clips)) for clips in parts]


def to_inputs(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Frames (uint8) in the networks' range [-1, 1], anything else as it is."""
    return {name: to_network(x) if x.dtype == torch.uint8 else x for name, x in clips.items()}


def validation_clips(videos: Place, images: Place, frames: int = 25, size: int = 256) -> Iterator[tuple]:
    """(name, hr (t size size 3), lr (t size/4 size/4 3)), uint8, of the held-out files that are there."""
    named = [(Path(videos) / name, VIDEO) for name in HELD_OUT_VIDEOS if videos]
    named += [(Path(images) / name, IMAGE) for name in HELD_OUT_IMAGES if images]
    for number, (path, kind) in enumerate(named):
        rng = generator(0, number, kind)
        with suppress(VideoError, DataError):
            if kind == VIDEO:
                hr = video_clip(path, frames, size, 1, rng)
            else:
                hr = moving_crop(read_clip(path)[0], frames, size, rng)
            yield path.stem, hr, degrade(hr, generator(0, number, DEGRADE))


def fixed_clips(videos: Place, images: Place, frames: int, size: int, count: int) -> list[tuple]:
    """`count` of the validation clips, or procedural ones where a data set has none of the held-out files."""
    clips = list(validation_clips(videos, images, frames, size)) if count else []
    for seed in range(0 if clips else count):
        hr = procedural_clip(generator(seed), frames, (size, size)).frames
        clips.append((f"procedural_{seed}", hr, degrade(hr, generator(seed, DEGRADE))))
    return clips[:: max(1, len(clips) // max(1, count))][:count]


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


class World(NamedTuple):
    """A rendered clip with its ground truth; `flow` and `visible` are None unless asked for."""

    frames: np.ndarray  # (t h w 3) uint8
    flow: np.ndarray | None  # (t-1 h w 2): what frame i shows at (x, y), the next shows at (x, y) + flow
    visible: np.ndarray | None  # (t-1 h w): that point is inside one shape, in view, uncovered in both
    cuts: tuple[int, ...]  # frames that begin a new shot; across a cut flow is 0 and nothing visible


class Leaf(NamedTuple):
    """A shape whose point u, counted from its middle, is at turn u + shift on the screen."""

    colour: np.ndarray  # (th tw 3), times cover
    cover: np.ndarray  # (th tw) in [0, 1]
    turn: np.ndarray  # (t,) complex
    shift: np.ndarray


def procedural_clip(rng: Generator, frames: int, size: tuple[int, int], shots=1, truth=False) -> World:
    """A clip of `size` (h, w) of textured shapes that hide each other and move, as does the camera."""
    if not 1 <= shots <= frames:
        raise DataError(f"{frames} frames cannot hold {shots} shots")
    cuts = np.sort(rng.choice(np.arange(1, frames), shots - 1, replace=False)).tolist()
    clip, flow = [], np.zeros((frames - 1, *size, 2), np.float32)
    visible = np.zeros(flow.shape[:3], bool)
    for start, stop in zip([0, *cuts], [*cuts, frames], strict=True):
        leaves = make_leaves(rng, stop - start, size)
        drawn, owners = zip(*(draw_leaves(leaves, i, size) for i in range(stop - start)), strict=True)
        clip += drawn
        for i in range(start, stop - 1) if truth else ():
            flow[i], visible[i] = exact_flow(leaves, i - start, owners)
    return World(np.stack(clip), flow if truth else None, visible if truth else None, tuple(cuts))


def make_leaves(rng: Generator, frames: int, size: tuple[int, int]) -> list[Leaf]:
    """The background and the leaves of one shot, farthest first, with their motion on the screen."""
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
    """A piece of a pattern, turned, stretched, in two colours, softly shaded: (h w 3) float32, 0..255."""
    pattern = patterns[rng.integers(len(patterns))]
    turn = rng.uniform(0.6, 1.4) * np.exp(1j * rng.uniform(-np.pi, np.pi))
    piece = view(pattern, turn, complex(*rng.uniform(0, len(pattern), 2)), size[::-1])
    first, second = (rng.uniform(20, 235) + rng.normal(0, 30, 3) for _ in range(2))
    across, down = (rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, side) for side in size[::-1])
    shade = 1 + across + down[:, None]
    colour = first.astype(np.float32) + (second - first).astype(np.float32) * piece[..., None]
    colour *= shade.astype(np.float32)[..., None]
    return cv2.GaussianBlur(colour.clip(0, 255), (0, 0), BAND_LIMIT)


def outline(rng: Generator, radius: float) -> np.ndarray:
    """Coverage (h w) float32 of a blob, a polygon or a bar of about this radius in pixels, in texels."""
    kind, angle = rng.integers(3), np.linspace(0, 2 * np.pi, 96, endpoint=False)
    if kind == 0:
        waves = (rng.normal(0, 0.3 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
        edge = np.exp(1j * angle) * np.clip(1 + sum(waves), 0.3, 1.7)
    elif kind == 1:
        edge = np.exp(1j * np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8))))
    else:
        edge = np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j]) / 2**0.5
    edge = edge.real * rng.uniform(0.2, 1) + 1j * edge.imag  # stretched along one axis, then turned
    edge *= radius * TEXELS * np.exp(1j * rng.uniform(0, 2 * np.pi))
    across, down = (int(np.abs(side).max()) + 5 for side in (edge.real, edge.imag))  # room for the blur
    points = np.stack([edge.real + across, edge.imag + down], axis=-1)
    mask = np.zeros((2 * down + 1, 2 * across + 1), np.uint8)
    cv2.fillPoly(mask, [np.rint(points * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    return cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), BAND_LIMIT)


def sample_clip(seed: int, frames: int, size: tuple[int, int]) -> np.ndarray:
    """A low-quality clip of `size` (h, w) to try the network on: the world above, degraded. (t h w 3)"""
    hr = procedural_clip(generator(seed), frames, (SCALE * size[0], SCALE * size[1])).frames
    return degrade(hr, generator(seed, DEGRADE))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a procedural low-quality clip to try the network on.")
    parser.add_argument("-o", "--output", required=True, help="video file or folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
    args = parser.parse_args()
    with VideoWriter(args.output, args.size[1], args.size[0], rate=25) as writer:
        for frame in sample_clip(args.seed, args.frames, args.size):
            writer.write(frame)


if __name__ == "__main__":
    run(main)
