"""The normalised multi-temperature drifting loss (Eqs. 13-14; Appendix A.6, Eqs. 18-26).

The loss of one feature is E||phi(x) - sg(phi(x) + V)||^2: its value is E||V||^2 and its gradient with respect to the
generated features is -2V / (G C scale'), in closed form. So V is computed once, without a graph, and backward only
scales it. Shape suffixes: B label-locations, G generated, M targets (generated, negatives, positives), C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from drift.field import MIN_AFFINITY_PRODUCT, Kernel, drift_coefficients, pairwise_distances

TEMPERATURES = (0.02, 0.05, 0.2)
#: Added to the normalised distance of a generated sample to itself: it must not repel itself.
SELF_DISTANCE = 100.0
MIN_SCALE = 1e-3
MIN_DRIFT_NORM = 1e-8
#: Affinities worked on at a time, each of 4 bytes.
CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class DriftLoss:
    """What `drift_loss` returns.

    Attributes:
        loss: ``[B]``, mean of V^2 over (G, C); differentiable with respect to the generated features. Its value hardly
            changes during training because every drift is divided by its own norm; watch `drift_norms`.
        scale: scalar, the weighted mean distance of the features (Eq. 21), in feature units.
        drift_norms: for each temperature the mean squared un-normalised drift (Eq. 25), in normalised coordinates.
    """

    loss: Tensor
    scale: Tensor
    drift_norms: dict[float, Tensor]


class _QuadraticLoss(torch.autograd.Function):
    """``mean(V^2)`` per batch entry, with the gradient of ``(g - sg(g + V))^2 / scale'`` with respect to g."""

    @staticmethod
    def forward(ctx, generated: Tensor, drift_BGC: Tensor, feature_scale: Tensor) -> Tensor:
        ctx.save_for_backward(drift_BGC, feature_scale)
        ctx.dtype = generated.dtype
        return drift_BGC.square().mean((1, 2))

    @staticmethod
    def backward(ctx, grad_loss_B: Tensor):
        drift_BGC, feature_scale = ctx.saved_tensors
        factor_B = grad_loss_B * (-2.0 / drift_BGC[0].numel()) / feature_scale
        return (drift_BGC * factor_B[:, None, None]).to(ctx.dtype), None, None


def drift_loss(
    generated: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    negative_weights: Tensor | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    kernel: str = "laplacian",
    normalization: str = "both",
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> DriftLoss:
    """Drifting loss of one feature (Appendix A.6), batch-global scale and norms, in float32.

    Args:
        generated: ``[B, G, C]``; gradients flow to this argument only.
        positives: ``[B, P, C]``.
        negatives: extra, unconditional negatives ``[B, N, C]`` (classifier-free guidance, Section 3.5).
        negative_weights: their weights ``[B, N]`` (see `drift.guidance.negative_weight`); 1 by default.
        temperatures: the taus summed over (Eq. 26), in units of the mean distance.
        kernel, normalization, positive_weight, negative_weight: the ablations of `drift.field`.

    Under torch.distributed every process must call this with equal shapes: scale and norms are means over all
    processes, so that averaged gradients equal those of one process with the whole batch.

    Raises:
        ValueError: shapes that do not fit each other, or weights without negatives.
    """
    _check_shapes(generated, positives, negatives, negative_weights)
    factors = {"positive_weight": positive_weight, "negative_weight": negative_weight}
    with torch.no_grad(), torch.autocast(generated.device.type, enabled=False):
        targets_BMC, weights_BM, num_negatives = _weighted_targets(generated, positives, negatives, negative_weights)
        G, C = generated.shape[1:]
        x_BGC = targets_BMC[:, :G]

        # Eq. 21: the scale that makes the mean distance sqrt(C) in coordinates and 1 in the kernel.
        distances_BGM = pairwise_distances(x_BGC, targets_BMC)
        if weights_BM is None:
            scale = global_mean(distances_BGM.mean())
        else:
            weighted, weight = (distances_BGM.mean(1) * weights_BM).mean(), weights_BM.mean()
            scale = global_mean(weighted) / global_mean(weight)
        feature_scale = (scale / C**0.5).clamp_min(MIN_SCALE)
        distances_BGM.div_(scale.clamp_min(MIN_SCALE))
        distances_BGM.diagonal(dim1=1, dim2=2)[:, :G].add_(SELF_DISTANCE)

        # Eqs. 22-26: one drift per temperature, each divided by its root mean square, summed.
        drift_TBGC = x_BGC.new_empty(len(temperatures), *x_BGC.shape)
        for chunk in _chunks(distances_BGM):
            kernel_of = Kernel(distances_BGM[chunk], kernel, normalization, MIN_AFFINITY_PRODUCT)
            for drift_BGC, temperature in zip(drift_TBGC, temperatures, strict=True):
                A_BGM = kernel_of.affinities(temperature)
                if weights_BM is not None:
                    A_BGM.mul_(weights_BM[chunk, None, :])
                W_BGM, _ = drift_coefficients(A_BGM, num_negatives, self_targets=True, **factors)
                torch.bmm(W_BGM, targets_BMC[chunk], out=drift_BGC[chunk])
        drift_TBGC /= feature_scale
        norms = [global_mean(drift_BGC.square().mean()) for drift_BGC in drift_TBGC]
        drift_BGC = sum(
            d.div_(norm.clamp_min(MIN_DRIFT_NORM).sqrt()) for d, norm in zip(drift_TBGC, norms, strict=True)
        )
    loss = _QuadraticLoss.apply(generated, drift_BGC, feature_scale)
    return DriftLoss(loss, scale, dict(zip(map(float, temperatures), norms, strict=True)))


def sum_over_features(losses: Mapping[str, DriftLoss]) -> Tensor:
    """The training objective: the sum over feature sets of the mean over their batch (Eq. 14)."""
    return torch.stack([loss.loss.mean() for loss in losses.values()]).sum()


def global_mean(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes of the default group; the value itself without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def _chunks(distances_BGM: Tensor) -> list[slice]:
    """Slices of the batch whose affinities stay in a processor's cache: several passes go over them."""
    B = distances_BGM.shape[0]
    step = max(1, CHUNK_ELEMENTS // distances_BGM[0].numel())
    return [slice(start, start + step) for start in range(0, B, step)]


def _weighted_targets(
    generated: Tensor, positives: Tensor, negatives: Tensor | None, negative_weights: Tensor | None
) -> tuple[Tensor, Tensor | None, int]:
    """Centred targets ``[B, M, C]`` (generated, negatives, positives), weights ``[B, M]``, count of negatives."""
    B, G, _ = generated.shape
    sets = [generated, positives] if negatives is None else [generated, negatives, positives]
    targets_BMC = torch.cat([s.float() for s in sets], dim=1)
    # Distances and drifts do not change with the origin; near it the Gram matrix loses no digits.
    targets_BMC -= targets_BMC.mean(1, keepdim=True)
    if negatives is None:
        return targets_BMC, None, G
    weights_BM = targets_BMC.new_ones(B, targets_BMC.shape[1])
    num_negatives = G + negatives.shape[1]
    if negative_weights is not None:
        weights_BM[:, G:num_negatives] = negative_weights
    return targets_BMC, weights_BM, num_negatives


def _check_shapes(
    generated: Tensor, positives: Tensor, negatives: Tensor | None, negative_weights: Tensor | None
) -> None:
    B, _, C = generated.shape
    for name, value in (("positives", positives), ("negatives", negatives)):
        if value is not None and (value.ndim != 3 or value.shape[0] != B or value.shape[2] != C):
            raise ValueError(f"{name} {tuple(value.shape)} do not fit generated {tuple(generated.shape)}")
    if negative_weights is not None:
        if negatives is None:
            raise ValueError("negative_weights given without negatives")
        if negative_weights.shape != negatives.shape[:2]:
            raise ValueError(f"negative_weights {tuple(negative_weights.shape)}, not {tuple(negatives.shape[:2])}")
