"""Dual-head discriminators: detail and consistency, judged apart (paper Sec. 3.3, Fig. 2 b, Eq. 2-5).

    pixels x    (b t 3 H W) -> frozen ConvNeXt, frame by frame: `look` -> conv 1x1 ----------------+
    features f  (b t c h w) -> conv 3x3 -> frozen UNet of stage 1, temporal blocks included -------+
                                                                                                   v
              scores of detail (b t 192 h w) <-- 1x1 --+-- conv 2D <-- conv 1D over time <-- conv 2D
         scores of consistency (b t  64 h w) <-- 1x1 --+                                      (`Tail`)

A score above 0 says real, below 0 fake. Each head learns from five types of clip, labelled so that detail and
consistency vary independently: neither can be bought with the other.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import huggingface_hub
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from model import UNSHUFFLE, AdcVSR, TemporalConv, UNet, frames, maybe_checkpoint, pad_to_multiple, per_frame
from perceptual import efficientnet_lite
from runtime import explained, freeze

# ------------------------------------------------------------------------------------------------------
# Eq. 4 and 5


class Scores(NamedTuple):
    """What the two heads say of a clip at each place of each frame, real > 0 > fake."""

    detail: Tensor  # (b t n h w), n = the head's channels, 0 where there is no such head
    consistency: Tensor


# Paper: Eq. 5. What the two heads should say of each type of clip: +1 real, -1 fake, 0 not asked.
LABELS = {
    #               (detail, consistency)
    "student":        (-1, -1),  # what the student makes
    "video":          ( 0, +1),  # its details are no model: most real videos are less sharp than photos
    "shuffled_video": ( 0, -1),  # the same frames in random order
    "image":          (+1, +1),  # one photo, repeated: a still clip
    "random_images":  (+1, -1),  # photos that have nothing to do with each other
}  # fmt: skip


@torch.no_grad()
def five_clips(student: Tensor, see: Callable, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """The clips of Eq. 5 in the domain that `see` opens, each (b t c h w), keyed as `LABELS`.

    student: the student's clip as it was seen in its own step; see: the frozen network that comes first,
    frame by frame (ConvNeXt for pixels, the VAE's encoder for features), so that a shuffled clip need not be
    seen again; clips: video, random_images (b t 3 H W), image (b 1 3 H W), order (b t) of shuffled frames.
    """
    video, image = see(clips["video"]), see(clips["image"])
    return {
        "student": student.detach(),
        "video": video,
        "shuffled_video": torch.stack([v[i] for v, i in zip(video, clips["order"], strict=True)]),
        "image": repeat(image, "b 1 ... -> b t ...", t=video.shape[1]),
        "random_images": see(clips["random_images"]),
    }


# Choice: the paper gives no reduction. Eq. 4 is printed as a sum of two terms, one a head: each is the mean
# over its own head here, so that both learn alike. Eq. 2 and 3 print Softplus(-D) of the whole output: one
# mean over all channels, so that the student hears the heads as they are wide, 192 : 64, as Table 6 varies.


def discriminator_loss(scores: Scores, label: tuple[int, int]) -> Tensor:
    """One summand of Eq. 4: Softplus(-y D) of each head, y = (detail, consistency); y = 0 asks nothing."""
    heads = [(score.float(), y) for score, y in zip(scores, label) if y and score.numel()]
    return sum(F.softplus(-y * score).mean() for score, y in heads)  # Paper: Eq. 4


def adversarial_loss(scores: Scores) -> Tensor:
    """Softplus(-D): the student wants to be called real. Paper: Eq. 2, 3."""
    return F.softplus(-torch.cat(scores, dim=2).float()).mean()


# ------------------------------------------------------------------------------------------------------
# Each table of labels that the paper compares

LABEL_TABLES = {
    "full": LABELS,
    # Paper: Table 3. Choice: one question, "is this a real clip?", for all channels; two heads with the same
    # labels are one. Real is what neither head calls fake, so the clips stay those of the full table.
    "single": {name: (-1, -1) if -1 in label else (+1, +1) for name, label in LABELS.items()},
    # Paper: Table 7, "No Types 3 & 5".
    "three_types": {name: LABELS[name] for name in ("student", "video", "image")},
    # Paper: Table 7, "Real Videos as Detail-Real".
    "detailed_video": LABELS | {"video": (+1, +1)},
}


def asked(table: str, heads: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The types of clip of a table about which a head that has channels is asked, with their labels."""
    return {kind: y for kind, y in LABEL_TABLES[table].items() if any(a and n for a, n in zip(y, heads))}


def mean_scores(scores: Scores) -> dict[str, Tensor]:
    """The mean score of each head that has channels, for the log, without a gradient."""
    return {head: x.detach().float().mean() for head, x in scores._asdict().items() if x.numel()}


# ------------------------------------------------------------------------------------------------------
# The two halves of a step, for one discriminator; `rpgan.py` has the same two for SeedVR2's objective


def student_loss(d: nn.Module, own: Tensor, target: Tensor, clips, encoder, cfg) -> tuple[Tensor, Callable]:
    """What a discriminator that holds still adds to the student's loss, and the five clips for `learn`, which
    are seen when it calls.

    own: x_S (b t 3 H W) or, in the feature domain, f_S (b t c h w); target: x_T or f_T, which is not looked
    at here; clips, encoder: as in stage 2's `train_step`.
    """
    seen, see = (d.look(own), d.look) if d.domain == "pixel" else (own, encoder)
    return adversarial_loss(d(seen)), partial(five_clips, seen, see, clips)


def learn(name: str, d: nn.Module, types: Callable, share: float, autocast, cfg) -> dict[str, Tensor]:
    """Adds the gradients of `share` of a discriminator's loss, the student's clip as it was. Returns what
    there is to log, by name."""
    terms = {f"disc_{name}": 0.0}
    with autocast():
        clips = types()  # Paper: Eq. 5
    # One type of clip after the other: all at once, they would not fit on a card.
    for kind, label in asked(cfg.labels, d.heads).items():
        with autocast():
            scores = d(clips.pop(kind))
            loss = discriminator_loss(scores, label)  # Paper: Eq. 4
        (share * loss).backward()
        terms[f"disc_{name}"] += loss.detach()
        terms |= {f"{name}/{kind}/{head}": score for head, score in mean_scores(scores).items()}
    return terms


# ------------------------------------------------------------------------------------------------------
# The layers that learn

HEADS = (192, 64)  # channels of the last features, 256, for detail and for consistency  Paper: Sec. 4.1
SLOPE = 0.2  # Choice: of the leaky ReLU, as in HYPIR, whose ConvNeXt this is
BACKBONE = "convnext_xxlarge.clip_laion2b_soup"  # OpenCLIP's laion2b_s34b_b82k_augreg_soup, in timm
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]                      OpenCLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EPSILON = 1e-2  # Choice: of normalisations; the rounding in flat areas is amplified less than with 1e-6


class Tail(nn.Module):
    """Three convolutions, 2D, 1D, 2D, then the heads: x (b t c h w) -> `Scores` on the same grid.

    Paper: Sec. 3.3, "three additional alternating 2D and 1D convolutional layers". Choice: three layers, not
    three pairs, so that a score sees three frames; kernels of 3, no normalisation.
    """

    def __init__(self, c_in: int, heads: tuple[int, int]):
        super().__init__()
        width = sum(heads)
        self.conv1 = nn.Conv2d(c_in, width, 3, padding=1)
        self.conv2 = TemporalConv(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        # Two 1x1 convolutions over the same features are one, its channels split; a head may have none.
        self.scores, self.split = nn.Conv2d(width, width, 1), tuple(heads)

    def forward(self, x: Tensor, taps: bool = False):
        """With taps also the activations of the three layers, (b t n h w) each."""
        first = F.leaky_relu(per_frame(self.conv1, x), SLOPE)
        second = F.leaky_relu(self.conv2(first), SLOPE)
        third = F.leaky_relu(per_frame(self.conv3, second), SLOPE)
        scores = Scores(*per_frame(self.scores, third).split(self.split, dim=2))
        return (scores, [first, second, third]) if taps else scores


# ------------------------------------------------------------------------------------------------------
# The pixel domain


def convnext(name: str = BACKBONE, pretrained: bool = True) -> nn.Module:
    """ConvNeXt's stem and stages: frames (n 3 H W) -> [(n c h w), ...] at 1/4, 1/8, 1/16 and 1/32.

    name: a ConvNeXt of timm. The default has 843 M weights; "convnext_base.clip_laion2b" (OpenCLIP's
    convnext_base_w) has 88 M; "tiny" is drawn at random, the same every time, and needs no download.
    Raises `UserError` where the weights are neither in the cache nor to be had.
    """
    import timm  # a second of import, only for training

    if name == "tiny":
        return tiny_convnext()
    what = f"--backbone {name}: cannot load it from {huggingface_hub.constants.HF_HUB_CACHE} or the Hub"
    way_out = "Connect once, copy that cache from another machine (HF_HOME), or --domains feature."
    with explained(what, way_out):  # no such name, no network, no disk space, a damaged file: many kinds
        return timm.create_model(name, features_only=True, pretrained=pretrained)


def tiny_convnext() -> nn.Module:
    """A ConvNeXt for two CPU cores with random weights, always the same; see `convnext`.

    Choice: orthogonal weights, and a stem blind to flat colour, which would drown the edges that are to be
    judged. timm's own start, near zero, teaches a tail far more slowly.
    """
    import timm

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # timm draws weights, too, which leave no trace
        net = timm.create_model(
            "convnext_tiny", features_only=True, depths=(1, 1, 2, 1), dims=(32, 64, 128, 256),
            ls_init_value=None, norm_eps=EPSILON,
        )  # fmt: skip
        for weight in net.parameters():
            if weight.ndim > 1:
                nn.init.orthogonal_(weight, gain=2**0.5, generator=generator)
    net.stem_0.weight.data -= net.stem_0.weight.data.mean(dim=(2, 3), keepdim=True)
    return net


class PixelDiscriminator(nn.Module):
    """Judges x (b t 3 H W) in [-1, 1] on the grid H/8, through a network that never changes. H, W >= 32.

    Choice: all four stages of the backbone, from texture to meaning, on the grid H/8. With scores
    on the clip's own grid, as the paper has it, one tensor of the tail would take 6.7 GB. The first
    convolution that learns, "adapted to the input width", stands behind them: training the stem instead would
    send every clip type back through the whole backbone.

    heads: channels for detail and for consistency; shift: rows and columns that clips lose at random, up to
    so many, see `look`; normalisation: mean and deviation of RGB that the backbone was trained with.
    `parameters()` and `state_dict()` hold what learns, no more.
    """

    domain = "pixel"
    SMALLEST = 32  # side of a frame that leaves the coarsest of the backbone's maps a place
    FRAMES = 4  # that go through the backbone together, which bounds memory: 1.6 TFLOP each at 512x512

    def __init__(
        self,
        backbone: nn.Module,
        heads: tuple[int, int] = HEADS,
        checkpointing: bool = False,
        shift: int = 0,
        normalisation: tuple[tuple, tuple] = (CLIP_MEAN, CLIP_STD),
    ):
        super().__init__()
        self.heads, self.shift = tuple(heads), shift
        self.level = backbone.feature_info.reduction().index(8)  # of the maps, that on the grid H/8
        self.first = nn.Conv2d(sum(backbone.feature_info.channels()), sum(heads), 1)
        self.tail = Tail(sum(heads), heads)
        self.backbone = freeze(backbone)
        self.backbone.checkpointing = checkpointing  # recompute its activations in the backward pass
        means, stds = normalisation  # of RGB in [0, 1], and here for a range of [-1, 1]
        for name, values in ("mean", [2 * m - 1 for m in means]), ("std", [2 * s for s in stds]):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, name: str = BACKBONE, **options):
        """Through `convnext(name)` or, light enough for a CPU, efficientnet_lite0, which takes [-1, 1] as it
        is; options as in the constructor."""
        if name == "efficientnet_lite0":
            return cls(efficientnet_lite(), normalisation=((0.5,) * 3, (0.5,) * 3), **options)
        return cls(convnext(name), **options)

    def draw_cut(self) -> tuple[int, int]:
        """Rows above and columns at the left that a clip loses, at random up to `shift` of each."""
        # Choice: off, but for tiny. The stem cuts frames into cells of 4x4 pixels, whose borders lie where
        # those of the student's own upsampled cells do. A weak backbone is blind to what happens on these
        # borders, and the student hides a grid there; moving the cut shows it.
        return tuple(torch.randint(self.shift + 1, (2,), device="cpu").tolist())

    def look(self, clip: Tensor, cut: tuple[int, int] | None = None) -> Tensor:
        """clip (b t 3 H W) in [-1, 1] -> what the backbone sees (b t c H/8 W/8): all that is frozen.

        cut: the rows and columns that all frames lose; by default drawn for this clip alone.
        """
        above, left = cut or self.draw_cut()
        pictures = frames((clip[..., above:, left:] - self.mean) / self.std).split(self.FRAMES)
        seen = [maybe_checkpoint(self.backbone.checkpointing, self.stages, x) for x in pictures]
        return torch.cat(seen).unflatten(0, clip.shape[:2])

    def stages(self, pictures: Tensor) -> Tensor:
        """(n 3 H W) -> the maps of all stages (n c H/8 W/8), fine to coarse, one after the other.

        Each is normalised over its channels, much as the backbone's own next layer reads it.
        """
        own = next(self.backbone.buffers()).dtype
        # One that was placed in another type computes in it: autocast would keep its normalisations, and with
        # them the largest maps, in float32. A normalisation's sums are in float32 anyway.
        with nullcontext() if own == torch.float32 else torch.autocast(pictures.device.type, enabled=False):
            maps = [rearrange(x, "n c h w -> n h w c") for x in self.backbone(pictures.to(own))]
            dtype = maps[-1].dtype  # autocast keeps the first in float32: the largest, and for no use
            maps = [F.layer_norm(x, x.shape[-1:], eps=EPSILON).to(dtype) for x in maps]
            size = maps[self.level].shape[1:3]
            maps = [F.interpolate(rearrange(x, "n h w c -> n c h w"), size, mode="bilinear") for x in maps]
            return torch.cat(maps, dim=1)

    def forward(self, seen: Tensor, taps: bool = False):
        """seen (b t c H/8 W/8), as from `look`; taps: as of `Tail`."""
        return self.tail(per_frame(self.first, seen), taps)


# ------------------------------------------------------------------------------------------------------
# The feature domain


class FeatureDiscriminator(nn.Module):
    """Judges features f (b t c h w), as f_S and f_T, on their own grid, through stage 1's UNet, frozen.

    unet: the student's; it is copied. It sees time, so that every type of clip has to go through it.
    Choice: its frozen last convolution stays, whose 256 channels are what the tail reads.
    heads, `parameters()` and `state_dict()`: as of `PixelDiscriminator`.
    """

    domain = "feature"

    def __init__(self, unet: UNet, heads: tuple[int, int] = HEADS, checkpointing: bool = False):
        super().__init__()
        features = unet.conv_out.out_channels  # the width at which the UNet ends, and f with it
        self.heads = tuple(heads)
        self.first = first_conv(unet.conv_in, features)
        self.tail = Tail(features, heads)
        self.backbone = freeze(copy.deepcopy(unet))
        self.backbone.checkpointing = checkpointing

    def forward(self, f: Tensor, taps: bool = False):
        h, w = f.shape[-2:]
        x = pad_to_multiple(f.flatten(0, 1), AdcVSR.MULTIPLE // UNSHUFFLE).unflatten(0, f.shape[:2])
        return self.tail(self.backbone(x, conv_in=self.first)[..., :h, :w], taps)


def first_conv(conv: nn.Conv2d, c_in: int) -> nn.Conv2d:
    """conv for c_in input channels: its kernels repeated, cut, and scaled to the same sum of inputs.

    Choice: AdcSR's recipe for its discriminator (4 channels to 256, divided by 64), for any two widths.
    """
    new = nn.Conv2d(c_in, conv.out_channels, conv.kernel_size, padding=conv.padding)
    old = conv.in_channels
    kernel = repeat(conv.weight.detach(), "o i h w -> o (r i) h w", r=-(-c_in // old))[:, :c_in]
    new.weight.data.copy_(kernel * old / c_in)
    new.bias.data.copy_(conv.bias.detach())
    return new
