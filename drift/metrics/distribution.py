"""Distances between sets of images: Frechet and kernel distance, precision and recall, diversity, memorisation.

They work on features that the caller extracts, and are named for those: `fid` is only what uses Inception features.
"""

from collections.abc import Mapping

import numpy as np
import torch
from cleanfid import fid as cleanfid
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import prc_features_to_metric

#: Side of the grid and number of principal components in which within-class variance is measured.
VARIANCE_GRID = 8
VARIANCE_COMPONENTS = 20


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to features ``[N, D]`` and ``[M, D]`` (clean-fid)."""
    return float(cleanfid.fid_from_feats(features_a, features_b))


def kernel_distance(features_a: np.ndarray, features_b: np.ndarray, *, seed: int = 0) -> float:
    """Kernel distance (KID) of features (clean-fid); `seed` fixes its subsets without touching NumPy's global state."""
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        return cleanfid.kernel_distance(features_a, features_b)
    finally:
        np.random.set_state(state)


def precision_recall(generated: np.ndarray, real: np.ndarray, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall of features ``[N, D]`` against real features ``[M, D]`` (torch-fidelity)."""
    result = prc_features_to_metric(
        torch.from_numpy(generated).double(),
        torch.from_numpy(real).double(),
        prc_neighborhood=neighbours,
        prc_batch_size=10000,
        save_cpu_ram=len(generated) > 5000,
        verbose=False,
    )
    return result["precision"], result["recall"]


def compare(
    features: np.ndarray, reference: np.ndarray, *, size: int, draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over `draws` of every distance, between sets of `size` each.

    A set larger than `size` is subsampled anew, without replacement, in each draw: all of these measures are biased
    by the size of the sets, so only equal sizes compare. Raises ValueError for a set smaller than `size`.
    """
    if min(len(features), len(reference)) < size:
        raise ValueError(f"sets of {len(features)} and {len(reference)} cannot be compared at size {size}")
    values: dict[str, list[float]] = {name: [] for name in ("frechet", "kernel", "precision", "recall")}
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        a, b = (x[rng.choice(len(x), size, replace=False)] if len(x) > size else x for x in (features, reference))
        precision, recall = precision_recall(a, b)
        row = (frechet_distance(a, b), kernel_distance(a, b, seed=seed + draw), precision, recall)
        for name, value in zip(values, row, strict=True):
            values[name].append(value)
    return {name: (float(np.mean(v)), float(np.std(v))) for name, v in values.items()}


def within_class_variance(
    images: np.ndarray, labels: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray
) -> dict[str, object]:
    """Share of the real within-class variance that samples keep: ``mean`` and ``worst`` over classes, ``by_class``.

    A class whose real images do not vary is left out. Variances are summed over the first 20 principal components
    (of the real images) of 8 x 8 grey pixels.
    """
    real = grey_grid(real_images)
    pca = PCA(min(VARIANCE_COMPONENTS, *real.shape), svd_solver="full").fit(real)
    kept, wanted = pca.transform(grey_grid(images)), pca.transform(real)
    real_variance = {int(label): _total_variance(wanted[real_labels == label]) for label in np.unique(real_labels)}
    by_class = {
        label: _total_variance(kept[labels == label]) / variance
        for label, variance in real_variance.items()
        if variance > 0
    }
    values = list(by_class.values())
    return {"mean": float(np.mean(values)), "worst": float(np.min(values)), "by_class": by_class}


def _total_variance(x: np.ndarray) -> float:
    return float(x.var(0).sum()) if len(x) else 0.0


def memorisation(images: np.ndarray, train: np.ndarray, heldout: np.ndarray) -> Mapping[str, object]:
    """Distance to the nearest training image, of samples against held-out images, in root-mean-square grey levels.

    Returns the median ``distance`` of both, their ``ratio`` (near 0: copies; near 1: as new as held-out images), the
    share of samples closer to a training image than 99% of the held-out images are (``copies``, 0.01 expected), and
    the ``nearest`` training image of each sample.
    """
    train_grey = grey(train)
    search = NearestNeighbors(n_neighbors=1).fit(train_grey)
    scale = train_grey.shape[1] ** 0.5
    distance, nearest = search.kneighbors(grey(images))
    reference = search.kneighbors(grey(heldout))[0][:, 0] / scale
    distance = distance[:, 0] / scale
    return {
        "distance": float(np.median(distance)),
        "heldout_distance": float(np.median(reference)),
        "ratio": float(np.median(distance) / np.median(reference)),
        "copies": float((distance < np.quantile(reference, 0.01)).mean()),
        "nearest": nearest[:, 0],
    }


def grey(images: np.ndarray) -> np.ndarray:
    """uint8 ``[N, H, W, 3]`` to float grey levels ``[N, H W]``."""
    return images.mean(-1).reshape(len(images), -1)


def grey_grid(images: np.ndarray) -> np.ndarray:
    """uint8 ``[N, H, W, 3]`` to grey means ``[N, 64]`` over an 8 x 8 grid of cells."""
    N, H, W, _ = images.shape
    g = VARIANCE_GRID
    cropped = images[:, : H // g * g, : W // g * g].mean(-1)
    return cropped.reshape(N, g, H // g, g, W // g).mean((2, 4)).reshape(N, g * g)
