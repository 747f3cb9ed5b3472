"""A result that survives interruption: finished segments, joined without encoding again, and its film.

    rgb (h w 3) uint8, time --ResumableWriter--> <output>.parts/00000000.nut, 00000096.nut, ...
    segments --join--> one clip;  the source's sound, subtitles, chapters, tags, fonts, cover --> with it

`video.py` reads and writes one file; here is what makes many of them one. Nothing of the paper.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from filelock import FileLock, Timeout

from runtime import complete, remove
from stills import VideoError
from video import (
    OURS,
    SEGMENT_SUFFIX,
    VIDEO_FORMATS,
    VideoReader,
    VideoWriter,
    cannot_be_written,
    clock,
    natural_order,
    new_container,
    open_container,
    refuse,
    suffix_of,
    with_ending,
)

SEGMENT = 96  # Choice: frames a segment, some seconds of video, which an interruption can cost
LOCK = ".lock"  # in the folder of segments
X264_REORDERED = 2  # x264 with its default B-frames: the number of places by which decoding runs ahead
PREROLL = Fraction(1, 10)  # seconds, more than any codec needs to hear before what is to be heard
# Tags that speak of the file, not of the film.
OF_THE_FILE = re.compile(
    "encoder|software|com.android|major_brand|minor_version|compatible_brands|duration|bps|number_of_|"
    "_statistics|handler_name|vendor_id|alpha_mode|filename|mimetype",
    re.IGNORECASE,
)
TRACK_TAGS = ("title", "language")


class ResumableWriter:
    """A VideoWriter that an interruption costs at most SEGMENT frames, and that adds the source's sound.

    Finished segments wait in `<path>.parts/`: NUT files, whose clock is exact and which hold each frame's own
    time, or folders of PNGs. A clean exit joins them, without encoding again, as if one VideoWriter had
    written them; the time first written is the output's zero.

    made_by  what the segments depend on, JSON: segments that depend on something else are refused
    fresh    forget the segments that are there
    to_end   copy the source's audio and subtitles to their end, else to the end of the picture
    shared   other processes write segments, too: one holds them `reserved`, one calls `join` behind all
    done     frames that are written already: the next one is `write`'s; where shared, set it to begin there
    notes    lines for the user, after the exit
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        source: VideoReader,
        made_by: dict,
        fresh: bool = False,
        to_end: bool = True,
        shared: bool = False,
        **encoding,
    ):
        refuse(path, width, height)
        self.path, self.parts = path, with_ending(path, ".parts")
        self.source, self.made_by, self.fresh, self.to_end = source, made_by, fresh, to_end
        self.shared, self.done, self.notes = shared, 0, []
        self._new_segment = lambda: VideoWriter(
            self._segment_path(), width, height, source.rate, source, **encoding
        )
        self._segment: VideoWriter | None = None
        finished = self.finished()
        while self.done // SEGMENT in finished:
            self.done += SEGMENT

    def finished(self) -> set[int]:
        """Numbers of the segments that are there: a segment has its name only once it is whole."""
        return set() if self.fresh else {int(path.stem) // SEGMENT for path in self._segments()}

    def _segment_path(self) -> Path:
        suffix = suffix_of(self.path)
        return self.parts / f"{self.done:08d}{SEGMENT_SUFFIX if suffix in VIDEO_FORMATS else suffix}"

    def __enter__(self) -> ResumableWriter:
        if not self.shared:
            self._reserved = ExitStack()
            self._reserved.enter_context(self.reserved())
        return self

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """The folder of segments. VideoError where another run writes there, or it is something else's."""
        plan = self.parts / "plan.json"
        with ExitStack() as stack:
            with cannot_be_written(self.parts):
                stack.enter_context(self._alone())
                for old in self.parts.iterdir() if self.fresh else ():
                    if old.name != LOCK:
                        remove(old)
                if not plan.exists():
                    with complete(plan) as unnamed:
                        unnamed.write_text(json.dumps(self.made_by))
                made = json.loads(plan.read_text())
            if changed := [k for k in self.made_by if made.get(k) != self.made_by[k]]:
                way_out = "Use --fresh to start again, or another -o."
                raise VideoError(f"{self.parts} was made with another {', '.join(changed)}. {way_out}")
            try:
                yield
            finally:
                stack.close()
                if not self._segments():
                    remove(self.parts)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """VideoError where another run writes the same; what holds it off ends with this process."""
        self.parts.mkdir(exist_ok=True)
        try:
            with FileLock(self.parts / LOCK, timeout=0):
                yield
                with suppress(OSError):  # Windows removes nothing that is open
                    (self.parts / LOCK).unlink()
        except Timeout:
            way_out = "Wait for it, or choose another -o."
            raise VideoError(f"{self.path.name}: another run is at work on it. {way_out}") from None

    def write(self, rgb: np.ndarray, time: Fraction) -> None:
        """Append rgb (h w 3) uint8, shown from `time` seconds of the source on."""
        if self._segment is None:
            self._segment = self._new_segment().__enter__()
        self._segment.write(rgb, time)
        self.done += 1
        if self.done % SEGMENT == 0:
            self._finish_segment()

    def _finish_segment(self, *error) -> None:
        segment, self._segment = self._segment, None
        if segment:
            segment.__exit__(*(error or (None, None, None)))

    def __exit__(self, *error) -> None:
        with nullcontext() if self.shared else self._reserved:
            self._finish_segment(*error)
            if error[0] is None and not self.shared:
                self.join()

    def join(self) -> None:
        """Makes the clip of all segments, which are gone then."""
        segments = self._segments()
        if not segments:
            raise VideoError(f"{self.path.name}: there is no frame to write")
        with cannot_be_written(self.path), complete(self.path) as unnamed:
            if suffix_of(unnamed) in VIDEO_FORMATS:
                self.notes += _join_videos(segments, unnamed, self.source, self.to_end)
            elif suffix_of(unnamed):  # one PNG
                os.replace(segments[0], unnamed)
            else:
                _join_folders(segments, unnamed)
        for segment in self._segments():
            remove(segment)

    def _segments(self) -> list[Path]:
        found = self.parts.iterdir() if self.parts.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"\d{8,}(\.\w+)?", path.name))


def _join_folders(segments: list[Path], path: Path) -> None:
    path.mkdir()
    files = chain.from_iterable(sorted(folder.iterdir(), key=natural_order) for folder in segments)
    for n, file in enumerate(file for file in files if OURS.fullmatch(file.name)):
        try:
            os.link(file, path / f"{n:06d}.png")
        except OSError:  # a disk without hard links
            shutil.copyfile(file, path / f"{n:06d}.png")


def _join_videos(segments: list[Path], path: Path, source: VideoReader, to_end: bool) -> list[str]:
    """Packets as they are, pictures and sound in the order of their decoding times. Returns notes."""
    tick, step = clock(source.rate, source)
    notes: list[str] = []
    with ExitStack() as stack:
        original = source.kind == "video" and stack.enter_context(open_container(source.path, source.name))
        container = stack.enter_context(new_container(path))
        with open_container(segments[0], segments[0].name) as first:
            joined = container.add_stream_from_template(first.streams.video[0], opaque=True)
        joined.time_base, joined.codec_context.framerate = tick, source.rate
        headers = joined.codec_context.extradata
        origin = min(packet.pts for packet in _segment_packets(segments[0], tick, headers))
        end = None
        if not to_end:
            last = max(packet.pts for packet in _segment_packets(segments[-1], tick, headers))
            end = (last + step) * tick
        streams, covers, misfits = {}, [], []
        if original:
            whole = stack.enter_context(open_container(source.path, source.name, ignore_editlist="1"))
            picture = next(s for s in original.streams.video if not s.disposition & Disposition.attached_pic)
            joined.metadata.update({k: v for k, v in _tags(picture).items() if k in TRACK_TAGS})
            joined.disposition = picture.disposition.value
            streams = _sound_streams(original, whole, container, misfits)
            covers = _surroundings(original, whole, container, misfits)
            container.set_chapters(_chapters(original, source.shifts[0] - origin * tick, end))
        pictures = _pictures(segments, origin, joined, tick, step)
        sounds = _sounds(original, streams, source.shifts, origin * tick, end, notes) if streams else ()
        packets = heapq.merge(pictures, sounds, key=lambda packet: packet.dts * packet.time_base)
        filled = set()  # streams with packets
        for packet in chain(covers, packets):
            try:
                container.mux_one(packet)
                filled.add(packet.stream.index)
            except (av.error.InvalidDataError, av.error.ArgumentError):
                if packet.stream is joined:
                    raise
                notes.append("sound: damaged packets were left out")
        # MP4 leaves out a track without packets, Matroska has it.
        there = [s.index for s in container.streams if s.index in filled or path.suffix == ".mkv"]
        places = {i: there.index(s.index) for i, s in streams.items() if s.index in there}
        container.close()
        if original:
            with open_container(path, path.name) as result:
                misfits += _lost(result, original, places)
        if misfits:
            s, are = ("", "are") if len(misfits) > 1 else ("es", "is")
            more = "" if path.suffix == ".mkv" else " An .mkv output holds more kinds."
            fit = f"do{s} not fit into {path.suffix} and {are} left out.{more}"
            notes.append(f"{', '.join(dict.fromkeys(misfits))} {fit}")
    return list(dict.fromkeys(notes))


def _pictures(
    segments: list[Path], origin: int, stream: VideoStream, tick: Fraction, step: int
) -> Iterator[av.Packet]:
    """The packets of all segments, from zero on. Decoding times are those of presentation, places earlier."""
    decoding_times = deque(-step * n for n in range(X264_REORDERED, 0, -1))
    for segment in segments:
        packets = _segment_packets(segment, tick, stream.codec_context.extradata)
        decoding_times.extend(sorted(packet.pts - origin for packet in packets))
        for packet in packets:
            packet.pts, packet.dts = packet.pts - origin, decoding_times.popleft()
            packet.duration, packet.stream = step, stream
            yield packet


def _segment_packets(path: Path, tick: Fraction, headers: bytes) -> list[av.Packet]:
    """A segment's packets, compressed as they are, their times in ticks of the source's clock."""
    with open_container(path, path.name) as container:
        stream = container.streams.video[0]
        if stream.codec_context.extradata != headers:
            raise VideoError(f"{path.name}: made with other settings. Remove the segments and start again.")
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        for packet in packets:
            packet.pts, packet.time_base = round(packet.pts * stream.time_base / tick), tick
    return packets


def _sound_streams(
    original: InputContainer, whole: InputContainer, container: OutputContainer, misfits: list[str]
) -> dict:
    """New streams for the original's audio and subtitles, by their index there. whole: the original opened
    without its edit lists, for what they hide in front would be a decoder's delay in other containers."""
    streams = {}
    for stream in (*original.streams.audio, *original.streams.subtitles):
        codec = stream.codec_context  # None if FFmpeg does not know it
        hidden = getattr(codec, "initial_padding", 0)  # samples; PyAV tells from 19 on
        cut = hidden > 0 and hidden > PREROLL * codec.sample_rate
        try:
            template = whole.streams[stream.index] if cut else stream
            new = container.add_stream_from_template(template)
        except ValueError:  # PyAV asks the container's list of codecs
            misfits.append(f"{stream.type} {codec.name if codec else '(unknown)'}")
            continue
        new.metadata.update(_tags(stream))
        new.disposition, streams[stream.index] = stream.disposition.value, new
    return streams


def _tags(of) -> dict[str, str]:
    """Those of a film or a track that do not speak of its file. MP4 calls a track's title its name."""
    tags = {k: v for k, v in of.metadata.items() if not OF_THE_FILE.match(k)}
    return {"title": tags.pop("name")} | tags if "name" in tags else tags


def _surroundings(
    original: InputContainer, whole: InputContainer, container: OutputContainer, misfits: list[str]
) -> list[av.Packet]:
    """What else belongs to a film: tags, fonts for its subtitles, cover art. Returns the covers' packets."""
    suffix = suffix_of(Path(container.name))
    container.metadata.update(_tags(original))
    packets, files = [], [(f.name, f.mimetype, f.data) for f in original.streams.attachments]
    for cover in (s for s in whole.streams.video if s.disposition & Disposition.attached_pic):
        packet = next((packet for packet in whole.demux(cover) if packet.size), None)
        if packet is None or cover.codec_context is None:  # damaged
            continue
        kind = cover.codec_context.name.replace("mjpeg", "jpeg")
        if suffix not in (".mp4", ".m4v"):
            files.append((cover.metadata.get("filename", f"cover.{kind}"), f"image/{kind}", bytes(packet)))
            continue
        packet.stream = container.add_stream_from_template(cover)
        packet.stream.disposition, packet.pts, packet.dts = Disposition.attached_pic.value, 0, 0
        packets.append(packet)
    for name, kind, content in files:
        if suffix == ".mkv":
            container.add_attachment(name, kind or "application/octet-stream", content)
        else:
            misfits.append(f"attachment {name}")
    return packets


def _chapters(original: InputContainer, shift: Fraction, end: Fraction | None) -> list[dict]:
    """The original's, moved by `shift` seconds and cut at 0 and `end`."""
    chapters = []
    for chapter in original.chapters():
        tick = chapter["time_base"]
        last = math.inf if end is None else round(end / tick)
        start, stop = (min(max(0, chapter[place] + round(shift / tick)), last) for place in ("start", "end"))
        if start < stop:
            chapters.append(chapter | {"start": start, "end": stop})
    return chapters


def _lost(result: InputContainer, original: InputContainer, places: dict[int, int]) -> list[str]:
    """Tags and flags that the result's container did not keep: each has its own list."""
    kept = {name.lower() for name in result.metadata}
    lost = [f"tag {name}" for name in _tags(original) if name.lower() not in kept]
    for place, new in places.items():
        source, now = original.streams[place], result.streams[new]
        gone = {k: v for k, v in _tags(source).items() if k in TRACK_TAGS and _tags(now).get(k) != v}
        lost += [f"{name} {value}" for name, value in gone.items() if value != "und"]
        lost += [f"flag {flag.name}" for flag in Disposition if source.disposition & flag & ~now.disposition]
    return lost


def _sounds(
    original: InputContainer, streams: dict, shifts: list[Fraction], origin: Fraction, end, notes: list[str]
) -> Iterator[av.Packet]:
    """The original's packets for `streams`, untouched, from `origin` to `end` seconds (None: to their end).

    Times are the picture's: the reader's `shifts` from the file's clock, of which a stream takes the next one
    where that brings its packets closer together. `origin` becomes the output's zero: a cut clip starts with
    the packet that sounds at its first frame.
    """
    picture = [s for s in original.streams.video[:1] if len(shifts) > 1]  # says where subtitles are
    place = dict.fromkeys((*streams, *(s.index for s in picture)), 0)  # which of the shifts a stream is at
    starts: dict[int, Fraction] = {}  # of each stream's last packet
    usual: dict[int, Fraction] = {}  # length of its packets
    try:
        for packet in original.demux(*(original.streams[i] for i in streams), *picture):
            if packet.dts is None:
                continue
            tick, i = packet.time_base, packet.stream.index
            time, length = packet.dts * tick, (packet.duration or 0) * tick
            if packet.is_discard and time + length < 0:  # cut off by an edit list, which begins at zero
                continue
            if len(shifts) > 1:
                guide = picture[0].index if packet.stream.type == "subtitle" else i
                there = starts.get(guide, time + shifts[0])
                later = range(place[i], len(shifts))
                place[i] = min(later, key=lambda n: abs(time + shifts[n] - there))
                usual[i] = min(length, usual.get(i, length))  # before a jump MP4 has packets of hours
                overlaps = time + shifts[place[i]] < starts.get(i, -math.inf) + usual[i] / 2
                if overlaps and packet.stream.type == "audio":  # more sound than picture before a jump
                    continue
            starts[i] = time = time + shifts[place[i]]
            over = origin > 0 and time + length <= origin
            if i not in streams or over or (end is not None and time >= end):
                continue
            shift = round((shifts[place[i]] - origin) / tick)
            packet.dts += shift
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.stream = streams[i]
            yield packet
    except av.error.FFmpegError:
        notes.append("sound: damaged or truncated; kept up to the damage")
