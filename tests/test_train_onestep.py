"""train_onestep.py, onestep.py, sharding.py: losses with a known answer, who learns when, the order of the
stages in a two-dimensional world, and runs of every stage that end alike whatever happens to them."""

import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_runtime import two_processes
from test_train_stage1 import OFFLINE
from test_training import ALONE as WORLD
from test_training import names, signals  # noqa: F401 (signals is a fixture)
from torch import Tensor, nn

import cache
import rpgan
import seedvr2
import sharding
import train_onestep
from onestep import (
    Condition,
    Denoiser,
    Judge,
    Latents,
    Pixels,
    Restorer,
    ScoreHead,
    gradient_energy,
    load_denoiser,
    noised,
    one_step,
    patch_distance,
    ranking,
    sample,
    to_latents,
)
from rpgan import feature_matching, noisy, perturbed, relativistic
from runtime import UserError
from seedvr2 import NaDiT, VideoVAE
from sharding import ShardedWorld, shard
from train_onestep import (
    PRESETS,
    SCHEDULE,
    STAGES,
    Config,
    apt_step,
    base_step,
    configure,
    dmd_gradient,
    dmd_loss,
    dpo_loss,
    drawn,
    duo_step,
    flow_loss,
    guided,
    halve_step,
    halving_target,
    hinge,
    main,
    memory,
    prefer_step,
    walk,
)
from training import newest_checkpoint

ROOT = Path(train_onestep.__file__).parent
MICRO = seedvr2.PRESETS["tiny"] | {"width": 24, "heads": 1, "layers": 3, "text": 8}
SMOKE = PRESETS["smoke"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, signals):  # noqa: F811
    """Runs in this process compute where they are exactly repeatable, with a narrow network and few looks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(seedvr2.PRESETS, "tiny", MICRO)
    monkeypatch.setattr(train_onestep, "LOOKS", 1)
    torch.manual_seed(0)


# ----------------------------------------------------------------- a world of Gaussians

NOTHING = Condition(torch.zeros(0))


def gaussian(mean: float, s: float):
    """The velocity E[eps - z_0 | z_t] of data N(mean, s^2)."""

    def v(z: Tensor, t: Tensor, cond: Condition) -> Tensor:
        t = t.view(-1, *[1] * (z.ndim - 1))
        variance = (1 - t) ** 2 * s**2 + t**2
        away = z - (1 - t) * mean
        return t * away / variance - (mean + (1 - t) * s**2 * away / variance)

    return v


def test_the_velocity_leads_back_from_any_place_on_the_path():
    z0, eps, t = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.rand(5)
    z_t, v = noised(z0, eps, t), eps - z0
    torch.testing.assert_close(z_t - t.view(5, 1, 1) * v, z0)
    assert torch.equal(noised(z0, eps, torch.zeros(5)), z0)
    assert torch.equal(noised(z0, eps, torch.ones(5)), eps)


@pytest.mark.parametrize("steps", [1, 4, 64])
def test_on_a_straight_field_any_number_of_steps_is_exact(steps):
    z0, eps = torch.randn(3, 4), torch.randn(3, 4)
    seen = []

    def straight(z, t, cond):
        seen.append(t[0].item())
        return eps - z0

    torch.testing.assert_close(sample(straight, eps, NOTHING, steps), z0)
    assert seen == [i / steps for i in range(steps, 0, -1)]
    torch.testing.assert_close(one_step(straight, eps, NOTHING), z0)


def test_many_steps_through_a_gaussian_field_give_its_data():
    z = sample(gaussian(2.0, 0.5), torch.randn(20_000), NOTHING, 256)
    assert z.mean().item() == pytest.approx(2.0, abs=0.02) and z.std().item() == pytest.approx(0.5, rel=0.03)


def test_flow_matching_is_least_at_the_known_velocity_of_gaussian_data():
    z0, known = 1 + 0.5 * torch.randn(200_000), gaussian(1.0, 0.5)
    t, eps = drawn(z0)
    factor, offset = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    loss = flow_loss(lambda *args: factor * known(*args) + offset, z0, NOTHING, t, eps)
    slopes = torch.autograd.grad(loss, (factor, offset))
    assert all(abs(slope) < 0.02 for slope in slopes)
    wrong = flow_loss(lambda z, t, cond: -known(z, t, cond), z0, NOTHING, t, eps)
    assert wrong > 2 * loss


# ----------------------------------------------------------------- guidance and halving


def two_texts(z: Tensor, t: Tensor, cond: Condition) -> Tensor:
    return z + (3.0 if cond.text == "good" else 1.0)


def test_guidance_of_nothing_is_the_text_and_its_coefficients_sum_to_one():
    z, t = torch.randn(4, 2), torch.rand(4)
    assert torch.equal(guided(two_texts, z, t, NOTHING, 0.0), z + 3)
    torch.testing.assert_close(guided(two_texts, z, t, NOTHING, 1.5), z + 3 + 1.5 * 2)

    def deaf(z, t, cond):
        return z + 3

    for w in 0.5, 1.0, 6.5:  # as printed, without w on the second term, only w = 1 would pass
        torch.testing.assert_close(guided(deaf, z, t, NOTHING, w), z + 3)


def test_the_target_of_halving_is_two_explicit_steps_of_the_teacher():
    teacher, z, t, h = gaussian(0.0, 0.7), torch.randn(6).double(), torch.full((6,), 0.75).double(), 0.125
    middle = z - h * teacher(z, t, NOTHING)
    end = middle - h * teacher(middle, t - h, NOTHING)
    one = z - 2 * h * halving_target(teacher, z, t, h, NOTHING)
    torch.testing.assert_close(one, end)
    assert (z - 2 * h * teacher(z, t, NOTHING) - end).abs().max() > 1e-3  # the field is not straight


def test_on_a_straight_field_the_target_is_the_teacher():
    z0, eps, t = torch.randn(5), torch.randn(5), torch.full((5,), 1.0)
    target = halving_target(lambda *_: eps - z0, eps, t, 0.5, NOTHING)
    assert torch.equal(target, eps - z0)


class Places(nn.Module):
    """A velocity that remembers the steps it was asked for."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.zeros(())), []

    def forward(self, z, t, cond):
        self.asked += t.tolist()
        return self.weight * z


def test_halving_asks_only_for_steps_on_the_grid_and_its_teacher_is_the_last_rounds_student():
    cfg = replace(SMOKE, stage="halve", many=8, round=3)
    nets = {"student": Places(), "teacher": Places()}
    nets["teacher"].requires_grad_(False)
    optimiser = torch.optim.AdamW(nets["student"].parameters(), lr=0.1)
    assert [walk(cfg, step) for step in range(1, 11)] == [4] * 3 + [2] * 3 + [1] * 4
    for step in range(1, 10):
        before, nets["student"].asked = nets["student"].weight.item(), []
        halve_step([(torch.randn(64, 2), NOTHING)], nets, {"student": optimiser}, WORLD, cfg, step)
        steps = walk(cfg, step)
        assert set(nets["student"].asked) == {i / steps for i in range(1, steps + 1)}
        if step in (4, 7):
            assert nets["teacher"].weight.item() == before
        (state,) = optimiser.state.values()
        assert state["step"] == (step - 1) % 3 + 1  # restarted with each round


@pytest.mark.parametrize("fold, expected", [(0.0, 3.0), (2.0, 3.0 + 2.0 * 2.0)])
def test_in_seedvr2s_recipe_the_first_halving_takes_guidance_in_and_later_ones_do_not(fold, expected):
    """Fields that do not depend on z: the target of a halving is the teacher's, guided or not."""

    class Constant(Places):
        def forward(self, z, t, cond):
            return (3.0 if cond.text == "good" else 1.0) + self.weight + 0 * z

    for step, target in (1, expected), (4, 3.0):  # the teacher of the second round is a student again
        nets = {"student": Constant(), "teacher": Constant().requires_grad_(False)}
        cfg = replace(SMOKE, stage="halve", many=8, round=3, fold=fold)
        optimiser = {"student": torch.optim.SGD(nets["student"].parameters(), lr=0.5)}
        halve_step([(torch.zeros(4, 2), NOTHING)], nets, optimiser, WORLD, cfg, step)
        assert 3.0 + nets["student"].weight.item() == pytest.approx(target)


# ----------------------------------------------------------------- distribution matching


def gradient_between(m: float, mu: float, s: float, t: float, count: int = 1000, scale: float = 1.0):
    z0 = scale * (m + s * torch.randn(count, 4))
    time = torch.full((count,), t)
    z_t = noised(z0, scale * torch.randn(count, 4), time)
    v_real, v_fake = (scale * gaussian(mean, s)(z_t / scale, time, NOTHING) for mean in (mu, m))
    return z0, z_t, time, v_real, v_fake


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_between_two_gaussians_the_gradient_is_known_and_leads_from_the_students_to_the_real(t):
    m, mu, s = 2.0, -1.0, 0.6
    z0, z_t, time, v_real, v_fake = gradient_between(m, mu, s, t)
    gradient = dmd_gradient(z0, z_t, time, v_real, v_fake)
    x_real = z_t - t * v_real
    off = (z0 - x_real).abs().mean(1, keepdim=True)  # of each clip alone, and not |x_fake - x_real|
    known = (m - mu) * t**2 / ((1 - t) ** 2 * s**2 + t**2)
    torch.testing.assert_close(gradient * off, torch.full_like(z0, known), rtol=1e-3, atol=1e-4)
    assert (gradient > 0).all()  # downhill is from 2 towards -1

    z0.requires_grad_()
    (slope,) = torch.autograd.grad(dmd_loss(z0, gradient), z0)
    torch.testing.assert_close(slope * z0.numel(), gradient)


def test_the_gradient_vanishes_where_real_and_fake_agree_and_does_not_know_the_scale_of_latents():
    z0, z_t, t, v_real, v_fake = gradient_between(1.0, 0.0, 0.5, 0.4)
    assert not dmd_gradient(z0, z_t, t, v_real, v_real).any()
    one = dmd_gradient(z0, z_t, t, v_real, v_fake)
    for k in 0.1, 7.0:
        torch.testing.assert_close(dmd_gradient(k * z0, k * z_t, t, k * v_real, k * v_fake), one)


def test_the_gradient_is_detached_and_float32_under_autocast():
    z0, z_t, t, v_real, v_fake = gradient_between(1.0, 0.0, 0.5, 0.4)
    plain = dmd_gradient(z0, z_t, t, v_real, v_fake)
    with torch.autocast("cpu", torch.bfloat16):
        gradient = dmd_gradient(z0.requires_grad_(), z_t, t, v_real, v_fake)
    assert gradient.dtype == torch.float32 and not gradient.requires_grad and torch.equal(gradient, plain)
    half = dmd_gradient(z0, z_t, t, v_real.bfloat16(), v_fake.bfloat16())
    assert half.dtype == torch.float32


# ----------------------------------------------------------------- adversarial losses


def test_rpgan_is_log_2_where_both_are_equal_and_only_differences_count():
    a, b = torch.randn(6), torch.randn(6)
    assert relativistic(a, a).item() == pytest.approx(math.log(2))
    torch.testing.assert_close(relativistic(a + 5, b + 5), relativistic(a, b))
    assert relativistic(a + 3, a) < math.log(2) < relativistic(a, a + 3)
    assert relativistic(torch.tensor([2.0]), torch.tensor([0.5])).item() == pytest.approx(
        math.log(1 + math.exp(-1.5))
    )


def test_r1_of_a_linear_judge_is_the_square_of_its_slope_times_that_of_sigma():
    slope, x = torch.randn(8), torch.randn(200_000, 8)
    found = perturbed(x @ slope, noisy(x, 0.1) @ slope)
    assert found.item() == pytest.approx(0.1**2 * slope.square().sum().item(), rel=0.02)


def test_the_hinge_is_known_and_does_not_reach_the_score_models():
    scores = {"real": torch.tensor([2.0, 0.0]), "fake": torch.tensor([-3.0, 0.5])}
    found = hinge(lambda features: features[0], [scores["real"]], [scores["fake"]])
    assert found.item() == pytest.approx((0 + 1) / 2 + (0 + 1.5) / 2)
    backbone, head = nn.Linear(3, 4), nn.Linear(4, 1)
    features = [backbone(torch.randn(5, 3))]
    loss = hinge(lambda f: head(f[0]), features, [f + 1 for f in features])
    grads = torch.autograd.grad(loss, [*backbone.parameters(), *head.parameters()], allow_unused=True)
    assert grads[:2] == (None, None) and grads[2].abs().sum() > 0


def test_feature_matching_is_a_mean_over_layers_in_either_distance():
    ours, theirs = [torch.zeros(2, 3), torch.zeros(4)], [torch.full((2, 3), 2.0), torch.full((4,), -4.0)]
    assert feature_matching(ours, theirs, F.l1_loss).item() == (2 + 4) / 2
    assert feature_matching(ours, theirs, F.mse_loss).item() == (4 + 16) / 2


# ----------------------------------------------------------------- preferences


def preference(student, reference, winner, loser, beta=10.0):
    torch.manual_seed(3)
    t, eps = drawn(winner)
    return dpo_loss(student, reference, winner, loser, NOTHING, t, eps, beta)


def test_dpo_begins_at_log_2_and_the_reference_has_no_gradient():
    winner, loser, student = torch.randn(4, 3), torch.randn(4, 3), Places()
    reference = deepcopy(student)
    loss, right, distance = preference(student, reference, winner, loser)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and distance == 0
    assert student.weight.grad.abs() > 0 and reference.weight.grad is None


def test_swapping_winner_and_loser_mirrors_the_gradient_of_dpo():
    winner, loser, slopes = torch.randn(4, 3), torch.randn(4, 3), []
    for pair in (winner, loser), (loser, winner):
        student = Places()
        preference(student, deepcopy(student), *pair)[0].backward()
        slopes.append(student.weight.grad)
    torch.testing.assert_close(slopes[0], -slopes[1])


def test_dpo_is_its_formula_with_errors_as_means_over_a_clip():
    winner, loser, student, reference = torch.randn(4, 3), torch.randn(4, 3), Places(), Places()
    student.weight.data += 0.3
    loss, right, distance = preference(student, reference, winner, loser, beta=5.0)
    torch.manual_seed(3)
    t, eps = drawn(winner)
    margins, away = [], 0.0
    for z0 in winner, loser:
        z_t = noised(z0, eps, t)
        e, e_ref = (((w * z_t - (eps - z0)) ** 2).mean(1) for w in (0.3, 0.0))
        margins.append(e - e_ref)
        away += (0.3 * z_t).square().mean() / 2
    margin = margins[0] - margins[1]
    torch.testing.assert_close(loss, F.softplus(5.0 / 2 * margin).mean())
    torch.testing.assert_close(right, (margin < 0).float().mean())
    torch.testing.assert_close(distance, away)


# ----------------------------------------------------------------- a world of two dimensions


class Field(nn.Module):
    """A velocity in two dimensions, and its hidden layers as features."""

    def __init__(self, width: int = 64, judge: bool = False):
        super().__init__()
        sizes = (2 + 1 + 8, width), (width, width), (width, width), (width, 1 if judge else 2)
        self.layers, self.judge = nn.ModuleList(nn.Linear(*pair) for pair in sizes), judge

    def forward(self, z, t, cond, taps: bool = False):
        angles = t[:, None] * torch.arange(1, 5) * math.pi / 2
        x, hidden = torch.cat([z, cond.lr, angles.sin(), angles.cos()], -1), []
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
            hidden.append(x)
        answer = self.layers[-1](x)
        if self.judge:
            return answer[:, 0], hidden
        return (answer, hidden) if taps else answer


class Head(nn.Sequential):
    """A score of the hidden layers of two fields."""

    def __init__(self, width: int = 64):
        super().__init__(nn.Linear(2 * 3 * width, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, features):
        return super().forward(torch.cat(features, -1))


def real(count: int) -> tuple[Tensor, Condition]:
    """LR y and one of the two HR that it may come from: (y, +-(1 + 0.3 y)), and a little noise."""
    y, side = 2 * torch.rand(count, 1) - 1, 2 * torch.randint(0, 2, (count, 1)) - 1
    return torch.cat([y, side * (1 + 0.3 * y)], 1) + 0.1 * torch.randn(count, 2), Condition(y)


@torch.no_grad()
def energy(net, steps: int, count: int = 4000) -> float:
    """Energy distance, x 1000, between what the field makes and real data, each beside its y."""
    torch.manual_seed(99)
    z0, cond = real(count)
    z = sample(net, torch.randn(count, 2), cond, steps)
    a, b = (torch.cat([x, cond.lr], 1) for x in (z, z0))
    between, in_a, in_b = (torch.cdist(*pair).mean() for pair in ((a, b), (a, a), (b, b)))
    return 1000 * (2 * between - in_a - in_b).item()


def train(step_of, nets: dict, rates: dict[str, float], cfg: Config, steps: int) -> None:
    optimisers = {name: torch.optim.AdamW(nets[name].parameters(), lr) for name, lr in rates.items()}
    for step in range(1, steps + 1):
        torch.manual_seed(1000 + step)
        step_of([real(256)], nets, optimisers, WORLD, cfg, step)


def score_models(base: nn.Module, student: nn.Module) -> dict[str, nn.Module]:
    nets = {"student": deepcopy(student), "fake": deepcopy(base), "real": deepcopy(base), "head": Head()}
    nets["real"].requires_grad_(False)
    return nets


@pytest.mark.slow
def test_on_a_world_of_two_dimensions_the_stages_come_in_their_order():
    """In one step the many-step model answers with the mean; stage I splits it, stage II is closer still."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cfg, base = replace(SMOKE, many=64, round=200), Field()
    train(base_step, {"student": base}, {"student": 2e-3}, cfg, 3000)
    halved = deepcopy(base)
    teacher = deepcopy(base).requires_grad_(False)
    train(
        halve_step,
        {"student": halved, "teacher": teacher},
        {"student": 1e-3},
        replace(cfg, stage="halve"),
        1200,
    )
    duo = score_models(base, halved)
    rates = {"student": 1e-4, "fake": 1e-3, "head": 1e-3}
    train(duo_step, duo, rates, replace(cfg, stage="duo"), 500)
    many, one, first, second = energy(base, 64), energy(base, 1), energy(halved, 1), energy(duo["student"], 1)
    print(f"base {many:.2f}, in one step {one:.1f}; stage I {first:.2f}; stage II {second:.2f}")
    assert many < 5 and one > 100
    assert first < one / 10 and second < first
    torch.set_num_threads(threads)


# ----------------------------------------------------------------- who learns when


def watched(nets: dict[str, nn.Module]) -> tuple[dict, list]:
    """Optimisers, and at each of their steps whose gradients there are."""
    seen = []

    def note(name):
        def hook(*_):
            found = {n for n, net in nets.items() if any(p.grad is not None for p in net.parameters())}
            seen.append((name, found))

        return hook

    optimisers = {}
    for name, net in nets.items():
        if any(p.requires_grad for p in net.parameters()):
            optimisers[name] = torch.optim.SGD(net.parameters(), lr=0.01)
            optimisers[name].register_step_pre_hook(note(name))
    return optimisers, seen


def test_of_the_two_streams_each_network_learns_in_its_turn_three_to_one():
    nets = score_models(Field(), Field())
    optimisers, seen = watched(nets)
    before = deepcopy(nets)
    losses = duo_step([real(8)], nets, optimisers, WORLD, SMOKE, 1)
    assert [name for name, _ in seen] == ["fake", "head"] * 3 + ["student"]
    assert [found for _, found in seen] == [{"fake", "head"}, {"head"}] * 3 + [{"student"}]
    assert {"dmd", "adv", "match", "diff", "disc", "loss"} == set(losses)
    for name, net in nets.items():
        same = [torch.equal(p, q) for p, q in zip(net.parameters(), before[name].parameters())]
        assert all(same) if name == "real" else not all(same), name
    terms = losses["dmd"] + SMOKE.lambda_g * losses["adv"] + SMOKE.lambda_fm * losses["match"]
    torch.testing.assert_close(losses["loss"], terms)


def test_the_fake_model_learns_from_diffusion_alone():
    """Its gradient is that of L_Diff on the student's clips, whatever the head thinks of its features."""
    changed = []
    for head_weight in 0.0, 5.0:
        torch.manual_seed(1)
        nets = score_models(Field(), Field())
        for p in nets["head"].parameters():
            p.data += head_weight
        optimisers, _ = watched(nets)
        torch.manual_seed(2)
        duo_step([real(8)], nets, optimisers, WORLD, replace(SMOKE, updates=1, lambda_g=0.0), 1)
        changed.append(nets["fake"])
    for p, q in zip(*(net.parameters() for net in changed)):
        assert torch.equal(p, q)


def test_the_students_adversarial_gradient_passes_through_both_frozen_score_models():
    cfg, nets = replace(SMOKE, lambda_fm=0.0, updates=1), score_models(Field(), Field())
    moved = []
    for lambda_g in 0.0, 10.0:
        copy = deepcopy(nets)
        optimisers, _ = watched(copy)
        torch.manual_seed(2)
        duo_step([real(8)], copy, optimisers, WORLD, replace(cfg, lambda_g=lambda_g), 1)
        moved.append(copy["student"])
    assert not any(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in moved)))


def test_in_apt_the_judge_learns_then_the_student_and_the_average_follows():
    nets = {"student": Field(), "judge": Field(judge=True)}
    nets["ema"] = deepcopy(nets["student"]).requires_grad_(False)
    optimisers, seen = watched(nets)
    before = deepcopy(nets["ema"])
    losses = apt_step([real(8)], nets, optimisers, WORLD, SMOKE, 1)
    assert seen == [("judge", {"judge"}), ("student", {"student"})]
    for average, was, now in zip(*(nets_.parameters() for nets_ in (nets["ema"], before, nets["student"]))):
        torch.testing.assert_close(average, 0.995 * was + 0.005 * now)
        assert not torch.equal(was, now)
    terms = losses["adv"] + SMOKE.lambda_l1 * losses["l1"] + SMOKE.lambda_f * losses["match"]
    torch.testing.assert_close(losses["loss"], terms)


def test_the_judge_never_sees_step_0_and_for_videos_late_steps():
    class Times(Field):
        def forward(self, z, t, cond, taps=False):
            self.seen = t
            return super().forward(z, t, cond)

    for shift, middle in (1.0, 0.5), (12.0, 12 * 0.5 / (1 + 11 * 0.5)):
        nets = {"student": Field(), "judge": Times(judge=True), "ema": Field()}
        optimisers = {n: torch.optim.SGD(nets[n].parameters(), lr=0.0) for n in ("student", "judge")}
        apt_step([real(20_000)], nets, optimisers, WORLD, replace(SMOKE, shift=shift), 1)
        t = nets["judge"].seen
        assert 0 < t.min() and t.max() <= 1 and t.median().item() == pytest.approx(middle, abs=0.02)


def test_preferences_take_the_best_and_the_worst_of_the_references_candidates():
    """Ranked by their second coordinate, the student learns to answer above."""
    asked = []

    def rank(z, z0, cond):
        asked.append(z)
        return z[:, 1]

    nets = {"student": Field(), "rank": rank}
    nets["reference"] = deepcopy(nets["student"]).requires_grad_(False)
    optimisers = {"student": torch.optim.AdamW(nets["student"].parameters(), 1e-4)}
    cfg = replace(SMOKE, candidates=5, beta=10.0)
    batch = [real(512)]
    first = prefer_step(batch, nets, optimisers, WORLD, cfg, 1)
    assert len(asked) == 5 and first["loss"].item() == pytest.approx(math.log(2)) and first["distance"] == 0
    for step in range(2, 40):
        last = prefer_step(batch, nets, optimisers, WORLD, cfg, step)
    assert last["right"] > 0.5 and last["distance"] > 0 and last["loss"] < first["loss"]


# ----------------------------------------------------------------- networks and spaces


def shared_inputs(grid=(2, 3, 6, 6), n: int = 48) -> tuple[Tensor, Tensor, Condition]:
    z = torch.randn(*grid, n)
    return z, torch.rand(len(z)), Condition(torch.randn(*grid, n))


def test_a_denoiser_is_nadit_on_noise_lr_and_ones_at_a_thousandfold_step():
    net, (z, t, cond) = Denoiser("tiny"), shared_inputs()
    x = torch.cat([z, cond.lr, torch.ones(*z.shape[:-1], 1)], -1)
    for text, rows in ("good", slice(0, 4)), ("none", slice(4, 8)):
        expected = net.net(x, net.texts[rows], 1000 * t)
        assert torch.equal(net(z, t, cond._replace(text=text)), expected)
    v, tokens = net(z, t, cond, taps=True)
    assert torch.equal(v, net(z, t, cond)) and [x.shape for x in tokens] == [(2, 3, 3, 3, 24)] * 3
    assert not torch.equal(v, net(z, t, cond._replace(text="none")))


def test_the_judge_looks_after_the_papers_blocks_or_their_share_of_fewer():
    with torch.device("meta"):
        taps = {name: Denoiser(name).taps for name in ("7b", "3b")}
    assert taps["7b"] == [16, 26, 36] and taps["3b"] == [14, 23, 32] and Denoiser("tiny").taps == [1, 2, 3]


def test_judge_and_head_score_each_clip_alone():
    judge, head, (x, t, cond) = Judge(Denoiser("tiny")), ScoreHead(2 * 3 * 24), shared_inputs()
    logits, features = judge(x, t, cond)
    scores = head(features + features)
    assert logits.shape == (2,) and len(features) == 3 and scores.shape == (2, 3, 3, 3)
    first, _ = judge(x[:1], t[:1], Condition(cond.lr[:1]))
    torch.testing.assert_close(logits[:1], first)
    torch.testing.assert_close(scores[:1], head([tokens[:1] for tokens in features + features]))


def test_every_weight_of_judge_and_head_learns():
    judge, (x, t, cond) = Judge(Denoiser("tiny")), shared_inputs()
    judge(x, t, cond)[0].sum().backward()
    idle = {name for name, p in judge.named_parameters() if p.grad is None or not p.grad.any()}
    # Its velocity is not asked for, and keys' bias moves no softmax.
    assert all(".vid_out" in name or name.endswith("vid_out_norm.weight") for name in idle)


def test_residual_pixels_come_back_exactly_and_nothing_is_bicubic():
    space, lr, hr = Pixels(), torch.rand(2, 3, 3, 8, 6) * 2 - 1, torch.rand(2, 3, 3, 32, 24) * 2 - 1
    z, blur = space.encode(hr, lr), space.condition(lr)
    assert z.shape == blur.shape == (2, 3, 8, 6, 48)
    torch.testing.assert_close(space.decode(z, blur), hr)
    bicubic = F.interpolate(lr.flatten(0, 1), scale_factor=4.0, mode="bicubic").unflatten(0, (2, 3))
    torch.testing.assert_close(space.decode(torch.zeros_like(z), blur), bicubic)


def small_vae() -> VideoVAE:
    return VideoVAE(widths=(4, 8, 8, 8), groups=2)


def test_latents_are_the_video_vaes_and_lr_gets_there_by_antialiased_bicubic():
    space, lr, hr = (
        Latents(small_vae()),
        torch.rand(1, 5, 3, 8, 12) * 2 - 1,
        torch.rand(1, 5, 3, 32, 48) * 2 - 1,
    )
    torch.manual_seed(4)
    z = space.encode(hr, lr)
    expected = space.vae.encode(hr, torch.Generator().manual_seed(4))  # a sample of the posterior
    torch.testing.assert_close(z, expected.permute(0, 1, 3, 4, 2))
    assert z.shape == (1, 2, 4, 6, 16) and space.decode(z, z).shape == hr.shape
    torch.manual_seed(4)
    big = F.interpolate(lr[0], scale_factor=4, mode="bicubic", antialias=True).clamp(-1, 1)[None]
    expected = space.vae.encode(big, torch.default_generator).permute(0, 1, 3, 4, 2)
    torch.manual_seed(4)
    torch.testing.assert_close(space.condition(lr), expected)
    assert not list(space.parameters())  # frozen


def test_without_text_hr_is_blurred_and_lr_is_not():
    clips = {"lr": torch.rand(1, 2, 3, 8, 8), "hr": torch.rand(1, 2, 3, 32, 32)}
    (sharp, good), (soft, none) = (to_latents(clips, Pixels(), share) for share in (0.0, 1.0))
    assert good.text == "good" and none.text == "none" and torch.equal(good.lr, none.lr)
    hr, blurred = (Pixels().decode(z, good.lr) for z in (sharp, soft))
    torch.testing.assert_close(hr, clips["hr"])
    assert gradient_energy(blurred) < 0.1 * gradient_energy(hr)
    shares = [to_latents(clips, Pixels(), 0.1)[1].text for _ in range(400)]
    assert 20 < shares.count("none") < 65


def test_a_restorer_walks_from_the_noise_of_its_seed():
    net, lr = Denoiser("tiny"), torch.rand(1, 3, 3, 8, 8) * 2 - 1
    one, again, other = (Restorer(net, Pixels(), 2, seed)(lr) for seed in (0, 0, 1))
    assert one.shape == (1, 3, 3, 32, 32) and torch.equal(one, again) and not torch.equal(one, other)
    blur = Pixels().condition(lr)
    eps = torch.randn(blur.shape, generator=torch.Generator().manual_seed(0))
    z = eps - net(eps, torch.ones(1), Condition(blur)) / 2
    z = z - net(z, torch.full((1,), 0.5), Condition(blur)) / 2
    torch.testing.assert_close(one, Pixels().decode(z, blur))


@pytest.fixture
def seedvr(tmp_path, monkeypatch) -> Path:
    """A folder as SeedVR's, of a network and a VAE as small as tests want them."""
    monkeypatch.setitem(seedvr2.PRESETS, "3b", MICRO | {"latents": 16})
    folder = tmp_path / "SeedVR-3B"
    folder.mkdir()
    torch.save(NaDiT(**seedvr2.PRESETS["3b"]).state_dict(), folder / "seedvr_ema_3b.pth")
    torch.save(small_vae().state_dict(), folder / "ema_vae.pth")
    torch.save(torch.randn(5, 8).bfloat16(), folder / "pos_emb.pt")
    torch.save(torch.randn(7, 8).bfloat16(), tmp_path / "neg_emb.pt")  # beside it
    return folder


def test_the_many_step_weights_of_seedvr_are_a_denoiser_with_both_its_prompts(seedvr, tmp_path):
    net, state = load_denoiser(seedvr), torch.load(seedvr / "seedvr_ema_3b.pth")
    assert all(torch.equal(weights, state[name]) for name, weights in net.net.state_dict().items())
    texts = [torch.load(path).float() for path in (seedvr / "pos_emb.pt", tmp_path / "neg_emb.pt")]
    assert torch.equal(net.texts, torch.cat(texts)) and net.config == {"size": "3b", "tokens": [5, 7]}
    net.save_pretrained(tmp_path / "again")
    assert all(
        torch.equal(p, q) for p, q in zip(load_denoiser(tmp_path / "again").parameters(), net.parameters())
    )


# ----------------------------------------------------------------- what tells restorers apart


def test_gradient_energy_and_patch_distance_know_a_ramp_a_copy_and_a_blur():
    ramp = torch.arange(16.0).expand(1, 2, 3, 16, 16)
    assert gradient_energy(ramp).item() == 0.5 and gradient_energy(3 * ramp).item() == 4.5
    hr = torch.rand(2, 3, 64, 64)
    soft = F.avg_pool2d(hr, 3, 1, 1)
    assert abs(patch_distance(hr, hr)) < 1e-4 and patch_distance(soft, hr) > 0.1
    assert abs(patch_distance(hr.flip(-1), hr)) < 0.01  # the same patches at other places


def test_offline_the_best_candidate_is_the_one_with_hrs_gradient_energy():
    hr, lr = torch.rand(1, 2, 3, 32, 32) * 2 - 1, torch.rand(1, 2, 3, 8, 8) * 2 - 1
    space, rank = Pixels(), ranking("gradient", Pixels(), torch.device("cpu"))
    z0, cond = to_latents({"lr": lr, "hr": hr}, space)
    scores = [rank(space.encode(factor * hr, lr), z0, cond).item() for factor in (1 / 3, 1.0, 3.0)]
    assert scores[1] == 0 and scores[0] == pytest.approx(scores[2], rel=1e-3) and scores[0] < 0


# ----------------------------------------------------------------- runs

ORDER = list(STAGES)


def config(stage: str, out: Path, **changes) -> Config:
    small = {"size": 24, "frames": 2, "steps": 4, "lr": SCHEDULE[stage][2][1]}
    return replace(SMOKE, stage=stage, out=str(out), **small | changes)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with every stage, of four steps each, at a narrow network."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setitem(seedvr2.PRESETS, "tiny", MICRO)
        patch.setattr(train_onestep, "LOOKS", 1)
        for stage in ORDER:
            main(config(stage, out))
    return out


def assert_same(a, b) -> None:
    """Equal bit for bit, whatever is nested in whatever."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_same(*pair)
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_same_checkpoint(one: Path, other: Path, but=("out", "init", "prior")) -> None:
    states = [torch.load(folder / "train.pt", weights_only=True) for folder in (one, other)]
    for state in states:
        state["config"] = {k: v for k, v in state["config"].items() if k not in but}
    assert_same(*states)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ORDER)
def test_two_and_two_steps_equal_four_in_each_stage(made, tmp_path, stage):
    before = STAGES[stage][0]
    names_of = {"prior": str(made / ("base" if stage == "apt" else "guide"))}
    names_of["init"] = str(made / before) if before else ""
    main(config(stage, tmp_path, steps=2, **names_of))
    torch.rand(7)  # the state that random numbers are in does not matter
    main(config(stage, tmp_path, **names_of))
    assert_same_checkpoint(made / stage / "step_000004", tmp_path / stage / "step_000004")
    losses = [[line["loss"] for line in logged(out / stage) if "loss" in line] for out in (made, tmp_path)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_each_stage_starts_from_the_one_before_and_keeps_what_its_successors_need(made):
    for stage in ORDER[1:]:
        one, other = (load_denoiser(made / s).state_dict() for s in (STAGES[stage][0], stage))
        changed = [name for name in one if not torch.equal(one[name], other[name])]
        assert changed and max((one[name] - other[name]).abs().max() for name in changed) < 0.01, stage
    kept = torch.load(made / "apt" / "step_000004" / "train.pt", weights_only=True)
    assert {"net_student", "net_judge", "optimiser", "optimiser_judge"} <= set(kept)
    assert "net_real" not in torch.load(made / "duo" / "step_000004" / "train.pt", weights_only=True)


def test_losses_are_logged_under_the_names_of_the_docs(made):
    keys = {
        "base": {"loss"}, "guide": {"loss"}, "halve": {"loss"},
        "apt": {"loss", "disc", "r1", "r2", "adv", "l1", "match"},
        "duo": {"loss", "diff", "disc", "dmd", "adv", "match"},
        "prefer": {"loss", "right", "distance"},
    }  # fmt: skip
    text = (ROOT / "docs" / "onestep.md").read_text()
    for stage, expected in keys.items():
        lines = logged(made / stage)
        assert expected <= set(lines[0]) and any("psnr" in line for line in lines)
        assert all(f"`{name}`" in text for name in expected)


def test_the_table_has_a_row_for_each_stage_and_a_picture(made, capsys):
    main(replace(config("base", made), stage="table"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines[2:]]
    many = [("base", "4"), ("base", "1"), ("guide", "4"), ("guide", "1")]
    assert rows == [("bicubic", ""), *many, *((stage, "1") for stage in ("halve", "apt", "duo", "prefer"))]
    assert [line.split("|")[6].strip() for line in lines if line.startswith("| guide | 4")] == ["teacher"]
    width, height = Image.open(made / "table" / "procedural_0.png").size
    assert width == 10 * 24 and height == 24 + 3 * 2


def test_the_full_path_runs_on_seedvrs_files(seedvr, tmp_path):
    """Latents, prompts, frozen networks in bfloat16 and recomputed activations, on small stand-ins."""
    cfg = {"network": "3b", "seedvr": str(seedvr), "frames": 5, "size": 32, "steps": 2}
    cfg |= {"checkpointing": "all"}
    for stage in "guide", "halve", "duo":
        start = {"init": str(seedvr)} if stage == "guide" else {}
        main(config(stage, tmp_path / "run", every=2, **cfg, **start))
        assert all("psnr" in line for line in logged(tmp_path / "run" / stage)[-1:])
    with pytest.raises(UserError, match="--network tiny: .* holds a 3b"):
        main(config("guide", tmp_path / "other", **cfg | {"network": "tiny"}, init=str(seedvr)))


def test_recomputed_activations_change_no_gradient():
    net, (z, t, cond) = Denoiser("tiny"), shared_inputs()
    grads = []
    for net.net.checkpointing in False, True:
        net.zero_grad()
        net(z, t, cond).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_preferences_stop_where_the_student_has_left_the_reference(made, tmp_path, capsys):
    start = {"init": str(made / "duo")}
    main(config("prefer", tmp_path, steps=50, every=50, lr=1e-2, drift=1e-3, **start))
    assert "asked to stop, after step" in capsys.readouterr().out
    (kept,) = (name for name in names(tmp_path / "prefer") if name.startswith("step"))
    distances = [line["distance"] for line in logged(tmp_path / "prefer") if "distance" in line]
    assert 1 < int(kept[5:]) == len(distances) < 50
    assert distances[-1] > 1e-3 and all(distance <= 1e-3 for distance in distances[:-1])


def test_a_cache_needs_no_sources(tmp_path):
    small = replace(cache.PRESETS["smoke"], frames=2, size=32, clips=2, out=str(tmp_path / "cache"))
    cache.main(small)
    main(
        config(
            "base", tmp_path / "run", cache=small.out, procedural=0.1, videos="nowhere", images="", steps=1
        )
    )
    assert newest_checkpoint(tmp_path / "run" / "base")


# ----------------------------------------------------------------- settings


@pytest.mark.parametrize("preset, column", [("full", 0), ("tiny", 1), ("smoke", 2)])
@pytest.mark.parametrize("stage", ORDER)
def test_each_stage_has_its_steps_and_rate_in_each_preset(preset, column, stage):
    cfg = configure(["--preset", preset, "--stage", stage])
    steps, lr = SCHEDULE[stage][column]
    assert cfg == replace(PRESETS[preset], stage=stage, steps=steps, lr=lr)
    given = configure(["--preset", preset, "--stage", stage, "--lr", "0.5", "--steps", "7"])
    assert (given.lr, given.steps) == (0.5, 7)


def test_halving_ends_with_the_last_step_in_each_preset():
    for preset, column in ("full", 0), ("tiny", 1), ("smoke", 2):
        cfg, (steps, _) = replace(PRESETS[preset], stage="halve"), SCHEDULE["halve"][column]
        rounds = int(math.log2(cfg.many))
        assert steps == rounds * cfg.round and walk(cfg, steps) == 1 and walk(cfg, steps - cfg.round) == 2


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"size": 20}, "--size 20: give a multiple of 8"),
        ({"many": 12}, "--many 12: give a power of two"),
        ({"candidates": 1}, "--candidates 1"),
        ({"low": 0.5}, "--low 0.5"),
        ({"micro_batch": 0}, "--micro-batch 0: give 1 or more"),
        ({"seedvr": "nowhere", "size": 32, "frames": 4}, "--frames 4: the VAE takes 4k + 1"),
        ({"seedvr": "nowhere", "size": 32, "frames": 5}, "nowhere: no ema_vae"),
        ({"stage": "guide"}, "base: neither a checkpoint nor SeedVR's weights. Run the stage before"),
        ({"stage": "table"}, "no stage is in it yet. Begin with --stage base"),
        ({"cache": "nowhere"}, "nowhere: no cache.json"),
        ({"rank": "nowhere"}, "DOVER not computed: no nowhere"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_leaves_nothing(tmp_path, changes, line):
    with pytest.raises(UserError) as error:
        main(replace(config("base", tmp_path / "run"), **changes))
    assert line in str(error.value) and "\n" not in str(error.value) and names(tmp_path) == []


def test_a_dry_run_says_the_memory_and_leaves_nothing(tmp_path, capsys):
    main(config("base", tmp_path / "run", dry_run=True))
    first, *_, last = capsys.readouterr().out.splitlines()
    gb = 16 * sum(p.numel() for p in Denoiser("tiny").parameters()) / 1e9
    assert first.startswith(f"base of tiny: {gb:.3g} GB a card of weights, gradients and Adam's moments")
    assert " s a step, " in last and names(tmp_path) == []


def test_memory_is_what_was_counted_and_what_cannot_fit_is_refused(tmp_path, monkeypatch):
    assert memory(Config(stage="duo")) == pytest.approx(2 * 3.391 * 16 + 3.391 * 2, rel=1e-3)
    assert memory(Config(stage="apt", network="7b")) == pytest.approx(2 * 8.24 * 16 + 8.24 * 4, rel=1e-3)
    monkeypatch.setattr(sharding.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 80e9 / 4096))
    for stage, network, gb, cards in ("duo", "3b", "115", 2), ("apt", "7b", "297", 5):
        with pytest.raises(UserError) as error:
            main(Config(stage=stage, network=network, dry_run=True, out=str(tmp_path / "run")))
        line = str(error.value)
        assert f"{stage} of {network}: {gb} GB a card" in line and "there are 80." in line
        assert f"Give --shard and torchrun --nproc_per_node={cards} or more" in line
    with pytest.raises(UserError, match="weights/SeedVR-3B: no ema_vae"):  # one card is enough for this
        main(Config(stage="base", dry_run=True, out=str(tmp_path / "run")))


# ----------------------------------------------------------------- two processes


def fixed_noise() -> None:
    """Draws that are the same for every clip, in whichever process it is."""
    stand_in = type("Torch", (), {"__getattr__": lambda self, name: getattr(torch, name)})()
    train_onestep.torch = rpgan.torch = stand_in

    def pattern(x: Tensor) -> Tensor:
        one = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(7)).to(x)
        return one.expand(x.shape)

    stand_in.randn_like = pattern
    stand_in.rand = lambda n, device=None: torch.full((n,), 0.37)
    stand_in.randint = lambda low, high, size, device=None: torch.full(size, high - 1)


def learnt(world, sharded: bool) -> dict[str, Tensor]:
    """All weights before and after two steps of plain gradient descent in three of the stages, on two clips
    that the processes share."""
    fixed_noise()
    seedvr2.PRESETS["tiny"] = MICRO
    found = {}
    for stage in "halve", "apt", "duo":
        torch.manual_seed(0)
        student, prior = Denoiser("tiny"), Denoiser("tiny")
        nets = {"student": student, "teacher": deepcopy(student), "ema": deepcopy(student)}
        nets |= {
            "judge": Judge(deepcopy(prior)),
            "head": ScoreHead(2 * 3 * 24),
            "fake": deepcopy(prior),
            "real": prior,
        }
        _, learn, still, step_of = STAGES[stage]
        nets = {name: nets[name].requires_grad_(name in learn) for name in (*learn, *still)}
        z0, lr = torch.randn(2, 2, 6, 6, 48), torch.randn(2, 2, 6, 6, 48)
        batch = [(z0[i : i + 1], Condition(lr[i : i + 1])) for i in range(world.rank, 2, world.size)]
        found |= {f"before/{stage}/{name}": w.clone() for name, w in student.state_dict().items()}
        several = ShardedWorld(world.rank, world.size, world.device) if sharded else world
        if sharded:
            for net in nets.values():
                shard(net, seedvr2.Block, several)
            parts = [w for m in student.modules() if isinstance(m, seedvr2.Block) for w in m.parameters()]
            assert all(w.to_local().numel() == w.numel() // 2 for w in parts)
        optimisers = {name: torch.optim.SGD(nets[name].parameters(), lr=0.02) for name in learn}
        for step in 1, 2:
            step_of(batch, nets, optimisers, several, replace(SMOKE, stage=stage, updates=2), step)
        for name, net in nets.items():
            for key, w in net.named_parameters():
                found[f"{name}/{stage}/{key}"] = (w.full_tensor() if sharded else w).detach()
    return found


@pytest.mark.slow
def test_two_processes_with_sharded_networks_learn_what_one_learns_without(tmp_path, monkeypatch):
    for module in train_onestep, rpgan:
        monkeypatch.setattr(module, "torch", torch)  # put back afterwards
    alone = learnt(WORLD, sharded=False)
    first, second = two_processes(tmp_path, learnt, True)
    assert first.keys() == alone.keys()
    for key, weight in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(
            first[key], weight, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
        )
    for stage in "halve", "apt", "duo":
        before = [key for key in alone if key.startswith(f"before/{stage}/") and "freqs" not in key]
        moved = [
            key for key in before if not torch.equal(alone[key], alone[key.replace("before", "student")])
        ]
        assert len(moved) > 0.8 * len(before)


def sharded_runs(world, made: Path, folder: Path) -> None:
    """Four steps, and two and two."""
    seedvr2.PRESETS["tiny"] = MICRO
    train_onestep.LOOKS = 1
    start = {"shard": True, "micro_batch": 1, "init": str(made / "halve"), "prior": str(made / "guide")}
    main(config("duo", folder / "straight", **start))
    main(config("duo", folder / "resumed", steps=2, **start))
    main(config("duo", folder / "resumed", **start))


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly_and_its_checkpoint_is_whole(made, tmp_path):
    two_processes(tmp_path, sharded_runs, made, tmp_path)
    straight, resumed = (tmp_path / name / "duo" / "step_000004" for name in ("straight", "resumed"))
    assert_same_checkpoint(straight, resumed)
    state = torch.load(straight / "train.pt", weights_only=True)
    plain = torch.load(made / "duo" / "step_000004" / "train.pt", weights_only=True)
    for key in "net_fake", "net_head", "optimiser", "optimiser_fake":
        one, other = (torch.utils._pytree.tree_flatten(s[key]) for s in (state, plain))
        assert one[1] == other[1]
        assert all(getattr(a, "shape", a) == getattr(b, "shape", b) for a, b in zip(one[0], other[0]))
    # The next stage starts from it in one process, without shards.
    main(config("prefer", tmp_path / "next", steps=1, init=str(tmp_path / "straight" / "duo")))


# ----------------------------------------------------------------- the command itself


@pytest.mark.slow
def test_the_smoke_preset_passes_all_stages_in_a_minute_without_a_network_or_a_file(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for stage in (*ORDER, "table"):
        command = [sys.executable, "-c", OFFLINE, str(ROOT / "train_onestep.py"), "--preset", "smoke"]
        done = subprocess.run(
            [*command, "--stage", stage], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert names(tmp_path) == ["runs"]
    assert names(tmp_path / SMOKE.out) == sorted([*ORDER, "table"])
    assert done.stdout.count("\n| ") >= 9
