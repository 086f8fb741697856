"""Artifacts on disk: written whole or not at all, named by what is in them, held by one writer at a time."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drift.errors import InputError


def sha256_of_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: object) -> str:
    """Hex SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_model(folder: Path | str) -> str:
    """Hex SHA-256 over the weights and configurations (``*.safetensors``, ``*.json``) of a diffusers folder."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix in {".safetensors", ".json"} and p != folder / "index.json")
    if not files:
        raise InputError(f"{folder}: no model here (no config.json, no safetensors)")
    return sha256_of_json([[str(p.relative_to(folder)), sha256_of_file(p)] for p in files])


def read_json(path: Path | str) -> dict:
    """Read one JSON object; raises `InputError` if the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as JSON under a temporary name, then rename."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path` (same suffix) that replaces it if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary sibling folder that replaces the folder `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes for its owner alone
        sync_folder(temporary)
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            os.replace(path, retired / "old")
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder to the disk, so that a rename never names half of it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def remove_leftovers(path: Path) -> None:
    """Delete what an interrupted `atomic_folder(path)` left; call only while holding the lock on `path`."""
    # mkdtemp's eight characters, no dot: a sibling named `path` and more may be written by another job.
    for leftover in path.parent.glob(f".{path.name}.????????.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def exclusive(path: Path | str) -> Iterator[None]:
    """Hold the only right to write `path`; raises `InputError` naming the process that has it.

    The lock file stands beside `path`, not in it, because both runners delete outputs before a run. The operating
    system drops the lock with its process, so a killed writer never blocks the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(f".{path.name}.lock")
    with open(lock_path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise InputError(
                f"{path}: {holder} is writing it; wait for that run to end, or stop it, then run this again"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def describe_model(folder: Path | str, kind: str, name: str, **facts: object) -> dict:
    """Write the ``index.json`` of a model folder: what it is, and a digest of its weights that changes with them."""
    index = {"kind": kind, "name": name, "digest": sha256_of_model(folder), **facts}
    write_json(Path(folder) / "index.json", index)
    return index


def model_index(folder: Path | str, kind: str) -> dict:
    """The ``index.json`` of a model folder; raises InputError if it is missing or describes something else."""
    path = Path(folder) / "index.json"
    index = read_json(path)
    if index.get("kind") != kind:
        raise InputError(f"{path}: describes {index.get('kind')!r}, not {kind!r}")
    return index
