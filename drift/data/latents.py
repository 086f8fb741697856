"""Cached latents: WebDataset tars of float16 posterior moments, one tar per image shard, described by ``index.json``.

``<key>.npy`` holds ``[2, C, h, w]``, mean and standard deviation in scaled latent units; ``<key>.flip.npy`` the same of
the mirrored image where the dataset allows flips; ``<key>.cls`` the label. Latents are sampled at load.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from drift.data.shards import ShardSet, finished_record, load_image, tar_writer, write_record
from drift.tokenizer import Tokenizer, images_to_tensor


def cache_shard(
    shards: ShardSet, entry: dict, tokenizer: Tokenizer, folder: Path, *, flip: bool, batch_size: int, identity: str
) -> None:
    """Encode one image shard into one latent shard, unless it is there already with the same `identity`."""
    if finished_record(folder, entry["name"], identity):
        return
    with tar_writer(folder / entry["name"]) as sink:
        for samples in _batches(shards.samples(entry), batch_size):
            path = shards.folder / entry["name"]
            images = images_to_tensor(np.stack([load_image(s, shards.index["image_size"], path) for s in samples]))
            moments = _moments(tokenizer, images)
            flipped = _moments(tokenizer, images.flip(3)) if flip else None
            for i, sample in enumerate(samples):
                member = {"__key__": sample["__key__"], "cls": sample["cls"], "npy": _npy(moments[i])}
                if flipped is not None:
                    member["flip.npy"] = _npy(flipped[i])
                sink.write(member)
    write_record(folder, entry["name"], entry["split"], entry["class_counts"], identity)


def read_latent_shard(latents: ShardSet, entry: dict) -> tuple[np.ndarray, np.ndarray]:
    """One latent shard: moments float16 ``[N, V, 2, C, h, w]`` (V views: the image, its flip) and labels ``[N]``."""
    moments, labels = [], []
    for sample in latents.samples(entry):
        views = [sample[k] for k in ("npy", "flip.npy") if k in sample]
        moments.append(np.stack([np.load(io.BytesIO(view), allow_pickle=False) for view in views]))
        labels.append(sample["label"])
    return np.stack(moments), np.array(labels, dtype=np.int64)


def sample_latents(moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw latents float32 ``[B, C, h, w]`` from moments ``[B, V, 2, C, h, w]``: a random view, mean + std * noise."""
    B, V = moments.shape[:2]
    view = torch.randint(V, (B,), generator=generator)
    mean, std = moments[torch.arange(B), view].float().unbind(1)
    return mean + std * torch.randn(mean.shape, generator=generator)


def _moments(tokenizer: Tokenizer, images: torch.Tensor) -> np.ndarray:
    mean, std = tokenizer.encode(images)
    return torch.stack([mean, std], dim=1).half().cpu().numpy()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _batches(samples: Iterator[dict], size: int) -> Iterator[list[dict]]:
    batch: list[dict] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
