"""SeedVR2's losses on AdcVSR's heads: known answers, which types make pairs, whole steps done all at once."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train_stage1 import WORLD, logged, on_the_cpu  # noqa: F401 (on_the_cpu is a fixture, for every test)
from test_train_stage2 import (  # noqa: F401 (cfg and stage1 are fixtures)
    assert_close,
    assert_same_run,
    cfg,
    clips_of,
    gradients,
    networks,
    stage1,
    update,
)
from test_training import names, signals  # noqa: F401 (signals is a fixture)

import discriminators
from discriminators import HEADS, LABEL_TABLES, LABELS, Scores, Tail, asked, five_clips
from rpgan import (
    Sides,
    feature_matching,
    noisy,
    penalties,
    perturbed,
    relativistic_loss,
    relativistic_pull,
    sides,
    student_loss,
)
from train_stage2 import PRESETS, main, train_step

RPGAN = replace(PRESETS["smoke"], gan="rpgan")
DETAIL = Sides(0, ["image", "random_images"], ["student"])
CONSISTENCY = Sides(1, ["video", "image"], ["student", "shuffled_video", "random_images"])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def scores_of_all(widths: tuple[int, int] = (12, 4)) -> dict[str, Scores]:
    shapes = [(2, 3, n, 4, 4) for n in widths]
    return {kind: Scores(*(torch.randn(shape, requires_grad=True) for shape in shapes)) for kind in LABELS}


def constant(levels: dict[str, tuple[float, float]], widths: tuple[int, int] = HEADS) -> dict[str, Scores]:
    made = {k: [torch.full((1, 2, n, 2, 2), x) for n, x in zip(widths, y)] for k, y in levels.items()}
    return {kind: Scores(*pair) for kind, pair in made.items()}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# ----------------------------------------------------------------- pairs


def test_each_head_has_the_sides_that_equation_5_gives_it():
    assert sides(LABELS, HEADS) == [DETAIL, CONSISTENCY]
    assert sides(LABELS, (256, 0)) == [DETAIL] and sides(LABELS, (0, 256)) == [CONSISTENCY]
    for table, widths in itertools.product(LABEL_TABLES, [HEADS, (256, 0), (0, 256)]):
        assert all(real and fake for _, real, fake in sides(asked(table, widths), widths))


def test_the_loss_is_log_2_a_head_where_all_are_equal_and_only_differences_count():
    same, heads = constant(dict.fromkeys(LABELS, (3.0, -1.0))), sides(LABELS, HEADS)
    assert relativistic_loss(same, heads).item() == pytest.approx(2 * math.log(2))
    assert relativistic_pull(same["student"], same, heads).item() == pytest.approx(math.log(2))
    scores, heads = scores_of_all(), sides(LABELS, (12, 4))
    moved = {kind: Scores(detail + 5, consistency - 2) for kind, (detail, consistency) in scores.items()}
    for loss in relativistic_loss, lambda s, heads: relativistic_pull(s["student"], s, heads):
        torch.testing.assert_close(loss(moved, heads), loss(scores, heads))


def test_every_real_type_is_compared_with_every_fake_one():
    levels = {"student": (-1, -2), "video": (9, 1), "shuffled_video": (9, -1), "image": (2, 0.5)}
    scores = constant(levels | {"random_images": (0.5, -0.5)})
    detail = [softplus(-1 - real) for real in (2, 0.5)]
    consistency = [softplus(fake - real) for real in (1, 0.5) for fake in (-2, -1, -0.5)]
    found = relativistic_loss(scores, sides(LABELS, HEADS)).item()
    assert found == pytest.approx(sum(detail) / 2 + sum(consistency) / 6)


def test_the_student_wants_to_be_more_real_than_what_is_real_and_hears_heads_as_they_are_wide():
    levels = {"student": (-1, -2), "video": (9, 1), "shuffled_video": (9, 9), "image": (2, 0.5)}
    scores = constant(levels | {"random_images": (0.5, 9)})
    detail, consistency = (
        (softplus(2 + 1) + softplus(0.5 + 1)) / 2,
        (softplus(1 + 2) + softplus(0.5 + 2)) / 2,
    )
    found = relativistic_pull(scores["student"], scores, sides(LABELS, HEADS)).item()
    assert found == pytest.approx((192 * detail + 64 * consistency) / 256)


def test_places_and_clips_are_compared_with_their_own_alone():
    """A pair is softplus of a difference, not a difference of means."""
    scores, (i, real, fake) = scores_of_all(), DETAIL
    by_hand = 0.0
    for r, f in itertools.product(real, fake):
        by_hand += torch.log1p(torch.exp(scores[f][i] - scores[r][i])).mean() / 2
    torch.testing.assert_close(relativistic_loss(scores, [DETAIL]), by_hand)


def test_a_label_of_zero_and_a_head_without_channels_get_no_gradient():
    scores = scores_of_all((12, 0))
    relativistic_loss(scores, sides(LABELS, (12, 0))).backward()
    assert {k for k, s in scores.items() if s.detail.grad is not None} == {*DETAIL.real, *DETAIL.fake}
    assert all(s.consistency.grad is None for s in scores.values())


# ----------------------------------------------------------------- aR1, aR2, feature matching


def test_r1_and_r2_of_a_linear_tail_are_the_squares_of_its_slopes_times_that_of_sigma(monkeypatch):
    monkeypatch.setattr(discriminators, "SLOPE", 1.0)  # a leaky ReLU of slope 1 is the identity
    tail, x = Tail(3, (2, 1)), torch.randn(1, 2, 3, 3, 3)
    slopes = [torch.autograd.functional.jacobian(lambda x, i=i: tail(x)[i], x) for i in (0, 1)]
    detail, consistency = (0.1**2 * s.square().sum().item() / s[..., 0, 0, 0, 0, 0].numel() for s in slopes)
    with torch.no_grad():
        many = x.expand(20_000, -1, -1, -1, -1)
        scores, again = tail(many), tail(noisy(many, 0.1))
    expected = {  # r1, r2: a mean over a head's real types and over its fake ones; 0 asks nothing
        "student": (0, detail / 1 + consistency / 3),
        "video": (consistency / 2, 0),
        "shuffled_video": (0, consistency / 3),
        "image": (detail / 2 + consistency / 2, 0),
        "random_images": (detail / 2, consistency / 3),
    }
    for kind, values in expected.items():
        found = [x.item() for x in penalties(kind, scores, again, sides(LABELS, (2, 1)))]
        assert found == pytest.approx(values, rel=0.03), kind


def test_features_of_a_clip_match_its_own_and_those_of_the_tail_are_three():
    judge = networks(torch.float32)[3]["pixel"]
    seen = judge.look(torch.rand(1, 2, 3, 64, 64) * 2 - 1)
    scores, taps = judge(seen, taps=True)
    assert all(torch.equal(a, b) for a, b in zip(scores, judge(seen)))
    assert [x.shape for x in taps] == [(1, 2, 16, 8, 8)] * 3
    assert feature_matching(taps, taps, F.l1_loss) == 0
    loss = feature_matching(taps, [x + k for k, x in enumerate(taps)], F.l1_loss)
    assert loss.item() == pytest.approx((0 + 1 + 2) / 3, rel=1e-5)


# ----------------------------------------------------------------- a step


def test_one_cut_serves_all_types_of_a_step():
    judge, clips = networks(torch.float32)[3]["pixel"], clips_of(dtype=torch.float32)
    judge.shift = 1
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            judged = student_loss(judge, clips["hr"], clips["hr"], clips, None, RPGAN)[1]
            cuts = itertools.product((0, 1), (0, 1))
            same = [
                all(torch.equal(x, judge.look(judged.clips[kind], cut)) for kind, x in judged.seen.items())
                for cut in cuts
            ]
        assert judged.seen.keys() == LABELS.keys() and sum(same) == 1


@pytest.mark.parametrize("table", ["full", "three_types"])
def test_a_step_is_the_losses_on_all_clips_at_once(table):
    """The types go back one after the other, with the gradients of a direct computation on all of them."""
    rpgan, clips, nets = replace(RPGAN, labels=table), clips_of(), networks()
    student, encoder, dists, judges = nets
    torch.manual_seed(5)
    losses = update(nets, [clips], rpgan)

    torch.manual_seed(5)
    judges["pixel"].draw_cut()
    x_s, f_s = student(clips["lr"], return_features=True)
    x_t, f_t = clips["hr"], encoder(clips["hr"])
    frames = [((x + 1) / 2).clamp(0, 1).flatten(0, 1) for x in (x_s, x_t)]
    perceptual = torch.stack([dists(a, b) for a, b in zip(*frames)]).mean()
    loss = rpgan.lambda_pixel * ((x_s - x_t).abs().mean() + perceptual) + (f_s - f_t).abs().mean()
    l_disc = 0.0
    for where, own, target, see, look, weight in (
        ("pixel", x_s, x_t, lambda x: x, judges["pixel"].look, rpgan.lambda_pixel),
        ("feature", f_s, f_t, encoder, lambda x: x, rpgan.lambda_feature),
    ):
        d, labels = judges[where], asked(table, (12, 4))
        types, heads = five_clips(own, see, clips), sides(labels, (12, 4))
        with torch.random.fork_rng():  # looking draws a cut, if only of no row
            scores = {kind: d(look(types[kind])) for kind in labels}
            (ours, taps), (_, theirs) = (d(look(x), taps=True) for x in (own, target))
            pull = relativistic_pull(ours, scores, heads)
            match = sum((a - b).abs().mean() for a, b in zip(taps, theirs)) / 3
        loss = loss + weight * rpgan.lambda_adv * (pull + 0.1 * match)
        disc, penalty = relativistic_loss(scores, heads), 0.0
        for kind in labels:
            disturbed = noisy(types[kind], 0.1)
            with torch.random.fork_rng():
                again = d(look(disturbed))
            for i, real, fake in heads:
                sharing = [len(side) for side in (real, fake) if kind in side]
                penalty += sum(perturbed(scores[kind][i], again[i]) / n for n in sharing)
        l_disc = l_disc + disc + 1000 * penalty
        assert losses[f"disc_{where}"].item() == pytest.approx(disc.item(), rel=1e-6)
        together = losses[f"r1_{where}"] + losses[f"r2_{where}"]
        assert together.item() == pytest.approx(penalty.item(), rel=1e-5)
        assert losses[f"match_{where}"].item() == pytest.approx(match.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for net, value in (student, loss), (judges, l_disc):
        expected = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
        for (name, grad), direct in zip(gradients(net).items(), expected):
            assert_close(grad, direct, name)
            if net is judges:  # no DISTS in between, whose statistics are in float32
                assert (grad - direct).abs().max() < 1e-6 * direct.abs().max() + 1e-12, name
            level = name.endswith("tail.scores.bias")  # which no difference has
            assert (direct.abs().max() < 1e-12) if level else direct.abs().max() > 0, name


def test_without_noise_any_division_into_micro_batches_has_the_same_gradients():
    results = []
    for parts in (1, 2):
        nets, clips = networks(), clips_of(frames=2)
        batch = [{k: x.chunk(parts)[i] for k, x in clips.items()} for i in range(parts)]
        losses = update(nets, batch, replace(RPGAN, lambda_r=0.0))
        results.append((losses, gradients(nets[0]) | gradients(nets[3])))
    (whole, grads), (parted, others) = results
    assert whole["disc_pixel"].item() == pytest.approx(parted["disc_pixel"].item(), rel=1e-5)
    for name, grad in grads.items():
        assert_close(others[name], grad, name)


def test_the_heads_learn_to_call_real_what_is_real():
    student, encoder, _, judges = networks(torch.float32)
    del judges["feature"]
    optimisers = [torch.optim.Adam(net.parameters(), lr) for net, lr in ((student, 0.0), (judges, 1e-2))]
    rpgan, clips = replace(RPGAN, lambda_r=1.0), [clips_of(batch=1, dtype=torch.float32)]
    for _ in range(6):
        losses = train_step(clips, student, None, encoder, None, judges, optimisers, WORLD, rpgan)
    assert losses["disc_pixel"] < 0.9 * 2 * math.log(2)
    assert losses["pixel/real - fake/detail"] > 0 and losses["pixel/real - fake/consistency"] > 0


def test_one_and_one_step_equal_two_and_the_log_has_differences_only(cfg, tmp_path, capsys):  # noqa: F811
    cfg = replace(cfg, gan="rpgan", separate=True, domains=("pixel",), lambda_feature=0.0, dists="none")
    straight = replace(cfg, batch=1, steps=2, out=str(tmp_path / "straight"))
    resumed = replace(straight, out=str(tmp_path / "resumed"))
    main(straight)
    assert "D_pixel_detail: real - fake " in capsys.readouterr().out
    main(replace(resumed, steps=1))
    torch.rand(7)
    main(resumed)
    assert_same_run(Path(straight.out) / "step_000002", Path(resumed.out) / "step_000002")
    assert names(tmp_path) == ["resumed", "straight"]
    line = logged(straight)[0]
    heads = ("detail", "consistency")
    assert {name for name in line if "/" in name} == {f"pixel_{head}/real - fake/{head}" for head in heads}
    assert {f"{term}_pixel_{head}" for term in ("disc", "r1", "r2", "match") for head in heads} <= line.keys()
