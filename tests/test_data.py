"""data.py: samples that depend on nothing but (seed, index), files that never stop a run, the clip types of
Eq. 5."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch

import data
from data import (
    Sources,
    TrainingClips,
    generator,
    held_out_clips,
    indices,
    micro_batches,
    moving_crop,
    permutation,
    random_crop,
    to_inputs,
)
from dead_leaves import PAN, procedural_clip
from files import DataError
from runtime import UserError, World
from video import VideoWriter

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SMALL = {"frames": 3, "size": 32}


def clips_of(videos="", images="", stage=1, real_types=False, seed=5, **sources) -> TrainingClips:
    return TrainingClips(Sources(str(videos), str(images), **SMALL | sources), seed, stage, real_types)


def loader(clips, first: int, last: int, batch: int = 2, workers: int = 0):
    """The batches of steps first, ..., last - 1 of one process."""
    cfg = SimpleNamespace(steps=last, batch=batch, workers=workers)
    return data.loader(clips, first, cfg, World(0, 1, torch.device("cpu")))


def write_video(path: Path, frames: int = 12, size: tuple[int, int] = (48, 64), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, size[1], size[0], rate=25) as writer:
        for frame in procedural_clip(generator(seed), frames, size).frames:
            writer.write(frame)


def write_photo(path: Path, size: tuple[int, int] = (56, 72), seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo = procedural_clip(generator(seed), 1, size).frames[0]
    cv2.imwrite(str(path), photo[..., ::-1])
    return photo


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("datasets")
    for k in range(3):
        write_video(root / "videos" / f"v{k}.mp4", seed=k)
        write_photo(root / "images" / f"p{k}.png", seed=10 + k)
    return {"videos": root / "videos", "images": root / "images"}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one
    )


# ----------------------------------------------------------------- sampling: a function of (seed, index)


def test_a_sample_is_the_same_in_any_worker(folders):
    clips = clips_of(**folders, procedural=0.3, real_types=True)
    alone, shared = list(loader(clips, 0, 3)), list(loader(clips, 0, 3, workers=2))
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not torch.equal(alone[0]["hr"], alone[1]["hr"])


def test_a_resumed_run_sees_the_samples_that_were_to_come(folders):
    straight, resumed = list(loader(clips_of(**folders), 0, 4)), list(loader(clips_of(**folders), 2, 4))
    assert all(equal(a, b) for a, b in zip(straight[2:], resumed, strict=True))


def test_a_batch_knows_its_samples(folders):
    assert [batch["index"].tolist() for batch in loader(clips_of(**folders), 1, 3)] == [[2, 3], [4, 5]]


def test_a_stage_sees_other_clips_and_degradations_than_the_one_before(folders):
    first, again, second = (clips_of(**folders, stage=stage, real_types=True) for stage in (1, 1, 2))
    for index in range(4):
        one, same, other = (clips[index] for clips in (first, again, second))
        assert equal(one, same)
        kinds = ("hr", "lr", "video", "image", "random_images")
        assert not any(torch.equal(one[kind], other[kind]) for kind in kinds)
    # Nor do two stages degrade a clip alike: the generators differ, not only what they are used for.
    assert not set(first.rng(7, data.DEGRADE).random(9)) & set(second.rng(7, data.DEGRADE).random(9))


def test_a_micro_batch_is_a_few_clips_of_the_batch_whole_and_in_order():
    batch = {"hr": torch.arange(5), "order": torch.arange(10).reshape(5, 2)}
    parts = micro_batches(batch, 2, torch.device("cpu"))
    assert [part["hr"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part["order"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]


def test_inputs_are_frames_in_the_networks_range_and_anything_else_as_it_is():
    order = torch.tensor([[2, 0, 1]])
    inputs = to_inputs({"hr": torch.tensor([0, 255], dtype=torch.uint8), "order": order})
    assert inputs["hr"].tolist() == [-1.0, 1.0] and inputs["order"] is order


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_samples_of_a_step(world):
    for step in range(3):
        taken = [i for rank in range(world) for i in indices(step, rank, world, batch=8)]
        assert sorted(taken) == list(range(8 * step, 8 * step + 8))


def test_another_seed_gives_other_samples(folders):
    one, other = (clips_of(**folders, seed=seed)[0]["hr"] for seed in (1, 2))
    assert not torch.equal(one, other)


def test_pairs_have_the_shapes_and_the_range_of_8_bit_frames(folders):
    sample = clips_of(**folders)[0]
    assert sample["hr"].shape == (3, 3, 32, 32) and sample["lr"].shape == (3, 3, 8, 8)
    assert sample["hr"].dtype == sample["lr"].dtype == torch.uint8


def test_videos_and_photos_are_drawn_one_to_one_and_every_file_alike(folders, monkeypatch):
    monkeypatch.setattr(data, "degrade", lambda hr, rng: hr[:, ::4, ::4])  # which is not at issue
    clips, drawn = clips_of(**folders), []

    def noted(path, *_):
        drawn.append(path)
        return np.zeros((3, 32, 32, 3), np.uint8)

    monkeypatch.setattr(data, "video_clip", noted)
    monkeypatch.setattr(data, "read_clip", lambda path, *_: noted(path))
    monkeypatch.setattr(data, "random_crop", lambda clip, size, rng: clip[:1])
    monkeypatch.setattr(data, "moving_crop", lambda photo, frames, size, rng: np.stack([photo] * frames))
    clips.videos, clips.images = ([Path(kind, str(k)) for k in range(10)] for kind in ("video", "photo"))
    for i in range(2000):
        clips[i]
    counts = [drawn.count(path) for path in clips.videos + clips.images]
    assert 60 < min(counts) and max(counts) < 140  # 100 each expected, standard deviation 10
    assert 910 < sum(counts[:10]) < 1090  # 1000 expected, standard deviation 22


# ------------------------------------------------------------------------------ files that are no good


def test_unusable_files_are_passed_over(tmp_path):
    write_video(tmp_path / "good.mp4")
    write_video(tmp_path / "short.mp4", frames=2)
    write_video(tmp_path / "small.mp4", size=(16, 16))
    (tmp_path / "corrupt.mp4").write_bytes(b"no video at all" * 100)
    samples = [clips_of(tmp_path)[i] for i in range(12)]
    assert all(s["hr"].shape == (3, 3, 32, 32) for s in samples)


@pytest.mark.parametrize("promised", [400, 14])
def test_a_video_whose_header_counts_wrong_is_used_as_far_as_it_goes(tmp_path, promised):
    file = tmp_path / "v.avi"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=64, height=48, pix_fmt="yuv420p")
        for frame in procedural_clip(generator(0), 40, (48, 64)).frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(file.read_bytes())
    for chunk, place in (b"avih", 16), (b"strh", 32):  # the frames in all, of AVI and of its stream
        at = content.index(chunk) + 8 + place
        assert content[at : at + 4] == (40).to_bytes(4, "little")
        content[at : at + 4] = promised.to_bytes(4, "little")
    file.write_bytes(content)
    with data.VideoReader(file) as reader:
        assert reader.frames == sum(1 for _ in reader) == 40  # as the index says
    clips = clips_of(tmp_path, frames=12)  # where no other file stands in
    drawn = [clips.draw(clips.videos, 12, index) for index in range(12)]
    assert len({clip.tobytes() for clip in drawn}) == 12


def test_a_video_that_ends_early_is_used_as_far_as_it_goes(tmp_path):
    write_video(tmp_path / "whole.mkv", frames=40)
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "whole.mkv").write_bytes(whole[: 2 * len(whole) // 3])  # its header still tells of 40 frames
    clips = clips_of(tmp_path, frames=12)
    assert {clips.draw(clips.videos, 12, index).shape for index in range(12)} == {(12, 32, 32, 3)}


def test_no_window_of_a_video_holds_a_cut(tmp_path):
    """Frames tell their shots by their colours. A video cut everywhere is passed over, as short ones are."""
    shots = [procedural_clip(generator(seed), 14, (48, 64)).frames // 2 for seed in range(3)]
    joined = np.concatenate([shot + np.uint8(60 * k) for k, shot in enumerate(shots)])
    restless = np.concatenate([procedural_clip(generator(seed), 4, (48, 64)).frames for seed in range(10)])
    for name, clip in ("joined", joined), ("restless", restless):
        with VideoWriter(tmp_path / f"{name}.mkv", 64, 48, rate=25) as writer:
            for frame in clip:
                writer.write(frame)
    clips = clips_of(tmp_path, frames=10)
    drawn = [clips.draw(clips.videos, 10, index) for index in range(24)]
    brightness = [clip.mean(axis=(1, 2, 3)) for clip in drawn]
    assert all(np.ptp(clip) < 30 for clip in brightness)  # two shots are 60 apart
    assert len({int(clip.mean()) // 60 for clip in brightness}) == 3
    (tmp_path / "joined.mkv").unlink()
    alone = clips_of(tmp_path, frames=10)
    with pytest.raises(DataError, match="restless.mkv: a cut in each of 8 windows, 10 frames are needed"):
        alone.draw(alone.videos, 10, 0)


def test_grey_alpha_and_deep_sources_become_8_bit_rgb(tmp_path):
    grey, alpha = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64), np.zeros((64, 64, 4), np.uint8)
    alpha[::2] = 200
    (tmp_path / "i").mkdir()
    cv2.imwrite(str(tmp_path / "i" / "grey.png"), grey)
    cv2.imwrite(str(tmp_path / "i" / "alpha.png"), alpha)
    with av.open(str(tmp_path / "deep.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25, width=64, height=64, pix_fmt="yuv420p10le")
        for frame in procedural_clip(generator(0), 4, (64, 64)).frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    for clips, files in (clips_of(tmp_path), 1), (clips_of(images=tmp_path / "i"), 2):
        assert len(clips.videos or clips.images) == files
        assert all(clips[i]["hr"].shape == (3, 3, 32, 32) for i in range(6))
    photos = clips_of(images=tmp_path / "i")
    for path in photos.images:
        photos.images = [path]  # which no other file could stand in for
        assert photos[0]["hr"].shape == (3, 3, 32, 32)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message
    return message


def test_bad_places_are_one_line_each(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "OpenVid-1M.csv").write_text("name,caption\na.mp4,x\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"junk")
    for place, says in (("absent", "No such file"), ("empty", "nothing to train on"),
                        ("OpenVid-1M.csv", "column 'video'"), ("bad", "can be used")):  # fmt: skip
        with pytest.raises(UserError) as error:
            clips_of(tmp_path / place)[0]
        assert says in one_line(error) and place in one_line(error)


def test_an_error_in_a_worker_is_one_line_too(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"junk")
    with pytest.raises(DataError) as error:
        next(iter(loader(clips_of(tmp_path), 0, 1, batch=1, workers=1)))
    assert one_line(error).startswith("none of 1 files under")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: clips_of(),
        lambda: clips_of(size=30, procedural=1),
        lambda: clips_of(frames=1, real_types=True, procedural=1),
        lambda: clips_of(seed=-1, procedural=1)[0],
        lambda: indices(0, 0, processes=3, batch=8),
        lambda: held_out_clips(Sources("", "", 1, "absent.txt", **SMALL), 2),
        lambda: random_crop(np.zeros((1, 20, 40, 3), np.uint8), 32, generator(0)),
        lambda: moving_crop(np.zeros((20, 40, 3), np.uint8), 3, 32, generator(0)),
    ],
)
def test_impossible_requests_are_one_line_each(wrong):
    with pytest.raises(DataError) as error:
        wrong()
    one_line(error)


def test_real_types_need_images(folders):
    with pytest.raises(DataError, match="types 4 and 5 of Eq. 5 are photos; --procedural 1 needs no files"):
        clips_of(folders["videos"], real_types=True)


# ------------------------------------------------------------------------------------------- held-out files


def test_training_never_sees_held_out_files(tmp_path, monkeypatch):
    """Every file is drawn, as often as its fellows, but the held-out ones."""
    for kind, suffix in ("v", "mp4"), ("i", "png"):
        (tmp_path / kind).mkdir()
        for k in range(16):
            (tmp_path / kind / f"{k}.{suffix}").touch()
    drawn = Counter()

    def noted(path, *_):
        drawn[path.name] += 1
        return np.zeros((3, 32, 32, 3), np.uint8)

    monkeypatch.setattr(data, "video_clip", noted)
    monkeypatch.setattr(data, "read_clip", noted)
    monkeypatch.setattr(data, "degrade", lambda hr, rng: hr[:, ::4, ::4])
    monkeypatch.setattr(data, "moving_crop", lambda photo, frames, size, rng: np.stack([photo] * frames))
    clips = clips_of(tmp_path / "v", tmp_path / "i", real_types=True)
    for index in range(150):
        clips[index]
    seen = set(drawn)
    drawn.clear()
    names = [name for name, _, _ in held_out_clips(Sources(tmp_path / "v", tmp_path / "i", **SMALL), 99)]
    assert len(names) == 8 and len(drawn) == 8  # four, a quarter, of each kind
    assert not seen & set(drawn) and len(seen | set(drawn)) == 32


def test_held_out_clips_are_the_same_every_time_and_of_both_kinds(tmp_path):
    for k in range(8):
        write_video(tmp_path / "v" / f"v{k}.mp4", frames=4)
        write_photo(tmp_path / "i" / f"i{k}.jpg")
    sources = Sources(tmp_path / "v", tmp_path / "i", **SMALL)
    held, again = held_out_clips(sources, 3), held_out_clips(sources, 3)
    assert [name[0] for name, _, _ in held] == ["v", "i", "v"]
    for (_, hr, lr), (_, hr_again, lr_again) in zip(held, again, strict=True):
        assert hr.shape == (3, 32, 32, 3) and lr.shape == (3, 8, 8, 3)
        assert (hr == hr_again).all() and (lr == lr_again).all()


def test_a_list_names_what_is_held_out(tmp_path):
    for name in "park.mp4", "other.mp4":
        write_video(tmp_path / "v" / name, frames=4)
    for name in "hat.jpg", "other.jpg":
        write_photo(tmp_path / "i" / name)
    (tmp_path / "held.txt").write_text("park.mp4\nhat.jpg\nabsent.mp4\n")
    sources = {"videos": tmp_path / "v", "images": tmp_path / "i", "validation": str(tmp_path / "held.txt")}
    assert clips_of(**sources).held_out == {"park.mp4", "hat.jpg"}
    assert [name for name, _, _ in held_out_clips(Sources(**sources, **SMALL), 9)] == ["park", "hat"]
    (tmp_path / "held.txt").write_text("absent.mp4\n")
    with pytest.raises(DataError) as error:
        held_out_clips(Sources(**sources, **SMALL), 9)
    assert "--validation" in one_line(error)


def test_a_folder_of_held_out_clips_may_lie_inside_the_training_folder(tmp_path):
    for name in "a.mp4", "b.mp4", "val/c.mp4":
        write_video(tmp_path / name, frames=4)
    sources = {"videos": tmp_path, "validation": str(tmp_path / "val")}
    assert clips_of(**sources).held_out == {"c.mp4"}
    assert [name for name, _, _ in held_out_clips(Sources(images="", **sources, **SMALL), 9)] == ["c"]


def test_without_held_out_files_procedural_clips_are_looked_at_the_same_every_time(tmp_path):
    write_photo(tmp_path / "one.png")
    for videos, images, procedural in ("nowhere", "", 0), ("", tmp_path, 0), ("", "", 1):
        sources = Sources(videos, images, procedural, **SMALL)
        one, again = (held_out_clips(sources, 2) for _ in range(2))
        assert [name for name, _, _ in one] == ["procedural_0", "procedural_1"]
        for (_, hr, lr), (_, hr_again, lr_again) in zip(one, again, strict=True):
            assert hr.shape == (3, 32, 32, 3) and lr.shape == (3, 8, 8, 3)
            assert (hr == hr_again).all() and (lr == lr_again).all()
        assert (one[0][1] != one[1][1]).any()


# ------------------------------------------------------------------------------------------------- Eq. 5


@pytest.mark.parametrize("frames", [2, 3, 25])
def test_a_permutation_is_never_the_identity(frames):
    for seed in range(300):
        order = permutation(frames, generator(seed))
        assert sorted(order) == list(range(frames)) and (order != np.arange(frames)).any()


def test_every_other_order_of_three_frames_comes_up():
    assert len({tuple(permutation(3, generator(seed))) for seed in range(200)}) == 5


@pytest.mark.parametrize("procedural", [0.0, 1.0])
def test_the_real_clips_are_those_of_equation_5(folders, procedural):
    clips = clips_of(**folders, frames=4, real_types=True, procedural=procedural)
    batch = next(iter(loader(clips, 0, 1)))
    assert batch["video"].shape == batch["random_images"].shape == (2, 4, 3, 32, 32)
    assert batch["image"].shape == (2, 1, 3, 32, 32)
    for b in range(2):
        assert sorted(batch["order"][b].tolist()) == [0, 1, 2, 3] != batch["order"][b].tolist()
        images = batch["random_images"][b].float()
        apart = [(images[i] - images[j]).abs().mean() for i in range(4) for j in range(i)]
        assert min(apart) > 10  # grey levels


def test_asking_for_the_real_types_leaves_the_pair_as_it_is(folders):
    plain, typed = (clips_of(**folders, real_types=real)[7] for real in (False, True))
    assert equal(plain, {k: typed[k] for k in plain})


# ------------------------------------------------------------------------------------ photos and crops


def test_a_whole_frame_crop_changes_nothing():
    clip = procedural_clip(generator(0), 2, (32, 32)).frames
    assert (random_crop(clip, 32, generator(1)) == clip).all()


def test_flat_crops_are_drawn_again():
    frame = np.full((64, 256, 3), 128, np.uint8)
    frame[:, 128:] = procedural_clip(generator(0), 1, (64, 128)).frames[0]
    crops = [random_crop(frame[None], 32, generator(seed))[0] for seed in range(30)]
    assert all(crop.std() > 2 for crop in crops)  # in grey levels; half of the places are flat


def test_a_moving_crop_is_a_smooth_camera_over_the_photo():
    """Over a photo whose red is x and whose green is y, a crop shows where each of its pixels looks."""
    y, x = np.mgrid[:200, :250].astype(np.uint8)
    photo = np.dstack([x, y, x])
    i, j = np.mgrid[:64, :64] - 31.5
    plane = np.stack([np.ones(64 * 64), j.ravel(), i.ravel()], axis=1)
    for seed in range(6):
        clip = moving_crop(photo, 9, 64, generator(seed)).astype(float)
        fit = np.array([np.linalg.lstsq(plane, f[..., :2].reshape(-1, 2), rcond=None)[0] for f in clip])
        for frame, coefficients in zip(clip, fit, strict=True):
            # Rounded to 8 bits.
            assert np.abs(plane @ coefficients - frame[..., :2].reshape(-1, 2)).max() < 1.5
        centre, across, down = fit[:, 0], fit[:, 1], fit[:, 2]
        np.testing.assert_allclose(across[:, 0], down[:, 1], atol=0.02)  # a similarity:
        np.testing.assert_allclose(across[:, 1], -down[:, 0], atol=0.02)  # turned and scaled, not sheared
        scale = np.hypot(across[:, 0], across[:, 1])
        assert 0.9 < scale.min() and scale.max() < 2.3
        assert np.abs(np.diff(centre, n=2, axis=0)).max() < 2 * abs(PAN) * scale.max() * 0.25


def test_some_clips_of_a_photo_stand_still_and_most_move(tmp_path):
    write_photo(tmp_path / "photo.png", size=(80, 80))
    samples = clips_of(images=tmp_path)
    clips = [samples.draw(samples.images, 3, index) for index in range(60)]
    still = sum((clip == clip[:1]).all() for clip in clips)
    assert 5 <= still <= 25  # 15 expected
