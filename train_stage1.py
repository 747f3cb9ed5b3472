"""Stage 1: the student learns its target by regression (paper Sec. 3.3, Appendix A, Algorithm 1).

    clip_hr --degrade--> clip_lr --student--> clip_sr       loss = lambda_pixel L1(clip_sr, target)   Eq. 1, 2
       '------------------------- target (--teacher gt: the paper's row "No Teacher (HR GT Only)")

    python train_stage1.py --preset tiny --videos FOLDER --images FOLDER   trains the weights in weights/tiny
    python train_stage1.py --preset smoke                                  the same path, a minute, no files

The same command again resumes; Ctrl-C saves first.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import model
from data import ClipPool, TrainingClips, loader, validation_clips
from metrics import psnr
from model import AdcVSR
from runtime import (
    Log,
    StopSignal,
    World,
    init_world,
    load_training_state,
    newest_checkpoint,
    parse_config,
    run,
    save_checkpoint,
    setting,
)
from video import to_network, to_uint8

# ------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    student: str = setting("tiny", "the network: a preset of model.py")
    videos: str = setting("datasets/videos", "training videos: a folder, a list file, OpenVid-1M's CSV")
    images: str = setting("datasets/images", "training photos: a folder, a list file")
    procedural: float = setting(0.1, "share of clips from the procedural world")
    degradation: str = setting("realbasicvsr", "realbasicvsr or dove")
    sharpen: bool = setting(False, "unsharp-masked HR, as RealBasicVSR trains with")
    stride: int = setting(1, "source frames from one frame of a clip to the next")
    frames: int = setting(4, "clip length t; the paper's is 25")
    size: int = setting(192, "side of the HR crop in pixels; the paper's is 512")
    batch: int = setting(9, "clips a step, over all processes; the paper's is 8")
    pool: int = setting(600, "clips made once, of which the batches are random pieces; 0: every clip new")
    pool_frames: int = setting(12, "frames of a clip in the pool")
    pool_size: int = setting(256, "side of a clip in the pool")
    steps: int = setting(1440, "optimiser steps; the paper's are 200K")
    lr: float = setting(
        3e-4, "Adam's learning rate; the paper's is 1e-4 for a network that starts from SD2.1"
    )
    halve_at: tuple[int, ...] = setting(
        (650, 1000, 1120, 1240, 1330, 1400), "steps after which the learning rate halves; the paper's is 100K"
    )
    lambda_pixel: float = setting(0.1, "weight of the pixel loss, Eq. 1")
    seed: int = setting(0, "seed of the initial weights and of the data")
    out: str = setting("runs/stage1", "folder of checkpoints and log")
    save_every: int = setting(250, "steps between checkpoints")
    keep: int = setting(3, "checkpoints kept")
    log_every: int = setting(10, "steps between two lines of the log")
    validate_every: int = setting(250, "steps between validations on held-out clips")
    validation_videos: int = setting(8, "held-out clips looked at")
    workers: int = setting(2, "processes that load data")


MAY_CHANGE = frozenset(  # settings that a resumed run may change: they leave the weights as they are
    "out steps save_every keep log_every validate_every validation_videos workers".split()
)

# Choice: tiny's recipe is ours; the paper has none for a network that starts from nothing on two CPU cores.
PRESETS = {
    "tiny": Config(),
    "smoke": replace(
        Config(), frames=4, size=64, batch=2, steps=12, procedural=1.0, pool=0, out="runs/smoke1",
        save_every=6, log_every=2, validate_every=12, workers=0,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------
# One step


def train_step(clip_lr: Tensor, target: Tensor, student, optimiser, cfg: Config) -> dict[str, Tensor]:
    """One update: clip_lr (b t 3 h w), target (b t 3 4h 4w), both in [-1, 1]. Returns the losses by name."""
    with torch.autocast(clip_lr.device.type, torch.bfloat16):
        clip_sr = student(clip_lr)
    pixel = F.l1_loss(clip_sr.float(), target)  # Paper: Eq. 2, its first term
    loss = cfg.lambda_pixel * pixel  # Paper: Eq. 1
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return {"loss": loss.detach(), "pixel": pixel.detach()}


def learning_rate(step: int, cfg: Config) -> float:
    """The rate of update number `step` (from 1): halved after each of the steps `halve_at`."""
    return cfg.lr * 0.5 ** sum(step > at for at in cfg.halve_at)


@torch.no_grad()
def validate(student: AdcVSR, clips: list) -> dict[str, float]:
    """Mean PSNR over held-out clips, in dB, of the student and of bicubic upsampling."""
    ours, bicubic = [], []
    for _, hr, lr in clips:
        lr = to_network(rearrange(torch.from_numpy(lr), "t h w c -> 1 t c h w"))
        hr = rearrange(torch.from_numpy(hr), "t h w c -> t c h w")
        with torch.autocast("cpu", torch.bfloat16):
            sr = student(lr)
        up = F.interpolate(lr[0], scale_factor=float(model.SCALE), mode="bicubic")
        ours.append(psnr(to_uint8(sr[0].float()), hr).mean().item())
        bicubic.append(psnr(to_uint8(up), hr).mean().item())
    return {"psnr": sum(ours) / len(ours), "psnr_bicubic": sum(bicubic) / len(bicubic)}


# ------------------------------------------------------------------------------------------------------
# The run


def batches(cfg: Config, world: World, clips: TrainingClips, start: int) -> Iterator[tuple]:
    """(clip_lr, clip_hr, files skipped) of this rank, clips in [-1, 1], from update `start` + 1 on."""
    for batch in loader(
        clips, start, cfg.steps, world.rank, world.size, cfg.batch, 0 if cfg.pool else cfg.workers
    ):
        pair = (to_network(batch[k].to(world.device, non_blocking=True)) for k in ("lr", "hr"))
        yield *pair, int(batch["skipped"].sum())


def main(cfg: Config) -> None:
    # world
    world = init_world()
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    # networks
    student = AdcVSR(**model.PRESETS[cfg.student]).to(world.device)
    # PyTorch's normalisation of wide frames with few channels is ten times slower in channels-last on a CPU.
    (student if world.device.type == "cuda" else student.unet).to(memory_format=torch.channels_last)
    wrapped = DistributedDataParallel(student) if world.size > 1 else student
    # optimisers
    optimiser = torch.optim.Adam(student.parameters(), lr=cfg.lr)
    # data
    whole = (cfg.pool_frames, cfg.pool_size) if cfg.pool else (cfg.frames, cfg.size)
    clips = TrainingClips(
        cfg.videos,
        cfg.images,
        *whole,
        cfg.seed,
        cfg.degradation,
        cfg.procedural,
        cfg.stride,
        sharpen=cfg.sharpen,
    )
    if cfg.pool:
        clips = ClipPool(clips, cfg.pool, cfg.frames, cfg.size, cfg.workers)
    held_out = []
    if world.is_main and cfg.procedural < 1:
        held_out = list(validation_clips(cfg.videos, cfg.images))[:: max(1, 19 // cfg.validation_videos)]
    # resume
    out, step = Path(cfg.out), 0
    if folder := newest_checkpoint(out):
        state = load_training_state(folder, cfg, MAY_CHANGE)
        student.load_state_dict(AdcVSR.from_pretrained(folder).state_dict())
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]

    def write(folder: Path) -> None:
        student.save_pretrained(folder)
        state = {
            "step": step,
            "config": json.loads(json.dumps(asdict(cfg))),
            "optimiser": optimiser.state_dict(),
        }
        torch.save(state, folder / "train.pt")

    # loop
    log, stop = Log(out / "log.jsonl", world.is_main), StopSignal()
    if world.is_main:
        size = sum(p.numel() for p in student.parameters()) / 1e6
        print(
            f"student {cfg.student} {size:.2f} M parameters | {world.size} x {world.device} | at step {step}"
        )
    waited, skipped, since = 0.0, 0, time.perf_counter()
    source, first = batches(cfg, world, clips, step), step
    stopping = False
    while step < cfg.steps and not stopping:
        asked = time.perf_counter()
        clip_lr, target, passed_over = next(source)
        skipped += passed_over
        waited += time.perf_counter() - asked
        step += 1
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, cfg)
        losses = train_step(clip_lr, target, wrapped, optimiser, cfg)

        if step % cfg.log_every == 0 or step == cfg.steps:
            values = world.mean({k: v.item() for k, v in losses.items()})
            if not all(abs(v) < float("inf") for v in values.values()):
                raise SystemExit(f"step {step}: a loss is not finite ({values}); the last checkpoint is kept")
            seconds = (time.perf_counter() - since) / (step - first)
            values |= {
                "lr": learning_rate(step, cfg),
                "s_per_step": seconds,
                "data_wait": waited / (step - first),
                "skipped": skipped,
            }
            log.write(step=step, **values)
            if world.is_main:
                shown = " ".join(f"{k} {v:.4g}" for k, v in values.items())
                print(
                    f"step {step}/{cfg.steps} {shown} eta {(cfg.steps - step) * seconds / 60:.0f} min",
                    flush=True,
                )
            waited, since, first = 0.0, time.perf_counter(), step
        if held_out and (step % cfg.validate_every == 0 or step == cfg.steps):
            scores = validate(student, held_out)
            log.write(step=step, **scores)
            print(
                f"step {step}/{cfg.steps} " + " ".join(f"{k} {v:.3f} dB" for k, v in scores.items()),
                flush=True,
            )
            since, first = time.perf_counter(), step
        stopping = world.any(stop.set)  # asked of one process, done by all
        if step % cfg.save_every == 0 or step == cfg.steps or stopping:
            if not all(p.isfinite().all() for p in student.parameters()):  # the loss was, before the update
                raise SystemExit(f"step {step}: the weights are not finite; the last checkpoint is kept")
            if world.is_main:
                save_checkpoint(out, step, write, cfg.keep)
        world.barrier()


if __name__ == "__main__":
    run(lambda: main(parse_config(PRESETS, __doc__)))
