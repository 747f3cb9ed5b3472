"""The restorer of train_onestep.py: a velocity on the path from noise to a clip, and what judges it.

    LR clip --Space.condition--> cond.lr (b t h w n)
    eps --NaDiT, 64 Euler steps or one--> z_0 (b t h w n) --Space.decode--> SR clip
    HR clip --Space.encode--> z_0

SeedVR2 (arXiv 2506.05301) and DUO-VSR (2603.22271) share the restorer; APT's judge is the former's, the score
head the latter's. Two spaces: latents of SeedVR2's video VAE, and residual pixels for two CPU cores.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import imageio.v3 as imageio
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import seedvr2
from metrics import load_dover, psnr, strips
from model import SCALE, Student, bicubic, per_frame
from runtime import UserError, WeightsError, explained, freeze
from seedvr2 import LAST_STEP, NaDiT, VideoVAE
from training import newest_checkpoint
from video import to_clip, to_frames, to_network, to_uint8

TAPPED = (16, 26, 36)  # of 36 blocks: where APT's judge looks                      SeedVR2 Sec. 3.3
RESIDUAL = 0.16  # standard deviation of HR - bicubic(LR) in [-1, 1], measured on 24 clips

# ------------------------------------------------------------------------------------------------------
# The path: z_t = (1 - t) z_0 + t eps, on whose way v = eps - z_0


class Condition(NamedTuple):
    """What a velocity depends on beside z_t and t: LR in z's space, and the text, by its name."""

    lr: Tensor
    text: Literal["good", "none"] = "good"


Velocity = Callable[[Tensor, Tensor, Condition], Tensor]  # v(z_t (b ...), t (b) in [0, 1], cond) -> (b ...)


def per_clip(values: Tensor, z: Tensor) -> Tensor:
    """values (b) in z's shape, (b 1 1 ...)."""
    return values.view(-1, *[1] * (z.ndim - 1))


def noised(z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t of z_0, eps (b ...) and t (b): z_0 at 0, eps at 1."""
    t = per_clip(t, z0)
    return (1 - t) * z0 + t * eps


def sample(net: Velocity, eps: Tensor, cond: Condition, steps: int) -> Tensor:
    """From noise to z_0 in equal Euler steps."""
    z = eps
    for i in range(steps, 0, -1):
        z = z - net(z, torch.full((len(z),), i / steps, device=z.device), cond) / steps
    return z


def one_step(net: Velocity, eps: Tensor, cond: Condition) -> Tensor:
    """The whole path at once: eps - v(eps, 1)."""
    return sample(net, eps, cond, 1)


# ------------------------------------------------------------------------------------------------------
# Networks


class Denoiser(Student):  # for its folder of weights
    """v(z_t, t, cond) by NaDiT; z_t and cond.lr (b t h w n), t (b) in [0, 1]. size: a name of its presets.

    In place of prompts it has two embeddings that learn, of so many tokens.  # Choice: with one alone,
    guidance would have nothing to amplify.
    """

    TEXTS = ("good", "none")

    def __init__(self, size: str, tokens: Sequence[int] = (4, 4)):
        super().__init__()
        self.config = {"size": size, "tokens": list(tokens)}
        self.net = NaDiT(**seedvr2.PRESETS[size])
        self.texts = nn.Parameter(torch.randn(sum(tokens), seedvr2.PRESETS[size]["text"]))
        layers = len(self.net.blocks)
        # Choice: with fewer blocks than the 7B's, the same shares of the way.
        self.taps = [round(layers * i / TAPPED[-1]) for i in TAPPED]

    def forward(self, z: Tensor, t: Tensor, cond: Condition, taps: bool = False):
        """v (b t h w n) in float32; with taps also the tokens (b t h/2 w/2 c) after three of the blocks."""
        x = torch.cat([z, cond.lr, torch.ones_like(z[..., :1])], dim=-1)
        # One parameter for both, so that it has a gradient in every process, whatever text each has drawn.
        text = dict(zip(self.TEXTS, self.texts.split(self.config["tokens"])))[cond.text]
        with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda):
            answer = self.net(x, text, LAST_STEP * t, self.taps if taps else ())
        return (answer[0].float(), answer[1]) if taps else answer.float()

    @classmethod
    def from_seedvr(cls, folder: str | Path) -> "Denoiser":
        """SeedVR's many-step weights, `seedvr_ema_*`, and the embeddings of its two prompts, `pos_emb.pt` and
        `neg_emb.pt`, in the folder or beside it. Raises `WeightsError`."""
        folder, texts = Path(folder), []
        net = NaDiT.from_file(only_file(folder, "seedvr_ema_*"))
        for name in ("pos_emb.pt", "neg_emb.pt"):
            path = next((p / name for p in (folder, folder.absolute().parent) if (p / name).is_file()), None)
            way_out = "Put that of github.com/ByteDance-Seed/SeedVR there."
            with explained(f"{folder}: {name} is not in it or beside it, or damaged", way_out, WeightsError):
                texts.append(torch.load(path, map_location="cpu", weights_only=True).float())
        with torch.device("meta"):
            denoiser = cls("3b" if net.version == 2 else "7b", [len(text) for text in texts])
        state = {f"net.{name}": weights for name, weights in net.state_dict().items()}
        denoiser.load_state_dict(state | {"texts": torch.cat(texts)}, assign=True)
        return denoiser


def load_denoiser(place: str | Path) -> Denoiser:
    """Of a checkpoint, of a stage's folder (the newest) or of SeedVR's folder. Raises `UserError`."""
    folder = newest_checkpoint(place) or Path(place)
    if (folder / "model.safetensors").is_file():
        return Denoiser.from_pretrained(folder)
    if any(folder.glob("seedvr_ema_*")):
        return Denoiser.from_seedvr(folder)
    way_out = "Run the stage before, or name one with --init or --prior."
    raise UserError(f"{place}: neither a checkpoint nor SeedVR's weights. {way_out}")


def only_file(folder: Path, name: str) -> Path:
    """The first file with weights of this name in SeedVR's folder. Raises `WeightsError`."""
    found = sorted(path for path in folder.glob(name) if path.suffix in (".pth", ".safetensors"))
    if not found:
        raise WeightsError(f"{folder}: no {name} in it. Get ByteDance-Seed/SeedVR-3B from the hub.")
    return found[0]


class Query(nn.Module):
    """Attention of one learned query to all tokens of a clip: (b l c) -> (b c). APT Sec. 3.3."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.norm = nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, query = self.norm(tokens), self.query.expand(len(tokens), -1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]


class Judge(nn.Module):
    """APT's discriminator: a denoiser's three taps, a query each, side by side, normed, to one logit.

    It sees clean clips x under a step t that says nothing of them, since at t = 0 alone it collapses.
    """

    def __init__(self, backbone: Denoiser):
        super().__init__()
        self.backbone, width = backbone, backbone.net.txt_in.out_features
        self.queries = nn.ModuleList(Query(width, backbone.net.blocks[0].attn.heads) for _ in TAPPED)
        self.out = nn.Sequential(nn.RMSNorm(len(TAPPED) * width), nn.Linear(len(TAPPED) * width, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, list[Tensor]]:
        """x (b t h w n), t (b) -> logits (b) and the features before the queries, (b t h/2 w/2 c) each."""
        _, features = self.backbone(x, t, cond, taps=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            answers = [query(tokens.flatten(1, 3)) for query, tokens in zip(self.queries, features)]
            return self.out(torch.cat(answers, dim=-1))[:, 0].float(), features


class ScoreHead(nn.Module):
    """DUO-VSR's D: features of two score models (b t h w c), concatenated -> scores (b t h w).

    Choice: each tap normed; three convolutions, the middle one 3x3x3; DUO-VSR says "convolutional" alone.
    """

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        sizes = (channels, width, 1), (width, width, 3), (width, 1, 1)
        self.layers = nn.ModuleList(nn.Conv3d(a, b, k, padding=k // 2) for a, b, k in sizes)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat([F.rms_norm(tokens.float(), tokens.shape[-1:]) for tokens in features], dim=-1)
        x = rearrange(x, "b t h w c -> b c t h w")
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x).mean(dim=1)  # of the one channel


# ------------------------------------------------------------------------------------------------------
# Spaces: lr (b t 3 h w), hr (b t 3 4h 4w) in [-1, 1] to blur, which is cond.lr, and z_0 (b t' h' w' n); z and
# blur to a clip


class Pixels(nn.Module):
    """No VAE: z_0 is what HR adds to the bicubic x4 of LR, 4 x 4 pixels of it in each place of LR's grid."""

    MULTIPLE = 8  # of HR's sides: a token is 2 x 2 places

    def condition(self, lr: Tensor) -> Tensor:
        return self.fold(per_frame(bicubic, lr))

    def encode(self, hr: Tensor, lr: Tensor) -> Tensor:
        return self.fold(hr - per_frame(bicubic, lr)) / RESIDUAL

    def decode(self, z: Tensor, blur: Tensor) -> Tensor:
        pattern = "b t h w (c p q) -> b t c (h p) (w q)"
        return rearrange(blur + RESIDUAL * z, pattern, p=SCALE, q=SCALE)

    @staticmethod
    def fold(x: Tensor) -> Tensor:
        return rearrange(x, "b t c (h p) (w q) -> b t h w (c p q)", p=SCALE, q=SCALE)


class Latents(nn.Module):
    """Those of SeedVR2's frozen VAE: 4k + 1 frames to k + 1, sides to an eighth, 16 channels."""

    MULTIPLE = 16

    def __init__(self, vae: VideoVAE):
        super().__init__()
        self.vae = freeze(vae)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype) -> "Latents":
        return cls(VideoVAE.from_file(only_file(Path(folder), "ema_vae*"), dtype))

    def condition(self, lr: Tensor) -> Tensor:
        """Bicubic with antialiasing, as for SeedVR2. Choice: without the little noise that SeedVR adds."""
        size = [SCALE * side for side in lr.shape[3:]]
        x = F.interpolate(lr.flatten(0, 1), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.encode(x.unflatten(0, lr.shape[:2]), lr)

    def encode(self, hr: Tensor, lr: Tensor) -> Tensor:
        """A sample of the posterior, by PyTorch's own generator."""
        z = self.vae.encode(hr, torch.default_generator)
        return rearrange(z.float(), "b t c h w -> b t h w c")

    def decode(self, z: Tensor, blur: Tensor) -> Tensor:
        return self.vae.decode(rearrange(z, "b t h w c -> b t c h w")).float()


def load_space(seedvr: str, device: torch.device) -> Pixels | Latents:
    """Of the VAE in SeedVR's folder, or pixels where none is named."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Latents.from_folder(seedvr, dtype).to(device) if seedvr else Pixels()


@torch.no_grad()
def to_latents(clips: dict[str, Tensor], space: nn.Module, no_text: float = 0.0) -> tuple[Tensor, Condition]:
    """lr, hr in [-1, 1] -> z_0 and what its velocity depends on. no_text: share of calls without text, where
    HR is blurred.  # Choice: it stands for SeedVR's negative prompt, and guidance away from it sharpens.
    """
    hr, text = clips["hr"], "good"
    if torch.rand(()) < no_text:
        sigma, text = 1 + 2 * torch.rand(()).item(), "none"  # pixels
        hr = gaussian_blur(hr.flatten(0, 1), 2 * round(2 * sigma) + 1, sigma).unflatten(0, hr.shape[:2])
    return space.encode(hr, clips["lr"]), Condition(space.condition(clips["lr"]), text)


class Restorer(nn.Module):
    """lr (b t 3 h w) -> (b t 3 4h 4w), both in [-1, 1]: so many steps from noise of a seed."""

    def __init__(self, net: nn.Module, space: nn.Module, steps: int, seed: int = 0):
        super().__init__()
        self.net, self.space, self.steps, self.seed = net, space, steps, seed

    @torch.no_grad()
    def forward(self, lr: Tensor) -> Tensor:
        cond = Condition(self.space.condition(lr))
        eps = torch.randn(cond.lr.shape, generator=torch.Generator().manual_seed(self.seed))
        return self.space.decode(sample(self.net, eps.to(cond.lr), cond, self.steps), cond.lr)


# ------------------------------------------------------------------------------------------------------
# What tells restorers apart


def gradient_energy(clip: Tensor) -> Tensor:
    """Mean squared difference between neighbouring pixels: clip (b t 3 h w) -> (b)."""
    down, across = clip.diff(dim=-2).square(), clip.diff(dim=-1).square()
    return (down.flatten(1).mean(1) + across.flatten(1).mean(1)) / 2


def patch_distance(sr: Tensor, hr: Tensor, side: int = 8, count: int = 2000) -> Tensor:
    """Energy distance between the patches of two clips (t 3 h w), wherever they lie, their means removed:
    2 E|s - h| - E|s - s'| - E|h - h'| as a share of E|h - h'|. Returns (); about 0 for equal clips."""

    def patches(clip: Tensor) -> Tensor:
        x = rearrange(F.unfold(clip, side, stride=side // 2), "t c n -> (t n) c")
        picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
        return x[picked] - x[picked].mean(1, keepdim=True)

    s, h = patches(sr), patches(hr)
    between, among_s, among_h = (torch.cdist(a, b).mean() for a, b in ((s, h), (s, s), (h, h)))
    return (2 * between - among_s - among_h) / among_h


def ranking(name: str, space: nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """Which of several candidates z is the best: (z, z_0, cond) -> (b), higher is better.

    name: "gradient", whose energy is nearest to HR's (Choice: what is there offline), or a checkout of DOVER.
    """
    if name == "gradient":

        def score(z: Tensor, z0: Tensor, cond: Condition) -> Tensor:
            ours, theirs = (gradient_energy(space.decode(x, cond.lr)) for x in (z, z0))
            return -(ours / theirs).log().abs()

        return score
    dover = load_dover(Path(name), device.type)

    def fused(z: Tensor, z0: Tensor, cond: Condition) -> Tensor:
        clips = to_uint8(space.decode(z, cond.lr))
        return torch.tensor([dover(to_frames(clip)) for clip in clips], device=z.device)

    return fused


def compare(out: str, stages: Sequence[str], many: int, space: nn.Module, held_out, device) -> str:
    """A table of the stages in the folder `out`, means over held-out clips, and in `out/table` a picture of
    each clip: bicubic | those of the table | HR. Many steps of the last stage that has them are the teacher.
    """
    if not newest_checkpoint(f"{out}/base"):
        raise UserError(f"{out}: no stage is in it yet. Begin with --stage base.")
    restorers, walks, folder = {}, {"base": (many, 1), "guide": (many, 1)}, Path(out) / "table"
    for stage in (stage for stage in stages if newest_checkpoint(f"{out}/{stage}")):
        net = load_denoiser(f"{out}/{stage}").to(device)
        restorers |= {(stage, steps): Restorer(net, space, steps) for steps in walks.get(stage, (1,))}
    teacher = [key for key in restorers if key[1] > 1][-1]
    shown, rows = {("bicubic", 0): bicubic} | restorers, defaultdict(list)
    folder.mkdir(parents=True, exist_ok=True)
    for name, hr, lr in held_out:
        lr, hr, made = to_network(to_clip(lr).to(device)), to_clip(hr).to(device) / 255.0, {}
        for key, restore in shown.items():
            start = perf_counter()
            sr = to_uint8(restore(lr) if restore is bicubic else restore(lr[None])[0]) / 255.0
            made[key] = sr, perf_counter() - start
        for key, (sr, seconds) in made.items():
            energy = (gradient_energy(sr[None]) / gradient_energy(hr[None])).item()
            error = (sr - made[teacher][0]).square().mean().item()
            scores = energy, patch_distance(sr, hr).item(), psnr(sr, hr).mean().item(), error, seconds
            rows[key].append(scores)
        picture = strips([*(to_uint8(2 * sr - 1) for sr, _ in made.values()), to_uint8(2 * hr - 1)])
        imageio.imwrite(folder / f"{name}.png", to_frames(picture[None])[0])
    head = "| stage | steps | gradient energy | patch distance | PSNR to HR | to the teacher | s a clip |"
    lines = [head, "|---" * 7 + "|"]
    for (stage, steps), row in rows.items():
        energy, far, to_hr, error, seconds = (sum(column) / len(row) for column in zip(*row))
        to_teacher = f"{-10 * math.log10(error):.2f}" if error else "teacher"
        numbers = f"{energy:.2f} | {far:.3f} | {to_hr:.2f} | {to_teacher} | {seconds:.2f}"
        lines.append(f"| {stage} | {steps or ''} | {numbers} |")
    return "\n".join(lines)
