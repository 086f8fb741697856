"""The ResNet masked autoencoder (Appendix A.3) whose feature maps carry the drifting loss.

Maps, for 32 x 32 inputs of stages (3, 4, 6, 3): stem 32, stages 32, 16, 8, 4, widths C, 2C, 4C, 8C.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from drift.features import input_sets, vector_sets

STAGES = 4


class ResNetMAE(ModelMixin, ConfigMixin):
    """Residual encoder, U-Net decoder and linear classifier.

    Args:
        in_channels: of the input, 4 for latents, 3 for pixels.
        width: C, channels of the first stage.
        depths: residual blocks of the four stages.
        num_classes: of the classifier used in fine-tuning.
        input_patch_size: the input is first folded into patches of this side (8 for pixels).
        mask_patch: side of the patches masked together, in (folded) input locations.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        width: int = 256,
        depths: tuple[int, ...] = (3, 4, 6, 3),
        num_classes: int = 1000,
        input_patch_size: int = 1,
        mask_patch: int = 2,
    ):
        super().__init__()
        if len(depths) != STAGES:
            raise ValueError(f"depths {tuple(depths)} must name {STAGES} stages")
        folded = in_channels * input_patch_size**2
        widths = [width * 2**i for i in range(STAGES)]
        self.stem = ConvNormReLU(folded, width)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            before = widths[max(i - 1, 0)]
            blocks = [ResidualBlock(before, widths[i], stride=1 if i == 0 else 2)]
            blocks += [ResidualBlock(widths[i], widths[i]) for _ in range(depth - 1)]
            self.stages.append(nn.ModuleList(blocks))
        self.stage_norms = nn.ModuleList(group_norm(w) for w in widths)
        self.decoder = Decoder(widths, folded)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Every vector set of A.5 for input ``[B, C, H, W]``: ``{name: [B, T, C]}`` (`drift.features`)."""
        sets = input_sets(x)
        for name, feature_map in self.maps(self._fold(x), inner=True).items():
            sets.update(vector_sets(name, feature_map))
        return sets

    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reconstruction ``[B, C p^2, H/p, W/p]`` of the folded input; `mask` ``[B, 1, H/p, W/p]``: 1 where hidden."""
        return self.reconstruct_and_classify(x, mask)[0]

    def classify(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of the mean-pooled last map."""
        return self._logits(self.maps(self._fold(x)))

    def reconstruct_and_classify(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        folded = self._fold(x)
        maps = self.maps(folded if mask is None else folded * (1 - mask))
        return self.decoder(maps), self._logits(maps)

    def losses(self, x: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Masked reconstruction error and cross-entropy (A.3).

        The first is the squared error at masked locations, summed over channels, per masked location.
        """
        reconstruction, logits = self.reconstruct_and_classify(x, mask)
        error = ((reconstruction - self._fold(x)).square() * mask).sum() / mask.sum().clamp_min(1)
        return error, F.cross_entropy(logits, labels)

    def random_mask(self, x: Tensor, *, ratio: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
        """Mask ``[B, 1, H/p, W/p]``: each patch hidden independently with probability `ratio`."""
        p, m = self.config.input_patch_size, self.config.mask_patch
        B, _, H, W = x.shape
        shape = (B, 1, -(-H // p // m), -(-W // p // m))
        device = x.device if generator is None else generator.device
        hidden = (torch.rand(shape, generator=generator, device=device) < ratio).to(x)
        return hidden.repeat_interleave(m, 2).repeat_interleave(m, 3)[..., : H // p, : W // p]

    def maps(self, folded: Tensor, *, inner: bool = False) -> dict[str, Tensor]:
        """``conv1`` (the stem), ``layer1`` to ``layer4`` (each stage's normalised output, which feeds the next).

        With `inner`, the output of every second residual block too: ``layer2_blk2``, ``layer2_blk4``, ...
        """
        x = self.stem(folded)
        maps = {"conv1": x}
        for i, (blocks, norm) in enumerate(zip(self.stages, self.stage_norms, strict=True), start=1):
            for j, block in enumerate(blocks, start=1):
                x = block(x)
                if inner and j % 2 == 0:
                    maps[f"layer{i}_blk{j}"] = x
            x = maps[f"layer{i}"] = norm(x)
        return maps

    def _fold(self, x: Tensor) -> Tensor:
        """Fold p x p patches into channels, in (p, p, C) order."""
        p = self.config.input_patch_size
        if p == 1:
            return x
        B, C, H, W = x.shape
        return x.reshape(B, C, H // p, p, W // p, p).permute(0, 3, 5, 1, 2, 4).reshape(B, -1, H // p, W // p)

    def _logits(self, maps: dict[str, Tensor]) -> Tensor:
        return self.classifier(maps[f"layer{STAGES}"].mean((2, 3)))


class ConvNormReLU(nn.Sequential):
    """3 x 3 convolution without bias, GroupNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), group_norm(outputs), nn.ReLU())


class ResidualBlock(nn.Module):
    """conv, GN, ReLU, conv, GN, add, ReLU; a projection shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = group_norm(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, group_norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Decoder(nn.Module):
    """Bridge on the last map, four up-blocks with skips, a 1 x 1 head."""

    SKIPS = ("layer3", "layer2", "layer1", "conv1")

    def __init__(self, widths: list[int], outputs: int):
        super().__init__()
        skips = [widths[2], widths[1], widths[0], widths[0]]
        self.bridge = ConvNormReLU(widths[-1], widths[-1])
        self.ups = nn.ModuleList()
        inputs = widths[-1]
        for skip in skips:
            self.ups.append(UpBlock(inputs, skip))
            inputs = skip
        self.head = nn.Conv2d(inputs, outputs, 1)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        y = self.bridge(maps[f"layer{STAGES}"])
        for up, name in zip(self.ups, self.SKIPS, strict=True):
            y = up(y, maps[name])
        return self.head(y)


class UpBlock(nn.Module):
    """Resize to the skip's size, concatenate [upsampled, skip], normalise, two convolutions to the skip's width."""

    def __init__(self, inputs: int, skip: int):
        super().__init__()
        self.norm = group_norm(inputs + skip)
        self.convs = nn.Sequential(ConvNormReLU(inputs + skip, skip), ConvNormReLU(skip, skip))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.convs(self.norm(torch.cat([x, skip], dim=1)))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups up to 32 that divides the channels, epsilon 1e-6."""
    groups = max(g for g in range(1, 33) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)
