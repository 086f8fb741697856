"""An endless, seeded stream of batches over shards whose position is one number.

Which sample comes when depends on the seed and on the number of samples drawn before, and on nothing else: a resumed
stream skips to its position without replaying random state.
"""

from collections.abc import Callable, Iterator

import numpy as np

from drift.data.latents import read_latent_shard
from drift.data.shards import ShardSet, load_image

#: Shards read whole and shuffled together; the memory of a stream is this many shards.
SHARDS_IN_MEMORY = 8

ShardReader = Callable[[ShardSet, dict], tuple[np.ndarray, np.ndarray]]


class ShardStream:
    """Batches ``(data [B, ...], labels [B])`` of one split, shuffled anew every epoch, without end.

    Args:
        shards: the shard set; `read` turns one of its shards into two arrays.
        batch_size: samples per batch; batches run across shard and epoch ends, so none is short.
        seed: decides the order.
        position: samples to skip, e.g. those that an interrupted run has drawn.
    """

    def __init__(
        self, shards: ShardSet, read: ShardReader, *, split: str, batch_size: int, seed: int, position: int = 0
    ):
        self._shards, self._read, self._seed = shards, read, seed
        self._entries = shards.shards(split)
        self.batch_size, self.position = batch_size, position
        self._loaded: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        data, labels = [], []
        held = 0
        for group_data, group_labels in self._groups():
            data.append(group_data)
            labels.append(group_labels)
            held += len(group_labels)
            if held < self.batch_size:
                continue
            all_data, all_labels = np.concatenate(data), np.concatenate(labels)
            whole = held - held % self.batch_size
            for start in range(0, whole, self.batch_size):
                self.position += self.batch_size
                yield all_data[start : start + self.batch_size], all_labels[start : start + self.batch_size]
            data, labels, held = [all_data[whole:]], [all_labels[whole:]], held - whole

    def _groups(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shuffled groups of shards from the position on, epoch after epoch."""
        epoch_size = sum(entry["samples"] for entry in self._entries)
        epoch, skip = divmod(self.position, epoch_size)
        while True:
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(len(self._entries))
            for start in range(0, len(order), SHARDS_IN_MEMORY):
                group = [self._entries[i] for i in order[start : start + SHARDS_IN_MEMORY]]
                samples = sum(entry["samples"] for entry in group)
                permutation = rng.permutation(samples)
                if skip >= samples:
                    skip -= samples
                    continue
                data, labels = self._load(group)
                yield data[permutation[skip:]], labels[permutation[skip:]]
                skip = 0
            epoch += 1

    def _load(self, group: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        names = [entry["name"] for entry in group]
        self._loaded = {name: value for name, value in self._loaded.items() if name in names}
        for entry in group:
            if entry["name"] not in self._loaded:
                self._loaded[entry["name"]] = self._read(self._shards, entry)
        data, labels = zip(*(self._loaded[name] for name in names), strict=True)
        return np.concatenate(data), np.concatenate(labels)


def latent_stream(latents: ShardSet, *, batch_size: int, seed: int, position: int = 0) -> ShardStream:
    """Train-split moments float16 ``[B, V, 2, C, h, w]`` and labels; see `drift.data.latents.sample_latents`."""
    options = {"batch_size": batch_size, "seed": seed, "position": position}
    return ShardStream(latents, read_latent_shard, split="train", **options)


def image_stream(shards: ShardSet, *, batch_size: int, seed: int, position: int = 0) -> ShardStream:
    """Train-split images uint8 ``[B, H, W, 3]``, centre-cropped, and labels."""
    options = {"batch_size": batch_size, "seed": seed, "position": position}
    return ShardStream(shards, read_image_shard, split="train", **options)


def read_image_shard(shards: ShardSet, entry: dict) -> tuple[np.ndarray, np.ndarray]:
    """One image shard: uint8 ``[N, H, W, 3]`` and labels ``[N]``."""
    path, size = shards.folder / entry["name"], shards.index["image_size"]
    pairs = [(load_image(sample, size, path), sample["label"]) for sample in shards.samples(entry)]
    images, labels = zip(*pairs, strict=True)
    return np.stack(images), np.array(labels, dtype=np.int64)
