"""The paper's nine metrics and a picture of time (Sec. 4.1, Tab. 1).

prediction, ground truth --video.py--> frames in step --> PSNR, SSIM, LPIPS, DISTS    against the ground truth
                                                      --> MANIQA, CLIPIQA, MUSIQ      each frame alone
                                                      --> E*_warp: flow, mask, warp   neighbouring frames
                                                      --> DOVER                       the whole clip
Averaged over the frames of a clip, then over clips, unweighted. PSNR and SSIM are written out here, DISTS in
perceptual.py, E*_warp in warping.py; the others are their packages', imported when asked for, never required.
`validate` is what training asks at each checkpoint; `detail` is ours, for what a blurred clip lacks.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Annotated, Literal

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import pack, rearrange, repeat, unpack
from torch import Tensor
from tyro.conf import FlagCreatePairsOff, Positional, arg

from model import SCALE, bicubic
from perceptual import DISTS
from runtime import Unavailable, UserError, complete, explained, needs, optional, run
from video import (
    PROTOCOL_FRAMES,
    VIDEO_SUFFIXES,
    VideoReader,
    centre,
    to_clip,
    to_frames,
    to_network,
    to_uint8,
    to_unit,
)
from warping import FLOWS, dis_flow, load_raft, raft_flow, warping_errors

# ---- PSNR and SSIM ----------------------------------------------------------------------------------------

LUMA = {  # weights of R, G, B and the offset, for values in [0, 1]
    "yiq": ((0.299, 0.587, 0.114), 0.0),
    "ycbcr": ((65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255),  # BT.601, studio range
}
PYIQA_EPS = 1e-8  # pyiqa adds it to the mean squared error: its PSNR ends at 80 dB


def to_color(frames: Tensor, color: str) -> Tensor:
    """Frames (... 3 h w), uint8 or float in [0, 1], as float in [0, 1]: "rgb", or the luma (... 1 h w)."""
    frames = to_unit(frames)
    if color == "rgb":
        return frames
    weights, offset = LUMA[color]
    return torch.einsum("... c h w, c -> ... h w", frames, frames.new_tensor(weights)).unsqueeze(-3) + offset


def psnr(pred: Tensor, gt: Tensor, color: str = "rgb", eps: float = 0.0) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, infinite for equal frames (80 with PYIQA_EPS).

    pred, gt (... 3 h w), uint8 or float in [0, 1]. Returns (...). `color` rgb, or the luma yiq or ycbcr.
    """
    error = to_color(pred, color) - to_color(gt, color)
    return -10 * torch.log10(error.square().mean((-3, -2, -1)) + eps)


def blur(x: Tensor) -> Tensor:
    """SSIM's Gaussian window, 11x11 of sigma 1.5, over (... h w) -> (... h-10 w-10)."""
    gauss = x.new_tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)])
    images, lead = pack([x], "* h w")
    for window in (gauss.view(1, 1, 11, 1), gauss.view(1, 1, 1, 11)):  # separable
        images = F.conv2d(images.unsqueeze(1), window / gauss.sum()).squeeze(1)
    return unpack(images, lead, "* h w")[0]


def ssim(pred: Tensor, gt: Tensor, color: str = "yiq") -> Tensor:
    """Structural similarity of each frame (Wang et al., 2004), in every detail pyiqa's default.

    pred, gt (... 3 h w), uint8 or float in [0, 1], at least 11x11. Returns (...) float64, at most 1. `color`
    rgb (mean over channels), yiq or ycbcr. Values rounded to 0..255, contrast term not below 0.
    """
    x, y = ((255 * to_color(frames, color).double()).round() for frames in (pred, gt))
    if min(x.shape[-2:]) < 11:
        raise UserError(f"SSIM needs frames of at least 11x11, these are {x.shape[-1]}x{x.shape[-2]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * contrast.clamp(min=0)).mean((-3, -2, -1))


# ---- Detail -----------------------------------------------------------------------------------------------


def high_frequencies(clip: Tensor) -> Tensor:
    """What LR has no room for: luma's spectrum (t n) above 1/8 cycle a pixel; clip (t 3 h w)."""
    luma = to_color(clip, "yiq")[:, 0].double()
    h, w = luma.shape[-2:]
    window = torch.outer(torch.hann_window(h), torch.hann_window(w)).to(luma)  # a frame's ends do not meet
    spectrum = torch.fft.rfft2((luma - luma.mean((1, 2), keepdim=True)) * window)
    return spectrum[:, torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)) > 0.5 / SCALE]


def detail(pred: Tensor, gt: Tensor) -> Tensor:
    """Energy of a clip's high frequencies as a share of the ground truth's, invented ones and noise included;
    pred, gt (t 3 h w), uint8 or float in [0, 1]. Returns ()."""
    pred, gt = (high_frequencies(clip).abs().square().sum() for clip in (pred, gt))
    return pred / gt


# ---- The packages' metrics --------------------------------------------------------------------------------

PYIQA = {  # pyiqa's name of the metric, and the weights file it looks for in torch's hub folder
    "lpips": ("lpips", "pyiqa/LPIPS_v0.1_alex-df73285e.pth"),
    "maniqa": ("maniqa-pipal", "pyiqa/MANIQA_PIPAL-ae6d356b.pth"),  # Choice: AdcSR's; the paper is silent
    "clipiqa": ("clipiqa", "clip/RN50.pt"),
    "musiq": ("musiq", "pyiqa/musiq_koniq_ckpt-e95806b9.pth"),
}


def load_pyiqa(name: str, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric of pyiqa on frames pred, gt (n 3 h w) in [0, 1] -> (n,); all but LPIPS look at pred alone."""
    key, weights = PYIQA[name]
    with needs(name.upper(), "pyiqa (its licence is for non-commercial use only)", weights):
        metric = optional("pyiqa").create_metric(key, device=torch.device(device))
    return lambda pred, gt: (metric(pred, gt) if name == "lpips" else metric(pred)).flatten()


SEEDED = (  # DOVER draws its fragments and start frames at random
    "import random, runpy, numpy, torch; random.seed(0); numpy.random.seed(0); torch.manual_seed(0); "
    "runpy.run_path('evaluate_one_video.py', run_name='__main__')"
)


def load_dover(checkout: Path, device: str) -> Callable[[Iterable[np.ndarray]], float]:
    """DOVER's fused score in (0, 1), by the script of a checkout of github.com/VQAssessment/DOVER."""
    script = checkout / "evaluate_one_video.py"
    for file in (script, checkout / "pretrained_weights/DOVER.pth"):
        if not file.is_file():
            way_out = "--dover PATH, a checkout of github.com/VQAssessment/DOVER with its weights"
            raise Unavailable(f"DOVER not computed: no {file}; try {way_out}")

    def score(frames: Iterable[np.ndarray]) -> float:
        """Of frames (h w 3) uint8, which reach the script as lossless H.264; nan where it fails."""
        import av

        with tempfile.TemporaryDirectory() as folder:
            clip = Path(folder) / "clip.mp4"
            with av.open(str(clip), "w") as file:
                stream = file.add_stream("libx264rgb", rate=24, options={"crf": "0", "preset": "ultrafast"})
                stream.pix_fmt = "rgb24"
                for n, rgb in enumerate(frames):
                    if n == 0:
                        stream.height, stream.width = rgb.shape[:2]
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb))))
                file.mux(stream.encode())
            command = [sys.executable, "-c", SEEDED, "-v", str(clip), "-f", "-d", device]
            done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        scores = [line.split()[-1] for line in done.stdout.splitlines() if "fused overall score" in line]
        if scores and not done.returncode:
            return float(scores[-1])
        reason = (done.stderr.strip().splitlines() or ["it printed no fused overall score"])[-1]
        print(f"DOVER not computed: {script}: {reason}", file=sys.stderr)
        return math.nan

    return score


# ---- The picture of time ----------------------------------------------------------------------------------

PROFILE_FRAMES = 500  # of a longer clip, the first so many are drawn


def row_over_time(clip: Tensor) -> Tensor:
    """The temporal profile: the middle row of pixels of every frame, time downwards.

    clip (t 3 h w), any range. Returns (3 t w): steady detail draws straight streaks, flicker ragged ones.
    """
    return rearrange(clip[..., clip.shape[-2] // 2, :], "t c w -> c t w")


def profile_picture(frames: Iterable[dict[str, np.ndarray]]) -> np.ndarray:
    """The same of each side, one above the other at one width, each under its name: (h w 3) uint8 RGB.

    frames as of `in_step`.
    """
    import cv2

    profiles: dict[str, list[np.ndarray]] = {}
    for sides in islice(frames, PROFILE_FRAMES):
        for name, rgb in sides.items():
            profiles.setdefault(name, []).append(rgb[len(rgb) // 2].copy())  # a view would keep its frame
    width, panels = max(len(rows[0]) for rows in profiles.values()), []
    for name, rows in profiles.items():
        label = np.full((18, width, 3), 255, np.uint8)
        cv2.putText(label, name, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        size = width, len(rows) * max(1, 120 // len(rows))  # 25 rows alone are too thin a strip to see
        panels += [label, cv2.resize(np.stack(rows), size, interpolation=cv2.INTER_NEAREST)]
    return np.concatenate(panels)


def strips(sides: Iterable[Tensor]) -> Tensor:
    """Clips (t 3 h w) side by side, each its middle frame above its middle row over time: (3 h+3t n*w)."""
    columns = []
    for side in sides:
        over_time = repeat(row_over_time(side), "c t w -> c (t n) w", n=3)
        columns.append(torch.cat([side[len(side) // 2], over_time], dim=-2))
    return torch.cat(columns, dim=-1)


# ---- Validation while training ----------------------------------------------------------------------------


@torch.no_grad()
def validate(student, teacher, held_out: Iterable, folder: Path, step: int) -> dict[str, float]:
    """How good the student is on clips it never learns from, and a picture of each, `folder/name_step.png`:
    LR bicubic | student | teacher | HR, the middle frame above its middle row over time.

    student, teacher: lr (b t 3 h w) -> (b t 3 4h 4w), both in [-1, 1]; teacher may be None.
    held_out: (name, hr (t 4h 4w 3), lr (t h w 3)), uint8. Returns the clips' means: psnr and psnr_bicubic in
    dB, ssim, detail, and, of more than one frame, ewarp (corrected, with DIS).
    """
    device, rows = next(student.parameters()).device, []
    folder.mkdir(parents=True, exist_ok=True)
    for name, hr, lr in held_out:
        lr, hr = to_network(to_clip(lr).to(device)), to_clip(hr).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            x_s = student(lr[None])[0]
        x_t = [teacher(lr[None])[0]] if teacher else []
        smooth, sr, *target = map(to_uint8, (bicubic(lr), x_s, *x_t))
        scores = {"psnr": psnr(sr, hr), "psnr_bicubic": psnr(smooth, hr), "ssim": ssim(sr, hr)}
        scores["detail"] = detail(sr, hr)
        if len(sr) > 1:
            scores["ewarp"] = warping_errors(sr, dis_flow)
        rows.append({score: values.mean().item() for score, values in scores.items()})
        picture = strips((smooth, sr, *target, hr))
        imageio.imwrite(folder / f"{name}_{step:06d}.png", to_frames(picture[None])[0])
    return {score: sum(row[score] for row in rows) / len(rows) for score in rows[0]}


# ---- Clips in pairs, frames in step -----------------------------------------------------------------------

Sides = dict[str, Path]  # "input" and "ground truth" where given, and "prediction"
LAYOUT = {"input": ("LQ", "LQ-Video"), "prediction": (), "ground truth": ("GT", "GT-Video")}  # DOVE's folders
BESIDE = ("_x4_compare", ".parts")  # what infer.py puts beside its results, and no prediction


def find_clips(path: Path, folders: tuple[str, ...]) -> dict[str, Path]:
    """Clips by name: one video, image or folder of frames, or a folder of those, or one of its `folders`."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    path = next((path / folder for folder in folders if (path / folder).is_dir()), path.resolve())
    inside = sorted(p for p in path.iterdir() if p.name[0] != ".") if path.is_dir() else []
    found = [p for p in inside if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    stems = {p: p.name if p.is_dir() else p.stem for p in found or [path]}
    stems = {p: stem for p, stem in stems.items() if p == path or not stem.endswith(BESIDE)}
    clips = {stem.removesuffix("_x4"): p for p, stem in stems.items()}  # infer.py's suffix
    if twice := set(stems) - set(clips.values()):
        raise UserError(f"{twice.pop()}: a second clip of that name; keep one of them")
    return clips


def pair_clips(paths: Sides) -> dict[str, Sides]:
    """Clips by name, each with its sides. Two clips that the user named pair whatever their names."""
    found = {side: find_clips(path, LAYOUT[side]) for side, path in paths.items()}
    alone = {side for side, clips in found.items() if list(clips.values()) == [paths[side].resolve()]}
    names = list(found["prediction"])
    for side, clips in found.items():
        if {"prediction", side} <= alone:
            found[side] = clips = dict(zip(names, clips.values()))
        if missing := ", ".join(name for name in names if name not in clips):
            raise UserError(f"predictions without {side} in {paths[side]}: {missing}")
        if idle := ", ".join(name for name in clips if name not in names):
            print(f"note: {paths[side]} has clips without prediction: {idle}")
    return {name: {side: clips[name] for side, clips in found.items()} for name in names}


def same_scene(sizes: dict[str, tuple[int, int]], protocol: str | None) -> dict[str, tuple[slice, slice]]:
    """Rows and columns of each side, of sizes (h, w), that show the same scene; UserError where none do.

    By the paper's protocol infer.py cut the input's centre, so the rest is cut here at the matching offsets.
    """
    cut = {side: (slice(0, h), slice(0, w)) for side, (h, w) in sizes.items()}
    (h, w), gt, lr = sizes["prediction"], sizes.get("ground truth"), sizes.get("input")
    if protocol and lr:  # stored at HR size in RealVSR and MVSR4x
        cut["input"] = centre(lr, (h, w) if lr == gt else (h // SCALE, w // SCALE))
    if protocol and gt and gt[0] >= h and gt[1] >= w:
        cut["ground truth"] = centre(gt, (h, w), 1 if lr == gt else SCALE)
    elif gt and gt != (h, w):
        raise UserError(f"prediction {w}x{h}, ground truth {gt[1]}x{gt[0]}: sizes differ; fix the output")
    return cut


def in_step(sides: Sides, protocol: str | None, notes: set[str]) -> Iterator[dict[str, np.ndarray]]:
    """Frames (h w 3) uint8 of all sides at one time, as a stream; UserError where one side ends early.

    notes: what was found about the files, for the user.
    """
    with ExitStack() as stack:
        readers = {side: stack.enter_context(VideoReader(path)) for side, path in sides.items()}
        cut = same_scene({side: (r.height, r.width) for side, r in readers.items()}, protocol)
        limit = PROTOCOL_FRAMES if protocol else None
        streams = {side: islice(reader, limit) for side, reader in readers.items()}
        for n, together in enumerate(zip_longest(*streams.values())):
            frames = dict(zip(streams, together))
            if ended := [side for side, frame in frames.items() if frame is None]:
                lengths = {s: n + (s not in ended) + sum(1 for _ in stream) for s, stream in streams.items()}
                found = ", ".join(f"{side} {length} frames" for side, length in lengths.items())
                raise UserError(f"{found}: lengths differ; fix the output")
            yield {side: frame.rgb[cut[side]] for side, frame in frames.items()}
        for side, reader in readers.items():
            notes |= {f"note: {side} {reader.name}: {note}" for note in reader.notes}


REACH = SCALE  # pixels that a ground truth is moved about: one of LR, beyond which data are no pairs
WORTH = 0.1  # dB; a smaller gain may be chance


def best_shift(frames: Iterable[dict[str, np.ndarray]]) -> tuple[int, int, float]:
    """The whole pixels (dx, dy) by which all of a clip's ground truth lies beside its prediction, and the dB
    of PSNR (on luma) that this costs; frames as of `in_step`. A blurred prediction is no shifted one."""
    errors = 0.0
    for frame in frames:
        pair = (to_clip([frame[side]]) for side in ("prediction", "ground truth"))
        pred, gt = (to_color(one, "yiq")[0, 0] for one in pair)
        h, w = (size - 2 * REACH for size in pred.shape)
        moved = gt.unfold(0, h, 1).unfold(1, w, 1)  # (dy dx h w), a view
        errors = errors + (moved - pred[REACH:-REACH, REACH:-REACH]).square().mean((-2, -1))
    dy, dx = (place - REACH for place in divmod(int(errors.argmin()), errors.shape[1]))
    return dx, dy, 10 * torch.log10(errors[REACH, REACH] / errors.min()).item()


# ---- Scores -----------------------------------------------------------------------------------------------

METRICS = {  # Paper: Tab. 1, its columns: (needs a ground truth, decimals)
    "psnr": (True, 2), "ssim": (True, 4), "lpips": (True, 4), "dists": (True, 4),
    "maniqa": (False, 4), "clipiqa": (False, 4), "musiq": (False, 2),
    "ewarp": (False, 2), "dover": (False, 4),
}  # fmt: skip
BATCH_PIXELS = 8 * 512 * 512  # of the prediction, at once on the device


def load_judge(name: str, args: "Args", device: str) -> Callable:
    """The function behind a metric; `Unavailable` where it cannot be had."""
    if name == "psnr":
        return partial(psnr, color=args.colors[name], eps=PYIQA_EPS if args.protocol else 0.0)
    if name == "ssim":
        return partial(ssim, color=args.colors[name])
    if name == "dists":
        return DISTS.from_pretrained().to(device)
    if name == "ewarp":
        flow = dis_flow
        if args.flow == "raft":
            flow = partial(raft_flow, network=load_raft().to(device), literal=bool(args.protocol))
        return partial(warping_errors, flow=flow, convention=args.convention)
    return load_dover(args.dover, device) if name == "dover" else load_pyiqa(name, device)


def batches(frames: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, Tensor]]:
    """Of every side a stretch of the clip (t 3 h w) uint8, as long as fits on the device."""
    first = next(frames)
    size, frames = max(1, BATCH_PIXELS * 3 // first["prediction"].size), chain([first], frames)
    while batch := list(islice(frames, size)):
        yield {side: to_clip([frame[side] for frame in batch]) for side in first}


@torch.no_grad()
def score_clip(stream: Callable, judges: dict[str, Callable], device: str) -> dict:
    """Frames, size and each metric's mean of the clip that `stream()` plays."""
    n, last, totals = 0, None, dict.fromkeys(judges, 0.0)
    for clips in batches(stream()):
        pred = to_unit(clips["prediction"].to(device))
        gt = to_unit(clips["ground truth"].to(device)) if "ground truth" in clips else None
        linked = pred if last is None else torch.cat([last, pred])  # the pair across two batches counts too
        for name in judges.keys() - {"ewarp", "dover"}:
            totals[name] += judges[name](pred, gt).sum().item()
        if "ewarp" in judges and len(linked) > 1:
            totals["ewarp"] += judges["ewarp"](linked).sum().item()
        n, last = n + len(pred), pred[-1:]
    if "ewarp" in judges and n < 2:
        raise UserError("one frame, and E*_warp needs two; leave ewarp out of --metrics")
    row = {"frames": n, "size": f"{pred.shape[-1]}x{pred.shape[-2]}"}
    row |= {name: total / (n - 1 if name == "ewarp" else n) for name, total in totals.items()}
    if "dover" in judges:
        row["dover"] = judges["dover"](frame["prediction"] for frame in stream())
    return row


# ---- Command line -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    pred: Annotated[Positional[Path], arg(metavar="PRED")]  # a video or image, a folder of frames or clips
    gt: Annotated[Positional[Path | None], arg(metavar="GT")] = None  # ground truth, the same, paired by name
    input: Path | None = None  # the network's input, drawn by --profile
    metrics: str | None = None  # some of Table 1, as psnr,dover, or all (psnr,ssim,ewarp; without GT ewarp)
    color: Literal["rgb", "yiq", "ycbcr"] | None = None  # of PSNR (default rgb) and SSIM (default yiq)
    flow: Literal["raft", "dis"] = "raft"  # optical flow of E*_warp
    protocol: Literal["adcvsr"] | None = None  # the paper's: 25 frames, 512x512, EvalCrafter's E*_warp
    dover: Path = Path("DOVER")  # checkout of DOVER's repository
    profile: bool = False  # draw the middle row over time, NAME_profile.png beside PRED
    json: Path | None = None  # write settings, clips and means here

    @property
    def colors(self) -> dict[str, str]:
        return {"psnr": self.color or "rgb", "ssim": self.color or "yiq"}

    @property
    def convention(self) -> str:
        return "evalcrafter" if self.protocol else "corrected"


def parse(argv: list[str] | None = None) -> Args:
    description = __doc__.splitlines()[0]
    return tyro.cli(Args, args=argv, description=description, config=(FlagCreatePairsOff,))


def chosen(asked: str | None, has_gt: bool) -> list[str]:
    """The metrics to compute, in the paper's order; UserError for one unknown or lacking ground truth."""
    possible = [name for name, (needs_gt, _) in METRICS.items() if has_gt or not needs_gt]
    names = possible if asked == "all" else (asked or ("psnr,ssim,ewarp" if has_gt else "ewarp")).split(",")
    for name in names:
        if name not in possible:
            reason = "needs a ground truth; give GT" if name in METRICS else "no such metric"
            raise UserError(f"--metrics {name}: {reason}, or choose from {','.join(possible)}")
    return [name for name in METRICS if name in names]


def table_line(row: dict, names: Iterable[str]) -> str:
    values = "".join(f"{row[name]:9.{METRICS[name][1]}f}" for name in names)
    return f"{row['name'][-28:]:28} {row.get('frames', ''):6} {row.get('size', ''):>9}{values}"


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """`complete`, with what fails in one line."""
    with explained(f"{path}: cannot be written", "Choose another place.", causes=OSError):
        with complete(path) as part:
            yield part


def write_json(result: dict, path: Path) -> None:
    """JSON knows neither inf (PSNR of equal clips) nor nan (DOVER failed): they go as strings."""
    words = {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}
    result = json.loads(json.dumps(result), parse_constant=words.get)
    with written(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def naming(clip: str) -> Iterator[None]:
    """Errors about one clip begin with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{clip}: {error}") from error


def evaluate(args: Args) -> dict:
    """Check everything, then score and print clip by clip. Returns what --json holds."""
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"{args.json}: there is no folder {args.json.parent}; create it first")
    names = chosen(args.metrics, args.gt is not None)
    paths = {"input": args.input, "prediction": args.pred, "ground truth": args.gt}
    pairs = pair_clips({side: path for side, path in paths.items() if path})
    for name, sides in pairs.items():
        with naming(name):  # what cannot be read or paired stops the run before the work
            next(in_step(sides, args.protocol, set()))
    device, judges, missing = "cuda" if torch.cuda.is_available() else "cpu", {}, []
    for name in names:
        try:
            judges[name] = load_judge(name, args, device)
        except Unavailable as error:
            missing.append(str(error))
    if not judges:
        raise UserError("; ".join(missing))
    for line in missing:
        print(line, file=sys.stderr)

    print(f"{args.pred} against {args.gt or 'no ground truth'}: clips {len(pairs)}, protocol {args.protocol}")
    if args.gt:
        print("PSNR on {psnr}, SSIM on {ssim}".format(**args.colors))
    if "ewarp" in judges:
        print(f"E*_warp x 1000, convention {args.convention}, flow {FLOWS[args.flow]}")
    print(f"{'clip':28} {'frames':>6} {'size':>9}" + "".join(f"{name:>9}" for name in judges))
    rows = []
    for name, sides in pairs.items():
        notes: set[str] = set()
        stream = partial(in_step, sides, args.protocol, notes)
        with naming(name):
            rows.append({"name": name} | score_clip(stream, judges, device))
        print(table_line(rows[-1], judges), flush=True)
        if args.profile:
            with written(sides["prediction"].with_name(f"{name}_profile.png")) as part:
                imageio.imwrite(part, profile_picture(stream()))
        if args.protocol and args.gt:
            dx, dy, gain = best_shift(stream())
            if gain > WORTH:
                lies = f"the ground truth lies {dx} pixels right of the prediction and {dy} below it"
                notes.add(f"note: {name}: {lies}, which costs {gain:.1f} dB; it was scored as it is")
        for note in sorted(notes):
            print(note)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in judges}
    print(table_line({"name": "mean"} | mean, judges))
    settings = {"protocol": args.protocol, "color": args.colors}
    settings |= {"convention": args.convention, "flow": FLOWS[args.flow]}
    return {"settings": settings, "clips": rows, "mean": mean, "not_computed": missing}


def main() -> None:
    args = parse()
    result = evaluate(args)
    if args.json:
        write_json(result, args.json)


if __name__ == "__main__":
    run(main)
