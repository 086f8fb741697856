"""Alpha at training time: its distribution, and the weight that it gives unconditional negatives."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from drift.guidance import negative_weight, sample_guidance_scale

DRAWS = 20_000


def draw(seed: int = 0, num: int = DRAWS, **options) -> torch.Tensor:
    return sample_guidance_scale(num, generator=torch.Generator().manual_seed(seed), **options)


def cdf(alpha, power: float, low: float, high: float):
    """Share of the integral of a^-power over [low, high] that lies below alpha."""
    if power == 1:
        return np.log(alpha / low) / np.log(high / low)
    integral = lambda a: (a ** (1.0 - power) - low ** (1.0 - power)) / (1.0 - power)  # noqa: E731
    return integral(alpha) / integral(high)


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1.5, 2.0)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
def test_alpha_follows_the_power_law(power, low, high):
    alpha = draw(power=power, low=low, high=high).double().numpy()
    assert alpha.shape == (DRAWS,)
    assert low <= alpha.min()
    assert alpha.max() <= high
    assert kstest(alpha, lambda a: cdf(a, power, low, high)).pvalue > 1e-3
    # The same draws refute a neighbouring power, so that the test above has teeth.
    assert kstest(alpha, lambda a: cdf(a, power + 0.5, low, high)).pvalue < 1e-3


def test_the_default_range_is_that_of_the_paper():
    alpha = draw(power=0.0)
    assert 1.0 <= alpha.min() < 1.01
    assert 3.99 < alpha.max() <= 4.0


def test_the_unguided_fraction_is_exactly_1_and_the_rest_follows_the_power_law():
    alpha = draw(power=3.0, unguided_fraction=0.5).double().numpy()
    guided = alpha[alpha != 1.0]
    # Five standard deviations of a fair coin.
    assert abs(len(guided) / DRAWS - 0.5) < 5 * 0.5 / DRAWS**0.5
    assert kstest(guided, lambda a: cdf(a, 3.0, 1.0, 4.0)).pvalue > 1e-3


def test_the_unguided_draws_are_1_even_where_the_range_starts_above():
    assert draw(power=3.0, low=2.0, unguided_fraction=1.0).unique().tolist() == [1.0]
    assert draw(power=3.0, low=2.0, unguided_fraction=0.0).min() >= 2.0


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_a_range_of_one_point_gives_that_point(power):
    assert draw(power=power, low=2.0, high=2.0).unique().tolist() == [2.0]


def test_the_generator_fixes_the_draws():
    assert draw(seed=3, power=3.0).equal(draw(seed=3, power=3.0))
    assert not draw(seed=3, power=3.0).equal(draw(seed=4, power=3.0))


@pytest.mark.parametrize(("low", "high"), [(0.5, 4.0), (3.0, 2.0), (0.0, 0.5), (float("nan"), 4.0)])
def test_a_range_below_1_or_upside_down_is_refused(low, high):
    with pytest.raises(ValueError, match="1 <= low <= high"):
        draw(power=3.0, low=low, high=high)


def test_the_weight_of_a_negative_is_alpha_minus_1_times_the_other_generated_per_unconditional():
    alpha = torch.tensor([[1.0, 1.5], [2.0, 4.0]])
    weight = negative_weight(alpha, num_generated=64, num_unconditional=16)
    expected = [[0.0, 0.5 * 63 / 16], [63 / 16, 3 * 63 / 16]]
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)


def test_without_guidance_the_weight_is_exactly_zero():
    alpha = draw(power=3.0, unguided_fraction=1.0, num=8)
    assert negative_weight(alpha, num_generated=64, num_unconditional=16).equal(torch.zeros(8))


def test_the_unconditional_share_of_the_negatives_is_1_minus_1_over_alpha():
    # A.7: with w per unconditional sample, q~ = (1 / alpha) q + (1 - 1 / alpha) p_unconditional.
    alpha = draw(power=1.0, num=100).double()
    total = 32 * negative_weight(alpha, num_generated=64, num_unconditional=32)
    torch.testing.assert_close(total / (total + 63), 1 - 1 / alpha)
