"""Stage 2: two discriminators, two heads each, push the student to details and consistency (paper Sec. 3.3,
Appendix A, Algorithm 1; Eq. 1-5).

    clip_lr --student--> x_S --- L1, DISTS --- x_T                                          Eq. 2
                 |        '-- D_pixel ---> softplus(-D)
                 '-----> f_S --- L1 --- f_T                                                 Eq. 3
                          '-- D_feature -> softplus(-D)
    x_S, video, video*, image, image* and their features --> D_pixel, D_feature, labels --> Eq. 4, 5

    torchrun --nproc_per_node=8 train_stage2.py             the paper's recipe, after train_stage1.py
    python train_stage2.py --preset compact --videos FOLDER --images FOLDER     two CPU cores
    python train_stage2.py --preset smoke                   the whole path, a minute, after stage 1's smoke

The same command again resumes; Ctrl-C saves first; --dry-run says what it costs.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from os import environ
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpgan
from cache import training_clips
from compact import load_anchors, load_student
from data import Data, held_out_clips, loader, micro_batches, to_inputs
from discriminators import (
    BACKBONE,
    HEADS,
    LABELS,
    FeatureDiscriminator,
    PixelDiscriminator,
    learn,
    student_loss,
)
from metrics import validate
from model import Student
from perceptual import dists_loss, load_dists
from runtime import UserError, init_world, run
from teacher import Teacher, load_encoder, load_teacher
from training import Run, Settings, newest_checkpoint, parse, presets, read_training_state, require_positive

# ------------------------------------------------------------------------------------------------------
# Settings: the defaults are the paper's
# fmt: off


@dataclass(frozen=True)
class Config(Settings, Teacher, Data):
    out: str = "runs/stage2"                # folder of checkpoints, log and pictures
    init: str = "runs/stage1"               # stage 1's checkpoint, or the folder of them: the newest
    domains: tuple[Literal["pixel", "feature"], ...] = ("pixel", "feature")  # where D judges  Paper: Table 3
    heads: tuple[int, int] = HEADS          # channels for detail and for consistency          Paper: Table 6
    separate: bool = False                  # a discriminator for each head, which collapses   Paper: App. B
    labels: Literal["full", "single", "three_types", "detailed_video"] = "full"  # Eq. 5; Paper: Tables 3, 7
    real_video: Literal["data", "teacher"] = "data"  # what counts as real video               Paper: Table 7
    backbone: str = BACKBONE                # ConvNeXt of D_pixel: a timm name, or tiny
    shift: int = 0                          # rows and columns, up to this many, that D_pixel's clips lose
    dists: Literal["pretrained", "seeded", "efficientnet_lite0", "none"] = "pretrained"        # Paper: Eq. 2
    lr: float = 1e-5                        # Adam, halved after each of halve_at              Paper: Sec. 4.1
    halve_at: tuple[int, ...] = (100_000,)  # steps                                            Paper: Sec. 4.1
    lr_disc: float = 1e-7                   # the discriminators', constant                    Paper: Sec. 4.1
    head_start: int = 0                     # first steps, in which the discriminators alone learn
    lambda_pixel: float = 0.1               # weight of the pixel losses                       Paper: Eq. 1
    lambda_feature: float = 1.0             # weight of the feature losses                     Paper: Eq. 1
    lambda_adv: float = 1.0                 # weight of the adversarial losses in both         Paper: Eq. 2, 3
    gan: Literal["softplus", "rpgan"] = "softplus"  # Eq. 2-4 as printed, or with SeedVR2's losses in them
    lambda_r: float = 1000.0                # rpgan: weight of aR1 and aR2               SeedVR2 Sec. 3.3
    sigma: float = 0.1                      # rpgan: of their noise, on clips and on features         APT
    lambda_fm: float = 0.1                  # rpgan: of feature matching, inside lambda_adv   SeedVR2 Sec. 4.2
    lambda_dists: float = 1.0               # of DISTS, or what stands in for it, in Eq. 2
    lambda_2d: float = 0.0                  # compact: of the same towards its 2D network, in Eq. 2
    lambda_warp: float = 0.0                # compact: of the flicker along HR's motion, in Eq. 2


LIGHT, LITE = "convnext_base.clip_laion2b", "efficientnet_lite0"  # for a small card, for a CPU
PRESETS = presets(Config, {  # what they change; None leaves the paper's value
    "preset":         ("24gb",    "compact",     "tiny",       "smoke"),
    "init":           (None,      None,          None,         "runs/smoke/stage1"),
    # Choice: tiny's recipe is ours. At 1e-7, discriminators that start from nothing would hardly move.
    # Through a random backbone they ask for more than a small student can do: at lambda_adv = 1 it answers
    # with noise.
    "domains":        (None,      ("pixel",),    ("pixel",),   None),
    "heads":          (None,      None,          (48, 16),     (48, 16)),
    "backbone":       (LIGHT,     LITE,          "tiny",       "tiny"),
    # smoke: odd maps are not bit for bit the same in bfloat16
    "shift":          (None,      7,             7,            None),
    "teacher":        (None,      "gt",          "gt",         "gt"),
    "teacher_cache":  ("cache",   "tiny_cache",  "tiny_cache", None),
    "vae":            (None,      None,          None,         "seeded"),
    "dists":          (None,      LITE,          "none",       "seeded"),
    "lambda_feature": (None,      0.0,           0.0,          None),
    "lambda_dists":   (None,      0.4,           None,         None),
    "lambda_2d":      (None,      0.12,          None,         None),
    "lambda_warp":    (None,      0.5,           None,         None),
    "lambda_adv":     (None,      0.01,          0.01,         None),
    "lr":             (None,      3e-5,          None,         None),
    "lr_disc":        (None,      5e-4,          1e-3,         1e-3),
    "head_start":     (None,      100,           None,         None),
    "halve_at":       (None,      (300,),        (1600,),      ()),
    "procedural":     (None,      0.1,           0.1,          1.0),
    "frames":         (None,      6,             6,            4),
    "size":           (None,      128,           160,          64),
    "batch":          (None,      1,             2,            2),
    "steps":          (None,      1000,          2000,         6),
    "checkpointing":  (None,      "none",        "none",       None),
    "every":          (None,      200,           200,          3),
    "workers":        (None,      1,             2,            0),
    "out":            (None,      None,          None,         "runs/smoke/stage2"),
})
# fmt: on

GANS = {"softplus": (student_loss, learn), "rpgan": (rpgan.student_loss, rpgan.learn)}
# What describes the data and the task: as in stage 1, unless given.
INHERITED = "videos images procedural validation frames size teacher teacher_cache adcsr vae dists".split()
LOOKS = 8  # held-out clips that are looked at

# ------------------------------------------------------------------------------------------------------
# One step


def train_step(
    batch, student, teacher, encoder, dists, discriminators, optimisers, world, cfg, anchors=None
) -> dict[str, Tensor]:
    """One update of the student, then one of the discriminators. Paper: Algorithm 1, stage 2; Eq. 1-5.

    batch, teacher, encoder, dists, anchors: as in stage 1, and in the clips what `five_clips` takes;
    discriminators: name -> D; optimisers: the student's, the discriminators'. Returns the losses and scores
    by name.
    """
    losses, total = defaultdict(float), sum(len(clips["lr"]) for clips in batch)
    student_loss, learn = GANS[cfg.gan]
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    for clips in map(to_inputs, batch):
        share, judged = len(clips["lr"]) / total, {}
        # The student's half: judged by discriminators that hold still.
        discriminators.requires_grad_(False)
        x_t = teacher(clips["lr"], clips["index"]) if teacher else clips.get("target", clips["hr"])
        if cfg.real_video == "teacher":
            clips["video"] = x_t  # Paper: Table 7
        with world.autocast():
            f_t = encoder(x_t) if encoder else None
            x_s, f_s = student(clips["lr"], return_features=True)

            pixel = F.l1_loss(x_s, x_t)
            perceptual = dists_loss(dists, x_s, x_t) if dists else torch.zeros_like(pixel)
            feature = F.l1_loss(f_s, f_t) if encoder else torch.zeros_like(pixel)
            adv = {"pixel": torch.zeros_like(pixel), "feature": torch.zeros_like(pixel)}
            for name, d in discriminators.items():
                own, target = (x_s, x_t) if d.domain == "pixel" else (f_s, f_t)
                pull, judged[name] = student_loss(d, own, target, clips, encoder, cfg)
                adv[d.domain] = adv[d.domain] + pull
            also = anchors(x_s, clips) if anchors else torch.zeros_like(pixel)
            l_pixel = pixel + cfg.lambda_dists * perceptual + also
            l_pixel = l_pixel + cfg.lambda_adv * adv["pixel"]  # Paper: Eq. 2
            l_feature = feature + cfg.lambda_adv * adv["feature"]  # Paper: Eq. 3
            loss = cfg.lambda_pixel * l_pixel + cfg.lambda_feature * l_feature  # Paper: Eq. 1
        (share * loss).backward()
        terms = {"loss": loss, "pixel": pixel, "dists": perceptual, "feature": feature}
        terms |= {f"adv_{domain}": value for domain, value in adv.items()}
        terms |= {"anchors": also} if anchors else {}

        # The discriminators' half.
        discriminators.requires_grad_(True)
        for name, d in discriminators.items():
            terms |= learn(name, d, judged.pop(name), share, world.autocast, cfg)  # Paper: Eq. 4, 5
        for name, value in terms.items():
            losses[name] += share * value.detach()
    world.average_gradients([*student.parameters(), *discriminators.parameters()])
    for optimiser in optimisers:
        optimiser.step()
    return losses


def learning_rate(step: int, cfg: Config) -> float:
    """The student's rate for update number `step` (from 1): 0 for `head_start` steps, then halved after each
    of the steps `halve_at`."""
    # Choice: at the paper's rates a large trained judge needs none. A small student fools a new small judge
    # within a hundred steps, by a grid of dots.
    return 0.0 if step <= cfg.head_start else cfg.lr * 0.5 ** sum(step > at for at in cfg.halve_at)


def print_scores(means: dict[str, float], discriminators) -> None:
    """Mean score, detail / consistency, of each type of clip, or RpGAN's margin: which head of which
    discriminator wins."""
    for name in discriminators:
        shown = []
        for kind in (*LABELS, rpgan.MARGIN):
            keys = [f"{name}/{kind}/{head}" for head in ("detail", "consistency")]
            scores = "/".join(f"{means[key]:+.2f}" for key in keys if key in means)
            shown += [f"{kind} {scores}"] * bool(scores)
        print(f"  D_{name}: " + "  ".join(shown), flush=True)


# ------------------------------------------------------------------------------------------------------
# The run


def stage_one(init: str) -> Path:
    """The checkpoint of stage 1 that `init` means."""
    folder = newest_checkpoint(init) or Path(init)
    if not (folder / "model.safetensors").is_file():
        way_out = "Run train_stage1.py with the same --preset first, or name one with --init."
        raise UserError(f"{init}: no checkpoint of stage 1. {way_out}")
    return folder


def configure(argv: list[str] | None = None) -> Config:
    """The command line's settings; what it leaves open of the data and the task is as it was in stage 1."""
    cfg = parse(PRESETS, __doc__, argv)
    folder = stage_one(cfg.init)
    if not (folder / "train.pt").is_file():  # weights alone, as the shipped ones
        return cfg
    saved = read_training_state(folder, mmap=True)["config"]  # mapped: the gigabytes are of no use here
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in INHERITED}
    # Stage 1's values take the place of the presets' own, so that a flag, whatever its value, still wins.
    inherited = parse({name: replace(preset, **saved) for name, preset in PRESETS.items()}, __doc__, argv)
    taken = [f"{k} {getattr(inherited, k)}" for k in INHERITED if getattr(inherited, k) != getattr(cfg, k)]
    if taken and environ.get("RANK", "0") == "0":
        print(f"as in {folder}: {', '.join(taken)}", flush=True)
    return inherited


def check(cfg: Config) -> None:
    """`UserError` for settings that do not go together, before anything large is loaded."""
    require_positive(cfg, "frames size batch micro_batch every")
    if min(cfg.heads) < 0 or not any(cfg.heads):
        raise UserError(f"--heads {cfg.heads[0]} {cfg.heads[1]}: give two numbers of channels")
    if "feature" in cfg.domains and cfg.lambda_adv and not cfg.lambda_feature:
        raise UserError("--domains feature: give pixel alone, or a --lambda-feature above 0")
    if "pixel" in cfg.domains and not 0 <= cfg.shift <= cfg.size - PixelDiscriminator.SMALLEST:
        left = f"D_pixel needs {PixelDiscriminator.SMALLEST} pixels of --size {cfg.size}"
        raise UserError(f"--shift {cfg.shift}: {left}")


def new_discriminators(cfg: Config, student: Student) -> nn.ModuleDict:
    """name -> discriminator, by domain; with --separate one for each head, which collapses (Appendix B)."""
    heads, width = {"": cfg.heads}, sum(cfg.heads)
    if cfg.separate:  # Choice: both as wide, and as heavy in the losses, as the dual-head one
        heads = {"_detail": (width, 0), "_consistency": (0, width)}
    discriminators = nn.ModuleDict()
    for domain in cfg.domains if cfg.lambda_adv else ():
        for suffix, split in heads.items():
            if domain == "pixel":
                shape = {"checkpointing": cfg.checkpointing != "none", "shift": cfg.shift}
                d = PixelDiscriminator.from_pretrained(cfg.backbone, heads=split, **shape)
            else:
                d = FeatureDiscriminator(student.unet, heads=split, checkpointing=cfg.checkpointing == "all")
            discriminators[domain + suffix] = d
    return discriminators


def main(cfg: Config) -> None:
    # world
    check(cfg)
    world, cfg = init_world(), replace(cfg, init=str(stage_one(cfg.init)))
    torch.manual_seed(cfg.seed)
    # networks
    student = load_student(cfg.init)
    discriminators = new_discriminators(cfg, student)  # with the UNet of stage 1
    encoder, dists = load_encoder(cfg, student), load_dists(cfg.dists)
    anchors = load_anchors(cfg, dists)
    teacher = None if cfg.teacher_cache else load_teacher(cfg.teacher, world.device, seed=cfg.seed)
    student, dists, anchors = (net and net.to(world.device) for net in (student, dists, anchors))
    encoder = encoder and world.place_frozen(encoder)
    discriminators.to(world.device)
    if world.device.type == "cuda":  # on a CPU autocast alone
        for d in discriminators.values():
            world.place_frozen(d.backbone)
    student.for_training(cfg.checkpointing, world.device)
    optimiser = torch.optim.Adam(student.parameters(), lr=cfg.lr, fused=world.fused)
    groups = [{"params": discriminators.parameters()}]
    optimiser_disc = torch.optim.Adam(groups, lr=cfg.lr_disc, fused=world.fused)
    # data
    samples = training_clips(cfg, stage=2, real_types=len(discriminators) > 0)
    held_out = held_out_clips(cfg, LOOKS) if world.is_main else []  # one process validates
    # loop
    others = {"discriminators": discriminators, "optimiser_disc": optimiser_disc}
    training, optimisers = Run(cfg, world, student, optimiser, **others), (optimiser, optimiser_disc)
    for step, batch in training.steps(lambda done: loader(samples, done, cfg, world)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, cfg)
        parts = micro_batches(batch, cfg.micro_batch, world.device)
        judges = (discriminators, optimisers, world, cfg, anchors)
        losses = train_step(parts, student, teacher, encoder, dists, *judges)
        means = training.log(losses)
        if means and world.is_main:
            print_scores(means, discriminators)
        if held_out and training.due:
            training.note(**validate(student, teacher, held_out, training.out / "pictures", step))


if __name__ == "__main__":
    run(lambda: main(configure()))
