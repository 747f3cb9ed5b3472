"""What there is to do, and who does it: clips, what they become, and their parts for several processes.

    inputs --> clips --> segments that are missing --> jobs: runs of them --> whichever process is free

The processes of `torchrun --nproc_per_node=8 infer.py ...` share a store of names and numbers: the first
writes the list of jobs there, and all take one after the other. Nothing of the paper.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from runtime import shared_store
from segments import SEGMENT
from stills import moves
from video import (
    IMAGE_SUFFIXES,
    VIDEO_FORMATS,
    VIDEO_SUFFIXES,
    is_hidden,
    suffix_of,
    with_ending,
)

LONGEST_WAIT = timedelta(days=7)  # for the list of jobs: a store's own limit is minutes
PAUSE = 0.1  # seconds between two looks at the store

# --- Clips and what they become ------------------------------------------------------------------------


def suffixed(path: Path, ending: str, suffix: str | None = None) -> Path:
    """clip.mp4, "_x4" -> clip_x4.mp4 beside it, with another suffix if one is given."""
    kind = path.suffix if suffix_of(path) else ""
    bare = path.with_name(path.name.removesuffix(kind))
    return with_ending(bare, ending + (kind if suffix is None else suffix))


def default_output(clip: Path) -> Path:
    """Beside the input: clip.mp4 -> clip_x4.mp4, frames/ -> frames_x4/, photo.jpg -> photo_x4.png."""
    if clip.is_dir():
        return with_ending(clip.resolve(), "_x4")
    suffix = clip.suffix.lower()
    others = {".webm": ".mkv"} | dict.fromkeys(IMAGE_SUFFIXES, ".mp4" if moves(clip) else ".png")
    return suffixed(clip, "_x4", others.get(suffix, suffix if suffix in VIDEO_FORMATS else ".mp4"))


def clips_in(path: Path) -> list[Path]:
    """The clips that an input names: itself, or, for a folder that holds videos, those without results."""
    found = sorted(path.iterdir()) if path.is_dir() else []
    clips = [p for p in found if p.suffix.lower() in VIDEO_SUFFIXES and not is_hidden(p.name)]
    outputs = [default_output(p) for p in clips]
    results = {p.stem for output in outputs for p in (output, suffixed(output, "_compare"))}
    return [p for p in clips if p.stem not in results] or [path]


# --- Jobs ----------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """Frames `begin` to `end` (None: the last one) of a clip."""

    clip: int
    begin: int
    end: int | None
    parts: int  # that this clip is cut into


def missing_segments(finished: set[int], frames: int) -> list[int]:
    """Numbers of a clip's segments that are to be made. `frames` is a guess: behind the last may be more."""
    count = max(1, math.ceil(frames / SEGMENT), *(n + 1 for n in finished))
    return [n for n in range(count) if n not in finished] + [count] * (count - 1 in finished)


def jobs_for(missing: dict[int, list[int]], processes: int) -> list[Job]:
    """Runs of the segments that each clip (by number) lacks; the last of a clip goes on to its end.

    Each run has to warm up, so there are as few as keep all processes busy: short clips stay whole. For
    several processes the long clips come first.
    """
    longest = math.ceil(sum(map(len, missing.values())) / processes)
    jobs = []
    for clip in sorted(missing, key=lambda clip: -len(missing[clip]) * (processes > 1)):
        runs: list[list[int]] = []
        for n in missing[clip]:
            if not runs or n != runs[-1][-1] + 1 or len(runs[-1]) == longest:
                runs.append([])
            runs[-1].append(n)
        ends = [(run[-1] + 1) * SEGMENT for run in runs[:-1]]
        jobs += [Job(clip, run[0] * SEGMENT, end, len(runs)) for run, end in zip(runs, [*ends, None])]
    return jobs


class Crew:
    """The processes of a torchrun; without torchrun, this one."""

    def __init__(self):
        self.store, self.rank, self.size = shared_store()
        self.store.set_timeout(LONGEST_WAIT)

    def jobs(self, make: Callable[[int], list[Job]]) -> Iterator[Job]:
        """Those that fall to this process, of all that `make` gives the first one for so many processes."""
        if self.rank == 0:
            self.store.set("jobs", json.dumps(make(self.size)))
        jobs = [Job(*job) for job in json.loads(self.store.get("jobs"))]
        while (taken := self.store.add("taken", 1)) <= len(jobs):
            yield jobs[taken - 1]
            self.store.add(f"done {jobs[taken - 1].clip}", 1)
        self.store.add("ready", 1)
        while self.rank == 0 and self.store.add("ready", 0) < self.size:  # or torchrun would end the others
            time.sleep(PAUSE)

    def joins(self, job: Job) -> bool:
        """Whether this process joins the parts of the job's clip. The one that has the last part does, once
        the others, which were taken before, are done; where one has failed, nobody does."""
        if job.parts == 1 or job.end is not None:
            return False
        while self.store.add(f"done {job.clip}", 0) < job.parts - 1:
            time.sleep(PAUSE)
        return not self.store.add(f"failed {job.clip}", 0)

    def fail(self, clip: int) -> None:
        """A clip that cannot be made."""
        if self.store.add(f"failed {clip}", 1) == 1:
            self.store.add("failed", 1)

    def failed(self) -> int:
        """Number of the clips that could not."""
        return self.store.add("failed", 0)
