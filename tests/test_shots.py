"""What infer.py and data.py rely on: a cut is found at its frame; light, motion and noise are none."""

from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import generator
from dead_leaves import procedural_clip
from shots import AROUND, difference, in_shots, small
from video import Frame, VideoReader

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no sample videos in {DATA}")


def world(seed: int, frames: int = 12, size: tuple[int, int] = (96, 160)) -> np.ndarray:
    return procedural_clip(generator(seed), frames, size).frames


def starts(clip) -> list[int]:
    """Numbers of the frames with which a new shot begins."""
    shots = [shot for shot, _ in in_shots(Frame(rgb, Fraction(i)) for i, rgb in enumerate(clip))]
    return [i for i in range(1, len(shots)) if shots[i] > shots[i - 1]]


def grey(clip: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) for f in clip])


def test_every_frame_comes_once_behind_the_number_of_its_shot():
    for lengths in ([], [1], [3], [AROUND], [20], [12, 7, 9], [1, 12, 1], [12, 2, 12]):
        clip = [Frame(rgb, Fraction(0)) for k, t in enumerate(lengths) for rgb in world(k, t)]
        numbered = list(in_shots(clip))
        assert [frame for _, frame in numbered] == clip
        assert [shot for shot, _ in numbered] == [k for k, t in enumerate(lengths) for _ in range(t)]


def test_procedural_shots_are_told_apart_in_colour_and_without_and_have_no_cut_inside():
    clip, cuts = np.concatenate([world(k) for k in range(20)]), [12 * k for k in range(1, 20)]
    assert starts(clip) == starts(grey(clip)) == cuts


def test_a_cut_is_found_in_the_dark_and_under_noise():
    clip = np.concatenate([world(0), world(1)])
    noise = np.random.default_rng(0).normal(0, 12, clip.shape)
    assert starts(np.clip(clip + noise, 0, 255).astype(np.uint8)) == [12]
    assert starts((clip * 0.3).astype(np.uint8)) == [12]
    assert starts(np.clip(noise[:24] + 8, 0, 255).astype(np.uint8)) == []  # black frames are no shots


@pytest.mark.parametrize("length", range(1, AROUND))
@pytest.mark.parametrize("gain, lift", [(1.5, 20), (2.5, 60), (0, 255), (0, 0)])
def test_a_flash_of_light_is_no_cut(length, gain, lift):
    for seed in range(4):
        clip = world(seed, 20).astype(float)
        clip[8 : 8 + length] = clip[8 : 8 + length] * gain + lift
        assert starts(clip.clip(0, 255).astype(np.uint8)) == []


@pytest.mark.parametrize("length", [12, 25])
def test_light_that_comes_slowly_is_no_cut(length):
    """From black, to black, and from one picture to another."""
    fade = np.linspace(0, 1, length)[:, None, None, None]
    for seed in range(4):
        a, b = world(seed, length), world(seed + 10, length)
        assert starts((a * fade).astype(np.uint8)) == starts((a * fade[::-1]).astype(np.uint8)) == []
        assert starts((a * fade + b * (1 - fade)).astype(np.uint8)) == []


@pytest.mark.parametrize("share", [0.02, 0.1, 0.18])
def test_a_fast_pan_is_no_cut(share):
    """So much of the frame's width goes by from frame to frame; it begins and ends at once."""
    for seed in range(6):
        wide = world(seed, 1, (96, 160 + int(12 * share * 160)))[0]
        steps = [0] * 6 + list(range(12)) + [11] * 6
        clip = np.stack([wide[:, (x := int(n * share * 160)) : x + 160] for n in steps])
        assert starts(clip) == starts(grey(clip)) == [], seed


def test_a_fast_zoom_is_no_cut():
    for seed in range(6):
        picture, clip = world(seed, 1, (288, 480))[0], []
        for n in range(12):
            h, w = (int(side * 1.08**-n) // 2 for side in picture.shape[:2])
            clip.append(cv2.resize(picture[144 - h : 144 + h, 240 - w : 240 + w], (160, 96)))
        assert starts(clip) == []


def test_whether_there_is_a_cut_depends_on_the_frames_around_alone():
    """So a run that goes on in the middle, and each of several processes, finds the same shots."""
    clip = np.concatenate([world(k, t) for k, t in enumerate((13, 4, 20, 9))])
    cuts = starts(clip)
    assert cuts == [13, 17, 37]
    for begin in range(1, len(clip)):
        known = [begin + i for i in starts(clip[begin:]) if i >= AROUND]
        assert known == [i for i in cuts if i >= begin + AROUND]


def test_the_difference_is_small_for_what_has_moved_and_large_for_strangers():
    wide, other = (world(seed, 1, (96, 220))[0] for seed in (0, 1))
    a, moved, stranger = (small(rgb) for rgb in (wide[:, :160], wide[:, 24:184], other[:, :160]))
    assert difference(a, a) == 0 and difference(a, moved) < 0.05 < 0.3 < difference(a, stranger) <= 1


# --- real videos ---------------------------------------------------------------------------------------


def frames_of(name: str, most: int | None = None) -> list[np.ndarray]:
    """A video's frames at a size that any two videos share."""
    with VideoReader(DATA / name) as reader:
        return [cv2.resize(f.rgb, (160, 96), interpolation=cv2.INTER_AREA) for f in islice(reader, most)]


@needs_data
def test_real_videos_are_cut_where_they_were_joined():
    names = "stream_web360p", "chaplin_oldfilm", "rabbit_phone480p"
    clips = [frames_of(f"real_lq/{name}.mp4", 30) for name in names]
    clips += [frames_of(f"train_videos/{name}.mp4", 30) for name in ("path_01", "train_02", "person_00")]
    assert starts(chain(*clips)) == [30, 60, 90, 120, 150]


@needs_data
@pytest.mark.slow
def test_no_sample_video_has_a_cut_and_every_two_of_different_scenes_have_one():
    files = sorted((DATA / "train_videos").iterdir()) + sorted((DATA / "real_lq").iterdir())
    clips = {path.stem: frames_of(f"{path.parent.name}/{path.name}") for path in files}
    assert {name: starts(clip) for name, clip in clips.items()} == dict.fromkeys(clips, [])
    scenes = {name.split("_")[0].rstrip("2"): clip for name, clip in clips.items()}  # one of each
    wrong = [
        (a, b) for a in scenes for b in scenes if a != b and starts(scenes[a][-10:] + scenes[b][:10]) != [10]
    ]
    assert wrong == []
