"""Weights that others trained: AdcSR's, where the student starts (Sec. 4.1).

    hub or two files --adcsr_files--> net_params_200.pkl, halfDecoder.ckpt --read_pickle--> tensors
        --require_shapes: key by key--> renamed --from_adcsr--> AdcVSR, its temporal blocks still the identity

Nothing that a file holds is executed. Every failure is a `WeightsError` of one line.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from model import LATENTS, PRESETS, AdcVSR, HalfDecoder
from runtime import WeightsError, explained

ADCSR = "Guaishou74851/AdcSR"  # AdcSR's repository on the hub
ADCSR_FILES = ("net_params_200.pkl", "halfDecoder.ckpt")
ADCSR_LICENCE = "OpenRAIL++-M, as Stable Diffusion's, of which it is a part"


def from_adcsr(net_params: str | Path, half_decoder: str | Path, **config) -> AdcVSR:
    """The student from AdcSR's official `net_params_200.pkl` (UNet, mid block) and `halfDecoder.ckpt`.

    Both are checked key by key. Temporal blocks, if any, start as the identity. Raises `WeightsError`.
    """
    net = AdcVSR(**{**PRESETS["full"], **config})
    own = {k: v for k, v in net.state_dict().items() if ".temporal_" not in k}

    state = {k.removeprefix("module."): v for k, v in read_pickle(net_params).items()}
    state = {k: v for k, v in state.items() if not k.startswith("body.1.body.")}  # aliases of the others
    names = {"unet.": "body.1.", "decoder.mid_block.": "body.2."}
    theirs = {a + k.removeprefix(o): k for o, a in names.items() for k in own if k.startswith(o)}
    require_shapes(net_params, state, {k: own[ours].shape for k, ours in theirs.items()})

    # The mid block is net_params', which trained it; halfDecoder.ckpt has the frozen original.
    tail = read_half_decoder(half_decoder, net.decoder)
    tail = {f"decoder.{k}": v for k, v in tail.items() if f"decoder.{k}" in own}
    net.load_state_dict(net.state_dict() | tail | {ours: state[k] for k, ours in theirs.items()})
    return net


def adcsr_files(named: Sequence[str]) -> tuple[Path, Path]:
    """AdcSR's two official files: those named, or from the hub repository named, fetched once and kept in the
    hub's cache. In the repository they are found by their names alone. Raises `WeightsError`."""
    if len(named) == 2:
        return Path(named[0]), Path(named[1])
    if len(named) > 2:
        raise WeightsError(f"--adcsr: give {' and '.join(ADCSR_FILES)}, or nothing to fetch them")
    repository = named[0] if named else ADCSR
    way_out = f"Connect once, or give the two files: --adcsr {' '.join(ADCSR_FILES)}"
    with explained(f"AdcSR's weights from the hub's {repository}: cannot be fetched", way_out, WeightsError):
        patterns = [f"*{name}" for name in ADCSR_FILES]
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
            here = [path for name in ADCSR_FILES for path in folder.rglob(name)]
            if len(here) == 2:
                return tuple(here)
        there = HfApi().model_info(repository, files_metadata=True).siblings
        wanted = {name: f for name in ADCSR_FILES for f in there if Path(f.rfilename).name == name}
        if missing := set(ADCSR_FILES) - set(wanted):
            raise WeightsError(f"{repository}: no {', '.join(sorted(missing))} in it. {way_out}")
        gb = sum(f.size or 0 for f in wanted.values()) / 1e9
        print(f"fetching AdcSR, {gb:.2g} GB, from {repository}. Licence: {ADCSR_LICENCE}", flush=True)
        return tuple(Path(hf_hub_download(repository, wanted[name].rfilename)) for name in ADCSR_FILES)


# The one thing in AdcSR's halfDecoder.ckpt that is neither tensor nor plain value: a class, passed over.
LIGHTNINGS = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
# What to do with a file that holds Python objects, which run when they are read: keep its tensors alone.
TENSORS_ALONE = (
    """python -c "import sys, torch; f = sys.argv[1]; s = torch.load(f, 'cpu', weights_only=False); """
    """torch.save(s.get('state_dict', s), f)" """
)


def read_pickle(path: str | Path) -> dict:
    """A PyTorch pickle, of which nothing is executed. Raises `WeightsError`."""
    try:
        with torch.serialization.safe_globals([(object, LIGHTNINGS)]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        fault = "not a PyTorch checkpoint. Is the download complete?"
        if isinstance(error, FileNotFoundError):
            fault = "no such file. AdcSR's repository says where to download it."
        elif "Unsupported global" in str(error):
            fault = f"holds Python objects beside tensors. If you trust its source: {TENSORS_ALONE}{path}"
        raise WeightsError(f"{path}: {fault}") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not a dictionary of weights.")
    return state


def read_half_decoder(path: str | Path, decoder: HalfDecoder) -> dict[str, Tensor]:
    """AdcSR's `halfDecoder.ckpt`, checked against `decoder`: its weights, and those of the first convolution,
    which it does not have. Raises `WeightsError`."""
    state = read_pickle(path)
    state = {k: v for k, v in state.get("state_dict", state).items() if k.startswith("decoder.")}
    width = decoder.mid_block.resnets[0].conv1.in_channels
    shapes = {"conv_in.weight": (width, LATENTS, 3, 3), "conv_in.bias": (width,)}
    shapes |= {k: v.shape for k, v in decoder.state_dict().items()}
    require_shapes(path, state, {f"decoder.{k}": shape for k, shape in shapes.items()})
    return {k.removeprefix("decoder."): v for k, v in state.items()}


def require_shapes(path: str | Path, state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `WeightsError`, one line, unless state has exactly the keys of `shapes`, of these shapes."""
    found = {k: tuple(v.shape) for k, v in state.items()}
    faults = [
        f"{k} is {found.get(k, 'missing')}, expected {tuple(shapes[k]) if k in shapes else 'none'}"
        for k in sorted(found.keys() | shapes.keys())
        if found.get(k) != shapes.get(k)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" * (len(faults) > 3)
        raise WeightsError(f"{path}: {'; '.join(faults[:3])}{more}. Is this the official file?")
