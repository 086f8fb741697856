"""What every stage shares: its command line, one-line errors, the lock on what it writes, its wall time, provenance."""

import argparse
import errno
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from drift.artifacts import exclusive, write_json
from drift.errors import InputError

#: What a stage exits with after a user's mistake (argparse uses the same).
EXIT_INPUT = 2
#: Wall seconds by stage and output: side notes that no rule depends on, so that timings never make artifacts differ.
TIMINGS = Path("logs/timings")

_REPORTED_PACKAGES = ("torch", "diffusers", "accelerate", "clean-fid", "torch-fidelity", "scikit-image", "numpy")
_DISK_ERRORS = {
    errno.ENOENT: "no such file",
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large for this disk or its limits",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "read-only file system",
    errno.EISDIR: "is a folder",
    errno.ENOTDIR: "is not a folder",
    errno.EEXIST: "is in the way",
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the stage's own docstring; every stage reads ``--params``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--params", type=Path, default=Path("params.yaml"), help="parameter file (default: params.yaml)")
    return made


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`: a user's mistake ends in one line and exit status 2, without a traceback."""
    quiet_libraries()
    name = main.__globals__["__spec__"].name.rpartition(".")[2]
    try:
        main()
    except InputError as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = error.filename2 or error.filename or "output"
        print(f"{name}: error: {where}: {_DISK_ERRORS[error.errno]}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def quiet_libraries() -> None:
    """Keep third-party notices off the terminal: what a stage prints should be worth reading."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def writing(stage: str, output: Path) -> Iterator[None]:
    """Hold the lock on `output` and note the wall seconds of the stage when it succeeds."""
    with exclusive(output):
        started = time.perf_counter()
        with naming_disk_errors(output):
            yield
        seconds = time.perf_counter() - started
    write_json(timing_path(stage, output), {"stage": stage, "output": str(output), "wall_seconds": round(seconds, 2)})


@contextmanager
def naming_disk_errors(output: Path) -> Iterator[None]:
    """Make every way in which a full disk shows an OSError that names a file.

    A write through an open file has no name in its error, safetensors wraps the system's error, torch.save hides it.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(output)
        raise
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None and not re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise
        raise OSError(int(number[1]) if number else errno.ENOSPC, "", str(output)) from None


def timing_path(stage: str, output: Path) -> Path:
    return TIMINGS / f"{stage}-{str(output).strip('/').replace('/', '-')}.json"


def wall_seconds(outputs: dict[str, Path]) -> dict[str, float | None]:
    """Noted wall seconds of ``{stage: output}``; None where the stage ran elsewhere."""
    seconds = {}
    for stage, output in outputs.items():
        path = timing_path(stage, output)
        seconds[stage] = json.loads(path.read_text())["wall_seconds"] if path.exists() else None
    return seconds


def progress(items: Iterable | None = None, *, total: int | None, unit: str, description: str) -> tqdm:
    """A progress bar with rate and time left; rare lines where the output is a log, not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    options = {"mininterval": interval, "maxinterval": interval, "dynamic_ncols": sys.stderr.isatty()}
    return tqdm(items, total=total, unit=unit, desc=description, smoothing=0.05, **options)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    packages = {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES}
    return {"python": platform.python_version(), **packages}


def provenance(parameters: dict, data_digest: str, seed: int) -> dict:
    """What a report says of its origin."""
    return {
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": parameters,
        "data_digest": data_digest,
        "seed": seed,
        "versions": versions(),
        "device": device_name(),
        "runner": runner(),
    }


def git_commit() -> str | None:
    """The commit checked out here, ``+changes`` appended if tracked files differ from it; None outside git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ":!dvc.lock"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit


def device_name() -> str:
    """The GPU's name, or the processor's with its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def runner() -> str:
    """Which runner started this stage: each sets a variable of its own."""
    if "DVC_STAGE" in os.environ:
        return "dvc"
    return "snakemake" if os.environ.get("DRIFT_RUNNER") == "snakemake" else "command line"
