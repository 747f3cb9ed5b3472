"""The dead-leaves world: textured shapes hide each other and move, as does the camera; its flow is exact.

    patterns --paint, outline--> leaves, far to near --draw_leaves--> frames
    each leaf's own motion, the camera's pan and zoom --exact_flow--> where each pixel goes, what stays seen

It stands in for videos and photos, and tells metrics of motion the truth. Points are complex numbers, x + iy
in pixels: turn z + shift zooms by |turn|, rotates by its angle and shifts.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

# Choice: all of these. The paper has no such world.
PAN = 3 + 3j  # pixels a frame that a camera drifts along x and y, at most
SWING = 0.004 + 0.004j  # log scale a frame that it zooms, radians a frame that it turns, at most
# Texture samples per output pixel: textures hold nothing finer than a pixel, so that drawing them anywhere
# between pixels by linear interpolation neither aliases nor changes their sharpness.
TEXELS = 2
BAND_LIMIT = 1.0  # sigma in texels of the blur behind that: it leaves 0.29 at the Nyquist of the pixels
PATTERN = 768  # texels a side of a pattern, at most
LEAVES = 70  # shapes for 256x256 pixels, which hide most of the background
RADIUS = (8.0, 100.0)  # pixels, uniform in the logarithm
DRIFT, SPIN = 2 + 2j, 0.004 + 0.02j  # a leaf's own PAN and SWING, at most
NEAR = (0.6, 1.4)  # share of the camera's pan in the farthest and the nearest leaf: parallax


def smooth_path(frames: int, step: complex, rng: Generator) -> np.ndarray:
    """A smooth path (t,) around 0: along either axis a drift of at most `step` a frame and a slow sway."""
    time = np.arange(frames) - (frames - 1) / 2
    low, high = (20, 0, -1, 0), (60, 2 * np.pi, 1, 5)  # Choice: frames, radians, steps a frame, steps
    period, phase, drift, sway = rng.uniform(low, high, (2, 4)).T[..., None]
    x, y = drift * time + sway * np.sin(2 * np.pi * time / period + phase)
    return step.real * x + 1j * (step.imag * y)


def view(image, turn: complex, shift: complex, size, how=cv2.INTER_LINEAR, border=cv2.BORDER_REFLECT_101):
    """A frame of `size` (w, h) whose pixel z shows the image at turn z + shift."""
    matrix = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    return cv2.warpAffine(image, matrix, size, flags=how | cv2.WARP_INVERSE_MAP, borderMode=border)


class Rendered(NamedTuple):
    """A rendered clip with its ground truth; `flow` and `visible` are None unless asked for."""

    frames: np.ndarray  # (t h w 3) uint8
    flow: np.ndarray | None  # (t-1 h w 2): what frame i shows at (x, y), the next shows at (x, y) + flow
    visible: np.ndarray | None  # (t-1 h w): that point is inside one shape, in view, uncovered in both


class Leaf(NamedTuple):
    """A shape whose point u, counted from its middle, is at turn u + shift on the screen."""

    colour: np.ndarray  # (th tw 3), times cover
    cover: np.ndarray  # (th tw) in [0, 1]
    turn: np.ndarray  # (t,) complex
    shift: np.ndarray


def procedural_clip(rng: Generator, frames: int, size: tuple[int, int], truth=False) -> Rendered:
    """A clip of `size` (h, w) of textured shapes that hide each other and move, as does the camera."""
    leaves = make_leaves(rng, frames, size)
    clip, owners = zip(*(draw_leaves(leaves, i, size) for i in range(frames)))
    if not truth:
        return Rendered(np.stack(clip), None, None)
    flow, visible = zip(*(exact_flow(leaves, i, owners) for i in range(frames - 1)))
    return Rendered(np.stack(clip), np.stack(flow), np.stack(visible))


def make_leaves(rng: Generator, frames: int, size: tuple[int, int]) -> list[Leaf]:
    """The background and the leaves, farthest first, with their motion on the screen."""
    h, w = size
    middle = complex(w - 1, h - 1) / 2
    gentle = rng.random()  # Choice: from almost still to fast
    zoom, pan = np.exp(smooth_path(frames, gentle * SWING, rng)), smooth_path(frames, gentle * PAN, rng)
    room = round(1.5 * TEXELS * h), round(1.5 * TEXELS * w)  # of the background, for the camera to move
    patterns = make_patterns(rng, min(PATTERN, max(room)))
    ground = paint(rng, patterns, room)
    leaves = [Leaf(ground, np.ones(room, np.float32), zoom, middle + zoom * pan * NEAR[0])]
    for k in range(count := round(LEAVES * h * w / 256**2)):
        cover = outline(rng, np.exp(rng.uniform(*np.log(RADIUS))))
        place = complex(*(rng.uniform(-0.7, 0.7, 2) * (w, h)))
        moves = gentle * (rng.random() < 0.5) * rng.random()  # Choice: half of them stand still in the world
        path = place + smooth_path(frames, moves * DRIFT, rng)
        turn = np.exp(smooth_path(frames, moves * SPIN, rng))
        near = NEAR[0] + (NEAR[1] - NEAR[0]) * (k + 1) / count
        colour = paint(rng, patterns, cover.shape) * cover[..., None]
        leaves.append(Leaf(colour, cover, zoom * turn, middle + zoom * (path + pan * near)))
    return leaves


def draw_leaves(leaves: list[Leaf], i: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frame i (h w 3) uint8 and the leaf that owns each pixel (h w) int16, -1 where several share it."""
    frame, owner = np.zeros((*size, 3), np.float32), np.zeros(size, np.int16)
    for k, leaf in enumerate(leaves):
        turn, shift = leaf.turn[i], leaf.shift[i]
        th, tw = leaf.cover.shape
        reach = np.abs([turn.real, turn.imag]) @ np.array([[tw, th], [th, tw]]) / 2 / TEXELS + 1
        place, border = np.array([shift.real, shift.imag]), cv2.BORDER_CONSTANT
        if k == 0:  # the background has no border
            reach, border = np.inf, cv2.BORDER_REFLECT_101
        low = np.maximum(0, np.floor(place - reach)).astype(int)
        high = np.minimum(size[::-1], np.ceil(place + reach) + 1).astype(int)
        if (low >= high).any():
            continue
        m = TEXELS / turn  # screen to texture: texel = m * (pixel - shift) + middle of the texture
        origin = m * (complex(*low) - shift) + complex(tw - 1, th - 1) / 2
        colour, cover = (view(x, m, origin, high - low, border=border) for x in (leaf.colour, leaf.cover))
        inside = np.s_[low[1] : high[1], low[0] : high[0]]
        frame[inside] *= cv2.cvtColor(1 - cover, cv2.COLOR_GRAY2RGB)
        frame[inside] += colour
        owner[inside][cover > 0.002] = -1
        owner[inside][cover > 0.998] = k
    return np.rint(frame).clip(0, 255).astype(np.uint8), owner


def exact_flow(leaves: list[Leaf], i: int, owners: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Flow (h w 2) from frame i to i + 1 and its visibility (h w), from the motion of each pixel's owner."""
    owner, after = owners[i : i + 2]
    h, w = owner.shape
    turn = np.array([leaf.turn[i + 1] / leaf.turn[i] for leaf in leaves])
    before, now = np.array([leaf.shift[i : i + 2] for leaf in leaves]).T
    here = np.arange(w) + 1j * np.arange(h)[:, None]
    there = turn[owner] * (here - before[owner]) + now[owner]
    move = np.where(owner >= 0, there - here, 0)
    x, y = np.floor(there.real).astype(int), np.floor(there.imag).astype(int)
    visible = (owner >= 0) & (x >= 0) & (y >= 0) & (x < w - 1) & (y < h - 1)
    x, y = x.clip(0, w - 2), y.clip(0, h - 2)
    for dy, dx in np.ndindex(2, 2):
        visible &= after[y + dy, x + dx] == owner
    return np.stack([move.real, move.imag], axis=-1).astype(np.float32), visible


def make_patterns(rng: Generator, side: int) -> list[np.ndarray]:
    """What leaves are made of: clouds, grain, veins, bent stripes and text, (side side) in [0, 1]."""
    octaves = [rng.standard_normal((max(2, side >> k), max(2, side >> k)), np.float32) for k in range(7)]
    octaves = [cv2.resize(octave, (side, side), interpolation=cv2.INTER_CUBIC) for octave in octaves]
    cloud = sum(octaves) / len(octaves) ** 0.5  # equal octaves: amplitude 1/f, as in photographs
    grain, veins = octaves[0] + octaves[1] + cloud, 4 * np.abs(cloud) - 2
    phase = np.arange(side) / rng.uniform(5, 20) + sum(octaves[3:]) * rng.uniform(0, 0.3)
    stripes = 3 * np.sin(2 * np.pi * phase)
    page, row = np.zeros((side, side), np.uint8), 0
    alphabet = list("abcdefghijklmnoprstuvwxyzABCDEFGHKLMNRST0123456789   .,-")
    while row < side:
        scale, font, stroke = rng.uniform(0.4, 1.2), int(rng.integers(5)), int(rng.integers(1, 3))
        row += int(34 * scale)  # pixels between the lines of OpenCV's fonts at scale 1
        cv2.putText(page, "".join(rng.choice(alphabet, 90)), (0, row), font, scale, 255, stroke, cv2.LINE_AA)
    text = page / 32.0 - 4 + 0.5 * cloud
    return [1 / (1 + np.exp(-1.5 * x.astype(np.float32))) for x in (cloud, grain, veins, stripes, text)]


def paint(rng: Generator, patterns: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """A piece of a pattern, turned and stretched, in two colours: (h w 3) float32, 0..255."""
    pattern, turn = patterns[rng.integers(len(patterns))], rng.uniform(0.6, 1.4) * 1j ** rng.uniform(0, 4)
    piece = view(pattern, turn, complex(*rng.uniform(0, len(pattern), 2)), size[::-1])[..., None]
    first, second = (rng.uniform(20, 235, (2, 1)) + rng.normal(0, 30, (2, 3))).astype(np.float32)
    return cv2.GaussianBlur((first + (second - first) * piece).clip(0, 255), (0, 0), BAND_LIMIT)


def outline(rng: Generator, radius: float) -> np.ndarray:
    """Coverage (h w) float32 of an ellipse, a box or a diamond of about this radius in pixels, in texels."""
    (a, b), turn = radius * TEXELS * rng.uniform(0.3, 1, 2), 1j ** rng.uniform(0, 4)
    half = np.abs([(turn.real, turn.imag), (turn.imag, turn.real)]) @ (a, b)  # its sides once it is turned
    x, y = (np.arange(-int(side) - 5, int(side) + 6) for side in half)  # room for the blur
    inside = (x + 1j * y[:, None]) * turn.conjugate()
    distance = np.linalg.norm([inside.real / a, inside.imag / b], ord=rng.choice([1, 2, np.inf]), axis=0)
    mask = (0.5 + (1 - distance) * min(a, b)).clip(0, 1).astype(np.float32)  # the edge is a texel wide
    return cv2.GaussianBlur(mask, (0, 0), BAND_LIMIT)
