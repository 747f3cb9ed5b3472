"""The files of a training set: a million paths in one array of bytes, read once, some of them held out.

a folder, a list (.txt), OpenVid-1M's CSV --list_files--> Files, in a hash's order --held_out--> a few
many of them are kept in an index in the user's cache, until a folder or the list changes
"""

import csv
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import numpy as np
from filelock import FileLock

from runtime import UserError, complete, explained

HELD_OUT_SHARE = 500  # one file of so many is held out for validation,
HELD_OUT = 8  # but at least so many of each kind, where that is no more than a quarter of them
NOT_HR = {"X2", "X3", "X4", "val1"}  # LSDIR's bicubic LR images and its validation images
INDEXES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adcvsr"
INDEXED = 10_000  # files, from which on a list of them is kept there


class DataError(UserError):
    """Training data that cannot be used; the message is one line and says what to do."""

    def __init__(self, message: str):
        # PyTorch raises a worker's error again, the worker's traceback as its message; the last line is ours.
        super().__init__(message.splitlines()[-1].split(f"{type(self).__name__}: ")[-1])


class Files(Sequence):
    """Paths below one folder, ordered by a hash of their names, in one array of bytes: a million of them take
    some 50 MB, once for all processes of a machine; as Python's objects they would take 400 MB in each."""

    def __init__(self, folder: Path, names: np.ndarray):
        self.folder, self.names, self.ends = folder, names, np.flatnonzero(names == 0)  # a 0 ends each name

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, k: int) -> Path:
        if not 0 <= k < len(self):
            raise IndexError(k)
        start = self.ends[k - 1] + 1 if k else 0
        return self.folder / os.fsdecode(self.names[start : self.ends[k]].tobytes())


def name_hash(path: str) -> bytes:
    """What decides whether a file is held out: its name's, wherever it lies."""
    return hashlib.sha256(os.fsencode(os.path.basename(path))).digest()[:8]


def list_files(source: str | Path, suffixes: set[str]) -> Files:
    """Files of a folder and its subfolders, of a list (.txt, a path a line) or of OpenVid-1M's CSV (the
    videos that it names and that are unpacked beside it). Hidden files are none. Raises DataError.

    A large set is read once, by the first process, and again when one of its folders or the list has changed.
    """
    source = Path(source)
    of = repr((str(Path.home()), str(source.absolute()), sorted(suffixes)))
    index = INDEXES / hashlib.sha256(of.encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"adcvsr-{index.name}.lock"):
        with suppress(OSError, ValueError):  # nothing is kept, or not whole
            times = json.loads(index.with_suffix(".json").read_text())
            if all(os.stat(place).st_mtime_ns == then for place, then in times.items()):
                return Files(top_folder(source), np.memmap(index, np.uint8, "r"))
        return read_files(index, source, suffixes)


def read_files(index: Path, source: Path, suffixes: set[str]) -> Files:
    """The files, read; kept if they are many and nothing has changed in the last seconds: the clocks of file
    systems may be too coarse to tell."""
    times: dict[str, int] = {}
    way_out = "Name a folder, a list (.txt) or OpenVid-1M's CSV, with its column 'video'"
    with explained(f"{source}: cannot be read", way_out, DataError, (OSError, ValueError, csv.Error)):
        names = [name for name in names_in(source, times) if os.path.splitext(name)[1].lower() in suffixes]
    names.sort(key=lambda name: (name_hash(name), name))
    packed = b"".join(os.fsencode(name) + b"\0" for name in names if os.path.basename(name)[0] != ".")
    if len(names) >= INDEXED and time.time_ns() - max(times.values()) > 2_000_000_000:
        with suppress(OSError):  # a home that cannot be written to: read again next time
            INDEXES.mkdir(parents=True, exist_ok=True)
            for path, content in (index, packed), (index.with_suffix(".json"), json.dumps(times).encode()):
                with complete(path) as partial:
                    partial.write_bytes(content)
    return Files(top_folder(source), np.frombuffer(packed, np.uint8))


def top_folder(source: Path) -> Path:
    """What the names of a source are relative to."""
    on_hub = source.suffix == ".csv" and source.parts[-3:-1] == ("data", "train")  # OpenVid-1M's own place
    return source.parents[2] if on_hub else source if source.is_dir() else source.parent


def names_in(source: Path, times: dict[str, int]) -> Iterator[str]:
    """Relative paths that a source names; to `times`, when each folder and list of them was last changed."""
    if source.is_dir():
        yield from walk(source, times)
        return
    times[str(source)] = os.stat(source).st_mtime_ns
    with source.open(newline="", encoding="utf-8-sig") as file:  # written by Windows, too
        if source.suffix != ".csv":
            yield from (line.strip() for line in file if line.strip())
            return
        rows = csv.reader(file)
        column = next(rows, []).index("video")
        named = {row[column] for row in rows if row}
    yield from (name for name in walk(top_folder(source), times) if os.path.basename(name) in named)


def walk(folder: Path, times: dict[str, int]) -> Iterator[str]:
    def refuse(error: OSError):
        raise error

    seen = set()  # a symbolic link may lead back
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (here := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(here)
        times[place] = os.stat(place).st_mtime_ns
        folders[:] = [name for name in folders if name[0] != "." and name not in NOT_HR]
        inside = os.path.relpath(place, folder)
        yield from files if inside == "." else (os.path.join(inside, name) for name in files)


def held_out(files: Files, suffixes: set[str], validation: str) -> list[Path]:
    """Files of one kind that training never sees: those of the folder `validation`, or of `files` those that
    the list `validation` names, or one in 500, by a hash of the name."""
    if validation and Path(validation).is_dir():
        return list(list_files(validation, suffixes))
    if validation:
        names = {path.name for path in list_files(validation, suffixes)}
        return [path for path in files if path.name in names]
    enough, limit = min(HELD_OUT, len(files) // 4), (2**64 // HELD_OUT_SHARE).to_bytes(8, "big")
    first = takewhile(lambda k: k < enough or name_hash(files[k]) < limit, range(len(files)))
    return [files[k] for k in first]
