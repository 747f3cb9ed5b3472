"""All benchmarks, each a table: `python bench.py quality`, or another of `WORK`.

Times are of this machine at this moment: compare rows of one run, not rows of two machines.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from discriminators import BACKBONE
from runtime import UserError, World, count_flops, peak_memory, run

ROOT = Path(__file__).parent
WORK = "quality long memory infer degrade data metrics train1 train2".split()
SIZES = ((128, 96), (320, 240), (640, 360))  # LR width and height


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median wall seconds of work(), after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def machine() -> str:
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def high_frequencies(clip: torch.Tensor) -> torch.Tensor:
    """What LR has no room for: luma's spectrum (t n) above 1/8 cycle a pixel; clip (t 3 h w) uint8."""
    from degrade import SCALE
    from metrics import LUMA

    luma = (clip.double() * torch.tensor(LUMA["yiq"][0]).reshape(3, 1, 1)).sum(dim=1)
    h, w = luma.shape[-2:]
    window = torch.hann_window(h)[:, None] * torch.hann_window(w)  # a frame's ends do not meet
    spectrum = torch.fft.rfft2((luma - luma.mean((1, 2), keepdim=True)) * window)
    return spectrum[:, torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)) > 0.5 / SCALE]


def unseen_clips(videos: str, images: str) -> Iterator[tuple]:
    """(kind, name, hr (t h w 3), lr, what `warping_errors` takes) of clips that training never sees."""
    from data import DEGRADE, as_tensor, generator, procedural_clip, validation_clips
    from degrade import degrade
    from metrics import dis_flow

    for name, hr, lr in validation_clips(videos, images):
        yield "held-out", name, hr, lr, {"flow": dis_flow}
    for seed in range(1000, 1008):  # of generators that training never asks for
        world = procedural_clip(generator(seed), 25, (256, 256), truth=True)
        flow, visible = as_tensor(world.flow), torch.from_numpy(world.visible)[:, None]
        lr = degrade(world.frames, generator(seed, DEGRADE))
        yield "procedural", str(seed), world.frames, lr, {"flow": (flow, flow), "visible": visible}


def bench_quality(videos: str, images: str, weights: list[str], picture: str | None) -> None:
    """PSNR, SSIM, detail and E*_warp of students on clips that training never saw, 25x256x256.

    Detail: energy of the high frequencies over that in HR. Match: their correlation with HR's, which noise
    and invented texture have none of. E*_warp, corrected: on procedural clips under their exact flow, else
    under OpenCV's DIS. picture: bicubic | each student | HR of every third clip, frame above row over time.
    """
    from data import as_tensor
    from infer import as_frames, as_network, choose_device_and_dtype, enlarged
    from metrics import psnr, ssim, strips, warping_errors
    from model import AdcVSR

    device, dtype = choose_device_and_dtype("auto", "auto")
    students = {name: AdcVSR.from_pretrained(name).to(device, dtype).eval() for name in weights}
    for net in students.values():
        net.to(memory_format=torch.channels_last)
    print(f"{str(dtype)[6:]}, {machine()}")
    print(f"{'':54} PSNR     SSIM   detail    match  E*_warp")
    rows, panels = {}, []
    for number, (kind, name, hr, lr, motion) in enumerate(unseen_clips(videos, images)):
        x, hr = as_network(list(lr), device), as_tensor(hr)
        with torch.no_grad():
            results = {"bicubic": enlarged(x)} | {name: net(x[None])[0] for name, net in students.items()}
        sides = {side: as_tensor(as_frames(clip)) for side, clip in results.items()} | {"HR": hr}
        wanted = high_frequencies(hr)
        for side, clip in sides.items():
            high = high_frequencies(clip)
            match = (high * wanted.conj()).real.sum() / (high.norm() * wanted.norm())
            row = [psnr(clip, hr).mean(), ssim(clip, hr).mean(), high.norm() ** 2 / wanted.norm() ** 2, match]
            row = [float(x) for x in (*row, warping_errors(clip, **motion).mean())]
            rows.setdefault((kind, side), []).append(row)
            print(line(name, side, row), flush=True)
        if number % 3 == 0:
            panels.append(strips(sides.values()))
    for (kind, side), group in rows.items():
        print(line(f"mean of {len(group)} {kind}", side, np.mean(group, axis=0)))
    if picture:
        imageio.imwrite(picture, rearrange(torch.cat(panels, dim=1), "c h w -> h w c").numpy())


def line(name: str, side: str, row) -> str:
    return f"{name[-25:]:25} {side[-23:]:23}" + "".join(f" {x:8.3f}" for x in row)


def bench_long(images: str, weights: str, frames: int = 120) -> None:
    """Clips longer than training's: one exact stream against overlapping windows of 25 frames."""
    from data import HELD_OUT_IMAGES, moving_crop, procedural_clip
    from degrade import degrade
    from infer import Frame, choose_device_and_dtype, upscale
    from metrics import dis_flow, psnr, warping_errors
    from model import AdcVSR
    from video import read_clip

    device, dtype = choose_device_and_dtype("auto", "auto")
    net = AdcVSR.from_pretrained(weights).to(device, dtype).to(memory_format=torch.channels_last).eval()
    net.requires_grad_(False)
    rows = []
    print(f"{weights}, {frames} frames of 256x256, {machine()}")
    print(f"{'':22} PSNR stream/windows   E*_warp stream/windows")
    for number in range(6):
        rng = np.random.default_rng(number)
        name = HELD_OUT_IMAGES[number] if number < 4 else f"procedural {number}"
        if number < 4:
            hr = moving_crop(read_clip(Path(images) / name)[0], frames, 256, rng)
        else:
            hr = procedural_clip(rng, frames, (256, 256)).frames
        lr = degrade(hr, rng)
        gt = rearrange(torch.from_numpy(hr), "t h w c -> t c h w")
        row = []
        for window, chunk in ((0, 8), (25, 17)):
            source = (Frame(rgb, i) for i, rgb in enumerate(lr))
            sr = np.stack([sr for _, sr in upscale(net, source, chunk, window)])
            sr = rearrange(torch.from_numpy(sr), "t h w c -> t c h w")
            row += [psnr(sr, gt).mean().item(), warping_errors(sr, dis_flow).mean().item()]
        rows.append(row)
        print(f"{name[:22]:22} {row[0]:6.2f} / {row[2]:6.2f}   {row[1]:6.2f} / {row[3]:6.2f}", flush=True)
    mean = np.mean(rows, axis=0)
    print(f"{'mean':22} {mean[0]:6.2f} / {mean[2]:6.2f}   {mean[1]:6.2f} / {mean[3]:6.2f}")


def bench_memory(lengths: tuple[int, ...] = (400, 2000), width: int = 64, height: int = 48) -> list[int]:
    """Peak memory in bytes of infer.py as a process, decoding and encoding included, for each clip length."""
    from data import procedural_clip
    from video import VideoWriter

    frames = procedural_clip(np.random.default_rng(0), 100, (height, width)).frames
    peaks = []
    print(f"clips of {width}x{height}, shipped weights, {machine()}")
    with TemporaryDirectory() as folder:
        for length in lengths:
            clip = Path(folder) / f"{length}.mp4"
            with VideoWriter(clip, width, height, 25) as out:
                for i in range(length):
                    out.write(frames[min(i % 200, 199 - i % 200)])  # to and fro
            command = [sys.executable, ROOT / "infer.py", clip, "--device", "cpu"]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)  # this child's own peak
            if status:
                raise UserError(f"infer.py failed on {length} frames; run it by hand")
            peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            ratio = f"  {peaks[-1] / peaks[0]:.3f} of the first"
            print(f"{length:6} frames  {peaks[-1] / 2**20:8.1f} MB{ratio}", flush=True)
    return peaks


def bench_infer(frames: int = 4) -> None:
    """Seconds a frame by size and dtype, start-up, and on a GPU peak memory, with the shipped weights."""
    from infer import SHIPPED
    from model import AdcVSR

    print(f"tiny, {frames} frames a chunk, {machine()}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        net = AdcVSR.from_pretrained(SHIPPED).to(device, dtype).to(memory_format=torch.channels_last).eval()
        for width, height in SIZES:
            lr = torch.rand(1, frames, 3, height, width, device=device) * 2 - 1
            with torch.no_grad():
                spent = seconds(lambda: net(lr)) / frames  # noqa: B023
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if device == "cuda" else ""
            print(f"{str(dtype)[6:]:9} {width}x{height} -> x4  {spent:7.3f} s/frame {memory}", flush=True)
    print(f"start-up, process start to first frame on the network: {start_up():.1f} s")


def start_up() -> float:
    """Seconds from the start of a process until the sample's first frame has been through the network."""
    work = (
        "import infer, itertools; args = infer.parse(['sample.mp4']); net = infer.load_network(args); "
        "reader = infer.VideoReader('sample.mp4'); frames = itertools.islice(reader, 1); "
        "next(infer.upscale(net, frames, 1)); print('ready')"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", work], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def bench_degrade(clips: int = 6) -> None:
    """CPU seconds a 25x512x512 clip on one core: the per-frame port, ours, ours with a faster x264."""
    from data import procedural_clip
    from degrade import draw_steps, one_thread
    from tests.reference_degrade import apply_step

    spent: dict[str, list[float]] = {}
    columns = ("port", "ours", "ours, veryfast")
    with one_thread():
        for seed in range(clips):
            clip = procedural_clip(np.random.default_rng(seed), 25, (512, 512)).frames
            for column, name in enumerate(columns):
                steps = draw_steps(
                    np.random.default_rng(seed), *clip.shape[:3], "realbasicvsr",
                    "veryfast" if name.endswith("veryfast") else "medium",
                )  # fmt: skip
                frames = list(clip)
                for step in steps:
                    start = time.process_time()
                    frames = (
                        apply_step(frames, step, own_noise=True)
                        if name == "port"
                        else list(step.apply(frames))
                    )
                    row = spent.setdefault(type(step).__name__, [0.0] * len(columns))
                    row[column] += (time.process_time() - start) / clips
    spent["whole chain"] = [sum(column) for column in zip(*spent.values())]
    print(f"CPU seconds for a 25x512x512 clip, mean of {clips}; {machine()}, one core")
    print(f"{'':12} " + " ".join(f"{c:>16}" for c in columns))
    for name, row in spent.items():
        print(f"{name:12} " + " ".join(f"{s:8.3f} ({row[0] / s:5.2f}x)" for s in row))


def bench_data(videos: str, images: str, clips: int = 8, size: int = 512) -> None:
    """Clips a second and core of each part of loading, and the cores that a training speed needs."""
    from data import TrainingClips, moving_crop, procedural_clip
    from degrade import degrade
    from video import read_clip

    torch.set_num_threads(1)
    source = TrainingClips(videos, images, 25, size)
    clip = procedural_clip(np.random.default_rng(0), 25, (size, size)).frames
    photos = [p for p in source.images if min(read_clip(p).shape[1:3]) >= size][:clips]
    parts = {
        "video decode, crop": lambda i: source.draw(source.videos, 25, i, 1),
        "photo decode, moving crop": lambda i: moving_crop(
            read_clip(photos[i])[0], 25, size, np.random.default_rng(i)
        ),
        "degradation": lambda i: degrade(clip, np.random.default_rng(i)),
        "procedural clip": lambda i: procedural_clip(np.random.default_rng(i), 25, (size, size)),
        "a training pair, all of it": lambda i: source[i],
    }
    print(f"25x{size}x{size}, one core, {machine()}")
    for name, make in parts.items():
        start = time.process_time()
        for i in range(len(photos)):
            make(i)
        spent = (time.process_time() - start) / len(photos)
        print(f"{name:28} {1 / spent:6.2f} clips/s   {8 * spent:5.1f} cores for 1 step/s of 8", flush=True)


def bench_metrics(frames: int = 25, size: int = 512) -> None:
    """Frames a second of what metrics.py computes itself."""
    import metrics

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gt = torch.rand(frames, 3, size, size, device=device)
    pred = (gt + 0.05 * torch.randn_like(gt)).clamp(0, 1)
    judges = {
        "psnr": lambda: metrics.psnr(pred, gt),
        "ssim": lambda: metrics.ssim(pred, gt),
        "ewarp, DIS": lambda: metrics.warping_errors(pred, metrics.dis_flow),
    }
    try:
        raft = metrics.RaftFlow.from_pretrained(device)
        judges["ewarp, RAFT"] = lambda: metrics.warping_errors(pred, raft)
    except metrics.Unavailable as error:
        print(error)
    print(f"{frames}x{size}x{size}, {machine()}")
    for name, judge in judges.items():
        with torch.no_grad():
            print(f"{name:12} {frames / seconds(judge, 1):8.1f} frames/s", flush=True)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors on "meta" would have held at once."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda x: self.born(x.untyped_storage()), result)
        return result

    def born(self, storage) -> None:
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key: int) -> None:
        self.now -= self.live.pop(key)


def bench_train(stage: int, backbone: str = "", frames: int = 25, size: int = 512) -> None:
    """One update at full size on a clip, at random weights: seconds and peak memory on a GPU; elsewhere its
    operations and an estimate of the memory, counted on shapes alone. The teacher is left out: a cache.
    """
    from diffusers import AutoencoderKL

    import train_stage1
    import train_stage2
    from discriminators import FeatureDiscriminator, PixelDiscriminator, convnext
    from metrics import DISTS
    from model import PRESETS, SCALE, AdcVSR, DecoderMidBlock
    from teacher import FeatureEncoder

    train = train_stage1 if stage == 1 else train_stage2
    on_gpu, cfg = torch.cuda.is_available(), train.Config()
    device, dtype = ("cuda", torch.float32) if on_gpu else ("meta", torch.bfloat16)
    with torch.device(device):
        student = AdcVSR(**PRESETS["full"])
        student.unet.checkpointing = True
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512], layers_per_block=2,
        )  # fmt: skip
        mid_block = DecoderMidBlock(256, student.config)
        encoder = FeatureEncoder(vae, torch.nn.Conv2d(4, 256, 3, padding=1), mid_block)
        discriminators = torch.nn.ModuleDict()
        if stage == 2:
            net = convnext(backbone, pretrained=False)
            discriminators["pixel"] = PixelDiscriminator(net, checkpointing=True)
            discriminators["feature"] = FeatureDiscriminator(student.unet, checkpointing=True)
    frozen, learned = (encoder, DISTS()), (student, discriminators)
    encoder, dists, student, discriminators = (net.to(device, dtype) for net in frozen + learned)

    clips = {k: torch.rand(1, frames, 3, size, size, device=device, dtype=dtype) for k in ("hr", "video")}
    clips["lr"] = clips["hr"][..., : size // SCALE, : size // SCALE]
    clips |= {"image": clips["hr"][:, :1], "random_images": clips["video"]}
    clips["order"] = torch.arange(frames)[None].flip(1)
    if on_gpu:  # as the train scripts place them
        student.to(memory_format=torch.channels_last)
        for d in discriminators.values():
            d.backbone.to(torch.bfloat16, memory_format=torch.channels_last)
    optimisers = [torch.optim.Adam([{"params": net.parameters()}], lr=1e-7) for net in learned]
    world = World(0, 1, torch.device("cuda" if on_gpu else "cpu"))

    def step() -> None:
        if stage == 1:
            train.train_step([clips], student, None, encoder, dists, optimisers[0], world, cfg)
        else:
            train.train_step([clips], student, None, encoder, dists, discriminators, optimisers, world, cfg)

    print(f"stage {stage}, one clip of {frames}x{size}x{size}, {machine()}")
    if on_gpu:
        print(f"{seconds(step, 3):.2f} s/step, peak {peak_memory():.1f} GB")
        return
    optimisers = [torch.optim.SGD([{"params": net.parameters()}], lr=0.0) for net in learned]
    tflop, attention = count_flops(step), F.scaled_dot_product_attention
    # Stands in for a GPU's fused attention, which keeps four tensors of this size and no table of all pairs.
    F.scaled_dot_product_attention = lambda q, k, v, **_: q * k * v
    with PeakMemory() as memory:
        step()
    F.scaled_dot_product_attention = attention
    trained = sum(p.numel() for net in learned for p in net.parameters())
    held = sum(x.numel() for net in frozen for x in (*net.parameters(), *net.buffers()))
    judges = sum(x.numel() for d in discriminators.values() for x in d.backbone.buffers())
    # Float32: weights, gradients and Adam's two moments, and what is frozen, but for the backbones.
    states = (16 * trained + 4 * held + 2 * judges) / 1e9
    print(f"{tflop:.1f} TFLOP; weights, gradients and Adam {states:.1f} GB, ", end="")
    print(f"activations at most {memory.peak / 1e9:.1f} GB, were all of them in bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=WORK)
    parser.add_argument("--videos", default="datasets/videos", help="for quality and data")
    parser.add_argument("--images", default="datasets/images", help="for quality, long and data")
    shipped = [str(ROOT / "weights" / "tiny")]
    parser.add_argument("--weights", nargs="+", default=shipped, help="for quality (several) and long")
    parser.add_argument("--picture", help="for quality: bicubic | students | HR, a PNG")
    parser.add_argument("--backbone", default=BACKBONE, help="for train2: D_pixel's ConvNeXt")
    args = parser.parse_args()
    work = {
        "quality": lambda: bench_quality(args.videos, args.images, args.weights, args.picture),
        "long": lambda: bench_long(args.images, args.weights[0]),
        "memory": bench_memory,
        "infer": bench_infer,
        "degrade": bench_degrade,
        "data": lambda: bench_data(args.videos, args.images),
        "metrics": bench_metrics,
        "train1": lambda: bench_train(1),
        "train2": lambda: bench_train(2, args.backbone),
    }
    work[args.what]()


if __name__ == "__main__":
    run(main)
