"""Classifier-free guidance at training time (Section 3.5, Appendix A.7): alpha is drawn per label."""

import torch
from torch import Tensor


def sample_guidance_scale(
    num: int,
    *,
    power: float,
    low: float = 1.0,
    high: float = 4.0,
    unguided_fraction: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw alpha ``[num]`` from p(alpha) ~ alpha^-power on [low, high]; with probability `unguided_fraction`, 1.

    Inverse of the cumulative distribution; ``power = 1`` is log-uniform. Raises ValueError unless 1 <= low <= high.
    """
    if not 1.0 <= low <= high:
        raise ValueError(f"guidance scale: the range [{low}, {high}] must satisfy 1 <= low <= high")
    uniform, coin = torch.rand(2, num, generator=generator, device=device)
    if power == 1.0:
        alpha = low * (high / low) ** uniform
    else:
        start, end = low ** (1 - power), high ** (1 - power)
        alpha = (start + uniform * (end - start)) ** (1 / (1 - power))
    return torch.where(coin < unguided_fraction, torch.ones_like(alpha), alpha.clamp(low, high))


def negative_weight(guidance_scale: Tensor, *, num_generated: int, num_unconditional: int) -> Tensor:
    """Weight of each unconditional negative, w = (alpha - 1)(N_neg - 1) / N_unc (A.7), for alphas of any shape."""
    return (guidance_scale - 1.0) * (num_generated - 1) / num_unconditional
