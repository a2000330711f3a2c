"""Writers leave the old content or the new; readers name the damaged file; a folder belongs to one run."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch

from fastff import io
from fastff.errors import CheckpointError, FileError, TrainingError
from fuzzing import error_of, mutations, put

WRITERS = {
    "bytes": lambda path, k: io.write_bytes(path, b"x" * k),
    "text": lambda path, k: io.write_text(path, "é" * k),
    "json": lambda path, k: io.write_json(path, {"k": k}),
    "array": lambda path, k: io.write_array(path, np.arange(k)),
    "torch": lambda path, k: io.write_torch(path, {"k": torch.arange(k)}),
    "tensors": lambda path, k: io.write_tensors(path, {"k": torch.arange(k)}, {"format": "pt"}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(kind, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    WRITERS[kind](path, 3)
    old = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=f"cannot write {path}: No space left on device"):
            WRITERS[kind](path, 4)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    WRITERS[kind](path, 4)
    assert path.read_bytes() != old


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_the_system_cuts_short_is_a_file_error_whoever_writes(kind, tmp_path):
    """As on a full disk; torch and safetensors report it under names of their own."""
    path = tmp_path / "file"
    WRITERS[kind](path, 3)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(FileError, match=f"cannot write {path}"):
            WRITERS[kind](path, 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_readers_give_back_what_writers_wrote(tmp_path):
    path = tmp_path / "file"
    io.write_json(path, {"a": [1, "é"]})
    assert io.read_json(path, needs={"a": list}) == {"a": [1, "é"]}
    io.write_array(path, np.arange(5))
    assert io.read_array(path).tolist() == [0, 1, 2, 3, 4]
    io.write_torch(path, {"w": torch.arange(3.0)})
    assert io.read_torch(path, needs={"w": torch.Tensor})["w"].tolist() == [0, 1, 2]
    io.write_tensors(path, {"w": torch.arange(3.0)})
    assert io.read_tensors(path)["w"].tolist() == [0, 1, 2]


def test_a_file_error_is_of_both_kinds_that_callers_catch():
    assert issubclass(FileError, CheckpointError)
    assert issubclass(FileError, TrainingError)


READERS = {
    "json": (io.read_json, lambda path: io.write_json(path, {"k": [1, 2, 3]})),
    "array": (io.read_array, lambda path: io.write_array(path, np.arange(9))),
    "torch": (io.read_torch, lambda path: io.write_torch(path, {"k": torch.arange(9)})),
    "tensors": (io.read_tensors, lambda path: io.write_tensors(path, {"k": torch.arange(9)})),
    "lines": (io.read_json_lines, lambda path: io.append_json_line(path, {"k": 1})),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_cut_short_or_missing_is_named_with_what_to_do(kind, tmp_path):
    read, write = READERS[kind]
    path = tmp_path / "file"
    with pytest.raises(FileError, match=f"{path} is missing"):
        read(path)
    write(path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, max(1, len(whole) // 50)):
        path.write_bytes(whole[:size])
        if kind == "lines":
            assert read(path) == []  # of a line that a kill cut short nothing is used
            continue
        with pytest.raises(FileError, match=f"{path} is damaged .*: begin anew"):
            read(path, remedy="begin anew")


@pytest.mark.parametrize("kind", READERS)
def test_a_changed_file_gives_content_or_a_file_error(kind, tmp_path):
    read, write = READERS[kind]
    path = tmp_path / "file"
    write(path)
    for damaged in mutations(path.read_bytes(), 400, seed=5):
        put(path, damaged)
        error = error_of(lambda: read(path))
        assert error is None or (isinstance(error, FileError) and str(path) in str(error)), damaged


def test_json_of_another_kind_is_damaged(tmp_path):
    path = tmp_path / "file.json"
    for content, what in (([], "list"), ({}, "'k'"), ({"k": "1"}, "'1', expected int"), ({"k": True}, "expected int")):
        io.write_json(path, content)
        with pytest.raises(FileError, match=what):
            io.read_json(path, needs={"k": int})


def test_an_append_goes_on_after_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "lines"
    io.append_json_line(path, {"k": 1})
    with path.open("a") as file:
        file.write('{"k": 2')
    assert io.read_json_lines(path) == [{"k": 1}]
    io.append_json_line(path, {"k": 3})
    assert io.read_json_lines(path) == [{"k": 1}, {"k": 3}]


KILLED = """
import sys, time
from pathlib import Path
from fastff import io
with io.replacing(Path(sys.argv[1])) as file, io.replacing_folder(Path(sys.argv[2])) as folder:
    file.write(b"new")
    (folder / "a").write_text("new")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    file, folder = tmp_path / "tokens.bin", tmp_path / "model"
    io.write_text(file, "old")
    writer = subprocess.Popen([sys.executable, "-c", KILLED, file, folder], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    (tmp_path / ".tokens.bin.17.tmp").write_text("of the version before")
    io.remove_stale(tmp_path)
    assert len(list(tmp_path.glob(".*.tmp"))) == 2, "both are being written"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    io.write_text(file, "newer")
    assert [path.name.startswith(".model.") for path in tmp_path.glob(".*.tmp")] == [True], "only its own are removed"
    with io.replacing_folder(folder) as new:
        (new / "a").write_text("newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokens.bin"]
    assert (folder / "a").read_text() + file.read_text() == "newernewer"


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    with io.replacing_folder(folder) as new:
        (new / "a").write_text("old")
    with pytest.raises(FileError, match=f"cannot write {folder}"), io.replacing_folder(folder) as new:  # noqa: PT012
        (new / "a").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder, replace, refused = tmp_path / "model", os.replace, []

    def once(source, target):
        if target == folder and not refused:
            refused.append(source)
            raise OSError(errno.EPERM, "Operation not permitted")
        replace(source, target)

    with io.replacing_folder(folder) as new:
        (new / "a").write_text("old")
    monkeypatch.setattr(os, "replace", once)
    monkeypatch.setattr(io, "_exchange", lambda *_: False)  # as on a disk that cannot
    with pytest.raises(FileError, match="the old one is unchanged"), io.replacing_folder(folder) as new:
        (new / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_a_kill_while_a_folder_takes_its_place_leaves_the_old_one_or_the_new(tmp_path, monkeypatch):
    """There is no moment without a folder: names are swapped in one step."""
    folder = tmp_path / "model"
    with io.replacing_folder(folder) as new:
        (new / "a").write_text("old")

    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with io.replacing_folder(folder) as new:
        (new / "a").write_text("new")
    assert (folder / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_belongs_to_one_run(tmp_path):
    out = tmp_path / "out"
    run = {"text": ("a", "b"), "out": out, "steps": 8, "seconds": 4}
    assert not io.claim(out, run)
    (out / ".x.9.tmp").write_text("")
    assert io.claim(out, run)
    assert not (out / ".x.9.tmp").exists()
    assert io.claim(out, {**run, "seconds": 5, "new option": None}, free=("seconds",))
    with pytest.raises(FileError, match=r"out holds another run: steps 8 there, 9 asked for; text \['a', 'b'\] there"):
        io.claim(out, {**run, "steps": 9, "text": ["a"]})
    (out / io.SETTINGS).write_text("{")
    with pytest.raises(FileError, match=r"settings\.json is damaged"):
        io.claim(out, run)


def test_locks_that_the_file_system_does_not_have_cost_no_file(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(io.fcntl, "flock", unsupported)
    (tmp_path / ".file.9.tmp").write_text("whose, nobody can say")
    io.write_json(tmp_path / "file", {"k": 1})
    assert json.loads((tmp_path / "file").read_text()) == {"k": 1}
    assert (tmp_path / ".file.9.tmp").exists()


@pytest.mark.parametrize("kind", WRITERS)
def test_the_file_that_is_published_is_the_one_that_was_brought_to_the_disk(kind, tmp_path, monkeypatch):
    """safetensors puts another file in the place of the one that it is given, which only its owner may read."""
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), fsync(handle)))
    (tmp_path / "plain").touch()
    WRITERS[kind](tmp_path / "file", 10)
    found = (tmp_path / "file").stat()
    assert found.st_ino in synced
    assert found.st_mode == (tmp_path / "plain").stat().st_mode


@dataclass
class Inner:
    sizes: tuple[float, ...]


@dataclass
class Outer:
    name: str
    inner: Inner
    by_number: dict[int, Inner]
    flag: bool = False
    count: int | None = None


def test_a_dataclass_comes_back_from_json():
    whole = Outer("a", Inner((1.0, 2.0)), {3: Inner(())}, True, 4)
    assert io.restored(Outer, json.loads(json.dumps(asdict(whole)))) == whole
    assert io.restored(Outer, {"name": "a", "inner": {"sizes": [1]}, "by_number": {}}).inner.sizes == (1.0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "it.name is 1, expected str"),
        ({"count": True}, "it.count is True, expected int"),
        ({"count": 1.5}, "it.count is 1.5, expected int"),
        ({"flag": 1}, "it.flag is 1, expected bool"),
        ({"inner": {"sizes": [float("inf")]}}, "it.inner.sizes[0] is inf, expected a finite number"),
        ({"inner": {}}, "it.inner has ; missing or unknown: sizes"),
        ({"inner": []}, "it.inner is [], expected Inner"),
        ({"by_number": {"x": {"sizes": []}}}, "it.by_number has the name 'x', expected a whole number"),
        ({"more": 1}, "missing or unknown: more"),
    ],
)
def test_json_that_is_not_of_a_dataclass_is_refused_with_the_name_of_the_value(change, message):
    whole = {"name": "a", "inner": {"sizes": []}, "by_number": {}}
    with pytest.raises(ValueError, match=re.escape(message)):
        io.restored(Outer, {**whole, **change})


def test_a_removal_that_is_cut_off_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")

    def cut_off(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(io.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            io.remove_folder(folder)
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    io.remove_stale(tmp_path, "work")
    assert not list(tmp_path.iterdir())
