"""cache.py: a cache that survives kills, and training from it: whole clips, pieces, another's results."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_teacher import assert_one_line, load, write_dove
from torch import nn

import cache as module
from cache import PRESETS, CachedClips, Config, main, training_clips, write_clip
from data import Data, Sources, TrainingClips
from data import loader as loader_of
from files import DataError
from runtime import UserError, World, complete
from teacher import Teacher
from video import VideoWriter, read_clip, to_frames, to_network, to_uint8

ROOT = Path(module.__file__).parent
SMOKE = replace(PRESETS["smoke"], frames=3, size=64, clips=5)


def make(cfg: Config, out: Path, **changes) -> Path:
    main(replace(cfg, out=str(out), **changes))
    return out


def clips_of(seed: int = 0, stage: int = 1, real_types: bool = False, **changes) -> TrainingClips:
    given = {"procedural": 1.0, "frames": SMOKE.frames, "size": SMOKE.size} | changes
    return TrainingClips(Sources("", "", **given), seed, stage, real_types)


def first_batch(clips, workers: int = 0) -> dict[str, torch.Tensor]:
    cfg = SimpleNamespace(steps=1, batch=2, workers=workers)
    return next(iter(loader_of(clips, 0, cfg, World(0, 1, torch.device("cpu")))))


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def dove(tmp_path_factory) -> Path:
    return write_dove(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def cached(dove, tmp_path_factory) -> Path:
    """A cache of DOVE's results."""
    return make(SMOKE, tmp_path_factory.mktemp("caches") / "dove", teacher=str(dove))


def test_the_cache_holds_what_training_would_have_computed_bit_for_bit(dove, cached):
    clips, network = clips_of(), load(dove)
    assert len(files_of(cached)) == 3 * 5 + 1
    for number in (0, 4):
        sample = clips[number]
        x_t = to_uint8(network(to_network(sample["lr"][None]), torch.tensor([sample["index"]])))[0]
        for kind, clip in {"lr": sample["lr"], "hr": sample["hr"], "teacher": x_t}.items():
            stored = read_clip(cached / kind / f"{number:08d}.mkv")
            assert np.array_equal(stored, to_frames(clip))


def test_any_colours_survive_the_file(tmp_path):
    clip = torch.randint(0, 256, (2, 3, 20, 36), dtype=torch.uint8)
    write_clip(tmp_path / "1.mkv", clip)
    assert np.array_equal(read_clip(tmp_path / "1.mkv"), to_frames(clip))


def until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_cache_killed_and_resumed_equals_the_straight_one_and_nothing_is_made_twice(tmp_path):
    straight = make(SMOKE, tmp_path / "straight")
    killed = tmp_path / "killed"
    flags = "--preset smoke --frames 3 --size 64 --clips 5 --out".split()
    process = subprocess.Popen([sys.executable, str(ROOT / "cache.py"), *flags, str(killed)], stderr=-1)
    until(lambda: len(list(killed.glob("hr/0*[0-9].mkv"))) >= 2, process)
    process.kill()
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in killed.rglob("[0-9]*.mkv")}
    assert 4 <= len(before) < 10, "the moment was missed"
    with suppress(RuntimeError), complete(killed / "lr" / "00000004.mkv") as partial:
        partial.write_bytes(b"half a clip")  # as far as a kill might let it come
        half = partial
        raise RuntimeError
    half.write_bytes(b"half a clip")
    make(SMOKE, killed)
    assert files_of(killed) == files_of(straight)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_shares_of_two_processes_make_the_whole_cache(tmp_path, monkeypatch):
    straight = make(SMOKE, tmp_path / "straight")
    for rank in range(2):
        monkeypatch.setattr(module, "init_world", lambda rank=rank: World(rank, 2, torch.device("cpu")))
        make(SMOKE, tmp_path / "shared")
        assert len(list((tmp_path / "shared" / "hr").iterdir())) == (3, 5)[rank]
    assert files_of(straight) == files_of(tmp_path / "shared")


@pytest.mark.slow
def test_torchrun_makes_the_same_cache_as_one_process(dove, cached, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = "--preset smoke --frames 3 --size 64 --clips 5 --teacher".split() + [str(dove)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(ROOT / "cache.py"), *flags, "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, env=environment)
    assert files_of(tmp_path / "two") == files_of(cached)


def test_a_cache_of_other_settings_is_refused_and_left_alone(cached, dove):
    before = files_of(cached)
    with pytest.raises(DataError) as error:
        make(SMOKE, cached, teacher=str(dove), size=32, seed=1)
    assert_one_line(error, "size was 64, now 32", "seed was 0, now 1")
    with pytest.raises(DataError) as error:
        make(SMOKE, cached)
    assert_one_line(error, "teacher was 'DOVE', now 'gt'")
    assert files_of(cached) == before


def test_a_full_disk_is_one_line_and_leaves_no_half_clip(tmp_path):
    make(SMOKE, tmp_path / "cache", clips=1)
    (tmp_path / "cache" / "hr" / "00000000.mkv").unlink()
    kept = files_of(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # the system refuses larger files
    try:
        with pytest.raises(UserError) as error:
            make(SMOKE, tmp_path / "cache", clips=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(error, "00000000.mkv", "cannot be written")
    assert files_of(tmp_path / "cache") == kept


# ----------------------------------------------------------------- training from the cache


def test_cached_samples_are_those_of_training_with_a_target(dove, cached):
    clips = CachedClips(cached, clips_of(seed=7, real_types=True), str(dove))
    batch, plain = first_batch(clips), first_batch(clips.clips)
    assert batch.keys() == plain.keys() | {"target"}
    shapes = {"lr": (2, 3, 3, 16, 16), "hr": (2, 3, 3, 64, 64), "target": (2, 3, 3, 64, 64)}
    assert {k: tuple(batch[k].shape) for k in shapes} == shapes
    assert all(batch[k].dtype == torch.uint8 for k in shapes)
    for name in "video", "image", "random_images", "order", "index":  # of the sources, as without a cache
        assert torch.equal(batch[name], plain[name])


def test_a_cached_sample_is_a_function_of_seed_and_index(dove, cached):
    """And of the stage: with the same seed, stage 2 sees the clips in another order and flipped otherwise."""
    of = [{"seed": 0}, {"seed": 0}, {"seed": 1}, {"seed": 0, "stage": 2}]
    clips, again, *others = (CachedClips(cached, clips_of(**key), str(dove)) for key in of)
    indices = range(6)
    assert all(torch.equal(clips[i]["lr"], again[i]["lr"]) for i in indices[::-1])
    for other in others:
        assert any(not torch.equal(clips[i]["lr"], other[i]["lr"]) for i in indices)


def unflipped(clip: torch.Tensor) -> Iterator[torch.Tensor]:
    """The eight ways in which a clip (t c h w) can have been flipped."""
    for k in range(8):
        flipped = clip.flip([axis for bit, axis in ((1, 2), (2, 3)) if k & bit])
        yield flipped.transpose(2, 3) if k & 4 else flipped


def test_a_pass_shows_every_clip_once_flipped_alike_in_lr_hr_and_target(dove, cached):
    clips, seen, ways = CachedClips(cached, clips_of(), str(dove)), [], set()
    stored = [[clips.read(kind, f"{n:08d}") for kind in ("lr", "hr", "target")] for n in range(5)]
    for index in range(15):
        sample = clips[index]
        triple = [sample[kind] for kind in ("lr", "hr", "target")]
        for number, way in np.ndindex(5, 8):
            if torch.equal(list(unflipped(stored[number][1]))[way], triple[1]):
                seen.append(number)
                ways.add(way)
                assert all(torch.equal(list(unflipped(a))[way], b) for a, b in zip(stored[number], triple))
        assert sample["index"] == index
        small = nn.functional.avg_pool2d(sample["hr"].float(), 4)
        pair = torch.stack([small.flatten(), sample["lr"].float().flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.5
    assert [sorted(seen[k : k + 5]) for k in range(0, 15, 5)] == [list(range(5))] * 3
    assert len(ways) > 4


def test_without_a_teacher_the_target_is_hr(tmp_path):
    """So the sample has none of its own, as without a cache."""
    clips = CachedClips(make(SMOKE, tmp_path / "gt"), clips_of(), "gt")
    assert clips[3].keys() == clips.clips[3].keys()


def test_a_piece_is_the_same_part_of_lr_hr_and_target_and_all_parts_come_up(dove, cached):
    clips = CachedClips(cached, clips_of(frames=2, size=48), str(dove))
    stored = [[clips.read(kind, name) for kind in ("lr", "hr", "target")] for name in clips.names]
    places = set()
    for index in range(60):
        sample, found = clips[index], []
        piece = [sample[kind] for kind in ("lr", "hr", "target")]
        assert [tuple(part.shape) for part in piece] == [(2, 3, 12, 12), (2, 3, 48, 48), (2, 3, 48, 48)]
        ways = list(zip(*map(unflipped, piece)))
        for n, i, y, x in np.ndindex(5, 2, 5, 5):  # in LR pixels
            cut = [
                clip[i : i + 2, :, k * y : k * (y + 12), k * x : k * (x + 12)]
                for clip, k in zip(stored[n], (1, 4, 4))
            ]
            found += [(n, i, y, x) for way in ways if all(map(torch.equal, way, cut))]
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 50
    for axis, values in enumerate((5, 2, 5, 5)):
        assert {place[axis] for place in places} == set(range(values))


def test_an_incomplete_cache_is_used_as_far_as_it_goes_and_an_empty_one_refused(tmp_path, capsys):
    cache = make(SMOKE, tmp_path / "gt")
    for number in (0, 3):
        (cache / "hr" / f"{number:08d}.mkv").unlink()
    (cache / "hr" / ".partial-00000000.mkv").touch()
    capsys.readouterr()
    clips = CachedClips(cache, clips_of(), "gt")
    assert clips.names == ["00000001", "00000002", "00000004"]
    assert capsys.readouterr().out.count("\n") == 1
    for file in (cache / "lr").iterdir():
        file.unlink()
    with pytest.raises(DataError) as error:
        CachedClips(cache, clips_of(), "gt")
    assert_one_line(error, "no clip is in all of them")


def test_clips_the_teacher_and_what_is_held_out_must_be_those_of_the_cache(dove, cached, tmp_path):
    with pytest.raises(DataError) as error:
        CachedClips(cached, clips_of(), "elsewhere/STAR", validation="some/held_out.txt")
    assert_one_line(error, "teacher was 'DOVE', now 'STAR'", "validation was '', now 'held_out.txt'")
    for larger in {"frames": 4}, {"size": 96}:
        with pytest.raises(DataError) as error:
            CachedClips(cached, clips_of(**larger), str(dove))
        assert_one_line(error, *(f"--{name} {value}" for name, value in larger.items()), "3 frames of 64")
    assert "target" not in CachedClips(cached, clips_of(), "gt")[3]  # every cache has HR and LR
    with pytest.raises(DataError) as error:
        CachedClips(tmp_path, clips_of(), "gt")
    assert_one_line(error, "not a cache")
    CachedClips(cached, clips_of(seed=5), str(dove))  # the seed only orders them


@dataclass(frozen=True)
class Run(Teacher, Data):
    seed: int = 0


def test_a_run_takes_new_clips_or_a_caches_which_needs_no_sources(cached, dove, tmp_path):
    run = Run(videos=str(tmp_path / "absent"), images="", frames=3, size=64)
    made = training_clips(replace(run, procedural=1.0, seed=3), stage=2)
    assert isinstance(made, TrainingClips) and (made.seed, made.stage, made.real_types) == (3, 2, False)
    assert all(torch.equal(made[4][k], clips_of(seed=3, stage=2)[4][k]) for k in ("lr", "hr"))
    run = replace(run, teacher_cache=str(cached), teacher=str(dove))
    kept = training_clips(run, stage=1)
    same = CachedClips(cached, clips_of(), str(dove))
    assert all(torch.equal(kept[4][k], same[4][k]) for k in ("lr", "hr", "target"))
    with pytest.raises(DataError):
        training_clips(run, stage=2, real_types=True)  # which are not in the cache
    assert "random_images" in training_clips(replace(run, procedural=1.0), stage=2, real_types=True)[0]


def write_results(cached: Path, folder: Path, suffix: str, frames: int = 3) -> None:
    """Another method's results: CACHE/lr with every pixel repeated."""
    folder.mkdir()
    for path in sorted((cached / "lr").iterdir()):
        big = read_clip(path)[:frames].repeat(4, axis=1).repeat(4, axis=2)
        with VideoWriter(folder / f"{path.stem}{suffix}", 64, 64, rate=25) as writer:
            for frame in big:
                writer.write(frame)


@pytest.mark.parametrize("suffix", ["", ".mp4"], ids=["folders of frames", "videos"])
def test_another_methods_results_become_the_targets(cached, tmp_path, suffix):
    write_results(cached, tmp_path / "seedvr2", suffix)
    sample = CachedClips(cached, clips_of(), str(tmp_path / "seedvr2"))[1]
    expected = sample["lr"].repeat_interleave(4, 2).repeat_interleave(4, 3)
    difference = (sample["target"].float() - expected.float()).abs().mean()
    assert difference == 0 if suffix == "" else difference < 12  # H.264 loses a little


@pytest.mark.parametrize("workers", [0, 1])
def test_a_result_of_the_wrong_length_is_one_line_naming_the_clip(cached, tmp_path, workers):
    write_results(cached, tmp_path / "short", "", frames=2)
    clips = CachedClips(cached, clips_of(), str(tmp_path / "short"))
    with pytest.raises(DataError) as error:
        first_batch(clips, workers)
    assert_one_line(error, "short/0000000", "2 frames of 64x64", "expected 3")
