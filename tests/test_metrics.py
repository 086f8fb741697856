"""Measures against analytic values, brute force and formulas."""

import time

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from drift.metrics import distribution
from drift.metrics.distribution import (
    compare,
    frechet_distance,
    grey,
    grey_grid,
    kernel_distance,
    memorisation,
    precision_recall,
    within_class_variance,
)
from drift.metrics.judge import Judge
from drift.metrics.latency import latency_ms
from drift.metrics.restoration import psnr_db, ssim


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def with_moments(mean: np.ndarray, covariance: np.ndarray, *, num: int = 60, seed: int = 0) -> np.ndarray:
    """Features whose sample mean and (unbiased) sample covariance are exactly these."""
    x = normal(num, len(mean), seed=seed)
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_the_frechet_distance_of_commuting_gaussians_is_analytic():
    basis, _ = np.linalg.qr(normal(5, 5))
    a, b = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([4.0, 1.0, 3.0, 0.5, 9.0])
    mean_a, mean_b = normal(5, seed=1), normal(5, seed=2)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    sets = [
        with_moments(mean, basis @ np.diag(variance) @ basis.T, num=num, seed=seed)
        for mean, variance, num, seed in ((mean_a, a, 60, 3), (mean_b, b, 90, 4))
    ]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*sets[::-1]) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(sets[0], sets[0][::-1]) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_gaussians_that_do_not_commute_is_analytic():
    covariances = [m @ m.T + np.eye(4) for m in (normal(4, 4, seed=1), normal(4, 4, seed=2))]
    cross = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    expected = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross
    assert np.abs(covariances[0] @ covariances[1] - covariances[1] @ covariances[0]).max() > 0.1
    sets = [with_moments(np.zeros(4), covariance, seed=i) for i, covariance in enumerate(covariances)]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-8)


def test_the_kernel_distance_is_the_unbiased_squared_mmd_of_the_cubic_kernel():
    a, b = normal(12, 3, seed=1), 0.5 + normal(12, 3, seed=2)
    kernel = lambda x, y: (sum(x * y) / 3 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(s[i], s[j]) for i in range(12) for j in range(12) if i != j]) for s in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    # Sets of equal size are their own only subsets.
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


def test_the_kernel_distance_is_reproducible_and_leaves_numpy_s_global_state_alone():
    a, b = normal(20, 3, seed=1), 0.5 + normal(60, 3, seed=2)
    np.random.seed(7)
    expected = np.random.random(3)
    np.random.seed(7)
    first = kernel_distance(a, b, seed=1)
    np.random.random(5)
    assert kernel_distance(a, b, seed=1) == first
    assert kernel_distance(a, b, seed=2) != first
    np.random.seed(7)
    kernel_distance(a, b)
    assert (np.random.random(3) == expected).all()


def test_numpy_s_global_state_is_restored_after_a_failure_too():
    np.random.seed(7)
    expected = np.random.random(3)
    np.random.seed(7)
    with pytest.raises(ValueError, match="matmul"):
        kernel_distance(normal(20, 3), normal(20, 4))
    assert (np.random.random(3) == expected).all()


def test_a_set_has_full_precision_and_recall_against_itself_and_none_against_a_far_one():
    x = normal(30, 4)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1000.0) == (0.0, 0.0)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_shares_inside_k_nearest_neighbour_balls(neighbours):
    # The samples crowd into part of the real set: precise, but with little recall.
    generated, real = 0.5 * normal(25, 3, seed=1), normal(40, 3, seed=2)

    def share_inside(points, centres):
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = [np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i]
                if np.linalg.norm(point - centre) <= sorted(others)[neighbours - 1]:
                    inside += 1
                    break
        return inside / len(points)

    precision, recall = precision_recall(generated, real, neighbours=neighbours)
    assert precision == pytest.approx(share_inside(generated, real))
    assert recall == pytest.approx(share_inside(real, generated))
    assert 0 < recall < precision


@pytest.mark.parametrize(("num", "num_reference"), [(30, 80), (80, 30), (80, 80), (20, 20)])
def test_compare_measures_sets_of_equal_size_drawn_without_replacement(monkeypatch, num, num_reference):
    features, reference = normal(num, 3, seed=1), normal(num_reference, 3, seed=2)
    size = min(20, num)
    seen = []

    def watched(a, b):
        seen.append((a, b))
        return frechet_distance(a, b)

    monkeypatch.setattr(distribution, "frechet_distance", watched)
    values = compare(features, reference, size=size, draws=3, seed=0)
    assert len(seen) == 3
    for pair in seen:
        for drawn, pool in zip(pair, (features, reference), strict=True):
            rows = {tuple(row) for row in drawn}
            assert len(drawn) == len(rows) == size
            assert rows <= {tuple(row) for row in pool}
    expected = [frechet_distance(a, b) for a, b in seen]
    assert values["frechet"] == pytest.approx((np.mean(expected), np.std(expected)))
    assert set(values) == {"frechet", "kernel", "precision", "recall"}
    if num > size:
        assert not np.array_equal(seen[0][0], seen[1][0]), "each draw is a new one"


def test_compare_never_measures_sets_of_unequal_size():
    with pytest.raises(ValueError, match="20"):
        compare(normal(12, 3, seed=1), normal(80, 3, seed=2), size=20, draws=1, seed=0)


def test_compare_is_fixed_by_its_seed():
    features, reference = normal(40, 3, seed=1), normal(50, 3, seed=2)
    values = compare(features, reference, size=20, draws=2, seed=5)
    assert compare(features, reference, size=20, draws=2, seed=5) == values
    assert compare(features, reference, size=20, draws=2, seed=6) != values
    assert values["frechet"][1] > 0
    assert compare(features, reference, size=20, draws=1, seed=5)["frechet"][1] == 0


def test_within_class_variance_of_the_real_set_is_1():
    images, labels = pixels(60, 16, 16, 3), np.arange(60) % 3
    result = within_class_variance(images, labels, images, labels)
    assert result["mean"] == result["worst"] == 1.0
    assert result["by_class"] == {0: 1.0, 1: 1.0, 2: 1.0}


def test_within_class_variance_of_samples_shrunken_towards_their_class_is_the_square_of_the_factor():
    labels = np.arange(60) % 3
    real = pixels(60, 16, 16, 3).astype(np.float64)
    factors = {0: 1.0, 1: 0.5, 2: 0.1}
    samples = np.empty_like(real)
    for label, factor in factors.items():
        mean = real[labels == label].mean(0)
        samples[labels == label] = mean + factor * (real[labels == label] - mean)
    result = within_class_variance(samples, labels, real, labels)
    expected = {label: factor**2 for label, factor in factors.items()}
    assert result["by_class"] == pytest.approx(expected)
    assert result["mean"] == pytest.approx(np.mean(list(expected.values())))
    assert result["worst"] == pytest.approx(0.01)


def test_the_spread_between_classes_is_no_variance_within_them():
    labels = np.arange(40) % 2
    real = pixels(40, 8, 8, 3) // 2
    collapsed = np.where(labels[:, None, None, None] == 1, 200, 10) * np.ones((40, 8, 8, 3), np.uint8)
    assert within_class_variance(collapsed, labels, real, labels)["mean"] == pytest.approx(0, abs=1e-12)


def test_within_class_variance_is_that_of_20_principal_components():
    labels = np.arange(80) % 2
    real, samples = pixels(80, 8, 8, 3, seed=1), pixels(80, 8, 8, 3, seed=2) // 2
    grids = [images.mean(-1).reshape(80, 64) for images in (real, samples)]
    _, _, axes = np.linalg.svd(grids[0] - grids[0].mean(0), full_matrices=False)
    variance = [[np.var(grid[labels == label] @ axes[:20].T, axis=0).sum() for label in (0, 1)] for grid in grids]
    result = within_class_variance(samples, labels, real, labels)
    assert list(result["by_class"].values()) == pytest.approx([variance[1][i] / variance[0][i] for i in (0, 1)])


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 15), (8, 8)])
def test_grey_levels_are_channel_means_and_the_grid_means_of_whole_cells(height, width):
    images = pixels(2, height, width, 3)
    assert grey(images).shape == (2, height * width)
    assert grey(images)[1, width + 2] == pytest.approx(images[1, 1, 2].mean())
    h, w = height // 8, width // 8
    expected = [
        [images[n, i * h : (i + 1) * h, j * w : (j + 1) * w].mean() for i in range(8) for j in range(8)] for n in (0, 1)
    ]
    np.testing.assert_allclose(grey_grid(images), expected)


def test_copies_of_training_images_are_at_no_distance_and_are_found():
    train, heldout = pixels(30, 8, 8, 3, seed=1), pixels(20, 8, 8, 3, seed=2)
    chosen = np.array([3, 17, 4, 3])
    found = memorisation(train[chosen], train, heldout)
    assert found["distance"] == found["ratio"] == 0.0
    assert found["copies"] == 1.0
    assert (found["nearest"] == chosen).all()


def test_held_out_images_are_as_new_as_themselves():
    train, heldout = pixels(30, 8, 8, 3, seed=1), pixels(200, 8, 8, 3, seed=2)
    found = memorisation(heldout, train, heldout)
    assert found["ratio"] == 1.0
    assert found["copies"] == pytest.approx(0.01)


def test_memorisation_is_measured_in_root_mean_square_grey_levels_to_the_nearest_image():
    train, heldout, images = (pixels(n, 4, 4, 3, seed=n) for n in (9, 7, 5))

    def nearest(image):
        return min((np.sqrt(((image.mean(-1) - other.mean(-1)) ** 2).mean()), i) for i, other in enumerate(train))

    found = memorisation(images, train, heldout)
    distances, indices = zip(*(nearest(image) for image in images), strict=True)
    reference = [nearest(image)[0] for image in heldout]
    assert list(found["nearest"]) == list(indices)
    assert found["distance"] == pytest.approx(np.median(distances))
    assert found["heldout_distance"] == pytest.approx(np.median(reference))
    assert found["ratio"] == pytest.approx(np.median(distances) / np.median(reference))


def test_psnr_is_its_formula_averaged_over_images():
    references = pixels(3, 8, 8, 3) // 2
    images = references.copy()
    images[0] += 1
    images[1] += 16
    images[2, :4] += 100
    expected = [10 * np.log10(255**2 / error) for error in (1, 16**2, 100**2 / 2)]
    assert psnr_db(images, references) == pytest.approx(np.mean(expected))


def test_psnr_of_a_perfect_copy_is_finite_and_that_of_one_level_in_one_value():
    images = pixels(2, 8, 8, 3) // 2
    finest = images.copy()
    finest[:, 0, 0, 0] += 1
    assert psnr_db(images, images) == pytest.approx(10 * np.log10(255**2 * 8 * 8 * 3))
    assert psnr_db(finest, images) == pytest.approx(psnr_db(images, images))


def test_ssim_is_scikit_image_s_averaged_over_images_and_1_for_copies():
    references = pixels(3, 16, 16, 3, seed=1)
    images = references.copy()
    images[0] = pixels(16, 16, 3, seed=2)
    images[1, :8] //= 2
    scores = [
        structural_similarity(r, i, channel_axis=2, data_range=255) for r, i in zip(references, images, strict=True)
    ]
    assert ssim(images, references) == pytest.approx(np.mean(scores))
    assert scores[0] < scores[1] < scores[2] == ssim(references, references) == 1.0


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = np.full((1, 8, 8, 3), 50, np.uint8), np.full((1, 8, 8, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1))


@pytest.mark.parametrize("measure", [psnr_db, ssim])
def test_sets_of_different_length_are_refused(measure):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        measure(pixels(2, 8, 8, 3), pixels(3, 8, 8, 3))


def test_latency_counts_every_call_and_times_those_after_the_warm_up():
    calls = []

    def call():
        calls.append(time.perf_counter())
        time.sleep(0.3 if len(calls) == 1 else 0.005)

    measured = latency_ms(call, repeats=5, warmup=1)
    assert len(calls) == 6
    assert 5 <= measured["median"] <= measured["p95"] < 150
    calls.clear()
    latency_ms(lambda: calls.append(0), repeats=4)
    assert len(calls) == 3 + 4


@pytest.mark.parametrize("feature_size", [8, 64])
def test_a_judge_gives_float64_features_of_its_size_and_the_labels_of_its_logits(feature_size):
    torch.manual_seed(0)
    judge = Judge(num_classes=3, width=4, feature_size=feature_size).eval()
    images = pixels(7, 32, 32, 3)
    features, labels = judge.judge(images)
    assert features.shape == (7, feature_size)
    assert features.dtype == np.float64
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        np.testing.assert_allclose(features, judge.features(tensor).numpy(), rtol=1e-4, atol=1e-5)
        assert (labels == judge(tensor).argmax(1).numpy()).all()
    in_parts = judge.judge(images, batch_size=3)
    np.testing.assert_allclose(in_parts[0], features, rtol=1e-4, atol=1e-5)
    assert (in_parts[1] == labels).all()


def test_the_feature_scale_makes_the_mean_square_one_and_leaves_the_predictions_alone():
    torch.manual_seed(0)
    judge = Judge(num_classes=3, width=4, feature_size=6).eval()
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    _, before = judge.judge(images)
    judge.set_feature_scale(images)
    features, after = judge.judge(images)
    assert np.square(features).mean() == pytest.approx(1, rel=1e-5)
    assert (before == after).all()
