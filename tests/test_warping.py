"""E*_warp against closed forms: exact flows, known flicker and noise, masks of a known extent."""

import math

import pytest
import torch
import torch.nn.functional as F
from pictures import texture, translation

from warping import dis_flow, in_frame, raft_flow, unoccluded, warp, warping_errors


def still(*shape: int):
    return torch.zeros(shape[0] - 1, 2, *shape[2:], dtype=torch.float64), torch.zeros(
        shape[0] - 1, 2, *shape[2:]
    )


@pytest.mark.parametrize("convention", ["corrected", "evalcrafter"])
def test_warping_error_of_a_still_clip_is_zero(convention):
    clip = texture(48, 64).expand(3, 3, 48, 64)
    for flow in (still(*clip.shape), dis_flow):
        assert warping_errors(clip, flow, convention).max() < 1e-20


def test_an_exact_translation_costs_nothing_unless_pixels_beyond_the_frame_count():
    clip, flow = translation()
    assert warping_errors(clip, flow, "corrected").max() < 1e-20
    assert warping_errors(clip, flow, "evalcrafter").min() > 0.01


@pytest.mark.parametrize("convention", ["corrected", "evalcrafter"])
def test_flicker_of_a_tenth_costs_30(convention):
    clip = texture(48, 64).expand(4, 3, 48, 64) * 0.9 + 0.1 * (torch.arange(4) % 2).view(4, 1, 1, 1)
    assert warping_errors(clip, still(*clip.shape), convention).tolist() == pytest.approx([30.0] * 3)


@pytest.mark.parametrize("convention", ["corrected", "evalcrafter"])
def test_noise_of_a_twentieth_costs_a_quarter_of_15_at_half_resolution(convention):
    rng = torch.Generator().manual_seed(0)
    clip = 0.5 + 0.05 * torch.randn(3, 3, 256, 256, generator=rng, dtype=torch.float64)
    error = warping_errors(clip, still(*clip.shape), convention).mean().item()
    assert error == pytest.approx(3.75, rel=0.01)


def test_warping_error_scales_with_the_square_of_contrast_and_ignores_brightness():
    clip = torch.stack([texture(32, 32, seed) for seed in range(3)])
    plain = warping_errors(clip, still(*clip.shape))
    assert torch.allclose(warping_errors(0.5 * clip, still(*clip.shape)), plain / 4)
    assert torch.allclose(warping_errors(0.5 * clip + 0.3, still(*clip.shape)), plain / 4)


def test_blur_lowers_the_warping_error_so_it_must_not_stand_alone():
    clip, _ = translation(h=96, w=128)
    noisy = (clip + 0.03 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    blurred = F.avg_pool2d(F.pad(noisy, (4, 4, 4, 4), "replicate"), 9, stride=1)
    assert warping_errors(blurred, dis_flow).mean() < 0.5 * warping_errors(noisy, dis_flow).mean()


def test_dis_finds_a_translation():
    clip, (forward, _) = translation(h=96, w=128)
    found = dis_flow(clip[:-1], clip[1:])[:, :, 16:-16, 16:-16]
    assert (found - forward[:, :, 16:-16, 16:-16]).abs().mean() < 0.2


def test_known_visibility_replaces_the_occlusion_test():
    clip, flow = translation(dx=0, dy=0)
    clip = clip.clone()
    clip[1:, :, :, :32] = 0.0  # something enters and covers the left third
    visible = torch.ones(3, 1, 64, 96, dtype=torch.bool)
    visible[0, :, :, :32] = False
    assert warping_errors(clip, flow)[0] > 1
    assert warping_errors(clip, flow, visible=visible).max() < 1e-20


def constant(u: float, h: int = 16, w: int = 24) -> torch.Tensor:
    return torch.tensor([u, 0.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, h, w)


@pytest.mark.parametrize(
    ("f", "b", "seen"), [(4, -4, True), (4, 4, False), (0.3, 0.3, True), (0.36, 0.36, False)]
)
def test_a_pixel_is_occluded_where_forth_and_back_disagree(f, b, seen):
    assert unoccluded(constant(f), constant(b)).all().item() is seen
    assert unoccluded(constant(f), constant(b)).any().item() is seen


def test_a_pair_of_which_nothing_is_seen_costs_nothing():
    clip = torch.stack([texture(32, 48, 0), texture(32, 48, 1)])
    assert warping_errors(clip, (constant(4, 32, 48), constant(4, 32, 48)), "evalcrafter") == 0


def test_a_step_of_the_flow_masks_the_one_column_before_it():
    forward, backward = torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, 16, 32)
    forward[:, 0, :, 12:], backward[:, 0, :, 12:] = 5, -5
    masked = (~unoccluded(forward, backward))[0, 0, 0, :27].nonzero().flatten()
    assert masked.tolist() == [11]


@pytest.mark.parametrize(("a", "radius"), [(0.03, 0.0), (0.05, math.sqrt(120))])
def test_a_zoom_is_masked_inside_its_closed_form_radius(a, radius):
    y, x = torch.meshgrid(torch.arange(61.0) - 30.2, torch.arange(61.0) - 30.2, indexing="ij")
    forward = (a * torch.stack([x, y]))[None].double()
    hidden = ~unoccluded(forward, -forward / (1 + a))[0, 0]
    inner = (slice(4, -4), slice(4, -4))  # the last pixels land outside, where the repeated border hides them
    assert torch.equal(hidden[inner], (x**2 + y**2 < radius**2)[inner])


def test_pixels_that_leave_the_frame_are_counted_exactly():
    assert in_frame(constant(4)).double().mean().item() == pytest.approx(1 - 4 / 24)
    assert in_frame(constant(0)).all()


def test_warp_follows_the_flow_in_pixels_with_x_first():
    second = texture(20, 30)[None]
    flow = torch.tensor([3.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 20, 30)
    assert torch.allclose(warp(second, flow)[..., :-1, :-3], second[..., 1:, 3:])
    half = warp(second, 0.5 * constant(1, 20, 30))
    assert torch.allclose(half[..., :-1], (second[..., :-1] + second[..., 1:]) / 2)


class Recorder(torch.nn.Module):
    """Stands where RAFT stands and keeps what it was shown."""

    def forward(self, first, second, num_flow_updates):
        self.seen, self.updates = first, num_flow_updates
        return [first[:, :2]]


def test_raft_sees_the_right_range_and_the_literal_one_divided_twice():
    frame = texture(130, 200)[None].float()
    for literal, white in ((False, 1), (True, 255)):
        network = Recorder()
        assert raft_flow(frame, frame, network, literal).shape == (1, 2, 130, 200)
        assert network.updates == 20 and network.seen.shape == (1, 3, 136, 200)
        assert torch.allclose(network.seen[..., :130, :], 2 * frame / white - 1)


def test_torchvisions_raft_takes_frames_of_any_size():
    raft_large = pytest.importorskip("torchvision.models.optical_flow").raft_large
    small = texture(50, 70).float()[None]
    flow = raft_flow(small, small, raft_large(weights=None).eval())
    assert flow.shape == (1, 2, 50, 70) and flow.isfinite().all()
