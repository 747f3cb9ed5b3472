"""train_onestep.py and onestep.py: each loss by a case whose answer is known, who learns when, the order of the
stages on a two-dimensional world, and runs of every stage that end alike whatever happens to them."""

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
from test_runtime import ALONE as WORLD
from test_runtime import names, signals, two_processes  # noqa: F401 (signals is a fixture)
from test_train_stage1 import OFFLINE
from torch import Tensor, nn

import cache
import onestep
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
from runtime import UserError, newest_checkpoint
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
    feature_matching,
    flow_loss,
    guided,
    halve_step,
    halving_target,
    hinge,
    main,
    memory,
    perturbed,
    prefer_step,
    relativistic,
    walk,
)

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

    def linear(x, t, cond):
        return x @ slope, []

    found = perturbed(linear, linear(x, None, None)[0], x, torch.ones(len(x)), NOTHING, 0.1)
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
    """In one step the many-step model answers with the mean; stage I splits it, stage II comes closer still."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cfg, base = replace(SMOKE, many=64, round=200), Field()
    train(base_step, {"student": base}, {"student": 2e-3}, cfg, 3000)
    halved = deepcopy(base)
    teacher = deepcopy(base).requires_grad_(False)
    train(halve_step, {"student": halved, "teacher": teacher}, {"student": 1e-3}, replace(cfg, stage="halve"), 1200)
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
