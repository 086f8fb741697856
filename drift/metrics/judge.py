"""An independent pixel-space classifier, for evaluation only: no part of training ever sees it."""

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from drift.tokenizer import images_to_tensor


class Judge(ModelMixin, ConfigMixin):
    """A small convolutional classifier whose penultimate layer is the feature space of `frechet_judge` and its kin.

    Args:
        num_classes, in_channels: of the images.
        width: channels after the first convolution; doubled at each of three halvings.
        feature_size: size of the features, at most 64, so that a few hundred images determine their covariance.
    """

    @register_to_config
    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16, feature_size: int = 64):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for i in range(3):
            layers += [
                nn.Conv2d(channels, width * 2**i, 3, padding=1, bias=False),
                nn.BatchNorm2d(width * 2**i),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = width * 2**i
        self.convolutions = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.project = nn.Linear(channels * 16, feature_size)
        self.dropout = nn.Dropout(0.3)
        self.classify = nn.Linear(feature_size, num_classes)
        # Kernel distances depend on the scale of the features: `set_feature_scale` makes their mean square 1.
        self.register_buffer("feature_scale", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """Features ``[B, feature_size]`` of images ``[B, 3, H, W]`` in [-1, 1].

        Taken before their activation: a unit that is off for most images would leave their covariance singular.
        """
        return self.project(self.pool(self.convolutions(images)).flatten(1)) / self.feature_scale

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]``."""
        return self._logits(self.features(images))

    @torch.no_grad()
    def judge(self, images: np.ndarray, *, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Features float64 ``[N, feature_size]`` and predicted labels ``[N]`` of uint8 images ``[N, H, W, 3]``."""
        self.eval()
        features, labels = [], []
        for start in range(0, len(images), batch_size):
            batch = images_to_tensor(images[start : start + batch_size]).to(self.device)
            feature = self.features(batch)
            features.append(feature.double().cpu().numpy())
            labels.append(self._logits(feature).argmax(1).cpu().numpy())
        return np.concatenate(features), np.concatenate(labels)

    def _logits(self, features: Tensor) -> Tensor:
        return self.classify(self.dropout(F.relu(features * self.feature_scale)))

    def set_feature_scale(self, images: np.ndarray) -> None:
        """Scale the features so that their mean square over uint8 images ``[N, H, W, 3]`` is 1."""
        self.feature_scale *= float(np.sqrt(np.square(self.judge(images)[0]).mean()))
