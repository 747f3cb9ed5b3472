"""Training data: real clips, photos and a procedural world become pairs (LR, HR) and the clip types of Eq. 5.

Paper: Sec. 4 (OpenVid-1M videos, LSDIR images, RealBasicVSR degradation, 25 frames of 512x512) and Eq. 5.

    datasets/videos    25 frames, shrink, crop ──┐
    datasets/images    still or moving crop ─────┼── flip ──> hr ── degrade.py ──> lr
    dead-leaves world  rendered ─────────────────┘

A sample is a pure function of (seed, global sample index): each draw comes from a generator seeded with these
two and its purpose. Ranks take slices of the index, so processes, workers and restarts change no sample.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from degrade import SCALE, degrade
from video import VideoError, VideoReader, VideoWriter, read_clip

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
NOT_HR = {"X2", "X3", "X4", "val1"}  # LSDIR's bicubic LR images and its validation images

# The validation split, by source: what these files show is in no other file, and training never sees them.
HELD_OUT_VIDEOS = (
    *("park_00.mp4", "park_01.mp4"),
    *("bee_00.mp4", "bee_01.mp4"),
    *("train_00.mp4", "train_01.mp4", "train_02.mp4"),
)
HELD_OUT_IMAGES = (
    *("mdn_ultra-hdr.jpg", "mdn_wide-background.jpg", "human_person-vlado.jpg", "human_person-vlado1.jpg"),
    *("recurser_Landscape_1.jpg", "recurser_Portrait_1.jpg", "oiio_tahoe-gps.jpg", "sam_groceries.jpg"),
    *("dali_antennas-1335762_960_720.jpg", "dali_badger-44204_1280.jpg", "linku_hato.jpg"),
    "dali_abandoned-2179173_1280.jpg",
)

CANDIDATES = 64  # files tried for one sample before giving up                                  Choice
IMAGE_SHARE = (
    0.5  # pairs made from photos; the others from videos                             Choice: not given
)
MOVING_SHARE = 0.75  # of those, the share seen by a moving camera                              Choice
SHRINK = 0.5  # crops are shrunk by up to this: it hides the compression of the source          Choice
FLAT = 2.5  # mean step between neighbouring pixels, in grey levels, of a crop that is too flat Choice
CROPS = 8  # crops tried to find one that is not                                                Choice
PAN = 3.0  # pixels a frame a camera drifts, at most                                            Choice
ZOOM, TURN = 0.004, 0.004  # log scale and radians a frame, at most                             Choice


class DataError(ValueError):
    """Training data that cannot be used; the message is one line and says what to do."""


def generator(*key: int) -> np.random.Generator:
    """The generator of one draw: the same key gives the same numbers in every process."""
    return np.random.default_rng(key)


# ------------------------------------------------------------------------------------------------- the files


def list_files(source: str | Path, suffixes: frozenset[str], held_out: tuple[str, ...] = ()) -> list[Path]:
    """Sorted files of a folder and its subfolders, of a list (.txt, a path a line) or of OpenVid-1M's .csv.

    A folder that holds OpenVid-1M's CSV gives the videos that the CSV names. Raises DataError for none.
    """
    source = Path(source)
    if source.is_dir():
        tables = sorted([*source.glob("OpenVid*.csv"), *source.glob("data/train/OpenVid*.csv")])
        if tables and suffixes == VIDEO_SUFFIXES:
            return list_files(tables[0], suffixes, held_out)
    try:
        if source.suffix == ".csv":
            paths = read_openvid(source)
        elif source.is_dir():
            next(source.iterdir(), None)  # rglob passes over a folder that it may not read
            paths = [p for p in source.rglob("*") if not NOT_HR & set(p.relative_to(source).parts)]
        else:
            paths = [source.parent / line.strip() for line in source.read_text().splitlines()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{source}: {reason}; name a folder, a list (.txt) or OpenVid-1M's CSV") from None
    paths = sorted(p for p in paths if p.suffix.lower() in suffixes and p.name not in held_out)
    if not paths:
        raise DataError(f"{source}: nothing to train on; it should hold {', '.join(sorted(suffixes))}")
    return paths


def read_openvid(table: Path) -> list[Path]:
    """Videos that OpenVid-1M's CSV names in its column `video` and that are unpacked beside it."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "video" not in (rows.fieldnames or ()):
            raise DataError(f"{table}: no column 'video' among {rows.fieldnames}; is it OpenVid-1M's CSV?")
        names = {row["video"] for row in rows}
    as_on_hub = table.parent.parts[-2:] == ("data", "train")  # the CSV's place in the dataset's repository
    folder = table.parents[2] if as_on_hub else table.parent
    return [path for path in folder.rglob("*") if path.name in names]


# ----------------------------------------------------------------------------------------------- real clips


def detail(frame: np.ndarray) -> float:
    """Mean step between neighbouring pixels of a frame (h w 3), in grey levels."""
    luma = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()) / 2


def detailed(draw: Callable[[], tuple[slice, slice]], frame: np.ndarray) -> tuple[slice, slice]:
    """The first window that `draw` gives in which `frame` is not flat (sky, bokeh, a wall), else the best."""
    drawn = []
    while len(drawn) < CROPS and not (drawn and drawn[-1][0] >= FLAT):
        window = draw()
        drawn.append((detail(frame[window]), window))
    return max(drawn, key=lambda scored: scored[0])[1]


def random_crop(clip: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square window, the same in all frames of a clip (t h w 3), at its own size or shrunk to it by up to
    SHRINK: (t size size 3)."""
    h, w = clip.shape[1:3]
    if min(h, w) < size:
        raise DataError(f"{w}x{h} is smaller than the crop, {size}x{size}")

    def draw() -> tuple[slice, slice]:
        side = int(size / rng.uniform(max(SHRINK, size / min(h, w)), 1.0))
        y, x = rng.integers(h - side + 1), rng.integers(w - side + 1)
        return slice(y, y + side), slice(x, x + side)

    window = detailed(draw, clip[len(clip) // 2])
    return np.stack([cv2.resize(f[window], (size, size), interpolation=cv2.INTER_AREA) for f in clip])


def random_flip(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Left-right, up-down and transposed, each with probability 1/2, alike in all frames."""
    for axis in (2, 1):
        if rng.random() < 0.5:
            clip = np.flip(clip, axis)
    return np.ascontiguousarray(clip.swapaxes(1, 2) if rng.random() < 0.5 else clip)


def video_clip(path: Path, frames: int, size: int, stride: int, rng: np.random.Generator) -> np.ndarray:
    """`frames` frames of a video, each `stride`-th from a random one on, cropped: (t size size 3) uint8."""
    span = (frames - 1) * stride + 1
    with VideoReader(path) as reader:
        if min(reader.width, reader.height) < size:
            raise DataError(f"{path}: {reader.width}x{reader.height} is smaller than the crop, {size}x{size}")
        last = (reader.frames or span) - span
        if last < 0:
            raise DataError(f"{path}: {reader.frames} frames, {span} are needed")
        reader.start = reader.time_of(int(rng.integers(last + 1)))
        clip = [frame.rgb for frame in islice(reader, 0, span, stride)]
    if len(clip) < frames:
        raise DataError(f"{path}: ends early, {len(clip)} of {frames} frames decode")
    return random_crop(np.stack(clip), size, rng)


def image_clip(image: np.ndarray, frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A photo (h w 3) as a clip (t size size 3): as a camera sees it that moves, or one crop repeated."""
    if frames > 1 and rng.random() < MOVING_SHARE:
        return moving_crop(image, frames, size, rng)
    return np.repeat(random_crop(image[None], size, rng), frames, axis=0)


def smooth_path(frames: int, step: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth path (t,) around 0: a drift of at most `step` a frame and a slow sway by up to 5 of them."""
    time = np.arange(frames) - (frames - 1) / 2
    period, phase = rng.uniform(20, 60), rng.uniform(0, 2 * np.pi)
    return step * (rng.uniform(-1, 1) * time + rng.uniform(0, 5) * np.sin(2 * np.pi * time / period + phase))


def camera(frames: int, gentle: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A camera's path, `gentle` from 0 (still) to 1, as (turn (t,), pan (t,)): turn z + pan moves the points
    z = x + iy of a plane, in pixels. The modulus of `turn` is the zoom, its angle the rotation."""
    turn = np.exp(smooth_path(frames, ZOOM * gentle, rng) + 1j * smooth_path(frames, TURN * gentle, rng))
    return turn, smooth_path(frames, PAN * gentle, rng) + 1j * smooth_path(frames, PAN * gentle, rng)


def view(image, turn: complex, shift: complex, size, how=cv2.INTER_LINEAR, border=cv2.BORDER_REFLECT_101):
    """A frame of `size` (w, h) whose pixel z = x + iy shows the image at turn z + shift."""
    matrix = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    return cv2.warpAffine(image, matrix, size, flags=how | cv2.WARP_INVERSE_MAP, borderMode=border)


FINER = 2  # moving crops are drawn on a finer grid and averaged, which keeps them equally sharp everywhere


def moving_crop(image: np.ndarray, frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth pan, zoom and rotation over a photo (h w 3), exact below a pixel: (t size size 3) uint8."""
    h, w = image.shape[:2]
    corners = np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j]) * (size - 1) / 2
    for gentle in (rng.random(), 0.3, 0.1, 0.0):  # a small photo leaves no room for large moves
        turn, pan = camera(frames, gentle, rng)
        seen = turn[:, None] * corners + pan[:, None]
        low = np.array([seen.real.min(), seen.imag.min()])
        extent = np.array([np.ptp(seen.real), np.ptp(seen.imag)])
        room = (np.array([w, h]) - 1) / extent
        if room.min() >= 1:
            break
    else:
        raise DataError(f"{w}x{h} is smaller than the crop, {size}x{size}")
    step = rng.uniform(1, min(room.min(), 1 / SHRINK))  # photo pixels for a pixel of the crop

    def draw() -> tuple[slice, slice]:
        x, y = rng.random(2) * (np.array([w, h]) - 1 - step * extent)
        return slice(int(y), int(y + step * extent[1]) + 1), slice(int(x), int(x + step * extent[0]) + 1)

    rows, columns = detailed(draw, image)
    middle = complex(*((columns.start, rows.start) - step * low))
    clip, fine = [], size * FINER
    for turn_i, pan_i in zip(step * turn, middle + step * pan, strict=True):
        corner = pan_i - turn_i / FINER * (fine - 1) / 2 * (1 + 1j)
        frame = view(image, turn_i / FINER, corner, (fine, fine), cv2.INTER_CUBIC)
        clip.append(cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA))
    return np.stack(clip)


# --------------------------------------------------------------------------------------- what training takes

# Purposes with a generator of their own; from 1 on, since a 0 at the end of a NumPy seed is not seen.
KIND, PAIR, DEGRADE, VIDEO, ORDER, IMAGE, IMAGES = range(1, 8)


def to_tensor(clip: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(clip, "t h w c -> t c h w")))


class TrainingClips(torch.utils.data.Dataset):
    """Samples by global index, uint8 RGB. Corrupt, short and small files are passed over and counted.

    lr (t 3 size/4 size/4), hr (t 3 size size)    the pair
    skipped                                       files passed over for it
    with real_types, for Eq. 5 (see `real_clips`):
    video (t 3 size size), order (t,)             a real video and a permutation of its frames
    image (3 size size), random_images (t 3 size size)

    `procedural` is the share of pairs from the dead-leaves world. At 1 no files are needed: it then stands in
    for real videos and images as well. Raises DataError for a place where no file can be used, at once, and
    for a sample none of whose CANDIDATES files can be.
    """

    def __init__(
        self,
        videos: str | Path | None = "datasets/videos",
        images: str | Path | None = "datasets/images",
        frames: int = 25,
        size: int = 512,
        seed: int = 0,
        degradation: str = "realbasicvsr",
        procedural: float = 0.0,
        stride: int = 1,
        real_types: bool = False,
        held_out: tuple[str, ...] = HELD_OUT_VIDEOS + HELD_OUT_IMAGES,
    ):
        needed = procedural < 1
        self.videos = list_files(videos, VIDEO_SUFFIXES, held_out) if needed and videos else []
        self.images = list_files(images, IMAGE_SUFFIXES, held_out) if needed and images else []
        if needed and not (self.videos or self.images):
            raise DataError("no videos and no images; name a place for one of them, or make all procedural")
        if needed and real_types and not (self.videos and self.images):
            raise DataError("the clip types of Eq. 5 need videos and images; name a place for both")
        if size % SCALE or frames < 1 + real_types:
            raise DataError(
                f"{frames} frames, size {size}: need a size that {SCALE} divides, 2 frames to permute"
            )
        self.frames, self.size, self.seed, self.stride = frames, size, seed, stride
        self.procedural, self.real_types = procedural, real_types
        # Choice: clips made of a photo, still ones too, take the video chain: noise and compression that vary
        # over a scene that does not. Only single frames have no codec.
        self.degradation = degradation if frames > 1 else "image"
        for files, make in ((self.videos, self.video_clip), (self.images, self.photo_clip)):
            if files:
                self.usable(files, make, 0, PAIR)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        kind, photo = generator(self.seed, index, KIND).random(2)
        if kind < self.procedural:
            hr, skipped = self.world(self.frames, index, PAIR), 0
        elif self.images and (photo < IMAGE_SHARE or not self.videos):
            hr, skipped = self.usable(self.images, self.photo_clip, index, PAIR)
        else:
            hr, skipped = self.usable(self.videos, self.video_clip, index, PAIR)
        lr = degrade(hr, generator(self.seed, index, DEGRADE), variant=self.degradation)
        sample = {"lr": to_tensor(lr), "hr": to_tensor(hr), "skipped": skipped}
        return sample | self.draw_real(index) if self.real_types else sample

    def draw_real(self, index: int) -> dict[str, Tensor]:
        """The real clips of Eq. 5, drawn independently of the pair."""
        video = self.usable(self.videos, self.video_clip, index, VIDEO)[0]
        order = permutation(self.frames, generator(self.seed, index, ORDER))
        image = self.usable(self.images, self.photo, index, IMAGE)[0]
        unrelated = [self.usable(self.images, self.photo, index, IMAGES, k)[0] for k in range(self.frames)]
        return {"video": to_tensor(video), "order": torch.from_numpy(order), "image": to_tensor(image)[0],
                "random_images": to_tensor(np.concatenate(unrelated))}  # fmt: skip

    def usable(self, files: list[Path], make: Callable, *key: int) -> tuple[np.ndarray, int]:
        """make(file, generator), flipped, of the first file in a random order that it works for, and how many
        files came before; the procedural world where there are no files."""
        if not files:
            return self.world(self.frames if make == self.video_clip else 1, *key), 0
        order = generator(self.seed, *key).choice(len(files), min(CANDIDATES, len(files)), replace=False)
        for skipped, k in enumerate(order):
            rng = generator(self.seed, *key, 1 + skipped)  # never depends on the files before
            try:
                return random_flip(make(files[k], rng), rng), skipped
            except (VideoError, DataError, OSError) as error:
                reason = error
        raise DataError(f"none of {len(order)} files under {files[0].parent} can be used; the last: {reason}")

    def video_clip(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        return video_clip(path, self.frames, self.size, self.stride, rng)

    def photo_clip(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        return image_clip(read_clip(path)[0], self.frames, self.size, rng)

    def photo(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        return random_crop(read_clip(path), self.size, rng)

    def world(self, frames: int, *key: int) -> np.ndarray:
        return procedural_clip(generator(self.seed, *key), frames, (self.size, self.size)).frames


def permutation(frames: int, rng: np.random.Generator) -> np.ndarray:
    """A random order (t,) of the frames that is not the one they have. Paper: Eq. 5, video*."""
    if frames < 2:
        raise DataError(f"{frames} frame: a clip to permute needs at least 2")
    while True:
        order = rng.permutation(frames)
        if (order != np.arange(frames)).any():
            return order


def real_clips(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The four real clip types of Eq. 5, (b t 3 h w) uint8, from a batch of TrainingClips(real_types=True).
    Keyed as `discriminators.LABELS`; the fifth, "student", is the network's output in the training step."""
    video, order = batch["video"], batch["order"]
    return {
        "video": video,
        "shuffled_video": torch.take_along_dim(video, rearrange(order, "b t -> b t 1 1 1"), dim=1),
        "image": repeat(batch["image"], "b c h w -> b t c h w", t=video.shape[1]),
        "random_images": batch["random_images"],
    }


def indices(step: int, rank: int, world: int, batch: int) -> range:
    """Global sample indices of one rank at a step, counted from 0. `batch` is that of all ranks together, so
    that a step has the same samples however many processes share them."""
    if batch % world:
        raise DataError(
            f"a batch of {batch} cannot be shared by {world} processes; take a multiple of {world}"
        )
    return range(step * batch + rank, (step + 1) * batch, world)


def loader(
    clips: TrainingClips, first: int, last: int, rank: int, world: int, batch: int, workers: int
) -> torch.utils.data.DataLoader:
    """This rank's batches for steps first, ..., last - 1; the same if the run began before `first`."""
    steps = [indices(step, rank, world, batch) for step in range(first, last)]
    return torch.utils.data.DataLoader(
        clips, batch_sampler=steps, num_workers=workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=single_thread,
    )  # fmt: skip


def single_thread(_: int) -> None:
    """As many workers as cores, each with one thread, is the fastest way through a chain of small steps."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def validation_clips(
    videos: str | Path | None, images: str | Path | None, frames: int = 25, size: int = 256, seed: int = 0
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, hr (t size size 3), lr (t size/4 size/4 3)), uint8: crops of the held-out videos and moving
    crops of the held-out photos, degraded with fixed seeds by the default chain; absent and too small files
    are left out."""
    named = [(Path(videos) / name, VIDEO) for name in HELD_OUT_VIDEOS if videos]
    named += [(Path(images) / name, IMAGE) for name in HELD_OUT_IMAGES if images]
    for number, (path, kind) in enumerate(named):
        rng = generator(seed, number, kind)
        try:
            if kind == VIDEO:
                hr = video_clip(path, frames, size, 1, rng)
            else:
                hr = moving_crop(read_clip(path)[0], frames, size, rng)
        except (VideoError, DataError):
            continue
        yield path.stem, hr, degrade(hr, generator(seed, number, DEGRADE))


# ------------------------------------------------------------------------------------- the dead-leaves world

TEXELS = 2  # texture samples per output pixel: textures hold nothing finer than a pixel, so that drawing them
#             anywhere between pixels by linear interpolation neither aliases nor changes their sharpness
BAND_LIMIT = 1.0  # sigma in texels of the blur behind that: it leaves 0.29 at the Nyquist of the pixels
LEAVES = 70  # shapes for 256x256 pixels, which hide most of the background                     Choice
RADIUS = (8.0, 100.0)  # pixels, uniform in the logarithm                                       Choice
DRIFT, SPIN, GROW = 2.0, 0.02, 0.004  # a leaf's own pixels, radians, log scale a frame at most Choice
NEAR = (0.6, 1.4)  # share of the camera's pan in the farthest and the nearest leaf: parallax   Choice


@dataclass
class World:
    """A rendered clip with its ground truth; `flow` and `visible` are None unless asked for.

    frames  (t h w 3) uint8     RGB
    flow    (t-1 h w 2) float32 (dx, dy): the point at (x, y) of frame i is at (x + dx, y + dy) of frame i + 1
    visible (t-1 h w) bool      that point lies inside one shape, in view and uncovered in both frames
    cuts    tuple of int        frames that begin a new shot; across a cut flow is 0 and nothing visible
    """

    frames: np.ndarray
    flow: np.ndarray | None = None
    visible: np.ndarray | None = None
    cuts: tuple[int, ...] = ()


def procedural_clip(
    rng: np.random.Generator, frames: int, size: tuple[int, int], shots: int = 1, truth: bool = False
) -> World:
    """A dead-leaves clip of `size` (h, w): textured shapes that hide each other and move, as does the camera.

    A shape moves by similarities, so the flow is known exactly: turn u + shift takes its point u (a complex
    number, in pixels from its middle) to the screen. Raises DataError for fewer frames than shots.
    """
    if not 1 <= shots <= frames:
        raise DataError(f"{frames} frames cannot hold {shots} shots")
    cuts = np.sort(rng.choice(np.arange(1, frames), shots - 1, replace=False)).tolist()
    clip, flow = np.empty((frames, *size, 3), np.uint8), np.zeros((frames - 1, *size, 2), np.float32)
    visible = np.zeros(flow.shape[:3], bool)
    for start, stop in zip([0, *cuts], [*cuts, frames], strict=True):
        leaves = make_leaves(rng, stop - start, size)
        owner = None
        for i in range(stop - start):
            before, (clip[start + i], owner) = owner, draw_leaves(leaves, i, size)
            if truth and i > 0:
                flow[start + i - 1], visible[start + i - 1] = exact_flow(leaves, i - 1, before, owner)
    return World(clip, flow, visible, tuple(cuts)) if truth else World(clip, cuts=tuple(cuts))


@dataclass
class Leaf:
    """A shape: cover (th tw) in [0, 1], colour (th tw 3) times that, and its motion: complex (t,)."""

    colour: np.ndarray
    cover: np.ndarray
    turn: np.ndarray
    shift: np.ndarray


def make_leaves(rng: np.random.Generator, frames: int, size: tuple[int, int]) -> list[Leaf]:
    """The background and the leaves of one shot, farthest first, with their motion on the screen."""
    h, w = size
    middle = complex(w - 1, h - 1) / 2
    gentle = rng.random()  # Choice: from almost still to fast
    zoom, pan = camera(frames, gentle, rng)
    noise = make_noise(rng, min(PATTERN, round(1.5 * TEXELS * max(size))))
    patterns = [make_pattern(rng, kind, noise) for kind in PATTERNS]
    ground = paint(
        rng, patterns[rng.integers(len(patterns))], (round(1.5 * TEXELS * h), round(1.5 * TEXELS * w))
    )
    leaves = [Leaf(ground, np.ones(ground.shape[:2], np.float32), zoom, middle + zoom * pan * NEAR[0])]
    count = round(LEAVES * h * w / 256**2)
    for k in range(count):
        shape = outline(rng, np.exp(rng.uniform(*np.log(RADIUS))))
        place = complex(*(rng.uniform(-0.7, 0.7, 2) * (w, h)))
        moves = gentle * (rng.random() < 0.5) * rng.random()  # Choice: half of them stand still in the world
        drift, spin, grow = DRIFT * moves, SPIN * moves, GROW * moves
        path = place + smooth_path(frames, drift, rng) + 1j * smooth_path(frames, drift, rng)
        own = np.exp(smooth_path(frames, grow, rng) + 1j * smooth_path(frames, spin, rng))
        near = NEAR[0] + (NEAR[1] - NEAR[0]) * (k + 1) / count
        colour = paint(rng, patterns[rng.integers(len(patterns))], shape.shape)
        leaves.append(Leaf(colour * shape[..., None], shape, zoom * own, middle + zoom * (path + pan * near)))
    return leaves


def draw_leaves(leaves: list[Leaf], i: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frame i (h w 3) uint8 and the leaf that owns each pixel (h w) int16, -1 where several share it."""
    h, w = size
    frame, owner = np.zeros((h, w, 3), np.float32), np.zeros((h, w), np.int16)
    for k, leaf in enumerate(leaves):
        turn, shift = leaf.turn[i], leaf.shift[i]
        th, tw = leaf.cover.shape
        reach = np.abs([turn.real, turn.imag]) @ np.array([[tw, th], [th, tw]]) / 2 / TEXELS + 1
        left, top = np.maximum(0, np.floor((shift.real, shift.imag) - reach)).astype(int)
        right, bottom = np.minimum((w, h), np.ceil((shift.real, shift.imag) + reach) + 1).astype(int)
        if k == 0:  # the background has no border
            left, top, right, bottom = 0, 0, w, h
        if left >= right or top >= bottom:
            continue
        m = TEXELS / turn  # screen to texture: texel = m * (pixel - shift) + middle of the texture
        origin = m * (complex(left, top) - shift) + complex(tw - 1, th - 1) / 2
        border = cv2.BORDER_REFLECT_101 if k == 0 else cv2.BORDER_CONSTANT
        colour, cover = (
            view(image, m, origin, (right - left, bottom - top), border=border)
            for image in (leaf.colour, leaf.cover)
        )
        inside = np.s_[top:bottom, left:right]
        frame[inside] *= cv2.cvtColor(1 - cover, cv2.COLOR_GRAY2RGB)
        frame[inside] += colour
        owner[inside][cover > 0.002] = -1
        owner[inside][cover > 0.998] = k
    return np.rint(frame).clip(0, 255).astype(np.uint8), owner


def exact_flow(
    leaves: list[Leaf], i: int, owner: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Flow (h w 2) from frame i to i + 1 and its visibility (h w), from the motion of each pixel's owner."""
    h, w = owner.shape
    turn = np.array([leaf.turn[i + 1] / leaf.turn[i] for leaf in leaves])
    before, now = (np.array([leaf.shift[j] for leaf in leaves]) for j in (i, i + 1))
    here = np.arange(w) + 1j * np.arange(h)[:, None]
    there = turn[owner] * (here - before[owner]) + now[owner]
    move = np.where(owner >= 0, there - here, 0)
    x, y = np.floor(there.real).astype(int), np.floor(there.imag).astype(int)
    visible = (owner >= 0) & (x >= 0) & (y >= 0) & (x < w - 1) & (y < h - 1)
    x, y = x.clip(0, w - 2), y.clip(0, h - 2)
    for dy in (0, 1):
        for dx in (0, 1):
            visible &= after[y + dy, x + dx] == owner
    return np.stack([move.real, move.imag], axis=-1).astype(np.float32), visible


# What the leaves are made of: maps in [0, 1] that blend two colours.
PATTERN = 768  # texels a side, at most
PATTERNS = ("cloud", "grain", "cracks", "stripes", "text")


def make_pattern(rng: np.random.Generator, kind: str, noise: list[np.ndarray]) -> np.ndarray:
    """Clouds, grain, veins, bent stripes or text, (n n) in [0, 1], from octaves of noise (n n)."""
    cloud = sum(noise) / len(noise) ** 0.5  # equal octaves: amplitude 1/f, as in photographs
    if kind == "cloud":
        value = cloud
    elif kind == "grain":
        value = noise[0] + noise[1] + cloud
    elif kind == "cracks":
        value = 4 * np.abs(cloud) - 2
    elif kind == "stripes":
        phase = np.arange(len(cloud)) / rng.uniform(5, 20) + sum(noise[3:]) * rng.uniform(0, 0.3)
        value = 3 * np.sin(2 * np.pi * phase)
    else:
        value = text_page(rng, len(cloud)) / 32.0 - 4 + 0.5 * cloud
    return 1 / (1 + np.exp(-1.5 * value.astype(np.float32)))


def make_noise(rng: np.random.Generator, side: int) -> list[np.ndarray]:
    """Octaves of Gaussian noise (side side), finest first, each of unit variance before interpolation."""
    coarse = [rng.standard_normal((max(2, side >> k), max(2, side >> k)), np.float32) for k in range(7)]
    return [cv2.resize(layer, (side, side), interpolation=cv2.INTER_CUBIC) for layer in coarse]


def text_page(rng: np.random.Generator, side: int) -> np.ndarray:
    """Lines of random characters of many sizes: strokes as in writing. (side side) uint8."""
    page, row = np.zeros((side, side), np.uint8), 0
    alphabet = list("abcdefghijklmnoprstuvwxyzABCDEFGHKLMNRST0123456789   .,-")
    while row < side:
        scale, font, stroke = rng.uniform(0.4, 1.2), int(rng.integers(5)), int(rng.integers(1, 3))
        row += int(34 * scale)  # pixels between the lines of OpenCV's fonts at scale 1
        cv2.putText(page, "".join(rng.choice(alphabet, 90)), (0, row), font, scale, 255, stroke, cv2.LINE_AA)
    return page


def paint(rng: np.random.Generator, pattern: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A piece of a pattern, turned, stretched, in two colours, softly shaded: (h w 3) float32, 0..255."""
    h, w = size
    turn = rng.uniform(0.6, 1.4) * np.exp(1j * rng.uniform(-np.pi, np.pi))
    corner = rng.uniform(0, len(pattern), 2)
    piece = view(pattern, turn, complex(*corner), (w, h))
    first, second = (rng.uniform(20, 235) + rng.normal(0, 30, 3) for _ in range(2))
    across, down = rng.uniform(-0.3, 0.3, 2)
    shade = 1 + across * np.linspace(-1, 1, w) + down * np.linspace(-1, 1, h)[:, None]
    colour = first.astype(np.float32) + (second - first).astype(np.float32) * piece[..., None]
    colour *= shade.astype(np.float32)[..., None]
    return cv2.GaussianBlur(colour.clip(0, 255), (0, 0), BAND_LIMIT)


def outline(rng: np.random.Generator, radius: float) -> np.ndarray:
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
    try:
        with VideoWriter(args.output, args.size[1], args.size[0], rate=Fraction(25)) as writer:
            for frame in sample_clip(args.seed, args.frames, args.size):
                writer.write(frame)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
