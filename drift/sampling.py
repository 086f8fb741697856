"""One-step sampling: one forward pass of the generator, then the decoder."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from drift.errors import InputError
from drift.generator import Generator
from drift.tokenizer import decode_latents, tensor_to_images


class DriftPipeline(DiffusionPipeline):
    """Class-conditional images in one step.

    Args:
        generator: the network (a `drift.Generator`).
        vae: the decoder of latent models; None for pixel models.
        class_names: names of the classes, in order of their labels; they may then be used in place of labels.

    Example:
        >>> pipe = DriftPipeline.from_pretrained("models/generators/digits")
        >>> image = pipe(class_labels=[7], guidance_scale=1.0).images[0]
    """

    _optional_components: ClassVar = ["vae"]
    model_cpu_offload_seq = "generator->vae"

    def __init__(
        self, generator: Generator, vae: AutoencoderKL | None = None, class_names: Sequence[str] | None = None
    ):
        super().__init__()
        self.register_modules(generator=generator, vae=vae)
        self.register_to_config(class_names=list(class_names) if class_names else None)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | Tensor,
        guidance_scale: float | Sequence[float] | Tensor = 1.0,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        style_indices: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per label.

        Args:
            class_labels: labels, or names where the pipeline knows them, ``[B]``.
            guidance_scale: alpha, at least 1; a number or one per image (Section 3.5).
            generator: source of the noise and styles that are not given; on the CPU, whatever the model's device.
            noise: standard normal ``[B, C, H, W]``.
            style_indices: ``[B, num_styles]``.
            output_type: ``"pil"``, ``"np"`` (float [B, H, W, 3] in [0, 1]), ``"uint8"`` (NumPy, truncated as in the
                paper's evaluation), ``"pt"`` (float [B, 3, H, W] in [0, 1]) or ``"latent"``.
            return_dict: return an `ImagePipelineOutput`; otherwise a tuple.

        Raises:
            InputError: an unknown class, an alpha below 1, or tensors of the wrong shape.
        """
        labels = self._labels(class_labels)
        latents = self.latents(labels, guidance_scale, generator=generator, noise=noise, style_indices=style_indices)
        images = self.decode(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def latents(
        self,
        labels: Tensor,
        guidance_scale: float | Sequence[float] | Tensor = 1.0,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        style_indices: Tensor | None = None,
    ) -> Tensor:
        """The forward pass alone: scaled latents ``[B, C, H, W]`` (images in [-1, 1] for pixel models)."""
        network, config = self.generator, self.generator.config
        B = len(labels)
        alpha = torch.as_tensor(guidance_scale, dtype=torch.float32)
        if alpha.shape not in ((), (B,)):
            raise InputError(f"guidance_scale has shape {list(alpha.shape)}, not {[B]}")
        alpha = alpha.expand(B)
        if B and not (alpha >= 1).all():
            raise InputError(f"guidance_scale {float(alpha.min()):g} is below 1: alpha = 1 is no guidance")
        noise_shape = (B, config.in_channels, config.input_size, config.input_size)
        if noise is None:
            noise = torch.randn(noise_shape, generator=generator)
        if style_indices is None:
            style_indices = torch.randint(config.style_codes, (B, config.num_styles), generator=generator)
        if noise.shape != noise_shape:
            raise InputError(f"noise has shape {list(noise.shape)}, not {list(noise_shape)}")
        if style_indices.shape != (B, config.num_styles):
            raise InputError(f"style_indices has shape {list(style_indices.shape)}, not {[B, config.num_styles]}")
        if style_indices.numel() and not 0 <= int(style_indices.min()) <= int(style_indices.max()) < config.style_codes:
            raise InputError(f"style index {int(style_indices.max())} is out of range: {config.style_codes} codes")
        device = network.device
        return network(noise.to(device, network.dtype), labels.to(device), alpha.to(device), style_indices.to(device))

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil"):
        """Images of latents in one of the output types of `__call__`."""
        if output_type == "latent":
            return latents
        images = decode_latents(self.vae, latents)
        if output_type == "uint8":
            return tensor_to_images(images)
        return VaeImageProcessor().postprocess(images, output_type=output_type)

    def _labels(self, class_labels: Sequence[int | str] | Tensor) -> Tensor:
        if isinstance(class_labels, Tensor):
            labels = class_labels.long().cpu()
        else:
            labels = torch.tensor([self._label(value) for value in class_labels], dtype=torch.long)
        num_classes = self.generator.config.num_classes
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise InputError(f"class label {int(wrong[0])} is out of range: this model has {num_classes}, from 0")
        return labels

    def _label(self, value: int | str) -> int:
        if not isinstance(value, str):
            return int(value)
        names = self.config.class_names or []
        if value not in names:
            raise InputError(f"unknown class name {value!r}; this model knows {', '.join(names[:10]) or 'no names'}")
        return names.index(value)


def sample_in_batches(
    pipeline: DriftPipeline,
    labels: Tensor,
    guidance_scale: float,
    *,
    generator: torch.Generator,
    batch_size: int = 250,
    progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """uint8 images ``[N, H, W, 3]`` of many labels ``[N]``; calls `progress` with the images of each batch."""
    batches = []
    for batch in labels.split(batch_size):
        batches.append(pipeline(batch, guidance_scale, generator=generator, output_type="uint8").images)
        progress(len(batch))
    return np.concatenate(batches)
