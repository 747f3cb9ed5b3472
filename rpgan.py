"""SeedVR2's adversarial objective (arXiv 2506.05301, Sec. 3.3, Eq. 3, 4), and the same on AdcVSR's heads.

The judge says which of two clips is the more real (RpGAN). A little noise on a clip should not change its
mind (aR1 on real clips, aR2 on fake ones), and a fake clip should look to it inside as the true one does
(feature matching).

    train_onestep.py --stage apt    one judge, restored clips against HR's: SeedVR2's own
    train_stage2.py --gan rpgan     two heads, AdcVSR's types of clip: in place of the softplus of Eq. 2-4

    student's step   D(x_S) against D(real) of each type ---------------> softplus, feature matching
    D's step         D(real) against D(fake), all pairs of `LABELS` ----> softplus, aR1, aR2

The second is an experiment of ours, of which neither paper speaks.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discriminators import Scores, asked, five_clips

# ------------------------------------------------------------------------------------------------------
# The losses


def relativistic(better: Tensor, worse: Tensor) -> Tensor:
    """softplus(-(D(better) - D(worse))): RpGAN of SeedVR2 Sec. 3.3, as R3GAN has it."""
    return F.softplus(worse - better).mean()


def noisy(x: Tensor, sigma: float) -> Tensor:
    """A sample of N(x, sigma^2 I)."""
    return x + sigma * torch.randn_like(x)


def perturbed(scores: Tensor, again: Tensor) -> Tensor:
    """| D(x) - D(N(x, sigma I)) |^2. aR1 on real clips (APT Eq. 9), aR2 on restored ones (SeedVR2 Eq. 3),
    without second derivatives: for a linear D it is sigma^2 |dD/dx|^2."""
    return (scores - again).square().mean()


def feature_matching(ours: list[Tensor], theirs: list[Tensor], distance: Callable) -> Tensor:
    """Mean over layers. SeedVR2 Eq. 4 with the L1 distance; DUO-VSR's L_FM with the squared one."""
    return sum(distance(a.float(), b.float()) for a, b in zip(ours, theirs)) / len(ours)


# ------------------------------------------------------------------------------------------------------
# On two heads and five types of clip. Choice: all of it. Each head compares every type that it calls real
# with every one that it calls fake, clip by clip and place by place, though they show different things: as in
# any GAN without a condition. As in Eq. 2-4, heads count alike for D, and by their width for the student.


class Sides(NamedTuple):
    """The types of clip that a head calls real and fake; of a label of 0 it says nothing."""

    head: int  # its place in `Scores`
    real: list[str]
    fake: list[str]


def sides(labels: dict[str, tuple[int, int]], widths: tuple[int, int]) -> list[Sides]:
    """Of each head that has channels."""
    of = {y: [[kind for kind in labels if labels[kind][i] == y] for i in range(2)] for y in (+1, -1)}
    return [Sides(i, of[+1][i], of[-1][i]) for i, width in enumerate(widths) if width]


def relativistic_loss(scores: dict[str, Scores], heads: list[Sides]) -> Tensor:
    """D's, in place of Eq. 4: the sum of both heads, each a mean over pairs and places."""
    loss = 0.0
    for i, real, fake in heads:
        pairs = [(scores[r][i].float(), scores[f][i].float()) for r in real for f in fake]
        loss = loss + sum(relativistic(r, f) for r, f in pairs) / len(pairs)
    return loss


def relativistic_pull(student: Scores, scores: dict[str, Scores], heads: list[Sides]) -> Tensor:
    """The student's, in place of Softplus(-D) in Eq. 2, 3: it wants to be called more real than the real."""
    loss, width = 0.0, sum(x.shape[2] for x in student)
    for i, real, _ in heads:
        pulls = [relativistic(student[i].float(), scores[kind][i].float()) for kind in real]
        loss = loss + student[i].shape[2] / width * sum(pulls) / len(pulls)
    return loss


def penalties(kind: str, scores: Scores, again: Scores, heads: list[Sides]) -> tuple[Tensor, Tensor]:
    """What one type of clip adds to aR1, a mean over a head's real types, and to aR2, over its fake ones."""
    r1 = r2 = torch.zeros((), device=scores.detail.device)
    for i, real, fake in heads:
        if kind in real:
            r1 = r1 + perturbed(scores[i].float(), again[i].float()) / len(real)
        if kind in fake:
            r2 = r2 + perturbed(scores[i].float(), again[i].float()) / len(fake)  # SeedVR2 Eq. 3
    return r1, r2


MARGIN = "real - fake"  # in place of a type of clip: only differences mean anything here, levels drift


def margins(scores: dict[str, Scores], heads: list[Sides]) -> dict[str, Tensor]:
    """By how much each head calls its real types more real than its fake ones, for the log."""
    gaps = {}
    for i, *kinds in heads:
        real, fake = (sum(scores[k][i].float().mean() for k in side) / len(side) for side in kinds)
        gaps[Scores._fields[i]] = real - fake
    return gaps


# ------------------------------------------------------------------------------------------------------
# The two halves of a step


class Judged(NamedTuple):
    """What the student's half of a step leaves to the discriminator's, nothing of it with a gradient."""

    clips: dict[str, Tensor]  # x or f (b t c h w) of each type
    look: Callable  # what the layers that learn see of such a clip
    seen: dict[str, Tensor]
    scores: dict[str, Scores]
    match: Tensor


def student_loss(d: nn.Module, own: Tensor, target: Tensor, clips, encoder, cfg) -> tuple[Tensor, Judged]:
    """What one discriminator, which holds still, adds to the student's loss.

    own, target: x_S and x_T in [-1, 1], or f_S and f_T (b t c h w); clips, encoder: as in `train_step`.
    """
    labels, pixel = asked(cfg.labels, d.heads), d.domain == "pixel"
    # One cut for all types, or places would not pair.
    look = partial(d.look, cut=d.draw_cut()) if pixel else nn.Identity()
    types = five_clips(own, nn.Identity() if pixel else encoder, clips)
    seen = look(own)
    scores, ours = d(seen, taps=True)
    with torch.no_grad():
        _, theirs = d(look(target), taps=True)
        types_seen = {kind: seen.detach() if kind == "student" else look(types[kind]) for kind in labels}
        judged = {kind: d(x) for kind, x in types_seen.items()}
    match = feature_matching(ours, theirs, F.l1_loss)  # SeedVR2 Eq. 4
    loss = relativistic_pull(scores, judged, sides(labels, d.heads)) + cfg.lambda_fm * match
    return loss, Judged(types, look, types_seen, judged, match.detach())


def learn(name: str, d: nn.Module, judged: Judged, share: float, autocast, cfg) -> dict[str, Tensor]:
    """Adds the gradients of `share` of one discriminator's loss. Returns what there is to log, by name.

    A pair needs two types of clip, but all at once would not fit on a card. So the slope of the loss by each
    score comes first, from scores without a gradient; with it the types go back one after the other.
    """
    labels = asked(cfg.labels, d.heads)
    heads = sides(labels, d.heads)
    leaves = {k: Scores(*(x.detach().requires_grad_() for x in s)) for k, s in judged.scores.items()}
    disc = relativistic_loss(leaves, heads)
    disc.backward()
    terms = {"disc": disc.detach(), "r1": 0.0, "r2": 0.0, "match": judged.match}
    for kind, slopes in leaves.items():
        with autocast():
            scores = d(judged.seen.pop(kind))
            again = d(judged.look(noisy(judged.clips.pop(kind), cfg.sigma)))
            r1, r2 = penalties(kind, scores, again, heads)
            pull = sum((x * slope.grad).sum() for x, slope in zip(scores, slopes) if slope.grad is not None)
            loss = pull + cfg.lambda_r * (r1 + r2)
        (share * loss).backward()
        terms |= {"r1": terms["r1"] + r1.detach(), "r2": terms["r2"] + r2.detach()}
    gaps = {f"{name}/{MARGIN}/{head}": gap for head, gap in margins(judged.scores, heads).items()}
    return {f"{term}_{name}": value for term, value in terms.items()} | gaps
