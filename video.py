"""A clip on disk, read and written as streams. All that knows containers, codecs and colour matrices is here.

    video | folder of frames | image  --VideoReader-->  Frame(rgb (h w 3) uint8, time in seconds)
    rgb (h w 3) uint8, time           --VideoWriter-->  H.264 video | folder of PNGs | PNG

Frames pass one by one, so memory does not grow with the clip. The paper mentions none of it, a viewer sees
all of it: presentation times, upright frames, the right colour matrix, the sound. Frames on disk and in data
sets are uint8 RGB, networks take [-1, 1]; `to_network` and `to_uint8` are the only converters.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream
    from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # what H.264 is written to
FOLDER_RATE = Fraction(25)  # Choice: frames in a folder carry no rate, and a video of them needs one
COMMON_RATES = [Fraction(n * 1000, 1001) for n in (24, 30, 60)] + [Fraction(n) for n in (24, 25, 30, 50, 60)]
RATE_PACKETS = 240  # packets looked at to tell a constant rate from a variable one
REORDERED = 16  # H.264 and HEVC show a frame at most this many places from where it is stored
MAX_TIMESCALE = 10_000_000  # clock ticks a second; a sample's length in MP4 has 32 bits
CRF = 16  # Choice: visually transparent, so that the encoder does not hide what the network adds
PRESET = "medium"  # x264's own default

MATRICES = {1, 4, 5, 6, 7, 9}  # matrix coefficients that swscale converts, numbers of ITU-T H.273
BT709 = 1  # H.273: the same number for matrix, primaries and transfer
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # H.273
# swscale's default darkens coloured photos by 0.9 to 1.4 levels; with both flags their mean is exact to 0.04.
ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class VideoError(ValueError):
    """A clip that cannot be read or written. The message is the one line the user sees."""


def to_network(rgb: Tensor) -> Tensor:
    """uint8 frames of any shape -> float32 in [-1, 1]."""
    return rgb.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float frames in [-1, 1] of any shape -> uint8: clipped and rounded to nearest, halves up."""
    return (x.float() * 127.5 + 128).floor().clamp(0, 255).byte()


# --- colour and pose ------------------------------------------------------------------------------------


def _matrix(frame: av.VideoFrame, codec: str) -> int | None:
    """The matrix that made this frame's YUV from RGB (H.273 number); None where the frame is RGB already."""
    if frame.format.is_rgb:
        return None
    if int(frame.colorspace) in MATRICES:
        return int(frame.colorspace)
    # Choice: untagged frames are read as players do (mpv's rule): BT.709 for HD, BT.601 below and for JPEG.
    hd = (frame.width >= 1280 or frame.height > 576) and codec != "mjpeg"
    return Colorspace.ITU709 if hd else Colorspace.ITU601


def _display_matrix(frame: av.VideoFrame) -> list[int]:
    """[a, b, c, d] of the container's rotation: the pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    found = (np.frombuffer(data, np.int32) for data in frame.side_data if data.type.name == "DISPLAYMATRIX")
    return next(found, np.array([1, 0, 0, 0, 1]))[[0, 1, 3, 4]].tolist()


def _upright(rgb: np.ndarray, pose: list[int]) -> np.ndarray:
    """Apply the nearest of the eight quarter turns and mirrors to rgb (h w 3)."""
    a, b, c, d = pose
    if abs(a) < abs(b):
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


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
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
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
        what = "not a video or image that can be read" if path.stat().st_size else "the file is empty"
        raise VideoError(f"{name}: {what}. Is the download complete?") from error


def _seconds(stream: VideoStream) -> Fraction:
    """The stream's own length, 0 if its header has none; Matroska keeps it in a tag, 00:00:05.005000000."""
    if stream.duration:
        return stream.duration * stream.time_base
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", "0:0:0.0"))
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
    has_audio            whether there is sound for a VideoWriter to copy
    aspect, hdr          width of a pixel by its height; H.273 (matrix, primaries, transfer); None if ordinary
    notes, finished      lines for the user; whether an iteration has reached the clip's end
    """

    def __init__(self, path: str | Path, start: float | Fraction = 0.0):
        self.path, self.start = Path(path), Fraction(start)
        self.name = (self.path.name or str(self.path)) + "/" * self.path.is_dir()
        self.rate, self.constant_rate, self.frames = FOLDER_RATE, True, None
        self.tick = self.start_time = Fraction(0)
        self.has_audio, self.aspect, self.hdr, self.finished = False, None, None, False
        self.notes: list[str] = []
        self._container: InputContainer | None = None
        self._reformatter = VideoReformatter()
        if not self.path.exists():
            raise VideoError(f"{self.name}: no such file")
        if self.path.is_dir():
            self.kind = "folder"
        else:
            self.kind = "image" if self.path.suffix.lower() in IMAGE_SUFFIXES else "video"
        self._probe_video() if self.kind == "video" else self._probe_images()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        if self._container is not None:
            self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        return self._iter_video() if self.kind == "video" else self._iter_images()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _probe_images(self) -> None:
        files = [self.path] if self.kind == "image" else sorted(self.path.iterdir(), key=_natural)
        self._files = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "."]
        if not self._files:
            raise VideoError(f"{self.name}: no frames in this folder (looked for png, jpg, webp, bmp)")
        self.frames = len(self._files)
        self.height, self.width = _read_image(self._files[0], self._image_name(0)).shape[:2]
        for i, file in enumerate(self._files):
            w, h = _image_size(file, self._image_name(i))
            if (w, h) != (self.width, self.height):
                expected = f"expected {self.width}x{self.height}. Use one folder per clip."
                raise VideoError(f"{self.name}: {file.name} is {w}x{h}, {expected}")
        with Image.open(self._files[0]) as image:
            if image.has_transparency_data:
                self._note("alpha channel dropped")

    def _image_name(self, i: int) -> str:
        return self.name + self._files[i].name if self.kind == "folder" else self.name

    def _iter_images(self) -> Iterator[Frame]:
        for i in range(math.ceil(self.start * self.rate), len(self._files)):
            yield Frame(_read_image(self._files[i], self._image_name(i)), i / self.rate)
        self.finished = True

    def _open(self) -> tuple[InputContainer, VideoStream]:
        """The container, opened afresh, and its first moving picture (cover art is none)."""
        if self._container is not None:
            self._container.close()
        self._container = container = _open_container(self.path, self.name)
        for stream in container.streams.video:
            if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
                return container, stream
        raise self._nothing_decodes(container)

    def _nothing_decodes(self, container: InputContainer) -> VideoError:
        known = (s for s in container.streams if s.codec_context is not None)
        held = ", ".join(f"{s.type} {s.codec_context.name}" for s in known) or "none"
        what = f"no decodable video frames (streams: {held})"
        return VideoError(f"{self.name}: {what}. Is the download complete?")

    def _probe_video(self) -> None:
        container, stream = self._open()
        self._probe_rate(container, stream)
        container, stream = self._open()
        first = next(self._decode(container, stream), None)
        if first is None:
            raise self._nothing_decodes(container)
        self._origin, self._size = first.pts, (first.width, first.height)
        self.start_time = (first.pts or 0) * self.tick
        self._codec, self._pose = stream.codec_context.name, _display_matrix(first)
        try:
            self.height, self.width = self._rgb(first).shape[:2]
        except (av.error.FFmpegError, ValueError) as error:
            what = f"pixels of the kind {first.format.name} cannot be converted"
            raise VideoError(f"{self.name}: {what}. Convert the file to H.264 first.") from error
        aspect = stream.codec_context.sample_aspect_ratio
        if aspect not in (None, 0, 1):
            turned = abs(self._pose[0]) < abs(self._pose[1])
            self.aspect = 1 / aspect if turned else aspect
        self.has_audio = len(container.streams.audio) > 0
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
        rates = [rate for rate in (stream.guessed_rate, stream.average_rate) if rate] + COMMON_RATES
        for self.rate in rates:
            rounding = [time - n / self.rate for n, time in enumerate(times)] or [0]
            self.constant_rate = max(rounding) - min(rounding) <= self.tick
            if self.constant_rate:
                break
        else:
            mean = (len(times) - 1) / max(times[-1] - times[0], self.tick)
            average = stream.average_rate or 0
            if not mean / 2 < average < mean * 2:
                average = mean.limit_denominator(1001) or FOLDER_RATE
            self.rate = average
        self._promised = stream.frames or round(_seconds(stream) * self.rate)
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
        container, stream = self._open()
        if time > 0 and self._origin is not None:
            target = self._origin + time / self.tick
            for back in (0, 1, 5, 30):  # seconds; an index may point behind the time asked for
                with suppress(av.error.FFmpegError):
                    container.seek(math.floor(target - back / self.tick), stream=stream)
                    # What is shown before the first key frame may refer to frames that were never decoded.
                    frames = dropwhile(lambda f: not f.key_frame, self._decode(container, stream))
                    first = next(frames, None)
                    if first is not None and first.pts is not None and first.pts <= target:
                        return chain([first], frames)
            container, stream = self._open()
        return self._decode(container, stream)

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """(h w 3) uint8, upright, at the first frame's size."""
        if (frame.width, frame.height) != self._size:
            # Choice: players resize their window; a clip has one size here.
            self._note("the frame size changes on the way; frames scaled to the first one's size")
        rgb = {"src_colorspace": _matrix(frame, self._codec), "dst_color_range": ColorRange.JPEG}
        frame = self._reformatter.reformat(frame, *self._size, "rgb24", interpolation=ACCURATE, **rgb)
        return _upright(frame.to_ndarray(), self._pose)

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
        self.finished = True

    def time_of(self, index: int) -> Fraction:
        """Presentation time of frame `index`, counted from 0, in seconds."""
        if self.kind != "video" or self.constant_rate:
            return index / self.rate
        container, stream = self._open()
        times = sorted(self._packet_times(container, stream, None))
        return times[index] - self.start_time if index < len(times) else times[-1] - self.start_time + 1


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

    def __init__(self, path: Path, folder: bool):
        self.path, self.folder, self.written, self.notes = path, folder, 0, []
        path.mkdir() if folder else path.touch()

    def write(self, rgb: np.ndarray, time: Fraction | None) -> None:
        if self.written and not self.folder:
            raise VideoError("a .png holds one frame, not a clip. Give a folder or a video as the output.")
        file = self.path / f"{self.written:06d}.png" if self.folder else self.path
        # Level 1 of 9: the default takes several times longer to save a tenth of the room.
        Image.fromarray(rgb).save(file, format="PNG", compress_level=1)
        self.written += 1

    def finish(self) -> None:
        """Every file is complete already."""

    close = finish


class _Copies:
    """The source's audio and subtitle packets, passed on untouched as the picture advances."""

    def __init__(self, source: VideoReader, container: OutputContainer, suffix: str):
        self.start_time, self.container, self.notes, self.streams = source.start_time, container, [], {}
        self.original = _open_container(source.path, source.name)
        for stream in (*self.original.streams.audio, *self.original.streams.subtitles):
            try:
                copy = self.streams[stream.index] = container.add_stream_from_template(stream)
                copy.metadata.update(stream.metadata)
            except ValueError:  # PyAV asks the container's list of codecs
                more = "" if suffix == ".mkv" else " An .mkv output holds more kinds."
                kind = f"{stream.type} {stream.codec_context.name if stream.codec_context else '(unknown)'}"
                self.notes.append(f"{kind} does not fit into {suffix} and is left out.{more}")
        self.packets = self._demux()
        self.pending = next(self.packets, None)

    def _demux(self) -> Iterator[av.Packet]:
        copied = [self.original.streams[i] for i in self.streams]
        packets = self.original.demux(*copied) if copied else ()
        try:
            yield from (packet for packet in packets if packet.dts is not None)
        except av.error.FFmpegError:
            self.notes.append("sound: damaged or truncated; kept up to the damage")

    def advance(self, origin: Fraction, until: Fraction | None) -> None:
        """Copy what starts before `until` (None: all there is), in seconds since its first frame.

        `origin` becomes the output's zero: a cut clip starts with the packet that sounds at its first frame.
        """
        while self.pending is not None:
            packet, tick = self.pending, self.pending.time_base
            time = packet.dts * tick - self.start_time
            if until is not None and time >= until:
                return
            self.pending = next(self.packets, None)
            if origin > 0 and time + (packet.duration or 0) * tick <= origin:
                continue
            shift = round((self.start_time + origin) / tick)
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.stream = self.streams[packet.stream.index]
            try:
                self.container.mux_one(packet)
            except (av.error.InvalidDataError, av.error.ArgumentError):
                note = "sound: damaged packets were left out"
                self.notes += [note] if note not in self.notes else []


class _Video:
    """H.264 4:2:0 in BT.709, and what _Copies brings of the source."""

    def __init__(self, path: Path, width: int, height: int, rate: Fraction, source: VideoReader | None, crf):
        source = source if source is not None and source.kind == "video" else None
        self.rate, self.source, self.origin, self.last, self.written = rate, source, None, -1, 0
        # One clock on which both the rate's grid and the source's own timestamps are whole numbers.
        tick = source.tick if source else Fraction(1, 90_000)  # 90 kHz: the clock of MPEG
        scale = math.lcm(rate.numerator, tick.denominator)
        if scale > MAX_TIMESCALE:
            scale = rate.numerator if source is None or source.constant_rate else tick.denominator
        self.tick = Fraction(1, scale)
        suffix = path.suffix.lower()
        self.container = av.open(f"file:{path}", "w", format=VIDEO_FORMATS[suffix])
        options = {"crf": str(crf), "preset": PRESET}
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        codec = self.stream.codec_context
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.time_base = self.stream.time_base = self.tick
        self.colour = (source and source.hdr) or (BT709, BT709, BT709)
        codec.colorspace, codec.color_primaries, codec.color_trc = self.colour
        codec.color_range = ColorRange.MPEG
        codec.sample_aspect_ratio = (source and source.aspect) or Fraction(1)
        self.reformatter = VideoReformatter()
        self.copies = _Copies(source, self.container, suffix) if source else None
        self.notes = self.copies.notes if self.copies else []

    def write(self, rgb: np.ndarray, time: Fraction | None) -> None:
        time = self.written / self.rate if time is None else Fraction(time)
        self.origin = time if self.origin is None else self.origin
        ranges = {"src_color_range": ColorRange.JPEG, "dst_color_range": ColorRange.MPEG}
        yuv = {"format": "yuv420p", "dst_colorspace": self.colour[0], **ranges}
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame = self.reformatter.reformat(frame, interpolation=ACCURATE, **yuv)
        frame.time_base = self.tick
        frame.pts = self.last = max(round((time - self.origin) / self.tick), self.last + 1)
        frame.duration = round(1 / self.rate / self.tick)  # MP4's rate is a mean, the last frame included
        self.container.mux(self.stream.encode(frame))
        self.written += 1
        self.end = time + 1 / self.rate
        if self.copies:
            self.copies.advance(self.origin, time)

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))
        if self.copies:
            self.copies.advance(self.origin, None if self.source.finished else self.end)
        self.close()

    def close(self) -> None:
        self.container.close()
        if self.copies:
            self.copies.original.close()


class VideoWriter:
    """Writes uint8 RGB frames to `path`: .mp4 .m4v .mov .mkv, a .png, or, without suffix, a folder of PNGs.

    All goes to `<stem>.partial<suffix>` beside it, which takes the final name on a clean exit and is removed
    on an exception; a killed process leaves nothing under the final name. `source` lends its sound,
    subtitles, clock and pixel shape; the time first written is the output's zero. `notes` are for the user.
    """

    def __init__(
        self, path: Path, width: int, height: int, rate: Fraction, source: VideoReader | None = None, crf=CRF
    ):
        self.path, self.name, self._shape = Path(path), Path(path).name, (height, width, 3)
        suffix = self.path.suffix.lower()
        self._refuse(suffix)
        if suffix in VIDEO_FORMATS and (width % 2 or height % 2):
            what = f"{width}x{height} is odd, 4:2:0 video has even sides"
            raise VideoError(f"{self.name}: {what}. Give a folder: PNGs have any size.")
        self._partial = self.path.with_name(f"{self.path.stem}.partial{suffix}")
        with self._failures_in_one_line():
            self._remove_partial()
            if suffix in VIDEO_FORMATS:
                self._partial.touch()
                self._sink = _Video(self._partial, width, height, Fraction(rate), source, crf)
            else:
                self._sink = _Images(self._partial, folder=not suffix)
        self.notes: list[str] = self._sink.notes

    def _refuse(self, suffix: str) -> None:
        """A file replaces a file, numbered PNGs replace numbered PNGs; nothing else is ever overwritten."""
        if suffix not in (*VIDEO_FORMATS, ".png", ""):
            way_out = "Use .mp4, .mkv, .mov, .png, or a folder for PNGs."
            raise VideoError(f"{self.name}: cannot write {suffix}. {way_out}")
        if not self.path.parent.is_dir():
            raise VideoError(f"{self.path}: there is no folder {self.path.parent}. Create it first.")
        folder = self.path.is_dir()
        foreign = folder and any(not re.fullmatch(r"\d{6}\.png", name) for name in os.listdir(self.path))
        if self.path.exists() and (foreign or folder == bool(suffix)):
            raise VideoError(f"{self.name}: something else has this name. Choose another output.")

    @contextmanager
    def _failures_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.error.FFmpegError) as error:
            reason = getattr(error, "strerror", None) or error
            way_out = "Check the disk or choose another output."
            raise VideoError(f"{self.name}: cannot be written ({reason}). {way_out}") from error

    def _remove_partial(self) -> None:
        if self._partial.is_dir():
            shutil.rmtree(self._partial)
        else:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, rgb: np.ndarray, time: Fraction | None = None) -> None:
        """Append rgb (h w 3) uint8, shown from `time` seconds on (None: at the constant rate)."""
        if rgb.shape != self._shape or rgb.dtype != np.uint8:
            raise ValueError(f"a frame is {rgb.shape} {rgb.dtype}, expected {self._shape} uint8")
        with self._failures_in_one_line():
            self._sink.write(np.ascontiguousarray(rgb), time)

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            with suppress(OSError, av.error.FFmpegError):  # the first error is the one to report
                self._sink.close()
            self._remove_partial()

    def _publish(self) -> None:
        """Finish, bring to disk, rename."""
        if not self._sink.written:
            raise VideoError(f"{self.name}: there is no frame to write")
        with self._failures_in_one_line():
            self._sink.finish()
            for file in self._partial.iterdir() if self._partial.is_dir() else [self._partial]:
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            if self.path.is_dir():
                shutil.rmtree(self.path)
            os.replace(self._partial, self.path)
