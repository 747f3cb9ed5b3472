"""What a user relies on when a clip goes in: a x4 clip out, whole, in time, resumable; errors in one line."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_video import EDGE, NTSC, moving_clip, needs_edge, packets, raw_video, times_of, with_sound

import infer
from compact import CompactVSR
from data import generator
from dead_leaves import procedural_clip
from jobs import jobs_for, missing_segments
from memory import peak_gb
from model import PRESETS, AdcVSR
from segments import SEGMENT
from video import VideoReader, VideoWriter, read_clip, to_clip, to_frames, to_network

ROOT = Path(infer.__file__).parent
NARROW = {"unet_channels": [16] * 4, "heads": [1] * 4, "decoder_channels": [8] * 4}


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A student of tiny's topology, narrow enough for many runs, that looks at other frames."""
    torch.manual_seed(0)
    net = AdcVSR(**PRESETS["tiny"] | NARROW)
    for parameter in net.parameters():
        if not parameter.any():  # what starts at zero: time and the tail
            torch.nn.init.normal_(parameter, std=0.02)
    net.save_pretrained(tmp_path_factory.mktemp("weights"))
    return tmp_path_factory.getbasetemp() / "weights0"


@pytest.fixture
def run_here(monkeypatch, weights):
    """infer.py's main in this process, with the narrow student unless told otherwise."""

    def run(*args) -> None:
        monkeypatch.setattr(sys, "argv", ["infer.py", "--weights", str(weights), *map(str, args)])
        infer.run(infer.main)

    return run


@pytest.fixture
def refusal(run_here, capfd):
    """The line that infer.py shows for bad input: exit status 2, nothing else on stderr, and before the plan
    nothing at all."""

    def refusal(*args, planned: bool = False) -> str:
        with pytest.raises(SystemExit) as stop:
            run_here(*args)
        out, err = capfd.readouterr()
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert ("plan: " in out) == planned
        return err

    return refusal


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / "infer.py"), *map(str, args)]


def make_clip(path: Path, frames: int = 10, width: int = 40, height: int = 24, rate=NTSC) -> Path:
    """A bright square that moves over a gradient."""
    gradient = np.linspace(40, 200, width)[None, :, None] * np.ones((height, 1, 3))
    with VideoWriter(path, width, height, rate) as out:
        for i in range(frames):
            frame = gradient.astype(np.uint8)
            frame[6:14, (2 * i) % (width - 8) :][:, :8] = (230, 180, 60)
            out.write(frame)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- clips, folders, images ----------------------------------------------------------------------------


def test_a_clip_comes_out_four_times_as_large_frame_for_frame_and_looks_like_itself(tmp_path):
    """With the shipped weights; shrunk again, the result is the input to within a few grey levels."""
    clip = make_clip(tmp_path / "clip.mp4")
    done = subprocess.run(command(clip), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: weights/compact") == 1 and "--adcsr" in done.stderr
    assert names(tmp_path) == ["clip.mp4", "clip_x4.mp4"]  # nothing else is left
    with VideoReader(tmp_path / "clip_x4.mp4") as result:
        assert (result.width, result.height, result.rate) == (160, 96, NTSC)
    assert times_of(tmp_path / "clip_x4.mp4") == times_of(clip)
    frames = to_network(to_clip(read_clip(tmp_path / "clip_x4.mp4")))
    small = to_frames(F.interpolate(frames, scale_factor=0.25, mode="area"))
    assert np.abs(small.astype(float) - read_clip(clip)).mean() < 8


SHORT = moving_clip(6, 16, 24)
STRIDE = [0, 33, 81, 90, 210, 260]  # milliseconds
GENERATED = {  # file: (what makes it, part of the note about it)
    "variable.mkv": (lambda p: raw_video(p, SHORT, 30, STRIDE, Fraction(1, 1000)), None),
    "ntsc.mp4": (lambda p: raw_video(p, SHORT, NTSC), None),
    "rotated.mov": (lambda p: raw_video(p, SHORT, rotation=90), "rotated upright by 90 degrees"),
    "wide.mp4": (lambda p: raw_video(p, SHORT, tags={"sample_aspect_ratio": Fraction(4, 3)}), None),
    "odd.mkv": (lambda p: raw_video(p, SHORT[:, :15, :23], codec="ffv1", pix_fmt="bgr0"), None),
    "one_frame.mp4": (lambda p: raw_video(p, SHORT[:1]), None),
    "sound.mp4": (lambda p: with_sound(p, SHORT, seconds=0.24), None),
    "old.avi": (lambda p: raw_video(p, SHORT, codec="mpeg4"), None),
    "interlaced.mp4": (
        lambda p: raw_video(p, SHORT.repeat(2, 1).repeat(2, 2), options={"x264-params": "tff=1"}),
        "interlaced source; deinterlace first",
    ),
}


@pytest.mark.parametrize("name", GENERATED)
def test_every_kind_of_clip_keeps_its_times_its_shape_and_its_sound(tmp_path, run_here, capfd, name):
    make, note = GENERATED[name]
    run_here(make(tmp_path / name), "-o", tmp_path / "out.mp4")
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(note) and all(note in line for line in notes)
    assert times_of(tmp_path / "out.mp4") == times_of(tmp_path / name) != []
    with VideoReader(tmp_path / name) as source, VideoReader(tmp_path / "out.mp4") as result:
        assert (result.width, result.height) == (4 * source.width, 4 * source.height)
        assert result.aspect == source.aspect
        assert result.rate == source.rate or not source.constant_rate
    sound = packets(tmp_path / "out.mp4", "audio")
    assert sound == packets(tmp_path / name, "audio") and bool(sound) == (name == "sound.mp4")


EDGE_FILES = {  # flags that choose a few frames, their number, part of the note
    "alpha_vp9.webm": (["--duration", 0.1], 3, "alpha channel dropped"),
    "corrupt_stream.mp4": (["--start", 4.7], 3, "damaged or truncated"),
    "h264_10bit.mp4": (["--duration", 0.1], 3, None),
    "hlg_10bit_9frames_audio.mp4": (["--duration", 0.05], 2, "HLG/BT.2020 source"),
    "midstream_resize.mp4": (["--start", 1.9], 3, "frame size changes"),
    "mkv_audio_subs.mkv": (["--duration", 0.05], 2, None),
    "one_frame_2x2.mp4": ([], 1, None),
    "rot90_3frames.mov": ([], 3, "rotated upright by 90 degrees"),
    "slowmotion_vfr.mp4": (["--duration", 0.05], 1, None),
    "truncated_half.mp4": (["--start", 2.34], 1, "damaged or truncated"),
    "vp9_odd_161x121.webm": (["--duration", 0.1], 3, None),
}


@needs_edge
@pytest.mark.parametrize("name", EDGE_FILES)
def test_awkward_files_come_out_with_their_notes(tmp_path, run_here, capfd, name):
    """Their centres, by the protocol: large pictures take long to encode."""
    flags, frames, note = EDGE_FILES[name]
    run_here(EDGE / name, "-o", tmp_path / "out.mkv", "--protocol", "adcvsr", *flags)
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(note) and all(note in line for line in notes)
    with VideoReader(EDGE / name) as source, VideoReader(tmp_path / "out.mkv") as result:
        assert (result.width, result.height) == (4 * min(128, source.width), 4 * min(128, source.height))
        assert len(list(result)) == frames


@pytest.mark.parametrize("size", [(1, 1), (17, 31)])
def test_frame_folders_and_images_of_any_size_become_pngs(tmp_path, run_here, size):
    height, width = size
    folder = tmp_path / "frames"
    with VideoWriter(folder, width, height, Fraction(25)) as out:
        for i in range(3):
            out.write(np.full((height, width, 3), 60 + 20 * i, np.uint8))
    run_here(folder)
    run_here(folder / "000001.png", "-o", tmp_path / "one.PNG")
    assert read_clip(tmp_path / "frames_x4").shape == (3, 4 * height, 4 * width, 3)
    assert read_clip(tmp_path / "one.PNG").shape == (1, 4 * height, 4 * width, 3)


def test_a_truncated_clip_gives_what_decodes_and_a_warning(tmp_path, run_here, capfd):
    whole = make_clip(tmp_path / "whole.mkv", frames=60)
    part = tmp_path / "part.mkv"
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    run_here(part)
    assert "note: damaged or truncated" in capfd.readouterr().err
    assert 0 < len(read_clip(tmp_path / "part_x4.mkv")) < 60


def test_several_clips_go_to_a_folder_and_one_bad_clip_does_not_stop_the_others(tmp_path, run_here, capfd):
    clips = tmp_path / "clips"
    clips.mkdir()
    make_clip(clips / "a.mp4", frames=2)
    (clips / "b.mp4").write_bytes(b"not a video")
    make_clip(clips / "c.mp4", frames=2)
    with pytest.raises(SystemExit) as stop:
        run_here(clips, "-o", tmp_path / "out")
    assert stop.value.code == 2 and "b.mp4" in capfd.readouterr().err
    assert names(tmp_path / "out") == ["a_x4.mp4", "c_x4.mp4"]


def test_a_folder_of_clips_beside_its_results_gives_the_same_results_again(tmp_path, run_here):
    make_clip(tmp_path / "a.mp4", frames=2)
    make_clip(tmp_path / "b.mp4", frames=2)
    (tmp_path / ".partial-0123abcd.mp4").touch()  # what a kill leaves
    for _ in range(2):
        run_here(tmp_path, "--compare")
        results = [f"{name}_x4{more}.mp4" for name in "ab" for more in ("", "_compare")]
        assert names(tmp_path) == sorted([".partial-0123abcd.mp4", "a.mp4", "b.mp4", *results])


def test_two_inputs_never_share_a_result(tmp_path, run_here, capfd):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        make_clip(tmp_path / folder / "clip.mp4", frames=2)
    with pytest.raises(SystemExit):
        run_here(tmp_path / "a" / "clip.mp4", tmp_path / "b" / "clip.mp4", "-o", tmp_path / "out")
    assert "clip_x4.mp4 is another input's result" in capfd.readouterr().err
    assert names(tmp_path / "out") == ["clip_x4.mp4"]


# --- flags ---------------------------------------------------------------------------------------------


def test_start_and_duration_choose_frames_and_times_start_at_zero(tmp_path, run_here):
    clip = make_clip(tmp_path / "clip.mp4", frames=20, rate=Fraction(10))
    run_here(clip, "--start", 0.5, "--duration", 0.7)
    assert times_of(tmp_path / "clip_x4.mp4") == [Fraction(i, 10) for i in range(7)]


def test_compare_shows_bicubic_beside_the_result(tmp_path, run_here):
    clip = make_clip(tmp_path / "clip.mp4", frames=5)
    run_here(clip, "--compare")
    ours, both = read_clip(tmp_path / "clip_x4.mp4"), read_clip(tmp_path / "clip_x4_compare.mp4")
    assert both.shape == (5, 96, 320, 3)
    assert np.abs(both[:, :, 160:].astype(int) - ours).mean() < 2  # the same frames, encoded apart


def test_the_protocol_takes_25_frames_and_the_centre(tmp_path):
    clip = make_clip(tmp_path / "clip.mkv", frames=27, width=140, height=132)
    args = infer.parse([str(clip), "--protocol", "adcvsr"])
    with VideoReader(clip) as reader:
        frames = list(infer.wanted_frames(reader, args))
    assert len(frames) == 25
    np.testing.assert_array_equal(frames[0].rgb, read_clip(clip)[0][2:130, 6:134])


def test_lq_at_hr_size_is_cropped_then_reduced():
    rgb = np.random.default_rng(0).integers(0, 256, (600, 700, 3), np.uint8)
    assert infer.protocol_crop(rgb, 4).shape == (128, 128, 3)
    flat = infer.protocol_crop(np.full((512, 512, 3), 77, np.uint8), 4)
    assert (flat == 77).all()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, run_here, capfd):
    """Frames, segments, what is done already, memory, disk; the numbers are those of the network."""
    clip = make_clip(tmp_path / "clip.mp4", frames=230)
    (tmp_path / "clip_x4.mp4.parts").mkdir()
    (tmp_path / "clip_x4.mp4.parts" / "00000000.nut").touch()
    before = names(tmp_path)
    run_here(clip, "--dry-run", "--weights", infer.SHIPPED, "--dtype", "float32", "--chunk", 5)
    out = capfd.readouterr().out
    assert f"{clip} 40x24 23.976 fps 230 frames -> {tmp_path / 'clip_x4.mp4'} 160x96\n" in out
    assert "plan: 3 segments of 96 frames, 1 done; chunks of 5 on " in out
    peak = peak_gb(CompactVSR(), 24, 40, frames=5)
    assert "in float32; first result after 17 frames\ndisk: 0.00 GB" in out
    assert f"memory: {peak:.2f} GB at most" in out
    assert names(tmp_path) == before


def test_a_gpu_takes_as_many_frames_a_step_as_its_memory_holds():
    with torch.device("meta"):
        net = AdcVSR(**PRESETS["full"]).bfloat16()
    assert infer.chunk_that_fits(net, 270, 480, gb=24) == infer.CHUNK  # to 1080p
    assert infer.chunk_that_fits(net, 540, 960, gb=40) == 1  # to 4K
    assert infer.chunk_that_fits(net, 540, 960, gb=48) == infer.chunk_that_fits(net, 540, 960, gb=141) == 2
    assert peak_gb(net, 540, 960, frames=2) < 40  # whatever the card


def test_the_frames_a_step_follow_from_the_smallest_card_and_the_clips_size_alone(monkeypatch):
    sizes = iter((24e9, 0.04e9) * 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda card: SimpleNamespace(total_memory=next(sizes))
    )
    net = AdcVSR(**PRESETS["tiny"] | NARROW)
    args = partial(infer.Args, (Path("clip.mp4"),), dtype="float32")

    def chunk(size, **given):
        return infer.with_chunk(args(**given), size, lambda: net).chunk

    assert chunk((16, 16), device="cuda") == 8 and chunk((192, 128), device="cuda:1") == 1
    assert chunk((192, 128), device="cpu") == 8 and chunk((192, 128), device="cuda", chunk=5) == 5


def test_attention_in_windows_is_refused_where_there_is_no_attention(tmp_path, refusal):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    compact = ROOT / "weights" / "realesr-general-x4v3.pth"
    assert "has no attention over a frame" in refusal(clip, "--attention", "windows", "--weights", compact)


# --- interruptions -------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_frames(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", frames=230, width=16, height=16)
    straight, resumed = tmp_path / "straight.mp4", tmp_path / "resumed.mp4"
    subprocess.run(command(clip, "-o", straight), check=True, capture_output=True)

    victim = subprocess.Popen(
        command(clip, "-o", resumed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "resumed.mp4.parts"
    while not (parts / "00000000.nut").exists() and victim.poll() is None:
        time.sleep(0.02)
    assert victim.poll() is None, "it finished before it could be killed"
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not resumed.exists() and (parts / "00000000.nut").exists()
    again = subprocess.run(command(clip, "-o", resumed), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert re.search(r"3 segments of 96 frames, [12] done", again.stdout)
    assert not parts.exists()
    np.testing.assert_array_equal(read_clip(resumed), read_clip(straight))
    assert times_of(resumed) == times_of(straight)


@pytest.mark.parametrize("changed", ["color", "attention", "input", "weights"])
def test_segments_of_another_command_are_refused_and_fresh_is_the_way_out(
    tmp_path, run_here, refusal, weights, changed
):
    clip = make_clip(tmp_path / "clip.mp4", frames=3)
    args = infer.parse([str(clip), "--weights", str(weights if changed != "weights" else tmp_path)])
    args = replace(args, chunk=infer.CHUNK)
    with pytest.raises(KeyboardInterrupt), VideoReader(clip) as reader:
        (writer,) = infer.writers_for(tmp_path / "clip_x4.mp4", reader, args)
        with writer:
            for _ in range(SEGMENT):
                writer.write(np.zeros((96, 160, 3), np.uint8), writer.done / reader.rate)
            raise KeyboardInterrupt
    flags = {"color": ["--color", "adain"], "attention": ["--attention", "windows"]}.get(changed, [])
    if changed == "input":
        os.utime(clip, ns=(0, 0))
    line = refusal(clip, *flags, planned=True)
    assert f"was made with another {changed}. Use --fresh" in line
    run_here(clip, *flags, "--fresh")
    assert len(read_clip(tmp_path / "clip_x4.mp4")) == 3


# --- shots ---------------------------------------------------------------------------------------------


def write_frames(path: Path, frames: np.ndarray) -> Path:
    """A folder of PNGs: what comes out can be compared exactly."""
    with VideoWriter(path, frames.shape[2], frames.shape[1], Fraction(25)) as out:
        for frame in frames:
            out.write(frame)
    return path


def shots_of(*lengths: int) -> list[np.ndarray]:
    return [procedural_clip(generator(k), t, (16, 24)).frames for k, t in enumerate(lengths)]


@pytest.mark.parametrize("flags", [(), ("--window", 12), ("--chunk", 5, "--color", "wavelet")])
def test_a_clip_becomes_what_its_shots_become(tmp_path, run_here, flags):
    shots = shots_of(20, 1, 30)
    clip = write_frames(tmp_path / "clip", np.concatenate(shots))
    flags = *flags, "--dtype", "float32"
    run_here(clip, *flags)
    result = read_clip(tmp_path / "clip_x4").astype(int)
    for k, shot in enumerate(shots):
        run_here(write_frames(tmp_path / str(k), shot), *flags)
    apart = np.concatenate([read_clip(tmp_path / f"{k}_x4") for k in range(len(shots))])
    assert len(result) == 51 and np.abs(result - apart).max() <= 1  # chunks differ, so roundings do
    run_here(clip, "-o", tmp_path / "one", "--shots", "none", *flags)
    assert np.abs(result - read_clip(tmp_path / "one")).max() > 1


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("lengths", [(120,), (70, 9, 41)])
def test_what_goes_on_in_the_middle_gives_the_same_frames(tmp_path, weights, lengths, window):
    """From any frame on, bit for bit; the reading goes back no further than the reach or the shot's start."""
    net = AdcVSR.from_pretrained(weights).eval()
    clip = write_frames(tmp_path / "clip", np.concatenate(shots_of(*lengths)))
    args = infer.parse([str(clip), "--window", str(window)])
    reach, grid = (window - 1, window - 2 * infer.CONTEXT) if window else (net.lag, infer.CHUNK)

    def results(begin: int) -> list[np.ndarray]:
        with VideoReader(clip) as reader:
            first, frames = infer.frames_for(begin, reader, args, reach, grid)
            shot = max(start for start in np.cumsum([0, *lengths[:-1]]) if start <= begin)
            assert max(shot, begin - reach - grid + 1) <= first <= begin
            chunks = infer.in_chunks(frames, first, grid, torch.device("cpu"))
            pieces = infer.super_resolve(net, chunks, window)
            return [sr for piece in pieces for _, sr in piece][begin - first :]

    expected = results(0)
    assert len(expected) == 120 and results(120) == results(130) == []
    for begin in (70, 78, 85, 119):
        assert np.array_equal(results(begin), expected[begin:]), begin


@pytest.mark.parametrize("start", [0, Fraction(1, 5)])
def test_frames_that_are_passed_over_are_those_that_would_have_come(tmp_path, start):
    frames = shots_of(12)[0]
    clips = [write_frames(tmp_path / "folder", frames), raw_video(tmp_path / "clip.mp4", frames)]
    Image.fromarray(frames[0]).save(
        tmp_path / "moving.webp", append_images=map(Image.fromarray, frames[1:]), save_all=True, duration=40
    )
    for clip in (*clips, tmp_path / "moving.webp"):
        with VideoReader(clip, start) as reader:
            whole = list(reader)
            reader.first = 3
            rest = list(reader)
        assert [frame.time for frame in rest] == [frame.time for frame in whole[3:]] != []
        assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(rest, whole[3:]))


# --- several processes -----------------------------------------------------------------------------------


def torchrun(*args) -> list[str]:
    """infer.py by two processes of one thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launch, *command(*args)[1:]]


def test_clips_are_cut_into_as_few_parts_as_keep_all_processes_busy():
    def cut(missing: dict, processes: int) -> list[tuple]:
        return [
            (clip, begin / SEGMENT, end and end / SEGMENT)
            for clip, begin, end, _ in jobs_for(missing, processes)
        ]

    assert cut({0: [0, 1], 1: [0, 1, 2, 3, 4]}, 1) == [(0, 0, None), (1, 0, None)]
    assert cut({0: [0], 1: list(range(7))}, 4) == [
        (1, 0, 2),
        (1, 2, 4),
        (1, 4, 6),
        (1, 6, None),
        (0, 0, None),
    ]
    assert cut({n: [0] for n in range(9)}, 4) == [(n, 0, None) for n in range(9)]
    assert cut({0: [1, 2, 6, 9]}, 1) == [(0, 1, 3), (0, 6, 7), (0, 9, None)]  # some are there
    assert missing_segments(set(), 2 * SEGMENT + 1) == [0, 1, 2] and missing_segments(set(), 0) == [0]
    assert missing_segments({0, 2}, 3 * SEGMENT) == [1, 3]  # the clip may be longer than its header says
    assert missing_segments({0, 5}, SEGMENT) == [1, 2, 3, 4, 6]


# As torchrun gives each process: another count of threads adds up in another order.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def assert_same_pngs(one: Path, two: Path, frames: int) -> None:
    assert names(one) == names(two) and len(names(one)) == frames
    assert np.array_equal(read_clip(one), read_clip(two))


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path, weights):
    """A long clip in parts and a short one; a bad file stops neither."""
    long, short = (
        write_frames(tmp_path / n, *shots_of(t)) for n, t in (("long", 3 * SEGMENT + 10), ("short", 9))
    )
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    flags = "--weights", weights, "--dtype", "float32"
    for work, out in (torchrun, tmp_path / "two"), (command, tmp_path / "one"):
        line = work(long, tmp_path / "bad.mp4", short, "-o", out, *flags)
        done = subprocess.run(line, env=ONE_THREAD, capture_output=True, text=True)
        assert done.returncode and "error: 1 of 3 clips could not be upscaled" in done.stderr
        assert names(out) == ["long_x4", "short_x4"]
    for clip, frames in ("long_x4", 3 * SEGMENT + 10), ("short_x4", 9):
        assert_same_pngs(tmp_path / "one" / clip, tmp_path / "two" / clip, frames)


@pytest.mark.slow
def test_a_process_that_dies_costs_its_segments_and_the_same_command_goes_on(tmp_path, weights):
    clip = make_clip(tmp_path / "clip.mp4", frames=5 * SEGMENT, width=24, height=16)
    work = torchrun(clip, "-o", tmp_path / "out", "--weights", weights, "--dtype", "float32")
    launcher = subprocess.Popen(work, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.parts"
    while launcher.poll() is None and not (parts.is_dir() and any(p.is_dir() for p in parts.glob("0*"))):
        time.sleep(0.02)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert launcher.wait() != 0 and not (tmp_path / "out").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in parts.glob("0*")}
    assert kept
    again = subprocess.run(work, env=ONE_THREAD, capture_output=True, text=True)
    assert again.returncode == 0 and f"5 segments of 96 frames, {len(kept)} done" in again.stdout
    straight = tmp_path / "straight"
    subprocess.run(
        command(clip, "-o", straight, "--weights", weights, "--dtype", "float32"),
        env=ONE_THREAD,
        check=True,
        capture_output=True,
    )
    assert_same_pngs(straight, tmp_path / "out", 5 * SEGMENT)


# --- one line on failure -------------------------------------------------------------------------------


def test_bad_input_is_one_line(tmp_path, refusal, monkeypatch):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    empty, folder, images, mixed = (tmp_path / n for n in ("empty.mp4", "folder", "images", "mixed"))
    empty.touch()
    for new in (folder, images, mixed):
        new.mkdir()
    (images / "0.png").write_bytes(b"\x89PNG broken")
    for side in (8, 9):
        Image.new("RGB", (side, 8)).save(mixed / f"{side}.png")
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cases = {
        (tmp_path / "nothing.mp4",): "nothing.mp4: no such file",
        (empty,): "the file is empty",
        (text,): "not a video",
        (folder,): "no frames",
        (images,): "0.png: corrupt image",
        (mixed,): "mixed/: 9.png is 9x8, expected 8x8. Use one folder per clip.",
        (clip, "--weights", folder): "cannot load",
        (clip, "--weights", "nobody/nothing"): "nobody/nothing: cannot load a student",
        (clip, "--adcsr", text, text): "not a PyTorch checkpoint",
        ("--adcsr", clip): "a folder of clips, in front of --adcsr",
        (clip, "-o", tmp_path / "no" / "where.mp4"): "no folder",
        (clip, "-o", tmp_path / "out.gif"): "cannot write .gif",
        (clip, "-o", tmp_path / "out.png"): "out.png: a .png holds one frame",
        (clip, "-o", clip): "replace the input",
        (clip, clip, "-o", text): "not a folder",
        (clip, "--device", "cuda:99"): "not available",
    }
    for args, expected in cases.items():
        assert expected in refusal(*args), args
    assert not list(tmp_path.glob("*_x4*"))


@needs_edge
@pytest.mark.parametrize("name", ["audio_only.mp4", "not_a_video.mp4"])
def test_files_without_pictures_are_one_line(tmp_path, refusal, name):
    assert name in refusal(EDGE / name, "-o", tmp_path / "out.mp4")


def test_what_goes_wrong_on_the_way_is_one_line_and_leaves_no_result(tmp_path, refusal, monkeypatch, weights):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    assert "no frame from --start 5 on" in refusal(clip, "--start", 5, planned=True)
    with monkeypatch.context() as patch:
        patch.setitem(infer.BYTES, "video", 1e15)  # bytes a pixel
        assert re.search(
            r"clip_x4.mp4: needs about \d+.\d GB, \d+.\d GB are free", refusal(clip, planned=True)
        )
    broken = AdcVSR.from_pretrained(weights)
    torch.nn.init.constant_(broken.decoder.conv_out.weight, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    for dtype, way_out in (("float32", "Use other weights"), ("bfloat16", "Use --dtype float32 --fresh")):
        flags = "--fresh", "--weights", tmp_path / "broken", "--dtype", dtype
        line = refusal(clip, *flags, planned=True)
        assert f"output at 0.00 s is not finite in {dtype}. {way_out}" in line

    def full_gpu(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(AdcVSR, "encode", full_gpu)
    line = refusal(clip, "--fresh", planned=True)
    assert "out of GPU memory with a single frame. Free the GPU, or use --dtype" in line
    assert not (tmp_path / "clip_x4.mp4").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip(tmp_path):
    """The peak of a process that reads, upscales, writes and joins ten times as many frames. Memory that is
    kept wavers by a twelfth; frames of 192x256 held to the end would be a fifth more."""
    from bench import as_process, write_sample

    peaks = []
    for frames in (120, 1200):
        write_sample(clip := tmp_path / f"{frames}.mp4", frames, (48, 64))
        code = "import runpy; runpy.run_path('infer.py', run_name='__main__')"
        peaks.append(as_process(code, clip)[2])
    assert peaks[1] < 1.14 * peaks[0]


# --- colour, windows, memory ---------------------------------------------------------------------------


def test_the_paper_has_no_colour_step(tmp_path, run_here):
    """A student of the full topology gives its own colours, unless others are asked for."""
    torch.manual_seed(0)
    AdcVSR(**PRESETS["full"] | NARROW).save_pretrained(tmp_path / "full")
    clip = make_clip(tmp_path / "clip.mp4", frames=3)
    for name, flags in {"default": (), "none": ("--color", "none"), "adain": ("--color", "adain")}.items():
        run_here(clip, "-o", tmp_path / name, "--weights", tmp_path / "full", *flags)
    default, none, adain = (read_clip(tmp_path / name) for name in ("default", "none", "adain"))
    assert np.array_equal(default, none) and not np.array_equal(default, adain)


def test_adain_gives_the_inputs_statistics():
    sr, lr = torch.rand(2, 3, 32, 32) * 0.5, torch.rand(2, 3, 8, 8) * 2 - 1
    fixed = infer.adain(sr, lr)
    for f in (torch.mean, torch.std):
        torch.testing.assert_close(f(fixed, dim=(-2, -1)), f(lr, dim=(-2, -1)))


def test_wavelet_takes_the_low_frequencies_from_the_input_and_the_detail_from_the_network():
    stripes = torch.ones(1, 3, 128, 128)
    stripes[:, :, ::2] = -1
    fixed = infer.wavelet(0.3 + stripes, torch.zeros(1, 3, 32, 32))
    inside = (..., slice(32, -32), slice(32, -32))  # borders are replicated
    torch.testing.assert_close(fixed[inside], stripes[inside], atol=1e-3, rtol=0)


def test_in_windows_every_frame_comes_once_with_context_on_both_sides():
    """A stand-in network that says where in its window a frame is: (frame, frames before, frames after)."""

    def where(lr):
        before = torch.arange(lr.shape[1], dtype=torch.float32)[None, :, None, None].expand_as(lr[:, :, 0])
        return torch.stack([lr[:, :, 0], before, before.flip(1)], 2)

    for frames in (1, 8, 24, 25, 26, 42, 60):
        clip = torch.arange(frames, dtype=torch.float32)[None, :, None, None, None].expand(1, -1, 3, 2, 2)
        result = torch.cat(list(infer.in_windows(where, iter(clip.split(17, dim=1)), 25)), dim=1)
        assert result[0, :, 0, 0, 0].tolist() == list(range(frames))
        for i, (before, after) in enumerate(result[0, :, 1:, 0, 0].tolist()):
            assert before >= infer.CONTEXT or before == i
            assert after >= infer.CONTEXT or after == frames - 1 - i


# --- threads -------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_chunk_and_drops_no_frame(tmp_path, run_here, monkeypatch):
    clip, encode = make_clip(tmp_path / "clip.mp4", frames=13), AdcVSR.encode

    def small_gpu(self, chunk):
        if chunk.shape[1] > 2:
            raise torch.OutOfMemoryError
        return encode(self, chunk)

    run_here(clip, "-o", tmp_path / "expected", "--dtype", "float32", "--chunk", 5)
    monkeypatch.setattr(AdcVSR, "encode", small_gpu)
    run_here(clip, "-o", tmp_path / "halved", "--dtype", "float32", "--chunk", 5)
    difference = read_clip(tmp_path / "halved").astype(int) - read_clip(tmp_path / "expected")
    assert len(difference) == 13 and np.abs(difference).max() <= 1


def test_a_frame_that_cannot_be_read_on_the_way_is_one_line_and_no_result(tmp_path, refusal, run_here):
    with VideoWriter(tmp_path / "frames", 24, 16, Fraction(25)) as out:
        for frame in np.random.default_rng(0).integers(0, 256, (24, 16, 24, 3), np.uint8):
            out.write(frame)
    bad = tmp_path / "frames" / "000020.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])  # the header says its size
    before = threading.active_count()
    assert "frames/000020.png: corrupt image" in refusal(tmp_path / "frames", planned=True)
    assert names(tmp_path) == ["frames"]
    assert threading.active_count() == before
    bad.write_bytes(whole)
    run_here(tmp_path / "frames")
    assert len(read_clip(tmp_path / "frames_x4")) == 24


def test_ctrl_c_ends_all_threads_and_keeps_the_finished_segments(tmp_path):
    # Long enough to leave seconds between the first segment's end and the last one's.
    clip = make_clip(tmp_path / "clip.mp4", frames=400, width=48, height=32)
    parts = tmp_path / "clip_x4.mp4.parts"
    process = subprocess.Popen(
        command(clip),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Of a shell's background jobs, and so of these tests in one, the signal is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not (parts / "00000000.nut").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in err and "Traceback" not in err
    kept = names(parts)
    assert kept == [*(f"{n:08d}.nut" for n in range(0, 96 * (len(kept) - 1), 96)), "plan.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files to stand for a full disk")
@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_a_full_disk_is_one_line_and_leaves_nothing_but_the_clip(tmp_path, name):
    import resource

    clip = make_clip(tmp_path / "clip.mkv", frames=30)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))
    done = subprocess.run(
        command(clip, "-o", tmp_path / name), preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == ["clip.mkv"]
