"""The pictures beside a report: people look before they read."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from drift.artifacts import atomic_file

matplotlib.use("Agg")
STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def training_curves(history: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Drift norms per temperature and per feature group (log axes), gradient norm, against images seen."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        seen = [row["images_seen"] for row in history]
        norms = [name for name in history[0] if name.startswith("drift_norm_")]
        by_tau = [name for name in norms if name.startswith("drift_norm_tau_")]
        for name in by_tau:
            label = f"τ = {name.removeprefix('drift_norm_tau_')}"
            axes[0].plot(seen, [row[name] for row in history], label=label, linewidth=1)
        for name in (n for n in norms if n not in by_tau):
            axes[1].plot(seen, [row[name] for row in history], label=name.removeprefix("drift_norm_"), linewidth=1)
        axes[2].plot(seen, [row["grad_norm"] for row in history], color="tab:grey", linewidth=1)
        _label(axes[0], "drift norm by temperature", "mean squared drift", log=True)
        _label(axes[1], "drift norm by feature group", "", log=True)
        _label(axes[2], "gradient norm before clipping", "")
        axes[0].legend()
        axes[1].legend(ncols=2, fontsize=7)
        figure.suptitle(title)
        _save(figure, path)


def alpha_sweep(rows: Sequence[dict[str, float]], floor: dict[str, float], path: Path, title: str) -> None:
    """Distance, accuracy, recall and within-class variance against alpha."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        alphas = [row["guidance_scale"] for row in rows]
        distance = [row["frechet_judge"] for row in rows]
        spread = [row["frechet_judge_std"] for row in rows]
        axes[0].errorbar(alphas, distance, yerr=spread, marker="o", capsize=3, label="samples")
        axes[0].axhline(floor["frechet_judge_floor"], color="tab:grey", linestyle="--", label="train images")
        axes[0].set_ylim(bottom=0)
        axes[1].plot(alphas, [row["class_accuracy"] for row in rows], marker="o", label="class accuracy")
        axes[1].plot(alphas, [row["precision_judge"] for row in rows], marker="o", label="precision")
        axes[1].plot(alphas, [row["recall_judge"] for row in rows], marker="o", label="recall")
        axes[2].plot(alphas, [row["within_class_variance_mean"] for row in rows], marker="o", label="mean of classes")
        axes[2].plot(alphas, [row["within_class_variance_worst"] for row in rows], marker="o", label="worst class")
        axes[2].axhline(1, color="tab:grey", linestyle="--", label="real images")
        axes[2].set_ylim(bottom=0)
        _label(axes[0], "distance to held-out images", "frechet_judge", "guidance scale α")
        _label(axes[1], "fidelity and coverage", "", "guidance scale α")
        _label(axes[2], "within-class variance kept", "share of the real", "guidance scale α")
        for axis in axes:
            axis.legend()
        figure.suptitle(title)
        _save(figure, path)


def nearest_neighbours(samples: np.ndarray, nearest: np.ndarray, path: Path, title: str) -> None:
    """Samples above their nearest training images, two rows of pairs."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        columns = max(len(samples) // 2, 1)
        samples, nearest = samples[: 2 * columns], nearest[: 2 * columns]
        figure, axes = plt.subplots(4, columns, figsize=(0.62 * columns, 2.9), layout="constrained")
        for i, (sample, neighbour) in enumerate(zip(samples, nearest, strict=True)):
            row, column = 2 * (i // columns), i % columns
            axes[row, column].imshow(sample)
            axes[row + 1, column].imshow(neighbour)
        for axis in axes.flat:
            axis.set_axis_off()
        figure.suptitle(title)
        _save(figure, path)


def training_grids(grids: Sequence[Path], path: Path, title: str) -> None:
    """The same noise at up to six moments of training, side by side."""
    chosen = [grids[i] for i in np.unique(np.linspace(0, len(grids) - 1, min(6, len(grids))).round().astype(int))]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            1, len(chosen), figsize=(2.3 * len(chosen), 2.4), layout="constrained", squeeze=False
        )
        for axis, grid in zip(axes[0], chosen, strict=True):
            axis.imshow(Image.open(grid))
            axis.set_title(f"step {int(grid.stem.removeprefix('step-'))}")
            axis.set_axis_off()
        figure.suptitle(title)
        _save(figure, path)


def _label(axis: Axes, title: str, ylabel: str, xlabel: str = "images seen", *, log: bool = False) -> None:
    axis.set(title=title, ylabel=ylabel, xlabel=xlabel)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if log:
        axis.set_yscale("log")


def _save(figure, path: Path) -> None:
    # No date or version in the file: equal data make equal bytes.
    with atomic_file(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
    plt.close(figure)
