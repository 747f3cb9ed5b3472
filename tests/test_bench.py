"""bench.py: every table is printed in small on a CPU, and says what is true."""

import json
import re
from functools import partial

import imageio.v3 as imageio
import pytest
import torch

import bench
from bench import Args
from compact import CompactVSR
from model import PRESETS, AdcVSR
from runtime import UserError


def test_table_1_counts_the_papers_parameters_and_times_every_method(capsys):
    spent, out = bench.table1(Args("table1")), capsys.readouterr().out
    assert list(spent) == list(bench.PAPER) and min(spent.values()) > 0
    for ours, papers in re.findall(r"([\d.]+) B.* ([\d.]+) B", out):
        assert ours == papers
    assert len(re.findall(r"[\d.]+ B", out)) == 2 * len(bench.PAPER)


@pytest.mark.parametrize("stage", ["train1", pytest.param("train2", marks=pytest.mark.slow)])
def test_a_training_step_is_timed_and_its_operations_counted(stage, capsys):
    bench.WORK[stage](Args(stage))
    done = re.search(r"([\d.e-]+) s a step, ([\d.e-]+) TFLOP: ([\d.e-]+) TFLOP/s", capsys.readouterr().out)
    spent, work, rate = map(float, done.groups())
    assert rate == pytest.approx(work / spent, rel=0.02) and work > 1e-3


def test_a_process_is_timed_with_a_memory_of_its_own():
    ballast = torch.ones(2**26)  # 268 MB here, which must not show there
    spent, before, after = bench.as_process("held_here = bytearray(b'1') * 50_000_000; time.sleep(0.2)")
    assert spent > 0.2 and after - before == pytest.approx(50, abs=5) and after < 4 * ballast.numel() / 1e6
    with pytest.raises(UserError, match="(?s)this failed: 1 / 0 .*ZeroDivisionError"):
        bench.as_process("1 / 0")


def test_rows_are_also_lines_of_json_where_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    bench.report("clip, folded", s=0.25)
    bench.report("stream, folded", frames_per_s=22.0)
    first, second = map(json.loads, (tmp_path / "bench.jsonl").read_text().splitlines())
    assert first["row"] == "clip, folded" and first["s"] == 0.25 and second["frames_per_s"] == 22.0


def test_seams_are_steps_at_borders_over_steps_elsewhere():
    ramp = torch.arange(12.0) + 3 * (torch.arange(12) >= 8)  # a step of 1 everywhere, of 4 at 8
    assert bench.seams((ramp[:, None] + ramp).expand(2, 3, 12, 12), border=8) == pytest.approx(4)
    assert bench.seams((ramp[:, None] + ramp).expand(2, 3, 12, 12), border=4) == pytest.approx(2.5)


def test_attention_in_windows_is_compared_with_full_attention(tmp_path, capsys):
    torch.manual_seed(0)
    net = AdcVSR(**PRESETS["tiny"])
    for parameter in net.parameters():
        if not parameter.any():  # what starts at zero: the tail, of whose output there would be nothing
            torch.nn.init.normal_(parameter, std=0.02)
    net.save_pretrained(tmp_path / "tiny")
    bench.attention(Args("attention", clips=1, weights=(str(tmp_path / "tiny"),)))
    row = capsys.readouterr().out.splitlines()[-1]
    found = dict(re.findall(r"(\w+) ([\d.]+)", row))
    assert row.startswith("tiny, mean") and 30 < float(found["psnr"]) < 80
    assert 0.5 < float(found["seams_difference"]) < 2
    with pytest.raises(UserError, match=r"compact: has no attention over frames\. Give --weights of"):
        bench.attention(Args("attention", clips=1))


def test_every_layer_is_timed_and_every_row_kept_as_json(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    bench.layers(Args("layers"))
    rows, out = list(map(json.loads, (tmp_path / "bench.jsonl").open())), capsys.readouterr().out
    assert "FAILED" not in out and len(rows) == len(out.splitlines()) - 1 > 10
    assert all(row["ms"] > 0 and f"{row['row']} " in out for row in rows)


@pytest.mark.slow
def test_gpu_runs_each_table_in_its_order(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    bench.gpu(Args("gpu"))
    out, rows = capfd.readouterr().out, list(map(json.loads, (tmp_path / "bench.jsonl").open()))
    assert re.findall("^==== (?!status)(.*)$", out, re.M) == list(bench.GPU)
    assert len(re.findall("^==== status 0, ", out, re.M)) == len(bench.GPU) and "FAILED" not in out
    assert sum(bench.GPU.values()) <= 360  # seconds on a GPU
    names = [row["row"] for row in rows]
    some = "clip, folded", "feature encoder, torch", "train_stage2: profile", "table1, AdcVSR"
    assert [names.index(name) for name in some] == sorted(map(names.index, some))


@pytest.mark.slow
def test_end2end_prints_its_rows(capsys):
    bench.end2end(Args("end2end"))
    out = capsys.readouterr().out
    assert "FAILED" not in out and "clip, both the same               same 1" in out
    assert len(re.findall(r"infer.py, .* frames_per_s [\d.]+ ", out)) == 3


@pytest.mark.slow
def test_infer_prints_its_rows(capsys):
    bench.infer(Args("infer"))
    out = capsys.readouterr().out
    assert "320x240 -> x4" in out and "infer.py, 160 frames" in out
    assert len(re.findall("memory (?:kept|given back) .* mb ", out)) == 4


@torch.no_grad()
def test_the_network_in_ncnn_is_the_same_one():
    net, lr = CompactVSR.from_realesrgan(temporal_kind="none"), torch.rand(1, 1, 3, 13, 20) * 2 - 1
    pytest.importorskip("ncnn")
    frame = bench.in_ncnn(net)["2D_in_ncnn"]
    torch.testing.assert_close(frame(lr[0, 0]), net(lr)[0, 0], rtol=0, atol=1e-4)


def test_works_in_turns_are_timed_each_on_its_own_after_a_call_to_warm_up(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def work(name: str, first: float, later: float) -> None:
        clock[0] += later if name in calls else first
        calls.append(name)

    works = {"short": partial(work, "short", 9.0, 1.0), "long": partial(work, "long", 9.0, 4.0)}
    assert bench.in_turns(works, 1) == {"short": 1.0, "long": 4.0}
    assert calls == ["short", "long", "short", "long"]


@pytest.mark.slow
def test_data_prints_its_rows_of_files_too(capsys, tmp_path):
    (tmp_path / "photos").mkdir()
    for k in range(8):
        bench.write_sample(tmp_path / f"{k}.mp4", 8, (48, 64))
        frame = bench.procedural_clip(bench.generator(k), 1, (96, 96)).frames[0]
        imageio.imwrite(tmp_path / f"photos/{k}.png", frame)
    args = Args("data", videos=str(tmp_path), images=str(tmp_path / "photos"), clips=1)
    bench.data(args, frames=5, size=48)
    rows = "degradation", "video, cropped", "photo, cropped", "sample of stage 2", "a million names, others"
    out = capsys.readouterr().out
    assert all(row in out for row in rows)
