"""What a user relies on when a clip goes in: a x4 clip out, whole, in time, resumable; errors in one line."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import infer
from video import VideoReader, VideoWriter, read_clip

ROOT = Path(infer.__file__).parent
EDGE = ROOT.parent / "shared" / "data" / "edge"
needs_edge = pytest.mark.skipif(not EDGE.is_dir(), reason="the sample data ../shared/data is not here")


def make_clip(
    path: Path, frames: int = 10, width: int = 40, height: int = 24, rate=Fraction(24000, 1001)
) -> Path:
    """A bright square that moves over a gradient."""
    gradient = np.linspace(40, 200, width)[None, :, None] * np.ones((height, 1, 3))
    with VideoWriter(path, width, height, rate) as out:
        for i in range(frames):
            frame = gradient.astype(np.uint8)
            frame[6:14, (2 * i) % (width - 8) :][:, :8] = (230, 180, 60)
            out.write(frame)
    return path


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / "infer.py"), *map(str, args)]


def run_here(monkeypatch, *args) -> None:
    """infer.py's main in this process."""
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, args)])
    infer.run(infer.main)


def refusal(monkeypatch, capfd, *args) -> str:
    """The one line that infer.py shows for bad input; checks that it is the only one, and the exit status."""
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *args)
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (
        out,
        err,
    )
    return err


def test_a_clip_comes_out_four_times_as_large_frame_for_frame(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4")
    done = subprocess.run(command(clip), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("demonstration") == 1 and "--adcsr" in done.stderr
    source, result = VideoReader(clip), VideoReader(tmp_path / "clip_x4.mp4")
    assert (result.width, result.height, result.rate) == (160, 96, Fraction(24000, 1001))
    assert [f.time for f in result] == [f.time for f in source]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip_x4.mp4"]  # nothing else is left


def test_the_result_looks_like_its_input(tmp_path, monkeypatch):
    """Shrunk again, the result is the input to within a few grey levels."""
    clip = make_clip(tmp_path / "clip.mp4")
    run_here(monkeypatch, clip)
    small = F.interpolate(
        infer.as_network(list(read_clip(tmp_path / "clip_x4.mp4"))), scale_factor=0.25, mode="area"
    )
    assert np.abs(infer.as_frames(small).astype(float) - read_clip(clip)).mean() < 8


def test_a_killed_run_resumes_to_the_same_frames(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", frames=230, width=16, height=16)
    straight, resumed = tmp_path / "straight.mp4", tmp_path / "resumed.mp4"
    subprocess.run(command(clip, "-o", straight), check=True, capture_output=True)

    victim = subprocess.Popen(
        command(clip, "-o", resumed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "resumed.mp4.parts"
    while not (parts / "000000.mp4").exists() and victim.poll() is None:
        time.sleep(0.02)
    assert victim.poll() is None, "it finished before it could be killed"
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not resumed.exists() and (parts / "000000.mp4").exists()
    first = (parts / "000000.mp4").stat().st_mtime_ns

    again = subprocess.Popen(
        command(clip, "-o", resumed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "1 done" in out and first < time.time_ns()
    assert not parts.exists()
    np.testing.assert_array_equal(read_clip(resumed), read_clip(straight))
    assert [f.time for f in VideoReader(resumed)] == [f.time for f in VideoReader(straight)]


def test_finished_segments_of_another_command_are_refused_and_fresh_is_the_way_out(
    tmp_path, monkeypatch, capfd
):
    clip = make_clip(tmp_path / "clip.mp4", frames=3)
    args = infer.parse([str(clip)])
    with VideoReader(clip) as reader:
        infer.open_parts(tmp_path / "clip_x4.mp4.parts", reader, args)
    line = refusal_after_plan(monkeypatch, capfd, clip, "--color", "adain")
    assert "color" in line and "--fresh" in line
    run_here(monkeypatch, clip, "--color", "adain", "--fresh")
    assert len(read_clip(tmp_path / "clip_x4.mp4")) == 3


def refusal_after_plan(monkeypatch, capfd, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *args)
    assert stop.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("size", [(1, 1), (17, 31)])
def test_frame_folders_of_any_size_become_png_folders(tmp_path, monkeypatch, size):
    height, width = size
    folder = tmp_path / "frames"
    with VideoWriter(folder, width, height, Fraction(25)) as out:
        for i in range(3):
            out.write(np.full((height, width, 3), 60 + 20 * i, np.uint8))
    run_here(monkeypatch, folder)
    assert read_clip(tmp_path / "frames_x4").shape == (3, 4 * height, 4 * width, 3)


def test_an_image_becomes_a_png(tmp_path, monkeypatch):
    image = tmp_path / "photo.png"
    with VideoWriter(image, 20, 12, Fraction(25)) as out:
        out.write(np.full((12, 20, 3), 90, np.uint8))
    run_here(monkeypatch, image)
    assert read_clip(tmp_path / "photo_x4.png").shape == (1, 48, 80, 3)


def test_start_and_duration_choose_frames_and_times_start_at_zero(tmp_path, monkeypatch):
    clip = make_clip(tmp_path / "clip.mp4", frames=20, rate=Fraction(10))
    run_here(monkeypatch, clip, "--start", 0.5, "--duration", 0.7)
    times = [frame.time for frame in VideoReader(tmp_path / "clip_x4.mp4")]
    assert times == [Fraction(i, 10) for i in range(7)]


def test_compare_and_profile_show_bicubic_beside_the_result(tmp_path, monkeypatch):
    clip = make_clip(tmp_path / "clip.mp4", frames=5)
    run_here(monkeypatch, clip, "--compare", "--profile")
    ours, both = read_clip(tmp_path / "clip_x4.mp4"), read_clip(tmp_path / "clip_x4_compare.mp4")
    assert both.shape == (5, 96, 320, 3)
    assert np.abs(both[:, :, 160:].astype(int) - ours).mean() < 2  # the same frames, encoded apart
    assert read_clip(tmp_path / "clip_x4_profile.png").shape == (1, 10, 160, 3)


def test_the_protocol_takes_25_frames_and_the_centre(tmp_path, monkeypatch):
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


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capfd):
    clip = make_clip(tmp_path / "clip.mp4", frames=3)
    run_here(monkeypatch, clip, "--dry-run")
    out = capfd.readouterr().out
    assert "3 frames" in out and "1 segments" in out and "queues" in out
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_several_clips_go_to_a_folder_and_one_bad_clip_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    clips = tmp_path / "clips"
    clips.mkdir()
    make_clip(clips / "a.mp4", frames=2)
    (clips / "b.mp4").write_bytes(b"not a video")
    make_clip(clips / "c.mp4", frames=2)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, clips, "-o", tmp_path / "out")
    assert stop.value.code == 2 and "b.mp4" in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_x4.mp4", "c_x4.mp4"]


def test_bad_input_is_one_line(tmp_path, monkeypatch, capfd):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    empty, folder, images = tmp_path / "empty.mp4", tmp_path / "folder", tmp_path / "images"
    empty.touch()
    folder.mkdir()
    images.mkdir()
    (images / "0.png").write_bytes(b"\x89PNG broken")
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    cases = {
        (tmp_path / "nothing.mp4",): "no such file",
        (empty,): "empty",
        (text,): "not a video",
        (folder,): "no frames",
        (images,): "0.png",
        (clip, "--weights", tmp_path / "folder"): "cannot load",
        (clip, "--adcsr", text, text): "not a PyTorch checkpoint",
        (clip, "-o", tmp_path / "no" / "where.mp4"): "no folder",
        (clip, "-o", tmp_path / "out.gif"): "cannot write .gif",
        (clip, "-o", clip): "replace the input",
        (clip, "--device", "cuda:99"): "not available",
    }
    for args, expected in cases.items():
        assert expected in refusal(monkeypatch, capfd, *args), args
    assert not list(tmp_path.glob("*_x4*"))


@needs_edge
@pytest.mark.parametrize("name", ["audio_only.mp4", "not_a_video.mp4"])
def test_files_without_pictures_are_one_line(tmp_path, monkeypatch, capfd, name):
    assert name in refusal(monkeypatch, capfd, EDGE / name, "-o", tmp_path / "out.mp4")


def test_a_truncated_clip_gives_what_decodes_and_a_warning(tmp_path, monkeypatch, capfd):
    whole = make_clip(tmp_path / "whole.mkv", frames=60)
    part = tmp_path / "part.mkv"
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    run_here(monkeypatch, part)
    assert "truncated" in capfd.readouterr().err
    assert 0 < len(read_clip(tmp_path / "part_x4.mkv")) < 60


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
        before = torch.arange(lr.shape[1], dtype=torch.float32)[None, :, None, None]
        return torch.stack(
            [lr[:, :, 0], before.expand_as(lr[:, :, 0]), before.flip(1).expand_as(lr[:, :, 0])], 2
        )

    for frames in (1, 8, 24, 25, 26, 42, 60):
        clip = torch.arange(frames, dtype=torch.float32)[None, :, None, None, None].expand(1, -1, 3, 2, 2)
        result = torch.cat(list(infer.in_windows(where, iter(clip.split(17, dim=1)), 25)), dim=1)
        assert result[0, :, 0, 0, 0].tolist() == list(range(frames))
        for i, (before, after) in enumerate(result[0, :, 1:, 0, 0].tolist()):
            assert before >= infer.CONTEXT or before == i
            assert after >= infer.CONTEXT or after == frames - 1 - i


def test_out_of_memory_halves_the_chunk_and_drops_no_frame(monkeypatch):
    from model import PRESETS, AdcVSR

    net = AdcVSR(**PRESETS["tiny"]).eval()
    lr = torch.rand(1, 13, 3, 16, 16) * 2 - 1
    encode = AdcVSR.encode

    def small_gpu(self, chunk, memory):
        if chunk.shape[1] > 2:
            raise torch.OutOfMemoryError
        return encode(self, chunk, memory)

    expected = torch.cat(list(net.stream(lr.split(5, dim=1))), dim=1)
    monkeypatch.setattr(AdcVSR, "encode", small_gpu)
    result = torch.cat(list(net.stream(lr.split(5, dim=1))), dim=1)
    assert result.shape[1] == 13
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
