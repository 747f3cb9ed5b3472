"""train_stage2.py: the two updates of Eq. 1-5, each of which leaves the other's networks alone, every row of
the paper's ablations, and runs that end alike whatever happens to them on the way."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import repeat
from test_runtime import two_processes
from test_teacher import dove  # noqa: F401 (a fixture)
from test_train_stage1 import (  # noqa: F401 (on_the_cpu is a fixture, for every test)
    ALONE,
    MICRO,
    OFFLINE,
    TOGETHER,
    WORLD,
    assert_same_checkpoint,
    finish,
    half_way_through,
    logged,
    on_the_cpu,
    weights,
)
from test_training import names, signals  # noqa: F401 (signals is a fixture)
from torch import nn

import cache as caches
import train_stage1
import train_stage2
from cache import write_clip
from compact import CompactVSR, load_student
from data import TrainingClips, loader, micro_batches
from discriminators import LABELS, FeatureDiscriminator, PixelDiscriminator, five_clips
from model import AdcVSR
from perceptual import DISTS
from runtime import UserError, World
from teacher import FeatureEncoder
from train_stage2 import PRESETS, Config, configure, learning_rate, main, print_scores, stage_one, train_step
from training import as_saved, newest_checkpoint, parse
from video import read_clip, to_clip, to_network

ROOT = Path(train_stage2.__file__).parent
STUDENT = MICRO | {"pixel_skip": False}
NARROW = {"heads": (12, 4)}
SMALL = {"frames": 2, "size": 64, "batch": 2, "every": 100, "checkpointing": "none"}
HEADS = ("detail", "consistency")


def stirred(student: AdcVSR) -> AdcVSR:
    """With no weight left where a fresh network has it: those at zero would keep most gradients at zero."""
    for p in student.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return student


def write_stage1(folder: Path, changes: dict | None = None, **student) -> Path:
    """A checkpoint as stage 1 leaves it: a micro student, and the settings of its run."""
    torch.manual_seed(0)
    stirred(AdcVSR(**STUDENT | student)).save_pretrained(folder)
    config = replace(train_stage1.PRESETS["smoke"], **changes or {})
    torch.save({"step": int(folder.name[5:]), "config": as_saved(config)}, folder / "train.pt")
    return folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    """The folder of a run of stage 1."""
    out = tmp_path_factory.mktemp("stage1")
    write_stage1(out / "step_000007")
    return out


@pytest.fixture
def cfg(stage1, tmp_path) -> Config:
    """The smoke preset on smaller clips, from that run."""
    return replace(PRESETS["smoke"], init=str(stage1), out=str(tmp_path / "stage2"), **SMALL)


def train_pt(folder: Path) -> dict:
    return torch.load(folder / "train.pt", weights_only=True)


# ----------------------------------------------------------------- one step


def networks(dtype: torch.dtype = torch.float64, checkpointing: str = "none") -> tuple:
    """student, encoder, dists, discriminators, each the same every time."""
    torch.manual_seed(0)
    student = stirred(AdcVSR(**STUDENT))
    options = NARROW | {"checkpointing": checkpointing == "all"}
    judges = nn.ModuleDict(
        {
            "pixel": PixelDiscriminator.from_pretrained("tiny", **options),
            "feature": FeatureDiscriminator(student.unet, **options),
        }
    )
    student.unet.checkpointing = student.decoder.checkpointing = checkpointing == "all"
    return tuple(
        net.to(dtype) for net in (student, FeatureEncoder.seeded(student.config), DISTS.seeded(), judges)
    )


def clips_of(rank=0, size=1, batch=2, dtype: torch.dtype = torch.float64, frames: int = 3) -> dict:
    """A process's share of one batch, as numbers in [-1, 1]."""
    cfg = replace(PRESETS["smoke"], frames=frames, batch=batch, steps=1)
    (share,) = loader(TrainingClips(cfg, real_types=True), 0, cfg, World(rank, size, WORLD.device))
    return {k: to_network(x).to(dtype) if x.dtype == torch.uint8 else x for k, x in share.items()}


def update(nets: tuple, parts: list[dict], cfg: Config, world: World = WORLD, lr: float = 0.0) -> dict:
    """One train_step on these networks, whose gradients are left to look at."""
    student, encoder, dists, judges = nets
    optimisers = [torch.optim.SGD(net.parameters(), lr) for net in (student, judges)]
    return train_step(parts, student, None, encoder, dists, judges, optimisers, world, cfg)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """But for rounding: networks compute in float64 here, softplus and the statistics of DISTS in float32.

    Queries and keys of attention over a single place have a gradient of rounding errors alone.
    """
    atol = 1e-5 * expected.abs().max().item() + 1e-12
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol, msg=lambda text: f"{name}: {text}")


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in net.named_parameters()}


# Eq. 5 as the paper prints it, and as Tables 3 and 7 change it: clip, detail label, consistency label.
EQUATION_5 = [("student", -1, -1), ("video", 0, 1), ("video*", 0, -1), ("image", 1, 1), ("image*", 1, -1)]
ONE_HEAD = [("student", -1, -1), ("video", 1, 1), ("video*", -1, -1), ("image", 1, 1), ("image*", -1, -1)]
NO_3_AND_5 = [("student", -1, -1), ("video", 0, 1), ("image", 1, 1)]
VIDEO_DETAIL = [("video", 1, 1)] + [row for row in EQUATION_5 if row[0] != "video"]


def losses_by_hand(nets: tuple, clips: dict, table: list, cfg: Config) -> tuple[dict, torch.Tensor]:
    """Eq. 1-4 written out, every clip judged whole from its frames: the student's terms and Eq. 4."""
    student, encoder, dists, judges = nets
    x_s, f_s = student(clips["lr"], return_features=True)
    x_t, f_t = clips["hr"], encoder(clips["hr"])
    see = {"pixel": judges["pixel"].look, "feature": encoder}
    own = {"pixel": see["pixel"](x_s), "feature": f_s}
    adv = {d: torch.log1p(torch.exp(-torch.cat(judges[d](own[d]), dim=2))).mean() for d in own}
    frames = [((x + 1) / 2).clamp(0, 1).flatten(0, 1) for x in (x_s, x_t)]
    terms = {
        "pixel": (x_s - x_t).abs().mean(),
        "dists": torch.stack([dists(a, b) for a, b in zip(*frames)]).mean(),
        "feature": (f_s - f_t).abs().mean(),
    }
    terms |= {f"adv_{d}": value for d, value in adv.items()}
    l_pixel = terms["pixel"] + terms["dists"] + cfg.lambda_adv * adv["pixel"]  # Eq. 2
    l_feature = terms["feature"] + cfg.lambda_adv * adv["feature"]  # Eq. 3
    terms["loss"] = cfg.lambda_pixel * l_pixel + cfg.lambda_feature * l_feature  # Eq. 1

    video = clips["hr"] if cfg.real_video == "teacher" else clips["video"]
    shuffled = [torch.stack([clip[i] for i in order]) for clip, order in zip(video, clips["order"])]
    real = {
        "video": video,
        "video*": torch.stack(shuffled),
        "image": repeat(clips["image"], "b 1 c h w -> b t c h w", t=3),
        "image*": clips["random_images"],
    }
    for d in own:
        terms[f"disc_{d}"] = 0.0
        for kind, *labels in table:
            clip = own[d].detach() if kind == "student" else see[d](real[kind])
            scores = judges[d](clip)
            for score, y in zip(scores, labels):
                if y:  # the constant Softplus(0) of a label 0 is left out
                    terms[f"disc_{d}"] += torch.log1p(torch.exp(-y * score)).mean()
    return terms, terms["disc_pixel"] + terms["disc_feature"]


@pytest.mark.parametrize(
    ("changes", "table"),
    [
        ({}, EQUATION_5),
        ({"lambda_adv": 0.3, "lambda_feature": 0.5, "checkpointing": "all"}, EQUATION_5),
        ({"labels": "single"}, ONE_HEAD),
        ({"labels": "three_types"}, NO_3_AND_5),
        ({"labels": "detailed_video", "real_video": "teacher"}, VIDEO_DETAIL),
    ],
    ids=["the paper", "other weights", "single head", "no types 3 and 5", "detailed teacher video"],
)
def test_a_step_is_equations_1_to_5(changes, table):
    """Losses, the student's gradient and the discriminators' are those of the equations written out.

    Each gradient is that of its own loss alone: nothing of Eq. 4 is in the student's, nothing of the
    student's adversarial loss in the discriminators'.
    """
    cfg, clips = replace(PRESETS["smoke"], **changes), clips_of()
    nets = networks(checkpointing=changes.get("checkpointing", "none"))
    by_hand, l_disc = losses_by_hand(nets, clips, table, cfg)
    student, judges = nets[0], nets[3]
    expected = [
        dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters()))))
        for net, loss in ((student, by_hand["loss"]), (judges, l_disc))
    ]
    losses = update(nets, micro_batches(clips, 1, WORLD.device), cfg)
    for name, value in by_hand.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for net, grads in zip((student, judges), expected):
        for name, grad in gradients(net).items():
            assert grad.dtype == torch.float64 and grads[name].abs().max() > 0, name
            assert_close(grad, grads[name], name)
    assert not any(value.requires_grad for value in losses.values())


def test_unequal_micro_batches_weigh_by_their_clips():
    """Three clips as 2 + 1 are three clips at once, for the student and for the discriminators."""
    results = []
    for size in 3, 2, 1:
        nets = networks()
        losses = update(nets, micro_batches(clips_of(batch=3), size, WORLD.device), PRESETS["smoke"])
        results.append((losses, gradients(nn.ModuleDict({"student": nets[0], "discriminators": nets[3]}))))
    (losses, grads), *others = results
    for other_losses, other_grads in others:
        for name, value in losses.items():
            assert other_losses[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
        for name, grad in grads.items():
            assert_close(other_grads[name], grad, name)


def test_scores_are_the_means_of_each_head_for_each_type():
    nets, clips = networks(), clips_of()
    losses = update(nets, [clips], PRESETS["smoke"])
    encoder, judges = nets[1], nets[3]
    for where, see in ("pixel", judges["pixel"].look), ("feature", encoder):
        with torch.no_grad():
            x_s, f_s = nets[0](clips["lr"], return_features=True)
            types = five_clips(f_s if where == "feature" else see(x_s), see, clips)
            for kind, clip in types.items():
                for head, score in zip(HEADS, judges[where](clip)):
                    shown = losses[f"{where}/{kind}/{head}"].item()
                    assert shown == pytest.approx(score.mean().item(), abs=1e-6)
    scored = {f"{d}/{kind}/{head}" for d in judges for kind in LABELS for head in HEADS}
    assert {name for name in losses if "/" in name} == scored


def test_steps_change_every_weight_that_learns_and_none_that_is_frozen():
    student, encoder, dists, judges = networks(torch.float32)
    frozen = [*encoder.parameters(), *dists.parameters(), *dists.buffers(), *judges.buffers()]
    before = [w.clone() for w in frozen]
    assert sum(w.numel() for d in judges.values() for w in d.backbone.buffers()) > 1e6
    learning = dict([*student.named_parameters(), *judges.named_parameters()])
    start = {name: w.detach().clone() for name, w in learning.items()}
    optimisers = [torch.optim.Adam(net.parameters(), 1e-3) for net in (student, judges)]
    clips = [clips_of(dtype=torch.float32)]
    for _ in range(3):
        train_step(clips, student, None, encoder, dists, judges, optimisers, WORLD, PRESETS["smoke"])
    still = {name for name, w in learning.items() if torch.equal(w, start[name])}
    # The innermost grid has a single place here: a softmax over it ignores queries and keys.
    single = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    assert still <= {f"{single}.to_q.weight", f"{single}.to_k.weight"}
    assert all(torch.equal(w, was) for w, was in zip(frozen, before))
    assert not any(w.requires_grad or w.grad is not None for w in frozen)
    assert not any(m.training for d in judges.values() for m in d.backbone.modules())


def test_discriminators_learn_to_tell_one_clips_types_apart():
    """With a student that stands still, both fall below the loss of knowing nothing: log 2 a label."""
    student, encoder, _, judges = networks(torch.float32)
    optimisers = [torch.optim.Adam(net.parameters(), lr) for net, lr in ((student, 0.0), (judges, 1e-2))]
    clips, cfg, lines = [clips_of(batch=1, dtype=torch.float32)], PRESETS["smoke"], []
    for _ in range(6):
        lines.append(train_step(clips, student, None, encoder, None, judges, optimisers, WORLD, cfg))
    for name in "disc_pixel", "disc_feature":
        assert lines[-1][name] < 0.9 * lines[0][name], name


def shared_gradients(world: World, cfg: Config) -> dict[str, torch.Tensor]:
    """The gradients in float64 on a batch of two, shared by the processes there are."""
    nets = networks()
    clips = clips_of(world.rank, world.size)
    assert len(clips["lr"]) == 2 // world.size
    update(nets, [clips], cfg, world, lr=0.1)
    return gradients(nn.ModuleDict({"student": nets[0], "discriminators": nets[3]}))


WITHOUT_NOISE = {"gan": "rpgan", "lambda_r": 0.0}  # of which each process draws its own


@pytest.mark.parametrize("changes", [{}, pytest.param(WITHOUT_NOISE, marks=pytest.mark.slow)], ids=str)
def test_two_processes_have_the_gradients_of_one(tmp_path, changes):
    """In float64, where automatic bfloat16 does not apply; losses are in float32 all the same."""
    cfg = replace(PRESETS["smoke"], **changes)
    alone = shared_gradients(WORLD, cfg)
    first, second = two_processes(tmp_path, shared_gradients, cfg)
    for key, grad in alone.items():
        level = changes and key.endswith("tail.scores.bias")  # which no difference has
        assert grad.dtype == torch.float64 and (level or grad.abs().max() > 0), key
        assert torch.equal(first[key], second[key]), key
        assert_close(first[key], grad, key)


def test_the_students_rate_halves_exactly_after_each_named_step():
    paper = Config()
    rates = [learning_rate(step, paper) for step in (1, 100_000, 100_001, 200_000)]
    assert rates == [1e-5, 1e-5, 5e-6, 5e-6] and paper.lr_disc == 1e-7
    assert [learning_rate(step, Config(lr=8.0, halve_at=(1, 2))) for step in (1, 2, 3)] == [8, 4, 2]
    waits = Config(lr=8.0, head_start=2, halve_at=(3,))
    assert [learning_rate(step, waits) for step in (1, 2, 3, 4)] == [0, 0, 8, 4]


# ----------------------------------------------------------------- runs in this process


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same student, discriminators and optimisers."""
    assert_same_checkpoint(one, other)
    a, b = train_pt(one), train_pt(other)
    assert a["discriminators"].keys() == b["discriminators"].keys() and a["discriminators"]
    assert all(torch.equal(w, b["discriminators"][k]) for k, w in a["discriminators"].items())
    a, b = a["optimiser_disc"], b["optimiser_disc"]
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys() != set()
    for key, moments in a["state"].items():
        assert all(torch.equal(x, b["state"][key][k]) for k, x in moments.items())


def test_three_and_three_steps_equal_six(cfg, tmp_path):
    cfg = replace(cfg, halve_at=(2, 4), batch=1)
    straight, resumed = (replace(cfg, out=str(tmp_path / name)) for name in ("straight", "resumed"))
    main(straight)
    main(replace(resumed, steps=3))
    assert names(tmp_path / "resumed") == ["log.jsonl", "pictures", "step_000003"]
    torch.rand(7)  # the state that random numbers are in does not matter
    main(resumed)
    assert_same_run(tmp_path / "straight" / "step_000006", tmp_path / "resumed" / "step_000006")
    one, other = ([line for line in logged(run) if "loss" in line] for run in (straight, resumed))
    timed = ("steps_per_s", "data_wait", "gb")
    one, other = ([{k: v for k, v in line.items() if k not in timed} for line in run] for run in (one, other))
    assert one == other and [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    assert len({line["loss"] for line in one}) == 6  # every step saw clips of its own
    # The rates that were used: the student's halved after steps 2 and 4, the discriminators' never.
    assert [line["lr"] / cfg.lr for line in one] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    last = train_pt(tmp_path / "resumed" / "step_000006")
    assert last["optimiser"]["param_groups"][0]["lr"] == cfg.lr / 4
    assert last["optimiser_disc"]["param_groups"][0]["lr"] == cfg.lr_disc


def test_a_checkpoint_holds_what_learns_and_the_student_as_infer_takes_it(cfg):
    main(replace(cfg, steps=1))
    folder = Path(cfg.out) / "step_000001"
    start, end = weights(Path(cfg.init) / "step_000007"), weights(folder)
    assert start.keys() == end.keys() and not all(torch.equal(end[k], w) for k, w in start.items())
    assert AdcVSR.from_pretrained(folder).config == STUDENT
    kept = train_pt(folder)["discriminators"]
    assert {name.partition(".")[0] for name in kept} == {"pixel", "feature"}
    assert not [name for name in kept if ".backbone." in name]
    picture = Path(cfg.out) / "pictures" / "procedural_0_000001.png"
    assert read_clip(picture).shape == (1, 64 + 3 * 2, 3 * 64, 3)  # LR bicubic | student | HR, rows over time


def test_each_stage_sees_pairs_of_its_own(cfg, monkeypatch, tmp_path):
    seen = {}
    for stage, script in (1, train_stage1), (2, train_stage2):
        step = script.train_step

        def look(batch, *others, stage=stage, step=step):
            seen[stage] = batch[0]["hr"][0].clone()
            return step(batch, *others)

        monkeypatch.setattr(script, "train_step", look)
    main(replace(cfg, steps=1))
    same = {k: getattr(cfg, k) for k in ("frames", "size", "batch", "seed", "every")}
    train_stage1.main(replace(train_stage1.PRESETS["smoke"], **same, steps=1, out=str(tmp_path / "one")))
    assert torch.equal(seen[1], TrainingClips(cfg, cfg.seed, 1)[0]["hr"])
    assert torch.equal(seen[2], TrainingClips(cfg, cfg.seed, 2)[0]["hr"])
    assert not torch.equal(seen[1], seen[2])


def test_discriminators_that_are_not_finite_are_never_saved(cfg):
    with pytest.raises(UserError, match="step 1: the weights are not finite; the last checkpoint is kept"):
        main(replace(cfg, every=1, batch=1, lr_disc=float("inf")))
    assert [name for name in names(Path(cfg.out)) if name.startswith("step")] == []


def test_sigterm_saves_after_the_step_and_the_same_command_goes_on(cfg, monkeypatch):
    with monkeypatch.context() as patch:

        def asked_to_stop(*args):
            signal.raise_signal(signal.SIGTERM)
            return train_step(*args)

        patch.setattr(train_stage2, "train_step", asked_to_stop)
        main(cfg)
    assert names(Path(cfg.out)) == ["log.jsonl", "step_000001"]
    main(replace(cfg, steps=2))
    assert [line["step"] for line in logged(cfg) if "loss" in line] == [1, 2]


# ----------------------------------------------------------------- the start from stage 1


def test_init_is_the_newest_checkpoint_of_a_folder_or_the_one_named(tmp_path):
    for step in 2, 10:
        write_stage1(tmp_path / "runs" / f"step_{step:06d}")
    (tmp_path / "runs" / "step_000011").mkdir()  # half made
    newest, named = tmp_path / "runs" / "step_000010", tmp_path / "runs" / "step_000002"
    assert stage_one(str(tmp_path / "runs")) == newest and stage_one(str(named)) == named
    assert Config().init == train_stage1.Config().out
    assert PRESETS["smoke"].init == train_stage1.PRESETS["smoke"].out


def test_without_a_checkpoint_of_stage_1_there_is_one_line(cfg, tmp_path):
    with pytest.raises(UserError) as error:
        main(replace(cfg, init=str(tmp_path / "absent")))
    assert "absent: no checkpoint of stage 1. Run train_stage1.py with the same --preset" in str(error.value)
    assert "--init" in str(error.value) and "\n" not in str(error.value)
    assert not Path(cfg.out).exists()


def test_a_checkpoint_whose_weights_have_another_width_is_one_line(cfg, tmp_path):
    folder = write_stage1(tmp_path / "step_000001")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"unet_channels": [32] * 4}))
    with pytest.raises(UserError, match="cannot load AdcVSR weights") as error:
        main(replace(cfg, init=str(folder)))
    assert "\n" not in str(error.value) and not Path(cfg.out).exists()


KNOWN = {  # what a run of stage 1 was told of the data and the task
    "videos": "films", "images": "photos", "procedural": 0.25, "validation": "held_out", "frames": 13,
    "size": 256, "teacher": "DOVE", "teacher_cache": "", "adcsr": ("net.pkl", "half.ckpt"), "vae": "sd21",
    "dists": "none",
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_what_describes_data_and_task_is_stage_1s(tmp_path, capsys, preset):
    folder = write_stage1(tmp_path / "step_000001", KNOWN)
    cfg = configure(["--preset", preset, "--init", str(folder)])
    assert cfg == replace(PRESETS[preset], init=str(folder), **KNOWN)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"as in {folder}: ")
    for name, value in KNOWN.items():
        assert (f"{name} {value}" in line) == (value != getattr(PRESETS[preset], name))


def test_what_is_given_is_not_stage_1s_even_where_it_is_the_default(tmp_path, capsys):
    write_stage1(tmp_path / "step_000001", KNOWN)
    given = "--frames 25 --videos datasets/videos --teacher-cache here --adcsr --vae seeded".split()
    cfg = configure(["--init", str(tmp_path), *given])
    ours = {"frames": 25, "videos": "datasets/videos", "teacher_cache": "here", "adcsr": (), "vae": "seeded"}
    assert cfg == replace(Config(), init=str(tmp_path), **KNOWN | ours)
    line = capsys.readouterr().out
    assert "size 256" in line and "images photos" in line and not any(f"{name} " in line for name in ours)


def test_weights_alone_leave_the_presets_settings(cfg):
    """The shipped student: a folder without the settings of its run."""
    weights = str(ROOT / "weights" / "compact")
    assert configure(["--preset", "compact", "--init", weights]) == replace(PRESETS["compact"], init=weights)
    cfg = replace(cfg, init=weights, domains=("pixel",), lambda_feature=0.0, dists="none", batch=1, steps=1)
    main(cfg)
    assert type(load_student(Path(cfg.out) / "step_000001")) is CompactVSR


# ----------------------------------------------------------------- ablations


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache whose teacher is HR, and beside it `results`: another method's videos, HR in negative."""
    out = tmp_path_factory.mktemp("cached")
    smoke = replace(caches.PRESETS["smoke"], frames=2, size=64, clips=2, out=str(out / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        caches.main(replace(smoke, teacher="gt"))
    (out / "results").mkdir()
    for path in (out / "cache" / "hr").iterdir():
        write_clip(out / "results" / path.name, to_clip(255 - read_clip(path)))
    return out


def scored(kinds: str = " ".join(LABELS), heads: str = " ".join(HEADS), d: str = "pixel feature") -> set[str]:
    """Names of the scores of these discriminators, types and heads."""
    return {f"{a}/{b}/{c}" for a in d.split() for b in kinds.split() for c in heads.split()}


DETAIL_TYPES = "student image random_images"  # those that the detail head is asked about
APART = scored(DETAIL_TYPES, "detail", "pixel_detail feature_detail")
APART |= scored(heads="consistency", d="pixel_consistency feature_consistency")
ABLATIONS = {
    # Row of the paper: changes of the stage-1 student, of stage 2's settings, the scores that there are.
    "Table 2, 2D: no temporal blocks": ({"temporal": "none"}, {}, scored()),
    "Table 5, after each UNet block": ({"temporal": "block"}, {}, scored()),
    "Table 5, temporal convolutions doubled": ({"temporal_kind": "double"}, {}, scored()),
    "Table 5, temporal attention": ({"temporal_kind": "attention"}, {}, scored()),
    "Table 3, single head": ({}, {"labels": "single"}, scored()),
    "Table 3, single domain": ({}, {"domains": ("feature",)}, scored(d="feature")),
    "the other single domain": ({}, {"domains": ("pixel",)}, scored(d="pixel")),
    "Table 4, no adversarial losses": ({}, {"lambda_adv": 0.0}, set()),
    "Table 4, no teacher, cached": ({}, {"teacher_cache": "cache"}, scored()),
    "Table 4, another teacher": ({}, {"teacher": "results", "teacher_cache": "cache"}, scored()),
    "Table 6, 100/0 %": ({}, {"heads": (64, 0)}, scored(DETAIL_TYPES, "detail")),
    "Table 6, 50/50 %": ({}, {"heads": (32, 32)}, scored()),
    "Table 6, 25/75 %": ({}, {"heads": (16, 48)}, scored()),
    "Table 6, 0/100 %": ({}, {"heads": (0, 64)}, scored(heads="consistency")),
    "Table 7, no types 3 and 5": ({}, {"labels": "three_types"}, scored("student video image")),
    "Table 7, real videos as detail-real": ({}, {"labels": "detailed_video"}, scored()),
    "Table 7, teacher video for real video": ({}, {"real_video": "teacher"}, scored()),
    "Appendix B, separate discriminators": ({}, {"separate": True}, APART),
}


def test_every_row_of_the_readmes_table_is_a_command():
    """Its flags are ones that the named stage, or both, take, and they change something."""
    text = (ROOT / "README.md").read_text().split("row by row")[1].split("Not here:")[0]
    rows = [row.split("|")[1:3] for row in text.splitlines() if "`--" in row]
    assert len(rows) > 10
    for name, commands in rows:
        for flags in re.findall(r"`(--[^`]*)`", commands):
            stages = {"stage 1": train_stage1, "stage 2": train_stage2}
            named = [script for stage, script in stages.items() if stage in commands]
            for script in named or stages.values():  # "both stages"
                parsed = parse(script.PRESETS, "", flags.split())
                assert parsed != script.PRESETS["full"], (name, flags)


@pytest.mark.parametrize(("student", "changes", "scores"), ABLATIONS.values(), ids=ABLATIONS)
def test_every_row_of_the_ablations_is_one_setting(cfg, cache, tmp_path, student, changes, scores):
    if student:
        cfg = replace(cfg, init=str(write_stage1(tmp_path / "step_000001", **student)))
    changes = {k: str(cache / v) if v in ("cache", "results") else v for k, v in changes.items()}
    cfg = replace(cfg, **changes, steps=2, batch=1)
    main(cfg)
    lines = [line for line in logged(cfg) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    domains = {name.partition("/")[0].partition("_")[0] for name in scores}
    terms = {"loss", "pixel", "dists", "feature", "adv_pixel", "adv_feature"}
    terms |= {f"disc_{name.partition('/')[0]}" for name in scores}
    for line in lines:
        assert line.keys() == terms | scores | {"step", "lr", "steps_per_s", "data_wait", "gb"}
        none = {name for name in terms if line[name] <= 0}
        assert none == {f"adv_{d}" for d in {"pixel", "feature"} - domains}
    assert newest_checkpoint(cfg.out).name == "step_000002"


def test_another_teachers_results_are_what_the_student_is_compared_with(cfg, cache):
    """And, where they stand for real video, what the discriminators see."""
    cfg = replace(cfg, teacher_cache=str(cache / "cache"), steps=1, batch=2)
    main(replace(cfg, teacher="gt", out=cfg.out + "_gt"))
    main(replace(cfg, teacher=str(cache / "results"), real_video="teacher"))
    hr, negative = (logged(run)[0] for run in (replace(cfg, out=cfg.out + "_gt"), cfg))
    assert hr["pixel"] != negative["pixel"]
    assert hr["pixel/image/detail"] == negative["pixel/image/detail"]
    assert hr["pixel/video/detail"] != negative["pixel/video/detail"]


def test_doves_videos_are_the_target_and_may_be_the_real_videos(cfg, dove):  # noqa: F811
    """Table 4's own teacher, on the way, and Table 7's last row."""
    lines = {}
    for name, changes in {"gt": {}, "dove": {"teacher": str(dove), "real_video": "teacher"}}.items():
        run = replace(cfg, **changes, steps=1, batch=1, out=cfg.out + name)
        main(run)
        (lines[name],) = (line for line in logged(run) if "loss" in line)
    for same in "pixel/image/detail", "feature/random_images/detail", "pixel/student/detail":
        assert lines["gt"][same] == lines["dove"][same]
    for other in "pixel", "dists", "feature", "pixel/video/detail", "feature/shuffled_video/consistency":
        assert lines["gt"][other] != lines["dove"][other]


# ----------------------------------------------------------------- what a person sees


@pytest.mark.parametrize("flag", ["domains", "labels", "real-video", "dists"])
def test_another_word_than_those_there_are_is_refused_with_these(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        configure([f"--{flag}", "half"])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and f"invalid choice 'half' for argument '--{flag}'. Expected one of" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": (-4, 16)}, "--heads -4 16: give two numbers of channels"),
        ({"heads": (0, 0)}, "--heads 0 0: "),
        ({"procedural": 0.5, "videos": ".", "images": ""}, "clip types 4 and 5 of Eq. 5 are photos"),
        ({"lambda_feature": 0.0}, "--domains feature: give pixel alone, or a --lambda-feature above 0"),
        ({"backbone": "convnext_of_nobody"}, "--backbone convnext_of_nobody"),
        ({"frames": 1}, "2 frames to permute"),
        ({"micro_batch": 0}, "--micro-batch 0: give 1 or more"),
        ({"shift": 33}, "--shift 33: D_pixel needs 32 pixels of --size 64"),
        ({"shift": -1}, "--shift -1: "),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_bad_settings_are_one_line_before_any_work(cfg, changes, says, monkeypatch):
    if "procedural" not in changes and "frames" not in changes:  # datasets come after the networks
        monkeypatch.setattr(train_stage2, "load_teacher", lambda *_: pytest.fail("the teacher is large"))
    with pytest.raises(UserError) as error:
        main(replace(cfg, **changes))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not Path(cfg.out).exists()


def test_a_folder_without_photos_names_the_types_that_need_them(cfg, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.mp4").touch()
    folders = {"videos": str(tmp_path), "images": str(tmp_path / "empty")}
    with pytest.raises(UserError, match="clip types 4 and 5 of Eq. 5 are photos.*--procedural 1") as error:
        main(replace(cfg, procedural=0.5, **folders))
    assert str(tmp_path / "empty") in str(error.value) and "\n" not in str(error.value)


def test_a_student_of_another_width_than_adcsrs_decoder_is_one_line(cfg):
    with pytest.raises(UserError, match=r"features of 8 channels, AdcSR's have 256: .*--domains pixel"):
        main(replace(cfg, vae="sd21", adcsr=("net_params_200.pkl", "halfDecoder.ckpt")))


def test_a_student_without_features_has_no_feature_losses(cfg, tmp_path):
    folder = write_stage1(tmp_path / "step_000001", pixel_skip=True)
    with pytest.raises(UserError, match="--lambda-feature 0"):
        main(replace(cfg, init=str(folder)))


def test_scores_are_shown_by_type_detail_before_consistency(capsys):
    means = {"pixel/student/detail": -0.5, "pixel/student/consistency": 0.25, "loss": 1.0}
    means |= {"pixel/video/consistency": 2.0, "feature/image/detail": 0.25}
    print_scores(means, ["pixel", "feature"])
    assert capsys.readouterr().out.splitlines() == [
        "  D_pixel: student -0.50/+0.25  video +2.00",
        "  D_feature: image +0.25",
    ]


# ----------------------------------------------------------------- the command itself


def start(launcher: list[str], *args, cwd: Path | None = None) -> subprocess.Popen:
    """train_stage2.py as a process, on the CPU, with one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "train_stage2.py"), *map(str, args)]
    return subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


OFFLINE_ALONE = [sys.executable, "-c", OFFLINE]


def test_the_command_needs_no_network_and_says_what_is_missing(stage1, tmp_path):
    without = start(OFFLINE_ALONE, "--preset", "smoke", cwd=tmp_path)
    small = "--preset smoke --frames 2 --batch 1 --steps 1".split()
    out = finish(start(OFFLINE_ALONE, *small, "--init", stage1, cwd=tmp_path))
    assert "step 1/1" in out and "D_pixel: student " in out and "D_feature: student " in out
    said = without.communicate()[0].splitlines()
    assert without.returncode == 2 and len(said) == 1 and said[0].startswith("error: runs/smoke/stage1: no ")
    assert names(tmp_path / "runs" / "smoke" / "stage2") == ["log.jsonl", "pictures", "step_000001"]


@pytest.mark.slow
def test_smoke_follows_the_smoke_of_stage_1_in_an_empty_folder(tmp_path):
    one = subprocess.run(
        [*OFFLINE_ALONE, str(ROOT / "train_stage1.py"), "--preset", "smoke", "--steps", "2"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    assert "step 6/6" in finish(start(OFFLINE_ALONE, "--preset", "smoke", cwd=tmp_path))
    assert names(tmp_path) == ["runs"]
    made = names(tmp_path / PRESETS["smoke"].out)
    assert made == ["log.jsonl", "pictures", "step_000003", "step_000006"]


@pytest.mark.slow
def test_two_processes_of_torchrun_resume_exactly(stage1, tmp_path):
    command = [*"--preset smoke --frames 2 --every 1".split()]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for out, steps in ((straight, 2), (resumed, 1), (resumed, 2)):
        said = finish(start(TOGETHER, *command, "--init", stage1, "--steps", steps, "--out", out))
        assert said.count("2 x cpu") == 1 and said.count("D_feature: student") == (
            2 if out == straight else 1
        )
    assert_same_run(straight / "step_000002", resumed / "step_000002")


@pytest.mark.slow
def test_kill_9_while_saving_and_the_same_command_equal_the_straight_run(stage1, tmp_path):
    command = [*"--preset smoke --frames 2 --steps 4 --every 1 --init".split(), stage1, "--out"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(start(ALONE, *command, straight))
    process = start(ALONE, *command, killed)
    half_way_through(process, killed, step=3)
    process.kill()
    process.communicate()
    last = int(newest_checkpoint(killed).name[5:])
    assert f"at step {last} of 4" in finish(start(ALONE, *command, killed))
    assert names(killed) == names(straight)  # nor is anything half-made left
    assert_same_run(straight / "step_000004", killed / "step_000004")
