"""Stage 2: two discriminators, two heads each, push the student to details and consistency (paper Sec. 3.3,
Appendix A, Algorithm 1; Eq. 1-5).

    clip_lr --student--> x_S --- L1, DISTS --- x_T                                          Eq. 2
                 |        '-- D_pixel ---> softplus(-D)
                 '-----> f_S --- L1 --- f_T                                                 Eq. 3
                          '-- D_feature -> softplus(-D)
    x_S, video, video*, image, image* and their features --> D_pixel, D_feature, labels --> Eq. 4, 5

    torchrun --nproc_per_node=8 train_stage2.py             the paper's recipe, after train_stage1.py
    python train_stage2.py --preset tiny --init weights/tiny --videos FOLDER --images FOLDER
    python train_stage2.py --preset smoke                   the whole path, a minute, after stage 1's smoke

The same command again resumes; Ctrl-C saves first; --dry-run says what it costs.
"""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import fixed_clips, loader, micro_batches, real_clips, to_inputs
from discriminators import (
    BACKBONE,
    HEADS,
    LABEL_TABLES,
    LABELS,
    WIDTH,
    FeatureDiscriminator,
    PixelDiscriminator,
    adversarial_loss,
    check_split,
    discriminator_loss,
    labels,
    mean_scores,
)
from metrics import dists_loss, load_dists, validate
from model import SCALE, AdcVSR
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
    read_training_state,
    require_positive,
    run,
    save_checkpoint,
    setting,
)
from teacher import load_encoder, load_teacher, training_clips

# ------------------------------------------------------------------------------------------------------
# Config: the defaults are the paper's


@dataclass(frozen=True)
class Config:
    init: str = setting("runs/stage1", "stage 1's checkpoint, or the folder of them: the newest")
    domains: tuple[str, ...] = setting(("pixel", "feature"), "where discriminators judge (Table 3)")
    heads: tuple[int, ...] = setting(HEADS, "channels for detail and for consistency (Table 6)")
    width: int = setting(WIDTH, "channels of the discriminators' last features, which heads share out")
    separate: bool = setting(False, "a discriminator for each head, which collapses (Appendix B)")
    labels: str = setting("full", f"the labels: {', '.join(LABEL_TABLES)} (Tables 3, 7)")
    real_video: str = setting("data", "what counts as real video: data, or the teacher's (Table 7)")
    backbone: str = setting(BACKBONE, "ConvNeXt of the pixel discriminator: a timm name, or tiny")
    shift: int = setting(0, "rows and columns, up to this many, that D_pixel's clips lose at random")
    adcsr: tuple[str, ...] = setting((), "AdcSR's two files; as vae and teacher's, stage 1's unless given")
    trust_pickle: bool = setting(False, "allow Python objects in AdcSR's files")
    teacher: str = setting("", "a DOVE folder, gt (HR itself), or a folder of another's results (Table 4)")
    prompt_embedding: str = setting("", "DOVE's empty prompt, where it is not beside the DOVE folder")
    teacher_cache: str = setting("", "clips and teacher videos made before by teacher.py")
    vae: str = setting("", "SD2.1's VAE, for the feature targets: a folder, a hub id, or seeded")
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
    lr: float = setting(1e-5, "Adam's learning rate                              Paper: Sec. 4.1")
    halve_at: tuple[int, ...] = setting((100_000,), "steps after which it halves  Paper: Sec. 4.1")
    lr_disc: float = setting(1e-7, "the discriminators' learning rate, constant  Paper: Sec. 4.1")
    lambda_pixel: float = setting(0.1, "weight of the pixel losses               Paper: Eq. 1")
    lambda_feature: float = setting(1.0, "weight of the feature losses           Paper: Eq. 1")
    lambda_adv: float = setting(1.0, "weight of the adversarial losses in both   Paper: Eq. 2, 3")
    seed: int = setting(0, "seed of the initial weights and of the data")
    checkpointing: bool = setting(True, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile each resnet and transformer block")
    out: str = setting("runs/stage2", "folder of checkpoints, log and pictures")
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
INHERITED = ("adcsr", "teacher", "prompt_embedding", "teacher_cache", "vae")  # of stage 1, unless given

# Choice: tiny's recipe is ours. At 1e-7, discriminators that start from nothing would hardly move. Through a
# random backbone they ask for more than a small student can do: at lambda_adv = 1 it answers with noise.
TINY = Config(
    domains=("pixel",), heads=(48, 16), width=64, backbone="tiny", shift=7, teacher="gt", dists="none",
    lambda_feature=0.0, lambda_adv=0.01, procedural=0.1, frames=6, size=160, batch=2, pool=400, steps=2000,
    halve_at=(1600,), lr_disc=1e-3, checkpointing=False, save_every=200, validate_every=200, workers=2,
)  # fmt: skip
PRESETS = {
    "full": Config(),
    # One card of 24 GB, by the count of bench.py: a light ConvNeXt, and no teacher beside the student.
    "24gb": Config(backbone="convnext_base.clip_laion2b", teacher_cache="cache"),
    "tiny": TINY,
    "smoke": replace(  # shift 0: maps of a few odd pixels are not bit for bit the same again in bfloat16
        TINY, shift=0, init="runs/smoke/stage1", domains=("pixel", "feature"), vae="seeded", dists="seeded",
        lambda_feature=1.0, lambda_adv=1.0, procedural=1.0, frames=4, size=64, pool=0, steps=6, halve_at=(),
        checkpointing=True, out="runs/smoke/stage2", save_every=3, log_every=2, validate_every=6,
        validation_clips=2, workers=0,
    ),
}  # fmt: skip
SEPARATION, PATIENCE = 4.0, 500  # Choice: mean real minus mean fake score, steps: a discriminator has won

# ------------------------------------------------------------------------------------------------------
# One step


def train_step(
    batch, student, teacher, encoder, dists, discriminators, optimisers, world, cfg
) -> dict[str, Tensor]:
    """One update of the student and one of the discriminators. Paper: Algorithm 1, stage 2; Eq. 1-5.

    batch: micro-batches of clips: lr (b t 3 h w), hr, perhaps target, and what `real_clips` takes;
    teacher: x_L -> x_T; encoder: x -> f; dists: (x, x) -> (); discriminators: name -> D, see `domain`;
    optimisers: the student's, the discriminators'. Returns losses and scores by name.
    """
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for clips in batch:
        clips = to_inputs(clips)
        # The student's step: judged by discriminators that hold still.
        discriminators.requires_grad_(False)
        x_t = teacher(clips["lr"]) if teacher else clips.get("target", clips["hr"])
        with torch.autocast(world.device.type, torch.bfloat16):
            f_t = encoder(x_t) if encoder else None
            x_s, f_s = student(clips["lr"], return_features=True)
            seen = {"pixel": x_s, "feature": f_s}
            fake = {name: d.embed(seen[domain(name)]) for name, d in discriminators.items()}

            pixel = F.l1_loss(x_s, x_t)
            perceptual = dists_loss(dists, x_s, x_t) if dists else torch.zeros_like(pixel)
            feature = F.l1_loss(f_s, f_t) if encoder else torch.zeros_like(pixel)
            adv = {"pixel": 0.0, "feature": 0.0}
            for name, d in discriminators.items():
                adv[domain(name)] += adversarial_loss(d.judge(fake[name]))
            l_pixel = pixel + perceptual + cfg.lambda_adv * adv["pixel"]  # Paper: Eq. 2
            l_feature = feature + cfg.lambda_adv * adv["feature"]  # Paper: Eq. 3
            loss = cfg.lambda_pixel * l_pixel + cfg.lambda_feature * l_feature  # Paper: Eq. 1
        (loss / len(batch)).backward()
        losses = {"loss": loss, "pixel": pixel, "dists": perceptual, "feature": feature}
        losses |= {f"adv_{where}": value for where, value in adv.items() if torch.is_tensor(value)}
        # The discriminators' step, on the student's clip as it was.
        discriminators.requires_grad_(True)
        if cfg.real_video == "teacher":
            clips["video"] = x_t  # Paper: Table 7
        for name, d in discriminators.items():
            maps = [x.detach() for x in fake.pop(name)]
            losses |= learn_types(name, d, maps, clips, encoder, len(batch), world, cfg)
        totals = {name: totals.get(name, 0) + value.detach() / len(batch) for name, value in losses.items()}
    world.average_gradients([*student.parameters(), *discriminators.parameters()])
    for optimiser in optimisers:
        optimiser.step()
    return totals


def learn_types(name, d, student, clips, encoder, parts: int, world, cfg) -> dict[str, Tensor]:
    """Gradients of Eq. 4 for one discriminator, a `parts`-th of them; its loss and its scores by name.

    student: the maps of the student's clip. The five types go through one after the other: all at once, they
    would not fit on a card.
    """
    asked, total, losses = labels(cfg.labels, d.tail.split), 0.0, {}
    for kind, maps in clip_types(d, domain(name), student, clips, encoder, asked, world).items():
        with torch.autocast(world.device.type, torch.bfloat16):
            scores = d.judge(maps)
            loss = discriminator_loss(scores, asked[kind])  # Paper: Eq. 4
        (loss / parts).backward()
        total = total + loss.detach()
        losses |= {f"{name}/{kind}/{head}": score for head, score in mean_scores(scores).items()}
    return {f"disc_{name}": total} | losses


@torch.no_grad()
def clip_types(d, where: str, student, clips, encoder, asked, world) -> dict[str, list[Tensor]]:
    """What d embeds of the types of clip that it is asked about (Eq. 5), each real frame embedded once."""
    see = encoder if where == "feature" else (lambda x: x)
    needed = {kind.removeprefix("shuffled_") for kind in asked}  # a permuted clip has permuted maps
    with torch.autocast(world.device.type, torch.bfloat16):
        maps = {k: d.embed(see(clips[k])) for k in ("video", "image", "random_images") if k in needed}
    levels = [real_clips(dict(zip(maps, level)) | {"order": clips["order"]}) for level in zip(*maps.values())]
    real = {kind: [level[kind] for level in levels] for kind in levels[0]}
    return {kind: maps for kind, maps in ({"student": student} | real).items() if kind in asked}


def domain(name: str) -> str:
    """pixel or feature, of a discriminator's name: these, or with --separate pixel_detail and so on."""
    return name.partition("_")[0]


def learning_rate(step: int, cfg: Config) -> float:
    """The student's rate for update number `step` (from 1): halved after each of the steps `halve_at`."""
    return cfg.lr * 0.5 ** sum(step > at for at in cfg.halve_at)


def print_scores(means: dict[str, float], discriminators) -> None:
    """Mean score, detail / consistency, of each type of clip: which head of which discriminator wins."""
    for name in discriminators:
        shown = []
        for kind in LABELS:
            keys = [f"{name}/{kind}/{head}" for head in ("detail", "consistency")]
            scores = "/".join(f"{means[key]:+.2f}" for key in keys if key in means)
            shown += [f"{kind} {scores}"] * bool(scores)
        print(f"  D_{name}: " + "  ".join(shown), flush=True)


class Separation:
    """Warns where a discriminator has won: its real clips stay far above its fake ones, for many steps."""

    def __init__(self, table: str):
        self.labels = LABEL_TABLES[table]
        self.since: dict[str, int] = {}  # the step at which a head's two sides were first seen far apart

    def step(self, step: int, means: dict[str, float]) -> None:
        """means: scores as in the log, averaged over processes and over the steps since the last line."""
        sides: dict[str, tuple[list, list]] = {}
        for key, score in means.items():
            if key.count("/") == 2:
                name, kind, head = key.split("/")
                if label := self.labels[kind][head == "consistency"]:
                    sides.setdefault(f"{name} {head}", ([], []))[label < 0].append(score)
        for head, (real, fake) in sides.items():
            gap = sum(real) / max(1, len(real)) - sum(fake) / max(1, len(fake))
            if gap <= SEPARATION:
                self.since.pop(head, None)
            elif step - self.since.setdefault(head, step) >= PATIENCE:
                self.since[head] = step
                said = f"real and fake are more than {SEPARATION:g} apart for {PATIENCE} steps"
                print(f"step {step}: {said}: {head} is winning; try half of --lr-disc", flush=True)


# ------------------------------------------------------------------------------------------------------
# The run


def stage_one(cfg: Config) -> Config:
    """cfg with `init` the checkpoint itself, and what it does not set as that checkpoint's run had it."""
    folder = newest_checkpoint(cfg.init) or Path(cfg.init)
    if not (folder / "model.safetensors").is_file():
        way_out = "Run train_stage1.py with the same --preset first, or name one with --init."
        raise UserError(f"{cfg.init}: no checkpoint of stage 1. {way_out}")
    recorded = {}
    if (folder / "train.pt").is_file():  # mapped: of its gigabytes only the settings are of use here
        recorded = read_training_state(folder, mmap=True)["config"]
    inherited = INHERITED
    if cfg.teacher and Path(cfg.teacher) != Path(recorded.get("teacher", "")):
        inherited = ("adcsr", "vae")  # another teacher comes with a cache and a prompt of its own
    known = {k: recorded[k] for k in inherited if not getattr(cfg, k) and recorded.get(k)}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    cfg = replace(cfg, init=str(folder), **known)
    if not cfg.teacher:
        raise UserError(f"{folder} does not say which teacher it had: name one with --teacher")
    return cfg


def check(cfg: Config) -> None:
    """`UserError` for settings that cannot work, before anything large is loaded."""
    require_positive(cfg, "frames size batch micro_batch save_every log_every validate_every")
    labels(cfg.labels)
    for where in cfg.domains if cfg.lambda_adv else ():
        if where != "pixel" and (where != "feature" or not cfg.lambda_feature):
            raise UserError(f"--domains {where}: give pixel, or feature with a --lambda-feature above 0")
    check_split(cfg.heads, cfg.width)
    if cfg.real_video not in ("data", "teacher"):
        raise UserError(f"--real-video {cfg.real_video}: give data or teacher")
    if "pixel" in cfg.domains and not 0 <= cfg.shift <= cfg.size - PixelDiscriminator.SMALLEST:
        left = f"D_pixel needs {PixelDiscriminator.SMALLEST} pixels of --size {cfg.size}"
        raise UserError(f"--shift {cfg.shift}: {left}")


def new_discriminators(cfg: Config, student: AdcVSR) -> nn.ModuleDict:
    """name -> discriminator, by domain; with --separate one for each head, which collapses (Appendix B)."""
    heads = {"": cfg.heads}
    if cfg.separate:  # Choice: both as wide, and as heavy in the losses, as the dual-head one
        heads = {"_detail": (cfg.width, 0), "_consistency": (0, cfg.width)}
    discriminators = nn.ModuleDict()
    for where in cfg.domains if cfg.lambda_adv else ():
        for suffix, split in heads.items():
            shape = {"heads": split, "width": cfg.width, "checkpointing": cfg.checkpointing}
            if where == "pixel":
                d = PixelDiscriminator.from_pretrained(cfg.backbone, shift=cfg.shift, **shape)
            else:
                d = FeatureDiscriminator(student.unet, **shape)
            discriminators[where + suffix] = d
    return discriminators


def cost(cfg: Config, student, encoder, dists, discriminators) -> float:
    """TFLOP for a clip and step: `train_step` itself on shapes alone; the teacher's not counted.

    Counted for two frames and for three: each further one costs what the third does, but for attention in
    time, which costs more.
    """
    student, encoder, dists, discriminators = (
        net and deepcopy(net).to("meta") for net in (student, encoder, dists, discriminators)
    )
    here, side = World(0, 1, torch.device("cpu")), cfg.size // SCALE

    def tflop(t: int) -> float:
        shape = (1, t, 3, cfg.size, cfg.size)
        clips = {k: torch.empty(shape, device="meta") for k in ("hr", "video", "random_images")}
        clips["lr"] = torch.empty(1, t, 3, side, side, device="meta")
        clips |= {"image": clips["hr"][:, :1], "order": torch.arange(t).flip(0)[None]}
        return count_flops(
            lambda: train_step([clips], student, None, encoder, dists, discriminators, (), here, cfg)
        )

    return tflop(2) + (cfg.frames - 2) * (tflop(3) - tflop(2))


def main(cfg: Config) -> None:
    # world
    check(cfg)
    cfg, world = stage_one(cfg), init_world()
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    # networks
    student = AdcVSR.from_pretrained(cfg.init)
    student.unet.checkpointing = cfg.checkpointing
    encoder, dists = load_encoder(cfg, student), load_dists(cfg.dists)
    discriminators = new_discriminators(cfg, student)  # with the UNet of stage 1
    teacher = None if cfg.teacher_cache else load_teacher(cfg.teacher, cfg.prompt_embedding, world.device)
    if cfg.dry_run and world.is_main:
        nets = {"student": student, "encoder": encoder, "dists": dists, "discriminators": discriminators}
        print_cost(nets, cost(cfg, *nets.values()), cfg.batch * cfg.steps, world.size)
    student, encoder, dists = (net and net.to(world.device) for net in (student, encoder, dists))
    discriminators.to(world.device)
    if world.device.type == "cuda":
        for d in discriminators.values():
            # Frozen, so nothing is lost to rounding step by step.
            d.backbone.to(torch.bfloat16, memory_format=torch.channels_last)
    # PyTorch's normalisation of wide frames with few channels is ten times slower in channels-last on a CPU.
    (student if world.device.type == "cuda" else student.unet).to(memory_format=torch.channels_last)
    if cfg.compile:
        student.compile_blocks()
    # optimisers
    optimiser = torch.optim.Adam(student.parameters(), lr=cfg.lr)
    optimiser_disc = torch.optim.Adam([{"params": discriminators.parameters()}], lr=cfg.lr_disc)
    # data
    clips = training_clips(cfg, real_types=len(discriminators) > 0)
    count = cfg.validation_clips if world.is_main else 0  # one process validates
    held_out = fixed_clips(cfg.videos, cfg.images, cfg.frames, cfg.size, count)
    # resume
    out, step = Path(cfg.out), 0
    if folder := newest_checkpoint(out):
        state = load_training_state(folder, cfg, MAY_CHANGE)
        student.load_state_dict(AdcVSR.from_pretrained(folder).state_dict())
        discriminators.load_state_dict(state["discriminators"])
        optimiser.load_state_dict(state["optimiser"])
        optimiser_disc.load_state_dict(state["optimiser_disc"])
        step = state["step"]
        del state  # gigabytes

    def write(folder: Path) -> None:
        student.save_pretrained(folder)
        parts = {"optimiser": optimiser, "optimiser_disc": optimiser_disc, "discriminators": discriminators}
        state = {name: part.state_dict() for name, part in parts.items()}
        config = json.loads(json.dumps(asdict(cfg)))
        torch.save({"step": step, "config": config, **state}, folder / "train.pt")

    # loop
    log, stop = Log(out, world.is_main and not cfg.dry_run), StopSignal()
    meter, watch = Meter(world, log, cfg.log_every, cfg.steps), Separation(cfg.labels)
    if world.is_main:
        print(f"{world.size} x {world.device} | at step {step} of {cfg.steps} | {out} | from {cfg.init}")
    workers = 0 if cfg.pool else cfg.workers  # pieces of a pool are there already
    source = loader(clips, step, cfg.steps, world.rank, world.size, cfg.batch, workers, cfg.overfit)
    for batch in meter.timed(source):
        step += 1
        torch.manual_seed(hash((cfg.seed, step, world.rank)))  # a resumed run draws what it would have drawn
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, cfg)
        parts = micro_batches(batch, cfg.micro_batch, world.device)
        optimisers = optimiser, optimiser_disc
        losses = train_step(parts, student, teacher, encoder, dists, discriminators, optimisers, world, cfg)
        if cfg.dry_run:
            return print_step(world, losses)
        means = meter.step(step, losses, lr=learning_rate(step, cfg))
        if world.is_main and means:
            watch.step(step, means)
            print_scores(means, discriminators)

        if held_out and (step % cfg.validate_every == 0 or step == cfg.steps):
            scores = validate(student, teacher, held_out, out / "pictures", step)
            log.write(step, **scores)
            print(f"step {step}: student {scores['psnr']:.3f} dB, bicubic {scores['psnr_bicubic']:.3f} dB")
        stopping = world.any(stop.set)  # asked of one process, done by all
        if step % cfg.save_every == 0 or step == cfg.steps or stopping:
            trained = [*student.parameters(), *discriminators.parameters()]
            if not all(p.isfinite().all() for p in trained):  # the losses were, before the update
                raise UserError(f"step {step}: the weights are not finite; the last checkpoint is kept")
            if world.is_main:
                save_checkpoint(out, step, write, cfg.keep)
        world.barrier()
        if stopping:
            break


if __name__ == "__main__":
    run(lambda: main(parse_config(PRESETS, __doc__)))
