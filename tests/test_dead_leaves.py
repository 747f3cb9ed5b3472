"""dead_leaves.py: a world whose flow is exact."""

import cv2
import numpy as np
import pytest

import dead_leaves
from data import generator
from dead_leaves import Leaf, Rendered, draw_leaves, exact_flow, procedural_clip


def warping_errors(world: Rendered, off: tuple[float, float] = (0, 0)) -> np.ndarray:
    """Grey levels between each frame and the next one brought back along the flow, at all visible points."""
    y, x = np.mgrid[: world.flow.shape[1], : world.flow.shape[2]].astype(np.float32)
    errors = []
    steps = zip(world.frames[:-1], world.frames[1:], world.flow, world.visible, strict=True)
    for now, after, flow, visible in steps:
        there_x, there_y = x + flow[..., 0] + off[0], y + flow[..., 1] + off[1]
        back = cv2.remap(after.astype(np.float32), there_x, there_y, cv2.INTER_LINEAR)
        errors.append(np.abs(back - now)[visible])
    return np.concatenate(errors)


@pytest.mark.parametrize("seed", range(3))
def test_flow_is_exact_where_interpolation_is(seed, monkeypatch):
    """With textures so smooth that linear interpolation is exact, only rounding to 8 bits is left: no visible
    point, however close to an edge, is off by more."""
    monkeypatch.setattr(dead_leaves, "BAND_LIMIT", 6.0)
    errors = warping_errors(procedural_clip(generator(seed), 4, (128, 128), truth=True))
    assert errors.max() < 2 and errors.mean() < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_another_flow_explains_the_world_worse(seed):
    world = procedural_clip(generator(seed), 6, (128, 160), truth=True)
    exact = warping_errors(world).mean()
    assert exact < 3 and world.visible.mean() > 0.5
    for off in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
        assert warping_errors(world, off).mean() > 1.5 * exact


def test_a_square_that_moves_covers_what_lies_ahead():
    """Known answer: a 20x20 square moves 3 pixels to the right over a ground that stands still."""
    ground = np.full((96, 96, 3), 50, np.float32)
    still, moves = np.ones(2, complex), np.array([24 + 24j, 27 + 24j])
    square = np.full((40, 40, 3), 200, np.float32)  # two texels a pixel
    leaves = [Leaf(ground, np.ones((96, 96), np.float32), still, still * (24 + 24j)),
              Leaf(square, np.ones((40, 40), np.float32), still, moves)]  # fmt: skip
    (first, owner), (second, after) = (draw_leaves(leaves, i, (48, 48)) for i in range(2))
    assert (first[:, :-3][owner[:, :-3] == 1] == 200).all() and (second[owner == 0][:, 0] >= 50).all()
    flow, visible = exact_flow(leaves, 0, [owner, after])
    assert (flow[owner == 1] == (3, 0)).all() and (flow[owner == 0] == 0).all()
    assert visible[24, 16:30].all() and visible[24, :12].all()  # inside the square, and behind it
    assert not visible[24, 35:37].any() and owner[24, 35] == 0  # ground that the square reaches
    assert visible[24, 39:47].all()  # ground that it does not


def test_the_world_is_a_function_of_its_seed_and_truth_does_not_change_it():
    one, other = (procedural_clip(generator(seed), 3, (48, 64)) for seed in (1, 2))
    same = procedural_clip(generator(1), 3, (48, 64), truth=True)
    assert (one.frames == same.frames).all() and (one.frames != other.frames).any() and one.flow is None
