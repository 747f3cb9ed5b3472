"""data.py: samples that depend on nothing but (seed, index), files that never stop a run, the clip types of
Eq. 5, and a world whose flow is exact."""

import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

import data
from data import (
    ClipPool,
    DataError,
    Leaf,
    TrainingClips,
    draw_leaves,
    exact_flow,
    fixed_clips,
    generator,
    indices,
    list_files,
    loader,
    micro_batches,
    moving_crop,
    permutation,
    procedural_clip,
    random_crop,
    real_clips,
    to_inputs,
    validation_clips,
)  # fmt: skip
from runtime import UserError
from video import VideoWriter, read_clip

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SMALL = {"frames": 3, "size": 32, "seed": 5}


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
    clips = TrainingClips(**folders, **SMALL, procedural=0.3, real_types=True)
    alone = list(loader(clips, 0, 3, rank=0, world=1, batch=2, workers=0))
    shared = list(loader(clips, 0, 3, rank=0, world=1, batch=2, workers=2))
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not torch.equal(alone[0]["hr"], alone[1]["hr"])


def test_a_resumed_run_sees_the_samples_that_were_to_come(folders):
    clips = TrainingClips(**folders, **SMALL)
    straight = list(loader(clips, 0, 4, rank=0, world=1, batch=2, workers=0))
    resumed = list(loader(TrainingClips(**folders, **SMALL), 2, 4, rank=0, world=1, batch=2, workers=0))
    assert all(equal(a, b) for a, b in zip(straight[2:], resumed, strict=True))


def test_overfit_shows_the_same_first_clips_again_and_again_to_all_processes():
    shares = [loader(range(100), 2, 5, rank, world=2, batch=4, workers=0, overfit=3) for rank in range(2)]
    steps = [sorted(torch.cat(step).tolist()) for step in zip(*shares)]
    assert steps == [sorted(i % 3 for i in range(4 * step, 4 * step + 4)) for step in (2, 3, 4)]


def test_a_micro_batch_is_a_few_clips_of_the_batch_whole_and_in_order():
    batch = {"hr": torch.arange(5), "order": torch.arange(10).reshape(5, 2), "skipped": torch.zeros(5)}
    parts = micro_batches(batch, 2, torch.device("cpu"))
    assert [part["hr"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part["order"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert all(part.keys() == {"hr", "order"} for part in parts)


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
    one, other = (TrainingClips(**folders, **SMALL | {"seed": seed})[0]["hr"] for seed in (1, 2))
    assert not torch.equal(one, other)


def test_pairs_have_the_shapes_and_the_range_of_8_bit_frames(folders):
    sample = TrainingClips(**folders, **SMALL)[0]
    assert sample["hr"].shape == (3, 3, 32, 32) and sample["lr"].shape == (3, 3, 8, 8)
    assert sample["hr"].dtype == sample["lr"].dtype == torch.uint8


def test_videos_and_photos_are_drawn_one_to_one_and_every_file_alike(folders, monkeypatch):
    monkeypatch.setattr(data, "degrade", lambda hr, rng, variant: hr[:, ::4, ::4])  # which is not at issue
    clips, drawn = TrainingClips(**folders, **SMALL), []

    def noted(path, *_):
        drawn.append(path)
        return np.zeros((3, 32, 32, 3), np.uint8)

    monkeypatch.setattr(data, "video_clip", noted)
    monkeypatch.setattr(data, "read_clip", lambda path: noted(path))
    monkeypatch.setattr(data, "random_crop", lambda clip, size, rng: clip[:1])
    monkeypatch.setattr(data, "moving_crop", lambda photo, frames, size, rng: np.stack([photo] * frames))
    clips.videos, clips.images = ([Path(kind, str(k)) for k in range(10)] for kind in ("video", "photo"))
    for i in range(2000):
        clips[i]
    counts = [drawn.count(path) for path in clips.videos + clips.images]
    assert 60 < min(counts) and max(counts) < 140  # 100 each expected, standard deviation 10
    assert 910 < sum(counts[:10]) < 1090  # 1000 expected, standard deviation 22


# ------------------------------------------------------------------------------ files that are no good


def test_unusable_files_are_passed_over_and_counted(tmp_path):
    write_video(tmp_path / "good.mp4")
    write_video(tmp_path / "short.mp4", frames=2)
    write_video(tmp_path / "small.mp4", size=(16, 16))
    (tmp_path / "corrupt.mp4").write_bytes(b"no video at all" * 100)
    samples = [TrainingClips(tmp_path, None, **SMALL)[i] for i in range(24)]
    assert {s["skipped"] for s in samples} == {0, 1, 2, 3}  # the good file is first, second, third or last
    assert all(s["hr"].shape == (3, 3, 32, 32) for s in samples)


def test_a_video_that_ends_early_never_stops_the_run(tmp_path):
    write_video(tmp_path / "whole.mkv", frames=40)
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])  # its header still tells of 40 frames
    clips = TrainingClips(tmp_path, None, frames=12, size=32)
    assert len({clips[i]["hr"].shape for i in range(12)}) == 1


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
    for clips in (TrainingClips(tmp_path, None, **SMALL), TrainingClips(None, tmp_path / "i", **SMALL)):
        samples = [clips[i] for i in range(6)]
        assert all(s["hr"].shape == (3, 3, 32, 32) and s["skipped"] == 0 for s in samples)


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
                        ("OpenVid-1M.csv", "no column 'video'"), ("bad", "can be used")):  # fmt: skip
        with pytest.raises(UserError) as error:
            TrainingClips(tmp_path / place, None, **SMALL)[0]
        assert says in one_line(error) and place in one_line(error)


def test_an_error_in_a_worker_is_one_line_too(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"junk")
    with pytest.raises(DataError) as error:
        next(iter(loader(TrainingClips(tmp_path, None, **SMALL), 0, 1, rank=0, world=1, batch=1, workers=1)))
    assert one_line(error).startswith("none of 1 files under")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TrainingClips(None, None),
        lambda: TrainingClips(None, None, size=30, procedural=1),
        lambda: TrainingClips(None, None, degradation="none", procedural=1),
        lambda: TrainingClips(None, None, frames=1, real_types=True, procedural=1),
        lambda: TrainingClips(None, None, seed=-1, procedural=1)[0],
        lambda: indices(0, 0, world=3, batch=8),
        lambda: procedural_clip(generator(0), 3, (32, 32), shots=4),
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
        TrainingClips(folders["videos"], None, **SMALL, real_types=True)


def test_layouts_folder_list_openvid_and_lsdir(tmp_path):
    names = ["b.mp4", "a.mp4", "other.mp4"]
    (tmp_path / "video").mkdir()
    for name in names:
        (tmp_path / "video" / name).touch()
    suffixes = data.VIDEO_SUFFIXES
    assert [p.name for p in list_files(tmp_path, suffixes)] == sorted(names)
    (tmp_path / "list.txt").write_text("video/b.mp4\n\nvideo/other.mp4\n")
    assert [p.name for p in list_files(tmp_path / "list.txt", suffixes)] == ["b.mp4", "other.mp4"]
    (tmp_path / "data" / "train").mkdir(parents=True)
    table = tmp_path / "data" / "train" / "OpenVid-1M.csv"
    table.write_text('video,caption,frame\nb.mp4,"one, two",80\na.mp4,three,90\nabsent.mp4,,1\n')
    assert list_files(table, suffixes) == [tmp_path / "video" / "a.mp4", tmp_path / "video" / "b.mp4"]
    for shard in ("0001000", "X4", "val1"):
        (tmp_path / "lsdir" / shard).mkdir(parents=True)
        (tmp_path / "lsdir" / shard / "0000001.png").touch()
    found = list_files(tmp_path / "lsdir", data.IMAGE_SUFFIXES)
    assert [p.parent.name for p in found] == ["0001000"]


def test_validation_clips_are_held_out_of_training(tmp_path):
    write_video(tmp_path / "v" / "park_00.mp4", frames=4)
    write_video(tmp_path / "v" / "other.mp4", frames=4)
    write_photo(tmp_path / "i" / "linku_hato.jpg")
    write_photo(tmp_path / "i" / "other.jpg")
    clips = TrainingClips(tmp_path / "v", tmp_path / "i", **SMALL)
    assert [p.name for p in clips.videos + clips.images] == ["other.mp4", "other.jpg"]
    held = list(validation_clips(tmp_path / "v", tmp_path / "i", frames=3, size=32))
    again = list(validation_clips(tmp_path / "v", tmp_path / "i", frames=3, size=32))
    assert [name for name, _, _ in held] == ["park_00", "linku_hato"]
    assert all((a[1] == b[1]).all() and (a[2] == b[2]).all() for a, b in zip(held, again, strict=True))


def test_without_held_out_files_procedural_clips_are_looked_at_the_same_every_time(tmp_path):
    one, again = (fixed_clips("nowhere", None, frames=2, size=32, count=2) for _ in range(2))
    assert [name for name, _, _ in one] == ["procedural_0", "procedural_1"]
    for (_, hr, lr), (_, hr_again, lr_again) in zip(one, again, strict=True):
        assert hr.shape == (2, 32, 32, 3) and lr.shape == (2, 8, 8, 3)
        assert (hr == hr_again).all() and (lr == lr_again).all()
    assert (one[0][1] != one[1][1]).any()
    for name in "linku_hato.jpg", "sam_groceries.jpg", "human_person-vlado.jpg":
        write_photo(tmp_path / name)
    held_out = [name for name, _, _ in fixed_clips(None, tmp_path, frames=2, size=32, count=2)]
    assert held_out == ["human_person-vlado", "sam_groceries"]  # as many as asked for, none procedural


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the sample data in ../shared/data")
def test_no_source_of_the_sample_data_is_on_both_sides():
    videos = {p.name for p in (SHARED / "train_videos").iterdir()}
    held, trained = set(data.HELD_OUT_VIDEOS), list_files(SHARED / "train_videos", data.VIDEO_SUFFIXES)
    sources = {name.rsplit("_", 1)[0] for name in held}
    assert held < videos and sources == {"park", "bee", "train"}
    assert not sources & {p.name.rsplit("_", 1)[0] for p in trained}
    photos = {p.name for p in list_files(SHARED / "train_images", data.IMAGE_SUFFIXES)}
    held = set(data.HELD_OUT_IMAGES)
    assert len(held) == 12 and not held & photos
    assert held < {p.name for p in (SHARED / "train_images").iterdir()}


# ------------------------------------------------------------------------------------------------- Eq. 5


@pytest.mark.parametrize("frames", [2, 3, 25])
def test_a_permutation_is_never_the_identity(frames):
    for seed in range(300):
        order = permutation(frames, generator(seed))
        assert sorted(order) == list(range(frames)) and (order != np.arange(frames)).any()


def test_every_other_order_of_three_frames_comes_up():
    assert len({tuple(permutation(3, generator(seed))) for seed in range(200)}) == 5


@pytest.mark.parametrize("procedural", [0.0, 1.0])
def test_the_real_clip_types_are_those_of_equation_5(folders, procedural):
    clips = TrainingClips(**folders, frames=4, size=32, real_types=True, procedural=procedural)
    batch = next(iter(loader(clips, 0, 1, rank=0, world=1, batch=2, workers=0)))
    real = real_clips(batch)
    assert set(real) == {"video", "shuffled_video", "image", "random_images"}
    assert {clip.shape for clip in real.values()} == {(2, 4, 3, 32, 32)}
    for b in range(2):
        for i, source in enumerate(batch["order"][b]):
            assert torch.equal(real["shuffled_video"][b, i], real["video"][b, source])
        assert not torch.equal(real["shuffled_video"][b], real["video"][b])
        assert (real["image"][b] == real["image"][b, :1]).all()
        images = real["random_images"][b].float()
        apart = [(images[i] - images[j]).abs().mean() for i in range(4) for j in range(i)]
        assert min(apart) > 10  # grey levels


def test_asking_for_the_real_types_leaves_the_pair_as_it_is(folders):
    plain, typed = (TrainingClips(**folders, **SMALL, real_types=real)[7] for real in (False, True))
    assert equal(plain, {k: typed[k] for k in plain})


@pytest.fixture(scope="module")
def samples() -> TrainingClips:
    """Samples of 4 frames of 40x40 with the real types, of which a pool shows pieces of 3 of 32x32."""
    return TrainingClips(None, None, frames=4, size=40, seed=3, procedural=1.0, real_types=True)


def test_a_pools_real_clips_are_pieces_of_its_samples_each_drawn_on_its_own(samples):
    pool, made = ClipPool(samples, count=3, frames=3, size=32, workers=0), [samples[i] for i in range(3)]
    sources, orders = set(), set()
    for index in range(40):
        piece, source = pool[index], []
        assert piece["lr"].shape == (3, 3, 8, 8) and piece["hr"].shape == (3, 3, 32, 32)
        for name, frames in ("video", 3), ("image", 1), ("random_images", 3):
            assert piece[name].shape == (frames, 3, 32, 32)
            found = [
                n
                for n, sample in enumerate(made)
                for i in range(len(sample[name]) - frames + 1)
                for y in range(0, 9, 4)
                for x in range(0, 9, 4)
                if torch.equal(sample[name][i : i + frames, :, y : y + 32, x : x + 32], piece[name])
            ]
            assert found, f"the {name} of piece {index} is no part of the pool"
            source.append(found[0])
        sources.add(tuple(source))
        orders.add(tuple(piece["order"]))
    assert len(sources) > 10  # of 27 ways to draw the three clips
    assert all(sorted(order) == [0, 1, 2] != list(order) for order in orders) and len(orders) == 5


def test_a_pools_piece_with_its_real_clips_is_a_function_of_seed_and_index(samples):
    one, other = (ClipPool(samples, count=2, frames=3, size=32, workers=workers) for workers in (0, 1))
    assert all(equal(one[index], other[index]) for index in (5, 0, 3))
    assert not any(torch.equal(one[5][k], one[3][k]) for k in ("hr", "video", "image", "random_images"))
    batch = next(iter(loader(one, 0, 1, rank=0, world=1, batch=2, workers=0)))
    assert {clip.shape for clip in real_clips(batch).values()} == {(2, 3, 3, 32, 32)}


def test_a_pool_smaller_than_its_pieces_is_one_line(samples):
    for frames, size in (5, 32), (3, 44):
        with pytest.raises(DataError, match="--pool-frames, --pool-size") as error:
            ClipPool(samples, count=1, frames=frames, size=size, workers=0)
        one_line(error)


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
        assert np.abs(np.diff(centre, n=2, axis=0)).max() < 2 * abs(data.PAN) * scale.max() * 0.25


def test_some_clips_of_a_photo_stand_still_and_most_move(tmp_path):
    write_photo(tmp_path / "photo.png", size=(80, 80))
    samples = TrainingClips(None, tmp_path, **SMALL)
    clips = [samples.draw(samples.images, 3, index)[0] for index in range(60)]
    still = sum((clip == clip[:1]).all() for clip in clips)
    assert 5 <= still <= 25  # 15 expected


# ----------------------------------------------------------------------------------- the procedural world


def warping_errors(world: data.World, off: tuple[float, float] = (0, 0)) -> np.ndarray:
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
    monkeypatch.setattr(data, "BAND_LIMIT", 6.0)
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


def test_cuts_begin_new_scenes():
    world = procedural_clip(generator(3), 12, (64, 64), shots=3, truth=True)
    steps = np.abs(np.diff(world.frames.astype(float), axis=0)).mean((1, 2, 3))
    cuts = [cut - 1 for cut in world.cuts]
    assert len(cuts) == 2 and not world.visible[cuts].any() and not world.flow[cuts].any()
    others = [i for i in range(11) if i not in cuts]
    assert steps[cuts].min() > 2 * steps[others].max() and world.visible[others].any((1, 2)).all()


def test_the_world_is_a_function_of_its_seed_and_truth_does_not_change_it():
    one, other = (procedural_clip(generator(seed), 3, (48, 64)) for seed in (1, 2))
    same = procedural_clip(generator(1), 3, (48, 64), truth=True)
    assert (one.frames == same.frames).all() and (one.frames != other.frames).any() and one.flow is None


def test_the_command_writes_a_sample_clip(tmp_path):
    command = [sys.executable, ROOT / "data.py", "--frames", "3", "--size", "16", "24", "-o"]
    subprocess.run([*command, tmp_path / "sample.mp4"], check=True, cwd=tmp_path)
    assert read_clip(tmp_path / "sample.mp4").shape == (3, 16, 24, 3)
    command.append(tmp_path / "sample.xyz")
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    assert not (tmp_path / "sample.xyz").exists()
