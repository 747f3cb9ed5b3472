"""Plumbing that every script shares and that has nothing to do with the paper.

Errors in one line, files, processes, settings, and what surrounds the steps of a training (`Run`).
Admission test: a line that mentions a frame, a latent, a label or a loss belongs in another file.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------
# Errors


class UserError(ValueError):
    """Something the user can mend; its message is the one line that is shown: what is wrong, what to do."""


@contextmanager
def explained(
    what: str, way_out: str, kind: type[UserError] = UserError, causes: type[Exception] | tuple = Exception
) -> Iterator[None]:
    """Whatever of `causes` fails inside becomes one line: `what (the reason). way_out`, raised as `kind`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise  # explained already, or somebody's to retry
    except causes as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{what} ({reason[:200]}). {way_out}") from error


def optional(module: str) -> ModuleType:
    """A module of a package that is not required. ImportError, whatever it raises: an old package that is
    installed beside newer ones may break at import in any way."""
    try:
        return import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ImportError(f"{module} cannot be imported, {reason}") from error


def printable(text: object) -> str:
    """The text on one line: file names may hold line breaks and control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class Said(io.TextIOWrapper):
    """stdout or stderr as a program of hours needs them: what they cannot show is escaped, and once their
    reader is gone, what is said goes nowhere."""

    def write(self, text: str) -> int:
        with self.or_nowhere():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self.or_nowhere():
            super().flush()

    @contextmanager
    def or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def speak_anywhere() -> None:
    """Makes sys.stdout and sys.stderr `Said`; where they were closed, what is said goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
        elif stream is getattr(sys, f"__{name}__"):  # not what a test or a notebook has put there
            flushed = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            said = Said(stream.detach(), stream.encoding, "backslashreplace", **flushed)
            setattr(sys, name, said)


def run(main: Callable[[], None]) -> None:
    """main(), a `UserError` shown as one line with exit status 2, Ctrl-C with 130; other errors are bugs."""
    speak_anywhere()
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ------------------------------------------------------------------------------------------------------
# Files and threads


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A place for a file or a folder that becomes `path` once the block has ended well: nobody ever sees half
    of it, not even after a power cut. Raises OSError where it cannot be written."""
    # As short as it is, it fits wherever the final name does; it is the same after a kill, and found again.
    suffix = path.suffix if len(path.suffix) < 12 else ""  # in a folder's name that may be any part of it
    partial = path.with_name(f".partial-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}{suffix}")
    try:
        remove(partial)
        yield partial
        for file in partial.rglob("*") if partial.is_dir() else [partial]:
            if file.is_file():
                with open(file, "r+b") as handle:  # Windows syncs only what is open for writing
                    os.fsync(handle.fileno())
        if path.is_dir():
            remove(path)
        os.replace(partial, path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def ahead(items: Iterable, depth: int = 2) -> Iterator:
    """The same items in the same order, made by a thread of their own, up to `depth` ahead.

    An error in the thread is raised here, at its place. Whoever stops early waits for the item in the making.
    """
    items, end, waiting = iter(items), object(), deque()
    with ThreadPoolExecutor(1) as thread:
        try:
            for _ in range(depth):
                waiting.append(thread.submit(next, items, end))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()
            if hasattr(items, "close"):
                thread.submit(items.close).result()


# ------------------------------------------------------------------------------------------------------
# Networks that never learn


def freeze(net: nn.Module) -> nn.Module:
    """net, in place, with buffers for parameters: no `requires_grad_` and no optimiser reaches its weights.

    The buffers are not persistent: checkpoints leave out what never changes.
    """
    for module in net.modules():
        tensors = *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
        for name, tensor in tensors:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return net.eval()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware computes in it: CUDA from Ampere, CPUs with AMX or AVX512-BF16. Without,
    it is slower than float32, by far."""
    kind, fast = torch.device(device).type, False
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        can = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
        fast = can.get("amx_bf16") or can.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


# ------------------------------------------------------------------------------------------------------
# Process group and seeds


BUCKET = 300e6  # bytes of gradients that travel together


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, how many there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """bfloat16 for what is safe in it, where that is fast; float32 elsewhere."""
        fast = fast_dtype(self.device) == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    @property
    def fused(self) -> bool:
        """Whether an optimiser should update all weights in one kernel."""
        return self.device.type == "cuda"

    def place_frozen(self, net: nn.Module) -> nn.Module:
        """net, in place, on the device; on a GPU in its fast dtype. Only for what never changes: there
        nothing is lost to rounding step by step."""
        if self.device.type == "cuda":
            net.to(fast_dtype(self.device), memory_format=torch.channels_last)
        return net.to(self.device)

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

    def ask(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Asks all processes whether any has its flag set now; what is returned waits for the answer. Neither
        waits for a GPU. A process on its own is asked when the answer is wanted."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag()), device="cpu")
        message = dist.all_reduce(flags, async_op=True)

        def answer() -> bool:
            message.wait()
            return bool(flags)

        return answer

    def same(self, number: int) -> bool:
        """Whether all processes say the same number."""
        if self.size == 1:
            return True
        high = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        return bool(high[0] == -high[1])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Fills the tensors of every process with those of the first."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its mean over all processes. Said once a step, after every backward pass,
        where DistributedDataParallel would have to be told which of several passes is the last."""
        if self.size == 1:
            return
        buckets, room, sent = [], 0, []
        for gradient in (p.grad for p in parameters if p.grad is not None):
            if room <= 0:
                buckets.append([])
                room = BUCKET
            buckets[-1].append(gradient)
            room -= gradient.nbytes
        for bucket in buckets:  # one message for each: there are hundreds of gradients, most of them small
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, message in sent:
            message.wait()
            parts = flat.div_(self.size).split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket)])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def shared_store() -> tuple[dist.Store, int, int]:
    """Names and numbers that all processes of a torchrun see, this one's rank, and how many there are."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun keeps its store over restarts: under one name, a new start reads the dead one's addresses.
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


def init_world() -> World:
    """Joins torchrun's process group (NCCL for GPUs, gloo for CPUs); without torchrun a world of one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, size = shared_store()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


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
    columns = {
        name: {setting: values[k] for setting, values in rows if values[k] is not None}
        for k, name in enumerate(names)
    }
    return {"full": kind()} | {name: kind(**column) for name, column in columns.items()}


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


def fingerprint(weights: Iterable[Tensor]) -> int:
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
        if self.world.size > 1 and not self.world.same(fingerprint(self.trained)):
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
