"""Files: written so that a crash or a full disk leaves the old content or the new, read so that damage is told.

Every writer raises FileError with what was there before unchanged; every reader raises FileError that names the file
and what to do. A kill between the two leaves a temporary `.NAME.PID.tmp` beside the file: the next writer of that file,
or `remove_stale`, takes it away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import stat
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fastff.errors import CheckpointError, FileError, TrainingError

if TYPE_CHECKING:
    import numpy as np
    import torch

T = TypeVar("T")

SETTINGS = "settings.json"
REMEDY = "remove it and run the same command again"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures of the disk in the block as FileError; torch and safetensors report theirs under names of their own."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}; the old one is unchanged") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError" or (isinstance(error, RuntimeError) and _of_disk(error)):
            raise FileError(f"cannot write {path}: {error}; the old one is unchanged") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path`, brought to the disk, when the block ends without an error.

    Libraries that write to a path are given the file's `name`. Raises FileError if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        file = _locked(_temporary(path))
        try:
            with file:
                yield file
                file.flush()
                # safetensors puts a file of its own, closed to others, in the place of the one that it is given.
                os.chmod(file.name, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
                sync(Path(file.name))
                os.replace(file.name, path)
            sync(path.parent)
        finally:
            # Tidying up after a failed write may fail for the reason that is being reported.
            with suppress(OSError):
                os.unlink(file.name)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path`, its files brought to the disk, when the block ends without an error.

    Raises FileError if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        folder = _temporary(path)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH)
            yield folder
            publish(folder, path)
        finally:
            os.close(handle)
            shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Bring a folder's files to the disk and give it the name `target`, instead of what is there. Raises OSError."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
    if target.exists() and _exchange(folder, target):
        shutil.rmtree(folder, ignore_errors=True)
    elif target.exists():
        # Moved away first: the time without a folder is that of a rename, not of removing many files.
        former = _temporary(target)
        os.replace(target, former)
        try:
            os.replace(folder, target)
        except OSError:
            with suppress(OSError):  # another writer's folder may be there by now
                os.replace(former, target)
            raise
        shutil.rmtree(former, ignore_errors=True)
    else:
        os.replace(folder, target)
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder whose name is free in one step: after a kill `remove_stale` finds the rest. Raises OSError."""
    former = _temporary(folder)
    os.replace(folder, former)
    shutil.rmtree(former)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that a kill loses neither; False where the system or the disk cannot."""
    swap: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's list of names, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale(folder: Path, name: str = "*") -> None:
    """Remove the temporaries that killed writers of `name` (default: of any file) left in a folder.

    One that a running process, on this machine or on another, still writes is locked, and stays.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Replace a UTF-8 file."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file. Raises ValueError for a number that is not finite."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Replace a .npy file."""
    import numpy as np

    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def write_torch(path: Path, state: Any) -> None:
    """Replace a file of `torch.save`."""
    import torch

    with replacing(path) as file:
        torch.save(state, file)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file."""
    from safetensors.torch import save_file

    with replacing(path) as file:
        save_file(tensors, file.name, metadata)


@contextmanager
def reading(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Every failure of the block as FileError: what a damaged file makes the libraries raise is of many kinds, and some
    of what they say about it is advice to trust the file."""
    try:
        yield
    except (CheckpointError, TrainingError):  # they say it already
        raise
    except MemoryError as error:
        raise FileError(f"cannot read {path}: it asks for more memory than there is") from error
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EISDIR, errno.EIO, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        raise FileError(f"{path} is damaged ({error}): {remedy}") from error
    except Exception as error:
        what = str(error) if type(error) is ValueError or isinstance(error, UnicodeError) else type(error).__name__
        if isinstance(error, json.JSONDecodeError):
            what = f"not JSON: {error}"
        raise FileError(f"{path} is damaged ({what}): {remedy}") from error


def read_json(path: Path, *, needs: Mapping[str, type] | None = None, remedy: str = REMEDY) -> Any:
    """Content of a JSON file. needs: the names, and types, without which its object is of no use."""
    with reading(path, remedy):
        content = json.loads(path.read_text(encoding="utf-8"))
        _check(content, needs)
    return content


def read_json_lines(path: Path, *, remedy: str = REMEDY) -> list[dict[str, Any]]:
    """The objects of a file to which `append_json_line` wrote; a last line that a kill cut short is left out."""
    with reading(path, remedy):
        lines = path.read_text(encoding="utf-8").split("\n")
        content = [json.loads(line) for line in lines[:-1]]
        for number, line in enumerate(content, 1):
            if not isinstance(line, dict):
                raise ValueError(f"line {number} is {type(line).__name__}, expected an object")
    return content


def append_json_line(path: Path, content: dict[str, Any]) -> None:
    """Add an object to a file of lines, brought to the disk. What a kill cut short at its end is dropped first."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def restored(kind: type[T], content: Any, what: str = "it") -> T:
    """A dataclass from what `asdict` gave, through JSON: the fields' types are checked, lists become tuples again.

    Raises ValueError that names the field, for `reading` to say in which file."""
    restore: Callable[..., T] = _restored
    return restore(kind, content, what)


def _restored(kind: Any, content: Any, what: str) -> Any:
    origin, of = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return content
    if origin in (Union, types.UnionType):
        # Of the unions in use, every one is of None and another.
        return None if content is None else _restored(next(a for a in of if a is not type(None)), content, what)
    if origin is tuple:
        return tuple(_restored(list[of[0]], content, what))  # type: ignore[valid-type]
    plain = dict if is_dataclass(kind) else origin
    number = kind is float and type(content) is int
    if not (number or isinstance(content, plain)) or (isinstance(content, bool) and kind is not bool):
        raise ValueError(f"{what} is {content!r:.80}, expected {getattr(kind, '__name__', kind)}")
    if kind is float and not math.isfinite(content):
        raise ValueError(f"{what} is {content}, expected a finite number")
    if is_dataclass(kind):
        return _restored_dataclass(kind, content, what)
    if origin is list and of:
        return [_restored(of[0], value, f"{what}[{k}]") for k, value in enumerate(content)]
    if origin is dict and of:
        return {_key(of[0], name, what): _restored(of[1], value, f"{what}[{name}]") for name, value in content.items()}
    return float(content) if number else content


def _restored_dataclass(kind: Any, content: dict[str, Any], what: str) -> Any:
    hints = _hints_of(kind)
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if wrong := needed - set(content) | set(content) - {f.name for f in fields(kind)}:
        raise ValueError(f"{what} has {', '.join(sorted(content))}; missing or unknown: {', '.join(sorted(wrong))}")
    return kind(**{name: _restored(hints[name], value, f"{what}.{name}") for name, value in content.items()})


_hints_of = functools.cache(get_type_hints)


def _key(kind: Any, name: str, what: str) -> Any:
    """JSON's objects have strings for keys."""
    if kind is int and not name.lstrip("-").isdecimal():
        raise ValueError(f"{what} has the name {name!r:.80}, expected a whole number")
    return kind(name)


def read_array(path: Path, *, remedy: str = REMEDY) -> np.ndarray[Any, Any]:
    """The array of a .npy file."""
    import numpy as np

    with reading(path, remedy):
        array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    return array


def read_torch(path: Path, *, needs: Mapping[str, type] | None = None, device: Any = None, remedy: str = REMEDY) -> Any:
    """What `write_torch` wrote, tensors on `device`; nothing in it is executed. needs: as in `read_json`."""
    import torch

    with reading(path, remedy):
        state = torch.load(path, map_location=device, weights_only=True)
        _check(state, needs)
    return state


def read_tensors(path: Path, *, remedy: str = REMEDY) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name."""
    from safetensors.torch import load_file

    with reading(path, remedy):
        tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with reading(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
    return found.hexdigest()


def claim(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    name: str = SETTINGS,
    free: Iterable[str] = (),
    upgrade: Callable[[Any], Any] = lambda kept: kept,
) -> bool:
    """Make a folder that of the run `identity`; returns whether it already holds that run's state.

    identity is kept in `folder`/`name`; `free` of it may differ; `upgrade` turns one that an earlier version kept into
    one of this. Raises FileError, naming each difference, for a folder
    that another run has claimed, or with a damaged `name`. Stale temporaries are removed.
    """
    path = folder / name
    remove_stale(folder)
    if path.is_file():
        differing = differences(upgrade(read_json(path, needs={})), identity, free=free)
        if differing:
            raise FileError(f"{folder} holds another run: {'; '.join(differing)}. Choose another folder, or empty it")
        return True
    write_json(path, _as_stored(identity))
    return False


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Within the context no other process is in this context with the same folder, which exists.

    Raises FileError, saying `what` another one does there, if one is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(f"another process {what} {folder}") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any], *, free: Iterable[str] = ()) -> list[str]:
    """What a run on disk and the one asked for do not share, in words; `asked` is compared as JSON would hold it."""
    now = _as_stored(asked)
    return [
        f"{name} {kept.get(name)!r} there, {now.get(name)!r} asked for"
        for name in sorted({*kept, *now} - set(free))
        if kept.get(name) != now.get(name)
    ]


def _as_stored(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON holds it: tuples are lists, paths are strings."""
    stored: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return stored


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(3).hex()}.tmp")


def _locked(path: Path) -> IO[bytes]:
    """A new file under a lock, by which `remove_stale` knows that its writer lives."""
    while True:
        file = path.open("wb")
        with suppress(OSError):  # a file system without locks: nothing there is stale either
            fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:  # not removed between opening and locking
            return file
        file.close()


def _check(content: Any, needs: Mapping[str, type] | None) -> None:
    if needs is None:
        return
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, expected an object")
    for name, kind in needs.items():
        if name not in content:
            raise ValueError(f"it lacks {name!r}")
        value = content[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"its {name} is {value!r:.80}, expected {kind.__name__}")


def _of_disk(error: RuntimeError) -> bool:
    return "PytorchStreamWriter" in str(error) or "file write" in str(error)
