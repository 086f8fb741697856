"""Training of what drift training builds on: tokenizer, encoder and judge, each a loop that yields records."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from drift.data.latents import sample_latents
from drift.encoders.mae import ResNetMAE
from drift.errors import InputError
from drift.metrics.judge import Judge
from drift.tokenizer import images_to_tensor

Batches = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Record:
    """One optimisation step: its number from 1, images seen so far, and the values to log."""

    step: int
    images_seen: int
    values: dict[str, float]


def train_tokenizer(
    vae: AutoencoderKL,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    kl_weight: float,
    generator: torch.Generator,
    weight_decay: float = 0.0,
) -> Iterator[Record]:
    """Train an autoencoder on uint8 images: absolute plus squared error plus `kl_weight` times the KL per latent."""

    def loss_of(data: np.ndarray, _labels: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        images = images_to_tensor(data).to(vae.device)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - images
        l1, l2 = error.abs().mean(), error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + l2 + kl_weight * kl, {"l1": l1, "l2": l2, "kl": kl}

    yield from fit(vae, batches, loss_of, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay)


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, images: np.ndarray, *, batch_size: int = 256) -> None:
    """Set the autoencoder's `shift_factor` and `scaling_factor` so that scaled latents have mean 0 and variance 1."""
    means, squares = [], []
    for start in range(0, len(images), batch_size):
        batch = images_to_tensor(images[start : start + batch_size]).to(vae.device)
        posterior = vae.encode(batch).latent_dist
        means.append(posterior.mean.double())
        squares.append(posterior.mean.double().square() + posterior.var.double())
    mean, square = torch.cat(means).mean(), torch.cat(squares).mean()
    vae.register_to_config(scaling_factor=float((square - mean**2).rsqrt()), shift_factor=float(mean))


def train_encoder(
    encoder: ResNetMAE,
    batches: Batches,
    *,
    steps: int,
    finetune_steps: int,
    learning_rate: float,
    finetune_learning_rate: float,
    warmup_steps: int,
    generator: torch.Generator,
    classification_weight: float = 0.1,
    classification_warmup_steps: int = 1000,
    mask_ratio: float = 0.5,
    ema_decay: float = 0.9995,
    max_grad_norm: float = 2.0,
    weight_decay: float = 0.01,
) -> Iterator[Record]:
    """Masked reconstruction, then the classification fine-tune (A.3); leaves the EMA weights in `encoder`.

    The fine-tune minimises ``w * cross-entropy + (1 - w) * reconstruction``, w rising linearly from 0 to
    `classification_weight` over `classification_warmup_steps`. `batches` are moments as `latent_stream` gives them.
    """
    done = 0

    def loss_of(moments: np.ndarray, labels: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal done
        done += 1
        latents = sample_latents(torch.from_numpy(moments), generator).to(encoder.device)
        mask = encoder.random_mask(latents, ratio=mask_ratio, generator=generator)
        reconstruction, cross_entropy = encoder.losses(latents, torch.from_numpy(labels).to(encoder.device), mask)
        weight = classification_weight * min(max(done - steps, 0) / max(classification_warmup_steps, 1), 1.0)
        loss = weight * cross_entropy + (1 - weight) * reconstruction if weight else reconstruction
        return loss, {"reconstruction": reconstruction, "cross_entropy": cross_entropy}

    ema = constant_ema(encoder, ema_decay)
    options = {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "ema": ema}
    source = iter(batches)
    yield from fit(
        encoder, source, loss_of, steps=steps, learning_rate=learning_rate, warmup_steps=warmup_steps, **options
    )
    if finetune_steps:
        for record in fit(
            encoder, source, loss_of, steps=finetune_steps, learning_rate=finetune_learning_rate, **options
        ):
            images = record.images_seen // record.step * (steps + record.step)
            yield Record(steps + record.step, images, record.values)
    ema.copy_to(encoder.parameters())


def train_judge(
    judge: Judge,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    shift: int = 0,
    noise: float = 0.0,
    weight_decay: float = 0.01,
) -> Iterator[Record]:
    """Train the judge on uint8 images moved by up to `shift` pixels, with Gaussian noise of std up to `noise`."""
    # One-cycle cosine: the last steps average out the noise that a constant rate leaves.
    schedule = lambda step: 0.5 * (1 + np.cos(np.pi * step / steps))  # noqa: E731

    def loss_of(data: np.ndarray, labels: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        images = images_to_tensor(data)
        images = random_shift(images, shift, generator)
        strength = noise * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images + strength * torch.randn(images.shape, generator=generator)
        logits = judge(images.to(judge.device))
        target = torch.from_numpy(labels).to(judge.device)
        accuracy = (logits.argmax(1) == target).float().mean()
        return F.cross_entropy(logits, target, label_smoothing=0.05), {"train_accuracy": accuracy}

    options = {"learning_rate": learning_rate, "weight_decay": weight_decay, "schedule": schedule}
    yield from fit(judge, batches, loss_of, steps=steps, **options)


def fit(
    model: nn.Module,
    batches: Batches,
    loss_of: Callable[[np.ndarray, np.ndarray], tuple[Tensor, dict[str, Tensor]]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup_steps: int = 0,
    schedule: Callable[[int], float] | None = None,
    max_grad_norm: float = 2.0,
    ema: EMAModel | None = None,
) -> Iterator[Record]:
    """AdamW (0.9, 0.95) with clipping on ``loss_of(data, labels) -> (loss, values)``; raises InputError at a NaN."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    if schedule is None:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup_steps)
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    images_seen = 0
    for step, (data, labels) in zip(range(1, steps + 1), batches, strict=False):
        loss, values = loss_of(data, labels)
        if not torch.isfinite(loss):
            raise InputError(f"loss is {loss.item()} at step {step}; lower the learning rate ({learning_rate})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        if ema is not None:
            ema.step(model.parameters())
        images_seen += len(labels)
        values = {"loss": loss, **values, "grad_norm": grad_norm}
        yield Record(step, images_seen, {name: float(value.detach()) for name, value in values.items()})
    model.eval()


def constant_ema(model: nn.Module, decay: float) -> EMAModel:
    """diffusers' EMA with the paper's constant decay: its `min_decay` switches off the ramp."""
    return EMAModel(model.parameters(), decay=decay, min_decay=decay)


def random_shift(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to `shift` pixels along each axis, repeating the border."""
    if not shift:
        return images
    padded = F.pad(images, [shift] * 4, mode="replicate")
    B, _, H, W = images.shape
    top, left = torch.randint(2 * shift + 1, (2, B), generator=generator)
    rows = top[:, None] + torch.arange(H)
    columns = left[:, None] + torch.arange(W)
    batch = torch.arange(B)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
