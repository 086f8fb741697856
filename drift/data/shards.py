"""Image shards: WebDataset tars of ``<key>.png|jpg`` and ``<key>.cls``, described by an ``index.json``.

A shard is the unit of work and of restart: it is written whole, with a small record beside it, and records are gathered
into the index once all are there.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from drift.artifacts import atomic_file, read_json, sha256_of_file, sha256_of_json, write_json
from drift.data.sources import Source, center_crop, decode_image, stratified_split
from drift.errors import InputError

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class ShardPlan:
    """Which samples of a source go into which shard."""

    name: str
    split: str
    indices: np.ndarray


class ShardSet:
    """A folder of shards and its ``index.json``. Raises InputError if the index is missing or of another kind."""

    def __init__(self, folder: Path | str, kind: str = "shards"):
        self.folder = Path(folder)
        path = self.folder / "index.json"
        self.index = read_json(path)
        if self.index.get("kind") != kind:
            raise InputError(f"{path}: describes {self.index.get('kind')!r}, not {kind!r}")
        self.classes: list[str] = self.index["classes"]
        self._verified: set[str] = set()

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the content of every shard."""
        return sha256_of_json([[s["name"], s["sha256"]] for s in self.index["shards"]])

    def shards(self, split: str) -> list[dict]:
        """The index entries of one split; raises InputError if it has none."""
        entries = [s for s in self.index["shards"] if s["split"] == split]
        if not entries:
            raise InputError(f"{self.folder / 'index.json'}: no shard of the split {split!r}")
        return entries

    def require_every_class(self, split: str) -> None:
        """Raise InputError naming the first class without a sample in a split."""
        counts = np.sum([entry["class_counts"] for entry in self.shards(split)], axis=0)
        for name, count in zip(self.classes, counts, strict=True):
            if not count:
                raise InputError(f"{self.folder / 'index.json'}: class {name!r} has no sample in the split {split!r}")

    def samples(self, entry: dict) -> Iterator[dict]:
        """The samples of one shard as WebDataset dictionaries of bytes; its checksum is verified once per process.

        Raises InputError naming the shard if it is missing, truncated or changed, or naming the sample whose label is
        no class.
        """
        path = self.folder / entry["name"]
        self._verify(path, entry)
        with open(path, "rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                label = sample["cls"].decode()
                if not (label.isascii() and label.isdigit() and int(label) < len(self.classes)):
                    raise InputError(
                        f"{path}: sample {sample['__key__']} has label {label}, not one of {len(self.classes)} classes"
                    )
                sample["label"] = int(label)
                yield sample

    def _verify(self, path: Path, entry: dict) -> None:
        if path.name in self._verified:
            return
        if not path.exists():
            raise InputError(f"{path}: no such shard, though index.json names it")
        if path.stat().st_size != entry["bytes"]:
            raise InputError(f"{path}: shard has {path.stat().st_size} bytes, index.json says {entry['bytes']}")
        if sha256_of_file(path) != entry["sha256"]:
            raise InputError(f"{path}: shard does not match its checksum in index.json; it was changed or damaged")
        self._verified.add(path.name)


def plan_shards(source: Source, *, samples_per_shard: int, heldout_fraction: float, seed: int) -> list[ShardPlan]:
    """Split the source (`stratified_split`) and cut each split into shards of at most `samples_per_shard`."""
    plans = []
    for split, indices in stratified_split(source.labels, heldout_fraction, seed).items():
        num_shards = -(-len(indices) // samples_per_shard)
        for number, members in enumerate(np.array_split(indices, max(num_shards, 1))):
            if len(members):
                plans.append(ShardPlan(f"{split}-{number:05d}.tar", split, members))
    return plans


def write_shard(source: Source, plan: ShardPlan, folder: Path, *, identity: str) -> None:
    """Write one shard and its record, unless they are there already with the same `identity`.

    Every image is decoded once, so that a broken one is named now and not by a later stage.
    """
    if finished_record(folder, plan.name, identity):
        return
    with tar_writer(folder / plan.name) as sink:
        for index in plan.indices:
            sample = source[index]
            decode_image(sample.data, f"{folder / plan.name}: {sample.key}")
            sink.write({"__key__": sample.key, sample.suffix: sample.data, "cls": str(sample.label)})
    counts = np.bincount(source.labels[plan.indices], minlength=len(source.classes))
    write_record(folder, plan.name, plan.split, counts.tolist(), identity)


@contextmanager
def tar_writer(path: Path) -> Iterator[webdataset.TarWriter]:
    """webdataset's TarWriter: reproducible bytes, and the name only once the tar is whole."""
    # The raw file is closed even where flushing the buffer fails on a full disk.
    with (
        atomic_file(path) as temporary,
        open(temporary, "wb", buffering=0) as raw,
        io.BufferedWriter(raw) as stream,
        webdataset.TarWriter(stream, mtime=0, encoder=_as_bytes) as sink,
    ):
        yield sink


def write_record(folder: Path, name: str, split: str, class_counts: list[int], identity: str) -> None:
    """Record that a shard is whole, beside it; `gather_index` collects the records."""
    path = folder / name
    record = {
        "name": name,
        "split": split,
        "samples": sum(class_counts),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
        "class_counts": class_counts,
    }
    write_json(_record_path(folder, name), {"identity": identity, "record": record})


def finished_record(folder: Path, name: str, identity: str) -> dict | None:
    """The record of a finished shard of this `identity`, or None."""
    path = _record_path(folder, name)
    if not (path.exists() and (folder / name).exists()):
        return None
    content = read_json(path)
    return content["record"] if content["identity"] == identity else None


def gather_index(folder: Path, names: Iterable[str], identity: str, description: dict) -> dict:
    """Write ``index.json`` from the records of all shards, and drop records and whatever else is no longer named."""
    names = list(names)
    records = [finished_record(folder, name, identity) for name in names]
    missing = [name for name, record in zip(names, records, strict=True) if record is None]
    if missing:
        raise InputError(f"{folder}: {len(missing)} shards are not finished, the first is {missing[0]}")
    index = {**description, "shards": records}
    write_json(folder / "index.json", index)
    for path in folder.iterdir():
        if path.name not in {*names, "index.json"} and path.suffix in {".tar", ".json"}:
            os.unlink(path)
    return index


def load_image(sample: dict, size: int, shard: Path | str) -> np.ndarray:
    """Decode one WebDataset sample to uint8 ``[size, size, 3]`` by the ADM centre crop."""
    suffix = next(k for k in sample if not k.startswith("__") and k not in ("cls", "label"))
    image = decode_image(sample[suffix], f"{shard}: {sample['__key__']}")
    return np.asarray(center_crop(image, size))


def load_images(shards: ShardSet, split: str, *, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The images uint8 ``[N, H, W, 3]`` and labels int64 ``[N]`` of a split, the first `limit` of them."""
    images, labels = [], []
    for entry in shards.shards(split):
        for sample in shards.samples(entry):
            images.append(load_image(sample, shards.index["image_size"], shards.folder / entry["name"]))
            labels.append(sample["label"])
            if limit is not None and len(images) == limit:
                break
        if limit is not None and len(images) == limit:
            break
    return np.stack(images), np.array(labels, dtype=np.int64)


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{Path(name).stem}.json"


def _as_bytes(sample: dict) -> dict:
    return {k: v.encode() if isinstance(v, str) and not k.startswith("__") else v for k, v in sample.items()}


def parse_part(text: str) -> tuple[int, int]:
    """``"i/n"`` to (i, n), 1 <= i <= n; raises InputError otherwise."""
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        raise InputError(f"part {text!r} is not of the form i/n with 1 <= i <= n")
    return part, parts


def identity_of(*values: object) -> str:
    """Digest of everything that decides a shard's content."""
    return sha256_of_json(json.loads(json.dumps(values)))
