"""A training run: its settings, its checkpoints, and all that surrounds its steps. Nothing of the paper.

    a table of presets --parse--> settings
    newest checkpoint --Run--> steps: seed, batch, the script's train_step, log, save, stop --> checkpoints

The same command again goes on where the run stopped, bit for bit. A line that mentions a frame, a latent, a
label or a loss belongs in another file.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

from runtime import UserError, World, complete, explained, optional

# ------------------------------------------------------------------------------------------------------
# Settings


# fmt: off
@dataclasses.dataclass(frozen=True)
class Settings:
    """Of any training run. None of them but the seed changes what is learnt."""

    out: str = "runs"           # folder of checkpoints, log and pictures
    steps: int = 200_000        # optimiser steps                                     Paper: Sec. 4.1
    every: int = 1000           # steps from one checkpoint, with a look at held-out clips, to the next
    seed: int = 0               # of the initial weights, of the data and of every random draw
    # what is computed again in the backward pass, to save memory: see docs/performance.md
    checkpointing: Literal["none", "tail", "all"] = "all"
    workers: int = 8            # processes that load data, for each training process
    dry_run: bool = False       # do three steps, say what training costs, and leave nothing behind
# fmt: on


MAY_CHANGE = frozenset("out steps every checkpointing workers dry_run".split())  # in a run that goes on


def presets(kind: type, table: dict[str, tuple]) -> dict:
    """Configurations by name: "full", which is `kind` as it stands, and a column of the table for each other.

    The table has a row a setting; its first row holds the names. None leaves a setting as it is in full.
    """
    (_, names), *rows = table.items()
    presets = {"full": kind()}
    for k, name in enumerate(names):
        presets[name] = kind(**{setting: values[k] for setting, values in rows if values[k] is not None})
    return presets


def parse(presets: dict, description: str, argv: list[str] | None = None):
    """`--preset NAME` (the first if not given), then any field of the dataclass as a flag; its comment is its
    help. A wrong flag or value ends the program with status 2 and what it might have been."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets, default=next(iter(presets)))
    known, rest = first.parse_known_args(argv)
    preset, names = presets[known.preset], ", ".join(presets)
    description += f"\n--preset NAME: one of {names}; the defaults below are those of {known.preset}."
    return tyro.cli(type(preset), default=preset, args=rest, description=description)


def require_positive(config, names: str) -> None:
    """`UserError` where one of these settings is below 1."""
    for name in names.split():
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: give 1 or more")


# ------------------------------------------------------------------------------------------------------
# Checkpoints: folders step_000123/, written aside and renamed, so that a half-written one is never seen


def checkpoints(out: str | Path) -> list[Path]:
    """The complete checkpoints under `out` in the order of their steps."""
    found = [p for p in Path(out).glob("step_*") if p.name[5:].isdigit() and (p / "train.pt").is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(out: str | Path) -> Path | None:
    """The complete checkpoint with the highest step under `out`, if there is one."""
    return next(reversed(checkpoints(out)), None)


def read_training_state(folder: Path, mmap: bool = False) -> dict:
    """train.pt of a checkpoint: "step", "config" and more. mmap: tensors stay on disk until they are used."""
    path = folder / "train.pt"
    with explained(f"{path}: damaged, or not of a training run", "Copy the checkpoint again."):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return {"step": state["step"], "config": dict(state["config"])} | state


def as_saved(config) -> dict:
    """Settings as a checkpoint keeps them: JSON's values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_training_state(folder: Path, config) -> dict:
    """train.pt of a checkpoint. `UserError` if a setting that changes the result differs from `config`."""
    state, now = read_training_state(folder), as_saved(config)
    saved = state["config"]
    changed = [k for k in now if k not in MAY_CHANGE and saved.get(k) != now[k]]
    if changed:
        named = ", ".join(f"{k} was {saved.get(k)}, now {now[k]}" for k in changed)
        raise UserError(f"{folder} was made with other settings: {named}. Use them, or another --out.")
    return state


def checksum(weights: Iterable[Tensor]) -> int:
    """A number that is another one as soon as any bit of the weights is."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    return int.from_bytes(digest.digest()[:7], "big")


# ------------------------------------------------------------------------------------------------------
# A training run

KEEP = 3  # checkpoints that stay, the last ones
LINES = 100  # of the log, between two checkpoints
PATIENCE = 30  # seconds that another run in the same folder has to end; a killed one's loaders take a few
MEASURED = 3  # steps of a dry run


class Run:
    """All that surrounds the steps of a training and has nothing to do with the paper.

        training = Run(cfg, world, student, optimiser)        # goes on from the newest checkpoint
        for step, batch in training.steps(lambda done: ...):  # seeds; behind each step saves, stops if asked
            training.log(train_step(...))
            if training.due:
                training.note(**validate(...))

    cfg: `Settings` and more. student: has save_pretrained and from_pretrained. optimiser: the student's.
    parts: other networks and optimisers. All processes begin with the first's weights. Raises `UserError`.
    """

    def __init__(self, cfg, world: World, student: nn.Module, optimiser, **parts):
        self.cfg, self.world, self.student, self.optimiser = cfg, world, student, optimiser
        self.parts = {"optimiser": optimiser} | parts
        self.out, self.step, self.stop, self.file, self.board = Path(cfg.out), 0, False, None, None
        if not cfg.dry_run and (folder := newest_checkpoint(self.out)):
            state = load_training_state(folder, cfg)
            student.load_state_dict(type(student).from_pretrained(folder).state_dict())
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = state["step"]
        if not world.same(self.step):
            raise UserError(f"{self.out}: processes find different checkpoints; all must see the same folder")
        networks = [student, *(part for part in parts.values() if isinstance(part, nn.Module))]
        world.broadcast(tensor for net in networks for tensor in (*net.parameters(), *net.buffers()))
        self.trained = [weight for net in networks for weight in net.parameters()]
        if world.is_main:
            where = f"{world.size} x {world.device} | at step {self.step} of {cfg.steps} | {self.out}"
            print(f"{where} | {changes(cfg)}", flush=True)

    @property
    def speaks(self) -> bool:
        """Whether this step ends with a line of the log."""
        cfg = self.cfg
        return self.step % max(1, cfg.every // LINES) == 0 or self.step == cfg.steps or cfg.dry_run

    @property
    def due(self) -> bool:
        """Whether there is a checkpoint after this step."""
        return not self.cfg.dry_run and (self.step % self.cfg.every == 0 or self.step == self.cfg.steps)

    def steps(self, make_loader: Callable[[int], Iterable]) -> Iterator[tuple[int, Any]]:
        """(number of the step, from 1 on, its batch). make_loader: steps done -> the batches that follow."""
        cfg, ends = self.cfg, []
        with self.opened():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.ask_to_stop)
            self.start_line()
            for batch in islice(make_loader(self.step), MEASURED if cfg.dry_run else None):
                self.waited += time.perf_counter() - self.asked
                self.step += 1
                # A resumed run draws what it would have drawn.
                torch.manual_seed(hash((cfg.seed, self.step, self.world.rank)))
                # Asked of one process, done by all: the question is on its way while they make the step.
                asked = self.world.ask(lambda: self.stop)
                yield self.step, batch
                stopping = asked()
                if self.due or (stopping and not cfg.dry_run):
                    self.save()
                if stopping:
                    if self.world.is_main:
                        print(f"asked to stop, after step {self.step} of {cfg.steps}", flush=True)
                    break
                self.asked = time.perf_counter()
                ends.append(self.asked)
        if cfg.dry_run and self.world.is_main and len(ends) > 1:
            seconds = (ends[-1] - ends[0]) / (len(ends) - 1)  # the first step warms up
            days = f"{cfg.steps} steps take {cfg.steps * seconds / 86400:.2g} days"
            print(f"{seconds:.3g} s a step, {peak_memory():.1f} GB at most: {days}", flush=True)

    def ask_to_stop(self, number: int, frame) -> None:
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C leaves at once

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The run's folder for this run alone, and its log: a JSON object a line, with TensorBoard's curves
        beside it where that is installed."""
        with ExitStack() as stack:
            if self.world.is_main and not self.cfg.dry_run:
                way_out = "Does another training use it? Give another --out."
                with explained(f"--out {self.out}: cannot be used", way_out, causes=OSError):
                    self.out.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(self.out / ".lock", timeout=PATIENCE))
                    self.file = stack.enter_context((self.out / "log.jsonl").open("a", buffering=1))
                try:
                    board = optional("torch.utils.tensorboard").SummaryWriter
                    self.board = stack.enter_context(board(str(self.out / "tensorboard")))
                except ImportError as error:
                    print(f"no TensorBoard curves, log.jsonl has all numbers ({error})", flush=True)
            yield

    def start_line(self) -> None:
        """What the next line of the log counts."""
        self.totals, self.count, self.waited = defaultdict(float), 0, 0.0
        self.since = self.asked = time.perf_counter()

    def log(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """After each update. Every so many steps it writes a line, of values averaged over processes and over
        the steps since the last line, and returns these; otherwise nothing. data_wait: share of the time.

        Names with a slash are not shown, only kept. Raises `UserError` for a value that is not finite.
        """
        cfg, step = self.cfg, self.step
        for name, value in losses.items():
            self.totals[name] += value
        self.count += 1
        if not self.speaks:
            return {}
        # A GPU is waited for here alone, once a line.
        totals = torch.stack([torch.as_tensor(total) for total in self.totals.values()]).tolist()
        means = {name: total / self.count for name, total in zip(self.totals, totals)}
        for name, mean in means.items():
            if not math.isfinite(mean):
                way_out = "The last checkpoint is kept; try a lower learning rate."
                raise UserError(f"step {step}: {name} is {mean}. {way_out}")
        spent = time.perf_counter() - self.since
        means = self.world.mean(means)
        more = {"lr": self.optimiser.param_groups[0]["lr"], "steps_per_s": self.count / spent}
        more |= {"data_wait": self.waited / spent, "gb": peak_memory()}
        self.write(means | more)
        if self.world.is_main:
            shown = " ".join(f"{k} {v:.4g}" for k, v in (means | more).items() if "/" not in k)
            left = (cfg.steps - step) * spent / self.count / 60
            print(f"step {step}/{cfg.steps} {shown} eta {left:.0f} min", flush=True)
        self.start_line()
        return means

    def note(self, **scores: float) -> None:
        """Writes and shows scores of this step."""
        self.write(scores)
        print(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()), flush=True)

    def write(self, values: dict[str, float]) -> None:
        if self.file:
            self.file.write(json.dumps({"step": self.step} | values) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, self.step)

    def save(self) -> None:
        """A checkpoint, if the weights are finite, and in all processes the same; else `UserError`."""
        kept = "the last checkpoint is kept"
        if not all(weight.isfinite().all() for weight in self.trained):  # the losses were, before the update
            raise UserError(f"step {self.step}: the weights are not finite; {kept}")
        if self.world.size > 1 and not self.world.same(checksum(self.trained)):
            raise UserError(f"step {self.step}: the processes' weights have come apart; {kept}")
        if self.world.is_main:
            folder = self.out / f"step_{self.step:06d}"
            state = {"step": self.step, "config": as_saved(self.cfg)}
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            full_disk = (OSError, RuntimeError, SafetensorError)  # as Python, torch and safetensors put it
            with explained(f"{folder}: cannot save", "Earlier checkpoints are intact.", causes=full_disk):
                with complete(folder) as partial:
                    partial.mkdir()
                    self.student.save_pretrained(partial)
                    torch.save(state, partial / "train.pt")
            for old in checkpoints(self.out)[:-KEEP]:
                shutil.rmtree(old, ignore_errors=True)
        self.world.barrier()


def changes(config) -> str:
    """What a run does otherwise than the paper, for people."""
    default, now = as_saved(type(config)()), as_saved(config)
    changed = [f"{k} {v}" for k, v in now.items() if v != default[k] and k not in MAY_CHANGE]
    return ", ".join(changed) or "the paper's settings"


def peak_memory() -> float:
    """The most memory this process has held, in GB: on the GPU where there is one; 0 where nobody knows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
