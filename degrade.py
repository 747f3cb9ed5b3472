"""The RealBasicVSR degradation: how a sharp clip becomes the low-resolution clip the student learns from.

HR (t h w 3) uint8 --order 1--> blur, resize, noise, JPEG, video codec
                   --order 2--> blur, resize, noise, JPEG, then in either order
                                {video codec} and {resize to h/4 w/4, sinc blur}
                   --round----> LR (t h/4 w/4 3) uint8

Paper: Sec. 4.1 applies "the RealBasicVSR degradation pipeline" at scale 4 and says no more; the table below
is that pipeline's configuration. Every operation is a *draw* (what will happen to the clip: one value per
frame where a parameter moves in time) and an *apply* (a stream of frames in, a stream of frames out): frames
pass through all steps one by one. Values are grey levels, 0 to 255, throughout.

    python degrade.py clip.mp4 -o lr.mp4 --seed 3
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from math import ceil, log2, pi
from pathlib import Path
from typing import Annotated, NamedTuple

import av
import cv2
import numpy as np
import torch
import tyro
from av.codec.context import Flags

from runtime import UserError, run
from video import VideoReader, VideoWriter


class Walk(NamedTuple):
    """A parameter in time: uniform in [low, high] at first, then a uniform step within +-step per frame."""

    low: float
    high: float
    step: float
    settle: Callable = float  # round: whole numbers, rounded before the next step

    def draw(self, rng: np.random.Generator, t: int) -> np.ndarray:
        """Values (t,), clipped (not reflected) to the range."""
        values = [self.settle(rng.uniform(self.low, self.high))]
        for change in rng.uniform(-self.step, self.step, t - 1):
            values.append(self.settle(min(max(values[-1] + change, self.low), self.high)))
        return np.array(values)


# -- the table: every probability and range of the reference's configuration ---------------------------------

# fmt: off
SCALE = 4  # HR is 4 times LR on either side                     Paper: Sec. 4.1
KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
KERNELS = {"iso": .405, "aniso": .225, "generalized_iso": .108, "generalized_aniso": .027,
           "plateau_iso": .108, "plateau_aniso": .027, "sinc": .1}
INTERPOLATIONS = {"bilinear": 1 / 3, "area": 1 / 3, "bicubic": 1 / 3}
NOISES = {"gaussian": .5, "poisson": .5}
CODECS = {"libx264": 1 / 3, "h264": 1 / 3, "mpeg4": 1 / 3}  # FFmpeg takes h264 for libx264
TABLE = {  # Walk(low, high, step per frame)
    #                    order 1                     order 2                     final
    "blur_prob":        (1.0,                        0.8,                        0.8),
    "kernels":          (KERNELS,                    KERNELS,                    {"sinc": 1.0}),
    "sigma":            (Walk(0.2, 3.0, .02),        Walk(0.2, 1.5, .02),        None),
    "rotation":         (Walk(-pi, pi, pi / 10),     Walk(-pi, pi, pi / 10),     None),
    "beta_generalized": (Walk(0.5, 4.0, .05),        Walk(0.5, 4.0, .05),        None),
    "beta_plateau":     (Walk(1.0, 2.0, .1),         Walk(1.0, 2.0, .1),         None),
    "omega_below_13":   (Walk(pi / 3, pi, pi / 50),  Walk(pi / 3, pi, pi / 50),  Walk(pi / 3, pi, pi / 50)),
    "omega_from_13":    (Walk(pi / 5, pi, pi / 50),  Walk(pi / 5, pi, pi / 50),  Walk(pi / 3, pi, pi / 50)),
    "up_down_keep":     ((.2, .7, .1),               (.3, .4, .3),               None),
    "scale_up":         ((1.0, 1.5),                 (1.0, 1.2),                 None),
    "scale_down":       ((0.15, 1.0),                (0.3, 1.0),                 None),
    "interpolations":   (INTERPOLATIONS,             INTERPOLATIONS,             INTERPOLATIONS),
    "noises":           (NOISES,                     NOISES,                     None),
    "gaussian":         (Walk(1, 30, .1),            Walk(1, 25, .1),            None),
    "poisson":          (Walk(0.05, 3.0, .005),      Walk(0.05, 2.5, .005),      None),
    "grey_prob":        (0.4,                        0.4,                        None),
    "jpeg_quality":     (Walk(30, 95, 3, round),     Walk(30, 95, 3, round),     None),
    "codecs":           (CODECS,                     CODECS,                     None),
    "bitrate":          ((10_000, 100_000),          (10_000, 100_000),          None),
}
# fmt: on
CODEC_FIRST_PROB = 0.5  # of the final shuffle: codec, then resize and sinc; else the other way round
# Choice: the scale is constant in a clip (the reference walks by .015 and .03 per frame), so all frames have
# one size; there the encoder rescales every frame to the size of the first, and only sharpness wobbles.
# Choice: the bitrate's range, made for 256 x 256 HR, is kept at 512 x 512, where it is four times harsher.
ORDER_1, ORDER_2, FINAL = ({name: row[column] for name, row in TABLE.items()} for column in range(3))

KERNEL_TOLERANCE = 4e-4  # sum of |weights| given up for speed: moves no pixel by more than 0.1 grey levels
MIN_LEVELS = 64  # Choice: a floor for Poisson's v; a flat frame (v = 1) would drown in noise
H264 = ("libx264", "libopenh264", "mpeg4")  # the first that is there encodes
ENCODERS = {"libx264": H264, "h264": H264, "mpeg4": ("mpeg4", "libxvid", "msmpeg4")}


def pick(rng: np.random.Generator, probabilities: dict[str, float]) -> str:
    return str(rng.choice(list(probabilities), p=list(probabilities.values())))


def to_8bit(frame: np.ndarray) -> np.ndarray:
    """Clip and round to uint8, as every 8-bit step does with what the steps before it overshot."""
    return frame if frame.dtype == np.uint8 else cv2.convertScaleAbs(np.maximum(frame, 0))


class Blur(NamedTuple):
    """A kernel of one type and size per clip; its width, direction and shape move from frame to frame."""

    kernel: str
    size: int
    sigma: np.ndarray | None = None  # (2 t) pixels, along the two axes
    rotation: np.ndarray | None = None  # (t,) radians, of the axes
    beta: np.ndarray | None = None  # (t,) shape; 1 is the plain Gaussian
    omega: np.ndarray | None = None  # (t,) cut-off of the sinc, radians per pixel

    @classmethod
    def draw(cls, rng: np.random.Generator, t: int, table: dict) -> "Blur | None":
        if rng.random() >= table["blur_prob"]:
            return None
        kernel, size = pick(rng, table["kernels"]), int(rng.choice(KERNEL_SIZES))
        if kernel == "sinc":
            omega = table["omega_below_13" if size < 13 else "omega_from_13"].draw(rng, t)
            return cls(kernel, size, omega=omega)
        sigma = np.stack([table["sigma"].draw(rng, t) for _ in "xy"])
        rotation, beta = table["rotation"].draw(rng, t), np.ones(t)
        if "aniso" not in kernel:
            sigma, rotation = np.stack([sigma[0], sigma[0]]), np.zeros(t)
        if kernel.startswith(("generalized", "plateau")):
            beta = table["beta_" + kernel.split("_")[0]].draw(rng, t)
        return cls(kernel, size, sigma, rotation, beta)

    def kernels(self) -> np.ndarray:
        """(t size size), each summing to 1."""
        centre = self.size // 2
        x = np.arange(self.size) - centre
        y = x[:, None]
        if self.kernel == "sinc":  # a circular low-pass
            r, omega = np.hypot(x, y), self.omega[:, None, None]
            r[centre, centre] = 1.0  # no division by 0; the limit is set below
            kernels = omega * torch.special.bessel_j1(torch.from_numpy(omega * r)).numpy() / (2 * pi * r)
            kernels[:, centre, centre] = self.omega**2 / (4 * pi)
        else:
            cos, sin = np.cos(self.rotation)[:, None, None], np.sin(self.rotation)[:, None, None]
            sigma_x, sigma_y = self.sigma[:, :, None, None]
            distance = ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2
            power = distance ** self.beta[:, None, None]
            kernels = 1 / (1 + power) if self.kernel.startswith("plateau") else np.exp(-power / 2)
        return kernels / kernels.sum((1, 2), keepdims=True)

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame, kernel in zip(frames, self.kernels(), strict=True):
            yield filter_frame(frame, kernel)


def filter_frame(frame: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Frame (h w 3) filtered with a point-symmetric kernel, borders reflected: float32, not clipped. Where it
    is cheaper as the sum of a few column-row pairs; an isotropic Gaussian is one."""
    frame = frame.astype(np.float32, copy=False)  # OpenCV's filters from 8 bit to float are slow
    kernel = np.where(np.abs(kernel) < 1e-8, 0, kernel)  # denormal weights make a filter ten times slower
    spare = KERNEL_TOLERANCE / 2  # for the rim, which is often empty
    while len(kernel) > 1 and (rim := np.abs(kernel).sum() - np.abs(kernel[1:-1, 1:-1]).sum()) < spare:
        spare, kernel = spare - rim, kernel[1:-1, 1:-1]
    size = len(kernel)
    # Measured, in ms for 25 frames of 512 x 512: one filter (above size 11 OpenCV takes a DFT) and one pair.
    most_pairs = int((0.7 * size**2 if size <= 11 else 340) / (10 + 1.9 * size))
    u, s, v = np.linalg.svd(kernel)
    pairs, rest = [], kernel
    for column, row in list(zip(u.T * s[:, None], v, strict=True))[:most_pairs]:
        # A point-symmetric kernel has even and odd pairs; OpenCV is twice as fast if they are exactly so.
        sign = 1 if row @ row[::-1] > 0 else -1
        pairs.append(((column + sign * column[::-1]) / 2, (row + sign * row[::-1]) / 2))
        rest = rest - np.outer(*pairs[-1])
        if np.abs(rest).sum() < KERNEL_TOLERANCE / 2:
            parts = (cv2.sepFilter2D(frame, cv2.CV_32F, row, column) for column, row in pairs)
            return functools.reduce(cv2.add, parts)
    return cv2.filter2D(frame, cv2.CV_32F, kernel)


class Resize(NamedTuple):
    """One size for the whole clip, even on either side as video codecs want it."""

    interpolation: str
    size: tuple[int, int]  # h w

    @classmethod
    def draw(cls, rng: np.random.Generator, size: tuple[int, int], table: dict) -> "Resize":
        """From frames of `size` by a drawn scale, or to exactly `size` where the table has none."""
        if table["up_down_keep"]:
            mode = rng.choice(["up", "down", "keep"], p=table["up_down_keep"])
            scale = 1.0 if mode == "keep" else rng.uniform(*table[f"scale_{mode}"])
            size = tuple(max(2, 2 * int(side * scale / 2)) for side in size)
        return cls(pick(rng, table["interpolations"]), size)

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        flags = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}
        for frame in frames:
            frame = frame.astype(np.float32, copy=False)  # 8-bit resizing would clip bicubic's overshoot
            yield cv2.resize(frame, self.size[::-1], interpolation=flags[self.interpolation])


class Noise(NamedTuple):
    """Gaussian or Poisson noise, per channel or grey; a fresh field for each frame, its strength walks."""

    kind: str
    strength: np.ndarray  # (t,) gaussian: sigma in grey levels; poisson: factor on the noise
    grey: bool
    seed: int  # of the fields

    @classmethod
    def draw(cls, rng: np.random.Generator, t: int, table: dict) -> "Noise":
        kind = pick(rng, table["noises"])
        strength, grey = table[kind].draw(rng, t), bool(rng.random() < table["grey_prob"])
        return cls(kind, strength, grey, int(rng.integers(2**63)))

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        generator = torch.Generator().manual_seed(self.seed)  # twice as fast as NumPy's
        for frame, strength in zip(frames, self.strength.tolist(), strict=True):
            noise = torch.randn((*frame.shape[:2], 1 if self.grey else 3), generator=generator).numpy()
            noise *= strength if self.kind == "gaussian" else strength * self.poisson_sigma(frame)
            yield frame + noise

    def poisson_sigma(self, frame: np.ndarray) -> np.ndarray:
        """Deviation of Poisson(x v) / v, x in [0, 1], in grey levels: (h w 1) if grey else (h w 3). v is the
        number of distinct levels in the frame, rounded up to a power of 2."""
        # Choice: the normal law of the same mean and variance stands for Poisson's. Drawing that takes ten
        # times as long, and only pixels with few counts look different: at v = 256, those below level 10.
        clean = to_8bit(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if self.grey else frame)
        levels = np.count_nonzero(cv2.calcHist([clean.reshape(-1, 1)], [0], None, [256], [0, 256]))
        v = 2 ** ceil(log2(levels))
        sigma = np.sqrt(np.arange(256, dtype=np.float32) * 255 / max(v, MIN_LEVELS))
        return cv2.LUT(clean, sigma).reshape(*frame.shape[:2], -1)


class Jpeg(NamedTuple):
    quality: np.ndarray  # (t,) integers

    @classmethod
    def draw(cls, rng: np.random.Generator, t: int, table: dict) -> "Jpeg":
        return cls(table["jpeg_quality"].draw(rng, t))

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame, quality in zip(frames, self.quality.tolist(), strict=True):
            bgr = cv2.cvtColor(to_8bit(frame), cv2.COLOR_RGB2BGR)
            _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
            yield cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


class Codec(NamedTuple):
    """Through a video encoder and back, at one bitrate per clip."""

    codec: str
    bitrate: int  # bits per frame

    @classmethod
    def draw(cls, rng: np.random.Generator, table: dict) -> "Codec":
        bitrate, codec = int(rng.integers(*table["bitrate"], endpoint=True)), pick(rng, table["codecs"])
        return cls(codec, bitrate)

    def encoder(self, h: int, w: int) -> av.VideoCodecContext:
        wanted = ENCODERS[self.codec]
        name = next((name for name in wanted if name in av.codecs_available), None)
        if name is None:
            raise UserError(f"PyAV has no encoder {' or '.join(wanted)}; install PyPI's wheel of av")
        if name != wanted[0]:  # Python shows a warning once
            warnings.warn(f"PyAV has no encoder {wanted[0]}; {name} takes its place", stacklevel=2)
        encoder = av.CodecContext.create(name, "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.thread_count = w, h, "yuv420p", 1
        encoder.framerate, encoder.time_base = Fraction(1), Fraction(1)  # so bitrate is bits per frame
        # The tolerance is PyAV's for the stream of a file, so the reference's; mpeg4's quality hangs on it.
        encoder.bit_rate, encoder.bit_rate_tolerance = self.bitrate, 128_000
        encoder.flags |= Flags.global_header  # as in mp4: headers come apart and cost the first frame no bits
        if name == "libx264":
            # Choice: mbtree off (on in the reference), for with it x264 is not repeatable at many sizes.
            encoder.options = {"x264-params": "mbtree=0"}
        encoder.open()
        return encoder

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        frames = iter(frames)
        first = next(frames)
        h, w = first.shape[:2]
        encoder = self.encoder(h + h % 2, w + w % 2)
        decoder = av.CodecContext.create(encoder.codec.canonical_name, "r")
        decoder.extradata, decoder.thread_count = encoder.extradata, 1
        images = (self.to_video(frame, pts) for pts, frame in enumerate(chain([first], frames)))
        packets = (packet for image in chain(images, [None]) for packet in encoder.encode(image))
        for packet in chain(packets, [None]):  # None, here and above, asks for what is still held back
            for decoded in decoder.decode(packet):
                yield cv2.cvtColor(decoded.to_ndarray(), cv2.COLOR_YUV2RGB_I420)[:h, :w]

    def to_video(self, frame: np.ndarray, pts: int) -> av.VideoFrame:
        h, w = frame.shape[:2]
        frame = cv2.copyMakeBorder(to_8bit(frame), 0, h % 2, 0, w % 2, cv2.BORDER_REFLECT)
        # FFmpeg's own conversion, which the reference takes, darkens textures by about one grey level.
        image = av.VideoFrame.from_ndarray(cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420), format="yuv420p")
        image.pts = pts
        return image


# -- the chain -----------------------------------------------------------------------------------------------

Step = Blur | Resize | Noise | Jpeg | Codec


def draw_steps(rng: np.random.Generator, t: int, h: int, w: int) -> list[Step]:
    """All that will happen to one clip of t frames of h w, in order; a single frame passes no codec."""

    def order(table: dict, size: tuple[int, int]) -> list[Step | None]:
        blur, resize = Blur.draw(rng, t, table), Resize.draw(rng, size, table)
        return [blur, resize, Noise.draw(rng, t, table), Jpeg.draw(rng, t, table), Codec.draw(rng, table)]

    order_1 = order(ORDER_1, (h, w))
    *order_2, codec = order(ORDER_2, order_1[1].size)
    to_lr = [Resize.draw(rng, (h // SCALE, w // SCALE), FINAL), Blur.draw(rng, t, FINAL)]
    shuffled = [codec, *to_lr] if rng.random() < CODEC_FIRST_PROB else [*to_lr, codec]
    return [step for step in order_1 + order_2 + shuffled if step and (t > 1 or not isinstance(step, Codec))]


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV on this thread alone: loader workers have a core each, and more threads would fight for it."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def degrade(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """LR (t h/4 w/4 3) uint8 of an HR clip (t h w 3) uint8 RGB; a function of clip and generator state alone.

    Raises UserError for another shape or dtype, and for sides that are no multiple of 4.
    """
    t, h, w = clip.shape[:3] if clip.ndim == 4 else (0, 0, 0)
    if clip.dtype != np.uint8 or not t * h * w or clip.shape[3] != 3 or h % SCALE or w % SCALE:
        got = f"{clip.shape} {clip.dtype}"
        raise UserError(f"degrade takes (t h w 3) uint8, h and w multiples of {SCALE}, not {got}; crop it")
    with one_thread():
        frames = iter(clip)
        for step in draw_steps(rng, t, h, w):
            frames = step.apply(frames)
        return np.stack([to_8bit(frame) for frame in frames])


@dataclass(frozen=True)
class Args:
    clip: tyro.conf.Positional[Path]  # video, image or folder of frames; sides are cut to multiples of 8
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # LR video, at a quarter of the size
    seed: int = 0
    frames: int = 100  # of the clip at most


def main() -> None:
    args = tyro.cli(Args, description="Degrade a clip as the training does, to look at.")
    if args.seed < 0 or args.frames < 1:
        raise UserError(f"--seed {args.seed} --frames {args.frames}: seeds start at 0, frames at 1")
    with VideoReader(args.clip) as reader:
        h, w = reader.height // 8 * 8, reader.width // 8 * 8  # LR has even sides, as video needs
        clip = np.stack([frame.rgb[:h, :w] for frame in islice(reader, args.frames)])
    lr = degrade(clip, np.random.default_rng(args.seed))
    with VideoWriter(args.output, w // SCALE, h // SCALE, reader.rate) as writer:
        for frame in lr:
            writer.write(frame)


if __name__ == "__main__":
    run(main)
