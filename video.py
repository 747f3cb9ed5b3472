"""A clip on disk, read and written as streams. All that knows containers, codecs and colour matrices is here.

    video | animation | folder of frames | image (stills.py)
                                      --VideoReader-->  Frame(rgb (h w 3) uint8, time in seconds)
    rgb (h w 3) uint8, time           --VideoWriter-->  H.264 video | folder of PNGs | PNG

`segments.py` makes of many such files one, with the source's sound.

Frames pass one by one, so memory does not grow with the clip. The paper mentions none of it, a viewer sees
all of it: presentation times, upright frames, the right colour matrix, the sound. Frames on disk and in data
sets are uint8 RGB, networks take [-1, 1]; `to_network` and `to_uint8` are the only converters.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from itertools import accumulate, chain, dropwhile, islice, pairwise
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

from runtime import complete, explained
from stills import IMAGE_SUFFIXES, VideoError, animation, as_rgb, is_moving, opened, profile, to_srgb

VIDEO_SUFFIXES = {
    ".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".wmv",
    ".flv", ".3gp", ".ogv",
}  # fmt: skip
SEGMENT_SUFFIX = ".nut"  # FFmpeg's own container keeps any time exactly; MP4's start at zero, Matroska rounds
VIDEO_FORMATS = {  # what H.264 is written to
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", SEGMENT_SUFFIX: "nut",
}  # fmt: skip
ONE_FOLDER = "Use one folder per clip."
FOLDER_RATE = Fraction(25)  # Choice: frames in a folder carry no rate, and a video of them needs one
COMMON_RATES = [Fraction(n * 1000, 1001) for n in (24, 30, 60)] + [Fraction(n) for n in (24, 25, 30, 50, 60)]
RATE_PACKETS = 240  # packets looked at to tell a constant rate from a variable one
JUMP = 10  # Choice: frames by which a clock may run ahead of the rate; beyond, it is another clock
PAUSE = 60  # Choice: seconds that a frame of a variable rate may last
LONGEST_NAME = 255  # bytes
TS_DISCONT = 0x200  # FFmpeg's flag of containers whose clock may jump: AVFMT_TS_DISCONT
REORDERED = 16  # H.264 and HEVC show a frame at most this many places from where it is stored
MAX_TIMESCALE = 10_000_000  # clock ticks a second; a sample's length in MP4 has 32 bits
PNG_THREADS = 4  # Choice: what one thread compresses in 0.1 s or more, a GPU makes in 0.04 s at 1080p
CRF = 16  # Choice: visually transparent, so that the encoder does not hide what the network adds
X264_PRESET = "medium"  # x264's own default
X264_THREADS = 12  # Choice: enough for a GPU's 1080p; fixed, for x264 encodes differently with another number
# Headers that do not depend on the content, so that segments fit together, and no macroblock trees, which
# encode some frame sizes differently from run to run.
X264 = {"x264-params": "stitchable=1:mbtree=0"}
PYAV = int(av.__version__.partition(".")[0])
# Metadata may be no UTF-8. PyAV 14 to 18 raise at it unless told; 19 keeps its bytes and has no argument.
FOREIGN_TEXT = {"metadata_errors": "replace"} if PYAV < 19 else {}

MATRICES = {1, 4, 5, 6, 7, 9}  # matrix coefficients that swscale converts, numbers of ITU-T H.273
BT709 = 1  # H.273: the same number for matrix, primaries and transfer
HDR_MATRIX = 9 if PYAV >= 18 else BT709  # H.273: that of BT.2020; PyAV 17 takes it for BT.601 where it writes
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # H.273
# swscale's default darkens coloured photos by 0.9 to 1.4 levels; with both flags their mean is exact to 0.04.
ACCURATE = 0x4 | 0x40000 | 0x2000  # SWS_BICUBIC, _ACCURATE_RND, _FULL_CHR_H_INT: PyAV names them from 18 on


def to_network(rgb: Tensor) -> Tensor:
    """uint8 frames of any shape -> float32 in [-1, 1]."""
    return rgb.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float frames in [-1, 1] of any shape -> uint8: clipped and rounded to nearest, halves up."""
    return (x.float() * 127.5 + 128).floor().clamp(0, 255).byte()


def to_unit(frames: Tensor) -> Tensor:
    """Frames of any shape, uint8 or float in [0, 1], as float in [0, 1]; ValueError for any other range."""
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if frames.min() < -1e-6 or frames.max() > 1 + 1e-6:
        raise ValueError(
            f"values from {frames.min():.3g} to {frames.max():.3g}; give uint8, or float in [0, 1]"
        )
    return frames


def to_clip(frames: Sequence[np.ndarray]) -> Tensor:
    """Frames (h w 3) uint8 -> a clip (t 3 h w) uint8."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def to_frames(clip: Tensor) -> np.ndarray:
    """A clip (t 3 h w), uint8 or float in [-1, 1] -> frames (t h w 3) uint8."""
    clip = clip if clip.dtype == torch.uint8 else to_uint8(clip)
    return clip.permute(0, 2, 3, 1).contiguous().cpu().numpy()


PROTOCOL_FRAMES = 25  # of a test clip                                  Paper: Sec. 4.1
PROTOCOL_SIDE = 128  # of its centre, in LR: the output is 512x512       Paper: Sec. 4.1


def centre(size: tuple[int, int], part: tuple[int, int], unit: int = 1) -> tuple[slice, slice]:
    """Rows and columns of the middle `part` (h, w) of frames of `size` (h, w), from a multiple of `unit` on.

    Paper: Sec. 4.1, the centre crop of the test clips; unit 4 cuts HR where unit 1 cuts its LR.
    """
    starts = [max(0, a // unit - b // unit) // 2 * unit for a, b in zip(size, part)]
    return tuple(slice(start, start + b) for start, b in zip(starts, part))


OURS = re.compile(r"\d{6,}\.png")  # frames in a folder that we wrote


def is_hidden(name: str) -> bool:
    """Whether a file is of a file manager, and nobody's data."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def natural_order(path: Path) -> list[str | int]:
    """Sort key under which 2.png comes before 10.png."""
    return [int(s) if s.isdecimal() else s.lower() for s in re.split(r"(\d+)", path.name)]


# --- reader ---------------------------------------------------------------------------------------------


@dataclass
class Frame:
    """One frame: rgb (h w 3) uint8, upright; time in seconds from the clip's first frame."""

    rgb: np.ndarray
    time: Fraction


def open_container(path: Path, name: str, **options: str) -> InputContainer:
    try:
        # "file:" tells colons in names from protocols; the whitelist keeps playlists off the network.
        options = {"protocol_whitelist": "file"} | options
        return av.open(f"file:{path}", container_options=options, **FOREIGN_TEXT)
    except PermissionError as error:
        raise VideoError(f"{name}: no permission to read it") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        empty = path.exists() and not path.stat().st_size
        what = "the file is empty" if empty else "not a video or image that can be read"
        raise VideoError(f"{name}: {what}. Is the download complete?") from error


def _matrix(frame: av.VideoFrame, codec: str) -> int | None:
    """The matrix that made this frame's YUV from RGB (H.273 number); None where the frame is RGB already."""
    if frame.format.is_rgb:
        return None
    if int(frame.colorspace) in MATRICES:
        return int(frame.colorspace)
    # Choice: untagged frames are read as players do (mpv's rule): BT.709 for HD, BT.601 below and for JPEG.
    hd = (frame.width >= 1280 or frame.height > 576) and codec != "mjpeg"
    return Colorspace.ITU709 if hd else Colorspace.ITU601


def _seconds(stream: VideoStream) -> Fraction:
    """The stream's own length, 0 if its header has none; Matroska keeps it in a tag, 00:00:05.005000000."""
    if stream.duration:
        return stream.duration * stream.time_base
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    return int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3]) if tag else Fraction(0)


def _matroska_is_cut(path: Path) -> bool:
    """Whether a Matroska file (mkv, webm) is shorter than it says of itself: FFmpeg does not tell."""
    with path.open("rb") as file:
        header = file.read(100)
    at = header.find(b"\x18\x53\x80\x67") + 4  # the id of the segment, which is all of the file
    if not header.startswith(b"\x1a\x45\xdf\xa3") or at < 4:
        return False
    length = 9 - header[at].bit_length()  # of its size, in bytes: the zeros in front of the first one
    size = int.from_bytes(header[at : at + length], "big") & (mask := 2 ** (7 * length) - 1)
    return size != mask and at + length + size > path.stat().st_size  # all ones: a live recording


def _display_matrix(frame: av.VideoFrame) -> tuple[int, ...]:
    """(a, b, c, d): pixel (x, y) is shown at (a x + c y, b x + d y)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d, *_ = np.frombuffer(data, "=i4").tolist() if data else (1, 0, 0, 0, 1)
    return a, b, c, d


def _cropping(stream: VideoStream, width: int, height: int) -> tuple[slice, slice]:
    """Rows and columns that the container wants to be shown; PyAV 17 does not tell."""
    data = getattr(stream.codec_context, "coded_side_data", {}).get("frame_cropping", bytes(16))
    top, bottom, left, right = np.frombuffer(data, "=u4").tolist()
    rows, columns = slice(top, height - bottom), slice(left, width - right)
    there = top + bottom < height and left + right < width
    return (rows, columns) if there else (slice(None), slice(None))


def _upright(rgb: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """The frame (h w 3) turned and mirrored: of the eight ways the one nearest to the matrix."""
    a, b, c, d = matrix
    if _on_its_side(matrix):
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _on_its_side(matrix: tuple[int, ...]) -> bool:
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


class VideoReader:
    """A video (mp4, mkv, mov, webm, avi, ts, ...), a folder of frames in natural order, an animation (gif,
    webp, png, avif) or one image: a stream.

    Opening decodes one frame, so what cannot be read raises VideoError here. Iterating yields Frames from
    `start` seconds on, as often as asked, once at a time; damage met on the way becomes a note at its end.

    kind                 "video" | "folder" | "animation" | "image"
    width, height        of the upright frame
    rate, constant_rate  frames a second, or their mean; whether every frame lies on the grid n / rate
    frames               expected number in the whole clip, for progress bars; None if unknown
    first                number, from `start` on, of the frame that iterating begins with: to pass over frames
                         costs less than to show them
    tick, start_time     seconds: the unit of the file's clock, and the first frame's time on it
    shifts               seconds from the file's clock to the clip's: another one after each jump of it
    aspect, hdr, icc     width of a pixel by its height; H.273 (matrix, primaries, transfer); colour profile;
                         each None if ordinary
    notes                lines for the user
    """

    def __init__(self, path: str | Path, start: float | Fraction = 0.0):
        self.path, self.start = Path(path), Fraction(start)
        self.name = (self.path.name or str(self.path)) + "/" * self.path.is_dir()
        self.rate, self.constant_rate, self.frames, self.first = FOLDER_RATE, True, None, 0
        self.tick = self.start_time = Fraction(0)
        self.shifts = [Fraction(0)]
        self.aspect, self.hdr, self.icc = None, None, None
        self.notes: list[str] = []
        self._container: InputContainer | None = None
        self._reformatter = VideoReformatter()
        if not self.path.exists():
            raise VideoError(f"{self.name}: no such file")
        still = self.path.suffix.lower() in IMAGE_SUFFIXES
        self.kind = "folder" if self.path.is_dir() else "image" if still else "video"
        self._probe_video() if self.kind == "video" else self._probe_images()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        if self._container is not None:
            self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        return self._iter_video() if self.kind == "video" else self._iter_images()

    def time_of(self, index: int) -> Fraction:
        """Presentation time of frame `index`, counted from 0, in seconds."""
        if self.constant_rate:
            return index / self.rate
        moving = self.kind == "video"
        times = sorted(self._packet_times(*self._open(), None)) if moving else self._times
        return times[index] - self.start_time if index < len(times) else times[-1] - self.start_time + 1

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _probe_images(self) -> None:
        files = [self.path] if self.kind == "image" else sorted(self.path.iterdir(), key=natural_order)
        self._files = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(f.name)]
        if not self._files:
            raise VideoError(f"{self.name}: no frames in this folder (looked for png, jpg, webp, bmp, ...)")
        with self._image(0) as image:
            self.height, self.width = as_rgb(image).shape[:2]
            self.icc, durations = profile(image), []
            if image.has_transparency_data:
                self._note("alpha channel dropped")
            if self.kind == "image" and is_moving(image):
                self.kind, durations = "animation", [seconds for _, seconds in animation(image)]
                self.rate, self.tick = len(durations) / sum(durations), Fraction(1, 1000)
                self.constant_rate = len(set(durations)) == 1
        self.frames = len(durations) or len(self._files)
        self._times = [0, *accumulate(durations)][:-1] or [n / self.rate for n in range(self.frames)]
        self._require_one_size()

    def _require_one_size(self) -> None:
        """VideoError where frames of a folder differ in size; whether they lie on their side shows when they
        are read: EXIF may stand behind the picture."""
        others = []
        for i, file in enumerate(self._files):
            with self._image(i) as image:
                if sorted(image.size) != sorted((self.width, self.height)):
                    others.append(f"{file.name} is {image.width}x{image.height}")
        if others:
            more = f" and {len(others) - 3} more" * (len(others) > 3)
            found = ", ".join(others[:3]) + more
            raise VideoError(f"{self.name}: {found}, expected {self.width}x{self.height}. {ONE_FOLDER}")

    def _image(self, i: int) -> AbstractContextManager[Image.Image]:
        return opened(self._files[i], self.name + self._files[i].name * (self.kind == "folder"))

    def _iter_images(self) -> Iterator[Frame]:
        if self.kind == "animation":
            with self._image(0) as image:
                first = sum(time < self.start for time in self._times) + self.first
                for (frame, _), time in islice(zip(animation(image), self._times), first, None):
                    yield Frame(as_rgb(frame), time)
            return
        for i in range(math.ceil(self.start * self.rate) + self.first, len(self._files)):
            with self._image(i) as image:
                rgb = as_rgb(image)
                if (h_w := rgb.shape[:2]) != (self.height, self.width):
                    found = f"{self._files[i].name} is {h_w[1]}x{h_w[0]}, expected {self.width}x{self.height}"
                    raise VideoError(f"{self.name}: {found}. {ONE_FOLDER}")
            yield Frame(rgb, i / self.rate)

    def _open(self) -> tuple[InputContainer, VideoStream]:
        """The container, opened afresh, and its first moving picture (cover art is none)."""
        if self._container is not None:
            self._container.close()
        self._container = container = open_container(self.path, self.name)
        for stream in container.streams.video:
            if stream.codec_context and not stream.disposition & Disposition.attached_pic:
                return container, stream
        raise self._nothing_decodes(container)

    def _nothing_decodes(self, container: InputContainer) -> VideoError:
        known = (s for s in container.streams if s.codec_context is not None)
        held = ", ".join(f"{s.type} {s.codec_context.name}" for s in known) or "none"
        what = f"no decodable video frames (streams: {held})"
        return VideoError(f"{self.name}: {what}. Is the download complete?")

    def _probe_video(self) -> None:
        self._probe_rate(*self._open())
        container, stream = self._open()
        first = next(self._decode(container, stream), None)
        if first is None:
            raise self._nothing_decodes(container)
        self._origin, self._size = first.pts, (first.width, first.height)
        self.start_time = (first.pts or 0) * self.tick
        self._codec, self._matrix = stream.codec_context.name, _display_matrix(first)
        self._shown = _cropping(stream, *self._size)
        try:
            self.height, self.width = self._rgb(first).shape[:2]
        except (av.error.FFmpegError, ValueError) as error:
            what = f"pixels of the kind {first.format.name} cannot be converted"
            raise VideoError(f"{self.name}: {what}. Convert the file to H.264 first.") from error
        aspect = stream.sample_aspect_ratio  # the container's, else the codec's
        if aspect not in (None, 0, 1):
            self.aspect = 1 / aspect if _on_its_side(self._matrix) else aspect
        alpha = any(c.is_alpha for c in first.format.components) or stream.metadata.get("alpha_mode") == "1"
        transfer = HDR_TRANSFERS.get(int(first.color_trc))
        if transfer:
            self.hdr = HDR_MATRIX, int(first.color_primaries), int(first.color_trc)
        a, b, c, d = self._matrix
        mirrored = a * d < b * c
        notes = {
            "mirrored, as its header says": mirrored,
            f"rotated upright by {abs(first.rotation)} degrees": first.rotation and not mirrored,
            "interlaced source; deinterlace first (ffmpeg -vf bwdif)": first.interlaced_frame,
            "alpha channel dropped": alpha,
            f"{transfer}/BT.2020 source; processed in its own transfer, tags copied, but written in 8 bits. "
            "The model was trained on SDR.": transfer,
        }
        self.notes += [note for note, applies in notes.items() if applies]

    def _packet_times(self, container, stream, most: int | None) -> Iterator[Fraction]:
        """Of the packets that are shown; a clock that starts again goes on."""
        shift, newest, last = 0, None, None
        with suppress(av.error.FFmpegError):  # damage is met again, and reported, when decoding
            for packet in islice(container.demux(stream), most):
                if packet.pts is None or packet.is_discard:
                    continue
                if packet.dts is not None:
                    if last is not None and packet.dts < last:
                        shift = newest + (packet.duration or 1) - packet.pts
                    last = packet.dts
                newest = packet.pts + shift if newest is None else max(newest, packet.pts + shift)
                yield (packet.pts + shift) * self.tick

    def _probe_rate(self, container: InputContainer, stream: VideoStream) -> None:
        """Set tick, rate, constant_rate and frames from the first packets' timestamps, without decoding."""
        self.tick = stream.time_base
        times = sorted(self._packet_times(container, stream, RATE_PACKETS))
        if len(times) > 2 * REORDERED:
            times = times[:-REORDERED]  # between the last ones some are still to come
        steps = [b - a for a, b in pairwise(times)]
        self._step = median(steps) if steps else Fraction(0)
        # Headers of remuxed files lie: 1000 frames a second is Matroska's clock.
        for self.rate in [r for r in (stream.guessed_rate, stream.average_rate) if r] + COMMON_RATES:
            smooth = accumulate((s if s <= JUMP * self._step else 1 / self.rate for s in steps), initial=0)
            rounding = [time - n / self.rate for n, time in enumerate(smooth)]
            self.constant_rate = max(rounding) - min(rounding) <= self.tick
            if self.constant_rate:
                self._step = 1 / self.rate
                break
        else:
            steps = [step for step in steps if step <= PAUSE]
            mean = len(steps) / max(sum(steps), self.tick)
            average = stream.average_rate or 0
            sane = mean / 2 < average < mean * 2
            self.rate = average if sane else mean.limit_denominator(1001) or FOLDER_RATE
        # Headers count what an edit list hides and the places of dropped frames; an index what is there.
        index = [entry for entry in stream.index_entries if not entry.is_discard] if stream.frames else []
        ends, there = (entry.pos + entry.size for entry in index), self.path.stat().st_size
        self._cut = max(ends, default=0) > there or _matroska_is_cut(self.path)
        longest = Fraction(container.duration or 0, av.time_base)  # stream, be it the sound
        seconds = (self.constant_rate and _seconds(stream)) or longest  # a variable rate is only a mean
        self.frames = len(index) or round(seconds * self.rate) or None

    def _decode(self, container, stream) -> Iterator[av.VideoFrame]:
        """Every frame that decodes. Choice: go on behind a damaged packet, as players do."""
        packets = container.demux(stream)
        self._damaged = begun = 0
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except av.error.FFmpegError:
                self._damaged += begun  # what a broadcast cut anywhere begins with, nobody misses
                continue
            begun = begun or len(frames) > 0
            yield from frames
            if packet is None:
                break
        with suppress(av.error.FFmpegError):  # what the decoder still holds where the container broke off
            yield from stream.decode(None)

    def _decode_from(self, time: Fraction) -> Iterator[av.VideoFrame]:
        """Frames from a key frame at or before `time` on; from the first where the clock may not tell."""
        if time > 0 and self._origin is not None and not self._jumps:
            target = self._origin + time / self.tick
            for back in (0, 5):  # seconds; an index may point behind the time asked for
                container, stream = self._open()
                with suppress(av.error.FFmpegError):
                    container.seek(math.floor(target - back / self.tick), stream=stream)
                    # What is shown before the first key frame may refer to frames that were never decoded.
                    frames = dropwhile(lambda f: not f.key_frame, self._decode(container, stream))
                    first = next(frames, None)
                    if first is not None and first.pts is not None and first.pts <= target:
                        return chain([first], frames)
        return self._decode(*self._open())

    @cached_property
    def _jumps(self) -> bool:
        """Whether the clock of a container where this happens goes back or far ahead: all of it is read."""
        container, stream = self._open()
        if not int(container.format.flags) & TS_DISCONT:
            return False
        with suppress(av.error.FFmpegError):
            times = [p.dts * self.tick for p in container.demux(stream) if p.dts is not None]
            return not all(0 <= b - a <= self._longest_step for a, b in pairwise(times))
        return True

    @cached_property
    def _sound_times(self) -> list[Fraction]:
        """When the packets of the first sound begin, on the file's clock."""
        times: list[Fraction] = []
        with open_container(self.path, self.name) as container, suppress(av.error.FFmpegError):
            for sound in container.streams.audio[:1]:
                times += (p.pts * p.time_base for p in container.demux(sound) if p.pts is not None)
        return times

    @property
    def _longest_step(self) -> Fraction:
        return max(JUMP * self._step, 0 if self.constant_rate else PAUSE)

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """(h w 3) uint8, upright, at the first frame's size."""
        if (frame.width, frame.height) != self._size:
            # Choice: players resize their window; a clip has one size here.
            self._note("the frame size changes on the way; frames scaled to the first one's size")
        rgb = {"src_colorspace": _matrix(frame, self._codec), "dst_color_range": ColorRange.JPEG}
        limited_grey = len(frame.format.components) == 1 and frame.color_range == ColorRange.MPEG
        if limited_grey:  # swscale takes all grey for full
            rgb["src_color_range"] = ColorRange.JPEG
        converted = self._reformatter.reformat(frame, *self._size, "rgb24", interpolation=ACCURATE, **rgb)
        shown = _upright(converted.to_ndarray()[self._shown], self._matrix)
        if limited_grey:
            most = (2 ** frame.format.components[0].bits - 1) / 2 ** (frame.format.components[0].bits - 8)
            black, white = 16 * 255 / most, 235 * 255 / most
            levels = (np.arange(256) - black) * 255 / (white - black)
            shown = (levels + 0.5).clip(0, 255).astype(np.uint8)[shown]
        return shown

    def _timed(self, frames: Iterable[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, Fraction]]:
        """Frames in their order, with their seconds since the first.

        Where the file's clock goes back, or ahead by more than JUMP frames while no sound fills the pause,
        the clip goes on at its rate: streams joined end to end, clocks that wrap. `shifts` tells the sound.
        """
        self.shifts, raw, time = [-self.start_time], None, -self.tick
        for frame in frames:
            last, before = raw, time
            if frame.pts is not None and self._origin is not None:
                raw = frame.pts * self.tick
            else:
                raw = self.start_time if last is None else last + self._step
            if last is not None and (raw <= last - self._step / 2 or self._is_jump(last, raw)):
                self.shifts.append(before + self._step - raw)
            time = raw + self.shifts[-1]
            # What a coarse clock has rounded off a constant rate is restored.
            grid = round(time * self.rate) / self.rate
            time = grid if self.constant_rate and abs(time - grid) <= self.tick else time
            if time <= before and last is not None:
                self._note("timestamps that do not increase were moved behind their predecessors")
                time = before + self.tick
            yield frame, time

    def _is_jump(self, last: Fraction, now: Fraction) -> bool:
        gap = now - last
        return gap > self._longest_step and not any(
            last + gap / 4 < time < now - gap / 4 for time in self._sound_times
        )

    def _iter_video(self) -> Iterator[Frame]:
        shown = 0
        for frame, time in self._timed(self._decode_from(self.start)):
            if time < self.start - Fraction(1, 10**6):  # a float cannot hold most frame times
                continue
            if shown < self.first:
                shown += 1
                continue
            try:
                rgb = self._rgb(frame)
            except (av.error.FFmpegError, ValueError):  # a damaged header can ask for anything
                self._damaged += 1
                continue
            shown += 1
            yield Frame(rgb, time)
        if self._damaged or self._cut:
            of = f" of {self.frames}" if self.frames and not self.start else ""
            self._note(f"damaged or truncated: {shown}{of} frames decode. Is the download complete?")


def read_clip(path: str | Path, start_frame: int = 0, frames: int | None = None) -> np.ndarray:
    """Frames start_frame, start_frame + 1, ... of a clip, `frames` of them or the rest: (t h w 3) uint8.

    A video is decoded from the key frame before, so a random clip of a long one costs little.
    VideoError where the clip has fewer frames.
    """
    with VideoReader(path) as reader:
        reader.start = reader.time_of(start_frame)
        clip = [frame.rgb for frame in islice(reader, frames)]
    if not clip or len(clip) < (frames or 1):
        asked = f"{frames or 1} from frame {start_frame} on"
        raise VideoError(f"{reader.name}: has {len(clip)} frames, not the {asked}. Ask for fewer.")
    return np.stack(clip)


# --- writer ---------------------------------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """What kind of file a name asks for, "" where it is a folder's: as My.Movie.1080p is."""
    suffix = path.suffix.lower()
    return suffix if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES | {SEGMENT_SUFFIX} else ""


def with_ending(path: Path, ending: str) -> Path:
    """`path` with an ending to its name, shortened where file systems would not take it."""
    name, room = os.fsencode(path.name), LONGEST_NAME - len(os.fsencode(ending))
    if len(name) <= room:
        return path.with_name(path.name + ending)
    mark = "-" + hashlib.sha256(name).hexdigest()[:8]
    whole = name[: room - len(mark)].decode(errors="ignore").encode()  # without half a character at its end
    return path.with_name(os.fsdecode(whole) + mark + ending)


def cannot_be_written(path: Path) -> AbstractContextManager:
    """The disk's and FFmpeg's complaints in one line."""
    causes = OSError, av.error.FFmpegError
    return explained(
        f"{path.name}: cannot be written", "Check the disk or choose another output.", VideoError, causes
    )


def refuse(path: Path, width: int, height: int) -> None:
    """VideoError where no clip of this size can become `path`.

    A file replaces a file, numbered PNGs replace numbered PNGs; nothing else is ever overwritten.
    """
    suffix = suffix_of(path)
    if suffix not in (*VIDEO_FORMATS, ".png", ""):
        way_out = "Use .mp4, .mkv, .mov, .png, or a folder for PNGs."
        raise VideoError(f"{path.name}: cannot write {suffix}. {way_out}")
    if suffix in VIDEO_FORMATS and (width % 2 or height % 2):
        odd = f"{path.name}: {width}x{height} is odd, 4:2:0 video has even sides"
        raise VideoError(f"{odd}. Give a folder: PNGs have any size.")
    if not path.parent.is_dir():
        raise VideoError(f"{path}: there is no folder {path.parent}. Create it first.")
    folder = path.is_dir()
    foreign = folder and any(not OURS.fullmatch(name) for name in os.listdir(path) if not is_hidden(name))
    if path.exists() and (foreign or folder == bool(suffix)):
        raise VideoError(f"{path.name}: something else has this name. Choose another output.")


class _Images:
    """Numbered PNGs in a folder, or one PNG, compressed by a few threads."""

    def __init__(self, path: Path, icc: bytes | None):
        self.path, self.icc, self.written, self.saving = path, icc, 0, deque()
        self.one = suffix_of(path) != ""
        self.threads = ThreadPoolExecutor(PNG_THREADS)
        if not self.one:
            path.mkdir()

    def write(self, rgb: np.ndarray, time: Fraction | None) -> None:
        if self.written and self.one:
            raise VideoError("a .png holds one frame, not a clip. Give a folder or a video as the output.")
        file = self.path if self.one else self.path / f"{self.written:06d}.png"
        # Level 1 of 9: the default takes several times longer to save a tenth of the room.
        options = {"format": "PNG", "compress_level": 1, "icc_profile": self.icc}
        save = partial(Image.fromarray(rgb.copy()).save, file, **options)
        self.saving.append(self.threads.submit(save))
        self.written += 1
        self.wait_for(all_but=2 * PNG_THREADS)

    def wait_for(self, all_but: int = 0) -> None:
        while len(self.saving) > all_but:
            self.saving.popleft().result()

    finish = wait_for

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


def clock(rate: Fraction, source: VideoReader | None) -> tuple[Fraction, int]:
    """(tick, step): the tick in seconds, of which the rate's grid and the source's own timestamps are whole
    multiples, and the ticks that a frame lasts."""
    tick = (source and source.tick) or Fraction(1, 90_000)  # 90 kHz: the clock of MPEG
    scale = math.lcm(rate.numerator, tick.denominator)
    if scale > MAX_TIMESCALE:
        scale = rate.numerator if source is None or source.constant_rate else tick.denominator
    return Fraction(1, scale), round(scale / rate)


class _Video:
    """H.264 4:2:0 in BT.709, or in the source's own HDR colours; pictures alone."""

    def __init__(self, path: Path, width: int, height: int, rate: Fraction, source, crf: int, preset: str):
        self.rate, self.last, self.written = rate, -1, 0
        self.tick, self.step = clock(rate, source)
        self.container = new_container(path)
        options = {"crf": str(crf), "preset": preset, **X264}
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        codec = self.stream.codec_context
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.thread_type, codec.thread_count = "FRAME", X264_THREADS
        codec.time_base = self.stream.time_base = self.tick
        self.colour = (source and source.hdr) or (BT709, BT709, BT709)
        codec.colorspace, codec.color_primaries, codec.color_trc = self.colour
        codec.color_range = ColorRange.MPEG
        codec.sample_aspect_ratio = (source and source.aspect) or Fraction(1)
        self.icc = source and source.icc
        self.reformatter = VideoReformatter()

    def write(self, rgb: np.ndarray, time: Fraction | None) -> None:
        time = self.written / self.rate if time is None else Fraction(time)
        yuv = {"format": "yuv420p", "dst_colorspace": self.colour[0], "dst_color_range": ColorRange.MPEG}
        frame = av.VideoFrame.from_ndarray(to_srgb(rgb, self.icc) if self.icc else rgb, format="rgb24")
        frame = self.reformatter.reformat(
            frame, src_color_range=ColorRange.JPEG, interpolation=ACCURATE, **yuv
        )
        frame.time_base = self.tick
        frame.pts = self.last = max(round(time / self.tick), self.last + 1)
        frame.duration = self.step  # MP4's rate is a mean, the last frame included
        self.container.mux(self.stream.encode(frame))
        self.written += 1

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))

    def close(self) -> None:
        self.container.close()


def new_container(path: Path) -> OutputContainer:
    # x264 decodes ahead of zero; moving its first packet there would move all times of a segment.
    options = {"avoid_negative_ts": "disabled"} if path.suffix == SEGMENT_SUFFIX else {}
    return av.open(f"file:{path}", "w", format=VIDEO_FORMATS[path.suffix.lower()], options=options)


class VideoWriter:
    """Writes uint8 RGB frames to `path`: .mp4 .m4v .mov .mkv .nut, a .png, or, without suffix, a PNG folder.

    `path` appears on a clean exit, complete; an exception or a kill leaves nothing under that name. `source`
    lends its clock, pixel shape and HDR colours. Sound comes with `segments.py`.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        rate: Fraction,
        source: VideoReader | None = None,
        crf: int = CRF,
        preset: str = X264_PRESET,
    ):
        self.path, self._shape = Path(path), (height, width, 3)
        self._settings = width, height, Fraction(rate), source, crf, preset
        self._icc = source and source.icc
        self._open = ExitStack()
        refuse(self.path, width, height)

    def __enter__(self) -> VideoWriter:
        with cannot_be_written(self.path), self._open as stack:  # undone where the next lines fail
            unnamed = stack.enter_context(complete(self.path))
            is_video = suffix_of(unnamed) in VIDEO_FORMATS
            self._sink = _Video(unnamed, *self._settings) if is_video else _Images(unnamed, self._icc)
            stack.callback(self._sink.close)
            self._open = stack.pop_all()
        return self

    def write(self, rgb: np.ndarray, time: Fraction | None = None) -> None:
        """Append rgb (h w 3) uint8, shown from `time` seconds on (None: at the constant rate)."""
        if rgb.shape != self._shape or rgb.dtype != np.uint8:
            raise ValueError(f"a frame is {rgb.shape} {rgb.dtype}, expected {self._shape} uint8")
        with cannot_be_written(self.path):
            self._sink.write(np.ascontiguousarray(rgb), time)

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        if kind is not None:
            with suppress(OSError, av.error.FFmpegError):  # the first error is the one to report
                self._open.__exit__(kind, *error)
            return
        with cannot_be_written(self.path), self._open:
            if not self._sink.written:
                raise VideoError(f"{self.path.name}: there is no frame to write")
            self._sink.finish()
