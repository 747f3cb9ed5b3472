"""The RealBasicVSR degradation: how a sharp clip becomes the low-resolution clip the student learns from.

HR (t h w 3) uint8 --order 1--> blur, resize, noise, JPEG, video codec
                   --order 2--> blur, resize, noise, JPEG, then in either order
                                {video codec} and {resize to h/4 w/4, sinc blur}
                   --round----> LR (t h/4 w/4 3) uint8

Paper: Sec. 4.1 applies "the RealBasicVSR degradation pipeline" at scale 4 and says no more; the table below
is that pipeline's configuration. Every operation is a *draw* (what will happen to the clip: one value per
frame where a parameter moves in time) and an *apply* (a stream of frames in, a stream of frames out), so each
can be tested alone. Frames pass through all steps one by one. Values are grey levels, 0 to 255, throughout.

    python degrade.py clip.mp4 -o lr.mp4 --seed 3 --show steps.png
"""

import argparse
import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import ceil, log2, pi
from typing import NamedTuple

import av
import cv2
import numpy as np
import torch
from av.codec.context import Flags

from video import VideoError, VideoReader, VideoWriter

SCALE = 4  # HR is 4 times LR on either side                     Paper: Sec. 4.1


class Walk(NamedTuple):
    """A parameter in time: uniform in [low, high] at first, then a uniform step within +-step per frame."""

    low: float
    high: float
    step: float = 0.0

    def draw(self, rng: np.random.Generator, t: int, integer: bool = False) -> np.ndarray:
        """Values (t,), clipped (not reflected) to the range; rounded before the next step if `integer`."""
        settle = round if integer else float
        values = [settle(rng.uniform(self.low, self.high))]
        for step in rng.uniform(-self.step, self.step, t - 1):
            values.append(settle(min(max(values[-1] + step, self.low), self.high)))
        return np.array(values)


# -- the table: every probability and range of the reference's configuration ---------------------------------

# fmt: off
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
    "jpeg_quality":     (Walk(30, 95, 3),            Walk(30, 95, 3),            None),
    "codecs":           (CODECS,                     CODECS,                     None),
    "bitrate":          ((10_000, 100_000),          (10_000, 100_000),          None),
}
# fmt: on
# Choice: the scale is constant in a clip (the reference walks by .015 and .03 per frame), so all frames have
# one size; there the encoder rescales every frame to the size of the first, and only sharpness wobbles.
# Choice: the bitrate's range, made for 256 x 256 HR, is kept at 512 x 512, where it is four times harsher.
ORDER_1, ORDER_2, FINAL = ({name: row[column] for name, row in TABLE.items()} for column in range(3))


@dataclass(frozen=True)
class Variant:
    """What sets one `--degradation` apart from the table."""

    codec: bool = True  # False: stills, no video codec and no shuffle
    walks: bool = True  # False: of all parameters only the JPEG quality moves in time
    faults: bool = False  # True: keep the faults of the reference's code, for comparable test sets

    def walk(self, walk: Walk, rng: np.random.Generator, t: int) -> np.ndarray:
        return (walk if self.walks else walk._replace(step=0.0)).draw(rng, t)


VARIANTS = {
    "realbasicvsr": Variant(),
    "dove": Variant(walks=False, faults=True),
    "image": Variant(codec=False),
}


def pick(rng: np.random.Generator, probabilities: dict[str, float]) -> str:
    return str(rng.choice(list(probabilities), p=list(probabilities.values())))


def to_8bit(frame: np.ndarray) -> np.ndarray:
    """Clip and round to uint8, as every 8-bit step does with what the steps before it overshot."""
    return frame if frame.dtype == np.uint8 else cv2.convertScaleAbs(np.maximum(frame, 0))


# -- blur ----------------------------------------------------------------------------------------------------


def bessel_j1(x: np.ndarray) -> np.ndarray:
    return torch.special.bessel_j1(torch.from_numpy(x)).numpy()


def sinc_kernels(size: int, omega: np.ndarray) -> np.ndarray:
    """Circular low-pass kernels (t size size) that sum to 1, for cut-offs omega (t,) in radians per pixel."""
    x = np.arange(size) - size // 2
    r = np.hypot(x[:, None], x)
    r[size // 2, size // 2] = 1.0  # the centre is set below, to its limit
    omega = omega[:, None, None]
    kernels = omega * bessel_j1(omega * r) / (2 * pi * r)
    kernels[:, size // 2, size // 2] = omega[:, 0, 0] ** 2 / (4 * pi)
    return kernels / kernels.sum((1, 2), keepdims=True)


def gaussian_kernels(
    size: int, family: str, sigma: np.ndarray, rotation: np.ndarray, beta: np.ndarray
) -> np.ndarray:
    """Gaussian, generalized Gaussian or plateau kernels (t size size) that sum to 1.

    sigma (2 t) in pixels along the two axes, which rotation (t,) turns, in radians; beta (t,) is the shape.
    """
    x = np.arange(size) - size // 2
    y = x[:, None]
    cos, sin = np.cos(rotation)[:, None, None], np.sin(rotation)[:, None, None]
    sigma_x, sigma_y = sigma[:, :, None, None]
    distance = ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2
    power = distance ** beta[:, None, None]
    kernels = 1 / (1 + power) if family == "plateau" else np.exp(-power / 2)
    return kernels / kernels.sum((1, 2), keepdims=True)


KERNEL_TOLERANCE = 4e-4  # sum of |weights| given up for speed: moves no pixel by more than 0.1 grey levels


def separate(kernel: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]] | None]:
    """Cheapest form of a point-symmetric kernel: (kernel without its empty rim, column-row pairs or None).

    The pairs' outer products sum to the kernel. An isotropic Gaussian is one pair, others a few; None means
    that one two-dimensional filter is cheaper.
    """
    kernel = np.where(np.abs(kernel) < 1e-8, 0, kernel)  # denormal weights make a filter ten times slower
    rest = KERNEL_TOLERANCE / 2
    while len(kernel) > 1 and (rim := np.abs(kernel).sum() - np.abs(kernel[1:-1, 1:-1]).sum()) < rest:
        rest, kernel = rest - rim, kernel[1:-1, 1:-1]
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
            return kernel, pairs
    return kernel, None


def filter_frame(frame: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Frame (h w 3) filtered with a kernel, borders reflected: float32, not clipped."""
    frame = frame.astype(np.float32, copy=False)  # OpenCV's filters from 8 bit to float are slow
    kernel, pairs = separate(kernel)
    if pairs is None:
        return cv2.filter2D(frame, cv2.CV_32F, kernel)
    out = None
    for column, row in pairs:
        part = cv2.sepFilter2D(frame, cv2.CV_32F, row, column)
        out = part if out is None else cv2.add(out, part, dst=out)
    return out


@dataclass(frozen=True)
class Blur:
    """A kernel of one type and size per clip; its width, direction and shape move from frame to frame."""

    kernel: str
    size: int
    sigma: np.ndarray | None = None  # (2 t) pixels
    rotation: np.ndarray | None = None  # (t,) radians
    beta: np.ndarray | None = None  # (t,) shape; 1 is the plain Gaussian
    omega: np.ndarray | None = None  # (t,) cut-off of the sinc, radians per pixel
    keep_8bit: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, t: int, table: dict, variant: Variant) -> "Blur | None":
        if rng.random() >= table["blur_prob"]:
            return None
        kernel, size = pick(rng, table["kernels"]), int(rng.choice(KERNEL_SIZES))

        def walk(name: str) -> np.ndarray:
            return variant.walk(table[name], rng, t)

        if kernel == "sinc":
            omega = walk("omega_below_13" if size < 13 else "omega_from_13")
            return cls(kernel, size, omega=omega, keep_8bit=variant.faults)
        sigma, rotation, beta = np.stack([walk("sigma"), walk("sigma")]), walk("rotation"), np.ones(t)
        if kernel.endswith("_iso") or kernel == "iso":
            sigma, rotation = np.stack([sigma[0], sigma[0]]), np.zeros(t)
        if kernel.startswith(("generalized", "plateau")):
            beta = walk("beta_" + kernel.split("_")[0])
            if variant.faults:  # the reference draws anew between 1 and beta for every frame
                beta = rng.uniform(np.minimum(beta, 1), np.maximum(beta, 1))
        return cls(kernel, size, sigma, rotation, beta, keep_8bit=variant.faults)

    def label(self, i: int) -> str:
        return f"blur {self.kernel} {self.size}"

    def kernels(self) -> np.ndarray:
        """(t size size), each summing to 1."""
        if self.kernel == "sinc":
            return sinc_kernels(self.size, self.omega)
        return gaussian_kernels(self.size, self.kernel.split("_")[0], self.sigma, self.rotation, self.beta)

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame, kernel in zip(frames, self.kernels(), strict=True):
            blurred = filter_frame(frame, kernel)
            yield to_8bit(blurred) if self.keep_8bit and frame.dtype == np.uint8 else blurred


# -- resize --------------------------------------------------------------------------------------------------

INTERPOLATION_FLAGS = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}


@dataclass(frozen=True)
class Resize:
    """One size for the whole clip, even on either side as video codecs want it."""

    interpolation: str
    size: tuple[int, int]  # h w
    keep_8bit: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, size: tuple[int, int], table: dict, variant: Variant) -> "Resize":
        """From frames of `size` by a drawn scale, or to exactly `size` where the table has none."""
        if table["up_down_keep"]:
            mode = rng.choice(["up", "down", "keep"], p=table["up_down_keep"])
            scale = 1.0 if mode == "keep" else rng.uniform(*table[f"scale_{mode}"])
            size = tuple(max(2, 2 * int(side * scale / 2)) for side in size)
        return cls(pick(rng, table["interpolations"]), size, keep_8bit=variant.faults)

    def label(self, i: int) -> str:
        return f"resize {self.interpolation}"

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        flag = INTERPOLATION_FLAGS[self.interpolation]
        for frame in frames:
            if not self.keep_8bit:
                frame = frame.astype(np.float32, copy=False)  # 8-bit resizing would clip bicubic's overshoot
            if frame.shape[:2] != self.size:
                frame = cv2.resize(frame, self.size[::-1], interpolation=flag)
            yield frame


# -- noise ---------------------------------------------------------------------------------------------------

MIN_LEVELS = 64  # Choice: a floor for Poisson's v; a flat frame (v = 1) would drown in noise


def noise_field(generator: torch.Generator, h: int, w: int, grey: bool) -> np.ndarray:
    """Standard normal float32 (h w 3), or (h w 1) for all three channels if grey."""
    return torch.randn((h, w, 1 if grey else 3), generator=generator).numpy()  # twice as fast as NumPy's


@dataclass(frozen=True)
class Noise:
    """Gaussian or Poisson noise, per channel or grey; a fresh field for each frame, its strength walks."""

    kind: str
    strength: np.ndarray  # (t,) gaussian: sigma in grey levels; poisson: factor on the noise
    grey: bool
    seed: int  # of the fields
    unit: float  # grey levels that are 1.0 to Poisson's law
    min_levels: int

    @classmethod
    def draw(cls, rng: np.random.Generator, t: int, table: dict, variant: Variant) -> "Noise":
        kind = pick(rng, table["noises"])
        strength = variant.walk(table[kind], rng, t)
        grey, seed = bool(rng.random() < table["grey_prob"]), int(rng.integers(2**63))
        if variant.faults:  # Poisson's law on 0..255 instead of [0, 1]: noise 16 times weaker
            return cls(kind, strength, grey, seed, unit=1.0, min_levels=1)
        return cls(kind, strength, grey, seed, unit=255.0, min_levels=MIN_LEVELS)

    def label(self, i: int) -> str:
        return f"{'grey ' * self.grey}{self.kind} {self.strength[i]:.2f}"

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        generator = torch.Generator().manual_seed(self.seed)
        for frame, strength in zip(frames, self.strength.tolist(), strict=True):
            field = noise_field(generator, *frame.shape[:2], self.grey)
            field *= strength if self.kind == "gaussian" else strength * self.poisson_sigma(frame)
            yield frame + field

    def poisson_sigma(self, frame: np.ndarray) -> np.ndarray:
        """Deviation in grey levels, (h w 1) if grey else (h w 3), of Poisson(x v) / v at x = frame / unit.

        v is the number of distinct levels in the frame, rounded up to a power of 2.
        """
        # Choice: the normal law of the same mean and variance stands for Poisson's. Drawing that takes ten
        # times as long, and only pixels with few counts look different: at v = 256, those below level 10.
        clean = to_8bit(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if self.grey else frame)
        levels = np.count_nonzero(cv2.calcHist([clean.reshape(-1, 1)], [0], None, [256], [0, 256]))
        v = max(2 ** ceil(log2(levels)), self.min_levels)
        sigma = np.sqrt(np.arange(256, dtype=np.float32) * (self.unit / v))
        return cv2.LUT(clean, sigma).reshape(*frame.shape[:2], -1)


# -- compression ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jpeg:
    quality: np.ndarray  # (t,) integers
    faults: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, t: int, table: dict, variant: Variant) -> "Jpeg":
        return cls(table["jpeg_quality"].draw(rng, t, integer=True), variant.faults)

    def label(self, i: int) -> str:
        return f"JPEG {self.quality[i]}"

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame, quality in zip(frames, self.quality.tolist(), strict=True):
            if self.faults:  # truncated instead of rounded, and red taken for blue
                bgr = np.clip(frame, 0, 255).astype(np.uint8)
            else:
                bgr = cv2.cvtColor(to_8bit(frame), cv2.COLOR_RGB2BGR)
            _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
            bgr = cv2.imdecode(data, cv2.IMREAD_COLOR)
            yield bgr if self.faults else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


X264_PRESET = "medium"  # x264's own default, which the reference leaves
# What takes the place of a codec that this FFmpeg lacks: the next of its kind, then any.
ENCODERS = {
    "libx264": ("libx264", "libopenh264", "mpeg4"),
    "h264": ("libx264", "libopenh264", "mpeg4"),
    "mpeg4": ("mpeg4", "libxvid", "msmpeg4"),
}


def new_encoder(name: str, h: int, w: int, bitrate: int, preset: str) -> av.VideoCodecContext:
    encoder = av.CodecContext.create(name, "w")
    encoder.width, encoder.height, encoder.pix_fmt = w, h, "yuv420p"
    encoder.framerate, encoder.time_base = Fraction(1), Fraction(1)  # so bitrate is bits per frame
    # The tolerance is what PyAV gives the stream of a file, so the reference's; mpeg4's quality hangs on it.
    encoder.bit_rate, encoder.bit_rate_tolerance = bitrate, 128_000
    encoder.flags |= Flags.global_header  # as in mp4: headers come apart and cost the first frame no bits
    encoder.thread_count = 1
    if name == "libx264":
        # Choice: mbtree off (the reference leaves it on), for with it x264 is not repeatable at many sizes.
        encoder.options = {"preset": preset, "x264-params": "mbtree=0"}
    encoder.open()
    return encoder


@functools.cache
def find_encoder(name: str) -> str:
    """The first of a codec's candidates that works here; warns once a process if it is not the codec."""
    for candidate in ENCODERS[name]:
        try:
            new_encoder(candidate, 16, 16, 10_000, X264_PRESET)
        except (av.FFmpegError, ValueError):
            continue
        if candidate != ENCODERS[name][0]:
            warnings.warn(
                f"PyAV has no encoder {ENCODERS[name][0]}; {candidate} takes its place", stacklevel=2
            )
        return candidate
    raise VideoError(f"PyAV has no encoder {' or '.join(ENCODERS[name])}; install PyPI's wheel of av")


@dataclass(frozen=True)
class Codec:
    """Through a video encoder and back, at one bitrate per clip."""

    codec: str
    bitrate: int  # bits per frame
    preset: str = X264_PRESET
    faults: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, table: dict, variant: Variant, preset: str) -> "Codec":
        bitrate = int(rng.integers(*table["bitrate"], endpoint=True))
        return cls(pick(rng, table["codecs"]), bitrate, preset, variant.faults)

    def label(self, i: int) -> str:
        return f"{self.codec} {self.bitrate / 1000:.0f} kbit"

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        encoder, decoder, sent, received = None, None, 0, 0
        for frame in frames:
            h, w = frame.shape[:2]
            if encoder is None:
                name = find_encoder(self.codec)
                encoder = new_encoder(name, h + h % 2, w + w % 2, self.bitrate, self.preset)
                decoder = av.CodecContext.create(encoder.codec.canonical_name, "r")
                decoder.extradata, decoder.thread_count = encoder.extradata, 1
            image = self.to_video(frame)
            image.pts = sent
            sent += 1
            for packet in encoder.encode(image):
                for decoded in decoder.decode(packet):
                    received += 1
                    yield self.from_video(decoded)[:h, :w]
        for packet in [*encoder.encode(None), None]:
            for decoded in decoder.decode(packet):
                received += 1
                yield self.from_video(decoded)[:h, :w]
        if received != sent:
            raise RuntimeError(f"{self.codec} returned {received} of {sent} frames")

    def to_video(self, frame: np.ndarray) -> av.VideoFrame:
        h, w = frame.shape[:2]
        frame = to_8bit(frame)
        if h % 2 or w % 2:
            frame = cv2.copyMakeBorder(frame, 0, h % 2, 0, w % 2, cv2.BORDER_REFLECT)
        if self.faults:
            return av.VideoFrame.from_ndarray(frame, format="rgb24")
        return av.VideoFrame.from_ndarray(cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420), format="yuv420p")

    def from_video(self, decoded: av.VideoFrame) -> np.ndarray:
        if self.faults:  # FFmpeg's default conversion darkens texture by about one grey level
            return decoded.to_ndarray(format="rgb24").astype(np.float32)
        return cv2.cvtColor(decoded.to_ndarray(), cv2.COLOR_YUV2RGB_I420)


# -- the chain -----------------------------------------------------------------------------------------------

Step = Blur | Resize | Noise | Jpeg | Codec


def draw_steps(
    rng: np.random.Generator,
    t: int,
    h: int,
    w: int,
    variant: str = "realbasicvsr",
    x264_preset: str = X264_PRESET,
) -> list[Step]:
    """All that will happen to one clip of t frames of h w, in order."""
    v = VARIANTS[variant]

    def order(table: dict, size: tuple[int, int]) -> list[Step | None]:
        blur, resize = Blur.draw(rng, t, table, v), Resize.draw(rng, size, table, v)
        return [blur, resize, Noise.draw(rng, t, table, v), Jpeg.draw(rng, t, table, v)]

    order_1 = order(ORDER_1, (h, w))
    codec_1 = [Codec.draw(rng, ORDER_1, v, x264_preset)]
    order_2 = order(ORDER_2, order_1[1].size)
    codec_2 = [Codec.draw(rng, ORDER_2, v, x264_preset)]
    final = [Resize.draw(rng, (h // SCALE, w // SCALE), FINAL, v), Blur.draw(rng, t, FINAL, v)]
    codec_first = rng.random() < 0.5
    if not v.codec:
        steps = order_1 + order_2 + final
    elif codec_first:
        steps = order_1 + codec_1 + order_2 + codec_2 + final
    else:
        steps = order_1 + codec_1 + order_2 + final + codec_2
    return [step for step in steps if step is not None]


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV on this thread alone: loader workers have a core each, and more threads would fight for it."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def degrade(
    clip: np.ndarray,
    rng: np.random.Generator,
    variant: str = "realbasicvsr",
    sharpen: bool = False,
    x264_preset: str = X264_PRESET,
) -> np.ndarray:
    """LR (t h/4 w/4 3) uint8 of an HR clip (t h w 3) uint8 RGB; a function of clip and generator state alone.

    variant      "realbasicvsr"; "dove": its faults included; "image": for stills, without video codecs
    sharpen      make LR from `unsharp(clip)`, as the reference does; train on that clip as HR then
    x264_preset  "veryfast" saves a fifth of the time, at another balance of artefacts

    Raises ValueError for another shape, dtype or variant, and for sides that are no multiple of 4.
    """
    if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or not len(clip):
        raise ValueError(f"degrade takes a clip (t h w 3) uint8, not {clip.shape} {clip.dtype}")
    t, h, w = clip.shape[:3]
    if h % SCALE or w % SCALE or not h * w:
        raise ValueError(f"degrade takes sides that are multiples of {SCALE}, not {w} x {h}; crop the frames")
    if variant not in VARIANTS:
        raise ValueError(f"unknown degradation {variant!r}; there are {', '.join(VARIANTS)}")
    with one_thread():
        frames = iter(unsharp(clip) if sharpen else clip)
        for step in draw_steps(rng, t, h, w, variant, x264_preset):
            frames = step.apply(frames)
        # Choice: 8-bit for "dove" too, whose frames keep fractions where a resize came last; files cannot.
        return np.stack([to_8bit(frame) for frame in frames])


def unsharp(clip: np.ndarray) -> np.ndarray:
    """The reference's sharpened HR: clip (t h w 3) uint8 in and out.

    Where a pixel differs from a blurred copy by more than 10 grey levels, half the difference is added to it,
    through a soft mask.
    """

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (51, 51), 8.0)

    def sharpen(frame: np.ndarray) -> np.ndarray:
        x = frame.astype(np.float32)
        residual = x - blur(x)
        mask = blur((np.abs(residual) > 10).astype(np.float32))
        return to_8bit(x + mask * (np.clip(x + 0.5 * residual, 0, 255) - x))

    return np.stack([sharpen(frame) for frame in clip])


# -- a look at it --------------------------------------------------------------------------------------------

PANEL, COLUMNS = 320, 4  # pixels, panels a row


def picture_of_steps(clip: np.ndarray, steps: list[Step]) -> np.ndarray:
    """The centre of the middle frame of clip (t h w 3) before and after every step, as one (h w 3) uint8."""
    middle, panels = len(clip) // 2, {}

    def panel(frame: np.ndarray, text: str) -> np.ndarray:
        h, w = frame.shape[:2]
        side = max(1, min(h, w) // 2)
        top, left = (h - side) // 2, (w - side) // 2
        crop = to_8bit(np.ascontiguousarray(frame[top : top + side, left : left + side]))
        line = np.full((28, PANEL, 3), 255, np.uint8)
        cv2.putText(line, text, (4, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        return np.concatenate([cv2.resize(crop, (PANEL, PANEL), interpolation=cv2.INTER_NEAREST), line])

    def watch(frames: Iterable[np.ndarray], number: int, text: str) -> Iterator[np.ndarray]:
        for i, frame in enumerate(frames):
            if i == middle:
                panels[number] = panel(frame, f"{number} {text}, {frame.shape[1]}x{frame.shape[0]}")
            yield frame

    frames = watch(clip, 0, "HR")
    for number, step in enumerate(steps, start=1):
        frames = watch(step.apply(frames), number, step.label(middle))
    for _ in frames:  # drains the chain
        pass
    rest = -len(panels) % COLUMNS
    blank = np.full((PANEL + 28, PANEL, 3), 255, np.uint8)
    panels = [panels[number] for number in sorted(panels)] + [blank] * rest
    return np.concatenate(
        [np.concatenate(panels[i : i + COLUMNS], 1) for i in range(0, len(panels), COLUMNS)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Degrade a clip as the training does, to look at.")
    parser.add_argument("clip", help="video, image or folder of frames; sides are cropped to multiples of 8")
    parser.add_argument("-o", "--output", required=True, help="LR video, at a quarter of the size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=100, help="of the clip at most")
    parser.add_argument("--degradation", choices=VARIANTS, default="realbasicvsr")
    parser.add_argument("--sharpen", action="store_true", help="make LR from unsharp-masked HR")
    parser.add_argument("--show", metavar="PNG", help="picture of all steps on the middle frame")
    args = parser.parse_args()
    try:
        if args.seed < 0 or args.frames < 1:
            raise VideoError(
                f"--seed {args.seed} --frames {args.frames}: give a seed from 0, frames from 1 on"
            )
        reader = VideoReader(args.clip)
        clip = np.stack([frame.rgb for frame in islice(reader, args.frames)])
        t, h, w = (
            len(clip),
            reader.height // 8 * 8,
            reader.width // 8 * 8,
        )  # LR has even sides, as video needs
        if not h * w:
            raise VideoError(
                f"{args.clip}: {reader.width} x {reader.height} is too small; 8 x 8 is the least"
            )
        clip = np.ascontiguousarray(clip[:, :h, :w])
        lr = degrade(clip, np.random.default_rng(args.seed), args.degradation, args.sharpen)
        with VideoWriter(args.output, w // SCALE, h // SCALE, reader.rate) as writer:
            for frame in lr:
                writer.write(frame)
        if args.show:
            steps = draw_steps(np.random.default_rng(args.seed), t, h, w, args.degradation)
            picture = picture_of_steps(unsharp(clip) if args.sharpen else clip, steps)
            with VideoWriter(args.show, *picture.shape[1::-1], reader.rate) as writer:
                writer.write(picture)
    except VideoError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
