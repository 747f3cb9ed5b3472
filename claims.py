"""The paper's claims in small: the rows of its ablation tables on the compact student, three seeds each.

    python cache.py --preset tiny --videos FOLDER --images FOLDER
    python claims.py --videos FOLDER --images FOLDER

    ROWS --(train_stage1.py or train_stage2.py --preset compact, quality.py)--> docs/claims/ROW_SEED.json
         --(CLAIMS, the rule in `verdict`)--> the tables of docs/claims.md, printed

Whatever has its JSON file is not trained again, and a training that was interrupted goes on. All rows of a
stage share one recipe, RECIPE, chosen on the full scheme alone: the losses are the paper's, without compact's
`Anchors`.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import tyro

import quality
from quality import MEASURES
from runtime import UserError, complete, run
from training import newest_checkpoint

ROOT = Path(__file__).parent
STAGE1 = ROOT / "weights" / "compact-stage1"  # where all rows of stage 2 begin


# fmt: off
@dataclass(frozen=True)
class Args:
    videos: str = ""             # as in training
    images: str = ""
    validation: str = ""
    seeds: int = 3               # of each row
    rows: tuple[str, ...] = ()   # these alone, by name
    clips: int = 8               # held-out clips that score a row
    flags: str = ""              # more flags of both train scripts
    out: str = "docs/claims"     # one JSON file a row and seed
    runs: str = "runs/claims"    # their trainings
    picture: str = ""            # a PNG of all rows, seed 0: frames above rows over time (Paper: Fig. 5-7)


# ------------------------------------------------------------------------------------------------------
# What is trained: name, the flags that make it, and what the paper's tables say of it

RECIPE = {
    1: "--steps 300 --halve-at 200 260 --lambda-2d 0 --lambda-warp 0",
    2: f"--steps 300 --halve-at 240 --lambda-2d 0 --lambda-warp 0 --init {STAGE1}",
}


class Row(NamedTuple):
    stage: int
    flags: str
    paper: dict[str, float]


ROWS = {
    # Paper: Table 5 (and 2, by DISTS: .2418 against .2112)
    "2D":              Row(1, "--temporal none",         {"LPIPS": 0.3625, "E*_warp": 5.84}),
    "2D + 1D":         Row(1, "--temporal layer",        {"LPIPS": 0.3282, "E*_warp": 1.59}),
    "doubled":         Row(1, "--temporal double",       {"LPIPS": 0.3215, "E*_warp": 1.68}),
    "attention":       Row(1, "--temporal attention",    {"LPIPS": 0.3391, "E*_warp": 2.08}),
    # Paper: Tables 3 and 7, on two test sets: in Table 3 the full scheme has .6861 and 2.22
    "full scheme":     Row(2, "",                        {"CLIPIQA": 0.6818, "E*_warp": 1.67}),
    "single head":     Row(2, "--labels single",         {"CLIPIQA": 0.6745, "E*_warp": 6.32}),
    "no types 3, 5":   Row(2, "--labels three_types",    {"CLIPIQA": 0.6521, "E*_warp": 5.92}),
    "videos detailed": Row(2, "--labels detailed_video", {"CLIPIQA": 0.6703, "E*_warp": 1.98}),
    # Paper: Table 6, where the full scheme, 192 : 64, has 72.95 and 3.28
    "256 : 0":         Row(2, "--heads 256 0",           {"MUSIQ": 73.10, "E*_warp": 8.85}),
    "128 : 128":       Row(2, "--heads 128 128",         {"MUSIQ": 70.80, "E*_warp": 3.22}),
    "64 : 192":        Row(2, "--heads 64 192",          {"MUSIQ": 68.39, "E*_warp": 3.15}),
    "0 : 256":         Row(2, "--heads 0 256",           {"MUSIQ": 65.21, "E*_warp": 3.18}),
}

# ------------------------------------------------------------------------------------------------------
# What is claimed: `less` has less of `measure` than `more`; or, with at_most, no more of it


class Claim(NamedTuple):
    table: str
    says: str
    measure: str
    less: str
    more: str
    at_most: bool = False


CLAIMS = (
    Claim("2, 5", "without time, further from the target",   "PSNR",     "2D", "2D + 1D"),
    Claim("2, 5", "1D blocks take the flicker",              "E*_warp",  "2D + 1D", "2D"),
    Claim("2, 5", "and the frames look better",              "distance", "2D + 1D", "2D"),
    Claim("5",    "doubling them makes nothing steadier",    "E*_warp",  "2D + 1D", "doubled", True),
    Claim("5",    "nor better to look at",                   "distance", "2D + 1D", "doubled", True),
    Claim("5",    "attention along time is less steady",     "E*_warp",  "2D + 1D", "attention"),
    Claim("5",    "and not better to look at",               "distance", "2D + 1D", "attention", True),
    Claim("3",    "one head flickers more than two",         "E*_warp",  "full scheme", "single head"),
    Claim("3",    "and two cost no quality",                 "distance", "full scheme", "single head", True),
    Claim("7",    "without types 3 and 5 more flicker",      "E*_warp",  "full scheme", "no types 3, 5"),
    Claim("7",    "and frames look worse",                   "distance", "full scheme", "no types 3, 5"),
    Claim("7",    "videos labelled as detailed cost detail", "detail",   "videos detailed", "full scheme"),
    Claim("6",    "a detail head alone flickers most",       "E*_warp",  "full scheme", "256 : 0"),
    Claim("6",    "a consistency head alone has less detail","detail",   "0 : 256", "full scheme"),
    Claim("6",    "64 channels for detail give less than 192","detail",   "64 : 192", "full scheme"),
)
# fmt: on

Scores = dict[str, list[dict[str, float]]]  # of each row, one of each seed


def verdict(claim: Claim, scores: Scores) -> str:
    """*holds here* where every seed of one row is below every seed of the other, *does not* where it is
    above, otherwise *undecided*. That a row has at most as much holds unless it is above."""
    less, more = ([s[claim.measure] for s in scores[row]] for row in (claim.less, claim.more))
    apart = "below" if max(less) < min(more) else "above" if min(less) > max(more) else ""
    between = "holds here" if claim.at_most else "undecided"
    return {"below": "holds here", "above": "does not", "": between}[apart]


# ------------------------------------------------------------------------------------------------------


def train(row: str, seed: int, args: Args) -> Path:
    """The checkpoint at the end of a row's training. Raises `UserError` where it fails."""
    stage, flags, _ = ROWS[row]
    out = Path(args.runs) / file_name(row, seed)
    command = [sys.executable, ROOT / f"train_stage{stage}.py", "--preset", "compact"]
    command += [*shlex.split(f"{RECIPE[stage]} {flags} {args.flags}")]
    command += ["--seed", str(seed), "--out", out]
    for name in "videos", "images", "validation":
        command += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    if subprocess.run(command).returncode:
        raise UserError(f"{out}: training failed, see above; the same command goes on")
    return newest_checkpoint(out)


def file_name(row: str, seed: int) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in row).split()) + f"_{seed}"


def measured(checkpoints: dict[str, Path], args: Args, picture: str = "") -> dict[str, dict[str, float]]:
    """The scores of students, by name: on held-out clips where there are any, else on procedural ones."""
    given = dict(videos=args.videos, images=args.images, validation=args.validation, clips=args.clips)
    asked = quality.Args(weights=tuple(map(str, checkpoints.values())), picture=picture, **given)
    clips = list(islice(quality.unseen_clips(asked), args.clips))
    means = quality.measure(clips, asked)
    kind = clips[0][0]
    return {row: dict(zip(MEASURES, map(float, means[kind, str(c)]))) for row, c in checkpoints.items()}


def once(file: Path, work: Callable[[], dict]) -> dict:
    """What the JSON file holds, made by work() if there is none."""
    if not file.is_file():
        result = work()
        with complete(file) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(file.read_text())


def scores_of(row: str, seed: int, args: Args) -> dict[str, float]:
    def work() -> dict[str, float]:
        checkpoint = train(row, seed, args)
        return {"row": row, "seed": seed} | measured({row: checkpoint}, args)[row]

    return once(Path(args.out) / f"{file_name(row, seed)}.json", work)


def tables(scores: Scores) -> str:
    """The rows and the verdicts as two Markdown tables: means over seeds, and half their range."""

    def cell(row: str, measure: str) -> str:
        values = [s[measure] for s in scores[row]]
        return f"{sum(values) / len(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"

    lines = [f"| | {' | '.join(MEASURES)} | the paper |", "|---" * (len(MEASURES) + 2) + "|"]
    for row in scores:
        paper = ", ".join(f"{measure} {value:g}" for measure, value in ROWS[row].paper.items())
        lines.append(f"| {row} | {' | '.join(cell(row, m) for m in MEASURES)} | {paper} |")
    lines += ["", "| table | the paper says | measure | verdict |", "|---|---|---|---|"]
    for claim in CLAIMS:
        if {claim.less, claim.more} <= scores.keys():
            sides = f"{claim.less} {'at most' if claim.at_most else 'below'} {claim.more}"
            lines.append(
                f"| {claim.table} | {claim.says} | {claim.measure}: {sides} | *{verdict(claim, scores)}* |"
            )
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if unknown := set(args.rows) - ROWS.keys():
        raise UserError(f"--rows {', '.join(unknown)}: give some of {', '.join(ROWS)}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    scores = {}
    for seed in range(args.seeds):  # so that an early end has all rows of the first seeds
        for row in args.rows or ROWS:
            scores.setdefault(row, []).append(scores_of(row, seed, args))
    print(tables(scores))
    if args.picture:
        runs = {row: newest_checkpoint(Path(args.runs) / file_name(row, 0)) for row in scores}
        measured(runs, args, args.picture)


if __name__ == "__main__":
    run(main)
