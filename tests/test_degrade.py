"""The degradation draws what the reference's configuration says and does what the definitions say."""

import hashlib
import math
import subprocess
import sys
import warnings
from collections import Counter
from math import pi
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import reference_degrade as reference

import degrade as D
from degrade import FINAL, ORDER_1, ORDER_2, Blur, Codec, Jpeg, Noise, Resize, Walk
from runtime import UserError
from video import VideoReader, VideoWriter

ROOT = Path(__file__).resolve().parent.parent


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def moving_texture(t: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    """Clip (t h w 3) uint8 of coloured blobs and fine grey grain, panned by 2 and 1 pixels per frame."""
    random = rng(seed).standard_normal((h + 2 * t, w + 2 * t, 3)).astype(np.float32)
    grain = cv2.GaussianBlur(random[..., 0], (0, 0), 1.2)[..., None]
    world = 400 * cv2.GaussianBlur(random, (0, 0), 8) + 90 * grain + 128
    world = np.clip(np.rint(world), 0, 255).astype(np.uint8)
    return np.stack([world[i : i + h, 2 * i : 2 * i + w] for i in range(t)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def assert_share(hits: int, of: int, probability: float) -> None:
    """Within four standard deviations, which chance passes once in 16,000 times; the seeds are fixed."""
    assert abs(hits / of - probability) < 4 * math.sqrt(probability * (1 - probability) / of)


# -- kernels


def drawn_blur(kind: str, seed: int, t: int = 1, table: dict = ORDER_1) -> Blur:
    return Blur.draw(rng(seed), t, {**table, "blur_prob": 1.0, "kernels": {kind: 1.0}})


@pytest.mark.parametrize("kind", D.KERNELS)
def test_kernels_sum_to_one_are_symmetric_and_match_their_closed_form(kind):
    for seed in range(12):
        blur = drawn_blur(kind, seed, t=2)
        kernels = blur.kernels()
        assert kernels.shape == (2, blur.size, blur.size) and blur.size in (7, 9, 11, 13, 15, 17, 19, 21)
        assert np.allclose(kernels.sum((1, 2)), 1, atol=1e-12)
        assert np.allclose(kernels, kernels[:, ::-1, ::-1], atol=1e-12)
        assert (kernels.reshape(2, -1).argmax(1) == blur.size**2 // 2).all()
        if kind != "sinc":
            assert (kernels >= 0).all()
        if kind.endswith("iso") and "aniso" not in kind:
            assert np.allclose(kernels, kernels.transpose(0, 2, 1), atol=1e-12)
        for i in range(2):
            sigma = blur.sigma[:, i] if kind != "sinc" else (0, 0)
            shape = (blur.rotation[i], blur.beta[i], 0) if kind != "sinc" else (0, 0, blur.omega[i])
            slow = reference.one_kernel(kind, blur.size, *sigma, *shape)
            assert np.abs(kernels[i] - slow).max() < 1e-6


def test_narrow_gaussian_is_nearly_the_identity_and_sinc_centre_falls_with_its_cut_off():
    narrow = Blur("iso", 21, np.full((2, 1), 0.2), np.zeros(1), np.ones(1)).kernels()
    assert narrow[0, 10, 10] == pytest.approx(0.99998, abs=1e-5)
    cut_offs = np.array([pi, pi / 2, pi / 3])
    assert Blur("sinc", 7, omega=cut_offs).kernels()[:, 3, 3] == pytest.approx([0.80, 0.24, 0.064], abs=0.005)
    assert Blur("sinc", 21, omega=cut_offs).kernels()[:, 10, 10] == pytest.approx(
        [0.79, 0.18, 0.088], abs=0.005
    )


@pytest.mark.parametrize("kind", D.KERNELS)
def test_separated_filter_is_the_two_dimensional_filter_to_a_tenth_of_a_grey_level(kind):
    frame = (255 * (rng(0).random((60, 70, 3)) > 0.5)).astype(np.uint8)  # the worst case: pixels at both ends
    for seed in range(20):
        kernel = drawn_blur(kind, seed, table=ORDER_1 if seed % 2 else ORDER_2).kernels()[0]
        slow = cv2.filter2D(frame.astype(np.float32), -1, kernel)
        assert np.abs(D.filter_frame(frame, kernel) - slow).max() < 255 * D.KERNEL_TOLERANCE


# -- draws


def test_walk_starts_uniform_keeps_its_range_and_steps_no_further_than_said():
    walk = Walk(1.0, 30.0, 0.1)
    values = np.stack([walk.draw(rng(seed), 25) for seed in range(3000)])
    assert values.shape == (3000, 25) and values.min() >= 1 and values.max() <= 30
    assert values[:, 0].mean() == pytest.approx(15.5, abs=4 * 29 / math.sqrt(12 * 3000))
    steps = np.abs(np.diff(values))
    assert 0.0999 < steps.max() <= 0.1 + 1e-12
    drift = np.std(values[:, -1] - values[:, 0])
    assert drift == pytest.approx(0.1 * math.sqrt(24 / 3), rel=0.05)  # 0.28 over 25 frames


def test_walk_is_clipped_at_the_ends_of_its_range_not_reflected():
    values = np.concatenate([Walk(0.0, 1.0, 0.8).draw(rng(seed), 50) for seed in range(20)])
    assert (values == 0).any() and (values == 1).any()


def test_jpeg_quality_walks_by_whole_numbers_of_at_most_three():
    quality = np.stack([Jpeg.draw(rng(seed), 25, ORDER_1).quality for seed in range(500)])
    assert (quality == np.rint(quality)).all() and quality.min() >= 30 and quality.max() <= 95
    assert set(np.unique(np.abs(np.diff(quality)))) == {0, 1, 2, 3}
    assert 7 < np.std(quality[:, -1] - quality[:, 0]) < 9


def test_blur_parameters_stay_in_the_ranges_of_their_order():
    for table, sigma_top in ((ORDER_1, 3.0), (ORDER_2, 1.5)):
        for kind in ("aniso", "generalized_aniso", "plateau_aniso"):
            blurs = [drawn_blur(kind, seed, 4, table) for seed in range(200)]
            sigma = np.stack([blur.sigma for blur in blurs])
            beta = np.stack([blur.beta for blur in blurs])
            low, high, step = {"a": (1, 1, 0), "g": (0.5, 4, 0.05), "p": (1, 2, 0.1)}[kind[0]]
            assert sigma.min() >= 0.2 and 0.95 * sigma_top < sigma.max() <= sigma_top
            assert np.abs(np.diff(sigma)).max() <= 0.02 + 1e-12
            assert beta.min() >= low and beta.max() <= high and np.abs(np.diff(beta)).max() <= step + 1e-12
            rotation = np.stack([blur.rotation for blur in blurs])
            assert np.abs(rotation).max() <= pi and np.abs(np.diff(rotation)).max() <= 0.31416
        sincs = [drawn_blur("sinc", seed, 4, table) for seed in range(400)]
        for small, low in ((True, pi / 3), (False, pi / 5)):
            omega = np.stack([blur.omega for blur in sincs if (blur.size < 13) == small])
            assert low <= omega.min() < 1.1 * low and 0.95 * pi < omega.max() <= pi
            assert np.abs(np.diff(omega)).max() <= 0.06284
    omega = [drawn_blur("sinc", seed, 4, FINAL).omega.min() for seed in range(200)]
    assert pi / 3 <= min(omega) < 0.4 * pi


def test_probabilities_of_every_choice_are_those_of_the_configuration():
    n = 3000
    chains = [D.draw_steps(rng(seed), 2, 512, 512) for seed in range(n)]
    first_blurs = [chain[0] for chain in chains]
    assert all(isinstance(blur, Blur) for blur in first_blurs)  # order 1 always blurs
    shares = {"iso": 0.405, "aniso": 0.225, "generalized_iso": 0.108, "generalized_aniso": 0.027}
    shares |= {"plateau_iso": 0.108, "plateau_aniso": 0.027, "sinc": 0.1}
    kernels = Counter(blur.kernel for blur in first_blurs)
    for kind, share in shares.items():
        assert_share(kernels[kind], n, share)
    sizes = Counter(blur.size for blur in first_blurs)
    for size in (7, 9, 11, 13, 15, 17, 19, 21):
        assert_share(sizes[size], n, 1 / 8)

    second = [chain[5:] for chain in chains]  # order 1 is blur, resize, noise, JPEG, codec
    assert_share(sum(isinstance(chain[0], Blur) for chain in second), n, 0.8)
    final_blurs = [[s for s in chain[1:] if isinstance(s, Blur)] for chain in second]
    assert_share(sum(map(len, final_blurs)), n, 0.8)
    assert {blur.kernel for blurs in final_blurs for blur in blurs} == {"sinc"}
    assert_share(sum(isinstance(chain[-1], Codec) for chain in second), n, 0.5)  # the shuffle

    codecs = [step for chain in chains for step in chain if isinstance(step, Codec)]
    assert len(codecs) == 2 * n
    for name in ("libx264", "h264", "mpeg4"):
        assert_share(sum(step.codec == name for step in codecs), 2 * n, 1 / 3)
    bitrates = np.array([step.bitrate for step in codecs])
    assert bitrates.min() >= 10_000 and bitrates.max() <= 100_000
    assert bitrates.mean() == pytest.approx(55_000, abs=4 * 90_000 / math.sqrt(12 * 2 * n))

    noises = [[step for step in chain if isinstance(step, Noise)] for chain in chains]
    for order, top in ((0, {"gaussian": 30, "poisson": 3}), (1, {"gaussian": 25, "poisson": 2.5})):
        steps = [noise[order] for noise in noises]
        assert_share(sum(step.kind == "gaussian" for step in steps), n, 0.5)
        assert_share(sum(step.grey for step in steps), n, 0.4)
        for kind, low in (("gaussian", 1), ("poisson", 0.05)):
            strength = np.array([step.strength[0] for step in steps if step.kind == kind])
            assert strength.min() >= low and 0.98 * top[kind] < strength.max() <= top[kind]


def test_sizes_follow_the_scales_are_even_and_end_at_a_quarter():
    n, sizes = 4000, []
    for seed in range(n):
        chain = D.draw_steps(rng(1, seed), 1, 512, 512)
        sizes.append([step.size for step in chain if isinstance(step, Resize)])
    sizes = np.array(sizes)  # n, three resizes, h w
    assert (sizes % 2 == 0).all() and (sizes[:, 2] == 128).all()
    first = sizes[:, 0, 0] / 512
    second = sizes[:, 1, 0] / sizes[:, 0, 0]
    assert first.min() >= 0.148 and first.max() <= 1.5 and second.min() >= 0.28 and second.max() <= 1.2
    for scale, up in ((first, 0.2), (second, 0.3)):
        assert (scale > 1).mean() == pytest.approx(up, abs=0.03)  # rounding to even takes some from "up"
    assert np.percentile(first, [5, 50, 95]) == pytest.approx([0.21, 0.76, 1.38], abs=0.03)
    total = sizes[:, 1, 0] / 512
    assert np.percentile(total, [5, 50, 95]) == pytest.approx([0.17, 0.62, 1.36], abs=0.05)
    assert_share(int((total < 0.25).sum()), n, 0.13)


# -- what the steps do


def run(step: D.Step, clip: np.ndarray) -> np.ndarray:
    return np.stack(list(step.apply(iter(clip))))


def noise_step(kind: str, strength: float, t: int, grey: bool = False) -> Noise:
    table = {**ORDER_1, "noises": {kind: 1.0}, kind: Walk(strength, strength, 0.0), "grey_prob": float(grey)}
    return Noise.draw(rng(7), t, table)


def test_gaussian_noise_has_the_drawn_sigma_no_mean_and_no_memory():
    flat = np.full((2, 256, 256, 3), 128, np.float32)
    noise = run(noise_step("gaussian", 20.0, 2), flat) - 128
    assert noise.std() == pytest.approx(20, rel=0.02)
    assert abs(noise.mean()) < 4 * 20 / math.sqrt(noise.size)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.015


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_grey_noise_is_the_same_in_all_channels(kind):
    flat = np.full((1, 64, 64, 3), 100, np.float32)
    noise = run(noise_step(kind, 2.0, 1, grey=True), flat) - 100
    assert noise.std() > 1 and np.ptp(noise, axis=3).max() < 1e-4


def test_poisson_noise_has_the_moments_of_poissons_law():
    ramp = np.broadcast_to(np.arange(256, dtype=np.float32)[:, None, None], (256, 2000, 3))
    noise = run(noise_step("poisson", 1.0, 1), ramp[None])[0] - ramp
    law = rng(0).poisson(ramp / 255 * 256) / 256 * 255 - ramp  # 256 distinct levels: v = 256
    assert noise.std((1, 2)) == pytest.approx(law.std((1, 2)), rel=0.06, abs=1e-6)
    assert noise[128].std() == pytest.approx(11.3, rel=0.03)  # grey levels per unit of scale
    assert noise[224].var() / noise[32].var() == pytest.approx(7, rel=0.1)
    assert abs(noise[128].mean()) < 4 * 11.3 / math.sqrt(6000)


def test_flat_frame_does_not_drown_in_poisson_noise():
    flat = np.full((1, 128, 128, 3), 128, np.float32)  # one level: the definition alone gives sigma 181
    assert run(noise_step("poisson", 1.0, 1), flat).std() == pytest.approx(
        255 * math.sqrt(128 / 255 / 64), rel=0.03
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "area", "bicubic"])
def test_kept_size_returns_the_frames_unchanged(interpolation):
    clip = moving_texture(2, 40, 48)
    kept = {**ORDER_1, "up_down_keep": (0, 0, 1), "interpolations": {interpolation: 1.0}}
    assert np.array_equal(run(Resize.draw(rng(0), (40, 48), kept), clip), clip)


def test_bicubic_overshoot_survives_until_the_next_8bit_step():
    edge = np.zeros((1, 32, 32, 3), np.uint8)
    edge[:, :, 16:] = 255
    resized = run(Resize("bicubic", (64, 64)), edge)
    assert resized.dtype == np.float32 and resized.min() < 0 and resized.max() > 255
    coded = run(Jpeg(np.array([95])), resized)
    assert coded.dtype == np.uint8 and coded[:, :, :24].max() < 30 and coded[:, :, 40:].min() > 225  # no wrap


def test_jpeg_rounds_and_gains_with_quality():
    flat = np.full((1, 32, 32, 3), 100.6, np.float32)
    assert (run(Jpeg(np.array([100])), flat) == 101).all()
    clip = moving_texture(1, 96, 96)
    quality = [psnr(run(Jpeg(np.array([q])), clip), clip) for q in (30, 60, 95)]
    assert quality == sorted(quality) and quality[0] > 20


@pytest.mark.parametrize("codec", ["libx264", "h264", "mpeg4"])
@pytest.mark.parametrize("size", [(64, 96), (50, 30), (25, 33), (2, 2)])
def test_codec_keeps_count_order_and_size(codec, size):
    t = 25
    level = 20 + 8 * np.arange(t)  # each frame has a brightness of its own
    clip = np.broadcast_to(level[:, None, None, None], (t, *size, 3)).astype(np.uint8)
    coded = run(Codec(codec, 60_000), clip)
    assert coded.shape == clip.shape
    assert np.abs(coded.mean((1, 2, 3)) - level).max() < 6


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_codec_gains_with_bitrate_and_keeps_colour(codec):
    clip = moving_texture(12, 256, 256)  # smaller, mpeg4 is at its finest quantiser from the start
    coded = {bitrate: run(Codec(codec, bitrate), clip) for bitrate in (10_000, 30_000, 100_000)}
    quality = [psnr(coded[bitrate], clip) for bitrate in coded]
    assert quality == sorted(quality) and quality[-1] > quality[0] + 1
    shift = coded[100_000].mean((0, 1, 2)) - clip.mean((0, 1, 2))
    assert np.abs(shift).max() < 0.3


def test_h264_and_libx264_are_the_same_encoder():
    clip = moving_texture(6, 64, 64)
    assert np.array_equal(run(Codec("h264", 20_000), clip), run(Codec("libx264", 20_000), clip))


def test_missing_codec_is_replaced_by_the_next_of_its_kind_with_one_warning(monkeypatch):
    monkeypatch.setitem(D.ENCODERS, "libx264", ("not_built_in", "libx264"))
    clip = moving_texture(3, 32, 32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")  # what Python does outside pytest
        for bitrate in (20_000, 30_000):
            assert run(Codec("libx264", bitrate), clip).shape == clip.shape
    assert [str(w.message) for w in said] == ["PyAV has no encoder not_built_in; libx264 takes its place"]
    monkeypatch.setitem(D.ENCODERS, "libx264", ("not_built_in",))
    with pytest.raises(UserError, match="not_built_in"):
        run(Codec("libx264", 20_000), clip)


# -- the chain


@pytest.mark.parametrize("frames", [4, 1])
def test_every_step_equals_the_slow_reference_on_the_same_draws(frames):
    clip = moving_texture(frames, 64, 80)
    for seed in range(12):
        stream = list(clip)
        for step in D.draw_steps(rng(seed), frames, 64, 80):
            fast, slow = list(step.apply(stream)), reference.apply_step(stream, step)
            assert len(fast) == len(slow) == frames
            difference = max(np.abs(a.astype(float) - b).max() for a, b in zip(fast, slow, strict=True))
            # What is 8-bit, codecs included, agrees exactly.
            assert difference <= (255 * D.KERNEL_TOLERANCE if isinstance(step, Blur) else 1e-3), step
            stream = fast
        assert np.array_equal(np.stack([D.to_8bit(frame) for frame in stream]), D.degrade(clip, rng(seed)))


@pytest.mark.parametrize("frames", [3, 1])
def test_whole_chain_equals_the_slow_reference_when_the_filters_are_exact(frames, monkeypatch):
    monkeypatch.setattr(D, "KERNEL_TOLERANCE", 1e-9)  # else JPEG and codec make much of the last rounding
    clip, equal = moving_texture(frames, 64, 64), 0
    for seed in range(10):
        slow = reference.degrade_slowly(clip, D.draw_steps(rng(seed), frames, 64, 64))
        equal += np.array_equal(D.degrade(clip, rng(seed)), slow)
    assert equal >= 8


def test_lr_is_8bit_at_a_quarter_of_the_size_for_any_multiple_of_four():
    for t, h, w in ((25, 32, 48), (1, 100, 36), (3, 4, 8)):
        lr = D.degrade(moving_texture(t, h, w), rng(t))
        assert lr.shape == (t, h // 4, w // 4, 3) and lr.dtype == np.uint8


def test_same_seed_gives_the_same_pixels_in_another_process_and_other_seeds_do_not():
    clip = moving_texture(8, 100, 152)  # sizes at which x264's default rate control is not repeatable
    code = (
        "import hashlib, sys, numpy as np, degrade\n"
        "clip = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(8, 100, 152, 3)\n"
        "for seed in range(6):\n"
        "    lr = degrade.degrade(clip, np.random.default_rng((seed,)))\n"
        "    print(hashlib.sha256(lr.tobytes()).hexdigest())\n"
    )
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, input=clip.tobytes(), cwd=ROOT, capture_output=True, check=True)
    here = [hashlib.sha256(D.degrade(clip, rng(seed)).tobytes()).hexdigest() for seed in range(6)]
    assert other.stdout.decode().split() == here
    assert len(set(here)) == len(here)


def test_degrading_leaves_its_input_and_opencvs_threads_as_they_were():
    clip = moving_texture(3, 32, 32)
    before, threads = clip.copy(), cv2.getNumThreads()
    D.degrade(clip, rng(0))
    assert np.array_equal(clip, before) and cv2.getNumThreads() == threads


def test_single_frames_pass_no_codec_and_end_with_resize_then_sinc():
    chains = [[type(step).__name__ for step in D.draw_steps(rng(s), 1, 64, 64)] for s in range(50)]
    assert not any("Codec" in chain for chain in chains)
    assert {tuple(chain[-2:]) for chain in chains} == {("Resize", "Blur"), ("Jpeg", "Resize")}


def real_crops(t: int, size: int) -> list[np.ndarray]:
    folder = ROOT / "../shared/data/train_videos"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    crops = []
    for name in ("park_00.mp4", "bee_00.mp4", "facade2_00.mp4", "dog_00.mp4", "selfie_00.mp4"):
        with av.open(str(folder / name)) as container:
            frames = [
                f.to_ndarray(format="rgb24")
                for f, _ in zip(container.decode(video=0), range(t), strict=False)
            ]
        crops.append(np.stack(frames)[:, 100 : 100 + size, 150 : 150 + size])
    return crops


def test_natural_clips_lose_as_much_as_the_reference_takes_and_no_brightness():
    shifts, values = [], []
    for i, clip in enumerate(real_crops(5, 256)):

        def enlarged(lr: np.ndarray, clip: np.ndarray = clip) -> np.ndarray:
            return np.stack([cv2.resize(f, clip.shape[2:0:-1], interpolation=cv2.INTER_CUBIC) for f in lr])

        down = np.stack([cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA) for frame in clip])
        ceiling = psnr(enlarged(down), clip)
        for seed in range(5):
            lr = D.degrade(clip, rng(i, seed))
            values.append(psnr(enlarged(lr), clip))
            shifts.append(lr.mean() - clip.mean())
            assert 14 < values[-1] < ceiling + 0.5
    assert 19 < np.mean(values) < 30
    assert abs(np.mean(shifts)) < 1 and np.abs(shifts).max() < 5


# -- bad input, command line


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((2, 30, 32, 3), np.uint8), "multiples of 4, not .2, 30, 32, 3"),
        (np.zeros((2, 32, 32, 3), np.float32), "takes .t h w 3. uint8"),
        (np.zeros((32, 32, 3), np.uint8), "takes .t h w 3. uint8"),
        (np.zeros((0, 32, 32, 3), np.uint8), "takes .t h w 3. uint8"),
    ],
)
def test_wrong_clips_are_refused_in_one_line(clip, message):
    with pytest.raises(UserError, match=message):
        D.degrade(clip, rng(0))


def test_command_line_writes_the_lr_clip(tmp_path):
    source, lr = tmp_path / "hr.mp4", tmp_path / "lr.mp4"
    with VideoWriter(source, 100, 76, rate=25) as writer:
        for frame in moving_texture(9, 76, 100):
            writer.write(frame)
    command = [sys.executable, str(ROOT / "degrade.py"), str(source), "-o", str(lr), "--seed", "3"]
    subprocess.run(command, check=True, timeout=120)
    frames = [frame.rgb for frame in VideoReader(lr)]
    assert len(frames) == 9 and frames[0].shape == (18, 24, 3)

    (tmp_path / "text.mp4").write_text("no video")
    out = str(tmp_path / "out.mp4")
    command = [sys.executable, str(ROOT / "degrade.py"), str(tmp_path / "text.mp4"), "-o", out]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "text.mp4" in refused.stderr
    assert not (tmp_path / "out.mp4").exists()
