"""train_stage1.py: the update of Eq. 1 and 2, and runs that end alike whatever happens to them on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from test_runtime import two_processes
from test_training import ALONE as WORLD
from test_training import names, signals  # noqa: F401 (signals is a fixture)
from torch import nn

import cache
import infer
import model
import train_stage1
from compact import CompactVSR
from data import TrainingClips, loader, micro_batches
from files import DataError
from model import AdcVSR
from perceptual import DISTS, dists_loss
from runtime import UserError, World
from teacher import FeatureEncoder
from train_stage1 import PRESETS, Config, by_rate, learning_rate, main, train_step
from training import newest_checkpoint
from video import VideoReader, VideoWriter, to_network

ROOT = Path(train_stage1.__file__).parent
# The tiny student's topology, narrow enough for hundreds of steps in a test.
MICRO = model.PRESETS["tiny"] | {"unet_channels": [16] * 4, "heads": [1] * 4, "decoder_channels": [8] * 4}
CONFIG = replace(
    PRESETS["smoke"],
    student="micro",
    frames=2,
    size=64,
    batch=2,
    steps=6,
    lr=3e-4,
    halve_at=(2, 4),
    every=100,
)
# Its pixel losses alone, on smaller clips, with the skip that the tiny student has.
PIXELS = replace(CONFIG, size=32, temporal="block", pixel_skip=True, lambda_feature=0.0, dists="none")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, signals):  # noqa: F811
    """Runs in this process compute where they are exactly repeatable, and know the narrow student."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(model.PRESETS, "micro", MICRO)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    """A cache of three clips, larger than those that training takes."""
    cfg = replace(cache.PRESETS["smoke"], frames=3, size=72, clips=3)
    out = str(tmp_path_factory.mktemp("made") / "cache")
    cache.main(replace(cfg, out=out))
    return out


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Bit for bit the same weights and the same state of the optimiser."""
    a, b = (torch.load(folder / "train.pt", weights_only=True) for folder in (one, other))
    assert one.name == other.name and a["step"] == b["step"]
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert a["optimiser"]["param_groups"] == b["optimiser"]["param_groups"]
    moments_a, moments_b = a["optimiser"]["state"], b["optimiser"]["state"]
    assert moments_a.keys() == moments_b.keys() and len(moments_a) > 0
    for key, moments in moments_a.items():
        assert moments.keys() == moments_b[key].keys() and all(
            torch.equal(moments[k], moments_b[key][k]) for k in moments
        )


def logged(cfg: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------- one step


class Gain(nn.Module):
    """A student whose output is the enlarged input times one number, so that its losses are known."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, clip_lr: torch.Tensor, return_features: bool) -> tuple[torch.Tensor, torch.Tensor]:
        big = F.interpolate(rearrange(clip_lr, "b t c h w -> (b t) c h w"), scale_factor=4.0)
        return self.gain * rearrange(big, "(b t) c h w -> b t c h w", b=len(clip_lr)), 2 * self.gain * clip_lr


def update(student, batch, cfg=CONFIG, encoder=None, dists=None, optimiser=None) -> dict[str, torch.Tensor]:
    optimiser = optimiser or torch.optim.SGD(student.parameters(), lr=1.0)
    return train_step(batch, student, None, encoder, dists, optimiser, WORLD, cfg)


def test_a_step_is_equations_1_to_3_with_their_weights():
    clip_lr, hr = torch.full((2, 3, 3, 8, 8), 0.5), torch.zeros(2, 3, 3, 32, 32)
    hr[1] = -1.0  # differences 0.5 and 1.5: L1 is 1, L2 would be 1.25
    student, cfg = Gain(), replace(CONFIG, lambda_pixel=0.1, lambda_feature=0.5)
    losses = update(student, [{"lr": clip_lr, "hr": hr}], cfg, encoder=lambda x: torch.zeros(2, 3, 3, 8, 8))
    assert losses["pixel"].item() == pytest.approx(1.0) and losses["feature"].item() == pytest.approx(1.0)
    assert losses["loss"].item() == pytest.approx(0.1 * 1.0 + 0.5 * 1.0) and losses["dists"] == 0
    # d loss / d gain = 0.1 mean(lr) + 0.5 mean(2 lr)
    assert student.gain.item() == pytest.approx(1 - 0.1 * 0.5 - 0.5 * 1.0)
    assert not losses["loss"].requires_grad


def test_dists_adds_to_the_pixel_loss_and_sees_frames_one_by_one():
    torch.manual_seed(0)
    x, y = torch.rand(2, 5, 3, 32, 32) * 2.4 - 1.2, torch.rand(2, 5, 3, 32, 32) * 2 - 1
    dists = DISTS.seeded()
    unit = [v.add(1).div(2).clamp(0, 1).flatten(0, 1) for v in (x, y)]
    one_by_one = torch.stack([dists(a, b) for a, b in zip(*unit)])
    torch.testing.assert_close(dists_loss(dists, x, y), one_by_one.mean())
    batch, student = [{"lr": y[..., :8, :8], "hr": x}], Gain()
    losses = update(student, batch, replace(CONFIG, lambda_pixel=0.3), dists=dists)
    assert losses["dists"] > 0
    assert losses["loss"].item() == pytest.approx(0.3 * (losses["pixel"] + losses["dists"]).item(), rel=1e-3)


def test_micro_batches_of_whatever_size_give_the_gradients_of_the_whole_batch():
    torch.manual_seed(0)
    batch = {"lr": torch.rand(3, 2, 3, 8, 8).double(), "hr": torch.rand(3, 2, 3, 32, 32).double()}
    gains, losses = [], []
    for size, sizes in (3, [3]), (1, [1, 1, 1]), (2, [2, 1]):
        parts = micro_batches(batch, size, torch.device("cpu"))
        assert [len(part["lr"]) for part in parts] == sizes
        student = Gain().double()
        losses.append(update(student, parts, PIXELS)["loss"].item())
        gains.append(student.gain.item())
    assert gains == pytest.approx([gains[0]] * 3, abs=1e-12) and gains[0] != 1
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-12)


def test_unequal_micro_batches_weigh_by_their_clips():
    """Three clips as 2 + 1 are three clips at once: losses and gradient."""
    torch.manual_seed(0)
    batch = {"lr": torch.rand(3, 2, 3, 8, 8).double(), "hr": torch.rand(3, 2, 3, 32, 32).double()}
    batch["hr"][2] += 1
    results = []
    for size in 3, 2, 1:
        student = Gain().double()
        losses = update(student, micro_batches(batch, size, torch.device("cpu")), PIXELS)
        results.append([student.gain.item(), losses["loss"].item(), losses["pixel"].item()])
    assert all(result == pytest.approx(results[0], abs=1e-12) for result in results)


def test_a_cached_target_or_a_teacher_stands_in_for_hr():
    clip = {"lr": torch.zeros(1, 2, 3, 8, 8), "hr": torch.zeros(1, 2, 3, 32, 32)}
    assert update(Gain(), [clip])["pixel"] == 0
    assert update(Gain(), [clip | {"target": clip["hr"] + 0.25}])["pixel"] == 0.25

    def teacher(lr, index):
        return clip["hr"] + 0.5 * index

    optimiser, clip["index"] = torch.optim.SGD(Gain().parameters(), lr=1.0), torch.tensor([1])
    assert train_step([clip], Gain(), teacher, None, None, optimiser, WORLD, CONFIG)["pixel"] == 0.5


def test_a_step_changes_every_weight_of_the_student_and_no_other_network():
    torch.manual_seed(0)
    student = AdcVSR(**{**MICRO, "pixel_skip": False})
    encoder, dists = FeatureEncoder.seeded(student.config), DISTS.seeded()
    frozen = {k: v.clone() for net in (encoder, dists) for k, v in net.state_dict().items()}
    before = {k: v.clone() for k, v in student.state_dict().items()}
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    batch = [{"lr": torch.rand(1, 2, 3, 20, 20), "hr": torch.rand(1, 2, 3, 80, 80)}]
    for _ in range(3):  # a zero-initialised layer passes gradients on from the second step
        update(student, batch, CONFIG, encoder, dists, optimiser)
    assert [k for k, v in student.named_parameters() if torch.equal(v, before[k])] == []
    assert all(torch.equal(v, frozen[k]) for net in (encoder, dists) for k, v in net.state_dict().items())
    assert all(p.grad is None for net in (encoder, dists) for p in net.parameters())


def test_the_loss_of_one_clip_again_and_again_falls(tmp_path):
    one = replace(cache.PRESETS["smoke"], frames=2, size=64, clips=1, out=str(tmp_path / "cache"))
    cache.main(one)
    cfg = replace(CONFIG, temporal="none", teacher_cache=one.out, batch=1, steps=15, lr=3e-3, halve_at=())
    cfg = replace(cfg, out=str(tmp_path / "run"))
    main(cfg)
    losses = [line["loss"] for line in logged(cfg) if "loss" in line]
    assert len(losses) == 15 and sum(losses[-3:]) < 0.9 * 3 * losses[0]


def test_the_temporal_blocks_alone_learn_at_the_whole_rate():
    student = CompactVSR.from_realesrgan()
    temporal, pretrained = by_rate(student, 0.1)
    assert temporal["share"] == 1 and pretrained["share"] == 0.1
    assert {id(p) for p in temporal["params"]} == {id(p) for p in student.temporal.parameters()}
    assert {id(p) for p in pretrained["params"]} == {id(p) for p in student.body.parameters()}
    (all_of_it,) = by_rate(AdcVSR(**model.PRESETS["tiny"] | {"temporal": "none"}), 1.0)  # no blocks
    assert all_of_it["share"] == 1


def test_the_learning_rate_halves_exactly_after_each_named_step():
    cfg = Config(lr=8.0, halve_at=(3, 5))
    assert [learning_rate(step, cfg) for step in range(1, 8)] == [8, 8, 8, 4, 4, 2, 2]
    assert learning_rate(10**6, Config(lr=8.0, halve_at=())) == 8
    paper = Config(lr=1e-4, halve_at=(100_000,))
    assert [learning_rate(step, paper) for step in (1, 100_000, 100_001, 200_000)] == [1e-4] * 2 + [5e-5] * 2


# ----------------------------------------------------------------- runs in this process


def clips_of(cfg: Config) -> TrainingClips:
    return TrainingClips(cfg, cfg.seed)


@pytest.mark.parametrize("cfg", [CONFIG, PIXELS], ids=["every clip new", "pieces of a cache"])
def test_three_and_three_steps_equal_six(tmp_path, made, cfg):
    cfg = replace(cfg, teacher_cache=made if cfg is PIXELS else "")
    straight = replace(cfg, out=str(tmp_path / "straight"))
    resumed = replace(cfg, out=str(tmp_path / "resumed"))
    main(straight)
    main(replace(resumed, steps=3))
    assert names(tmp_path / "resumed") == ["log.jsonl", "pictures", "step_000003"]
    torch.rand(7)  # the state that random numbers are in does not matter
    main(resumed)
    assert_same_checkpoint(tmp_path / "straight" / "step_000006", tmp_path / "resumed" / "step_000006")
    one, other = ([line for line in logged(run) if "loss" in line] for run in (straight, resumed))
    assert [line["step"] for line in one] == [line["step"] for line in other] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert len({line["loss"] for line in one}) == 6  # every step saw clips of its own
    # The rates that were used: halved after steps 2 and 4.
    assert [line["lr"] / CONFIG.lr for line in one] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    last = torch.load(tmp_path / "resumed" / "step_000006" / "train.pt", weights_only=True)
    assert last["optimiser"]["param_groups"][0]["lr"] == CONFIG.lr / 4


def test_the_seed_decides_the_run(tmp_path):
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        main(replace(PIXELS, steps=2, halve_at=(), seed=seed, out=str(tmp_path / name)))
    assert_same_checkpoint(tmp_path / "a" / "step_000002", tmp_path / "b" / "step_000002")
    a, c = weights(tmp_path / "a" / "step_000002"), weights(tmp_path / "c" / "step_000002")
    assert not torch.equal(a["unet.conv_in.weight"], c["unet.conv_in.weight"])


def test_every_so_often_and_at_the_last_step_there_is_a_checkpoint_and_a_look(tmp_path):
    main(replace(PIXELS, steps=5, every=2, out=str(tmp_path)))
    assert names(tmp_path) == ["log.jsonl", "pictures", "step_000002", "step_000004", "step_000005"]
    assert {"config.json", "model.safetensors", "train.pt"} <= set(names(tmp_path / "step_000005"))
    looks = [line for line in logged(replace(PIXELS, out=str(tmp_path))) if "psnr" in line]
    assert [line["step"] for line in looks] == [2, 4, 5] and all("psnr_bicubic" in line for line in looks)
    assert sum(name.endswith("_000004.png") for name in names(tmp_path / "pictures")) == 8
    before = (tmp_path / "step_000005" / "train.pt").stat()
    main(replace(PIXELS, steps=5, every=2, out=str(tmp_path)))  # nothing is left to do
    assert (tmp_path / "step_000005" / "train.pt").stat().st_mtime_ns == before.st_mtime_ns


def test_a_batch_that_the_processes_cannot_share_is_one_line():
    two = World(1, 2, torch.device("cpu"))
    with pytest.raises(DataError, match="2 processes cannot share a batch of 3"):
        loader(clips_of(CONFIG), 0, replace(CONFIG, batch=3), two)


def diverge_after(step: int, monkeypatch) -> None:
    """From the next step on the rate is infinite: that step's loss is finite still, its weights are not."""
    monkeypatch.setattr(train_stage1, "learning_rate", lambda n, cfg: cfg.lr if n <= step else float("inf"))


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    diverge_after(2, monkeypatch)
    with pytest.raises(UserError, match=r"^step 4: loss is nan. The last checkpoint is kept"):
        main(replace(PIXELS, every=2, out=str(tmp_path)))
    assert names(tmp_path) == ["log.jsonl", "pictures", "step_000002"]
    assert all(w.isfinite().all() for w in weights(tmp_path / "step_000002").values())
    lines = logged(replace(PIXELS, out=str(tmp_path)))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path, monkeypatch):
    diverge_after(2, monkeypatch)
    with pytest.raises(UserError, match="step 3: the weights are not finite"):
        main(replace(PIXELS, every=1, out=str(tmp_path)))
    assert all(w.isfinite().all() for w in weights(newest_checkpoint(tmp_path)).values())


def test_a_dry_run_measures_three_steps_and_leaves_nothing(tmp_path, capsys):
    main(replace(CONFIG, dry_run=True, steps=200_000, out=str(tmp_path / "run")))
    (first, *steps, last) = capsys.readouterr().out.splitlines()
    assert [line.partition("/")[0] for line in steps] == ["step 1", "step 2", "step 3"]
    assert " s a step, " in last and " GB at most: 200000 steps take " in last and names(tmp_path) == []


def test_the_first_line_says_what_differs_from_the_paper(tmp_path, capsys):
    main(replace(CONFIG, steps=0, out=str(tmp_path)))
    shown = capsys.readouterr().out.splitlines()
    (line,) = (line for line in shown if "TensorBoard" not in line)
    for setting in "student micro", "teacher gt", "size 64", "halve_at [2, 4]", "lr 0.0003":
        assert setting in line
    assert "lambda_pixel" not in line and "workers" not in line


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"pixel_skip": True}, "pixel skip paints a residual"),
        ({"size": 96}, "--size 96: features need a multiple of 64"),
        ({"vae": "nowhere"}, "feature targets need AdcSR's half decoder: give --adcsr"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"teacher_cache": "nowhere"}, "nowhere: no cache.json"),
        ({"micro_batch": 0}, "--micro-batch 0: give 1 or more"),
        ({"adcsr": ("a.pkl", "b.ckpt")}, "a.pkl: no such file"),
        ({"procedural": 0.0, "videos": "nowhere"}, "nowhere: cannot be read (No such file"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_leaves_nothing(tmp_path, changes, line):
    with pytest.raises(UserError) as error:
        main(replace(CONFIG, out=str(tmp_path / "run"), **changes))
    assert line in str(error.value) and "\n" not in str(error.value) and names(tmp_path) == []


def test_dists_without_its_weights_and_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="DISTS") as error:
        main(replace(CONFIG, dists="pretrained", out=str(tmp_path / "run")))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# ----------------------------------------------------------------- two processes


def gradients(world: World) -> dict[str, torch.Tensor]:
    """The gradients of train_step in float64 on a batch of four, shared by the processes there are."""
    torch.manual_seed(0)
    student = AdcVSR(**{**MICRO, "pixel_skip": False}).double()
    encoder = FeatureEncoder.seeded(student.config).double()
    for p in student.parameters():  # zero-initialised layers would keep most gradients at zero
        p.data += 0.05 * torch.randn_like(p)
    cfg = replace(CONFIG, batch=4, size=128)  # large enough for attention between places
    (batch,) = loader(clips_of(cfg), 0, replace(cfg, steps=1), world)
    batch = {k: to_network(batch[k]).double() for k in ("lr", "hr")}
    assert len(batch["lr"]) == 4 // world.size
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    train_step([batch], student, None, encoder, None, optimiser, world, cfg)
    return {k: p.grad for k, p in student.named_parameters()}


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """In float64, where automatic bfloat16 does not apply, so that only rounding can tell them apart.

    A bias that a normalisation of each channel alone takes away again has a gradient of rounding errors, some
    1e-17; no other is below 1e-5.
    """
    alone = gradients(WORLD)
    first, second = two_processes(tmp_path, gradients)
    for key, grad in alone.items():
        assert grad.dtype == torch.float64 and grad.abs().max() > 0, key
        assert torch.equal(first[key], second[key]), key
        atol = 1e-7 * grad.abs().max().item() + 1e-15
        torch.testing.assert_close(
            first[key], grad, rtol=1e-6, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def three_runs(world: World, folder: Path) -> None:
    """Six steps, and three and three."""
    torch.set_num_threads(1)  # as many as the process alone: threads cut sums into parts
    model.PRESETS["micro"] = MICRO
    main(replace(PIXELS, out=str(folder / "straight")))
    main(replace(PIXELS, steps=3, out=str(folder / "resumed")))
    main(replace(PIXELS, out=str(folder / "resumed")))


def test_two_processes_train_like_one_and_resume_exactly(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(replace(PIXELS, out=str(tmp_path / "alone")))
    torch.set_num_threads(threads)
    two_processes(tmp_path, three_runs, tmp_path)
    assert_same_checkpoint(tmp_path / "straight" / "step_000006", tmp_path / "resumed" / "step_000006")
    # One clip at a time: two processes do what one does with two micro-batches, bit for bit.
    assert_same_checkpoint(tmp_path / "alone" / "step_000006", tmp_path / "straight" / "step_000006")


def stopped_by_the_second(world: World, folder: Path) -> None:
    """A run of two processes of which only the second is asked to stop, in its first step."""
    model.PRESETS["micro"] = MICRO
    if world.rank == 1:
        step = train_stage1.train_step

        def ask(*args):
            signal.raise_signal(signal.SIGTERM)
            return step(*args)

        train_stage1.train_step = ask
    main(replace(PIXELS, out=str(folder / "run")))


def test_a_signal_to_one_of_two_processes_saves_too(tmp_path):
    two_processes(tmp_path, stopped_by_the_second, tmp_path)
    assert names(tmp_path / "run") == ["log.jsonl", "step_000002"]  # the next one both know of


# ----------------------------------------------------------------- the command itself

SMALL = "--preset smoke --frames 2 --steps 4 --every 1".split()
ALONE = [sys.executable]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(launcher: list[str], *args, cwd: Path | None = None) -> subprocess.Popen:
    """The command in a process group of its own, on the CPU, one thread a process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "train_stage1.py"), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=env, cwd=cwd, **pipes)


def finish(process: subprocess.Popen) -> str:
    out = process.communicate()[0]
    assert process.returncode == 0, out
    return out


# A Python in which nothing can reach a network or look a name up.
OFFLINE = """
import runpy, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise OSError(f"no network here: {event} {args}")
sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The folder of two steps of the smoke preset, made by the command offline in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    out = finish(start([sys.executable, "-c", OFFLINE], "--preset", "smoke", "--steps", 2, cwd=folder))
    assert "step 2/2" in out
    return folder


def test_smoke_needs_no_network_and_no_file(smoke):
    out = smoke / PRESETS["smoke"].out
    assert names(smoke) == ["runs"] and names(out) == ["log.jsonl", "pictures", "step_000002"]
    assert [line["step"] for line in logged(replace(PRESETS["smoke"], out=str(out)))] == [1, 2, 2]
    width, height = Image.open(out / "pictures" / "procedural_0_000002.png").size
    assert width == 3 * 64 and height == 64 + 3 * 4  # LR bicubic | student | HR, above their rows over time


def test_infer_takes_a_checkpoint(smoke, tmp_path, monkeypatch):
    checkpoint = newest_checkpoint(smoke / PRESETS["smoke"].out)
    with VideoWriter(tmp_path / "clip.mp4", 24, 16, rate=25) as out:
        for frame in clips_of(PIXELS)[0]["hr"][:, :, :16, :24]:
            out.write(rearrange(frame, "c h w -> h w c").numpy())
    monkeypatch.setattr(sys, "argv", ["infer.py", str(tmp_path / "clip.mp4"), "--weights", str(checkpoint)])
    infer.main()
    with VideoReader(tmp_path / "clip_x4.mp4") as result:
        assert (result.width, result.height, len(list(result))) == (96, 64, 2)


def test_a_checkpoint_holds_the_student_as_it_was_trained(tmp_path):
    main(replace(PIXELS, steps=2, out=str(tmp_path)))
    loaded, saved = AdcVSR.from_pretrained(tmp_path / "step_000002"), weights(tmp_path / "step_000002")
    assert loaded.config == MICRO | {"temporal": "block"}
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, saved[k]) and v.dtype == torch.float32 for k, v in loaded.state_dict().items())
    clip = to_network(clips_of(PIXELS)[9]["lr"])[None]
    bicubic = F.interpolate(clip[0], scale_factor=4.0, mode="bicubic")[None]
    assert not torch.equal(loaded(clip), bicubic)  # it has left its start


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(tmp_path):
    """Between two steps: exit status 0, no half checkpoint, a log of every step up to the saved one.

    The whole group gets the signal, workers too, as from torchrun.
    """
    command = [*SMALL, "--steps", 10_000, "--every", 199, "--workers", 1, "--out", tmp_path]
    process = start(ALONE, *command)
    while "step 2/" not in process.stdout.readline() and process.poll() is None:
        pass
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    (checkpoint,) = [name for name in names(tmp_path) if name.startswith("step")]
    step = int(checkpoint.removeprefix("step_"))
    assert newest_checkpoint(tmp_path).name == checkpoint and step >= 2
    assert torch.load(tmp_path / checkpoint / "train.pt", weights_only=True)["step"] == step
    steps = [line["step"] for line in logged(Config(out=str(tmp_path))) if "loss" in line]
    assert steps == list(range(1, step + 1))


def half_way_through(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Waits until checkpoint `step` is being written."""
    while not ((folder / f"step_{step - 1:06d}").exists() and list(folder.glob(".partial-*"))):
        assert process.poll() is None, process.communicate()[0]
        assert not (folder / f"step_{step:06d}").exists(), "the moment was missed"
        time.sleep(0.0005)


@pytest.mark.slow
def test_kill_9_while_saving_and_the_same_command_equal_the_straight_run(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(start(ALONE, *SMALL, "--out", straight))
    process = start(ALONE, *SMALL, "--out", killed)
    half_way_through(process, killed, step=3)
    process.kill()
    process.communicate()
    assert not (killed / "step_000004").exists()
    last = int(newest_checkpoint(killed).name[5:])
    assert f"at step {last} of 4" in finish(start(ALONE, *SMALL, "--out", killed))
    assert names(killed) == names(straight)  # nor is anything half-made left
    assert_same_checkpoint(straight / "step_000004", killed / "step_000004")


def main_worker(launcher: subprocess.Popen) -> int:
    """The process id of rank 0 among torchrun's children."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (pid,) = [p for p in children if b"\0RANK=0\0" in b"\0" + Path(f"/proc/{p}/environ").read_bytes()]
    return int(pid)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds torchrun's processes under /proc")
def test_torchrun_starts_two_processes_again_that_end_like_the_straight_run(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert "2 x cpu" in finish(start(TOGETHER, *SMALL, "--out", straight))
    process = start([*TOGETHER, "--max-restarts=1"], *SMALL, "--out", killed)
    half_way_through(process, killed, step=2)
    os.kill(main_worker(process), signal.SIGKILL)
    assert finish(process).count("| at step ") == 2
    assert names(killed) == names(straight)
    assert_same_checkpoint(straight / "step_000004", killed / "step_000004")


@pytest.mark.slow
def test_the_whole_smoke_preset_lowers_the_validation_loss(tmp_path):
    # Eight times its steps: in twelve, a network that starts from nothing moves no further than it wavers.
    finish(start(ALONE, "--preset", "smoke", "--steps", 96, "--every", 8, cwd=tmp_path))
    out = tmp_path / PRESETS["smoke"].out
    assert names(out) == ["log.jsonl", "pictures", "step_000080", "step_000088", "step_000096"]
    scores = [line["psnr"] for line in logged(replace(CONFIG, out=str(out))) if "psnr" in line]
    assert len(scores) == 12 and scores[-1] > scores[0] + 1
