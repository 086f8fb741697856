"""The objective of one training step: which samples drift where, one loss per vector set (Eq. 14, A.5-A.7).

Shape suffixes: L labels, G generated per label, P positives, N unconditional negatives, T vectors of a set, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drift.errors import InputError
from drift.features import feature_group
from drift.guidance import negative_weight
from drift.loss import TEMPERATURES, DriftLoss, drift_loss


@dataclass(frozen=True)
class Objective:
    """The sizes and densities of one step (Table 8); `labels`, `generated`, ... count samples per step and process.

    `guidance_power`, `guidance_range` and `unguided_fraction` are the density of alpha (`drift.guidance`); `features`
    are the vector sets to use, by default all.
    """

    labels: int = 64
    generated: int = 64
    positives: int = 64
    unconditional: int = 16
    guidance_power: float = 3.0
    guidance_range: tuple[float, float] = (1.0, 4.0)
    unguided_fraction: float = 0.0
    temperatures: tuple[float, ...] = TEMPERATURES
    normalization: str = "both"
    kernel: str = "laplacian"
    positive_weight: float = 1.0
    negative_weight: float = 1.0
    features: tuple[str, ...] | None = None

    def losses(self, fake: Mapping[str, Tensor], real: Mapping[str, Tensor], alpha_L: Tensor) -> dict[str, DriftLoss]:
        """One drifting loss per vector set (Eq. 14).

        `fake` holds the sets ``[L G, T, C]`` of generated samples, `real` those of the positives and then of the
        unconditional negatives, ``[L P + L N, T, C]``; `alpha_L` each label's guidance scale.
        """
        L, P, N = len(alpha_L), self.positives, self.unconditional
        weight_L = negative_weight(alpha_L, num_generated=self.generated, num_unconditional=N)
        losses = {}
        unknown = sorted(set(self.features or ()) - set(fake))
        if unknown:
            raise InputError(f"the encoder has no feature set {unknown[0]!r}; it has {', '.join(fake)}")
        for name in self.features or fake:
            T = fake[name].shape[1]
            losses[name] = drift_loss(
                by_location(fake[name], L),
                by_location(real[name][: L * P], L),
                by_location(real[name][L * P :], L),
                negative_weights=weight_L.to(fake[name].device).repeat_interleave(T)[:, None].expand(-1, N),
                temperatures=self.temperatures,
                kernel=self.kernel,
                normalization=self.normalization,
                positive_weight=self.positive_weight,
                negative_weight=self.negative_weight,
            )
        return losses


def by_location(features_BTC: Tensor, labels: int) -> Tensor:
    """``[L S, T, C]`` (S samples of each label) to ``[L T, S, C]``: every location is a batch entry of its own."""
    LS, T, C = features_BTC.shape
    return features_BTC.reshape(labels, LS // labels, T, C).transpose(1, 2).reshape(labels * T, LS // labels, C)


def norms_by_temperature(losses: Mapping[str, DriftLoss]) -> dict[float, float]:
    """Mean over feature sets of each temperature's drift norm."""
    temperatures = list(next(iter(losses.values())).drift_norms)
    return {t: float(torch.stack([v.drift_norms[t] for v in losses.values()]).mean()) for t in temperatures}


def norms_by_group(losses: Mapping[str, DriftLoss]) -> dict[str, float]:
    """Mean over the sets of a map, and over temperatures, of the drift norm."""
    groups: dict[str, list[Tensor]] = {}
    for name, value in losses.items():
        groups.setdefault(feature_group(name), []).append(torch.stack(list(value.drift_norms.values())).mean())
    return {group: float(torch.stack(values).mean()) for group, values in groups.items()}
