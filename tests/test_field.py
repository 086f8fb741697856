"""`drifting_field`: Algorithm 2 as written, and the properties that the mathematics promises."""

import numpy as np
import pytest
import torch

from drift import drifting_field

KERNELS = ("laplacian", "gaussian")
NORMALIZATIONS = ("both", "targets", "none")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def algorithm_2(
    x, positives, negatives=None, *, temperature=0.05, kernel="laplacian", normalization="both", weights=(1.0, 1.0)
):
    """V in float64, one pair and one triple at a time."""
    x, y_pos = np.asarray(x, np.float64), np.asarray(positives, np.float64)
    y_neg = x if negatives is None else np.asarray(negatives, np.float64)
    targets = [*y_pos, *y_neg]
    logits = np.empty((len(x), len(targets)))
    for i in range(len(x)):
        for j, target in enumerate(targets):
            distance = np.sqrt(sum((x[i] - target) ** 2))
            if negatives is None and j == len(y_pos) + i:
                distance += 1e6
            logits[i, j] = -(distance if kernel == "laplacian" else distance**2) / temperature
    if normalization == "none":
        A = np.exp(logits)
    else:
        A = softmax(logits, 1)
        if normalization == "both":
            A = np.sqrt(A * softmax(logits, 0))
    A_pos, A_neg = A[:, : len(y_pos)], A[:, len(y_pos) :]
    V = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(y_pos)):
            for k in range(len(y_neg)):
                pull, push = y_pos[j] - x[i], y_neg[k] - x[i]
                V[i] += A_pos[i, j] * A_neg[i, k] * (weights[0] * pull - weights[1] * push)
    return V


def softmax(logits, axis):
    exponentials = np.exp(logits - logits.max(axis, keepdims=True))
    return exponentials / exponentials.sum(axis, keepdims=True)


def assert_close(V: torch.Tensor, expected, *, rtol: float = 1e-4) -> None:
    """Closeness relative to the largest drift; the drift of a float32 affinity at tau 0.05 keeps about five digits."""
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 1e-6, "a field of zeros tests nothing"
    np.testing.assert_allclose(V.double().numpy(), expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_field_is_algorithm_2_with_explicit_negatives(kernel, normalization, temperature):
    x, positives, negatives = 0.2 * randn(6, 3, seed=1), 0.2 * randn(5, 3, seed=2), 0.2 * randn(7, 3, seed=3)
    options = {"kernel": kernel, "normalization": normalization, "temperature": temperature}
    assert_close(drifting_field(x, positives, negatives, **options), algorithm_2(x, positives, negatives, **options))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_field_is_algorithm_2_with_the_samples_as_their_own_masked_negatives(kernel, normalization, temperature):
    x, positives = 0.2 * randn(6, 3, seed=1), 0.2 * randn(5, 3, seed=2)
    options = {"kernel": kernel, "normalization": normalization, "temperature": temperature}
    V = drifting_field(x, positives, **options)
    assert_close(V, algorithm_2(x, positives, **options))
    unmasked = algorithm_2(x, positives, x, **options)
    assert np.abs(V.numpy() - unmasked).max() > 1e-3 * np.abs(unmasked).max()


def test_the_default_is_the_laplacian_normalised_over_both_axes_at_temperature_005():
    x, positives = 0.2 * randn(6, 3, seed=1), 0.2 * randn(5, 3, seed=2)
    expected = algorithm_2(x, positives, kernel="laplacian", normalization="both", temperature=0.05)
    assert_close(drifting_field(x, positives), expected)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 1.0), (1.0, 1.5), (2.0, 1.0), (1.0, 2.0), (1.0, 0.0)])
def test_the_weights_of_attraction_and_repulsion_are_those_of_table_1(weights, explicit):
    x, positives, negatives = 0.2 * randn(6, 3, seed=1), 0.2 * randn(5, 3, seed=2), 0.2 * randn(7, 3, seed=3)
    sets = (x, positives, negatives) if explicit else (x, positives)
    V = drifting_field(*sets, positive_weight=weights[0], negative_weight=weights[1])
    assert_close(V, algorithm_2(*sets, weights=weights))


def test_equal_weights_of_attraction_and_repulsion_scale_the_field():
    x, positives = 0.2 * randn(6, 3, seed=1), 0.2 * randn(5, 3, seed=2)
    V = drifting_field(x, positives, positive_weight=3.0, negative_weight=3.0)
    torch.testing.assert_close(V, 3.0 * drifting_field(x, positives), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_swapping_positives_and_negatives_flips_the_field(kernel, normalization):
    x, positives, negatives = randn(9, 4, seed=1), randn(6, 4, seed=2), randn(8, 4, seed=3)
    options = {"kernel": kernel, "normalization": normalization, "temperature": 0.5}
    V = drifting_field(x, positives, negatives, **options)
    assert_close(V, -drifting_field(x, negatives, positives, **options), rtol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_field_vanishes_where_positives_and_negatives_are_the_same_set(kernel, normalization, temperature):
    x, y = randn(9, 4, seed=1), randn(12, 4, seed=2)
    options = {"kernel": kernel, "normalization": normalization, "temperature": temperature}
    shuffled = y[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    scale = drifting_field(x, y, randn(12, 4, seed=4), **options).abs().max()
    assert scale > 0
    assert drifting_field(x, y, shuffled, **options).abs().max() <= 1e-5 * scale


def test_the_field_vanishes_where_the_samples_too_are_that_set():
    y = randn(12, 4, seed=2)
    shuffled = y[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    scale = drifting_field(y, y, randn(12, 4, seed=4), temperature=0.5).abs().max()
    # A distance of zero is known only to the root of the rounding of its square.
    assert drifting_field(y, y, shuffled, temperature=0.5).abs().max() <= 1e-4 * scale


def test_the_field_follows_translations_and_rotations():
    x, positives, negatives = randn(9, 4, seed=1), randn(6, 4, seed=2), randn(8, 4, seed=3)
    rotation, _ = torch.linalg.qr(randn(4, 4, seed=5).double())
    shift = 3.0 * randn(4, seed=6)
    moved = [(s.double() @ rotation).float() + shift for s in (x, positives, negatives)]
    V = drifting_field(x, positives, negatives, temperature=0.5)
    expected = V.double() @ rotation
    assert (expected - V).abs().max() > 0.1 * V.abs().max()
    assert_close(drifting_field(*moved, temperature=0.5), expected)


def test_the_field_points_from_a_sample_to_a_positive_and_away_from_a_negative():
    x, positive, negative = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    V = drifting_field(x, positive, negative, temperature=1.0)
    assert V[0, 0] > 0
    assert V[0, 1] < 0
    # One sample: the softmax over samples is 1, that over the two equally far targets 1/2 each.
    torch.testing.assert_close(V, 0.5 * (positive - negative))


def test_batch_dimensions_are_independent_fields():
    x, positives, negatives = randn(2, 3, 6, 4, seed=1), randn(2, 3, 5, 4, seed=2), randn(2, 3, 7, 4, seed=3)
    V = drifting_field(x, positives, negatives, temperature=0.5)
    assert V.shape == x.shape
    for i in range(2):
        for j in range(3):
            assert_close(V[i, j], algorithm_2(x[i, j], positives[i, j], negatives[i, j], temperature=0.5))


def test_no_gradient_flows_through_the_field():
    x, positives, negatives = (randn(5, 3, seed=s).requires_grad_() for s in range(3))
    V = drifting_field(x, positives, negatives)
    assert not V.requires_grad
    assert V.grad_fn is None
    assert x.requires_grad


@pytest.mark.parametrize("explicit", [True, False])
def test_far_from_the_origin_the_field_keeps_its_digits(explicit):
    far = torch.tensor([[[1000.0]], [[-4000.0]]])
    x, positives, negatives = (0.2 * randn(2, n, 3, seed=n) + far for n in (6, 5, 7))
    sets = (x, positives, negatives) if explicit else (x, positives)
    V = drifting_field(*sets)
    for i in range(2):
        assert_close(V[i], algorithm_2(*(s[i] for s in sets)))


def test_half_precision_inputs_under_autocast_are_computed_in_float32():
    x, positives = (0.2 * randn(n, 3, seed=n).bfloat16() for n in (6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        V = drifting_field(x, positives)
    assert V.dtype == torch.float32
    assert_close(V, algorithm_2(x.float(), positives.float()))


def test_a_single_sample_does_not_repel_itself():
    assert drifting_field(torch.zeros(1, 3), randn(4, 3)).equal(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("x", "positives", "negatives"),
    [
        ((4, 3), (5, 2), None),
        ((4, 3), (5, 3), (6, 2)),
        ((2, 4, 3), (3, 5, 3), None),
        ((2, 4, 3), (5, 3), None),
        ((2, 4, 3), (2, 5, 3), (3, 6, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, positives, negatives):
    with pytest.raises(ValueError, match="do not fit x"):
        drifting_field(torch.zeros(x), torch.zeros(positives), None if negatives is None else torch.zeros(negatives))


@pytest.mark.parametrize("option", ["kernel", "normalization"])
def test_an_unknown_name_is_refused_and_named(option):
    with pytest.raises(ValueError, match=f"{option} 'cauchy' is not one of"):
        drifting_field(randn(4, 3), randn(5, 3), **{option: "cauchy"})
