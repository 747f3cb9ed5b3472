"""Metrics against closed forms and the packages' numbers; the command line as a user meets it."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import texture, translation
from PIL import Image

import metrics
from metrics import (
    PYIQA_EPS,
    best_shift,
    detail,
    find_clips,
    high_frequencies,
    load_dover,
    pair_clips,
    psnr,
    row_over_time,
    same_scene,
    score_clip,
    ssim,
)
from model import bicubic
from perceptual import DISTS
from runtime import Unavailable, UserError, needs
from video import to_clip, to_frames, to_network, to_uint8
from warping import dis_flow, warping_errors

ROOT = Path(metrics.__file__).parent


# ---- PSNR and SSIM


@pytest.mark.parametrize(("d", "expected"), [(1, 48.1308), (5, 34.1514), (10, 28.1308), (51, 13.9794)])
def test_psnr_of_a_constant_difference_is_its_closed_form(d, expected):
    gt = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(gt + d, gt).tolist() == pytest.approx([expected] * 2, abs=1e-4)
    assert psnr((gt + d) / 255, gt / 255).tolist() == pytest.approx([expected] * 2, abs=1e-4)


def test_psnr_of_equal_frames_is_infinite_and_80_in_pyiqas_form():
    gt = torch.rand(3, 8, 8)
    assert psnr(gt, gt) == math.inf
    assert psnr(gt, gt, eps=PYIQA_EPS).item() == pytest.approx(80)


@pytest.mark.parametrize(
    ("color", "db", "similarity"),
    [("rgb", 26.2766, 0.985338), ("yiq", 29.7854, 0.985550), ("ycbcr", 31.1073, 0.985686)],
)
def test_psnr_and_ssim_equal_pyiqas_numbers_in_each_colour(color, db, similarity):
    # pyiqa 0.1.16 on the same seeded frames
    rng = torch.Generator().manual_seed(0)
    gt = torch.rand(1, 3, 96, 96, generator=rng)
    pred = (gt + 0.05 * torch.randn(1, 3, 96, 96, generator=rng)).clamp(0, 1)
    assert psnr(pred, gt, color, eps=PYIQA_EPS).item() == pytest.approx(db, abs=1e-4)
    assert ssim(pred, gt, color).item() == pytest.approx(similarity, abs=1e-6)


@pytest.mark.parametrize(("a", "b", "expected"), [(100, 110, 0.995476), (0, 255, 9.999e-5)])
def test_ssim_of_constant_frames_is_its_closed_form(a, b, expected):
    flat = torch.ones(3, 16, 16, dtype=torch.uint8)
    assert ssim(flat * a, flat * b, color="rgb").item() == pytest.approx(expected, rel=1e-4)


def test_ssim_is_one_for_equal_frames_symmetric_and_blind_to_flips():
    a, b = texture(40, 50, 0), texture(40, 50, 1)
    assert ssim(a, a).item() == pytest.approx(1)
    assert ssim(a, b).item() == pytest.approx(ssim(b, a).item())
    assert ssim(a, b).item() == pytest.approx(ssim(a.flip(-1), b.flip(-1)).item())


@pytest.mark.parametrize("metric", [psnr, ssim, DISTS.seeded((4, "M", 4))])
def test_a_batch_of_clips_scores_each_frame_as_if_alone(metric):
    a, b = (
        torch.stack([texture(32, 32, s + k) for k in range(6)]).view(2, 3, 3, 32, 32).float() for s in (0, 10)
    )
    scores = metric(a, b)
    assert scores.shape == (2, 3)
    alone = torch.stack([metric(a[i, j], b[i, j]) for i in range(2) for j in range(3)]).view(2, 3)
    assert torch.allclose(scores, alone, atol=1e-6)


def test_frames_in_the_networks_range_are_refused_not_scored():
    with pytest.raises(ValueError, match=r"values from -1 to 1; give uint8, or float in \[0, 1\]"):
        psnr(torch.linspace(-1, 1, 192).view(3, 8, 8), torch.zeros(3, 8, 8))


# ---- detail


def waves(cycles: float, size: int = 64) -> torch.Tensor:
    """A clip of two frames (2 3 h w) whose rows swing by so many cycles a pixel."""
    row = 128 + 100 * torch.sin(2 * torch.pi * cycles * torch.arange(size))
    return row.round().to(torch.uint8).expand(2, 3, size, size)


def test_detail_is_what_swings_faster_than_lr_can_show():
    """LR's finest pattern has half a cycle a pixel, an eighth of a cycle in HR."""
    assert detail(waves(0.25), waves(0.0625)) > 1e4
    assert high_frequencies(torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)).abs().max() < 1e-9


def test_blur_takes_detail_away_and_brightness_leaves_it():
    noise = np.random.default_rng(0).integers(64, 128, (64, 64, 3), dtype=np.uint8)
    blurred, brighter = cv2.GaussianBlur(noise, (0, 0), 2), noise + 50
    sharp, soft, bright = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (noise, blurred, brighter))
    assert detail(soft, sharp) < 0.01 and detail(bright, sharp) == pytest.approx(1, abs=1e-6)


# ---- profile, pairing, streams


def test_a_row_over_time_shows_motion_as_a_slanted_streak():
    clip = torch.zeros(5, 3, 8, 8)
    for i in range(5):
        clip[i, :, 4, i] = 1
    assert torch.equal(row_over_time(clip)[0, :, :5], torch.eye(5))


def test_scores_do_not_depend_on_the_batches_and_hold_one_batch_at_a_time(monkeypatch):
    frames = [(255 * texture(32, 32, i)).byte().permute(1, 2, 0).numpy() for i in range(9)]
    gt = np.roll(frames, 1, axis=0)
    taken = []

    def stream():
        for i, (a, b) in enumerate(zip(frames, gt)):
            taken.append(i)
            yield {"prediction": a, "ground truth": b}

    scored = []

    def counted(pred, gt):
        scored.extend(range(len(pred)))
        assert len(taken) - len(scored) <= 1  # nothing is read ahead of its batch but the first frame
        return psnr(pred, gt)

    judges = {"psnr": counted, "ewarp": lambda clip: warping_errors(clip, dis_flow)}
    rows = []
    for batch in (9, 4, 1):
        monkeypatch.setattr(metrics, "BATCH_PIXELS", batch * 32 * 32)
        taken.clear(), scored.clear()
        rows.append(score_clip(stream, judges, "cpu"))
    assert rows[0]["frames"] == 9
    for row in rows[1:]:
        assert row == {**rows[0], **{k: pytest.approx(rows[0][k], rel=1e-6) for k in judges}}


def test_the_protocol_cuts_the_truth_at_four_times_the_inputs_offsets():
    sizes = {"input": (180, 318), "prediction": (512, 512), "ground truth": (720, 1272)}
    cut = same_scene(sizes, "adcvsr")
    assert (cut["input"][0].start, cut["input"][1].start) == (26, 95)
    assert (cut["ground truth"][0].start, cut["ground truth"][1].start) == (4 * 26, 4 * 95)
    odd = same_scene({"input": (135, 241), "prediction": (512, 512), "ground truth": (540, 964)}, "adcvsr")
    assert [s.start for s in odd["ground truth"]] == [4 * s.start for s in odd["input"]] == [12, 224]
    # stored at HR size: infer.py --downscale 4 cuts the centre of the input, to the pixel
    real = same_scene({"input": (514, 1026), "prediction": (512, 512), "ground truth": (514, 1026)}, "adcvsr")
    assert real["input"] == real["ground truth"] == (slice(1, 513), slice(257, 769))


def write_frames(folder: Path, clip: torch.Tensor) -> Path:
    """A clip (t 3 h w) in [0, 1] as a folder of PNGs."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(clip):
        Image.fromarray((255 * frame).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def write_video(path: Path, clip: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264rgb", rate=24, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[-2:], "rgb24"
        for frame in (255 * clip).round().byte().permute(0, 2, 3, 1).contiguous().numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    return path


def test_clips_pair_by_name_across_containers_and_in_doves_layout(tmp_path):
    clip = translation(2)[0]
    for name in ("000", "001"):
        write_video(tmp_path / f"pred/{name}_x4.mkv", clip)
        write_frames(tmp_path / f"UDM10/GT/{name}", clip)
        write_video(tmp_path / f"UDM10/LQ-Video/{name}.mkv", clip)
    pairs = pair_clips(
        {"input": tmp_path / "UDM10", "prediction": tmp_path / "pred", "ground truth": tmp_path / "UDM10"}
    )
    assert list(pairs) == ["000", "001"]
    assert pairs["001"] == {
        "input": tmp_path / "UDM10/LQ-Video/001.mkv",
        "prediction": tmp_path / "pred/001_x4.mkv",
        "ground truth": tmp_path / "UDM10/GT/001",
    }


def test_what_infer_puts_beside_its_results_is_no_prediction(tmp_path):
    clip = translation(2)[0]
    for name in ("a_x4", "a_x4_compare"):
        write_video(tmp_path / f"videos/{name}.mp4", clip)
        write_frames(tmp_path / f"frames/{name}", clip)
    write_frames(tmp_path / "videos/b_x4.mp4.parts", clip)
    assert find_clips(tmp_path / "videos", ()) == {"a": tmp_path / "videos/a_x4.mp4"}
    assert find_clips(tmp_path / "frames", ()) == {"a": tmp_path / "frames/a_x4"}
    named = tmp_path / "videos/a_x4_compare.mp4"  # by the user: his business
    assert list(find_clips(named, ()).values()) == [named]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu():
    (gt, flow), rng = translation(), torch.Generator().manual_seed(0)
    pred = (gt + 0.05 * torch.randn(gt.shape, generator=rng, dtype=gt.dtype)).clamp(0, 1)
    dists = DISTS.seeded()
    scores = {
        psnr: 1e-5,
        ssim: 1e-5,
        detail: 1e-5,
        lambda x, _: warping_errors(x, tuple(f.to(x.device) for f in flow)): 1e-5,
        lambda x, _: warping_errors(x, dis_flow): 1e-5,
        lambda x, y: dists.to(x.device)(x.float(), y.float()): 1e-2,  # its convolutions round to TF32
    }
    for score, rounding in scores.items():
        cpu, gpu = score(pred, gt), score(pred.cuda(), gt.cuda()).cpu()
        torch.testing.assert_close(gpu, cpu, rtol=rounding, atol=rounding)


# ---- validation


class Bicubic(torch.nn.Linear):
    """A student that only enlarges."""

    def forward(self, lr):
        return torch.stack([bicubic(clip) for clip in lr])


@pytest.mark.parametrize("teacher", [None, lambda lr: torch.zeros(1, 4, 3, 64, 96)])
def test_validation_returns_the_metrics_of_the_student_and_draws_what_it_made(teacher, tmp_path):
    hr, lr = (to_frames(2 * clip - 1) for clip in (translation(4)[0], F.avg_pool2d(translation(4)[0], 4)))
    scores = metrics.validate(Bicubic(1, 1), teacher, [("a", hr, lr)] * 2, tmp_path / "pictures", 7)
    smooth = to_uint8(bicubic(to_network(to_clip(lr))))
    expected = {"psnr": psnr(smooth, to_clip(hr)), "ssim": ssim(smooth, to_clip(hr))}
    expected |= {"psnr_bicubic": expected["psnr"], "detail": detail(smooth, to_clip(hr))}
    expected |= {"ewarp": warping_errors(smooth, dis_flow)}
    assert scores == {name: pytest.approx(values.mean().item()) for name, values in expected.items()}
    picture = np.asarray(Image.open(tmp_path / "pictures/a_000007.png"))
    assert picture.shape == (64 + 3 * 4, (3 + (teacher is not None)) * 96, 3)
    assert np.array_equal(picture[:64, :96], to_frames(smooth)[2])
    assert np.array_equal(picture[:64, -96:], hr[2])


def test_a_single_frame_has_no_warping_error_and_validates(tmp_path):
    hr, lr = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8)
    scores = metrics.validate(Bicubic(1, 1), None, [("a", hr, lr)], tmp_path, 1)
    assert "ewarp" not in scores and scores["ssim"] == pytest.approx(1)


# ---- the command line


def run(*args, home: Path, **kwargs) -> subprocess.CompletedProcess:
    """metrics.py as a process, with no network and no cached weights."""
    nowhere = {"TORCH_HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    nowhere |= dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, str(ROOT / "metrics.py"), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **nowhere}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, **kwargs)


def test_the_numbers_survive_the_round_trip_through_process_and_json(tmp_path):
    gt = translation(3)[0]
    write_frames(tmp_path / "pred/a", gt)
    write_frames(tmp_path / "gt/a", gt)
    write_video(tmp_path / "pred/b.mkv", (gt + 0.02).clamp(0, 1))
    write_frames(tmp_path / "gt/b", gt)
    file = tmp_path / "out.json"
    done = run(
        *(tmp_path / "pred", tmp_path / "gt", "--flow", "dis", "--profile"),
        *("--metrics", "ewarp,ssim,psnr,dover", "--json", file),
        home=tmp_path / "home",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["settings"]["convention"] == "corrected" and "DIS" in result["settings"]["flow"]
    assert "convention corrected, flow OpenCV DIS" in done.stdout
    assert "PSNR on rgb, SSIM on yiq" in done.stdout

    a, b = result["clips"]
    assert (a["name"], a["psnr"], a["frames"], a["size"]) == ("a", "inf", 3, "96x64")
    assert a["ssim"] == pytest.approx(1, abs=1e-12)  # a GPU contracts products and sums
    pred = ((gt + 0.02).clamp(0, 1) * 255).round().byte()
    expected = {m.__name__: m(pred, (gt * 255).round().byte()).mean().item() for m in (psnr, ssim)}
    expected["ewarp"] = warping_errors(pred, dis_flow).mean().item()
    assert {k: b[k] for k in expected} == {k: pytest.approx(v, rel=1e-4) for k, v in expected.items()}
    assert result["mean"]["ssim"] == pytest.approx((1 + b["ssim"]) / 2)

    order = re.search(r"^clip +frames +size +(.*)$", done.stdout, re.MULTILINE).group(1).split()
    assert order == ["psnr", "ssim", "ewarp"]

    # DOVER could not be had: one line names the file and the way out, and the rest was computed
    assert (
        len(done.stderr.splitlines()) == 1
        and "DOVER not computed: no DOVER/evaluate_one_video" in done.stderr
    )
    assert result["not_computed"] == done.stderr.splitlines() and "--dover PATH" in done.stderr
    picture = np.asarray(Image.open(tmp_path / "pred/b_profile.png"))
    profile = row_over_time(pred).permute(1, 2, 0).numpy()
    assert picture.shape == (2 * (18 + 120), 96, 3) and np.array_equal(picture[18:138:40], profile)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("ewarp", ["E*_warp", "raft_large_C_T_V1-22a6c225.pth", "--flow dis"]),
        ("lpips", ["LPIPS", "LPIPS_v0.1_alex-df73285e.pth", "pip install pyiqa"]),
        ("dists", ["DISTS", "vgg16-397923af.pth", "torchmetrics"]),
        ("maniqa", ["MANIQA", "MANIQA_PIPAL-ae6d356b.pth", "pip install pyiqa", "non-commercial"]),
        ("dover", ["DOVER", "--dover PATH"]),
    ],
)
def test_what_cannot_be_had_is_one_line_and_the_rest_is_computed(
    metric, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "pyiqa", None)  # as if not installed
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    clip = write_frames(tmp_path / "clip", translation(2)[0])
    metrics.evaluate(metrics.parse([str(clip), str(clip), "--metrics", f"{metric},psnr"]))
    out, err = capsys.readouterr()
    assert "psnr" in out and "inf" in out
    lines = [line for line in err.splitlines() if not line.startswith("Downloading: ")]  # torch 2.6 says so
    assert len(lines) == 1 and all(word in err for word in words)
    with pytest.raises(UserError, match=re.escape(words[0])):
        metrics.evaluate(metrics.parse([str(clip), str(clip), "--metrics", metric]))


def test_a_package_that_breaks_at_import_is_one_line_too(tmp_path, monkeypatch):
    (tmp_path / "pyiqa.py").write_text("raise AttributeError('numpy has no attribute bool8')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    with pytest.raises(Unavailable, match="MUSIQ not computed .*AttributeError: .*bool8") as error:
        metrics.load_pyiqa("musiq", "cpu")
    assert "\n" not in str(error.value)


def test_an_error_of_the_program_is_not_dressed_up_as_a_missing_package():
    with pytest.raises(KeyError), needs("DISTS", "torchmetrics", "vgg.pth"):
        {}["alpha"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Clips that go wrong with each other."""
    folder, clip = tmp_path_factory.mktemp("shelf"), translation(3)[0]
    write_frames(folder / "good", clip)
    write_frames(folder / "short", clip[:2])
    write_frames(folder / "narrow", clip[..., :90])
    write_frames(folder / "one", clip[:1])
    write_frames(folder / "preds/a", clip)
    write_frames(folder / "preds/b", clip)
    write_frames(folder / "gts/a", clip)
    write_frames(folder / "twice/a", clip[:1])
    write_video(folder / "twice/a.mkv", clip[:1])
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("narrow good", "narrow: prediction 90x64, ground truth 96x64: sizes differ; fix the output"),
        ("good narrow", "good: prediction 96x64, ground truth 90x64: sizes differ; fix the output"),
        ("short good", "short: prediction 2 frames, ground truth 3 frames: lengths differ; fix the output"),
        ("good short", "good: prediction 3 frames, ground truth 2 frames: lengths differ; fix the output"),
        ("preds gts", "predictions without ground truth in .*gts: b$"),
        ("empty good", "no frames in this folder"),
        ("good empty", "no frames in this folder"),
        ("absent", "absent: no such file or folder"),
        ("twice", "twice/a: a second clip of that name"),
        ("good --metrics psnr", "--metrics psnr: needs a ground truth; give GT, or choose from maniqa,"),
        ("good good --metrics vmaf", "--metrics vmaf: no such metric, or choose from psnr,"),
        ("one one", "one: one frame, and E[*]_warp needs two"),
        ("good good --metrics psnr --json nowhere/out.json", "there is no folder"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(args, message, shelf, monkeypatch):
    monkeypatch.chdir(shelf)
    before = sorted(shelf.rglob("*"))
    json_flag = [] if "--json" in args else ["--json", "out.json"]
    with pytest.raises(UserError, match=message) as refusal:
        metrics.evaluate(metrics.parse([*args.split(), "--flow", "dis", "--profile", *json_flag]))
    assert len(str(refusal.value).splitlines()) == 1
    assert sorted(shelf.rglob("*")) == before


def test_a_refusal_is_one_line_and_exit_status_2(shelf, tmp_path):
    done = run(shelf / "short", shelf / "good", "--flow", "dis", "--json", tmp_path / "o.json", home=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "o.json").exists()
    assert re.fullmatch("error: short: prediction 2 frames, .*lengths differ.*\n", done.stderr)


def test_the_papers_protocol_takes_25_frames_of_the_centre_and_names_its_convention(tmp_path, capsys):
    gt = F.avg_pool2d(
        translation(27, 174, 238, dx=2, dy=1)[0], 15, stride=1
    )  # smooth: survives the input's size
    write_video(tmp_path / "gt.mkv", gt)
    write_video(tmp_path / "pred.mkv", gt[:25, :, 16:144, 48:176])
    args = [str(tmp_path / "pred.mkv"), str(tmp_path / "gt.mkv"), "--flow", "dis", "--protocol", "adcvsr"]
    write_video(tmp_path / "lq.mkv", F.avg_pool2d(gt, 4))
    result = metrics.evaluate(metrics.parse([*args, "--profile", "--input", str(tmp_path / "lq.mkv")]))
    assert (result["clips"][0]["frames"], result["clips"][0]["size"]) == (25, "128x128")
    assert result["mean"]["psnr"] == pytest.approx(80)  # pyiqa's end of the scale
    assert "convention evalcrafter" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "pred_profile.png")).astype(float)
    lq, pred, truth = (picture[k * 118 + 18 : (k + 1) * 118] for k in range(3))  # 25 rows of 4, under a label
    assert np.array_equal(pred, truth)
    assert np.abs(lq - pred).mean() < 0.3 * np.abs(lq[:, ::-1] - pred).mean()  # the same part of the scene


@pytest.mark.parametrize(("dx", "dy"), [(2, -1), (0, 4)])
def test_a_shifted_truth_is_found_to_the_pixel_and_blur_is_no_shift(dx, dy):
    world = translation(3, 72, 104)[0].float()
    noisy = world + 0.05 * torch.randn(world.shape, generator=torch.Generator().manual_seed(0))
    pred, moved = (
        to_frames(2 * noisy[..., y : y + 64, x : x + 96] - 1) for y, x in ((4, 4), (4 - dy, 4 - dx))
    )
    blurred = [cv2.GaussianBlur(frame, (0, 0), 2) for frame in pred]
    for truth in pred, blurred:
        assert best_shift({"prediction": a, "ground truth": b} for a, b in zip(pred, truth))[:2] == (0, 0)
    for one, other, sign in (pred, moved, 1), (moved, blurred, -1):
        x, y, gain = best_shift({"prediction": a, "ground truth": b} for a, b in zip(one, other))
        assert (x, y) == (sign * dx, sign * dy) and gain > 1


def test_the_papers_protocol_tells_of_a_shifted_truth_and_scores_it_as_it_is(tmp_path, capsys):
    world = translation(3, 68, 100)[0].float()
    truth = write_frames(tmp_path / "truth", world[..., 2:66, 2:98])
    shifted = write_frames(tmp_path / "shifted", world[..., 3:67, 4:100])  # all lies 2 further left, 1 higher
    soft = F.avg_pool2d(F.pad(world[..., 2:66, 2:98], (2, 2, 2, 2), "replicate"), 5, stride=1)
    soft = write_frames(tmp_path / "soft", soft)
    scores = {}
    for pred in (shifted, soft, truth):
        args = [str(pred), str(truth), "--metrics", "psnr", "--protocol", "adcvsr"]
        result = metrics.evaluate(metrics.parse(args))
        scores[pred.name], out = result["mean"]["psnr"], capsys.readouterr().out
        assert ("2 pixels right of the prediction and 1 below it, which costs" in out) is (pred == shifted)
        assert ("note:" in out) is (pred == shifted)
    plain = metrics.evaluate(metrics.parse([str(shifted), str(truth), "--metrics", "psnr"]))
    assert plain["mean"]["psnr"] == pytest.approx(scores["shifted"], abs=1e-3)
    assert "note:" not in capsys.readouterr().out  # the paper's protocol alone asks


def test_dover_gets_the_frames_losslessly_and_its_score_is_read(tmp_path):
    # A script in the place of the official one: prints the mean of the pixels that arrived.
    (tmp_path / "pretrained_weights").mkdir()
    (tmp_path / "pretrained_weights/DOVER.pth").touch()
    (tmp_path / "evaluate_one_video.py").write_text(
        "import sys, av\n"
        "frames = [f.to_ndarray(format='rgb24') for f in av.open(sys.argv[2]).decode(video=0)]\n"
        "print('Normalized fused overall score (scale in [0,1]):', sum(f.mean() for f in frames) / 3)\n"
    )
    frames = [(255 * texture(37, 51, i)).byte().permute(1, 2, 0).numpy() for i in range(3)]
    assert load_dover(tmp_path, "cpu")(frames) == pytest.approx(np.mean(frames), abs=1e-9)


def test_a_failing_dover_is_one_line_and_the_rest_is_written(tmp_path, capsys):
    (tmp_path / "pretrained_weights").mkdir()
    (tmp_path / "pretrained_weights/DOVER.pth").touch()
    (tmp_path / "evaluate_one_video.py").write_text("raise RuntimeError('no decord')")
    clip = write_frames(tmp_path / "clip", translation(2)[0])
    out = tmp_path / "out.json"
    args = f"{clip} {clip} --metrics psnr,dover --dover {tmp_path} --json {out}"
    args = metrics.parse(args.split())
    metrics.write_json(metrics.evaluate(args), args.json)
    assert json.loads(out.read_text())["mean"] == {"psnr": "inf", "dover": "nan"}
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "DOVER not computed" in err and "no decord" in err
