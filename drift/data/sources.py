"""Where images come from: scikit-learn's digits, or a folder of images with or without class sub-folders."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from drift.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Sample:
    """One encoded image: `key` names it in shards and messages, `suffix` its format (``png``, ``jpg``)."""

    key: str
    suffix: str
    data: bytes
    label: int


class Source(Protocol):
    """A finite, ordered set of labelled images."""

    classes: Sequence[str]
    labels: np.ndarray
    #: Digest of what decides the content, so that shards of another source are never taken for its own.
    identity: object

    def __getitem__(self, index: int) -> Sample: ...


class Digits:
    """scikit-learn's 1,797 handwritten digits (8 x 8, 10 classes), as RGB PNG of `size` x `size` pixels.

    Enlarged bicubically. A digit has a handedness: this source must not be mirrored.
    """

    def __init__(self, size: int = 32):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.classes = [str(name) for name in digits.target_names]
        self.labels = digits.target.astype(np.int64)
        self.identity = ["scikit-learn digits", size, len(self.labels)]
        self._images, self._size = digits.images, size

    def __getitem__(self, index: int) -> Sample:
        grey = np.round(self._images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(grey).resize((self._size, self._size), Image.Resampling.BICUBIC).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return Sample(f"digit-{index:04d}", "png", buffer.getvalue(), int(self.labels[index]))


class ImageFolder:
    """Images under `root`, one class per sub-folder in sorted order; without sub-folders, one class for all.

    Raises InputError for a missing folder, for one without images and for a class without images.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"{root}: no such folder of images")
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.classes = [p.name for p in folders] or ["image"]
        self._files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders or [self.root]):
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise InputError(f"{folder}: class without images (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
            self._files += files
            labels += [label] * len(files)
        self.labels = np.array(labels, dtype=np.int64)
        # Size and time tell an edited image from the one in a finished shard without reading them all.
        self.identity = [[str(f.relative_to(self.root)), f.stat().st_size, f.stat().st_mtime_ns] for f in self._files]

    def __getitem__(self, index: int) -> Sample:
        path = self._files[index]
        relative = path.relative_to(self.root).with_suffix("")
        # A key must not hold a dot (WebDataset takes what follows for the extension), and must stay unique.
        key = f"{index:08d}-{'-'.join(relative.parts)}".replace(".", "_")
        return Sample(key, path.suffix.lower().lstrip("."), path.read_bytes(), int(self.labels[index]))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode to RGB; raises InputError naming the image if its bytes are not a whole image."""
    try:
        image = Image.open(io.BytesIO(data))
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"{name}: image does not decode ({reason})") from None


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The ADM centre crop: halve by box filter while twice too large, bicubic to the short side, crop the centre."""
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def stratified_split(labels: np.ndarray, heldout_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the ``train`` and ``heldout`` splits, each shuffled; every class gives the same share.

    Raises InputError if a class has too few samples to be in the train split.
    """
    rng = np.random.default_rng(seed)
    train, heldout = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_heldout = round(len(members) * heldout_fraction)
        if num_heldout == len(members):
            raise InputError(f"class {label} has {len(members)} samples, too few to hold out {heldout_fraction:.0%}")
        heldout.append(members[:num_heldout])
        train.append(members[num_heldout:])
    return {"train": rng.permutation(np.concatenate(train)), "heldout": rng.permutation(np.concatenate(heldout))}
