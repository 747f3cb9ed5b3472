"""Plumbing that every script shares and that has nothing to do with the paper.

Process group, seeds, flags from a dataclass, checkpoints, log, errors in one line.
Admission test: a line that mentions a frame, a latent, a label or a loss belongs in another file.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

# ------------------------------------------------------------------------------------------------------
# Errors


class UserError(ValueError):
    """Something the user can mend; its message is the one line that is shown: what is wrong, what to do."""


def run(main: Callable[[], None]) -> None:
    """main(), a `UserError` shown as one line with exit status 2, Ctrl-C with 130; other errors are bugs."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ------------------------------------------------------------------------------------------------------
# Process group and seeds


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, how many there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The values averaged over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist()))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def init_world() -> World:
    """Joins torchrun's process group (NCCL on GPUs, gloo on CPUs); without torchrun a world of one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


# ------------------------------------------------------------------------------------------------------
# Flags


def parse_config(presets: dict[str, typing.Any], description: str | None, argv: list[str] | None = None):
    """A configuration from the command line: `--preset NAME`, then a flag for every field of the dataclass.

    The default preset is the first. A field's help text is in its metadata (see `setting`).
    """
    first = next(iter(presets))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, default=first)
    for field in dataclasses.fields(presets[first]):
        flag = "--" + field.name.replace("_", "-")
        help_text = f"{field.metadata.get('help', '')} ({getattr(presets[first], field.name)})"
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif typing.get_origin(field.type) is tuple:
            item = typing.get_args(field.type)[0]
            parser.add_argument(flag, type=item, nargs="*", default=None, help=help_text)
        else:
            parser.add_argument(flag, type=plain_type(field.type), default=None, help=help_text)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    config = presets[given.pop("preset")]
    return dataclasses.replace(
        config, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    )


def plain_type(hint) -> type:
    """int of `int`, str of `str | None`."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def setting(default, help: str):
    """A field of a configuration: its default, and what it is, with unit and source."""
    return dataclasses.field(default=default, metadata={"help": help})


# ------------------------------------------------------------------------------------------------------
# Checkpoints: folders step_000123/, written aside and renamed, so that a half-written one is never seen


def newest_checkpoint(out: str | Path) -> Path | None:
    """The complete checkpoint with the highest step under `out`, if there is one."""
    steps = [p for p in Path(out).glob("step_*") if p.name[5:].isdigit() and (p / "train.pt").is_file()]
    return max(steps, key=lambda p: int(p.name[5:]), default=None)


def save_checkpoint(out: str | Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Calls write(folder) on a temporary folder, renames it to out/step_N, keeps the last `keep` ones."""
    out = Path(out)
    final, partial = out / f"step_{step:06d}", out / f".step_{step:06d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for path in partial.iterdir():  # on disk before the rename: a power cut leaves no empty file
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, in Python, torch and safetensors
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{final}: cannot save ({reason}). Earlier checkpoints are intact.") from error
    older = sorted((p for p in out.glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    for path in older[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def load_training_state(folder: Path, config, may_change: frozenset[str]) -> dict:
    """train.pt of a checkpoint. `UserError` if a setting that changes the result differs from `config`."""
    state = torch.load(folder / "train.pt", map_location="cpu", weights_only=True)
    saved, now = state["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [k for k in now if k not in may_change and saved.get(k) != now[k]]
    if changed:
        named = ", ".join(f"{k} was {saved.get(k)}, now {now[k]}" for k in changed)
        raise UserError(f"{folder} was made with other settings: {named}. Use them, or another --out.")
    return state


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag, so that the loop can save and leave between two steps."""

    def __init__(self):
        self.set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        self.set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C leaves at once


class Log:
    """One JSON object a line, appended to `path` by the main process."""

    def __init__(self, path: Path, enabled: bool):
        self.file = None
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", buffering=1)

    def write(self, **values) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")
