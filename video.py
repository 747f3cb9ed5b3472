"""A clip on disk, read and written as streams. All that knows containers, codecs and colour matrices is here.

    video | folder of frames | image  --VideoReader-->  Frame(rgb (h w 3) uint8, time in seconds)
    rgb (h w 3) uint8, time           --VideoWriter-->  H.264 video | folder of PNGs | PNG
    finished segments                 --concatenate-->  one video with the source's sound, or one folder,
                                                        without encoding again

Frames pass one by one, so memory does not grow with the clip. The paper mentions none of it, a viewer sees
all of it: presentation times, upright frames, the right colour matrix, the sound. Frames on disk and in data
sets are uint8 RGB, networks take [-1, 1]; `to_network` and `to_uint8` are the only converters.
"""

from __future__ import annotations

import heapq
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, islice
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps
from torch import Tensor

from runtime import UserError

VIDEO_SUFFIXES = {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # what H.264 is written to
FOLDER_RATE = Fraction(25)  # Choice: frames in a folder carry no rate, and a video of them needs one
COMMON_RATES = [Fraction(n * 1000, 1001) for n in (24, 30, 60)] + [Fraction(n) for n in (24, 25, 30, 50, 60)]
RATE_PACKETS = 240  # packets looked at to tell a constant rate from a variable one
REORDERED = 16  # H.264 and HEVC show a frame at most this many places from where it is stored
X264_REORDERED = 2  # x264 with its default B-frames: the number of places by which decoding runs ahead
MAX_TIMESCALE = 10_000_000  # clock ticks a second; a sample's length in MP4 has 32 bits
CRF = 16  # Choice: visually transparent, so that the encoder does not hide what the network adds
# x264 at its default speed, with headers that do not depend on the content, so that segments fit together,
# and without macroblock trees, which encode some frame sizes differently from run to run.
X264 = {"preset": "medium", "x264-params": "stitchable=1:mbtree=0"}

MATRICES = {1, 4, 5, 6, 7, 9}  # matrix coefficients that swscale converts, numbers of ITU-T H.273
BT709 = 1  # H.273: the same number for matrix, primaries and transfer
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # H.273
# swscale's default darkens coloured photos by 0.9 to 1.4 levels; with both flags their mean is exact to 0.04.
ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class VideoError(UserError):
    """A clip that cannot be read or written. The message is the one line the user sees."""


def to_network(rgb: Tensor) -> Tensor:
    """uint8 frames of any shape -> float32 in [-1, 1]."""
    return rgb.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float frames in [-1, 1] of any shape -> uint8: clipped and rounded to nearest, halves up."""
    return (x.float() * 127.5 + 128).floor().clamp(0, 255).byte()


def to_clip(frames: Sequence[np.ndarray]) -> Tensor:
    """Frames (h w 3) uint8 -> a clip (t 3 h w) uint8."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def to_frames(clip: Tensor) -> np.ndarray:
    """A clip (t 3 h w), uint8 or float in [-1, 1] -> frames (t h w 3) uint8."""
    clip = clip if clip.dtype == torch.uint8 else to_uint8(clip)
    return clip.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def centre(size: tuple[int, int], part: tuple[int, int], unit: int = 1) -> tuple[slice, slice]:
    """Rows and columns of the middle `part` (h, w) of frames of `size` (h, w), from a multiple of `unit` on.

    Paper: Sec. 4.1, the centre crop of the test clips; unit 4 cuts HR where unit 1 cuts its LR.
    """
    starts = [max(0, a // unit - b // unit) // 2 * unit for a, b in zip(size, part)]
    return tuple(slice(start, start + b) for start, b in zip(starts, part))


# --- stills ---------------------------------------------------------------------------------------------


def _natural(path: Path) -> list[str | int]:
    """Sort key under which 2.png comes before 10.png."""
    return [int(s) if s.isdecimal() else s.lower() for s in re.split(r"(\d+)", path.name)]


@contextmanager
def _open_image(path: Path, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise whatever their parsers do
        raise VideoError(f"{name}: corrupt image or none at all. Replace it.") from error


def _image_size(path: Path, name: str) -> tuple[int, int]:
    """(width, height) as shown, from the header alone."""
    with _open_image(path, name) as image:
        # EXIF orientations 5 to 8 lie on their side. Asking a PNG without EXIF for it would decode it whole.
        turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if turned else image.size


def _read_image(path: Path, name: str) -> np.ndarray:
    """(h w 3) uint8, upright as its EXIF says, alpha dropped."""
    with _open_image(path, name) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        return np.array(image.convert("RGB"))


# --- reader ---------------------------------------------------------------------------------------------


@dataclass
class Frame:
    """One frame: rgb (h w 3) uint8, upright; time in seconds from the clip's first frame."""

    rgb: np.ndarray
    time: Fraction


def _open_container(path: Path, name: str) -> InputContainer:
    try:
        # "file:" tells colons in names from protocols; the whitelist keeps playlists off the network.
        return av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
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


class VideoReader:
    """A video (mp4, mkv, mov, webm, avi, ...), a folder of frames in natural order, or one image: a stream.

    Opening decodes one frame, so what cannot be read raises VideoError here. Iterating yields Frames from
    `start` seconds on, as often as asked, once at a time; damage met on the way becomes a note at its end.

    kind                 "video" | "folder" | "image"
    width, height        of the upright frame
    rate, constant_rate  frames a second, or their mean; whether every frame lies on the grid n / rate
    frames               expected number in the whole clip, for progress bars; None if unknown
    tick, start_time     seconds: the unit of the file's clock, and the first frame's time on it
    aspect, hdr          width of a pixel by its height; H.273 (matrix, primaries, transfer); None if ordinary
    notes                lines for the user
    """

    def __init__(self, path: str | Path, start: float | Fraction = 0.0):
        self.path, self.start = Path(path), Fraction(start)
        self.name = (self.path.name or str(self.path)) + "/" * self.path.is_dir()
        self.rate, self.constant_rate, self.frames = FOLDER_RATE, True, None
        self.tick = self.start_time = Fraction(0)
        self.aspect, self.hdr = None, None
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
        if self.kind != "video" or self.constant_rate:
            return index / self.rate
        times = sorted(self._packet_times(*self._open(), None))
        return times[index] - self.start_time if index < len(times) else times[-1] - self.start_time + 1

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _probe_images(self) -> None:
        files = [self.path] if self.kind == "image" else sorted(self.path.iterdir(), key=_natural)
        self._files = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "."]
        if not self._files:
            raise VideoError(f"{self.name}: no frames in this folder (looked for png, jpg, webp, bmp)")
        self.frames = len(self._files)
        self.height, self.width = self._image(0).shape[:2]
        for i, file in enumerate(self._files):
            if (size := _image_size(file, self._image_name(i))) != (self.width, self.height):
                found = f"{file.name} is {size[0]}x{size[1]}, expected {self.width}x{self.height}"
                raise VideoError(f"{self.name}: {found}. Use one folder per clip.")
        with Image.open(self._files[0]) as image:
            if image.has_transparency_data:
                self._note("alpha channel dropped")

    def _image_name(self, i: int) -> str:
        return self.name + self._files[i].name if self.kind == "folder" else self.name

    def _image(self, i: int) -> np.ndarray:
        return _read_image(self._files[i], self._image_name(i))

    def _iter_images(self) -> Iterator[Frame]:
        for i in range(math.ceil(self.start * self.rate), len(self._files)):
            yield Frame(self._image(i), i / self.rate)

    def _open(self) -> tuple[InputContainer, VideoStream]:
        """The container, opened afresh, and its first moving picture (cover art is none)."""
        if self._container is not None:
            self._container.close()
        self._container = container = _open_container(self.path, self.name)
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
        self._codec, self._quarters = stream.codec_context.name, round(first.rotation / 90)
        try:
            self.height, self.width = self._rgb(first).shape[:2]
        except (av.error.FFmpegError, ValueError) as error:
            what = f"pixels of the kind {first.format.name} cannot be converted"
            raise VideoError(f"{self.name}: {what}. Convert the file to H.264 first.") from error
        aspect = stream.codec_context.sample_aspect_ratio
        if aspect not in (None, 0, 1):
            self.aspect = 1 / aspect if self._quarters % 2 else aspect
        alpha = any(c.is_alpha for c in first.format.components) or stream.metadata.get("alpha_mode") == "1"
        transfer = HDR_TRANSFERS.get(int(first.color_trc))
        if transfer:
            self.hdr = Colorspace.BT2020, int(first.color_primaries), int(first.color_trc)
        notes = {
            f"rotated upright by {abs(first.rotation)} degrees": first.rotation,
            "interlaced source; deinterlace first (ffmpeg -vf bwdif)": first.interlaced_frame,
            "alpha channel dropped": alpha,
            f"{transfer}/BT.2020 source; processed in its own transfer, tags copied, but written in 8 bits. "
            "The model was trained on SDR.": transfer,
        }
        self.notes += [note for note, applies in notes.items() if applies]

    def _packet_times(self, container, stream, most: int | None) -> Iterator[Fraction]:
        with suppress(av.error.FFmpegError):  # damage is met again, and reported, when decoding
            for packet in islice(container.demux(stream), most):
                if packet.pts is not None and not packet.is_discard:
                    yield packet.pts * self.tick

    def _probe_rate(self, container: InputContainer, stream: VideoStream) -> None:
        """Set tick, rate, constant_rate and frames from the first packets' timestamps, without decoding."""
        self.tick = stream.time_base
        times = sorted(self._packet_times(container, stream, RATE_PACKETS))
        if len(times) > 2 * REORDERED:
            times = times[:-REORDERED]  # between the last ones some are still to come
        # Headers of remuxed files lie: 1000 frames a second is Matroska's clock.
        for self.rate in [r for r in (stream.guessed_rate, stream.average_rate) if r] + COMMON_RATES:
            rounding = [time - n / self.rate for n, time in enumerate(times)] or [0]
            self.constant_rate = max(rounding) - min(rounding) <= self.tick
            if self.constant_rate:
                break
        else:
            mean = (len(times) - 1) / max(times[-1] - times[0], self.tick)
            average = stream.average_rate or 0
            sane = mean / 2 < average < mean * 2
            self.rate = average if sane else mean.limit_denominator(1001) or FOLDER_RATE
        # A variable rate is only a mean: no promise of so many frames.
        self._promised = stream.frames or round(_seconds(stream) * self.rate) * self.constant_rate
        longest = Fraction(container.duration or 0, av.time_base)  # stream, be it the sound
        self.frames = self._promised or round(longest * self.rate) or None

    def _decode(self, container, stream) -> Iterator[av.VideoFrame]:
        """Every frame that decodes. Choice: go on behind a damaged packet, as players do."""
        packets = container.demux(stream)
        self._damaged = 0
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except av.error.FFmpegError:
                self._damaged += 1
                continue
            yield from frames
            if packet is None:
                break
        with suppress(av.error.FFmpegError):  # what the decoder still holds where the container broke off
            yield from stream.decode(None)

    def _decode_from(self, time: Fraction) -> Iterator[av.VideoFrame]:
        """Frames from a key frame at or before `time` on."""
        if time > 0 and self._origin is not None:
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

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """(h w 3) uint8, upright, at the first frame's size."""
        if (frame.width, frame.height) != self._size:
            # Choice: players resize their window; a clip has one size here.
            self._note("the frame size changes on the way; frames scaled to the first one's size")
        rgb = {"src_colorspace": _matrix(frame, self._codec), "dst_color_range": ColorRange.JPEG}
        frame = self._reformatter.reformat(frame, *self._size, "rgb24", interpolation=ACCURATE, **rgb)
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(), self._quarters))

    def _time(self, frame: av.VideoFrame, index: int) -> Fraction:
        """Seconds since the first frame; what a coarse clock has rounded off a constant rate is restored."""
        if frame.pts is None or self._origin is None:
            return index / self.rate
        time = (frame.pts - self._origin) * self.tick
        grid = round(time * self.rate) / self.rate
        return grid if self.constant_rate and abs(time - grid) <= self.tick else time

    def _iter_video(self) -> Iterator[Frame]:
        time, shown = Fraction(-1), 0
        for index, frame in enumerate(self._decode_from(self.start)):
            last, time = time, self._time(frame, index)
            if time <= last:
                self._note("timestamps that do not increase were moved behind their predecessors")
                time = last + self.tick
            if time < self.start - Fraction(1, 10**6):  # a float cannot hold most frame times
                continue
            try:
                rgb = self._rgb(frame)
            except (av.error.FFmpegError, ValueError):  # a damaged header can ask for anything
                self._damaged += 1
                continue
            shown += 1
            yield Frame(rgb, time)
        promised = 0 if self.start else self._promised
        if self._damaged or shown < 0.9 * promised:
            of = f" of {promised}" if promised else ""
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


class _Images:
    """Numbered PNGs in a folder, or one PNG."""

    def __init__(self, path: Path):
        self.path, self.written = path, 0

    def write(self, rgb: np.ndarray, time: Fraction | None) -> None:
        if self.written and not self.path.is_dir():
            raise VideoError("a .png holds one frame, not a clip. Give a folder or a video as the output.")
        file = self.path / f"{self.written:06d}.png" if self.path.is_dir() else self.path
        # Level 1 of 9: the default takes several times longer to save a tenth of the room.
        Image.fromarray(rgb).save(file, format="PNG", compress_level=1)
        self.written += 1

    def finish(self) -> None:
        pass

    close = finish


def _clock(rate: Fraction, source: VideoReader | None) -> tuple[Fraction, int]:
    """(tick, step): the tick in seconds, of which the rate's grid and the source's own timestamps are whole
    multiples, and the ticks that a frame lasts."""
    tick = (source and source.tick) or Fraction(1, 90_000)  # 90 kHz: the clock of MPEG
    scale = math.lcm(rate.numerator, tick.denominator)
    if scale > MAX_TIMESCALE:
        scale = rate.numerator if source is None or source.constant_rate else tick.denominator
    return Fraction(1, scale), round(scale / rate)


class _Video:
    """H.264 4:2:0 in BT.709, or in the source's own HDR colours; pictures alone."""

    def __init__(self, path: Path, width: int, height: int, rate: Fraction, source, crf: int):
        self.rate, self.origin, self.last, self.written = rate, None, -1, 0
        self.tick, self.step = _clock(rate, source)
        self.container = av.open(f"file:{path}", "w", format=VIDEO_FORMATS[path.suffix])
        self.stream = self.container.add_stream("libx264", rate=rate, options={"crf": str(crf), **X264})
        codec = self.stream.codec_context
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.time_base = self.stream.time_base = self.tick
        self.colour = (source and source.hdr) or (BT709, BT709, BT709)
        codec.colorspace, codec.color_primaries, codec.color_trc = self.colour
        codec.color_range = ColorRange.MPEG
        codec.sample_aspect_ratio = (source and source.aspect) or Fraction(1)
        self.reformatter = VideoReformatter()

    def write(self, rgb: np.ndarray, time: Fraction | None) -> None:
        time = self.written / self.rate if time is None else Fraction(time)
        self.origin = time if self.origin is None else self.origin
        yuv = {"format": "yuv420p", "dst_colorspace": self.colour[0], "dst_color_range": ColorRange.MPEG}
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame = self.reformatter.reformat(
            frame, src_color_range=ColorRange.JPEG, interpolation=ACCURATE, **yuv
        )
        frame.time_base = self.tick
        frame.pts = self.last = max(round((time - self.origin) / self.tick), self.last + 1)
        frame.duration = self.step  # MP4's rate is a mean, the last frame included
        self.container.mux(self.stream.encode(frame))
        self.written += 1

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.close()

    def close(self) -> None:
        self.container.close()


class Output:
    """A path whose content grows as `<stem>.partial<suffix>` beside it and gets its name when complete."""

    def __init__(self, path: Path):
        self.path, self.name, suffix = Path(path), Path(path).name, Path(path).suffix.lower()
        self.is_video = suffix in VIDEO_FORMATS
        self._refuse(suffix)
        self.partial = self.path.with_name(f"{self.path.stem}.partial{suffix}")
        with self.failures_in_one_line():
            self.remove_partial()
            self.partial.touch() if suffix else self.partial.mkdir()

    def _refuse(self, suffix: str) -> None:
        """A file replaces a file, numbered PNGs replace numbered PNGs; nothing else is ever overwritten."""
        if suffix not in (*VIDEO_FORMATS, ".png", ""):
            way_out = "Use .mp4, .mkv, .mov, .png, or a folder for PNGs."
            raise VideoError(f"{self.name}: cannot write {suffix}. {way_out}")
        if not self.path.parent.is_dir():
            raise VideoError(f"{self.path}: there is no folder {self.path.parent}. Create it first.")
        folder = self.path.is_dir()
        foreign = folder and any(not re.fullmatch(r"\d{6,}\.png", name) for name in os.listdir(self.path))
        if self.path.exists() and (foreign or folder == bool(suffix)):
            raise VideoError(f"{self.name}: something else has this name. Choose another output.")

    @contextmanager
    def failures_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.error.FFmpegError) as error:
            reason = getattr(error, "strerror", None) or error
            way_out = "Check the disk or choose another output."
            raise VideoError(f"{self.name}: cannot be written ({reason}). {way_out}") from error

    def remove_partial(self) -> None:
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)

    def publish(self) -> None:
        """Bring the complete content to disk, then rename it."""
        for file in self.partial.iterdir() if self.partial.is_dir() else [self.partial]:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if self.path.is_dir():
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)


class VideoWriter(Output):
    """Writes uint8 RGB frames to `path`: .mp4 .m4v .mov .mkv, a .png, or, without suffix, a folder of PNGs.

    `path` appears on a clean exit, complete; an exception or a kill leaves nothing under that name. `source`
    lends its clock, pixel shape and HDR colours; the time first written is the output's zero. Sound comes
    with `concatenate`.
    """

    def __init__(self, path: Path, width: int, height: int, rate: Fraction, source=None, crf: int = CRF):
        self._shape = (height, width, 3)
        if Path(path).suffix.lower() in VIDEO_FORMATS and (width % 2 or height % 2):
            odd = f"{Path(path).name}: {width}x{height} is odd, 4:2:0 video has even sides"
            raise VideoError(f"{odd}. Give a folder: PNGs have any size.")
        super().__init__(path)
        with self.failures_in_one_line():
            video = (width, height, Fraction(rate), source, crf)
            self._sink = _Video(self.partial, *video) if self.is_video else _Images(self.partial)

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, rgb: np.ndarray, time: Fraction | None = None) -> None:
        """Append rgb (h w 3) uint8, shown from `time` seconds on (None: at the constant rate)."""
        if rgb.shape != self._shape or rgb.dtype != np.uint8:
            raise ValueError(f"a frame is {rgb.shape} {rgb.dtype}, expected {self._shape} uint8")
        with self.failures_in_one_line():
            self._sink.write(np.ascontiguousarray(rgb), time)

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if kind is None:
                if not self._sink.written:
                    raise VideoError(f"{self.name}: there is no frame to write")
                with self.failures_in_one_line():
                    self._sink.finish()
                    self.publish()
        finally:
            with suppress(OSError, av.error.FFmpegError):  # the first error is the one to report
                self._sink.close()
            self.remove_partial()


# --- segments -------------------------------------------------------------------------------------------


def concatenate(
    segments: list[Path], starts: list[Fraction], path: Path, source: VideoReader, to_end: bool = True
) -> list[str]:
    """Join finished segments as if one VideoWriter had written them to `path`, and add the source's sound.

    segments  what VideoWriter(..., source) made with equal settings: .mp4 files, whose clock is exact
              (Matroska's counts milliseconds), or folders of PNGs
    starts    the time of each segment's first frame, in seconds; inside a segment times count from there
    to_end    copy the source's audio and subtitles to their end, else to the end of the picture

    Nothing is encoded again. Returns notes for the user. VideoError if a segment cannot be read or does not
    match the first.
    """
    output = Output(path)
    try:
        with output.failures_in_one_line():
            join = _join_videos if output.is_video else _join_folders
            notes = join(segments, starts, output.partial, source, to_end)
            output.publish()
    finally:
        output.remove_partial()
    return notes


def _join_folders(segments: list[Path], _starts, path: Path, _source, _to_end) -> list[str]:
    files = (file for folder in segments for file in sorted(folder.iterdir(), key=_natural))
    for n, file in enumerate(files):
        try:
            os.link(file, path / f"{n:06d}.png")
        except OSError:  # a disk without hard links
            shutil.copyfile(file, path / f"{n:06d}.png")
    return []


def _join_videos(segments: list[Path], starts: list[Fraction], path: Path, source, to_end: bool) -> list[str]:
    """Packets as they are, on one clock, pictures and sound in the order of their decoding times."""
    tick, step = _clock(source.rate, source)
    notes: list[str] = []
    with ExitStack() as stack:
        original = source.kind == "video" and stack.enter_context(_open_container(source.path, source.name))
        container = stack.enter_context(av.open(f"file:{path}", "w", format=VIDEO_FORMATS[path.suffix]))
        with _open_container(segments[0], segments[0].name) as first:
            joined = container.add_stream_from_template(first.streams.video[0], opaque=True)
        joined.time_base, joined.codec_context.framerate = tick, source.rate
        streams = _sound_streams(original, container, notes) if original else {}
        end = None
        if not to_end:
            last = _segment_packets(segments[-1], starts[-1], tick, None)
            end = (max(packet.pts for packet in last) + step) * tick
        pictures = _pictures(segments, starts, joined, tick, step)
        sounds = _sounds(original, streams, source.start_time, starts[0], end, notes) if streams else ()
        for packet in heapq.merge(pictures, sounds, key=lambda packet: packet.dts * packet.time_base):
            try:
                container.mux_one(packet)
            except (av.error.InvalidDataError, av.error.ArgumentError):
                if packet.stream is joined:
                    raise
                notes.append("sound: damaged packets were left out")
    return list(dict.fromkeys(notes))


def _pictures(segments, starts, stream: VideoStream, tick: Fraction, step: int) -> Iterator[av.Packet]:
    """The packets of all segments. Decoding times are presentation times, some places earlier."""
    decoding_times = deque(-step * n for n in range(X264_REORDERED, 0, -1))
    for segment, start in zip(segments, starts, strict=True):
        packets = _segment_packets(segment, start - starts[0], tick, stream.codec_context.extradata)
        decoding_times.extend(sorted(packet.pts for packet in packets))
        for packet in packets:
            packet.dts, packet.duration, packet.stream = decoding_times.popleft(), step, stream
            yield packet


def _segment_packets(path: Path, start: Fraction, tick: Fraction, headers: bytes | None) -> list[av.Packet]:
    """A segment's packets, compressed as they are, shown from `start` seconds on."""
    with _open_container(path, path.name) as container:
        stream = container.streams.video[0]
        if headers not in (None, stream.codec_context.extradata):
            raise VideoError(f"{path.name}: made with other settings. Remove the segments and start again.")
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        for packet in packets:
            packet.pts = round((start + packet.pts * stream.time_base) / tick)
            packet.time_base = tick
    return packets


def _sound_streams(original: InputContainer, container: OutputContainer, notes: list[str]) -> dict:
    """New streams for the original's audio and subtitles, by their index there; a note for each misfit."""
    streams = {}
    for stream in (*original.streams.audio, *original.streams.subtitles):
        try:
            streams[stream.index] = container.add_stream_from_template(stream)
            streams[stream.index].metadata.update(stream.metadata)
        except ValueError:  # PyAV asks the container's list of codecs
            kind = f"{stream.type} {stream.codec_context.name if stream.codec_context else '(unknown)'}"
            suffix = Path(container.name).suffix
            more = "" if suffix == ".mkv" else " An .mkv output holds more kinds."
            notes.append(f"{kind} does not fit into {suffix} and is left out.{more}")
    return streams


def _sounds(
    original: InputContainer, streams: dict, zero: Fraction, origin: Fraction, end, notes: list[str]
) -> Iterator[av.Packet]:
    """The original's packets for `streams`, untouched, from `origin` to `end` seconds (None: to their end).

    Times count from `zero`, its first picture. `origin` becomes the output's zero: a cut clip starts with the
    packet that sounds at its first frame.
    """
    try:
        for packet in original.demux(*(original.streams[i] for i in streams)):
            if packet.dts is None:
                continue
            tick = packet.time_base
            time = packet.dts * tick - zero
            over = origin > 0 and time + (packet.duration or 0) * tick <= origin
            if over or (end is not None and time >= end):
                continue
            shift = round((zero + origin) / tick)
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.stream = streams[packet.stream.index]
            yield packet
    except av.error.FFmpegError:
        notes.append("sound: damaged or truncated; kept up to the damage")
