"""The paper's released JAX artifacts, read into this project's models without JAX or flax.

An artifact is a folder with ``ema_params.msgpack`` (flax's format, nested dictionaries of arrays) and
``metadata.json``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import msgpack
import numpy as np
import torch

from drift.artifacts import read_json
from drift.encoders.mae import ResNetMAE
from drift.errors import InputError
from drift.generator import Generator

_NDARRAY = 1  # flax's extension code: (shape, dtype name, bytes)

_GENERATOR_CONFIG = (
    *("in_channels", "input_size", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio"),
    *("num_classes", "n_cls_tokens", "noise_coords", "noise_classes", "attn_fp32"),
)
_MAE_CONFIG = ("in_channels", "base_channels", "layers", "num_classes", "input_patch_size", "patch_size")

#: Rewrites of flax parameter paths, applied in order; what they leave is this project's name of the module.
_GENERATOR_NAMES = [
    (r"/Dense_0/", "/"),
    (r"^LightningDiT_0/", ""),
    (r"^Embed_0/", "class_embedding/"),
    (r"^noise_embeds_(\d+)/", r"style_embeddings/\1/"),
    (r"^TimestepEmbedder_0/TorchLinear_0/", "guidance_embedding/mlp/0/"),
    (r"^TimestepEmbedder_0/TorchLinear_1/", "guidance_embedding/mlp/2/"),
    (r"^RMSNorm_0/", "guidance_embedding/norm/"),
    (r"^cls_embed$", "registers"),
    (r"^pos_embed$", "position"),
    (r"^FinalLayer_0/RMSNorm_0/", "final_norm/"),
    (r"^FinalLayer_0/TorchLinear_0/", "final_modulation/linear/"),
    (r"^FinalLayer_0/TorchLinear_1/", "unpatchify/"),
    (r"^TorchLinear_0/", "patchify/"),
    (r"^TorchLinear_1/", "register_projection/"),
    (r"^blocks_(\d+)/", r"blocks/\1/"),
    (r"/Attention_0/TorchLinear_0/", "/attention/qkv/"),
    (r"/Attention_0/TorchLinear_1/", "/attention/out/"),
    (r"/Attention_0/", "/attention/"),
    (r"/SwiGLUFFN_0/TorchLinear_0/", "/mlp/gate/"),
    (r"/SwiGLUFFN_0/TorchLinear_1/", "/mlp/up/"),
    (r"/SwiGLUFFN_0/TorchLinear_2/", "/mlp/out/"),
    (r"^(blocks/\d+)/RMSNorm_0/", r"\1/attention_norm/"),
    (r"^(blocks/\d+)/RMSNorm_1/", r"\1/mlp_norm/"),
    (r"^(blocks/\d+)/TorchLinear_0/", r"\1/modulation/linear/"),
]
_MAE_NAMES = [
    (r"^encoder/conv1/", "stem/0/"),
    (r"^encoder/gn1/", "stem/1/"),
    (r"^encoder/layer(\d)_norm/", lambda m: f"stage_norms/{int(m[1]) - 1}/"),
    (r"^encoder/stages_(\d+)/layers_(\d+)/", r"stages/\1/\2/"),
    (r"^(stages/\d+/\d+)/gn(\d)/", r"\1/norm\2/"),
    (r"^(stages/\d+/\d+)/proj_conv/", r"\1/shortcut/0/"),
    (r"^(stages/\d+/\d+)/proj_gn/", r"\1/shortcut/1/"),
    (r"^decoder/bridge/conv/", "decoder/bridge/0/"),
    (r"^decoder/bridge/gn/", "decoder/bridge/1/"),
    (r"^decoder/up(\d)\d/", lambda m: f"decoder/ups/{4 - int(m[1])}/"),
    (r"/concat_norm_fn/", "/norm/"),
    (r"/proj/conv/", "/convs/0/0/"),
    (r"/proj/gn/", "/convs/0/1/"),
    (r"/refine/conv/", "/convs/1/0/"),
    (r"/refine/gn/", "/convs/1/1/"),
    (r"^fc/", "classifier/"),
]


def read_artifact(folder: Path | str) -> tuple[dict, dict[str, np.ndarray]]:
    """The ``model_config`` and the parameters ``{flax path: array}`` of a released artifact.

    Raises InputError for a missing or unreadable file.
    """
    folder = Path(folder)
    config = read_json(folder / "metadata.json").get("model_config")
    if not isinstance(config, Mapping):
        raise InputError(f"{folder / 'metadata.json'}: no model_config")
    path = folder / "ema_params.msgpack"
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_array, strict_map_key=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (msgpack.UnpackException, ValueError) as error:
        raise InputError(f"{path}: not a flax msgpack file ({error})") from None
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: not a flax msgpack file (no dictionary)")
    return config, _flatten(tree)


def load_generator(folder: Path | str) -> Generator:
    """The released generator of an artifact folder."""
    config, parameters = read_artifact(folder)
    _require(config, _GENERATOR_CONFIG, folder, "a generator")
    model = Generator(
        in_channels=config["in_channels"],
        input_size=config["input_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
        num_registers=config["n_cls_tokens"],
        num_styles=config["noise_coords"],
        style_codes=config["noise_classes"],
        attention_in_float32=config["attn_fp32"],
    )
    return _load(model, parameters, _GENERATOR_NAMES, folder)


def load_mae(folder: Path | str) -> ResNetMAE:
    """The released masked autoencoder of an artifact folder."""
    config, parameters = read_artifact(folder)
    _require(config, _MAE_CONFIG, folder, "a masked autoencoder")
    model = ResNetMAE(
        in_channels=config["in_channels"],
        width=config["base_channels"],
        depths=tuple(config["layers"]),
        num_classes=config["num_classes"],
        input_patch_size=config["input_patch_size"],
        mask_patch=config["patch_size"],
    )
    return _load(model, parameters, _MAE_NAMES, folder)


def _require(config: Mapping, keys: tuple[str, ...], folder: Path | str, kind: str) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise InputError(f"{folder}: not {kind}: model_config lacks {', '.join(missing)}")


def _load(model: torch.nn.Module, parameters: Mapping[str, np.ndarray], names: list, folder: Path | str):
    ours = model.state_dict()
    state = {}
    for path, array in parameters.items():
        name = path
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        name, value = _to_torch(name, array)
        if name not in ours:
            raise InputError(f"{folder}: parameter {path} has no place in this model")
        if [n for n in value.shape if n != 1] != [n for n in ours[name].shape if n != 1]:
            raise InputError(f"{folder}: parameter {path} is {array.shape}, not {tuple(ours[name].shape)}")
        state[name] = value.reshape(ours[name].shape)
    missing = sorted(set(ours) - set(state))
    if missing:
        raise InputError(f"{folder}: parameters missing for {', '.join(missing)}")
    model.load_state_dict(state)
    return model.eval()


def _to_torch(name: str, array: np.ndarray) -> tuple[str, torch.Tensor]:
    """Flax leaf to torch: kernels [in, out] and HWIO are transposed, ``scale`` and ``embedding`` become ``weight``."""
    module, _, leaf = name.rpartition("/")
    if leaf == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    name = f"{module}/{leaf}" if module else leaf
    return name.replace("/", "."), torch.from_numpy(np.array(array))


def _array(code: int, data: bytes) -> np.ndarray:
    if code != _NDARRAY:
        raise ValueError(f"unknown extension {code}")
    shape, dtype, buffer = msgpack.unpackb(data, strict_map_key=False)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat
