"""What a user relies on in video.py: times, pose, colours, sound, and one line on failure."""

import math
import os
import signal
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from fractions import Fraction
from functools import partial
from io import StringIO
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import segments
import video
from runtime import UserError
from segments import ResumableWriter
from video import (
    VideoError,
    VideoReader,
    VideoWriter,
    read_clip,
    to_network,
    to_uint8,
)

ROOT = Path(__file__).resolve().parents[1]
EDGE = ROOT / "../shared/data/edge"
NTSC = Fraction(24000, 1001)
COLOURS = [(200, 60, 30), (30, 200, 60), (60, 30, 200), (128,) * 3, (255,) * 3, (0,) * 3, (250, 240, 20)]

needs_edge = pytest.mark.skipif(
    not EDGE.is_dir(), reason="the sample files in ../shared/data/edge are not here"
)


def moving_clip(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(t h w 3) uint8: a smooth texture that moves, and a bar whose place tells the frame's number."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    clip = np.stack(
        [
            np.stack([np.sin((x + 2 * t) / 7 + c) + np.cos((y - t) / 5 + 2 * c) for c in range(3)], axis=-1)
            for t in range(frames)
        ]
    )
    clip = (clip * 50 + 128).astype(np.uint8)
    for t in range(frames):
        clip[t, :, t % width] = 255
    return clip


def raw_video(
    path,
    frames,
    rate=Fraction(25),
    pts=None,
    tick=None,
    pix_fmt="yuv420p",
    codec="libx264",
    options=None,
    tags=None,
    rotation=0,
    muxer=None,
):
    """Write through PyAV alone, so that the reader is tested against files that video.py did not make."""
    tick = tick or 1 / Fraction(rate)
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.codec_context.time_base = tick
        for key, value in (tags or {}).items():
            setattr(stream.codec_context, key, value)
        for rgb, n in zip(frames, range(len(frames)) if pts is None else pts, strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = n, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    cos, sin = (round(f(math.radians(rotation))) for f in (math.cos, math.sin))
    return with_matrix(path, cos, -sin, sin, cos) if rotation else path


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """This display matrix in the track's header, where phones write it (PyAV can from 18 on)."""
    upright, matrix = (
        struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        for a, b, c, d in ((1, 0, 0, 1), (a, b, c, d))
    )
    content = path.read_bytes()
    place = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:place] + matrix + content[place + len(matrix) :])
    return path


def write_clip(path, clip, rate=Fraction(25), times=None, source=None, **options):
    with VideoWriter(path, clip.shape[2], clip.shape[1], rate, source, **options) as writer:
        for i, rgb in enumerate(clip):
            writer.write(rgb, None if times is None else times[i])
    return path


def twice(rgb: np.ndarray) -> np.ndarray:
    """A frame at twice its size, by pixel doubling: what stands for the network here."""
    return rgb.repeat(2, axis=0).repeat(2, axis=1)


def doubled(path: Path, frames: list, reader: VideoReader) -> Path:
    """Frames at twice their size, encoded in one go."""
    clip = np.stack([twice(frame.rgb) for frame in frames])
    return write_clip(path, clip, reader.rate, [frame.time for frame in frames], reader)


def x2(source: Path, target: Path, segment=96, start=0.0, frames=None, stop=()) -> list[str]:
    """What infer.py does, in segments of `segment` frames: interrupted before each frame of `stop`, gone on
    with by another writer, then one file. Returns its notes."""
    with VideoReader(source, start) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "SEGMENT", segment)
        size = 2 * reader.width, 2 * reader.height
        for end in (*stop, None):
            with suppress(KeyboardInterrupt):
                with ResumableWriter(target, *size, reader, {}, to_end=frames is None) as writer:
                    first = writer.done
                    for n, frame in enumerate(islice(reader, first, frames), first):
                        if n == end:
                            raise KeyboardInterrupt
                        writer.write(twice(frame.rgb), frame.time)
                return writer.notes


def times_of(path) -> list[Fraction]:
    with VideoReader(path) as reader:
        return [frame.time for frame in reader]


def packet_times(path) -> list[Fraction]:
    with av.open(str(path)) as container:
        times = sorted(p.pts * p.time_base for p in container.demux(video=0) if p.pts is not None)
    return [t - times[0] for t in times]


def packets(path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        streams = getattr(container.streams, kind)
        return [bytes(p) for p in (container.demux(streams) if streams else ()) if p.dts is not None]


def with_sound(path, clip, rate=Fraction(25), audio="aac", seconds=2.0, video_start=0):
    """A clip with a tone, and the sound's packets."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate)
        video.height, video.width, video.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        sound = container.add_stream(audio, rate=48000, layout="mono")
        sound.bit_rate = 96000
        sound.metadata["language"] = "deu"
        for i, rgb in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts = i + video_start
            container.mux(video.encode(frame))
        wave = (np.sin(np.arange(int(seconds * 48000)) / 20) * 8000).astype(np.int16)[None]
        tone = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        tone.sample_rate, tone.pts = 48000, 0
        fifo = av.AudioFifo()
        fifo.write(tone)
        resampler = av.AudioResampler(format=sound.format, layout="mono", rate=48000)
        while (chunk := fifo.read(1024, partial=True)) is not None:
            for part in resampler.resample(chunk):
                container.mux(sound.encode(part))
        container.mux(sound.encode(None))
        container.mux(video.encode(None))
    return path


# --- times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("rate", [NTSC, Fraction(30000, 1001), Fraction(25), Fraction(60)])
def test_constant_rate_keeps_its_fraction_in_the_header(tmp_path, suffix, rate):
    path = write_clip(tmp_path / f"clip{suffix}", moving_clip(40), rate)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == rate
    with VideoReader(path) as reader:
        assert (reader.rate, reader.constant_rate) == (rate, True)
        assert [f.time for f in reader] == [n / rate for n in range(40)]


VARIABLE = [0, *np.cumsum(np.random.default_rng(0).integers(5, 120, size=59)).tolist()]  # milliseconds
TIMES = {  # source: rate in its header, timestamps, their tick, whether they are a constant rate's
    "constant.mp4": (NTSC, range(50), 1 / NTSC, True),
    "constant.mkv": (NTSC, range(50), 1 / NTSC, True),
    "milliseconds.mkv": (Fraction(1000), [round(n * 1000 / 30) for n in range(30)], None, True),
    "variable.mkv": (Fraction(30), VARIABLE, Fraction(1, 1000), False),
    "fine_clock.mp4": (Fraction(30), [0, 3001, 5999, 12345, 90001, 90002, 200000], Fraction(1, 90000), False),
    # a frame is missing, far beyond what opening looks at
    "gap.mkv": (NTSC, [n for n in range(300) if n != 280], 1 / NTSC, True),
    "one_frame.mp4": (Fraction(30), [0], None, True),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", TIMES)
def test_every_frame_keeps_its_time_in_either_container(tmp_path, name, suffix):
    rate, pts, tick, constant = TIMES[name]
    source = raw_video(tmp_path / name, moving_clip(len(pts), 16, 16), rate, pts, tick)
    assert x2(source, tmp_path / f"out{suffix}") == []
    grid = Fraction(1, 30) if name.startswith("milli") else tick or 1 / rate
    expected = [n * grid for n in (range(30) if name.startswith("milli") else pts)]
    assert times_of(source) == expected
    exact = constant or suffix == ".mp4" or name == "variable.mkv"  # Matroska counts milliseconds
    gaps = [abs(a - b) for a, b in zip(times_of(tmp_path / f"out{suffix}"), expected, strict=True)]
    assert max(gaps) <= (0 if exact else Fraction(1, 1000))
    with VideoReader(source) as reader:
        assert reader.constant_rate == constant
        assert len(list(reader)) == len(pts) and reader.notes == []
    if name.startswith("constant"):
        with av.open(str(tmp_path / f"out{suffix}")) as container:
            assert container.streams.video[0].average_rate == NTSC
    elif not constant and suffix == ".mp4":
        assert packet_times(tmp_path / "out.mp4") == expected


# --- seeking -------------------------------------------------------------------------------------------

GOPS = {
    "closed": {"g": "12", "bf": "3"},
    "open": {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"},
    "one": {"g": "1000", "bf": "2"},
}


@pytest.mark.parametrize("gop", GOPS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_starting_anywhere_equals_decoding_from_the_start(tmp_path, gop, suffix):
    options = {**GOPS[gop], **({"bf": "0"} if suffix == ".avi" else {})}  # AVI has no way to reorder frames
    path = raw_video(tmp_path / f"clip{suffix}", moving_clip(60), NTSC, options=options)
    with VideoReader(path) as reader:
        whole = list(reader)
    assert len(whole) == 60
    for index in range(0, 60, 7):
        with VideoReader(path, start=float(whole[index].time)) as reader:
            rest = list(reader)
        assert [f.time for f in rest] == [f.time for f in whole[index:]]
        assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(rest, whole[index:], strict=True))


def test_starting_late_does_not_decode_from_the_start(tmp_path):
    path = raw_video(tmp_path / "clip.mp4", moving_clip(200), options={"g": "10"})
    with VideoReader(path, start=7.6) as reader:
        first = next(reader._decode_from(reader.start))
        assert Fraction(70, 10) <= first.pts * reader.tick <= Fraction(76, 10)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("variable", [False, True])
def test_read_clip_is_frame_exact(tmp_path, suffix, variable):
    pts = np.cumsum(np.random.default_rng(1).integers(8, 90, size=40)).tolist() if variable else None
    tick = Fraction(1, 1000) if variable else None
    path = raw_video(
        tmp_path / f"clip{suffix}", moving_clip(40), NTSC, pts, tick, options={"g": "8", "bf": "2"}
    )
    whole = read_clip(path)
    assert whole.shape == (40, 48, 64, 3) and whole.dtype == np.uint8
    for start in (0, 1, 7, 8, 23, 35):
        assert np.array_equal(read_clip(path, start, 5), whole[start : start + 5])


def test_read_clip_says_what_a_short_clip_has(tmp_path):
    path = raw_video(tmp_path / "clip.mp4", moving_clip(9))
    with pytest.raises(VideoError, match=r"clip.mp4: has 9 frames, not the 25 from frame 0 on"):
        read_clip(path, 0, 25)
    with pytest.raises(VideoError, match="has 0 frames"):
        read_clip(path, 9)


# --- pose and size -------------------------------------------------------------------------------------


def test_pixel_shape_is_kept(tmp_path):
    for turned, aspect in ((0, Fraction(4, 3)), (90, Fraction(3, 4))):
        tags = {"sample_aspect_ratio": Fraction(4, 3)}
        x2(raw_video(tmp_path / "s.mp4", moving_clip(3), tags=tags, rotation=turned), tmp_path / "out.mp4")
        with av.open(str(tmp_path / "out.mp4")) as container:
            assert container.streams.video[0].sample_aspect_ratio == aspect


def test_odd_sizes_are_read_whole_and_written_only_where_that_can_be(tmp_path):
    clip = moving_clip(2, 47, 65)
    assert np.array_equal(read_clip(raw_video(tmp_path / "a.mkv", clip, codec="ffv1", pix_fmt="bgr0")), clip)
    with pytest.raises(VideoError, match=r"out.mp4: .*65x47.*folder"):
        VideoWriter(tmp_path / "out.mp4", 65, 47, Fraction(25))
    assert np.array_equal(read_clip(write_clip(tmp_path / "out", clip)), clip)  # the way out


# --- colour --------------------------------------------------------------------------------------------


def yuv_matrix(kr: float, kb: float) -> np.ndarray:
    """RGB in [0, 1] -> Y in [0, 1], Cb and Cr in [-0.5, 0.5] (ITU-R BT.601, BT.709, BT.2020)."""
    luma = np.array([kr, 1 - kr - kb, kb])
    return np.stack([luma, ([0, 0, 1] - luma) / (2 - 2 * kb), ([1, 0, 0] - luma) / (2 - 2 * kr)])


MATRIX = {601: yuv_matrix(0.299, 0.114), 709: yuv_matrix(0.2126, 0.0722), 2020: yuv_matrix(0.2627, 0.0593)}


def patches(matrix: int, height: int, width: int, full: bool = False, bits: int = 8) -> av.VideoFrame:
    """A frame of seven vertical stripes, COLOURS, as exact 4:2:0 YUV: made without swscale."""
    yuv = np.repeat(np.array(COLOURS), width // 7, axis=0) / 255 @ MATRIX[matrix].T
    scale, offset = ([255, 255, 255], [0, 128, 128]) if full else ([219, 224, 224], [16, 128, 128])
    row = np.floor((yuv * scale + offset) * 2 ** (bits - 8) + 0.5).clip(0, 2**bits - 1)
    planes = [np.tile(row[:, 0], (height, 1)), *(np.tile(row[::2, c], (height // 2, 1)) for c in (1, 2))]
    frame = av.VideoFrame(width, height, {8: "yuvj420p" if full else "yuv420p", 10: "yuv420p10le"}[bits])
    for plane, values in zip(frame.planes, planes, strict=True):
        padded = np.zeros(
            (plane.height, plane.line_size * 8 // (8 if bits == 8 else 16)), f"u{bits // 10 + 1}"
        )
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
    return frame


def stripe_error(rgb: np.ndarray) -> int:
    """Largest difference between COLOURS and the middle of their stripes."""
    step = rgb.shape[1] // 7
    return int(np.abs(rgb[4:-4, step // 2 :: step].astype(int) - COLOURS).max())


SD, HD = (96, 7 * 32), (720, 7 * 184)
SOURCES = {  # matrix of the pixels, size, tags of the file, full range, bits
    "untagged SD": (601, SD, {}, False),
    "untagged HD": (709, HD, {}, False),
    "tagged SD 709": (709, SD, {"colorspace": 1, "color_range": 1}, False),
    "tagged HD 709": (709, HD, {"colorspace": 1, "color_primaries": 1, "color_trc": 1}, False),
    "tagged HD 601": (601, HD, {"colorspace": 6}, False),
    "tagged PAL 601": (601, SD, {"colorspace": 5}, False),
    "full range 709": (709, SD, {"colorspace": 1, "color_range": 2}, True),
    "full range 601": (601, SD, {"colorspace": 6, "color_range": 2}, True),
    "10-bit 709": (709, SD, {"colorspace": 1, "color_range": 1}, False, 10),
}


def coded_patches(path, matrix, size, tags, full=False, bits=8):
    """A lossless file of one frame of patches."""
    frame = patches(matrix, *size, full, bits)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if bits == 8 else "ffv1", rate=25)
        stream.options = {"qp": "0"} if bits == 8 else {}
        stream.height, stream.width, stream.pix_fmt = *size, frame.format.name
        for key, value in tags.items():
            setattr(stream.codec_context, key, value)
            setattr(frame, key, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("kind", SOURCES)
def test_solid_colours_survive_within_two_levels(tmp_path, kind):
    source = coded_patches(tmp_path / "source.mkv", *SOURCES[kind])
    assert stripe_error(read_clip(source)[0]) <= 2
    x2(source, tmp_path / "out.mp4")
    assert stripe_error(read_clip(tmp_path / "out.mp4")[0]) <= 2


def test_hdr_keeps_its_tags_and_is_mentioned(tmp_path):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 18, "color_range": 1}
    source = coded_patches(tmp_path / "a.mkv", 2020, SD, tags, bits=10)
    x2(source, tmp_path / "out.mp4")
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert reader.hdr == (video.HDR_MATRIX, 9, 18) and "HLG" in reader.notes[0]
        assert stripe_error(next(iter(reader)).rgb) <= 2


def test_output_is_bt709_in_pixels_and_tags(tmp_path):
    stripes = np.repeat(np.array(COLOURS, np.uint8), 48, axis=0)
    clip = np.tile(stripes, (2, 96, 1, 1))
    write_clip(tmp_path / "out.mp4", clip, crf=1)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc)) == (1, 1, 1)
        assert int(frame.color_range) == 1 and frame.format.name == "yuv420p"
        assert container.streams.video[0].codec_context.name == "h264"
        planes = frame.to_ndarray()  # (3h/2 w): Y, then U and V
    luma = planes[:96].astype(int)
    expected = np.array(COLOURS) / 255 @ MATRIX[709][0] * 219 + 16
    assert np.abs(luma[48, 24::48] - expected).max() <= 1.5


def test_coloured_texture_is_not_darkened(tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(30, 226, size=(24, 32, 3)).astype(np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((256, 192), Image.Resampling.BICUBIC))
    write_clip(tmp_path / "clip.mp4", image[None], crf=1)
    difference = read_clip(tmp_path / "clip.mp4")[0].astype(float) - image
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.2


def test_converters_are_exact_and_round_halves_up():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_network(levels)), levels)
    assert to_network(levels).min() == -1 and to_network(levels).max() == 1
    assert to_network(levels).dtype == torch.float32
    halves = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])  # 0 lies between levels 127 and 128
    assert to_uint8(halves).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.zeros(1, 2, 3, 4, 5, dtype=torch.bfloat16)).shape == (1, 2, 3, 4, 5)


# --- sound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [50, 20])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_audio_packets_are_copied_byte_for_byte_at_their_distance_to_the_picture(tmp_path, suffix, segment):
    source = with_sound(tmp_path / f"source{suffix}", moving_clip(50), video_start=10)
    out = tmp_path / f"out{suffix}"
    assert x2(source, out, segment) == []
    assert packets(source, "audio") == packets(out, "audio") != []

    def lead(path):
        first = {}
        with av.open(str(path)) as container:
            for p in container.demux():
                if p.pts is not None:
                    first.setdefault(p.stream.type, p.pts * p.time_base)
        return first["video"] - first["audio"]

    assert abs(lead(source) - Fraction(10, 25)) < Fraction(3, 100)
    assert abs(lead(out) - lead(source)) <= Fraction(1, 1000)
    with av.open(str(out)) as container:
        assert container.streams.audio[0].metadata["language"] == "deu"


def test_metadata_in_no_utf8_stops_nothing(tmp_path):
    source = with_sound(tmp_path / "source.mkv", moving_clip(25), seconds=1.0)
    sound, content = packets(source, "audio"), source.read_bytes()
    assert content.count(b"deu") == 1
    source.write_bytes(content.replace(b"deu", b"d\xe9u"))
    assert x2(source, tmp_path / "out.mkv") == []
    assert len(times_of(tmp_path / "out.mkv")) == 25
    assert packets(tmp_path / "out.mkv", "audio") == sound != []


def test_a_part_of_a_clip_takes_its_part_of_the_sound(tmp_path):
    source = with_sound(tmp_path / "source.mp4", moving_clip(50))
    x2(source, tmp_path / "out.mp4", 4, start=1.0, frames=10)
    assert packet_times(tmp_path / "out.mp4") == [Fraction(n, 25) for n in range(10)]
    whole, part = packets(source, "audio"), packets(tmp_path / "out.mp4", "audio")
    assert any(whole[i : i + len(part)] == part for i in range(len(whole)))
    assert abs(len(part) * 1024 / 48000 - 10 / 25) < 0.05


def test_sound_that_does_not_fit_is_named_with_the_way_out(tmp_path):
    source = with_sound(tmp_path / "source.avi", moving_clip(25), audio="wmav2")
    (note,) = x2(source, tmp_path / "out.mp4")
    assert "audio wmav2 does not fit into .mp4" in note and ".mkv" in note
    assert times_of(tmp_path / "out.mp4") == times_of(source) != []


@needs_edge
@pytest.mark.parametrize("name", ["alpha_vp9.webm", "mkv_audio_subs.mkv"])
def test_subtitles_and_sound_go_along(tmp_path, name):
    if name == "alpha_vp9.webm":
        assert "audio vorbis does not fit into .mov" in x2(EDGE / name, tmp_path / "out.mov")[0]
    assert x2(EDGE / name, tmp_path / "out.mkv") == []  # the way out
    for kind in ("audio", "subtitles"):
        assert packets(EDGE / name, kind) == packets(tmp_path / "out.mkv", kind)
    assert packets(EDGE / name, "audio") != []


# --- segments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rate", [NTSC, Fraction(25), "variable"])
@pytest.mark.parametrize("segment, stop", [(60, ()), (1, (1, 7)), (25, (24, 52))])
def test_joined_segments_are_one_uninterrupted_run(tmp_path, suffix, rate, segment, stop):
    if rate == "variable":
        source = raw_video(tmp_path / "s.mkv", moving_clip(60), Fraction(30), VARIABLE, Fraction(1, 1000))
    else:
        source = raw_video(tmp_path / "s.mp4", moving_clip(60), rate)
    out, whole = tmp_path / f"joined{suffix}", tmp_path / f"whole{suffix}"
    x2(source, out, segment, stop=stop)
    with VideoReader(source) as reader:
        doubled(whole, list(reader), reader)
    assert times_of(out) == times_of(whole) == times_of(source)
    assert packet_times(out) == packet_times(whole)
    with av.open(str(out)) as a, av.open(str(whole)) as b:
        decoding = [p.dts for p in a.demux(video=0) if p.dts is not None]
        assert decoding == sorted(set(decoding))
        if rate != "variable":  # whose mean rate depends on the decoding times before zero
            assert decoding == [p.dts for p in b.demux(video=0) if p.dts is not None]
            assert a.streams.video[0].average_rate == b.streams.video[0].average_rate == rate
        for name in ("time_base", "start_time", "colorspace", "color_range", "sample_aspect_ratio"):
            joined, uninterrupted = (c.streams.video[0] for c in (a, b))
            assert getattr(joined, name) == getattr(uninterrupted, name), name
    x2(source, tmp_path / "frames", segment, stop=stop)  # the same without encoding, as PNGs
    assert [p.name for p in sorted((tmp_path / "frames").iterdir())] == [f"{n:06d}.png" for n in range(60)]
    difference = read_clip(out).astype(float) - read_clip(tmp_path / "frames")
    assert np.abs(difference).mean(axis=(1, 2, 3)).max() < 12  # each frame in its place


def test_segments_that_cannot_be_joined_are_named_and_nothing_is_lost(tmp_path):
    source, out = raw_video(tmp_path / "s.mp4", moving_clip(6)), tmp_path / "out.mp4"
    parts = tmp_path / "out.mp4.parts"
    other = write_clip(tmp_path / "other.nut", moving_clip(2, 32, 32))
    for content, line in (
        (other.read_bytes(), "00000002.nut: made with other settings"),
        (other.read_bytes()[:40], "00000002.nut: not a video"),
    ):
        with VideoReader(source) as reader, pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "SEGMENT", 2)
            with pytest.raises(VideoError, match=line), ResumableWriter(out, 128, 96, reader, {}) as writer:
                for frame in islice(reader, writer.done, None):
                    writer.write(twice(frame.rgb), frame.time)
                (parts / "00000002.nut").write_bytes(content)
        assert not out.exists()
        assert {p.name for p in parts.iterdir()} == {"plan.json", *(f"0000000{n}.nut" for n in (0, 2, 4))}


# --- folders and images --------------------------------------------------------------------------------


def test_folder_frames_come_in_natural_order(tmp_path):
    for n in (10, 2, 1, 33):
        Image.fromarray(np.full((6, 8, 3), n, np.uint8)).save(tmp_path / f"frame{n}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    with VideoReader(tmp_path) as reader:
        assert (reader.kind, reader.frames, reader.width, reader.height) == ("folder", 4, 8, 6)
        assert [f.rgb[0, 0, 0] for f in reader] == [1, 2, 10, 33]
    assert read_clip(tmp_path, 1, 2)[:, 0, 0, 0].tolist() == [2, 10]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".jpg"])
def test_one_image_goes_in_and_out(tmp_path, suffix):
    image = moving_clip(1)[0]
    lossless = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(image).save(tmp_path / f"a{suffix}", **lossless)
    with VideoReader(tmp_path / f"a{suffix}") as reader:
        out = read_clip(doubled(tmp_path / "out.png", list(reader), reader))
    assert out.shape == (1, 96, 128, 3)
    assert np.array_equal(out[0, ::2, ::2], image) or suffix == ".jpg"


def test_alpha_grey_and_palette_images_become_rgb(tmp_path):
    rgba = np.dstack([moving_clip(1)[0], np.full((48, 64), 100, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with VideoReader(tmp_path / "a.png") as reader:
        assert np.array_equal(next(iter(reader)).rgb, rgba[..., :3])
        assert reader.notes == ["alpha channel dropped"]
    Image.fromarray(np.full((4, 4), 200 * 257, np.uint16)).save(tmp_path / "g.png")
    assert (read_clip(tmp_path / "g.png") == 200).all()
    Image.fromarray(rgba[..., 0]).save(tmp_path / "l.png")
    assert np.array_equal(read_clip(tmp_path / "l.png")[0, ..., 2], rgba[..., 0])


def test_a_folder_of_pngs_is_written_and_replaced_only_by_its_kind(tmp_path):
    out = write_clip(tmp_path / "out", moving_clip(12))
    assert sorted(p.name for p in out.iterdir())[:2] == ["000000.png", "000001.png"]
    assert np.array_equal(read_clip(out), moving_clip(12))
    write_clip(out, moving_clip(3))
    assert len(list(out.iterdir())) == 3
    (out / "holiday.png").write_bytes(b"dear to someone")
    with pytest.raises(VideoError, match="out: something else has this name"):
        write_clip(out, moving_clip(3))
    assert (out / "holiday.png").exists()


# --- one line on failure -------------------------------------------------------------------------------


def make_broken(folder: Path, kind: str) -> tuple[Path, str]:
    """A path, and what its error line has to say."""
    path = folder / "x.mp4"
    if kind == "missing":
        return path, r"^x\.mp4: no such file$"
    if kind == "empty file":
        path.touch()
        return path, r"^x\.mp4: the file is empty\. Is the download complete\?$"
    if kind == "text":
        path.write_text("hello " * 500)
        return path, r"^x\.mp4: not a video or image that can be read\."
    if kind == "no picture":
        with av.open(str(path), "w") as container:
            sound = container.add_stream("aac", rate=48000, layout="mono")
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            tone.sample_rate = 48000
            container.mux(sound.encode(tone))
            container.mux(sound.encode(None))
        return (
            path,
            r"^x\.mp4: no decodable video frames \(streams: audio aac\)\. Is the download complete\?$",
        )
    if kind == "nothing decodes":
        raw_video(path, moving_clip(30), options={"movflags": "faststart"})
        data = path.read_bytes()
        start = data.index(b"mdat") + 4
        end = data.index(b"moov") if data.index(b"moov") > start else len(data)
        path.write_bytes(data[:start] + bytes(end - start) + data[end:])
        return path, r"^x\.mp4: no decodable video frames \(streams: video h264\)"
    frames = folder / "frames"
    frames.mkdir()
    if kind == "empty folder":
        return frames, r"^frames/: no frames in this folder \(looked for png, jpg, webp, bmp, \.\.\.\)$"
    for n in range(3):
        Image.fromarray(moving_clip(1)[0]).save(frames / f"{n:04d}.png")
    if kind == "mixed sizes":
        Image.fromarray(moving_clip(1)[0][:40]).save(frames / "0002.png")
        return frames, r"^frames/: 0002\.png is 64x40, expected 64x48\. Use one folder per clip\.$"
    damaged = frames / "0001.png"
    damaged.write_bytes(damaged.read_bytes()[:900] if kind == "half an image" else b"nothing of the kind")
    return frames, r"^frames/0001\.png: corrupt image"


BROKEN = "missing,empty file,text,no picture,nothing decodes,empty folder,mixed sizes,half an image,no image"


@pytest.mark.parametrize("kind", BROKEN.split(","))
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, kind, capfd):
    path, line = make_broken(tmp_path, kind)
    with pytest.raises(VideoError, match=line) as caught:
        with VideoReader(path) as reader:
            list(reader)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # FFmpeg keeps quiet


def test_a_truncated_clip_gives_what_decodes_and_a_note(tmp_path, capfd):
    whole = raw_video(tmp_path / "whole.mkv", moving_clip(100), options={"g": "20"})
    (tmp_path / "half.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with VideoReader(tmp_path / "half.mkv") as reader:
        frames = list(reader)
        assert any(
            "damaged or truncated" in note and f"{len(frames)} of 100" in note for note in reader.notes
        )
    assert 10 < len(frames) < 90
    expected = read_clip(whole, 0, len(frames) - 3)  # the last ones may be incomplete
    assert all(np.array_equal(f.rgb, e) for f, e in zip(frames, expected, strict=False))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["out.avi", "out.webm", "no/out.mp4", "out.png/"])
def test_an_output_that_cannot_be_is_refused_before_work_starts(tmp_path, name):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(VideoError, match=r"^[^\n]+$"):
        VideoWriter(tmp_path / name, 64, 48, Fraction(25))
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(VideoError, match="out.mp4: cannot be written"):
        write_clip(tmp_path / "out.mp4", moving_clip(1))


# --- interruptions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out.png", "out"])
def test_an_exception_leaves_nothing_behind(tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / name, 64, 48, Fraction(25)) as writer:
            writer.write(moving_clip(1)[0])
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(VideoError, match="no frame"):
        with VideoWriter(tmp_path / name, 64, 48, Fraction(25)):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_old_result_stays_until_the_new_one_is_whole(tmp_path):
    out = write_clip(tmp_path / "out.mp4", moving_clip(5))
    before = out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(out, 64, 48, Fraction(25)) as writer:
            writer.write(moving_clip(1)[0])
            raise KeyboardInterrupt
    assert out.read_bytes() == before


ENDLESS = """
import sys, numpy as np
from fractions import Fraction
from video import VideoWriter
with VideoWriter(sys.argv[1], 256, 256, Fraction(25)) as writer:
    rng = np.random.default_rng(0)
    while True:
        writer.write(rng.integers(0, 255, (256, 256, 3)).astype(np.uint8))
        print("frame", flush=True)
"""


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path, name):
    target = tmp_path / name
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for _ in range(80):  # beyond what the encoder holds back
        assert process.stdout.readline() == "frame\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    write_clip(target, moving_clip(5))  # what the killed one left is no obstacle
    assert len(read_clip(target)) == 5
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be tied to a core here")
@pytest.mark.skipif(os.cpu_count() < 2, reason="one core only")
def test_the_bytes_of_a_video_do_not_depend_on_the_number_of_cores(tmp_path):
    encode = "import sys, test_video as t; t.write_clip(sys.argv[1], t.moving_clip(50, 144, 192))"
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    for cores in ({0}, {0, 1}):
        command = [sys.executable, "-c", encode, tmp_path / f"{len(cores)}.mp4"]
        tie = partial(os.sched_setaffinity, 0, cores)
        subprocess.run(command, env=os.environ | paths, preexec_fn=tie, check=True)
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()


# --- the awkward files ---------------------------------------------------------------------------------

EDGE_FILES = {  # width, height, rate, frames that decode, part of a note
    "alpha_vp9.webm": (200, 200, 30, 150, "alpha"),
    "corrupt_stream.mp4": (1280, 720, 10, 49, "49 of 50 frames decode"),
    "h264_10bit.mp4": (200, 200, 30, 30, None),
    "hlg_10bit_9frames_audio.mp4": (1920, 1080, Fraction(90000, 3001), 9, "HLG"),
    "midstream_resize.mp4": (400, 300, Fraction(29750, 491), 118, "frame size changes"),
    "mkv_audio_subs.mkv": (1080, 720, 30, 30, None),
    "one_frame_2x2.mp4": (2, 2, 25, 1, None),
    "rot90_3frames.mov": (320, 568, 30, 3, "rotated"),
    "slowmotion_vfr.mp4": (1280, 720, Fraction(630000, 47281), 7, None),
    "truncated_half.mp4": (960, 540, Fraction(30000, 1001), 72, "72 of 150 frames decode"),
    "vp9_odd_161x121.webm": (161, 121, Fraction(2997, 100), 30, None),
}


@needs_edge
@pytest.mark.parametrize("name", EDGE_FILES)
def test_awkward_files_are_read_in_full(name, capfd):
    width, height, rate, count, note = EDGE_FILES[name]
    with VideoReader(EDGE / name) as reader:
        assert (reader.width, reader.height, reader.rate) == (width, height, rate)
        frames = list(reader)
        assert {frame.rgb.shape for frame in frames} == {(height, width, 3)} and len(frames) == count
        assert all(a.time < b.time for a, b in pairwise(frames))
        assert note is None and reader.notes == [] or any(note in n for n in reader.notes)
    assert capfd.readouterr() == ("", "")


# --- damaged files -------------------------------------------------------------------------------------

DAMAGED = 300


def clips_of_every_kind(folder: Path) -> list[Path]:
    """A clip in each container that users bring, and a still."""
    clip = moving_clip(14, 32, 48)
    files = [with_sound(folder / f"sound{suffix}", clip, seconds=0.6) for suffix in (".mp4", ".mkv", ".mov")]
    files += [write_clip(folder / "still.png", clip[:1])]
    files += [raw_video(folder / "fast.mp4", clip, NTSC, options={"movflags": "faststart"})]
    files += [raw_video(folder / "old.avi", clip, codec="mpeg4")]
    if "libvpx-vp9" in av.codecs_available:
        files += [raw_video(folder / "web.webm", clip, codec="libvpx-vp9")]
    return files


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, anywhere or where the headers are; a piece zeroed or lost; the end cut off."""
    data, kind, at = bytearray(data), rng.integers(5), int(rng.integers(len(data)))
    if kind <= 1:
        for place in rng.integers(len(data) if kind else min(len(data), 1500), size=rng.integers(1, 40)):
            data[place * rng.choice([1, -1])] = rng.integers(256)
    elif kind == 2:
        data[at : at + 500] = bytes(len(data[at : at + 500]))
    else:
        del data[at : at + 300 if kind == 3 else None]
    return bytes(data)


def survive(path: Path, upscale) -> bool:
    """upscale(path, out) ends with a whole clip, or in one line and without one."""
    out = path.with_name("out.mp4" if path.suffix != ".png" else "out.png")
    try:
        upscale(path, out)
        with VideoReader(out) as reader:
            assert len(list(reader)) > 0 and reader.notes == []
        out.unlink()
        return True
    except UserError as error:
        assert "\n" not in str(error) and not out.exists(), error
        return False


def once_doubled(path: Path, out: Path) -> None:
    """Read and written; videos with their sound."""
    if out.suffix != ".png":
        x2(path, out)
    else:
        with VideoReader(path) as reader:
            doubled(out, list(reader), reader)


def infer_as_user(path: Path, out: Path) -> None:
    import infer

    sys.argv = ["infer.py", str(path), "-o", str(out), "--fresh", "--device", "cpu"]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        infer.main()


def fuzz(folder: str, first: int, step: int) -> None:
    """A child's share: read and write every damaged file, upscale every tenth; prints how many are clips."""
    sources, clips = sorted(Path(folder).glob("*.*")), 0
    work = Path(folder, f"child{first}")
    work.mkdir()
    for number in range(first, DAMAGED, step):
        source = sources[number % len(sources)]
        path = work / f"{number}{source.suffix}"
        path.write_bytes(damaged(source.read_bytes(), np.random.default_rng(number)))
        print(number, source.name, flush=True)  # the last line names the file of a crash or a hang
        clips += survive(path, once_doubled)
        if number % 10 == 0:
            survive(path, infer_as_user)
        path.unlink()
    assert list(work.iterdir()) == [], "something is left"
    print(clips)


@pytest.mark.slow
def test_of_300_damaged_files_each_gives_a_whole_clip_or_one_line(tmp_path):
    clips_of_every_kind(tmp_path)
    share = "import sys, test_video; test_video.fuzz(sys.argv[1], int(sys.argv[2]), 3)"
    command = [sys.executable, "-c", share, str(tmp_path)]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    clips = 0
    for first in range(3):
        child = subprocess.run(
            [*command, str(first)], env=os.environ | paths, timeout=1800, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stdout[-80:] + child.stderr
        assert child.stderr == ""
        clips += int(child.stdout.split()[-1])
    assert DAMAGED / 10 < clips < DAMAGED  # both happen: neither is tested by its absence
