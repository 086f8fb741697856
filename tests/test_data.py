"""Data: sources, shards, latents and the stream over them."""

import io
import itertools
import json
import re
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from drift.artifacts import sha256_of_file, write_json
from drift.data import latents as latents_module
from drift.data.latents import cache_shard, read_latent_shard, sample_latents
from drift.data.shards import (
    SPLITS,
    ShardSet,
    gather_index,
    load_images,
    parse_part,
    plan_shards,
    tar_writer,
    write_record,
    write_shard,
)
from drift.data.sources import Digits, ImageFolder, center_crop, decode_image, stratified_split
from drift.data.stream import SHARDS_IN_MEMORY, ShardStream, image_stream, latent_stream
from drift.errors import InputError
from drift.tokenizer import Tokenizer
from pipeline import shard
from tests.conftest import ROOT

# --- Sources ------------------------------------------------------------------------------------------------------


def pixels(sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.data)))


def test_digits_are_1797_rgb_images_of_the_size_asked_for():
    source = Digits(32)
    truth = load_digits()
    assert len(source.labels) == 1797
    assert source.classes == [str(digit) for digit in range(10)]
    np.testing.assert_array_equal(source.labels, truth.target)
    image = Image.open(io.BytesIO(source[1796].data))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
    assert source[1796].label == truth.target[1796]
    with pytest.raises(IndexError):
        source[1797]


def test_an_enlarged_digit_averages_back_to_the_original():
    source, truth = Digits(32), load_digits().images
    for index in range(0, 1797, 50):
        image = pixels(source[index]).astype(float)
        np.testing.assert_array_equal(image[..., 0], image[..., 1])
        np.testing.assert_array_equal(image[..., 0], image[..., 2])
        blocks = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
        # Grey 0 to 16 became 0 to 255; the kernel reaches over a block's edges, by about a level on average.
        assert np.abs(blocks - truth[index] * 255 / 16).mean() < 1.25 * 255 / 16
        assert np.corrcoef(blocks.ravel(), truth[index].ravel())[0, 1] > 0.98


def test_the_split_is_stratified_disjoint_seeded_and_of_the_share_asked_for():
    labels = load_digits().target
    split = stratified_split(labels, 0.2, seed=0)
    train, heldout = split["train"], split["heldout"]
    assert sorted([*train, *heldout]) == list(range(1797))
    for digit in range(10):
        members = int((labels == digit).sum())
        assert abs((labels[heldout] == digit).sum() - 0.2 * members) <= 0.5
    assert abs(len(heldout) / 1797 - 0.2) < 0.003
    again, other = stratified_split(labels, 0.2, seed=0), stratified_split(labels, 0.2, seed=1)
    np.testing.assert_array_equal(train, again["train"])
    np.testing.assert_array_equal(heldout, again["heldout"])
    assert set(heldout) != set(other["heldout"])


def test_a_split_is_shuffled():
    # Sorted by class, a shard would hold few classes.
    labels = np.repeat(np.arange(10), 50)
    for indices in stratified_split(labels, 0.2, seed=0).values():
        assert len(np.unique(labels[indices[:30]])) >= 8


def test_a_class_too_small_to_split_is_named():
    with pytest.raises(InputError, match=r"^class 1 has 1 samples, too few to hold out 60%$"):
        stratified_split(np.array([0, 0, 0, 1]), 0.6, seed=0)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Two classes of three images, one of them with a name that needs care."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for name in ("cat/a.png", "cat/deep/b.v2.png", "cat/c.jpg", "dog/a.png", "dog/b.jpeg", "dog/d.bmp"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    return root


def test_classes_are_the_subfolders_in_sorted_order(image_folder):
    source = ImageFolder(image_folder)
    assert list(source.classes) == ["cat", "dog"]
    np.testing.assert_array_equal(source.labels, [0, 0, 0, 1, 1, 1])
    samples = [source[i] for i in range(6)]
    assert [s.label for s in samples] == [0, 0, 0, 1, 1, 1]
    assert len({s.key for s in samples}) == 6
    assert not any("." in s.key for s in samples), "WebDataset takes what follows a dot for the extension"
    assert samples[0].data == (image_folder / "cat" / "a.png").read_bytes()


def test_a_folder_without_subfolders_is_one_class(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert len(source.classes) == 1
    np.testing.assert_array_equal(source.labels, [0, 0])


def test_a_class_without_images_is_named(image_folder):
    (image_folder / "bird").mkdir()
    with pytest.raises(InputError, match=f"^{re.escape(str(image_folder / 'bird'))}: class without images"):
        ImageFolder(image_folder)


def test_a_missing_folder_of_images_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'none'))}: no such folder"):
        ImageFolder(tmp_path / "none")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_an_image_of_any_mode_becomes_rgb(mode: str):
    suffix = "TIFF" if mode == "CMYK" else "PNG"
    buffer = io.BytesIO()
    Image.new("RGB", (5, 7), (255, 255, 255)).convert(mode).save(buffer, format=suffix)
    image = decode_image(buffer.getvalue(), "image")
    assert (image.mode, image.size) == ("RGB", (5, 7))
    np.testing.assert_array_equal(np.asarray(image), 255)


def test_colours_survive_the_loss_of_transparency():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (10, 20, 30, 128)).save(buffer, format="PNG")
    np.testing.assert_array_equal(np.asarray(decode_image(buffer.getvalue(), "image")), [[[10, 20, 30]] * 2] * 2)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"no image", png(np.zeros((64, 64, 3), np.uint8))[:-40]])
def test_bytes_that_are_no_whole_image_are_refused_by_name(data: bytes):
    with pytest.raises(InputError, match=r"^shard\.tar: key: image does not decode \(.+\)$"):
        decode_image(data, "shard.tar: key")


def test_the_crop_halves_by_mean_then_takes_the_centre():
    rng = np.random.default_rng(0)
    wide = 4 * rng.integers(0, 64, (64, 132, 3), dtype=np.uint8)
    halved = wide.reshape(32, 2, 66, 2, 3).mean((1, 3))
    # The short side is 32 already: bicubic to the same size changes nothing.
    expected = halved[:, 17:49]
    cropped = np.asarray(center_crop(Image.fromarray(wide), 32), dtype=float)
    assert cropped.shape == (32, 32, 3)
    assert np.abs(cropped - expected).max() <= 0.5


def test_the_crop_of_a_tall_image_takes_the_centre_rows():
    tall = np.zeros((101, 40, 3), np.uint8)
    tall[30:70] = 200  # rows 30 to 69 are the middle of 101
    cropped = np.asarray(center_crop(Image.fromarray(tall), 40))
    np.testing.assert_array_equal(cropped, 200)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (33, 32), (63, 64), (64, 64), (65, 31), (200, 47), (10, 300)])
def test_the_crop_follows_adm_at_every_size(width: int, height: int):
    size = 32
    rng = np.random.default_rng(width)
    original = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    # ADM's sizes (guided-diffusion, center_crop_arr), computed on numbers alone.
    w, h = width, height
    halvings = 0
    while min(w, h) >= 2 * size:
        w, h, halvings = w // 2, h // 2, halvings + 1
    scale = size / min(w, h)
    final_w, final_h = round(w * scale), round(h * scale)
    image = original
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    array = np.asarray(image.resize((final_w, final_h), Image.Resampling.BICUBIC))
    top, left = (final_h - size) // 2, (final_w - size) // 2
    expected = array[top : top + size, left : left + size]
    np.testing.assert_array_equal(np.asarray(center_crop(original, size)), expected)
    assert expected.shape == (size, size, 3)


# --- Shards -------------------------------------------------------------------------------------------------------


class SmallDigits(Digits):
    """The first 120 digits: quick to write, every class in."""

    def __init__(self):
        super().__init__(32)
        self.labels = self.labels[:120]
        self.identity = "small digits"


DESCRIPTION = {"kind": "shards", "classes": [str(d) for d in range(10)], "image_size": 32, "flip": False}


def write_shards(source, folder: Path, *, samples_per_shard: int = 40) -> ShardSet:
    plans = plan_shards(source, samples_per_shard=samples_per_shard, heldout_fraction=0.2, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        write_shard(source, plan, folder, identity="id")
    gather_index(folder, [plan.name for plan in plans], "id", {**DESCRIPTION, "classes": list(source.classes)})
    return ShardSet(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Shards of `SmallDigits`; tests that change something copy it."""
    folder = tmp_path_factory.mktemp("written") / "shards"
    write_shards(SmallDigits(), folder)
    return folder


@pytest.fixture
def shards_copy(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "shards")


def entries(folder: Path) -> list[dict]:
    return json.loads((folder / "index.json").read_text())["shards"]


def read_all(shards: ShardSet) -> list[dict]:
    return [sample for entry in shards.index["shards"] for sample in shards.samples(entry)]


def test_shards_are_the_same_bytes_whenever_written(written, tmp_path):
    write_shards(SmallDigits(), tmp_path / "again")
    first = {path.name: path.read_bytes() for path in written.iterdir()}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert first == again


def test_shards_hold_every_sample_once_with_its_label(written):
    truth = load_digits()
    samples = read_all(ShardSet(written))
    keys = [sample["__key__"] for sample in samples]
    assert sorted(keys) == [f"digit-{index:04d}" for index in range(120)]
    for sample in samples:
        assert sample["label"] == truth.target[int(sample["__key__"].removeprefix("digit-"))]


def test_a_shard_is_a_plain_tar_of_pairs_of_files(written):
    with tarfile.open(written / "train-00000.tar") as tar:
        members = tar.getnames()
        stems = Counter(name.partition(".")[0] for name in members)
        assert {name.partition(".")[2] for name in members} == {"png", "cls"}
        assert set(stems.values()) == {2}
        label = tar.extractfile(next(name for name in members if name.endswith(".cls"))).read()
    assert label in {str(digit).encode() for digit in range(10)}


def test_the_index_says_what_each_shard_holds(written):
    shards = ShardSet(written)
    assert shards.index["kind"] == "shards"
    for entry in entries(written):
        path = written / entry["name"]
        samples = list(shards.samples(entry))
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == sha256_of_file(path)
        assert entry["samples"] == len(samples) <= 40
        counts = Counter(sample["label"] for sample in samples)
        assert entry["class_counts"] == [counts[label] for label in range(10)]
    assert sum(entry["samples"] for split in SPLITS for entry in shards.shards(split)) == 120
    assert {entry["split"] for entry in entries(written)} == {"train", "heldout"}
    assert {path.name for path in written.iterdir()} == {"index.json", *(e["name"] for e in entries(written))}


def test_keys_of_an_image_folder_stay_unique_in_shards(image_folder, tmp_path):
    # Two names that fall together once dots are gone.
    Image.new("RGB", (3, 3)).save(image_folder / "cat" / "x.y.png")
    Image.new("RGB", (3, 3)).save(image_folder / "cat" / "x_y.png")
    samples = read_all(write_shards(ImageFolder(image_folder), tmp_path / "shards"))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 8


def test_images_come_back_as_they_went_in(written):
    images, labels = load_images(ShardSet(written), "train")
    assert (images.dtype, images.shape[1:]) == (np.uint8, (32, 32, 3))
    source = SmallDigits()
    keys = [s["__key__"] for e in ShardSet(written).shards("train") for s in ShardSet(written).samples(e)]
    indices = [int(key.removeprefix("digit-")) for key in keys]
    np.testing.assert_array_equal(images, np.stack([pixels(source[i]) for i in indices]))
    np.testing.assert_array_equal(labels, source.labels[indices])
    some, _ = load_images(ShardSet(written), "train", limit=50)
    np.testing.assert_array_equal(some, images[:50])


def refusal(folder: Path) -> str:
    """The one-line message with which reading all shards of a folder is refused."""
    with pytest.raises(InputError) as caught:
        read_all(ShardSet(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("position", [0, 700, -1])
def test_a_changed_byte_is_refused_naming_the_shard(shards_copy, position: int):
    path = shards_copy / "train-00001.tar"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert refusal(shards_copy).startswith(f"{path}: ")


def test_a_truncated_shard_is_refused_naming_it(shards_copy):
    path = shards_copy / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    assert refusal(shards_copy).startswith(f"{path}: ")


def test_a_missing_shard_is_refused_naming_it(shards_copy):
    path = shards_copy / "heldout-00000.tar"
    path.unlink()
    assert refusal(shards_copy).startswith(f"{path}: ")


def test_a_damaged_shard_gives_no_sample_at_all(shards_copy):
    path = shards_copy / "train-00000.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shards = ShardSet(shards_copy)
    with pytest.raises(InputError):
        next(shards.samples(shards.index["shards"][0]))


def one_shard(folder: Path, samples: list[tuple[str, bytes, str]]) -> Path:
    """A shard set of one train shard with ``(key, png, label)`` as given, its checksum right."""
    folder.mkdir()
    with tar_writer(folder / "train-00000.tar") as sink:
        for key, data, label in samples:
            sink.write({"__key__": key, "png": data, "cls": label})
    write_record(folder, "train-00000.tar", "train", [len(samples)], "id")
    gather_index(folder, ["train-00000.tar"], "id", DESCRIPTION)
    return folder


BLACK = png(np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize("label", ["10", "-1", "cat", "", "1.0", "²"])
def test_a_label_that_is_no_class_is_refused_naming_shard_and_sample(tmp_path, label: str):
    folder = one_shard(tmp_path / "shards", [("good", BLACK, "9"), ("bad", BLACK, label)])
    message = refusal(folder)
    assert message.startswith(f"{folder / 'train-00000.tar'}: sample bad has label {label}")


def test_an_image_that_does_not_decode_is_named_when_read(tmp_path):
    folder = one_shard(tmp_path / "shards", [("good", BLACK, "1"), ("bad", b"no image", "1")])
    with pytest.raises(InputError, match=r"train-00000\.tar: bad: image does not decode"):
        load_images(ShardSet(folder), "train")


def test_an_image_that_does_not_decode_is_named_when_sharded(image_folder, tmp_path):
    (image_folder / "dog" / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken: image does not decode \(not an image\)$"):
        write_shards(ImageFolder(image_folder), tmp_path / "shards")
    # Nothing of the shard that would hold it stays behind.
    assert not list((tmp_path / "shards").glob(".*"))


@pytest.mark.parametrize("limit", [600, -1])
def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path, small_files, limit: int):
    # Full in the middle of the tar, and full in its last byte, which only closing it writes.
    source = SmallDigits()
    plan = plan_shards(source, samples_per_shard=40, heldout_fraction=0.2, seed=0)[0]
    whole, folder = tmp_path / "whole", tmp_path / "full"
    whole.mkdir()
    folder.mkdir()
    write_shard(source, plan, whole, identity="id")
    size = (whole / plan.name).stat().st_size
    with small_files(limit % size), pytest.raises(OSError, match="File too large"):
        write_shard(source, plan, folder, identity="id")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["latents", "models", None])
def test_a_folder_of_another_kind_is_refused(tmp_path, kind):
    write_json(tmp_path / "index.json", {"kind": kind, "shards": [], "classes": []})
    with pytest.raises(InputError, match=r"index\.json: describes .*, not 'shards'$"):
        ShardSet(tmp_path)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"index\.json: no such file$"):
        ShardSet(tmp_path)


def test_a_split_without_shards_is_refused(tmp_path):
    folder = one_shard(tmp_path / "shards", [("a", BLACK, "1")])
    with pytest.raises(InputError, match=r"index\.json: no shard of the split 'heldout'$"):
        ShardSet(folder).shards("heldout")


def test_the_digest_of_shards_changes_with_their_content_only(written, tmp_path):
    same = write_shards(SmallDigits(), tmp_path / "same")
    a = ShardSet(one_shard(tmp_path / "a", [("a", BLACK, "1")]))
    b = ShardSet(one_shard(tmp_path / "b", [("a", BLACK, "2")]))
    assert ShardSet(written).digest == same.digest
    assert len({same.digest, a.digest, b.digest}) == 3


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/2/3", "1.5/2", "-1/2", "1/0"])
def test_a_part_that_is_no_part_is_refused(text: str):
    with pytest.raises(InputError, match="1 <= i <= n"):
        parse_part(text)


def test_a_part_is_read_as_two_numbers():
    assert parse_part("2/3") == (2, 3)


# --- Sharding by parts (the stage, in this process) ---------------------------------------------------------------


def run_shard(monkeypatch, folder: Path, *arguments: str) -> None:
    """The shard stage with 100 samples to a shard, writing under `folder`."""
    params = folder / "params.yaml"
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["datasets"]["digits"]["samples_per_shard"] = 100
    params.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["shard", "--dataset", "digits", "--output", "out/shards", *arguments])
    shard.main()


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def test_shards_written_in_parts_equal_those_written_in_one_go(monkeypatch, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    parted.mkdir()
    run_shard(monkeypatch, whole)
    seen: dict[str, tuple[int, int]] = {}
    for part in ("2/3", "1/3", "3/3"):
        run_shard(monkeypatch, parted, "--part", part)
        now = state(parted / "out/shards")
        assert set(now) > set(seen), "every part writes shards of its own"
        assert {name: now[name] for name in seen} == seen, "and leaves those of other parts alone"
        assert not (parted / "out/shards/index.json").exists()
        seen = now
        record = json.loads((parted / "out/shards.parts" / f"{part.replace('/', '-of-')}.json").read_text())
        assert set(record["shards"]) <= set(now)
    run_shard(monkeypatch, parted)
    assert state(parted / "out/shards") == seen, "gathering does not write finished shards again"
    index = (parted / "out/shards/index.json").read_bytes()
    assert index == (whole / "out/shards/index.json").read_bytes()
    assert len(json.loads(index)["shards"]) == 19  # 1437 train and 360 held-out samples by hundreds
    for name in seen:
        assert (parted / "out/shards" / name).read_bytes() == (whole / "out/shards" / name).read_bytes()


def test_gathering_does_what_parts_have_left(monkeypatch, tmp_path):
    run_shard(monkeypatch, tmp_path, "--part", "1/3")
    before = state(tmp_path / "out/shards")
    (tmp_path / "out/shards/train-99999.tar").write_bytes(b"of an earlier, larger run")
    run_shard(monkeypatch, tmp_path)
    after = state(tmp_path / "out/shards")
    assert {name: after[name] for name in before} == before
    shards = ShardSet(tmp_path / "out/shards")
    assert sum(1 for _ in read_all(shards)) == 1797
    assert set(after) == {entry["name"] for entry in shards.index["shards"]}, "shards not in the index are gone"


def test_shards_of_other_parameters_are_written_again(written, tmp_path):
    source = SmallDigits()
    plan = plan_shards(source, samples_per_shard=40, heldout_fraction=0.2, seed=0)[0]
    write_shard(source, plan, tmp_path, identity="old")
    before = state(tmp_path)
    write_shard(source, plan, tmp_path, identity="old")
    assert state(tmp_path) == before
    write_shard(source, plan, tmp_path, identity="new")
    assert state(tmp_path)[plan.name] != before[plan.name]


def test_an_unfinished_shard_is_named_when_gathered(tmp_path):
    source = SmallDigits()
    plans = plan_shards(source, samples_per_shard=40, heldout_fraction=0.2, seed=0)
    write_shard(source, plans[0], tmp_path, identity="id")
    with pytest.raises(InputError, match=rf"{len(plans) - 1} shards are not finished, the first is {plans[1].name}$"):
        gather_index(tmp_path, [plan.name for plan in plans], "id", DESCRIPTION)
    assert not (tmp_path / "index.json").exists()


# --- Latents ------------------------------------------------------------------------------------------------------


class Blocks:
    """Stands in for a tokenizer: the mean of 4 x 4 blocks, and a standard deviation that tells images apart."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        B, C, H, W = images.shape
        blocks = images.reshape(B, C, H // 4, 4, W // 4, 4)
        return blocks.mean((3, 5)), blocks.std((3, 5))


def expected_moments(images: np.ndarray) -> np.ndarray:
    """What `Blocks` gives for uint8 images, in NumPy."""
    x = (images.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2)
    blocks = x.reshape(len(x), 3, 8, 4, 8, 4)
    return np.stack([blocks.mean((3, 5)), blocks.std((3, 5)) * (16 / 15) ** 0.5], axis=1)


def cached(shards: ShardSet, folder: Path, *, flip: bool) -> ShardSet:
    folder.mkdir()
    for entry in shards.index["shards"]:
        cache_shard(shards, entry, Blocks(), folder, flip=flip, batch_size=7, identity="id")
    names = [entry["name"] for entry in shards.index["shards"]]
    gather_index(folder, names, "id", {**DESCRIPTION, "kind": "latents", "flip": flip, "shape": [3, 8, 8]})
    return ShardSet(folder, "latents")


@pytest.mark.parametrize("flip", [False, True])
def test_moments_come_back_in_float16_with_a_flipped_view_only_if_allowed(written, tmp_path, flip: bool):
    shards = ShardSet(written)
    latents = cached(shards, tmp_path / "latents", flip=flip)
    read = [read_latent_shard(latents, entry) for entry in latents.shards("train")]
    moments, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
    images, true_labels = load_images(shards, "train")
    assert moments.dtype == np.float16
    assert moments.shape == (len(images), 2 if flip else 1, 2, 3, 8, 8)
    np.testing.assert_array_equal(labels, true_labels)
    np.testing.assert_allclose(moments[:, 0], expected_moments(images), atol=1e-3)
    if flip:
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        np.testing.assert_allclose(moments[:, 1], expected_moments(mirrored), atol=1e-3)
    index = latents.index["shards"]
    assert [(e["name"], e["split"], e["samples"]) for e in index] == [
        (e["name"], e["split"], e["samples"]) for e in shards.index["shards"]
    ]


def test_float16_moments_are_stored_exactly(written, tmp_path, monkeypatch):
    shards = ShardSet(written)
    entry = shards.shards("heldout")[0]
    values = np.random.default_rng(0).normal(size=(entry["samples"], 2, 4, 2, 2)).astype(np.float16)
    given = iter(values)
    monkeypatch.setattr(latents_module, "_moments", lambda tokenizer, images: np.stack([next(given) for _ in images]))
    cache_shard(shards, entry, None, tmp_path, flip=False, batch_size=5, identity="id")
    gather_index(tmp_path, [entry["name"]], "id", {**DESCRIPTION, "kind": "latents"})
    moments, _ = read_latent_shard(ShardSet(tmp_path, "latents"), entry_of(tmp_path, entry["name"]))
    np.testing.assert_array_equal(moments[:, 0], values)


def entry_of(folder: Path, name: str) -> dict:
    return next(entry for entry in entries(folder) if entry["name"] == name)


def test_latent_shards_that_are_finished_are_not_encoded_again(written, tmp_path):
    shards = ShardSet(written)
    entry = shards.index["shards"][0]
    cache_shard(shards, entry, Blocks(), tmp_path, flip=False, batch_size=7, identity="id")
    before = state(tmp_path)
    # Without a tokenizer, encoding would fail.
    cache_shard(shards, entry, None, tmp_path, flip=False, batch_size=7, identity="id")
    assert state(tmp_path) == before
    with pytest.raises(AttributeError):
        cache_shard(shards, entry, None, tmp_path, flip=False, batch_size=7, identity="another tokenizer")


def test_pixel_space_latents_are_the_image_itself(written, tmp_path):
    shards = ShardSet(written)
    entry = shards.shards("heldout")[0]
    cache_shard(shards, entry, Tokenizer(), tmp_path, flip=False, batch_size=8, identity="id")
    gather_index(tmp_path, [entry["name"]], "id", {**DESCRIPTION, "kind": "latents"})
    moments, _ = read_latent_shard(ShardSet(tmp_path, "latents"), entry_of(tmp_path, entry["name"]))
    images, _ = load_images(shards, "heldout")
    assert moments[:, 0, 0].min() >= -1
    assert moments[:, 0, 0].max() <= 1
    restored = (moments[:, 0, 0].astype(np.float64).transpose(0, 2, 3, 1) + 1) * 127.5
    assert np.abs(restored - images).max() < 0.1
    assert not moments[:, 0, 1].any()


def test_sampled_latents_are_mean_plus_std_times_standard_normal_noise():
    shape = (64, 1, 3, 16, 16)
    rng = torch.Generator().manual_seed(1)
    mean, std = torch.randn(shape, generator=rng).half(), torch.rand(shape, generator=rng).half() + 0.5
    draw = lambda m, s: sample_latents(torch.stack([m, s], dim=2), torch.Generator().manual_seed(7))  # noqa: E731
    latents = draw(mean, std)
    assert (latents.dtype, latents.shape) == (torch.float32, (64, 3, 16, 16))
    noise = draw(torch.zeros_like(mean), torch.ones_like(std))
    torch.testing.assert_close(latents, mean[:, 0].float() + std[:, 0].float() * noise)
    torch.testing.assert_close(draw(mean, torch.zeros_like(std)), mean[:, 0].float())
    # 49,152 draws: mean and variance within five standard errors of 0 and 1.
    assert abs(float(noise.mean())) < 5 / 49_152**0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / 49_152) ** 0.5
    assert not torch.equal(
        noise, sample_latents(torch.stack([mean * 0, std * 0 + 1], 2), torch.Generator().manual_seed(8))
    )


def test_sampled_latents_come_from_either_view_with_equal_chance():
    moments = torch.zeros(2000, 2, 2, 1, 1, 1)
    moments[:, 1, 0] = 1.0
    share = float(sample_latents(moments, torch.Generator().manual_seed(0)).mean())
    assert abs(share - 0.5) < 5 * 0.5 / 2000**0.5


# --- The stream ---------------------------------------------------------------------------------------------------

#: More shards than are held in memory at once, of unequal sizes.
SIZES = [7, 5, 6, 9, 4, 8, 7, 3, 6, 5, 8, 7]
TOTAL = sum(SIZES)


@pytest.fixture
def numbered(tmp_path) -> ShardSet:
    """A shard set whose samples are numbered through; `read_numbers` stands in for reading tars."""
    assert len(SIZES) > SHARDS_IN_MEMORY
    starts = np.cumsum([0, *SIZES])
    shards = [
        {"name": f"train-{i}.tar", "split": "train", "samples": size, "start": int(start)}
        for i, (size, start) in enumerate(zip(SIZES, starts, strict=False))
    ]
    shards.append({"name": "heldout-0.tar", "split": "heldout", "samples": 3, "start": 1000})
    write_json(tmp_path / "index.json", {"kind": "shards", "classes": ["a"], "shards": shards})
    return ShardSet(tmp_path)


def read_numbers(_shards: ShardSet, entry: dict) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.arange(entry["start"], entry["start"] + entry["samples"])
    return numbers, numbers % 10


def stream(shards: ShardSet, *, batch_size: int, seed: int = 0, position: int = 0) -> ShardStream:
    return ShardStream(shards, read_numbers, split="train", batch_size=batch_size, seed=seed, position=position)


def drawn(shards: ShardSet, count: int, **options) -> np.ndarray:
    """The first `count` numbers of a stream, read one by one."""
    return np.array([int(data[0]) for data, _ in itertools.islice(stream(shards, batch_size=1, **options), count)])


def test_every_epoch_is_a_permutation_of_the_split(numbered):
    numbers = drawn(numbered, 3 * TOTAL).reshape(3, TOTAL)
    for epoch in numbers:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(TOTAL))


def test_the_order_differs_between_epochs_and_seeds(numbered):
    first, second = drawn(numbered, 2 * TOTAL).reshape(2, TOTAL)
    other = drawn(numbered, TOTAL, seed=1)
    # Two random orders agree in one place on average.
    assert (first == second).sum() < 10
    assert (first == other).sum() < 10
    np.testing.assert_array_equal(first, drawn(numbered, TOTAL))


def test_the_order_mixes_shards(numbered):
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    assert len(set(shard_of[drawn(numbered, 20)])) >= 4


@pytest.mark.parametrize("batch_size", [1, 4, 16, TOTAL, TOTAL + 13, 3 * TOTAL])
def test_batches_of_any_size_run_through_the_same_order(numbered, batch_size: int):
    count = max(2, 2 * TOTAL // batch_size)
    batches = list(itertools.islice(stream(numbered, batch_size=batch_size), count))
    assert {len(data) for data, _ in batches} == {batch_size}
    numbers = np.concatenate([data for data, _ in batches])
    np.testing.assert_array_equal(numbers, drawn(numbered, len(numbers)))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), numbers % 10)


@pytest.mark.parametrize("batch_size", [5, 16, TOTAL, TOTAL + 13])
def test_a_stream_started_at_a_position_continues_one_that_ran_there(numbered, batch_size: int):
    steps = max(4, 2 * TOTAL // batch_size + 2)
    running = [data for data, _ in itertools.islice(stream(numbered, batch_size=batch_size), steps + 3)]
    for k in range(steps):
        resumed = itertools.islice(stream(numbered, batch_size=batch_size, position=k * batch_size), 3)
        for offset, (data, labels) in enumerate(resumed):
            np.testing.assert_array_equal(data, running[k + offset], err_msg=f"position {k} batches")
            np.testing.assert_array_equal(labels, data % 10)


def test_a_stream_knows_its_position_after_every_batch(numbered):
    running = stream(numbered, batch_size=16)
    assert running.position == 0
    for k, _ in enumerate(itertools.islice(running, 12), start=1):
        assert running.position == 16 * k


def test_a_stream_reads_each_shard_once_an_epoch_and_holds_few(numbered):
    reads: list[str] = []

    def read(shards: ShardSet, entry: dict) -> tuple[np.ndarray, np.ndarray]:
        reads.append(entry["name"])
        return read_numbers(shards, entry)

    running = ShardStream(numbered, read, split="train", batch_size=1, seed=0)
    for _ in itertools.islice(running, TOTAL):
        assert len(running._loaded) <= SHARDS_IN_MEMORY
    assert Counter(reads) == {f"train-{i}.tar": 1 for i in range(len(SIZES))}


def test_the_image_and_latent_streams_give_train_samples_only(written, tmp_path):
    shards = ShardSet(written)
    latents = cached(shards, tmp_path / "latents", flip=True)
    train, _ = load_images(shards, "train")
    options = {"batch_size": len(train), "seed": 3}
    images, labels = next(iter(image_stream(shards, **options)))
    moments, latent_labels = next(iter(latent_stream(latents, **options)))
    # A batch as long as an epoch: every image of the train split, each once.
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in train)
    assert moments.shape == (len(train), 2, 2, 3, 8, 8)
    # Shards of images and latents correspond one to one: the same seed gives the same order.
    np.testing.assert_array_equal(labels, latent_labels)
    np.testing.assert_allclose(moments[:, 0], expected_moments(images), atol=1e-3)


def test_a_stream_over_a_damaged_shard_names_it(shards_copy):
    path = shards_copy / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: "):
        next(iter(image_stream(ShardSet(shards_copy), batch_size=32, seed=0)))
