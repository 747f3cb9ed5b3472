"""AdcSR's official weights: read key by key, faults in one line, fetched once from the hub."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import types
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
import torch
from test_model import (
    UNEVEN,
    awake,
    clip,
    distance,
    needs_keys,
    official_keys,
    one_line,
    same_numbers_every_time,  # noqa: F401 (a fixture)
)

import pretrained
from model import AdcVSR
from pretrained import ADCSR, ADCSR_FILES
from runtime import WeightsError

ROOT = Path(__file__).resolve().parents[1]

STAGES = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block"]
STAGES += ["up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3", "conv_norm_out", "act", "conv_out"]


def official_pair(net: AdcVSR) -> tuple[dict, dict]:
    """net's weights as AdcSR publishes them: wrapper prefix, aliases, and a frozen mid block beside."""
    params = {}
    for key, value in net.unet.state_dict().items():
        params[f"module.body.1.{key}"] = value
        for i, stage in enumerate(STAGES):
            if key.startswith(f"{stage}."):
                params[f"module.body.1.body.{i}.{key.removeprefix(stage + '.')}"] = value
    params |= {f"module.body.2.{k}": v for k, v in net.decoder.mid_block.state_dict().items()}
    width = net.unet.conv_out.out_channels
    decoder = {
        "decoder.conv_in.weight": torch.randn(width, 4, 3, 3),
        "decoder.conv_in.bias": torch.randn(width),
    }
    for key, value in net.decoder.state_dict().items():
        decoder[f"decoder.{key}"] = torch.randn_like(value) if key.startswith("mid_block.") else value
    others = {
        "encoder.conv_in.weight": torch.randn(3),
        "loss.logvar": torch.zeros(()),
        "post_quant_conv.bias": torch.ones(4),
    }
    return params, {"epoch": 3, "state_dict": {**others, **decoder}}


@pytest.fixture
def pair(tmp_path):
    """The network behind a synthetic pair, what the two files hold, and `load` to write and read them."""
    net = awake(AdcVSR(**{**UNEVEN, "temporal": "none"}))
    params, decoder = official_pair(net)

    def load(**options):
        torch.save(params, tmp_path / "net_params_200.pkl")
        torch.save(decoder, tmp_path / "halfDecoder.ckpt")
        files = tmp_path / "net_params_200.pkl", tmp_path / "halfDecoder.ckpt"
        return pretrained.from_adcsr(*files, **{**UNEVEN, **options})

    return net, params, decoder, load


@torch.no_grad()
@pytest.mark.parametrize("temporal", ["layer", "none"])
def test_the_official_pair_gives_the_network_it_came_from(pair, temporal):
    net, _, _, load = pair
    loaded = load(temporal=temporal)
    lr = clip(b=1, t=3, h=17, w=31)
    assert distance(loaded(lr), net(lr)) < 1e-6
    # The mid block that AdcSR trained, not the frozen original beside it.
    for key, value in net.decoder.mid_block.state_dict().items():
        assert torch.equal(loaded.decoder.mid_block.state_dict()[key], value)


FAULTS = [  # file, key, what stands there instead: nothing, or a tensor
    ("net_params_200.pkl", "module.body.1.mid_block.resnets.0.norm1.weight", None),
    ("net_params_200.pkl", "module.body.3.weight", torch.zeros(1)),
    ("net_params_200.pkl", "module.body.1.conv_in.bias", torch.zeros(13)),
    ("halfDecoder.ckpt", "decoder.conv_out.bias", None),
    ("halfDecoder.ckpt", "decoder.conv_mid.bias", torch.zeros(1)),
    ("halfDecoder.ckpt", "decoder.conv_in.bias", torch.zeros(5)),
]


@pytest.mark.parametrize("file, key, value", FAULTS)
def test_an_official_file_that_does_not_fit_is_one_line_with_the_key(pair, file, key, value):
    _, params, decoder, load = pair
    weights = params if file.startswith("net") else decoder["state_dict"]
    weights.pop(key, None)
    if value is not None:
        weights[key] = value
    with pytest.raises(WeightsError) as error:
        load()
    assert file in one_line(error) and key.removeprefix("module.").removeprefix("decoder.") in one_line(error)


@torch.no_grad()
def test_the_official_half_decoder_needs_neither_lightning_nor_trust(pair, monkeypatch):
    """It holds a class of Lightning's as a key, as Lightning's own checkpoints do."""
    net, _, decoder, load = pair
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    decoder["callbacks"] = {module.ModelCheckpoint: {"best_model_score": torch.zeros(1)}}
    read = pretrained.from_adcsr

    def without_lightning(*args, **kwargs):
        for package in packages:
            monkeypatch.delitem(sys.modules, package)
        return read(*args, **kwargs)

    packages = name, "pytorch_lightning", "pytorch_lightning.callbacks"
    for package in packages:  # for the pickle to be written, no longer
        monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(pretrained, "from_adcsr", without_lightning)
    lr = clip()
    assert distance(load()(lr), net(lr)) < 1e-6


@torch.no_grad()
def test_python_objects_in_a_pickle_are_refused_with_a_command_that_takes_them_out(pair, tmp_path):
    net, _, decoder, load = pair
    decoder["options"] = argparse.Namespace(lr=1e-4)
    with pytest.raises(WeightsError, match="If you trust its source: python -c ") as error:
        load()
    command = shlex.split(one_line(error).partition("source: python ")[2])
    subprocess.run([sys.executable, *command], check=True)
    files = tmp_path / "net_params_200.pkl", tmp_path / "halfDecoder.ckpt"
    lr = clip()
    assert distance(pretrained.from_adcsr(*files, **UNEVEN)(lr), net(lr)) < 1e-6


@pytest.mark.parametrize("content", [b"", b"not a checkpoint " * 100, b"PK\x03\x04" + bytes(500), None])
def test_a_file_that_is_no_checkpoint_is_one_line_and_asks_for_no_trust(tmp_path, content):
    path = tmp_path / "net_params_200.pkl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        pretrained.from_adcsr(path, path, **UNEVEN)
    assert str(path) in one_line(error) and "trust" not in one_line(error)


@needs_keys
@pytest.mark.slow
@torch.no_grad()
def test_the_official_pair_at_full_size(tmp_path):
    files = tmp_path / "net_params_200.pkl", tmp_path / "halfDecoder.ckpt"
    params, decoder = {}, {}
    for key, (alias, shape) in sorted(official_keys().items(), key=lambda item: item[1][0]):
        if key.startswith("body."):
            params[f"module.{key}"] = params[f"module.{alias}"] if alias else torch.randn(shape) * 0.02
        else:
            decoder[f"decoder.{key}"] = torch.randn(shape) * 0.02
    torch.save(params, files[0])
    torch.save({"state_dict": decoder}, files[1])
    net = pretrained.from_adcsr(*files)
    files[0].unlink()
    assert all(
        torch.equal(v, params[f"module.body.2.{k}"]) for k, v in net.decoder.mid_block.state_dict().items()
    )
    unet = {k: v for k, v in net.unet.state_dict().items() if ".temporal_" not in k}
    assert all(torch.equal(v, params[f"module.body.1.{k}"]) for k, v in unet.items())
    tail = {k: v for k, v in net.decoder.state_dict().items() if not k.startswith("mid_block.")}
    assert all(torch.equal(v, decoder[f"decoder.{k}"]) for k, v in tail.items())
    sr, features = net(clip(t=1), return_features=True)
    assert sr.shape == (1, 1, 3, 64, 64) and features.shape == (1, 1, 256, 8, 8) and sr.isfinite().all()


class HubAnswers(BaseHTTPRequestHandler):
    """The hub's answers over HTTP, for one repository with two large files in folders and one of no use."""

    FILES = {
        f"weight/{ADCSR_FILES[0]}": b"net" * 99,
        f"weight/pretrained/{ADCSR_FILES[1]}": b"half",
        "a.md": b"-",
    }
    COMMIT = "c0ffee" * 6 + "cafe"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer()

    def answer(self, with_body: bool = True):
        self.server.asked.append(self.path)
        headers, path = {"X-Repo-Commit": self.COMMIT}, self.path.partition("?")[0]
        if path.startswith("/api/models/Guaishou74851/AdcSR"):
            files = [{"rfilename": name, "size": len(body)} for name, body in self.FILES.items()]
            body = json.dumps({"id": ADCSR, "sha": self.COMMIT, "siblings": files}).encode()
            headers["Content-Type"] = "application/json"
        else:
            name = unquote(path).partition("/resolve/")[2].partition("/")[2]
            if name not in self.FILES:
                return self.send_error(404)
            body = self.FILES[name]
            headers["ETag"] = f'"{sha256(body).hexdigest()}"'
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *line):
        pass


@pytest.fixture
def hub():
    """A server that answers as the hub does, at `hub.url`; `hub.asked` are the paths it was asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubAnswers)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch_adcsr(cache: Path, url: str, *named: str) -> subprocess.CompletedProcess:
    """`adcsr_files(named)` in a process of its own, with this hub and this cache of it."""
    code = "import sys; from pretrained import adcsr_files; print(*adcsr_files(sys.argv[1:]), sep='\\n')"
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *named]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=cache)


def test_adcsrs_files_are_fetched_once_and_found_by_name(tmp_path, hub):
    first = fetch_adcsr(tmp_path, hub.url)
    assert first.returncode == 0, first.stderr
    line, *paths = first.stdout.split("\n")[:3]
    assert "3e-07 GB" in line and "OpenRAIL++-M" in line and ADCSR in line
    assert [Path(p).read_bytes() for p in paths] == list(HubAnswers.FILES.values())[:2]
    assert not any("a.md" in path for path in hub.asked)
    asked = len(hub.asked)
    again = fetch_adcsr(tmp_path, hub.url)
    assert again.stdout.split() == paths and len(hub.asked) == asked


def test_no_way_to_adcsrs_files_is_one_line(tmp_path, hub):
    for url, named, what in (
        (hub.url, ["nobody/nothing"], "nobody/nothing: cannot be fetched"),
        ("http://127.0.0.1:9", [], "cannot be fetched"),
        (hub.url, ["a", "b", "c"], "give net_params_200.pkl and halfDecoder.ckpt"),
    ):
        done = fetch_adcsr(tmp_path, url, *named)
        last = done.stderr.strip().split("\n")[-1]
        assert done.returncode and "WeightsError" in last and what in last and "halfDecoder.ckpt" in last
