"""What a report says of samples, in the eyes of a judge: distances, diversity, memorisation, the sweep over alpha."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drift.metrics.distribution import compare, memorisation, within_class_variance
from drift.metrics.judge import Judge
from drift.metrics.latency import latency_ms
from drift.metrics.restoration import psnr_db, ssim
from drift.sampling import DriftPipeline, sample_in_batches
from drift.tokenizer import Tokenizer, images_to_tensor, tensor_to_images

LATENCY_BATCHES = (1, 64)


@dataclass(frozen=True)
class Reference:
    """Real images uint8 ``[N, H, W, 3]``, their labels ``[N]`` and the judge's features ``[N, D]``."""

    images: np.ndarray
    labels: np.ndarray
    features: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, judge: Judge) -> "Reference":
        return cls(images, labels, judge.judge(images)[0])


def sample_metrics(
    images: np.ndarray,
    labels: np.ndarray,
    judge: Judge,
    train: Reference,
    heldout: Reference,
    *,
    size: int,
    draws: int,
    seed: int,
) -> dict[str, float]:
    """Every measure of one set of samples; see `compare`, `within_class_variance`, `class_accuracy`."""
    features, predicted = judge.judge(images)
    metrics: dict[str, float] = {}
    for name, (mean, std) in compare(features, heldout.features, size=size, draws=draws, seed=seed).items():
        metrics |= {f"{name}_judge": mean, f"{name}_judge_std": std}
    variance = within_class_variance(images, labels, train.images, train.labels)
    return {
        **metrics,
        "class_accuracy": float((predicted == labels).mean()),
        "within_class_variance_mean": variance["mean"],
        "within_class_variance_worst": variance["worst"],
    }


def floor_metrics(train: Reference, heldout: Reference, *, size: int, draws: int, seed: int) -> dict[str, float]:
    """The same distances between train and held-out images: what a perfect generator would score."""
    values = compare(train.features, heldout.features, size=size, draws=draws, seed=seed)
    floor: dict[str, float] = {}
    for name, (mean, std) in values.items():
        floor |= {f"{name}_judge_floor": mean, f"{name}_judge_floor_std": std}
    return floor


def memorisation_metrics(
    images: np.ndarray, train: Reference, heldout: Reference
) -> tuple[dict[str, float], np.ndarray]:
    """`memorisation` as metrics, and the nearest training image of each sample."""
    found = memorisation(images, train.images, heldout.images)
    names = ("distance", "heldout_distance", "ratio", "copies")
    return {f"memorisation_{name}": found[name] for name in names}, found["nearest"]


def reconstruction_metrics(tokenizer: Tokenizer, images: np.ndarray, *, batch_size: int = 64) -> dict[str, float]:
    """PSNR (dB) and SSIM of the tokenizer's reconstruction of uint8 images from the posterior mean."""
    decoded = [
        tensor_to_images(tokenizer.decode(tokenizer.encode(images_to_tensor(images[start : start + batch_size]))[0]))
        for start in range(0, len(images), batch_size)
    ]
    rebuilt = np.concatenate(decoded)
    return {"reconstruction_psnr_db": psnr_db(rebuilt, images), "reconstruction_ssim": ssim(rebuilt, images)}


def alpha_sweep(
    pipeline: DriftPipeline,
    alphas: Sequence[float],
    measure: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    *,
    num_images: int,
    seed: int,
) -> list[dict[str, float]]:
    """`measure(images, labels)` of balanced samples at each alpha, from the same noise."""
    labels = torch.arange(num_images) % pipeline.generator.config.num_classes
    rows = []
    for alpha in alphas:
        random = torch.Generator().manual_seed(seed)
        images = sample_in_batches(pipeline, labels, alpha, generator=random)
        rows.append({"guidance_scale": alpha, **measure(images, labels.numpy())})
    return rows


def latency_metrics(pipeline: DriftPipeline, *, repeats: int) -> dict[str, float]:
    """Milliseconds per image at batch 1 and 64, median and 95th percentile, without and with decode."""
    metrics = {}
    for batch in LATENCY_BATCHES:
        labels = torch.arange(batch) % pipeline.generator.config.num_classes
        for suffix, output_type in (("", "latent"), ("_decode", "uint8")):
            random = torch.Generator().manual_seed(0)
            call = lambda kind=output_type: pipeline(labels, 1.0, generator=random, output_type=kind)  # noqa: B023, E731
            measured = latency_ms(call, repeats=repeats)
            metrics[f"latency_batch{batch}{suffix}_ms"] = measured["median"] / batch
            metrics[f"latency_batch{batch}{suffix}_p95_ms"] = measured["p95"] / batch
    return metrics


def parameter_counts(pipeline: DriftPipeline) -> dict[str, int]:
    """Parameters of what sampling runs, and the number of its forward passes (NFE)."""
    count = lambda module: sum(p.numel() for p in module.parameters()) if module is not None else 0  # noqa: E731
    decoder = pipeline.vae.decoder if pipeline.vae is not None else None
    return {"nfe": 1, "generator_parameters": count(pipeline.generator), "decoder_parameters": count(decoder)}
