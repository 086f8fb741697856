"""Feature encoders behind one protocol: ``features(x) -> {set name: [B, T, C]}``."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from drift.artifacts import read_json
from drift.encoders.mae import ResNetMAE
from drift.errors import InputError


@runtime_checkable
class Encoder(Protocol):
    """What the drifting loss asks of an encoder."""

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Vector sets ``{name: [B, T, C]}`` of a batch ``[B, C, H, W]``."""
        ...


def load_encoder(folder: Path | str) -> Encoder:
    """The encoder saved in a folder, by the class that its ``config.json`` names; weights from safetensors only."""
    kind = read_json(Path(folder) / "config.json").get("_class_name")
    if kind not in _CLASSES:
        raise InputError(f"{folder}: encoder of unknown class {kind!r}; known: {', '.join(_CLASSES)}")
    try:
        return _CLASSES[kind].from_pretrained(folder, use_safetensors=True)
    except OSError as error:
        raise InputError(f"{folder}: encoder does not load ({str(error).splitlines()[0]})") from None


_CLASSES = {"ResNetMAE": ResNetMAE}

__all__ = ["Encoder", "ResNetMAE", "load_encoder"]
