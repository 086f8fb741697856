"""Reading released artifacts: what is wrong with a folder is an InputError that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pytest

from drift.errors import InputError
from drift.official import load_generator, load_mae, read_artifact

REFERENCE = Path(__file__).parent / "reference"
LOADERS = {"generator": load_generator, "mae": load_mae}
WEIGHTS = "ema_params.msgpack"


def array(value: np.ndarray) -> msgpack.ExtType:
    """An array as flax writes it."""
    return msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes())))


@pytest.fixture(params=LOADERS)
def artifact(request, tmp_path) -> tuple[Path, Callable]:
    """A copy of a released artifact, and what loads it."""
    shutil.copytree(REFERENCE / request.param, tmp_path / request.param)
    return tmp_path / request.param, LOADERS[request.param]


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    """Rewrite the parameters; arrays pass through as flax's extension, undecoded."""
    tree = msgpack.unpackb((folder / WEIGHTS).read_bytes(), strict_map_key=False)
    change(tree)
    (folder / WEIGHTS).write_bytes(msgpack.packb(tree))


def leaf(tree: dict, path: str) -> tuple[dict, str]:
    """The dictionary that holds a parameter, and its key there."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree[parent]
    return tree, name


def rewrite(folder: Path, path: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace one parameter by a function of it."""
    value = read_artifact(folder)[1][path]

    def replace(tree: dict) -> None:
        holder, name = leaf(tree, path)
        holder[name] = array(np.ascontiguousarray(change(value)))

    edit(folder, replace)


def matrix_path(folder: Path) -> str:
    """A parameter with two dimensions of different sizes."""
    _, parameters = read_artifact(folder)
    return next(path for path, value in parameters.items() if value.ndim == 2 and value.shape[0] != value.shape[1])


def test_an_artifact_is_its_configuration_and_every_array_by_path(artifact):
    folder, _ = artifact
    config, parameters = read_artifact(folder)
    assert config == json.loads((folder / "metadata.json").read_text())["model_config"]
    # Random parameters of the reference artifacts are multiples of 1/256.
    assert all(value.dtype == np.float32 and ((value * 256) % 1 == 0).all() for value in parameters.values())


def test_a_rewritten_artifact_still_loads(artifact):
    folder, load = artifact
    before = load(folder).state_dict()
    path = matrix_path(folder)
    rewrite(folder, path, lambda value: value + 1)
    after = load(folder).state_dict()
    changed = [name for name in before if not before[name].equal(after[name])]
    assert len(changed) == 1
    assert (after[changed[0]] - before[changed[0]] == 1).all()


@pytest.mark.parametrize("name", [WEIGHTS, "metadata.json"])
def test_a_missing_file_is_named(artifact, name):
    folder, load = artifact
    (folder / name).unlink()
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value) == f"{folder / name}: no such file"


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(artifact, keep):
    folder, load = artifact
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(InputError, match="not a flax msgpack file") as error:
        load(folder)
    assert str(folder / WEIGHTS) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"\xc1 no msgpack", msgpack.packb({"a": msgpack.ExtType(5, b"")}), msgpack.packb({}) + b"more", msgpack.packb(7)],
    ids=["noise", "unknown-extension", "trailing-bytes", "no-dictionary"],
)
def test_a_file_of_something_else_is_named(artifact, content):
    folder, load = artifact
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(folder / WEIGHTS) in str(error.value)


@pytest.mark.parametrize("content", ["{", "{}"], ids=["not-json", "no-model_config"])
def test_metadata_without_a_model_configuration_is_named(artifact, content):
    folder, load = artifact
    (folder / "metadata.json").write_text(content)
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(folder / "metadata.json") in str(error.value)


@pytest.mark.parametrize(("kind", "other"), [("generator", "mae"), ("mae", "generator")])
def test_the_artifact_of_another_model_is_named(kind, other):
    with pytest.raises(InputError) as error:
        LOADERS[other](REFERENCE / kind)
    assert str(REFERENCE / kind) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "path", "name"),
    [
        ("generator", "pos_embed", "position"),
        ("mae", "fc/kernel", "classifier.weight"),
        ("mae", "encoder/layer2_norm/bias", "stage_norms.1.bias"),
    ],
)
def test_a_missing_parameter_is_named(tmp_path, kind, path, name):
    folder = shutil.copytree(REFERENCE / kind, tmp_path / kind)

    def remove(tree: dict) -> None:
        full = next(p for p in read_artifact(folder)[1] if p.endswith(path))
        holder, key = leaf(tree, full)
        del holder[key]

    edit(folder, remove)
    with pytest.raises(InputError, match=r"parameters? missing") as error:
        LOADERS[kind](folder)
    assert str(folder) in str(error.value)
    assert str(error.value).endswith(f" {name}")


def test_a_parameter_without_a_place_is_named(artifact):
    folder, load = artifact
    edit(folder, lambda tree: tree.update(extra={"kernel": array(np.zeros((2, 3), np.float32))}))
    with pytest.raises(InputError, match="parameter extra/kernel has no place") as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("change", [lambda value: value[1:], lambda value: value.T], ids=["fewer-rows", "transposed"])
def test_a_parameter_of_another_shape_is_named_even_with_as_many_elements(artifact, change):
    folder, load = artifact
    path = matrix_path(folder)
    rewrite(folder, path, change)
    with pytest.raises(InputError) as error:
        load(folder)
    assert path in str(error.value)
    assert str(folder) in str(error.value)
