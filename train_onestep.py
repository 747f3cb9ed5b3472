"""From many steps to one: SeedVR2's recipe (arXiv 2506.05301) and DUO-VSR's (2603.22271), loss by loss.

A restorer walks from noise to a clip, led by a velocity v(z_t, t, cond) on z_t = (1 - t) z_0 + t eps, cond
being LR. AdcVSR distils one such step into a small network; these teach the network itself to take one step.

    base    flow matching towards HR                 the many-step model    SeedVR, DUO-VSR's base
    guide   v <- (1 + w) v(text) - w v(no text)                             DUO-VSR, stage I
    halve   one step <- two, 64 -> 32 -> ... -> 1    one step, but soft     SeedVR2 Sec. 3.3; DUO-VSR, stage I
    apt     RpGAN, R1, R2, L1, feature matching      against real clips     SeedVR2 Sec. 3.3, Eq. 3, 4
    duo     distribution matching and RFS-GAN        both streams at once   DUO-VSR, stage II
    prefer  winners against losers                   DPO                    DUO-VSR, stage III

    SeedVR2   base, halve --init runs/onestep/base --fold 6.5, apt
    DUO-VSR   base, guide, halve, duo, prefer

    python train_onestep.py --preset smoke --stage base               then the others, in this order
    torchrun --nproc_per_node=8 train_onestep.py --stage duo --shard  at full size

The same command again resumes; --dry-run says what it costs; --stage table compares. No training code of
either is published: docs/onestep.md says what is theirs and what is inference.
"""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import CachedClips
from data import Data, TrainingClips, held_out_clips, loader, micro_batches, to_inputs
from metrics import validate
from onestep import (
    Condition,
    Denoiser,
    Judge,
    Latents,
    Pixels,
    Restorer,
    ScoreHead,
    Velocity,
    compare,
    load_denoiser,
    load_space,
    noised,
    one_step,
    per_clip,
    ranking,
    to_latents,
)
from rpgan import feature_matching, noisy, perturbed, relativistic
from runtime import Run, Settings, UserError, World, init_world, parse, presets, require_positive, run
from seedvr2 import Block, NaDiT
from sharding import LEARNING, ShardedRun, ShardedWorld, require_room, shard

# ------------------------------------------------------------------------------------------------------
# Settings: the defaults are the papers', where they give any
# fmt: off


@dataclass(frozen=True)
class Config(Settings, Data):
    stage: Literal["base", "guide", "halve", "apt", "duo", "prefer", "table"] = "base"  # table: of all
    out: str = "runs/onestep"               # a folder with a folder for each stage
    init: str = ""                          # what it starts from; the stage before in --out if not given
    prior: str = ""                         # many-step model: the judge's start (apt; base if not given), and
                                            # the score models' (duo; guide if not given)
    network: Literal["3b", "7b", "tiny"] = "3b"  # of seedvr2.py; tiny is without a VAE
    seedvr: str = "weights/SeedVR-3B"       # seedvr_ema_*, ema_vae.pth, pos_emb.pt, neg_emb.pt: base, VAE
    cache: str = ""                         # clips made before by cache.py
    shard: bool = False                     # spread each network over all cards
    lr: float = 1e-6                        # AdamW, weight decay 0.01                    SeedVR2 Sec. 4
    lr_aux: float = 1e-6                    # of judge, fake and head
    many: int = 64                          # steps of the many-step model                SeedVR2, DUO-VSR
    no_text: float = 0.1                    # base: share of blurred clips, without text
    w: float = 6.5                          # guide: guidance; SeedVR2's scale 7.5 is 1 + w
    fold: float = 0.0                       # halve: guidance of its first teacher               SeedVR2
    round: int = 10_000                     # halve: steps of a round                SeedVR2; DUO-VSR 500
    lambda_l1: float = 0.1                  # apt                                         SeedVR2 Sec. 5
    lambda_f: float = 0.1                   # apt: feature matching                       SeedVR2 Sec. 5
    lambda_r: float = 1000.0                # apt: R1 and R2                              SeedVR2 Sec. 3.3
    sigma: float = 0.1                      # apt: of their noise                         APT, for videos
    shift: float = 12.0                     # apt: of the judge's time step               APT, for videos
    decay: float = 0.995                    # apt: of the averaged weights, which are kept    APT
    updates: int = 3                        # duo: auxiliary ones for each of the student's   DUO-VSR
    low: float = 0.02                       # duo: least noise, 1 - low the most          DMD2
    lambda_g: float = 0.1                   # duo: RFS-GAN                                DUO-VSR
    lambda_fm: float = 0.05                 # duo: feature matching                       DUO-VSR
    beta: float = 100.0                     # prefer: how far from the reference
    candidates: int = 4                     # prefer: for each clip
    rank: str = "gradient"                  # prefer: gradient energy nearest to HR's, or a checkout of DOVER
    drift: float = 0.1                      # prefer: squared distance to the reference at which it stops


PRESETS = presets(Config, {  # what they change; None leaves the value of full
    "preset":       ("tiny",        "smoke"),
    "network":      ("tiny",        "tiny"),
    "seedvr":       ("",            ""),
    "cache":        ("onestep_cache", None),
    "procedural":   (0.1,           1.0),
    "frames":       (4,             3),
    "size":         (96,            48),
    "batch":        (8,             2),
    "micro_batch":  (8,             2),
    "many":         (None,          4),
    "w":            (1.0,           1.0),
    "round":        (300,           2),
    # APT's weight 100 at this sigma is R1 with gamma/2 = 1; 1000 leaves a small judge no slope at all.
    "lambda_r":     (100.0,         100.0),
    "shift":        (1.0,           1.0),
    "lr_aux":       (3e-4,          3e-4),
    "checkpointing": ("none",       "none"),
    "every":        (100,           2),
    "workers":      (1,             0),
    "out":          ("runs/tiny/onestep", "runs/smoke/onestep"),
})
SCHEDULE = {  # stage: steps and learning rate in full, tiny, smoke    Choice: but for halve, apt, prefer
    "base":   ((100_000, 1e-5), (8000, 5e-4), (4, 5e-4)),
    "guide":  ((10_000, 1e-6),  (600, 2e-4),  (4, 2e-4)),
    "halve":  ((60_000, 1e-6),  (1800, 2e-4), (4, 2e-4)),
    "apt":    ((20_000, 1e-6),  (500, 5e-5),  (4, 5e-5)),
    "duo":    ((20_000, 5e-7),  (500, 5e-5),  (4, 5e-5)),
    "prefer": ((1000, 1e-7),    (200, 1e-5),  (4, 1e-5)),
    "table":  ((1, 1e-6),       (1, 1e-6),    (1, 1e-6)),
}
# fmt: on

LOOKS = 8  # held-out clips that are looked at

# ------------------------------------------------------------------------------------------------------
# The losses. They know nothing of networks: velocities, judges and heads are what they are called with.
# RpGAN, R1, R2 and feature matching are in rpgan.py, since stage 2 has them, too.


def flow_loss(net: Velocity, z0: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> Tensor:
    """| v(z_t, t) - (eps - z_0) |^2. Flow matching; DUO-VSR's L_Diff."""
    return F.mse_loss(net(noised(z0, eps, t), t, cond), eps - z0)


def guided(net: Velocity, z: Tensor, t: Tensor, cond: Condition, w: float) -> Tensor:
    """Away from what has no text: (1 + w) v(text) - w v(none), the target of DUO-VSR's L_CFG.

    Its summary prints the second term without w; only with it do the coefficients sum to 1.  # Choice
    """
    return (1 + w) * net(z, t, cond) - w * net(z, t, cond._replace(text="none"))


def halving_target(teacher: Velocity, z: Tensor, t: Tensor, h: float, cond: Condition) -> Tensor:
    """The velocity whose one step of 2h is the teacher's two of h. SeedVR2 Sec. 3.3; DUO-VSR's L_PD.

    Choice: compared as velocities (SeedVR2), not as clips (DUO-VSR): they differ by the weight (2h)^2.
    """
    first = teacher(z, t, cond)
    return (first + teacher(z - h * first, t - h, cond)) / 2


def dmd_gradient(z0: Tensor, z_t: Tensor, t: Tensor, v_real: Tensor, v_fake: Tensor) -> Tensor:
    """(x_fake - x_real) / mean |z_0 - x_real|, the mean over each clip, with x = z_t - t v. DUO-VSR, as DMD2.

    Detached, in float32. It leads from where the student's clips are dense to where the real ones are.
    """
    z0, z_t, v_real, v_fake = (x.detach().float() for x in (z0, z_t, v_real, v_fake))
    t = per_clip(t, z0).float()
    off = (z0 - (z_t - t * v_real)).abs().flatten(1).mean(1)
    return t * (v_real - v_fake) / per_clip(off, z0)


def dmd_loss(z0: Tensor, gradient: Tensor) -> Tensor:
    """1/2 | z_0 - sg(z_0 - gradient) |^2: its derivative is the gradient, and goes through z_0 alone."""
    return F.mse_loss(z0, (z0 - gradient).detach()) / 2


def hinge(head: Callable, theirs: list[Tensor], ours: list[Tensor]) -> Tensor:
    """max(0, 1 - D(z_t^HR)) + max(0, 1 + D(z_t)). DUO-VSR's L_D, which stops before the score models."""
    real, fake = (head([x.detach() for x in features]) for features in (theirs, ours))
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def dpo_loss(student, reference, winner, loser, cond, t, eps, beta) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(-beta/2 [(e_S - e_ref)(winner) - (e_S - e_ref)(loser)]), e = |v - (eps - z_0)|^2, means
    over each clip. DUO-VSR's L_DPO.

    Also the share of pairs that are ranked rightly and the squared distance to the reference.
    """
    better, away = [], []
    for z0 in winner, loser:
        z_t = noised(z0, eps, t)
        v = student(z_t, t, cond)
        with torch.no_grad():
            v_ref = reference(z_t, t, cond)
        errors = ((u - (eps - z0)).square().flatten(1).mean(1) for u in (v, v_ref))
        better.append(next(errors) - next(errors))
        away.append(F.mse_loss(v.detach(), v_ref))
    margin = better[0] - better[1]
    return -F.logsigmoid(-beta / 2 * margin).mean(), (margin < 0).float().mean(), sum(away) / 2


# ------------------------------------------------------------------------------------------------------
# One step of each stage. batch: micro-batches of (z_0 (b ...), cond); nets, optimisers: by the names of
# `STAGES`; step: its number, from 1. Each returns its losses by name.


def drawn(z0: Tensor, low: float = 0.0) -> tuple[Tensor, Tensor]:
    """t (b), uniform between low and 1 - low, and noise like z_0."""
    return low + (1 - 2 * low) * torch.rand(len(z0), device=z0.device), torch.randn_like(z0)


def update(learners: list[str], batch, nets, optimisers, world: World, terms: Callable) -> dict[str, Tensor]:
    """One update of these networks, downhill on terms(z0, cond)["loss"]; gradients pass through the others.
    Returns the terms, means over the clips of all micro-batches."""
    for name in optimisers:
        nets[name].requires_grad_(name in learners)
    losses, total = defaultdict(float), sum(len(z0) for z0, _ in batch)
    for z0, cond in batch:
        share, found = len(z0) / total, terms(z0, cond)
        (share * found["loss"]).backward()
        for name, value in found.items():
            losses[name] += share * value.detach()
    for name in learners:
        world.average_gradients(nets[name].parameters())
        optimisers[name].step()
        optimisers[name].zero_grad(set_to_none=True)
    return losses


def base_step(batch, nets, optimisers, world, cfg, step) -> dict[str, Tensor]:
    """The many-step model, by flow matching."""

    def terms(z0, cond):
        return {"loss": flow_loss(nets["student"], z0, cond, *drawn(z0))}

    return update(["student"], batch, nets, optimisers, world, terms)


def guide_step(batch, nets, optimisers, world, cfg, step) -> dict[str, Tensor]:
    """Guidance folded into one call. DUO-VSR, stage I."""

    def terms(z0, cond):
        t, eps = drawn(z0)
        z_t = noised(z0, eps, t)
        with torch.no_grad():
            target = guided(nets["teacher"], z_t, t, cond, cfg.w)
        return {"loss": F.mse_loss(nets["student"](z_t, t, cond), target)}

    return update(["student"], batch, nets, optimisers, world, terms)


def walk(cfg: Config, step: int) -> int:
    """Euler steps that the student is asked for: many, halved in each round, and one from then on."""
    rounds = {"base": 0, "guide": 0, "halve": (step - 1) // cfg.round + 1}
    return max(1, cfg.many >> rounds.get(cfg.stage, cfg.many))


def halve_step(batch, nets, optimisers, world, cfg, step) -> dict[str, Tensor]:
    """Progressive distillation. SeedVR2 Sec. 3.3; DUO-VSR, stage I."""
    rounds, inside = divmod(step - 1, cfg.round)
    if rounds and not inside:  # the student becomes the teacher
        nets["teacher"].load_state_dict(nets["student"].state_dict())
        optimisers["student"].state.clear()
    steps, teacher = walk(cfg, step), nets["teacher"]
    if cfg.fold and not rounds:
        teacher = partial(guided, teacher, w=cfg.fold)  # SeedVR2: guidance is folded in by the first halving

    def terms(z0, cond):
        # Only at its own steps will the student be asked.
        t = torch.randint(1, steps + 1, (len(z0),), device=z0.device) / steps
        z_t = noised(z0, torch.randn_like(z0), t)
        with torch.no_grad():
            target = halving_target(teacher, z_t, t, 1 / (2 * steps), cond)
        return {"loss": F.mse_loss(nets["student"](z_t, t, cond), target)}

    return update(["student"], batch, nets, optimisers, world, terms)


def apt_step(batch, nets, optimisers, world, cfg, step) -> dict[str, Tensor]:
    """Adversarial post-training against real clips: the judge, then the student. SeedVR2 Sec. 3.3."""
    student, judge = nets["student"], nets["judge"]

    def judged_step(z0):
        u = 1 - torch.rand(len(z0), device=z0.device)  # never 0
        return cfg.shift * u / (1 + (cfg.shift - 1) * u)  # APT Sec. 3.3

    def of_judge(z0, cond):
        t = judged_step(z0)
        with torch.no_grad():
            restored = one_step(student, torch.randn_like(z0), cond)
        d_real, d_fake = judge(z0, t, cond)[0], judge(restored, t, cond)[0]
        disc = relativistic(d_real, d_fake)
        r1 = perturbed(d_real, judge(noisy(z0, cfg.sigma), t, cond)[0])
        r2 = perturbed(d_fake, judge(noisy(restored, cfg.sigma), t, cond)[0])  # SeedVR2 Eq. 3
        return {"loss": disc + cfg.lambda_r * (r1 + r2), "disc": disc, "r1": r1, "r2": r2}

    def of_student(z0, cond):
        t, restored = judged_step(z0), one_step(student, torch.randn_like(z0), cond)
        with torch.no_grad():
            d_real, theirs = judge(z0, t, cond)
        d_fake, ours = judge(restored, t, cond)
        adv, l1 = relativistic(d_fake, d_real), F.l1_loss(restored, z0)
        match = feature_matching(ours, theirs, F.l1_loss)  # SeedVR2 Eq. 4
        loss = adv + cfg.lambda_l1 * l1 + cfg.lambda_f * match
        return {"loss": loss, "adv": adv, "l1": l1, "match": match}

    losses = update(["judge"], batch, nets, optimisers, world, of_judge)
    losses |= update(["student"], batch, nets, optimisers, world, of_student)
    with torch.no_grad():
        for average, weights in zip(nets["ema"].parameters(), student.parameters()):
            average.lerp_(weights, 1 - cfg.decay)
    return losses


def duo_step(batch, nets, optimisers, world, cfg, step) -> dict[str, Tensor]:
    """Both streams at once: auxiliary updates, then one of the student's. DUO-VSR, stage II.

    Choice: all of them on the same clips, under new noise each; loading is what takes time.
    """
    student, fake, real, head = (nets[name] for name in ("student", "fake", "real", "head"))

    def look(z_t, t, cond):
        """Both streams see the same noised clip: velocities for the one, features for the other."""
        (v_real, f_real), (v_fake, f_fake) = (net(z_t, t, cond, taps=True) for net in (real, fake))
        return v_real, v_fake, [*f_real, *f_fake]

    def of_auxiliaries(z0, cond):
        t, eps = drawn(z0, cfg.low)
        with torch.no_grad():
            restored = one_step(student, torch.randn_like(z0), cond)
            *_, theirs = look(noised(z0, eps, t), t, cond)
        _, v_fake, ours = look(noised(restored, eps, t), t, cond)
        diff, disc = F.mse_loss(v_fake, eps - restored), hinge(head, theirs, ours)
        return {"loss": diff + disc, "diff": diff, "disc": disc}

    def of_student(z0, cond):
        restored = one_step(student, torch.randn_like(z0), cond)
        t, eps = drawn(z0, cfg.low)  # not the student's noise: that would tell what it made of it
        z_t = noised(restored, eps, t)
        v_real, v_fake, ours = look(z_t, t, cond)
        with torch.no_grad():  # HR under the same noise, or noise is most of the distance
            *_, theirs = look(noised(z0, eps, t), t, cond)
        dmd = dmd_loss(restored, dmd_gradient(restored, z_t, t, v_real, v_fake))
        adv, match = -head(ours).mean(), feature_matching(ours, theirs, F.mse_loss)
        loss = dmd + cfg.lambda_g * adv + cfg.lambda_fm * match
        return {"loss": loss, "dmd": dmd, "adv": adv, "match": match}

    for _ in range(cfg.updates):
        losses = update(["fake", "head"], batch, nets, optimisers, world, of_auxiliaries)
    return losses | update(["student"], batch, nets, optimisers, world, of_student)


def prefer_step(batch, nets, optimisers, world, cfg, step) -> dict[str, Tensor]:
    """Preferences between what one clip became under several noises. DUO-VSR, stage III.

    nets["rank"]: (candidate, z_0, cond) -> (b), higher is better. Choice: pairs are made on the way, by the
    reference; it holds still, so they are what a list made before would hold.
    """

    def terms(z0, cond):
        with torch.no_grad():
            made = [one_step(nets["reference"], torch.randn_like(z0), cond) for _ in range(cfg.candidates)]
            scores, made = torch.stack([nets["rank"](z, z0, cond) for z in made]), torch.stack(made)
        clips = torch.arange(len(z0), device=z0.device)
        winner, loser = made[scores.argmax(0), clips], made[scores.argmin(0), clips]
        pair = nets["student"], nets["reference"], winner, loser, cond
        loss, right, distance = dpo_loss(*pair, *drawn(z0), cfg.beta)
        return {"loss": loss, "right": right, "distance": distance}

    return update(["student"], batch, nets, optimisers, world, terms)


# ------------------------------------------------------------------------------------------------------
# The run

STAGES = {  # stage: the one it starts from, the networks that learn, those that hold still, its step
    "base": ("", ("student",), (), base_step),
    "guide": ("base", ("student",), ("teacher",), guide_step),
    "halve": ("guide", ("student",), ("teacher",), halve_step),  # a new one in each round
    "apt": ("halve", ("student", "judge"), ("ema",), apt_step),  # the student's average, which is kept
    "duo": ("halve", ("student", "fake", "head"), ("real",), duo_step),
    "prefer": ("duo", ("student",), ("reference",), prefer_step),
}


def configure(argv: list[str] | None = None) -> Config:
    """The command line's settings, over those of its preset and stage."""
    stage = parse(PRESETS, __doc__, argv).stage
    rows = zip(PRESETS.items(), SCHEDULE[stage])
    return parse({name: replace(preset, steps=n, lr=lr) for (name, preset), (n, lr) in rows}, __doc__, argv)


def check(cfg: Config) -> None:
    """`UserError` for settings that do not go together, before anything large is loaded."""
    require_positive(cfg, "frames size batch micro_batch every many round updates")
    multiple = (Latents if cfg.seedvr else Pixels).MULTIPLE
    if cfg.size % multiple:
        raise UserError(f"--size {cfg.size}: give a multiple of {multiple}")
    if cfg.seedvr and cfg.frames % 4 != 1:
        raise UserError(f"--frames {cfg.frames}: the VAE takes 4k + 1, as 25")
    if cfg.many & (cfg.many - 1):
        raise UserError(f"--many {cfg.many}: give a power of two, to be halved down to 1")
    if cfg.candidates < 2 or not 0 <= cfg.low < 0.5:
        raise UserError(f"--candidates {cfg.candidates} --low {cfg.low}: give 2 or more, and below 0.5")


def new_networks(cfg: Config) -> dict[str, nn.Module]:
    """Those of a stage by name, at their start."""
    before, learn, still, _ = STAGES[cfg.stage]
    place = cfg.init or (f"{cfg.out}/{before}" if before else cfg.seedvr)
    student = load_denoiser(place) if place else Denoiser(cfg.network)
    if student.config["size"] != cfg.network:
        raise UserError(f"--network {cfg.network}: {place} holds a {student.config['size']}")
    nets = {"student": student} | {name: deepcopy(student) for name in still}
    prior = cfg.prior or f"{cfg.out}/{'base' if cfg.stage == 'apt' else 'guide'}"
    if "judge" in learn:
        nets["judge"] = Judge(load_denoiser(prior))  # APT: the weights before distillation
    if "fake" in learn:
        # Choice: both start from the many-step model that has its guidance inside.
        nets["real"], nets["fake"] = load_denoiser(prior), load_denoiser(prior)
        nets["head"] = ScoreHead(2 * len(student.taps) * student.net.txt_in.out_features)
    for name in still:
        # Frozen, so nothing is lost to rounding step by step; an average, though, is made of small ones.
        half = cfg.network != "tiny" and name != "ema"
        nets[name].requires_grad_(False).to(torch.bfloat16 if half else torch.float32)
    for part in (part for net in nets.values() for part in net.modules() if isinstance(part, NaDiT)):
        part.checkpointing = cfg.checkpointing != "none"
    return nets


def memory(cfg: Config) -> float:
    """GB of what a stage's networks hold for as long as it trains."""
    _, learn, still, _ = STAGES.get(cfg.stage, ("", (), ("student",), None))
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in Denoiser(cfg.network).parameters())
    held = sum(4 if name == "ema" or cfg.network == "tiny" else 2 for name in still)
    return weights * (LEARNING * sum(name != "head" for name in learn) + held) / 1e9


def main(cfg: Config) -> None:
    # world
    check(cfg)
    world = init_world()
    world = ShardedWorld(world.rank, world.size, world.device) if cfg.shard else world
    require_room(memory(cfg), world.size if cfg.shard else 1, f"{cfg.stage} of {cfg.network}", world.device)
    torch.manual_seed(cfg.seed)
    # networks
    space = load_space(cfg.seedvr, world.device)
    if cfg.stage == "table":
        return print(compare(cfg.out, STAGES, cfg.many, space, held_out_clips(cfg, LOOKS), world.device))
    nets = new_networks(cfg)
    for net in nets.values():
        shard(net, Block, world) if cfg.shard else net.to(world.device)
    rates = {name: cfg.lr if name == "student" else cfg.lr_aux for name in STAGES[cfg.stage][1]}
    optimisers = {name: torch.optim.AdamW(nets[name].parameters(), lr) for name, lr in rates.items()}
    # data
    sources = replace(cfg, procedural=1.0) if cfg.cache else cfg  # a cache needs none
    clips = TrainingClips(sources, cfg.seed, stage=3 + list(STAGES).index(cfg.stage))  # after AdcVSR's two
    if cfg.cache:
        clips = CachedClips(cfg.cache, clips, "gt", cfg.validation)
    # One process looks, but for networks of which each holds a part.
    looks = held_out_clips(cfg, LOOKS) if world.is_main or cfg.shard else []
    # loop
    kept = "ema" if "ema" in nets else "student"  # what is looked at, and is the stage's result
    others = {f"net_{name}": net for name, net in nets.items() if name not in (kept, "real", "reference")}
    others |= {f"optimiser_{name}": each for name, each in optimisers.items() if name != "student"}
    nets["rank"] = ranking(cfg.rank, space, world.device)
    training = (ShardedRun if cfg.shard else Run)(
        replace(cfg, out=f"{cfg.out}/{cfg.stage}"), world, nets[kept], optimisers["student"], **others
    )
    for step, batch in training.steps(lambda done: loader(clips, done, cfg, world)):
        parts = map(to_inputs, micro_batches(batch, cfg.micro_batch, world.device))
        latents = [to_latents(part, space, cfg.no_text * (cfg.stage == "base")) for part in parts]
        losses = STAGES[cfg.stage][-1](latents, nets, optimisers, world, cfg, step)
        training.log(losses)
        training.stop |= float(losses.get("distance", 0)) > cfg.drift  # from the reference
        if looks and training.due:
            restorer = Restorer(nets[kept], space, walk(cfg, step))
            scores = validate(restorer, None, looks, training.out / "pictures", step)
            if world.is_main:
                training.note(**scores)


if __name__ == "__main__":
    run(lambda: main(configure()))
