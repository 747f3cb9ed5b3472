"""files.py: lists of any size and layout, read once; what is held out does not depend on its neighbours."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import files
from files import Files, held_out, list_files, name_hash
from video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def names_of(source) -> list[str]:
    return sorted(path.name for path in list_files(source, VIDEO_SUFFIXES))


def test_layouts_folder_list_openvid_and_lsdir(tmp_path):
    names = ["b.mp4", "a.mp4", "other.mp4"]
    (tmp_path / "video.1").mkdir()
    for name in names:
        (tmp_path / "video.1" / name).touch()
    assert names_of(tmp_path) == sorted(names)
    (tmp_path / "list.txt").write_text("video.1/b.mp4\n\nvideo.1/other.mp4\n")
    assert set(list_files(tmp_path / "list.txt", VIDEO_SUFFIXES)) == {
        tmp_path / "video.1" / "b.mp4", tmp_path / "video.1" / "other.mp4"
    }  # fmt: skip
    (tmp_path / "data" / "train").mkdir(parents=True)
    table = tmp_path / "data" / "train" / "OpenVid-1M.csv"
    table.write_text('video,caption,frame\nb.mp4,"one, two",80\na.mp4,three,90\nabsent.mp4,,1\n')
    found = set(list_files(table, VIDEO_SUFFIXES))
    assert found == {tmp_path / "video.1" / "a.mp4", tmp_path / "video.1" / "b.mp4"}
    for shard in ("0001000", "X4", "val1"):
        (tmp_path / "lsdir" / shard).mkdir(parents=True)
        (tmp_path / "lsdir" / shard / "0000001.png").touch()
    found = list_files(tmp_path / "lsdir", IMAGE_SUFFIXES)
    assert [p.parent.name for p in found] == ["0001000"]


def test_hidden_files_are_never_data(tmp_path):
    for name in "a.mp4", ".b.mp4", "._a.mp4", "in/c.mp4", "in/._c.mp4", ".hidden/d.mp4":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names_of(tmp_path) == ["a.mp4", "c.mp4"]
    (tmp_path / "list.txt").write_text("a.mp4\n._a.mp4\n")
    assert names_of(tmp_path / "list.txt") == ["a.mp4"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists_may_come_from_windows(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("  one.mp4\r\nzwei ä.mp4 \r\n\r\n".encode(encoding))
    assert names_of(tmp_path / "list.txt") == ["one.mp4", "zwei ä.mp4"]
    (tmp_path / "one.mp4").touch()
    (tmp_path / "list.csv").write_bytes("video,frame\r\none.mp4,80\r\n".encode(encoding))
    assert names_of(tmp_path / "list.csv") == ["one.mp4"]


@pytest.fixture
def indexed(tmp_path, monkeypatch) -> Path:
    """A folder of 12 empty videos in two subfolders, enough for an index, and long since changed."""
    monkeypatch.setattr(files, "INDEXES", tmp_path / "indexes")
    monkeypatch.setattr(files, "INDEXED", 10)
    for k in range(12):
        (tmp_path / "set" / f"part{k % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / f"part{k % 2}" / f"{k} ü.mp4").touch()
    settle(tmp_path / "set")
    return tmp_path / "set"


def settle(folder: Path) -> None:
    for place in folder, *folder.iterdir():
        os.utime(place, (1e9, 1e9 + place.stat().st_nlink))


def test_a_large_set_is_read_once(indexed, monkeypatch):
    first = list(list_files(indexed, VIDEO_SUFFIXES))
    monkeypatch.setattr(files, "names_in", lambda *_: pytest.fail("read again"))
    again = list_files(indexed, VIDEO_SUFFIXES)
    assert isinstance(again.names, np.memmap) and list(again) == first and len(first) == 12
    assert all(path.is_file() for path in first)


def test_a_large_set_is_read_again_when_a_folder_of_it_or_the_list_changes(indexed):
    assert len(list_files(indexed, VIDEO_SUFFIXES)) == 12
    (indexed / "part1" / "new.mp4").touch()
    assert len(list_files(indexed, VIDEO_SUFFIXES)) == 13
    (indexed / "new.mp4").touch()
    assert len(list_files(indexed, VIDEO_SUFFIXES)) == 14
    names = indexed / "list.txt"
    for count in 11, 15, 13:
        names.write_text("".join(f"{k}.mp4\n" for k in range(count)))
        assert len(list_files(names, VIDEO_SUFFIXES)) == count  # just written: its time may be the same again
        os.utime(names, (1e9, 1e9 + count))
        assert len(list_files(names, VIDEO_SUFFIXES)) == len(list_files(names, VIDEO_SUFFIXES)) == count


def test_a_home_that_cannot_be_written_to_is_no_obstacle(indexed, monkeypatch):
    (indexed.parent / "file").touch()
    monkeypatch.setattr(files, "INDEXES", indexed.parent / "file" / "indexes")
    assert len(list_files(indexed, VIDEO_SUFFIXES)) == 12


LIST_COST = """
import os, sys, time
from multiprocessing import get_context
from data import Sources, TrainingClips

def private():
    \"\"\"Bytes that this process shares with no other.\"\"\"
    with open("/proc/self/smaps_rollup") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private"))

def worker(clips, queue):
    before = private()
    for index in range(20000):
        clips.videos[clips.rng(index, 1).integers(len(clips.videos))]
    queue.put(private() - before)

if __name__ == "__main__":
    start, before = time.process_time(), private()
    clips = TrainingClips(Sources(sys.argv[1], "", frames=3, size=32))
    spent, mine = time.process_time() - start, private() - before
    queue = get_context("fork").SimpleQueue()
    get_context("fork").Process(target=worker, args=(clips, queue)).start()
    print(len(clips.videos), spent, mine / 1e6, queue.get() / 1e6)
"""


def list_cost(names: Path) -> tuple[int, float, float, float]:
    """Of a list, in a process of its own: names, CPU seconds to start, MB of memory, and MB of a worker."""
    command = [sys.executable, "-c", LIST_COST, str(names)]
    count, *cost = map(float, subprocess.check_output(command, cwd=ROOT).split())
    return int(count), *cost


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux's account of memory")
def test_a_list_of_a_million_names_starts_in_seconds_and_costs_a_worker_little(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    names = tmp_path / "list.txt"
    video = "OpenVid_part{}/{:.11}_{}_0to{}.mp4\n"
    videos = (video.format(k % 186, name_hash(str(k)).hex(), k % 40, k % 977) for k in range(10**6))
    names.write_text("".join(videos))
    os.utime(names, (1e9, 1e9))
    for _ in "read", "kept":
        count, seconds, main, worker = list_cost(names)
        print(f"{count} names: {seconds:.1f} s, {main:.0f} MB, {worker:.0f} MB a worker")
        assert count == 10**6 and seconds < 10 and worker < 50
    assert seconds < 1 and main < 100


def listed(folder: Path, count: int, suffix: str = ".mp4", name: str = "{:07d}") -> Files:
    """Names in a list of files that need not be there."""
    folder.mkdir(exist_ok=True)
    (folder / "list.txt").write_text("".join(name.format(k) + suffix + "\n" for k in range(count)))
    return list_files(folder / "list.txt", VIDEO_SUFFIXES | IMAGE_SUFFIXES)


def test_one_file_in_five_hundred_is_held_out_and_at_least_eight_where_there_are_enough(tmp_path):
    for count, least, most in (0, 0, 0), (3, 0, 0), (12, 3, 3), (35, 8, 8), (500, 8, 12), (50_000, 60, 140):
        held = held_out(listed(tmp_path / "videos", count), VIDEO_SUFFIXES, "")
        assert least <= len(held) <= most and len(set(held)) == len(held)


def test_other_files_and_folders_do_not_change_what_is_held_out_of_a_large_set(tmp_path):
    few = {p.name for p in held_out(listed(tmp_path / "few", 20_000), VIDEO_SUFFIXES, "")}
    more = {p.name for p in held_out(listed(tmp_path / "more", 30_000), VIDEO_SUFFIXES, "")}
    there = listed(tmp_path / "moved", 20_000, name="elsewhere/{:07d}")
    moved = {p.name for p in held_out(there, VIDEO_SUFFIXES, "")}
    assert few == moved and few < more and {name for name in more if int(name[:-4]) < 20_000} == few


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the sample data in ../shared/data")
def test_the_shipped_weights_list_shares_no_source_with_training():
    """Of the list behind weights/compact: what these files show is in no other file of the sample data."""
    validation = str(ROOT / "weights" / "compact" / "held_out.txt")
    videos, images = (SHARED / f"train_{kind}" for kind in ("videos", "images"))
    held, trained, sources = set(), set(), {"park", "bee", "train"}
    for folder, suffixes in (videos, VIDEO_SUFFIXES), (images, IMAGE_SUFFIXES):
        there = list_files(folder, suffixes)
        out = held_out(there, suffixes, validation)
        held |= {p.name for p in out}
        trained |= {p.name for p in there} - {p.name for p in out}
    assert len(held) == 19 and {name.split("_")[0] for name in held if "mp4" in name} == sources
    assert not {name.split("_")[0] for name in trained if "mp4" in name} & sources
