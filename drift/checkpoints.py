"""Checkpoints of a training run: written whole, newest found first, told apart by what is trained.

Local and trusted (Accelerate's own format holds pickled optimizer state); weights that travel are safetensors.
"""

import csv
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from drift.artifacts import sync_folder, write_json

#: Checkpoints kept: should the newest be damaged, deleting it brings back the one before.
KEEP = 2


class Checkpoints:
    """``<folder>/<identity>/step-<n>`` of one run; another identity (other parameters or inputs) is another run.

    Args:
        folder: of all checkpoints of a run's name.
        identity: digest of everything that decides the training.
        accelerator: whose prepared and registered objects are saved and loaded, on every process.
    """

    def __init__(self, folder: Path | str, identity: str, accelerator: Accelerator):
        self.folder = Path(folder) / identity[:16]
        self.accelerator = accelerator

    def load_newest(self) -> list[dict[str, float]]:
        """Load the newest checkpoint, if there is one; returns the history saved with it."""
        steps = self._steps()
        if not steps:
            return []
        newest = self.folder / f"step-{steps[-1]:08d}"
        self.accelerator.load_state(str(newest))
        return read_history(newest / "history.csv")

    def save(self, step: int, history: list[dict[str, float]]) -> None:
        """Save under a temporary name, rename, then drop all but the newest two."""
        final, temporary = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}.tmp"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(temporary), safe_serialization=True)
            self.accelerator.wait_for_everyone()
            if main:
                write_history(temporary / "history.csv", history)
                write_json(temporary / "checkpoint.json", {"step": step})
                sync_folder(temporary)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
                for old in self._steps()[:-KEEP]:
                    shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        finally:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)

    def remove(self) -> None:
        """Delete this run's checkpoints, once its result is safe."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Rows of equal keys as CSV, every float with all its digits."""
    with open(path, "w", newline="") as file:
        if history:
            writer = csv.DictWriter(file, fieldnames=list(history[0]))
            writer.writeheader()
            writer.writerows({k: repr(v) for k, v in row.items()} for row in history)


def read_history(path: Path) -> list[dict[str, float]]:
    """Inverse of `write_history`."""
    with open(path, newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)
