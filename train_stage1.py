"""Stage 1: the student learns the teacher's videos by regression (paper Sec. 3.3, Appendix A, Algorithm 1).

    clip_hr --degrade--> clip_lr --student--> x_S -------------------- L1, DISTS ---- x_T    Eq. 2
                            |          '----> f_S -------- L1 -------- f_T             |    Eq. 3
                            |                                           '-- encoder ---|
                            '--teacher (DOVE, once and cached, or on the way) ---------'

    torchrun --nproc_per_node=8 train_stage1.py --teacher PATH_TO_DOVE      the paper's recipe
    python train_stage1.py --preset compact --videos FOLDER --images FOLDER two CPU cores, after
             python cache.py --preset tiny --videos FOLDER --images FOLDER
    python train_stage1.py --preset smoke                                   the whole path, a minute, no files

The same command again resumes; Ctrl-C saves first; --dry-run says what it costs.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import model
from cache import training_clips
from compact import CompactVSR, load_anchors
from data import Data, held_out_clips, loader, micro_batches, to_inputs
from metrics import validate
from model import AdcVSR, Student, TemporalAttention, TemporalBlock
from perceptual import dists_loss, load_dists
from pretrained import adcsr_files, from_adcsr
from runtime import UserError, init_world, run
from teacher import Teacher, load_encoder, load_teacher
from training import Run, Settings, parse, presets, require_positive

# ------------------------------------------------------------------------------------------------------
# Settings: the defaults are the paper's
# fmt: off


@dataclass(frozen=True)
class Config(Settings, Teacher, Data):
    out: str = "runs/stage1"                # folder of checkpoints, log and pictures
    student: Literal["full", "tiny", "compact"] = "full"  # full begins as AdcSR, compact as Real-ESRGAN
    temporal: Literal["layer", "block", "none", "double", "attention"] = "layer"  # 1D blocks  Paper: Table 5
    pixel_skip: bool = False                # add the bicubic x4 of the input to the output
    dists: Literal["pretrained", "seeded", "efficientnet_lite0", "none"] = "pretrained"        # Paper: Eq. 2
    lr: float = 1e-4                        # Adam, halved after each of halve_at              Paper: Sec. 4.1
    halve_at: tuple[int, ...] = (100_000,)  # steps                                            Paper: Sec. 4.1
    lr_2d: float = 1.0                      # the rate of all but temporal blocks, as a share of lr
    lambda_pixel: float = 0.1               # weight of the pixel losses                       Paper: Eq. 1
    lambda_feature: float = 1.0             # weight of the feature losses                     Paper: Eq. 1
    lambda_dists: float = 1.0               # of DISTS, or what stands in for it, in Eq. 2
    lambda_2d: float = 0.0                  # compact: of the same towards its 2D network, in Eq. 2
    lambda_warp: float = 0.0                # compact: of the flicker along HR's motion, in Eq. 2


LITE = "efficientnet_lite0"
PRESETS = presets(Config, {  # what they change; None leaves the paper's value
    "preset":         ("24gb",   "compact",     "tiny",        "smoke"),
    # Choice: tiny's recipe is ours; the paper has none for a network that starts from nothing on two CPU
    # cores, which a cache of clips keeps busy. Its pixel skip leaves no room for feature targets, and DISTS
    # needs a trained VGG: it learns by L1 alone.
    "student":        (None,     "compact",     "tiny",        "tiny"),
    "adcsr":          (None,     (),            (),            ()),
    "pixel_skip":     (None,     None,          True,          None),
    "teacher":        (None,     "gt",          "gt",          "gt"),
    # 24gb: the teacher's 11.6 GB stay out of the card
    "teacher_cache":  ("cache",  "tiny_cache",  "tiny_cache",  None),
    "vae":            (None,     None,          None,          "seeded"),
    "dists":          (None,     LITE,          "none",        "seeded"),
    "lambda_feature": (None,     0.0,           0.0,           None),
    # the new blocks learn fast and the pretrained network slowly, sharp and steady by two terms of their own
    "lr_2d":          (None,     0.1,           None,         None),
    "lambda_dists":   (None,     0.4,           None,         None),
    "lambda_2d":      (None,     0.12,          None,         None),
    "lambda_warp":    (None,     0.5,           None,         None),
    "procedural":     (None,     0.1,           0.1,           1.0),
    "frames":         (None,     6,             6,             4),
    "size":           (None,     128,           192,           64),
    "batch":          (None,     1,             6,             2),
    "micro_batch":    (None,     None,          6,             None),
    "steps":          (None,     4000,          4200,          12),
    "lr":             (None,     5e-4,          3e-4,          3e-4),
    "halve_at":       (None,     (2400, 3200, 3600), (3060, 3450, 3750, 3950, 4070, 4150), ()),
    "checkpointing":  (None,     "none",        "none",        None),
    "every":          (None,     200,           200,           6),
    "workers":        (None,     1,             2,             0),
    "out":            (None,     None,          None,          "runs/smoke/stage1"),
})
# fmt: on

LOOKS = 8  # held-out clips that are looked at

# ------------------------------------------------------------------------------------------------------
# One step


def train_step(
    batch, student, teacher, encoder, dists, optimiser, world, cfg, anchors=None
) -> dict[str, Tensor]:
    """One update of the student. Paper: Algorithm 1, stage 1; Eq. 1-3 without the adversarial terms.

    batch: micro-batches of clips: lr (b t 3 h w), hr, index and, from a cache, target (b t 3 4h 4w);
    teacher: x_L, index -> x_T; encoder: x -> f; dists: (x, x) -> (); anchors: compact's; each may be None.
    Returns the losses by name, means over the clips of all micro-batches.
    """
    losses, total = defaultdict(float), sum(len(clips["lr"]) for clips in batch)
    optimiser.zero_grad(set_to_none=True)
    for clips in map(to_inputs, batch):
        share = len(clips["lr"]) / total
        x_t = teacher(clips["lr"], clips["index"]) if teacher else clips.get("target", clips["hr"])
        with world.autocast():
            f_t = encoder(x_t) if encoder else None
            x_s, f_s = student(clips["lr"], return_features=True)

            pixel = F.l1_loss(x_s, x_t)  # Paper: Eq. 2
            perceptual = dists_loss(dists, x_s, x_t) if dists else torch.zeros_like(pixel)
            feature = F.l1_loss(f_s, f_t) if encoder else torch.zeros_like(pixel)  # Paper: Eq. 3
            also = anchors(x_s, clips) if anchors else torch.zeros_like(pixel)
            l_pixel = pixel + cfg.lambda_dists * perceptual + also
            loss = cfg.lambda_pixel * l_pixel + cfg.lambda_feature * feature  # Paper: Eq. 1
        (share * loss).backward()
        terms = {"loss": loss, "pixel": pixel, "dists": perceptual, "feature": feature}
        terms |= {"anchors": also} if anchors else {}
        for name, value in terms.items():
            losses[name] += share * value.detach()
    world.average_gradients(student.parameters())
    optimiser.step()
    return losses


def by_rate(student: Student, lr_2d: float) -> list[dict]:
    """Adam's groups: the temporal blocks, and all other weights at `lr_2d` of their rate."""
    blocks = [m for m in student.modules() if isinstance(m, (TemporalBlock, TemporalAttention))]
    temporal = [p for block in blocks for p in block.parameters()]
    new = set(map(id, temporal))
    pretrained = [p for p in student.parameters() if id(p) not in new]
    groups = {"params": temporal, "share": 1.0}, {"params": pretrained, "share": lr_2d}
    return [group for group in groups if group["params"]]


def learning_rate(step: int, cfg: Config) -> float:
    """The rate of update number `step` (from 1): halved after each of the steps `halve_at`."""
    return cfg.lr * 0.5 ** sum(step > at for at in cfg.halve_at)


# ------------------------------------------------------------------------------------------------------
# The run


def new_student(cfg: Config) -> Student:
    """The student before training: a 2D network augmented with temporal blocks, or at random weights."""
    if cfg.student == "compact":
        if cfg.temporal == "block":
            raise UserError("--temporal block: compact has no blocks. Give layer, none, double or attention.")
        kind = "conv" if cfg.temporal == "layer" else cfg.temporal
        return CompactVSR.from_realesrgan(temporal_kind=kind)
    kind = "temporal_kind" if cfg.temporal in ("double", "attention") else "temporal"
    changes = {kind: cfg.temporal, "pixel_skip": cfg.pixel_skip}
    if cfg.adcsr:
        return from_adcsr(*adcsr_files(cfg.adcsr), **changes)
    return AdcVSR(**model.PRESETS[cfg.student] | changes)


def main(cfg: Config) -> None:
    # world
    require_positive(cfg, "frames size batch micro_batch every")
    world = init_world()
    torch.manual_seed(cfg.seed)
    # networks
    student = new_student(cfg)
    encoder, dists = load_encoder(cfg, student), load_dists(cfg.dists)
    anchors = load_anchors(cfg, dists)
    teacher = None if cfg.teacher_cache else load_teacher(cfg.teacher, world.device, seed=cfg.seed)
    nets = (student, dists, anchors)
    student, dists, anchors = (net and net.to(world.device) for net in nets)
    encoder = encoder and world.place_frozen(encoder)
    student.for_training(cfg.checkpointing, world.device)
    optimiser = torch.optim.Adam(by_rate(student, cfg.lr_2d), fused=world.fused)
    # data
    samples = training_clips(cfg, stage=1)
    held_out = held_out_clips(cfg, LOOKS) if world.is_main else []  # one process validates
    # loop
    training = Run(cfg, world, student, optimiser)
    for step, batch in training.steps(lambda done: loader(samples, done, cfg, world)):
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * learning_rate(step, cfg)
        parts = micro_batches(batch, cfg.micro_batch, world.device)
        training.log(train_step(parts, student, teacher, encoder, dists, optimiser, world, cfg, anchors))
        if held_out and training.due:
            training.note(**validate(student, teacher, held_out, training.out / "pictures", step))


if __name__ == "__main__":
    run(lambda: main(parse(PRESETS, __doc__)))
