"""Files that people have: several of each kind, built as its tools write them, are read or written."""

import io
import os
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from filelock import FileLock
from PIL import Image, ImageCms
from test_video import moving_clip, raw_video, times_of, with_matrix, with_sound, x2

import infer
import segments
import stills
from data import video_clip
from files import list_files
from metrics import find_clips
from video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError, VideoReader, VideoWriter, read_clip

HOUR = 3600
BEEP = 10  # frames from one flash of light, and one click, to the next


def flashing(
    path: Path, frames=50, codec="libx264", audio="aac", moved=lambda kind, time: 0, **options
) -> Path:
    """A dark clip of 25 frames a second that flashes and clicks together.

    moved: seconds added to what is shown at `time`, by the kind of its stream."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25, options=options)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        packets, wave = [], np.zeros(frames * 1920, np.float32)
        for k in range(frames):
            bright = k % BEEP == BEEP // 2
            grey = np.full((48, 64, 3), 255 if bright else k % 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            packets += video.encode(frame)
            wave[k * 1920 :][:480] = bright * 0.9 * np.sin(np.arange(480) / 3)
        packets += video.encode(None)
        if audio:
            sound = container.add_stream(audio, rate=48000, layout="mono")
            for k in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, k : k + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, k, Fraction(1, 48000)
                packets += sound.encode(frame)
            packets += sound.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            shift = round(moved(packet.stream.type, packet.dts * packet.time_base) / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            container.mux(packet)
    return path


def onsets(path: Path, kind: str) -> list[float]:
    """Seconds at which light or sound begins, as players give them out."""
    found, loud = [], -1.0
    with av.open(str(path)) as container:
        for frame in container.decode(**{kind: 0}):
            levels = (
                frame.to_ndarray(format="gray").mean()[None] / 255 if kind == "video" else frame.to_ndarray()
            )
            rate = 1 if kind == "video" else frame.sample_rate
            for k in np.flatnonzero(np.abs(levels.reshape(-1)) > 0.3):
                time = float(frame.pts * frame.time_base) + k / rate
                if time - loud > 0.1:
                    found.append(time)
                loud = time
    return found


def joined(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


# --- counts and clocks --------------------------------------------------------------------------------


def late(seconds):
    return lambda kind, time: seconds


def leap(seconds):
    return lambda kind, time: seconds * (time >= 1)


def parts(folder: Path, suffix: str, *made: dict) -> list[Path]:
    return [flashing(folder / f"part{n}{suffix}", **options) for n, options in enumerate(made)]


WRAP = 2**33 / 90_000 - 2.4  # MPEG's clock ends a second later, for its muxer begins at 1.4 s
CLOCKS = {  # file: (what makes it, frames)
    "joined.ts": (lambda d: joined(d / "joined.ts", *parts(d, ".ts", {"frames": 30}) * 2), 60),
    "three.ts": (lambda d: joined(d / "three.ts", *parts(d, ".ts", {}, {"bf": "0", "frames": 30}, {})), 130),
    "back.ts": (
        lambda d: joined(d / "back.ts", *parts(d, ".ts", {"moved": late(2 * HOUR)}, {"moved": late(1)})),
        100,
    ),
    "joined.mkv": (lambda d: joined(d / "joined.mkv", *parts(d, ".mkv", {"frames": 30}) * 2), 60),
    "lost_second.ts": (lambda d: flashing(d / "lost_second.ts", moved=leap(5)), 50),
    "leap.mkv": (lambda d: flashing(d / "leap.mkv", moved=leap(HOUR)), 50),
    "leap.mp4": (lambda d: flashing(d / "leap.mp4", moved=leap(HOUR)), 50),
    "leap.flv": (lambda d: flashing(d / "leap.flv", moved=leap(HOUR)), 50),
    "wraps.ts": (lambda d: flashing(d / "wraps.ts", moved=late(WRAP)), 50),
    "late.nut": (lambda d: flashing(d / "late.nut", moved=late(10)), 50),
    "before_zero.mkv": (lambda d: flashing(d / "before_zero.mkv", moved=late(-1)), 50),
    "cut.mp4": (lambda d: flashing(d / "cut.mp4", moved=late(-1)), 25),  # an edit list hides a second
    "cut.mov": (lambda d: flashing(d / "cut.mov", moved=late(-1.2), bf="0"), 20),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", CLOCKS)
def test_whatever_the_clock_frames_come_at_their_rate_and_sound_in_step(tmp_path, name, suffix):
    make, frames = CLOCKS[name]
    source = make(tmp_path)
    assert times_of(source) == pytest.approx([n / 25 for n in range(frames)], abs=0.0011)
    out = tmp_path / f"out{suffix}"
    assert x2(source, out) == []
    flashes, clicks = onsets(out, "video"), onsets(out, "audio")
    assert len(flashes) == len(clicks) >= 2
    assert np.abs(np.subtract(flashes, clicks)).max() <= 0.04
    with VideoReader(source) as reader:
        assert len(list(reader)) == frames and reader.notes == []


@pytest.mark.parametrize("name", ["joined.ts", "back.ts"])
def test_a_start_behind_a_jump_is_found(tmp_path, name):
    source = CLOCKS[name][0](tmp_path)
    whole = read_clip(source)
    with VideoReader(source, start=Fraction(45, 25)) as reader:
        rest = list(reader)
    assert [f.time for f in rest] == [Fraction(n, 25) for n in range(45, len(whole))]
    assert all(np.array_equal(a.rgb, b) for a, b in zip(rest, whole[45:], strict=True))


def test_a_still_that_stays_while_sound_goes_on_stays(tmp_path):
    """Not a jump: a lecture's slide."""
    pause = flashing(tmp_path / "a.mkv", g="1")
    with av.open(str(pause)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        streams = [target.add_stream_from_template(s) for s in source.streams]
        for packet in source.demux():
            if packet.dts is None:
                continue
            number = round(packet.pts * packet.time_base * 25)
            if packet.stream.type == "video" and 0 < number < 49:
                continue  # one frame, then the last
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    assert times_of(tmp_path / "b.mkv") == [0, Fraction(49, 25)]


def dropping_avi(path: Path) -> Path:
    return raw_video(
        path, moving_clip(10), pts=[0, 1, 2, 5, 6, 9, 10, 13, 14, 15], codec="mjpeg", pix_fmt="yuvj420p"
    )


def header_of_100(path: Path) -> Path:
    """Matroska whose header promises 100 seconds."""
    content = raw_video(path, moving_clip(10)).read_bytes()
    at = content.index(b"\x44\x89\x88") + 3  # the segment's duration, a double
    tag = content.index(b"00:00:00.400")
    content = content[:at] + struct.pack(">d", 100_000.0) + content[at + 8 :]
    path.write_bytes(content[:tag] + b"00:01:40.000" + content[tag + 12 :])
    return path


HINTS = {
    "cut.mp4": (CLOCKS["cut.mp4"][0], 25),
    "dropped.avi": (lambda d: dropping_avi(d / "dropped.avi"), 10),
    "header.mkv": (lambda d: header_of_100(d / "header.mkv"), 10),
}


@pytest.mark.parametrize("name", HINTS)
def test_header_counts_are_hints_and_training_takes_what_is_there(tmp_path, name):
    make, frames = HINTS[name]
    source = make(tmp_path)
    with VideoReader(source) as reader:
        assert len(list(reader)) == frames and reader.notes == []
    whole = read_clip(source)
    for seed in range(8):
        clip = video_clip(source, 7, 32, np.random.default_rng(seed))
        assert clip.shape == (7, 32, 32, 3)
    assert video_clip(source, frames, 48, np.random.default_rng(0)).shape[0] == len(whole) == frames


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm"])
def test_a_file_that_ends_too_early_is_called_truncated(tmp_path, suffix):
    codec, pix_fmt = {".avi": ("mjpeg", "yuvj420p"), ".webm": ("libvpx-vp9", "yuv420p")}.get(
        suffix, ("libx264", "yuv420p")
    )
    source, muxer = tmp_path / f"a{suffix}", {"movflags": "faststart"} if suffix == ".mp4" else {}
    raw_video(source, moving_clip(40), codec=codec, pix_fmt=pix_fmt, muxer=muxer)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    with VideoReader(source) as reader:
        assert 5 < len(list(reader)) < 40
        assert reader.notes[0].startswith("damaged or truncated")


# --- how it is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "matrix",
    [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)],
)
def test_every_turn_and_mirror_is_shown_as_players_do(tmp_path, matrix):
    stored = moving_clip(1)[0]
    stored[:16, :16] = (255, 0, 0)
    path = with_matrix(raw_video(tmp_path / "a.mp4", [stored], options={"crf": "1"}), *matrix)
    a, b, c, d = matrix
    with VideoReader(path) as reader:
        (shown,) = (frame.rgb.astype(int) for frame in reader)
        notes = ["mirrored" if a * d < b * c else "rotated"] * (matrix != (1, 0, 0, 1))
        assert len(reader.notes) == len(notes) and all(map(str.__contains__, reader.notes, notes))
    y, x = np.mgrid[:48, :64]
    to_x, to_y = a * x + c * y, b * x + d * y  # where each pixel goes, by the definition
    expected = np.zeros((np.ptp(to_y) + 1, np.ptp(to_x) + 1, 3), int)
    expected[to_y - to_y.min(), to_x - to_x.min()] = stored
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 12


def with_clean_aperture(path: Path, top: int, bottom: int, left: int, right: int) -> Path:
    """QuickTime's own cropping, in the description of a 64x48 track."""
    content = bytearray(path.read_bytes())
    middle = right - left, bottom - top  # of what is shown, beside the picture's, in halves of pixels
    sides = 64 - left - right, 1, 48 - top - bottom, 1, -middle[0], 2, -middle[1], 2
    box = struct.pack(">I4s8i", 40, b"clap", *sides)
    start = content.index(b"avc1", content.index(b"stsd")) - 4
    end = start + struct.unpack_from(">I", content, start)[0]
    content[end:end] = box
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = content.rindex(name, 0, end) - 4
        struct.pack_into(">I", content, place, struct.unpack_from(">I", content, place)[0] + len(box))
    path.write_bytes(content)
    return path


@pytest.mark.skipif(not hasattr(av.VideoCodecContext, "coded_side_data"), reason="this PyAV does not tell")
@pytest.mark.parametrize("sides", [(6, 12, 14, 10), (0, 0, 8, 8), (4, 0, 0, 2)])
def test_what_the_container_crops_is_not_shown(tmp_path, sides):
    source = raw_video(tmp_path / "a.mp4", moving_clip(2))
    top, bottom, left, right = sides
    expected = read_clip(source)[:, top : 48 - bottom, left : 64 - right]
    assert np.array_equal(read_clip(with_clean_aperture(source, *sides)), expected)


@pytest.mark.parametrize("codec, suffix", [("libvpx-vp9", ".mp4"), ("libx264", ".mkv")])
def test_the_shape_of_pixels_is_the_containers(tmp_path, codec, suffix):
    tags = {"sample_aspect_ratio": Fraction(64, 45)}
    source = raw_video(tmp_path / f"a{suffix}", moving_clip(2), codec=codec, tags=tags)
    x2(source, tmp_path / "out.mp4")
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert abs(reader.aspect - Fraction(64, 45)) < 0.01  # Matroska keeps whole pixels


@pytest.mark.parametrize("format", ["gray", "gray10le"])
def test_limited_grey_is_black_to_white(tmp_path, format):
    bits = 10 if "10" in format else 8
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.color_range = 64, 48, format, 1
        for level in (16, 235, 126):
            frame = av.VideoFrame(64, 48, format)
            grey = np.full(frame.planes[0].buffer_size // (bits // 5), level << (bits - 8), f"u{bits // 5}")
            frame.planes[0].update(grey.tobytes())
            frame.color_range = 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert read_clip(tmp_path / "a.mkv")[:, 24, 32, 0].tolist() == pytest.approx([0, 255, 128], abs=1)


# --- stills -------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def png_with(path: Path, image: Image.Image, extra: bytes, at_end: bool = False) -> None:
    image.save(path)
    png = path.read_bytes()
    place = (png.rindex(b"IEND") if at_end else png.index(b"IDAT")) - 4
    path.write_bytes(png[:place] + extra + png[place:])


def xmp(value: int) -> bytes:
    name = "http://ns.adobe.com/tiff/1.0/"
    return (
        f'<x:xmpmeta><rdf:Description xmlns:tiff="{name}" tiff:Orientation="{value}"/></x:xmpmeta>'.encode()
    )


TURNED = {  # file: (what writes it, given the picture and the orientation)
    "exif.jpg": lambda path, image, n: image.save(path, quality=95, exif=orientation(n)),
    "xmp.jpg": lambda path, image, n: image.save(path, quality=95, xmp=xmp(n)),
    "exif.webp": lambda path, image, n: image.save(path, lossless=True, exif=orientation(n)),
    "front.png": lambda path, image, n: png_with(path, image, chunk(b"eXIf", orientation(n)[6:])),
    "end.png": lambda path, image, n: png_with(path, image, chunk(b"eXIf", orientation(n)[6:]), True),
}
EIGHT = {  # EXIF's numbers, and others, which say nothing
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a), 0: lambda a: a, 9: lambda a: a,
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_pictures_come_upright_wherever_their_orientation_stands(tmp_path, name):
    stored = moving_clip(1)[0]
    for number in EIGHT if name != "xmp.jpg" else range(1, 9):
        TURNED[name](tmp_path / name, Image.fromarray(stored), number)
        expected = EIGHT[number](stored).astype(int)
        with VideoReader(tmp_path / name) as reader:
            assert (reader.height, reader.width) == expected.shape[:2]
            assert np.abs(next(iter(reader)).rgb - expected).mean() < 4


def test_broken_exif_turns_nothing(tmp_path):
    image = moving_clip(1)[0]
    for n, broken in enumerate((b"II*\0\xff\xff\xff\xff", b"nonsense", orientation(6)[6:20], b"")):
        png_with(tmp_path / f"{n}.png", Image.fromarray(image), chunk(b"eXIf", broken))
        assert np.array_equal(read_clip(tmp_path / f"{n}.png")[0], image)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "many"])
def test_long_text_is_no_damage(tmp_path, kind):
    image, body = moving_clip(1)[0], zlib.compress(b" " * 2_000_000)
    text = {"zTXt": b"workflow\0\0", "iTXt": b"workflow\0\1\0\0\0", "many": b"workflow\0\0"}[kind] + body
    png_with(
        tmp_path / "a.png",
        Image.fromarray(image),
        chunk(kind.replace("many", "zTXt").encode(), text) * (1 + 40 * (kind == "many")),
    )
    assert np.array_equal(read_clip(tmp_path / "a.png")[0], image)


ANIMATIONS = {
    ".webp": {"lossless": True}, ".png": {}, ".gif": {},
    **({".avif": {"quality": 95}} if ".avif" in Image.registered_extensions() else {}),
}  # fmt: skip


@pytest.mark.parametrize("durations", [[100] * 5, [40, 200, 80, 40, 120]])
@pytest.mark.parametrize("suffix", ANIMATIONS)
def test_an_animation_is_a_clip_with_its_own_times(tmp_path, suffix, durations):
    frames = [Image.fromarray(rgb) for rgb in moving_clip(5)]
    source = tmp_path / f"a{suffix}"
    options = {"save_all": True, "append_images": frames[1:], "duration": durations} | ANIMATIONS[suffix]
    frames[0].save(source, **options)
    expected = [Fraction(sum(durations[:n]), 1000) for n in range(5)]
    assert times_of(source) == expected
    assert infer.default_output(source) == tmp_path / "a_x4.mp4"
    assert x2(source, tmp_path / "out.mp4") == []
    assert times_of(tmp_path / "out.mp4") == expected
    if suffix in (".webp", ".png"):
        assert np.array_equal(read_clip(source), moving_clip(5))
    frames[0].save(source, **ANIMATIONS[suffix])
    assert infer.default_output(source) == tmp_path / "a_x4.png"


def test_heic_without_its_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(50))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("ID", "OPEN"):  # what another test may have registered
        kept = [k for k in getattr(Image, name) if k != "HEIF"]
        monkeypatch.setattr(Image, name, kept if name == "ID" else {k: Image.OPEN[k] for k in kept})
    with pytest.raises(VideoError, match=r"^a\.heic: a HEIC image, which needs: pip install pillow-heif$"):
        VideoReader(tmp_path / "a.heic")


@pytest.mark.parametrize("suffix", [".avif", ".heic", ".tiff", ".gif"])
def test_images_of_every_format_are_read_whole(tmp_path, suffix):
    image = np.kron(
        np.random.default_rng(0).integers(40, 215, (9, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8)
    )
    if suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {suffix}")
    Image.fromarray(image).save(tmp_path / f"a{suffix}")
    file = tmp_path / f"a{suffix}"
    if suffix == ".heic":  # as phones export them
        file = file.rename(tmp_path / "photo.jpg")
    assert np.abs(read_clip(file)[0].astype(int) - image).mean() < 12


def test_more_pixels_than_the_limit_is_one_line_with_the_size(tmp_path, monkeypatch):
    Image.new("L", (300, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(stills, "PIXELS", 50_000)
    with pytest.raises(VideoError, match=r"^a\.png: 300x200 is more than .* stills\.PIXELS\.$"):
        VideoReader(tmp_path / "a.png")


def swapped_profile() -> bytes:
    """A profile of RGB in which red and green have changed places: nobody can miss it."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {}
    for k in range(struct.unpack(">I", icc[128:132])[0]):
        places[bytes(icc[132 + 12 * k : 136 + 12 * k])] = struct.unpack(
            ">I", icc[136 + 12 * k : 140 + 12 * k]
        )[0]
    red, green = (slice(places[tag], places[tag] + 20) for tag in (b"rXYZ", b"gXYZ"))
    icc[red], icc[green] = icc[green], icc[red]
    return bytes(icc)


def test_a_colour_profile_stays_with_png_and_is_applied_for_video(tmp_path):
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "a.png", icc_profile=swapped_profile())
    (tmp_path / "frames").mkdir()
    os.link(tmp_path / "a.png", tmp_path / "frames" / "0.png")
    for source, target in (("a.png", "out.png"), ("frames", "out")):
        x2(tmp_path / source, tmp_path / target)
        file = tmp_path / target if target.endswith("g") else tmp_path / target / "000000.png"
        with Image.open(file) as image:
            assert image.info["icc_profile"] == swapped_profile() and image.getpixel((0, 0)) == (200, 40, 40)
    x2(tmp_path / "frames", tmp_path / "out.mp4")
    assert np.abs(read_clip(tmp_path / "out.mp4")[0, 8, 8].astype(int) - (40, 200, 40)).max() < 8


@pytest.mark.parametrize("mode", ["CMYK", "P", "PA", "I;16", "LA", "1"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    image = Image.new("RGB", (16, 12), (255, 255, 255))
    suffix = ".jpg" if mode == "CMYK" else ".png"
    if mode == "PA":
        image.convert("P").save(tmp_path / "a.png", transparency=0)
    elif mode == "I;16":
        Image.fromarray(np.full((12, 16), 65535, np.uint16)).save(tmp_path / "a.png")
    else:
        image.convert(mode).save(tmp_path / f"a{suffix}")
    assert read_clip(tmp_path / f"a{suffix}").min() >= 254


# --- what belongs to the film -------------------------------------------------------------------------

SUBTITLES = "1\n00:00:00,400 --> 00:00:00,800\nhello\n\n2\n00:00:01,400 --> 00:00:01,800\nworld\n"


def film(path: Path) -> Path:
    """A film with two languages, a title, tags, chapters, flags; mkv: and a font, a cover, subtitles."""
    with av.open(str(path), "w") as container:
        container.metadata.update(title="Café", comment="seen twice")
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sounds = []
        for language, flags in (("eng", Disposition.default), ("deu", Disposition.comment)):
            sounds.append(container.add_stream("aac", rate=48000, layout="mono"))
            sounds[-1].metadata.update(language=language, title=f"Sound {language}")
            sounds[-1].disposition = flags.value
        names = ("One", "Two")
        chapters = [
            {
                "id": n,
                "start": n * 1000,
                "end": n * 1000 + 1000,
                "time_base": Fraction(1, 1000),
                "metadata": {"title": name},
            }
            for n, name in enumerate(names)
        ]
        container.set_chapters(chapters)
        subtitles = None
        if path.suffix == ".mkv":
            cover = io.BytesIO()
            Image.new("RGB", (16, 16), (9, 99, 199)).save(cover, "JPEG")
            container.add_attachment("cover.jpg", "image/jpeg", cover.getvalue())
            container.add_attachment("font.ttf", "application/x-truetype-font", b"a font")
            srt = path.with_suffix(".srt")
            srt.write_text(SUBTITLES)
            with av.open(str(srt)) as source:
                subtitles = container.add_stream_from_template(source.streams.subtitles[0])
                subtitles.metadata["language"] = "fra"
                subtitles.disposition = (Disposition.forced | Disposition.hearing_impaired).value
                lines = [packet for packet in source.demux() if packet.dts is not None]
        images = [av.VideoFrame.from_ndarray(rgb) for rgb in moving_clip(50)]
        for k, image in enumerate(images):
            image.pts, image.time_base = k, Fraction(1, 25)
        packets = [packet for image in (*images, None) for packet in video.encode(image)]
        for sound in sounds:
            for k in range(0, 96000, 1024):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, k, Fraction(1, 48000)
                packets += sound.encode(frame)
            packets += sound.encode(None)
        for packet in lines if subtitles else ():
            packet.stream = subtitles
            packets.append(packet)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return path


def belongings(path: Path) -> dict:
    """What a player shows of a film beside its pictures and sound."""
    with av.open(str(path)) as container:
        subtitles = container.streams.subtitles[:1]
        tracks = [*container.streams.audio, *subtitles]
        covers = [s for s in container.streams.video if s.disposition & Disposition.attached_pic]
        shown = [packet for stream in subtitles for packet in container.demux(stream) if packet.size]
        return {
            "tags": {
                k.lower(): v for k, v in container.metadata.items() if k.lower() in ("title", "comment")
            },
            "chapters": [
                (float(c["start"] * c["time_base"]), c["metadata"]["title"]) for c in container.chapters()
            ],
            "languages": [s.metadata.get("language") for s in tracks],
            "titles": [s.metadata.get("title", s.metadata.get("name")) for s in tracks],
            "flags": [s.disposition for s in tracks],
            "covers": [s.codec_context.name for s in covers],
            "fonts": [(f.name, f.data) for f in container.streams.attachments],
            "lines": [round(float(p.pts * p.time_base), 2) for p in shown],
        }


@pytest.mark.parametrize("names", ["a.mkv b.mkv", "a.mp4 b.mp4", "a.mp4 b.mkv"])
def test_what_belongs_to_a_film_goes_along(tmp_path, names):
    source, target = (tmp_path / name for name in names.split())
    assert x2(film(source), target) == []
    assert belongings(source) == belongings(target)
    assert belongings(source)["tags"] == {"title": "Café", "comment": "seen twice"}


def test_what_a_container_cannot_hold_is_one_note(tmp_path):
    (note,) = x2(film(tmp_path / "a.mkv"), tmp_path / "b.mp4")
    assert "font.ttf" in note and "subtitle" in note and ".mkv output holds more kinds" in note
    there, here = belongings(tmp_path / "a.mkv"), belongings(tmp_path / "b.mp4")
    assert here["covers"] == there["covers"] and here["tags"] == there["tags"]
    x2(tmp_path / "b.mp4", tmp_path / "c.mkv")  # and the cover back again
    assert belongings(tmp_path / "c.mkv")["covers"] == there["covers"]


def test_a_part_of_a_film_takes_its_part_of_chapters_and_subtitles(tmp_path):
    x2(film(tmp_path / "a.mkv"), tmp_path / "b.mkv", start=Fraction(6, 5), frames=20)
    part = belongings(tmp_path / "b.mkv")
    assert part["chapters"] == [(0.0, "Two")]
    assert part["lines"] == pytest.approx([0.2], abs=0.002)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_part_behind_the_last_sound_comes_without_it(tmp_path, suffix):
    """MP4 leaves out a track without packets: the result has fewer streams than were asked for."""
    source = with_sound(tmp_path / "a.mp4", moving_clip(50), seconds=0.5)
    assert x2(source, tmp_path / f"b{suffix}", start=Fraction(1)) == []
    assert len(read_clip(tmp_path / f"b{suffix}")) == 25


# --- folders and names --------------------------------------------------------------------------------


def test_files_of_file_managers_are_no_data(tmp_path):
    frames = tmp_path / "frames"
    with VideoWriter(frames, 64, 48, Fraction(25)) as writer:
        for rgb in moving_clip(4):
            writer.write(rgb)
    raw_video(tmp_path / "a.mp4", moving_clip(3))
    for name in (".DS_Store", "._000001.png", "Thumbs.db", "desktop.ini", ".hidden.png", "._a.mp4"):
        (frames / name).write_bytes(b"\0\5\x16\7")
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert len(read_clip(frames)) == 4
    assert infer.clips_in(tmp_path) == [tmp_path / "a.mp4"]
    assert [p.name for p in list_files(tmp_path, VIDEO_SUFFIXES)] == ["a.mp4"]
    assert sorted(p.name for p in list_files(tmp_path, IMAGE_SUFFIXES)) == [f"{n:06d}.png" for n in range(4)]
    assert set(find_clips(tmp_path, ())) == {"a", "frames"}
    before = infer.fingerprint(tmp_path)
    (tmp_path / ".DS_Store").unlink()
    assert infer.fingerprint(tmp_path) == before
    x2(tmp_path / "a.mp4", frames)  # replaces the folder: nothing in it is anybody's
    assert len(read_clip(frames)) == 3


def test_a_hidden_file_in_a_finished_segment_is_no_frame(tmp_path):
    source, out = raw_video(tmp_path / "a.mp4", moving_clip(6)), tmp_path / "out"
    join = segments._join_folders

    def looked_at(segments, path):
        for segment in segments:
            (segment / ".DS_Store").touch()
            (segment / "Thumbs.db").touch()
        (segments[0].parent / "._00000000").mkdir()
        join(segments, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_join_folders", looked_at)
        x2(source, out, segment=2)
    assert sorted(p.name for p in out.iterdir()) == [f"{n:06d}.png" for n in range(6)]


@pytest.mark.parametrize("name", ["My.Movie.1080p", "v1.0", "take.2 (final).", "a.mp4.frames"])
def test_a_folder_with_dots_is_a_folder(tmp_path, name):
    with VideoWriter(tmp_path / name, 64, 48, Fraction(25)) as writer:
        for rgb in moving_clip(3):
            writer.write(rgb)
    out = infer.default_output(tmp_path / name)
    assert out.name == f"{name}_x4" and infer.suffixed(out, "_compare").name == f"{name}_x4_compare"
    x2(tmp_path / name, out, segment=2)
    assert len(read_clip(out)) == 3


def test_symbolic_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "real").mkdir()
    raw_video(tmp_path / "real" / "a.mp4", moving_clip(2))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "set")
    assert len(list_files(tmp_path / "set", VIDEO_SUFFIXES)) == 1
    (tmp_path / "b.mp4").symlink_to(tmp_path / "real" / "a.mp4")
    assert len(read_clip(tmp_path / "b.mp4")) == 2
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    x2(tmp_path / "b.mp4", tmp_path / "out")
    assert len(read_clip(tmp_path / "out")) == 2


def test_a_mixed_folder_says_which_files(tmp_path):
    for n in range(6):
        Image.new("RGB", (8 + (n > 1), 8)).save(tmp_path / f"{n}.png")
    with pytest.raises(
        VideoError, match=r"2\.png is 9x8, 3\.png is 9x8, 4\.png is 9x8 and 1 more, expected 8x8\."
    ):
        VideoReader(tmp_path)


NAMES = [
    "x" * 251 + ".mp4",
    "日" * 83 + ".mp4",
    "-dash.mp4",
    "q'u\"o te.mp4",
    "new\nline.mp4",
    "a:b%d?.mp4",
    "e\u0301.mp4",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_a_file_may_have(tmp_path, name):
    source = raw_video(tmp_path / "plain.mp4", moving_clip(3)).rename(tmp_path / name)
    out = infer.default_output(source)
    assert len(os.fsencode(out.name)) <= 255 and out.name.endswith("_x4.mp4")
    x2(source, out, segment=2)
    x2(source, tmp_path / f"{'y' * 251}.mp4", segment=2)
    assert len(read_clip(out)) == len(read_clip(tmp_path / f"{'y' * 251}.mp4")) == 3
    assert infer.clips_in(tmp_path)[0] in (source, tmp_path / f"{'y' * 251}.mp4")
    assert out not in infer.clips_in(tmp_path)


TALK = """
import sys, runtime
from runtime import UserError
def main():
    for _ in range(3):
        print("日本語 \\udce9", flush=True)
        print("日本語 \\udce9", file=sys.stderr)
    open("done", "w").close()
    raise UserError("a\\nname")
runtime.run(main)
"""


@pytest.mark.parametrize(
    "shell, encoding",
    [("", "ascii"), ("", "cp1252"), ("", "utf-8"), (">&-", "ascii"), ("2>&-", "cp1252")]
    + [(">&- 2>&- <&-", "ascii"), ("| true", "utf-8"), ("2>&1 | true", "ascii")]
    + [("2>&1 >/dev/null | true", "cp1252")],
)
def test_no_terminal_brings_a_traceback(tmp_path, shell, encoding):
    (tmp_path / "talk.py").write_text(TALK)
    environment = os.environ | {"PYTHONPATH": str(Path(infer.__file__).parent), "PYTHONIOENCODING": encoding}
    command = f"{sys.executable} talk.py {shell}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True)
    assert (tmp_path / "done").exists()
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    if not shell:
        assert done.returncode == 2 and done.stderr.endswith(b"error: a\\nname\n")


def test_the_second_of_two_runs_on_an_output_is_refused_and_the_first_undisturbed(tmp_path):
    source, out = raw_video(tmp_path / "a.mp4", moving_clip(5)), tmp_path / "b.mp4"
    hold = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire()"
    hold += "; print(flush=True); input()"
    (tmp_path / "b.mp4.parts").mkdir()
    lock = tmp_path / "b.mp4.parts" / ".lock"
    first = subprocess.Popen([sys.executable, "-c", hold, lock], stdin=-1, stdout=-1)
    first.stdout.readline()
    with pytest.raises(VideoError, match=r"^b\.mp4: another run is at work on it\. Wait for it, or"):
        x2(source, out)
    assert lock.exists() and not out.exists()
    first.kill()  # the lock dies with its process
    first.wait()
    x2(source, out)
    assert len(read_clip(out)) == 5 and sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    assert not FileLock(tmp_path / "other").is_locked
    assert all(b > a for a, b in pairwise(times_of(out)))
