"""Stage 1: the student learns the teacher's videos by regression (paper Sec. 3.3, Appendix A, Algorithm 1).

    clip_hr --degrade--> clip_lr --student--> x_S -------------------- L1, DISTS ---- x_T    Eq. 2
                            |          '----> f_S -------- L1 -------- f_T             |    Eq. 3
                            |                                           '-- encoder ---|
                            '--teacher (DOVE, once and cached, or on the way) ---------'

    torchrun --nproc_per_node=8 train_stage1.py --teacher PATH_TO_DOVE \\
             --adcsr net_params_200.pkl halfDecoder.ckpt                    the paper's recipe
    python train_stage1.py --preset tiny --videos FOLDER --images FOLDER    trains the weights in weights/tiny
    python train_stage1.py --preset smoke                                   the whole path, a minute, no files

The same command again resumes; Ctrl-C saves first; --dry-run says what it costs.
"""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import model
from data import fixed_clips, loader, micro_batches, to_inputs
from metrics import dists_loss, load_dists, validate
from model import AdcVSR
from runtime import (
    Log,
    Meter,
    StopSignal,
    UserError,
    World,
    count_flops,
    init_world,
    load_training_state,
    newest_checkpoint,
    parse_config,
    print_cost,
    print_step,
    require_positive,
    run,
    save_checkpoint,
    setting,
)
from teacher import VAE, load_encoder, load_teacher, training_clips

# ------------------------------------------------------------------------------------------------------
# Config: the defaults are the paper's


@dataclass(frozen=True)
class Config:
    student: str = setting("full", "the network: a preset of model.py")
    temporal: str = setting("layer", "temporal blocks: layer, block or none (Table 5)")
    temporal_kind: str = setting("conv", "conv, double or attention (Table 5)")
    pixel_skip: bool = setting(False, "add the bicubic x4 of the input to the output")
    adcsr: tuple[str, ...] = setting(
        ("weights/net_params_200.pkl", "weights/halfDecoder.ckpt"), "AdcSR's two files, the 2D start"
    )
    trust_pickle: bool = setting(False, "allow Python objects in AdcSR's files")
    teacher: str = setting("weights/DOVE", "a DOVE folder, gt (HR itself), or a folder of another's results")
    prompt_embedding: str = setting("", "DOVE's empty prompt, where it is not beside the DOVE folder")
    teacher_cache: str = setting("", "clips and teacher videos made before by teacher.py")
    vae: str = setting(VAE, "SD2.1's VAE, for the feature targets: a folder, a hub id, or seeded")
    dists: str = setting("pretrained", "DISTS: pretrained, seeded (no download) or none")
    videos: str = setting("datasets/videos", "training videos: a folder, a list file, OpenVid-1M's CSV")
    images: str = setting("datasets/images", "training photos: a folder, a list file")
    procedural: float = setting(0.0, "share of clips from the procedural world")
    degradation: str = setting("realbasicvsr", "realbasicvsr or dove")
    sharpen: bool = setting(False, "unsharp-masked HR, as RealBasicVSR trains with")
    stride: int = setting(1, "source frames from one frame of a clip to the next")
    frames: int = setting(25, "clip length t                                     Paper: Sec. 4.1")
    size: int = setting(512, "side of the HR crop in pixels                      Paper: Sec. 4.1")
    batch: int = setting(8, "clips a step, over all processes                    Paper: Sec. 4.1")
    micro_batch: int = setting(1, "clips at a time through a process's networks, gradients accumulated")
    pool: int = setting(0, "clips made once, of which the batches are random pieces; 0: every clip new")
    pool_frames: int = setting(12, "frames of a clip in the pool")
    pool_size: int = setting(256, "side of a clip in the pool")
    overfit: int = setting(0, "train on this many clips again and again, to see the loss fall; 0: off")
    steps: int = setting(200_000, "optimiser steps                               Paper: Sec. 4.1")
    lr: float = setting(1e-4, "Adam's learning rate                              Paper: Sec. 4.1")
    halve_at: tuple[int, ...] = setting((100_000,), "steps after which it halves  Paper: Sec. 4.1")
    lambda_pixel: float = setting(0.1, "weight of the pixel losses               Paper: Eq. 1")
    lambda_feature: float = setting(1.0, "weight of the feature losses           Paper: Eq. 1")
    seed: int = setting(0, "seed of the initial weights and of the data")
    checkpointing: bool = setting(True, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile each resnet and transformer block")
    out: str = setting("runs/stage1", "folder of checkpoints, log and pictures")
    save_every: int = setting(1000, "steps between checkpoints")
    keep: int = setting(3, "checkpoints kept")
    log_every: int = setting(10, "steps between two lines of the log")
    validate_every: int = setting(1000, "steps between validations, with pictures, on held-out clips")
    validation_clips: int = setting(8, "held-out clips looked at")
    workers: int = setting(8, "processes that load data, for each training process")
    dry_run: bool = setting(False, "build everything, do one step, say what training costs, and stop")


MAY_CHANGE = frozenset(  # settings that a resumed run may change: they leave the weights as they are
    """steps out save_every keep log_every validate_every validation_clips workers checkpointing compile
    dry_run trust_pickle""".split()
)

# Choice: tiny's recipe is ours; the paper has none for a network that starts from nothing on two CPU cores.
# Its pixel skip leaves no room for feature targets, and DISTS needs a trained VGG: it learns by L1 alone.
TINY = Config(
    student="tiny", pixel_skip=True, adcsr=(), teacher="gt", dists="none", lambda_feature=0.0, procedural=0.1,
    frames=6, size=192, batch=6, micro_batch=6, pool=1200, steps=4200, lr=3e-4,
    halve_at=(3060, 3450, 3750, 3950, 4070, 4150), checkpointing=False, save_every=200, validate_every=400,
    workers=2,
)  # fmt: skip
PRESETS = {
    "full": Config(),
    "24gb": Config(teacher_cache="cache"),  # one card of 24 GB: the teacher's 11.6 GB stay out of it
    "tiny": TINY,
    "smoke": replace(
        TINY, pixel_skip=False, vae="seeded", dists="seeded", lambda_feature=1.0, procedural=1.0, frames=4,
        size=64, batch=2, micro_batch=1, pool=0, steps=12, halve_at=(), checkpointing=True,
        out="runs/smoke/stage1", save_every=6, log_every=2, validate_every=12, validation_clips=2, workers=0,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------
# One step


def train_step(batch, student, teacher, encoder, dists, optimiser, world, cfg) -> dict[str, Tensor]:
    """One update of the student. Paper: Algorithm 1, stage 1; Eq. 1-3 without the adversarial terms.

    batch: micro-batches of clips: lr (b t 3 h w), hr and, from a cache, target (b t 3 4h 4w);
    teacher: x_L -> x_T; encoder: x -> f; dists: (x, x) -> (); each may be None. Returns the losses by name.
    """
    optimiser.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for clips in batch:
        clips = to_inputs(clips)
        x_t = teacher(clips["lr"]) if teacher else clips.get("target", clips["hr"])
        with torch.autocast(world.device.type, torch.bfloat16):
            f_t = encoder(x_t) if encoder else None
            x_s, f_s = student(clips["lr"], return_features=True)

            pixel = F.l1_loss(x_s, x_t)  # Paper: Eq. 2
            perceptual = dists_loss(dists, x_s, x_t) if dists else torch.zeros_like(pixel)
            feature = F.l1_loss(f_s, f_t) if encoder else torch.zeros_like(pixel)  # Paper: Eq. 3
            loss = cfg.lambda_pixel * (pixel + perceptual) + cfg.lambda_feature * feature  # Paper: Eq. 1
        (loss / len(batch)).backward()
        losses = {"loss": loss, "pixel": pixel, "dists": perceptual, "feature": feature}
        totals = {name: totals.get(name, 0) + value.detach() / len(batch) for name, value in losses.items()}
    world.average_gradients(student.parameters())
    optimiser.step()
    return totals


def learning_rate(step: int, cfg: Config) -> float:
    """The rate of update number `step` (from 1): halved after each of the steps `halve_at`."""
    return cfg.lr * 0.5 ** sum(step > at for at in cfg.halve_at)


# ------------------------------------------------------------------------------------------------------
# The run


def new_student(cfg: Config) -> AdcVSR:
    """The student before training: AdcSR augmented with temporal blocks, or tiny at random weights."""
    changes = {k: getattr(cfg, k) for k in ("temporal", "temporal_kind", "pixel_skip")}
    if cfg.adcsr:
        return AdcVSR.from_adcsr(*cfg.adcsr, trust_pickle=cfg.trust_pickle, **changes)
    return AdcVSR(**model.PRESETS[cfg.student] | changes)


def cost(cfg: Config, student, encoder, dists) -> float:
    """TFLOP for a clip and step: `train_step` itself on shapes alone, one frame of them; the teacher's not
    counted."""
    student, encoder, dists = (net and deepcopy(net).to("meta") for net in (student, encoder, dists))
    side = cfg.size // model.SCALE
    clips = {"lr": torch.empty(1, 1, 3, side, side, device="meta")}
    clips["hr"] = torch.empty(1, 1, 3, cfg.size, cfg.size, device="meta")
    here, still = World(0, 1, torch.device("cpu")), torch.optim.SGD(student.parameters(), lr=0.0)
    return cfg.frames * count_flops(
        lambda: train_step([clips], student, None, encoder, dists, still, here, cfg)
    )


def main(cfg: Config) -> None:
    # world
    require_positive(cfg, "frames size batch micro_batch save_every log_every validate_every")
    world = init_world()
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    # networks
    student = new_student(cfg)
    student.unet.checkpointing = cfg.checkpointing
    encoder, dists = load_encoder(cfg, student), load_dists(cfg.dists)
    teacher = None if cfg.teacher_cache else load_teacher(cfg.teacher, cfg.prompt_embedding, world.device)
    if cfg.dry_run and world.is_main:
        nets = {"student": student, "encoder": encoder, "dists": dists}
        print_cost(nets, cost(cfg, *nets.values()), cfg.batch * cfg.steps, world.size)
    student, encoder, dists = (net and net.to(world.device) for net in (student, encoder, dists))
    # PyTorch's normalisation of wide frames with few channels is ten times slower in channels-last on a CPU.
    (student if world.device.type == "cuda" else student.unet).to(memory_format=torch.channels_last)
    if cfg.compile:
        student.compile_blocks()
    # optimisers
    optimiser = torch.optim.Adam(student.parameters(), lr=cfg.lr)
    # data
    clips = training_clips(cfg)
    count = cfg.validation_clips if world.is_main else 0  # one process validates
    held_out = fixed_clips(cfg.videos, cfg.images, cfg.frames, cfg.size, count)
    # resume
    out, step = Path(cfg.out), 0
    if folder := newest_checkpoint(out):
        state = load_training_state(folder, cfg, MAY_CHANGE)
        student.load_state_dict(AdcVSR.from_pretrained(folder).state_dict())
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
        del state  # gigabytes

    def write(folder: Path) -> None:
        student.save_pretrained(folder)
        config = json.loads(json.dumps(asdict(cfg)))
        torch.save({"step": step, "config": config, "optimiser": optimiser.state_dict()}, folder / "train.pt")

    # loop
    log, stop = Log(out, world.is_main and not cfg.dry_run), StopSignal()
    meter = Meter(world, log, cfg.log_every, cfg.steps)
    if world.is_main:
        print(f"{world.size} x {world.device} | at step {step} of {cfg.steps} | {out}")
    workers = 0 if cfg.pool else cfg.workers  # pieces of a pool are there already
    source = loader(clips, step, cfg.steps, world.rank, world.size, cfg.batch, workers, cfg.overfit)
    for batch in meter.timed(source):
        step += 1
        torch.manual_seed(hash((cfg.seed, step, world.rank)))  # a resumed run draws what it would have drawn
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, cfg)
        parts = micro_batches(batch, cfg.micro_batch, world.device)
        losses = train_step(parts, student, teacher, encoder, dists, optimiser, world, cfg)
        if cfg.dry_run:
            return print_step(world, losses)
        meter.step(step, losses, lr=learning_rate(step, cfg))

        if held_out and (step % cfg.validate_every == 0 or step == cfg.steps):
            scores = validate(student, teacher, held_out, out / "pictures", step)
            log.write(step, **scores)
            print(f"step {step}: student {scores['psnr']:.3f} dB, bicubic {scores['psnr_bicubic']:.3f} dB")
        stopping = world.any(stop.set)  # asked of one process, done by all
        if step % cfg.save_every == 0 or step == cfg.steps or stopping:
            if not all(p.isfinite().all() for p in student.parameters()):  # the loss was, before the update
                raise UserError(f"step {step}: the weights are not finite; the last checkpoint is kept")
            if world.is_main:
                save_checkpoint(out, step, write, cfg.keep)
        world.barrier()
        if stopping:
            break


if __name__ == "__main__":
    run(lambda: main(parse_config(PRESETS, __doc__)))
