"""What dual-head training relies on: labels, losses, what is frozen, what sees time, grids, backbones."""

import copy
import itertools

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from test_model import Convolutions
from torch import nn

import discriminators
from discriminators import (
    BACKBONE,
    HEADS,
    LABELS,
    FeatureDiscriminator,
    PixelDiscriminator,
    Scores,
    Tail,
    adversarial_loss,
    asked,
    convnext,
    discriminator_loss,
    first_conv,
    five_clips,
    mean_scores,
)
from model import PRESETS, AdcVSR, frames
from runtime import UserError

# The full network's topology with all its temporal blocks, 12 channels wide; features have 24 channels.
SMALL = dict(
    PRESETS["full"], unet_channels=[16] * 4, heads=[2] * 4, decoder_channels=[8, 8, 8, 24], norm_groups=2
)
NARROW = dict(heads=(12, 4))
DOMAINS = ["pixel", "feature"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 1e-5 if DEVICE == "cpu" else 1e-4  # cuDNN's convolutions of one input differ by more


@pytest.fixture(autouse=True)
def same_numbers_every_time(monkeypatch):
    """Of one seed, on the GPU where there is one, and there in all of float32's bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def on_the_cpu():
    """For what follows from the numbers that the CPU draws."""
    with torch.device("cpu"):
        yield


def small_unet() -> nn.Module:
    """The UNet of a small student after training: its temporal blocks are no longer the identity."""
    unet = AdcVSR(**SMALL).unet
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet


def discriminator(domain: str, **options) -> nn.Module:
    options = NARROW | options
    if domain == "pixel":
        device = torch.get_default_device()
        with torch.device("cpu"):  # where a training makes it, too
            return PixelDiscriminator(convnext("tiny"), **options).to(device)
    return FeatureDiscriminator(small_unet(), **options)


def clip(domain: str, b: int = 1, t: int = 3, h: int = 32, w: int = 32, dtype=torch.float32) -> torch.Tensor:
    shape = (b, t, 3, h, w) if domain == "pixel" else (b, t, 24, h // 4, w // 4)
    return torch.rand(shape, dtype=dtype) * 2 - 1


def scores_of(d: nn.Module, x: torch.Tensor) -> Scores:
    """What d says of a clip of pixels or of features."""
    return d(d.look(x)) if d.domain == "pixel" else d(x)


def real_parts(domain: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    parts = {"video": clip(domain, 2, 4, dtype=dtype), "random_images": clip(domain, 2, 4, dtype=dtype)}
    return parts | {
        "image": clip(domain, 2, 1, dtype=dtype),
        "order": torch.tensor([[1, 0, 3, 2], [3, 1, 0, 2]]),
    }


def five_types(domain: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The five types as clips of pixels or features, as nothing frozen has seen them."""
    return five_clips(clip(domain, 2, 4, dtype=dtype), lambda x: x, real_parts(domain, dtype))


def scores_that_learn(detail: int = 12, consistency: int = 4) -> Scores:
    return Scores(*(torch.randn(2, 3, n, 4, 4, requires_grad=True) for n in (detail, consistency)))


# ------------------------------------------------------------------------------------------------ labels


def test_the_labels_are_those_of_equation_5():
    detail, consistency = ({k: v[i] for k, v in LABELS.items()} for i in (0, 1))
    assert detail == {"student": -1, "video": 0, "shuffled_video": 0, "image": 1, "random_images": 1}
    assert consistency == {"student": -1, "video": 1, "shuffled_video": -1, "image": 1, "random_images": -1}
    assert asked("full", HEADS) == LABELS


def test_the_five_clips_are_those_of_equation_5():
    parts, own = real_parts("pixel"), clip("pixel", 2, 4).requires_grad_()
    types = five_clips(own, lambda x: x, parts)
    assert set(types) == set(LABELS) and all(x.shape == own.shape for x in types.values())
    assert torch.equal(types["student"], own) and not any(x.requires_grad for x in types.values())
    assert torch.equal(types["video"], parts["video"])
    assert torch.equal(types["shuffled_video"][0], parts["video"][0, [1, 0, 3, 2]])
    assert torch.equal(types["shuffled_video"][1], parts["video"][1, [3, 1, 0, 2]])
    assert all(torch.equal(frame, parts["image"][:, 0]) for frame in types["image"].unbind(1))
    assert torch.equal(types["random_images"], parts["random_images"])


@pytest.mark.parametrize(
    ["table", "expected"],
    [
        ("single", dict(student=-1, video=1, shuffled_video=-1, image=1, random_images=-1)),
        ("three_types", dict(student=(-1, -1), video=(0, 1), image=(1, 1))),
        ("detailed_video", LABELS | dict(video=(1, 1))),
    ],
)
def test_the_ablated_tables_are_those_of_tables_3_and_7(table, expected):
    assert asked(table, HEADS) == {k: (v, v) if isinstance(v, int) else v for k, v in expected.items()}


def test_a_head_without_channels_is_asked_nothing_and_types_for_it_alone_are_left_out():
    assert asked("full", (256, 0)) == {k: LABELS[k] for k in ("student", "image", "random_images")}
    assert asked("full", (0, 256)) == LABELS
    detail, none = scores_that_learn(12, 0)
    loss = discriminator_loss(Scores(detail, none), (-1, -1))
    assert torch.allclose(loss, F.softplus(detail).mean())


# ------------------------------------------------------------------------------------------------ losses


def test_label_zero_costs_nothing_and_gives_exactly_zero_gradient():
    for label in itertools.product((-1, 0, 1), repeat=2):
        scores = scores_that_learn()
        loss = discriminator_loss(scores, label)
        (loss + 0 * sum(x.sum() for x in scores)).backward()
        assert [bool(x.grad.any()) for x in scores] == [y != 0 for y in label]
        assert (loss == 0) == (label == (0, 0))


@pytest.mark.parametrize("name", LABELS)
def test_a_descent_step_moves_each_score_towards_its_label(name):
    scores = scores_that_learn()
    discriminator_loss(scores, LABELS[name]).backward()
    for score, y in zip(scores, LABELS[name]):
        assert score.grad is None if y == 0 else (-score.grad.sign() == y).all()


def test_the_discriminator_loss_is_equation_4_a_mean_over_each_head():
    scores = scores_that_learn()
    for label in LABELS.values():
        by_hand = 0.0
        for x, y in zip(scores, label):
            by_hand += (torch.log1p(torch.exp(-y * x.double())).sum() * abs(y)).item() / x.numel()
        assert discriminator_loss(scores, label).item() == pytest.approx(by_hand, rel=1e-5)


def test_both_heads_learn_alike_whatever_their_widths_and_the_student_hears_them_as_they_are_wide():
    """Eq. 4 is a sum of two terms, Eq. 2 and 3 a Softplus of the whole output."""
    scores = Scores(*(torch.zeros(2, 3, n, 4, 4, requires_grad=True) for n in HEADS))
    eq_4, eq_2 = discriminator_loss(scores, (1, 1)), adversarial_loss(scores)
    for loss, shares in (eq_4, [1, 1]), (eq_2, [192 / 256, 64 / 256]):
        pulls = [g.sum().item() for g in torch.autograd.grad(loss, scores)]
        assert pulls == pytest.approx([-share / 2 for share in shares], rel=1e-5)


def test_the_students_loss_is_the_mean_softplus_over_all_256_channels():
    scores = scores_that_learn(*HEADS)
    assert torch.allclose(adversarial_loss(scores), F.softplus(-torch.cat(list(scores), dim=2)).mean())


def test_the_student_is_pulled_up_where_its_discriminator_pushes_down():
    scores = scores_that_learn()
    up = torch.autograd.grad(adversarial_loss(scores), scores)
    down = torch.autograd.grad(discriminator_loss(scores, LABELS["student"]), scores)
    assert all((a < 0).all() and (b > 0).all() for a, b in zip(up, down))


def test_the_log_leaves_out_a_head_without_channels():
    assert mean_scores(Scores(torch.full((1, 2, 3, 4, 4), 2.0), torch.zeros(1, 2, 0, 4, 4))) == {"detail": 2}


def test_losses_are_float32_whatever_the_networks_compute_in():
    half = Scores(*(x.detach().bfloat16() for x in scores_that_learn()))
    assert adversarial_loss(half).dtype == torch.float32


# ------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("heads", [(256, 0), (192, 64), (128, 128), (64, 192), (0, 256)])
def test_every_head_split_of_table_6_trains(domain, heads):
    d = discriminator(domain, heads=heads)
    x = clip(domain, t=2)
    scores = scores_of(d, x)
    assert [s.shape for s in scores] == [
        (1, 2, n, *((4, 4) if domain == "pixel" else x.shape[3:])) for n in heads
    ]
    loss = adversarial_loss(scores) + discriminator_loss(scores, LABELS["student"])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in d.parameters())


def test_the_tail_has_the_papers_layers_and_sizes():
    tail = Tail(256, HEADS)
    convs = [m for m in tail.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    assert [(type(m).__base__, m.kernel_size) for m in convs[1:2]] == [(nn.Conv1d, (3,))]
    assert [sum(p.numel() for p in m.parameters()) for m in convs] == [590080, 196864, 590080, 49344 + 16448]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (70, 45), (33, 63)])
def test_the_pixel_discriminators_grid_is_an_eighth_of_the_clips(size):
    h, w = size
    for x in scores_of(discriminator("pixel"), clip("pixel", 2, 2, h, w)):
        assert x.shape[:2] == (2, 2) and x.shape[3:] == (h // 8, w // 8)


@pytest.mark.parametrize("grid", [(8, 8), (16, 24), (9, 13), (3, 5)])
def test_the_feature_discriminators_grid_is_that_of_the_features(grid):
    for x in discriminator("feature")(torch.randn(2, 2, 24, *grid)):
        assert x.shape[:2] == (2, 2) and x.shape[3:] == grid


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_frame_is_a_clip_too(domain):
    assert scores_of(discriminator(domain), clip(domain, t=1)).detail.shape[:3] == (1, 1, 12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_is_frozen_gets_no_gradient_and_does_not_change_in_three_steps(domain):
    d = discriminator(domain)
    parent = nn.ModuleList([d]).requires_grad_(False).requires_grad_(True)
    assert not any(m.training for m in d.backbone.modules())
    assert len(list(d.parameters())) == len(d.state_dict()) > 0
    assert not any(k.startswith("backbone") for k in d.state_dict())
    frozen, trained = copy.deepcopy(dict(d.named_buffers())), copy.deepcopy(dict(d.named_parameters()))
    optimiser = torch.optim.Adam(parent.parameters(), lr=1e-3)
    for _ in range(3):
        for name, x in five_types(domain).items():
            discriminator_loss(scores_of(d, x), LABELS[name]).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert all(torch.equal(x, frozen[k]) and not x.requires_grad for k, x in d.named_buffers())
    assert not any(torch.equal(p, trained[k]) for k, p in d.named_parameters())


def test_the_feature_discriminator_leaves_the_students_unet_alone():
    unet = small_unet()
    FeatureDiscriminator(unet, **NARROW)
    assert all(p.requires_grad for p in unet.parameters()) and len(list(unet.parameters())) > 100


@pytest.mark.parametrize("domain", DOMAINS)
def test_gradients_reach_every_frame_through_the_frozen_backbone(domain):
    x = clip(domain).requires_grad_()
    adversarial_loss(scores_of(discriminator(domain).requires_grad_(False), x)).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum(dim=(2, 3, 4)).all()


@pytest.mark.parametrize("domain", DOMAINS)
def test_checkpointing_changes_no_gradient(domain):
    x, grads = clip(domain, dtype=torch.float64), []
    d = discriminator(domain).double()
    for on in (False, True):
        d.backbone.checkpointing = on
        x = x.detach().requires_grad_()
        wanted = [x, *d.parameters()]
        grads.append(torch.autograd.grad(adversarial_loss(scores_of(d, x)), wanted))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-15) for a, b in zip(*grads))


@pytest.mark.parametrize("domain", DOMAINS)
def test_checkpointing_keeps_less_for_the_backward_pass(domain):
    kept = []
    for on in (False, True):
        kept.append(0)

        def keep(x):
            kept[-1] += x.numel()
            return x

        d = discriminator(domain, checkpointing=on)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            scores_of(d, clip(domain, t=4).requires_grad_())
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("domain", DOMAINS)
def test_five_types_one_after_the_other_give_the_gradients_of_one_batch(domain):
    d, clips = discriminator(domain).double(), five_types(domain, torch.float64)
    scores = scores_of(d, torch.cat(list(clips.values())))
    each = zip(*(x.chunk(5) for x in scores))
    together = sum(discriminator_loss(Scores(*s), LABELS[name]) for name, s in zip(clips, each))
    expected = torch.autograd.grad(together, list(d.parameters()))
    for name, x in clips.items():
        discriminator_loss(scores_of(d, x), LABELS[name]).backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-8, atol=1e-14) for p, g in zip(d.parameters(), expected))


# -------------------------------------------------------------------------------------------------- time


def moving_square(order: list[int]) -> torch.Tensor:
    """A bright square that moves by 8 pixels a frame from somewhere, its frames in the given order."""
    frames, (y, x) = torch.full((len(order), 3, 64, 64), -1.0), torch.randint(0, 16, (2,)).tolist()
    for i in range(len(order)):
        frames[i, :, y : y + 16, x + 8 * i : x + 8 * i + 16] = 1
    return frames[None, order]


def consistency_gap(d: nn.Module, steps: int) -> torch.Tensor:
    """After some steps on a toy: mean consistency score of a new clip minus that of its shuffled self."""
    optimiser = torch.optim.Adam(d.parameters(), lr=3e-3)
    for _ in range(steps):
        ordered = moving_square([0, 1, 2, 3, 4])
        for name, order in ("video", [0, 1, 2, 3, 4]), ("shuffled_video", [0, 3, 1, 4, 2]):
            discriminator_loss(d(d.look(ordered[:, order])), LABELS[name]).backward()
        optimiser.step()
        optimiser.zero_grad()
    new = moving_square([0, 1, 2, 3, 4])
    with torch.no_grad():
        ordered, shuffled = (d(d.look(x)).consistency.mean() for x in (new, new[:, [2, 0, 4, 1, 3]]))
        return ordered - shuffled


class OneFrame(nn.Conv2d):
    """Takes the place of the tail's temporal convolution and looks at no neighbour."""

    def forward(self, x):
        return super().forward(frames(x)).unflatten(0, x.shape[:2])


def test_the_consistency_head_learns_to_tell_a_clip_from_its_shuffled_self(on_the_cpu):
    assert consistency_gap(discriminator("pixel", heads=(8, 24)), steps=80) > 1


def test_a_head_that_sees_single_frames_cannot_tell_a_clip_from_its_shuffled_self(on_the_cpu):
    d = discriminator("pixel", heads=(8, 24))
    d.tail.conv2 = OneFrame(32, 32, 1)
    assert consistency_gap(d, steps=80).abs() < 1e-4


def test_what_is_seen_of_the_five_clips_is_the_five_clips_of_what_is_seen():
    """What is frozen sees single frames, so that the order, and a photo's repetition, can come after it."""
    d, parts = discriminator("pixel").double(), real_parts("pixel", torch.float64)
    own = clip("pixel", 2, 4, dtype=torch.float64)
    seen = five_clips(d.look(own), d.look, parts)
    for name, x in five_clips(own, lambda x: x, parts).items():
        assert torch.allclose(seen[name], d.look(x), rtol=1e-9, atol=1e-12)


def test_the_feature_backbone_sees_time():
    d = discriminator("feature").double()
    d.tail.conv2 = OneFrame(16, 16, 1).double()  # the tail does not
    x, order = clip("feature", dtype=torch.float64), [2, 0, 1]
    assert not torch.allclose(d(x[:, order]).detail, d(x).detail[:, order], rtol=1e-3)


def test_frames_pass_the_pixel_backbone_in_small_groups_with_the_same_result():
    d, x = discriminator("pixel").double(), clip("pixel", 2, 5, dtype=torch.float64)
    grouped, d.FRAMES = d.look(x), 10
    assert torch.allclose(grouped, d.look(x), rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ["name", "widths", "millions"],
    [(BACKBONE, [384, 768, 1536, 3072], 843.4), ("convnext_base.clip_laion2b", [128, 256, 512, 1024], 87.6)],
)
def test_the_published_backbones_have_the_documented_widths_strides_and_sizes(name, widths, millions):
    with torch.device("meta"):
        net = convnext(name, pretrained=False)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        maps = net(torch.empty(2, 3, 512, 512))
        assert [x.shape for x in maps] == [(2, c, 512 // s, 512 // s) for c, s in zip(widths, (4, 8, 16, 32))]
        d = PixelDiscriminator(net)
        assert d.look(torch.empty(1, 2, 3, 512, 512)).shape == (1, 2, sum(widths), 64, 64)
        assert d.first.weight.shape == (256, sum(widths), 1, 1)


def test_both_full_size_discriminators_have_the_papers_grid_and_heads():
    with torch.device("meta"):
        pixel = PixelDiscriminator(convnext(pretrained=False))
        feature = FeatureDiscriminator(AdcVSR(**PRESETS["full"]).unet)
        clips = torch.empty(1, 2, 3, 512, 512), torch.empty(1, 2, 256, 64, 64)
        for scores in map(scores_of, (pixel, feature), clips):
            assert [x.shape for x in scores] == [(1, 2, 192, 64, 64), (1, 2, 64, 64, 64)]
    assert sum(p.numel() for p in feature.first.parameters()) == 553_200


def test_the_tiny_backbone_is_the_same_every_time_and_leaves_the_random_numbers_alone(on_the_cpu):
    state = torch.random.get_rng_state()
    first = convnext("tiny").state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert all(torch.equal(x, first[k]) for k, x in convnext("tiny").state_dict().items())


def levels(d: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What d sees, level by level, fine to coarse."""
    return d.look(x).split(d.backbone.feature_info.channels(), dim=2)


def test_the_fine_maps_of_the_tiny_backbone_show_edges_and_not_flat_colour():
    d = discriminator("pixel").double()
    black, red = torch.full((2, 1, 1, 3, 64, 64), -1.0, dtype=torch.float64)
    red[:, :, 0] = 1
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in list(zip(levels(d, black), levels(d, red)))[:2])
    red[..., 30:] = -1
    assert all((a - b).abs().max() > 0.5 for a, b in zip(levels(d, black), levels(d, red)))


def test_a_shift_cuts_all_frames_alike_at_random_by_up_to_that_many_pixels():
    plain, shifted = discriminator("pixel"), discriminator("pixel", shift=2)
    x = clip("pixel", 2, 3, 40, 48)
    expected = [plain.look(x[..., above:, left:]) for above in range(3) for left in range(3)]
    seen = []
    for seed in range(40):
        torch.manual_seed(seed)
        found = shifted.look(x)
        seen += [i for i, e in enumerate(expected) if e.shape == found.shape and torch.allclose(e, found)]
    assert len(seen) == 40 and set(seen) == set(range(9))


def test_the_backbone_gets_clips_normalised_as_clip_wants_them():
    d = discriminator("pixel")
    seen = []
    d.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = clip("pixel", t=1)
    d.look(x)
    mean, std = (torch.tensor(v)[:, None, None] for v in (discriminators.CLIP_MEAN, discriminators.CLIP_STD))
    assert torch.allclose(seen[0], ((x[:, 0] + 1) / 2 - mean) / std, atol=1e-5)


def test_every_map_has_mean_0_and_variance_1_over_the_channels_of_a_place():
    """Seen on the map that lies on the grid anyway; on the others, means of neighbours vary less."""
    for level, x in enumerate(levels(discriminator("pixel").double(), clip("pixel", 2, 2).double())):
        mean, variance = x.mean(dim=2), x.var(dim=2, unbiased=False)
        assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-9)
        assert variance.max() < 1.05 and (level != 1 or variance.min() > 0.95)


def test_a_backbone_in_bfloat16_computes_in_it_and_errs_little_more_than_under_autocast():
    """As on a GPU, where autocast would keep the largest maps in float32."""
    d, x, seen = discriminator("pixel"), clip("pixel", h=64, w=64), []
    weights = torch.randn_like(exact := d.double().look(x.double()))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        d.float().backbone.to(dtype)
        y = x.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype != torch.float64):
            maps = d.look(y)
        (maps * weights).sum().backward()
        seen.append((maps, y.grad))
    (exact, slope), *others = seen
    assert others[1][0].dtype == torch.bfloat16
    for truth, (mixed, own) in zip((exact, slope), zip(*others)):
        assert (own - truth).norm() < 1.5 * (mixed - truth).norm() < 0.05 * truth.norm()


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_convolution_of_a_step_has_to_copy_its_input(domain):
    d = discriminator(domain)
    d.backbone.to(memory_format=torch.channels_last)
    with Convolutions() as convolutions:
        adversarial_loss(scores_of(d, clip(domain, h=64, w=64).requires_grad_())).backward()
    convolutions.assert_dense_channels_last(more_than=10)


def test_missing_weights_without_a_network_are_one_line_with_the_option_and_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="--backbone convnext_atto.d2_in1k: cannot load it from") as error:
        PixelDiscriminator.from_pretrained("convnext_atto.d2_in1k")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_backbone_names_the_option():
    with pytest.raises(UserError, match="--backbone convnext_huge"):
        convnext("convnext_huge")


@pytest.mark.parametrize("c_in", [256, 24, 12, 8])
def test_the_new_first_convolution_reads_repeated_channels_as_the_old_one_reads_its_own(c_in):
    old = nn.Conv2d(12, 16, 3, padding=1)
    x = torch.randn(1, 12, 8, 8)
    repeated = repeat(x, "b c h w -> b (r c) h w", r=22)[:, :c_in]
    kernel = torch.stack([old.weight[:, i % 12] for i in range(c_in)], dim=1) * 12 / c_in
    new = first_conv(old, c_in)(repeated)
    assert torch.allclose(new, F.conv2d(repeated, kernel, old.bias, padding=1), atol=ROUNDING)
    if c_in % 12 == 0:
        assert torch.allclose(new, old(x), atol=ROUNDING)


def test_the_feature_discriminator_starts_as_the_students_unet():
    unet = small_unet()
    d, seen = FeatureDiscriminator(unet, **NARROW), []
    d.tail.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 3, 12, 8, 8)
    d(repeat(x, "b t c h w -> b t (r c) h w", r=2))
    assert torch.allclose(seen[0], unet(x), atol=1e-4)
