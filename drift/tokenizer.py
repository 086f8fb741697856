"""Images to latents and back: a diffusers `AutoencoderKL`, or the identity for pixel space."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from drift.artifacts import read_json
from drift.errors import InputError

IDENTITY = "IdentityTokenizer"


class Tokenizer(nn.Module):
    """Posterior moments of images in scaled latent units, and images from latents.

    Args:
        vae: the autoencoder; None for pixel space, where the latent is the image itself.

    The scale and shift of latents are the autoencoder's own (`scaling_factor`, `shift_factor` of its configuration).
    """

    def __init__(self, vae: AutoencoderKL | None = None):
        super().__init__()
        self.vae = vae

    @classmethod
    def from_pretrained(cls, source: Path | str) -> "Tokenizer":
        """Load from a local folder or a hub id, weights from safetensors only.

        Raises InputError if there is no tokenizer at `source`.
        """
        config = Path(source) / "config.json"
        if config.exists() and read_json(config).get("_class_name") == IDENTITY:
            return cls()
        return cls(load_vae(source))

    def save_pretrained(self, folder: Path | str) -> None:
        """Save as a diffusers folder."""
        if self.vae is not None:
            self.vae.save_pretrained(folder, safe_serialization=True)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": IDENTITY}) + "\n")

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of square images."""
        if self.vae is None:
            return (3, image_size, image_size)
        side = image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (self.vae.config.latent_channels, side, side)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation ``[B, C, h, w]``, scaled, of images ``[B, 3, H, W]`` in [-1, 1]."""
        if self.vae is None:
            return images, torch.zeros_like(images)
        images = images.to(self.vae.device, self.vae.dtype)
        posterior = self.vae.encode(images).latent_dist
        scale, shift = latent_scale(self.vae)
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, about [-1, 1], of scaled latents ``[B, C, h, w]``."""
        return decode_latents(self.vae, latents)


def load_vae(source: Path | str) -> AutoencoderKL:
    """An `AutoencoderKL` from a local folder or a hub id; raises InputError if it is not there or not readable."""
    try:
        return AutoencoderKL.from_pretrained(str(source), use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"tokenizer {source}: no AutoencoderKL in safetensors could be loaded ({reason})") from None


def decode_latents(vae: AutoencoderKL | None, latents: Tensor) -> Tensor:
    """Images of scaled latents; the latents themselves where `vae` is None."""
    if vae is None:
        return latents
    scale, shift = latent_scale(vae)
    return vae.decode(latents.to(vae.dtype) / scale + shift).sample


def latent_scale(vae: AutoencoderKL) -> tuple[float, float]:
    """Scale and shift: latents are ``(z - shift) * scale``."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def images_to_tensor(images: np.ndarray) -> Tensor:
    """uint8 ``[N, H, W, 3]`` to float32 ``[N, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def tensor_to_images(images: Tensor) -> np.ndarray:
    """float ``[N, 3, H, W]`` in [-1, 1] to uint8 ``[N, H, W, 3]``, by truncation as in the paper's evaluation."""
    scaled = ((images.float() + 1) * 127.5).clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
