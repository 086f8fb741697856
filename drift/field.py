"""The drifting field V (Section 3.2-3.3, Eqs. 8-12, Algorithm 2 of "Generative Modeling via Drifting").

A sample x is attracted by positives y+ (real data) and repelled by negatives y- (generated samples):
V(x) = V+(x) - V-(x). Shape suffixes: N samples, M targets, D coordinates; `...` are batch dimensions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Squared distances are clipped here before the root, as in the release.
MIN_SQUARED_DISTANCE = 1e-8
#: The product of the two softmaxes is clipped here before its root, as in the release.
MIN_AFFINITY_PRODUCT = 1e-6

NORMALIZATIONS = ("both", "targets", "none")
KERNELS = ("laplacian", "gaussian")


def pairwise_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances ``[..., N, M]`` between x ``[..., N, D]`` and y ``[..., M, D]``, at least 1e-4.

    Uses ``|x|^2 + |y|^2 - 2xy``: subtract a common offset from x and y first where they lie far from the origin.
    """
    x_sq = x.square().sum(-1, keepdim=True)
    y_sq = y.square().sum(-1).unsqueeze(-2)
    gram = x @ y.transpose(-1, -2)
    return gram.mul_(-2).add_(x_sq).add_(y_sq).clamp_min_(MIN_SQUARED_DISTANCE).sqrt_()


@dataclass(frozen=True)
class Kernel:
    """Normalised kernel of distances ``[..., N, M]`` (Eq. 12, Algorithm 2), for any number of temperatures.

    Args:
        distances: between samples and targets; a masked pair has a very large one.
        kernel: ``"laplacian"``, exp(-d / tau), or ``"gaussian"``, exp(-d^2 / tau).
        normalization: ``"both"``, the geometric mean of the softmax over targets and the softmax over samples;
            ``"targets"``, the softmax over targets alone; ``"none"``, the kernel itself (Table 11).
        min_product: the product of the two softmaxes is clipped here from below.

    Raises ValueError for an unknown name.
    """

    distances: Tensor
    kernel: str = "laplacian"
    normalization: str = "both"
    min_product: float = 0.0

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel {self.kernel!r} is not one of {', '.join(KERNELS)}")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization {self.normalization!r} is not one of {', '.join(NORMALIZATIONS)}")

    @cached_property
    def _energy(self) -> Tensor:
        return self.distances.square() if self.kernel == "gaussian" else self.distances

    @cached_property
    def _above_row(self) -> Tensor:
        """Energy above the least of its row: exponents of the softmax over targets."""
        return self._energy - self._energy.amin(-1, keepdim=True)

    @cached_property
    def _above_column(self) -> Tensor:
        return self._energy - self._energy.amin(-2, keepdim=True)

    @cached_property
    def _above_both(self) -> Tensor:
        return (self._above_row + self._above_column).mul_(0.5)

    def affinities(self, temperature: float) -> Tensor:
        """``A [..., N, M]`` at one temperature, a new tensor."""
        beta = -1.0 / temperature
        if self.normalization == "none":
            return (self._energy * beta).exp_()
        rows = (self._above_row * beta).exp_()
        row_sum = rows.sum(-1, keepdim=True)
        if self.normalization == "targets":
            return rows.div_(row_sum)
        column_sum = torch.mul(self._above_column, beta, out=rows).exp_().sum(-2, keepdim=True)
        # sqrt(softmax_M * softmax_N), its exponents averaged before the exponential so that they cannot underflow.
        A_NM = torch.mul(self._above_both, beta, out=rows).exp_()
        return A_NM.mul_(row_sum.rsqrt_()).mul_(column_sum.rsqrt_()).clamp_min_(self.min_product**0.5)


def drift_coefficients(
    affinity: Tensor,
    num_negatives: int,
    *,
    self_targets: bool,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Weights W of the targets in ``V = W @ targets - s * x`` (Algorithm 2, Eq. 11), and s where it is not folded in.

    Args:
        affinity: ``[..., N, M]``, the `num_negatives` negatives first and the positives after them; changed in place.
        self_targets: the first N targets are the samples themselves: then s goes to W's diagonal.
        positive_weight, negative_weight: factors of V+ and V- (the anti-symmetry ablation, Table 1).
    """
    a_neg, a_pos = affinity[..., :num_negatives], affinity[..., num_negatives:]
    sum_neg, sum_pos = a_neg.sum(-1, keepdim=True), a_pos.sum(-1, keepdim=True)
    a_neg.mul_(sum_pos * -negative_weight)
    a_pos.mul_(sum_neg * positive_weight)
    if positive_weight == negative_weight:
        return affinity, None  # the two sums cancel
    share = (positive_weight - negative_weight) * sum_neg * sum_pos
    if not self_targets:
        return affinity, share
    affinity.diagonal(dim1=-2, dim2=-1).sub_(share.squeeze(-1))
    return affinity, None


def drifting_field(
    x: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.05,
    kernel: str = "laplacian",
    normalization: str = "both",
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> Tensor:
    """The drifting field V at x, in the units of x (Eq. 11 by the batch estimator of Algorithm 2).

    Args:
        x: samples ``[..., N, D]``.
        positives: samples of the data ``[..., P, D]``.
        negatives: samples of the model ``[..., Q, D]``; by default x itself, each sample's own entry masked out.
        temperature: tau of the kernel, in units of distance (of squared distance for the Gaussian kernel).
        kernel, normalization: see `Kernel`.
        positive_weight, negative_weight: factors of V+ and V- (Table 1); the method is (1, 1).

    Returns:
        V ``[..., N, D]``, float32, without a graph: no gradient flows through V (Eq. 6).

    Raises:
        ValueError: shapes that do not fit, or an unknown kernel or normalization.
    """
    for name, targets in (("positives", positives), ("negatives", negatives)):
        if targets is not None and (*targets.shape[:-2], targets.shape[-1]) != (*x.shape[:-2], x.shape[-1]):
            raise ValueError(f"{name} {tuple(targets.shape)} do not fit x {tuple(x.shape)}: only the number may")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, y_pos = x.float(), positives.float()
        y_neg = x if negatives is None else negatives.float()
        targets_MD = torch.cat([y_neg, y_pos], dim=-2)
        # V does not change with the origin; near it, distances and sums lose no digits.
        origin = targets_MD.mean(-2, keepdim=True)
        x, targets_MD = x - origin, targets_MD - origin
        distances_NM = pairwise_distances(x, targets_MD)
        if negatives is None:
            distances_NM.diagonal(dim1=-2, dim2=-1).add_(1e6)
        affinity_NM = Kernel(distances_NM, kernel, normalization).affinities(temperature)
        weights_NM, share_N1 = drift_coefficients(
            affinity_NM,
            y_neg.shape[-2],
            self_targets=negatives is None,
            positive_weight=positive_weight,
            negative_weight=negative_weight,
        )
        drift_ND = weights_NM @ targets_MD
        return drift_ND if share_N1 is None else drift_ND - share_N1 * x
