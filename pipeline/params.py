"""Typed sections of ``params.yaml``: the only place that validates. Unknown keys are refused, with the nearest known.

A *run* is an experiment, ``digits``, or a variant of one, ``digits.temperature.t002``: an ablation table's dotted
overrides applied to it.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from drift.artifacts import sha256_of_json
from drift.errors import InputError
from drift.field import KERNELS, NORMALIZATIONS
from drift.generator import GENERATORS

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Alpha = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class Section(BaseModel):
    """A mapping of known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(Section):
    source: Literal["digits", "folder"]
    path: str | None = None
    image_size: Count = 256
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    flip: bool = True
    samples_per_shard: Count = 1000
    parts: Count = 1
    seed: CountOrZero = 0

    @model_validator(mode="after")
    def _path_where_needed(self):
        if (self.source == "folder") != (self.path is not None):
            raise ValueError("path: must be given for source 'folder', and only for it")
        if self.source == "digits" and self.flip:
            raise ValueError("flip: digits have a handedness and must not be mirrored")
        return self


class Tokenizer(Section):
    dataset: Name
    pretrained: str | None = None
    identity: bool = False
    block_out_channels: list[Count] = [16, 32, 64]
    layers_per_block: Count = 1
    latent_channels: Count = 4
    norm_groups: Count = 8
    kl_weight: NonNegative = 1e-4
    batch_size: Count = 64
    steps: Count = 300
    learning_rate: Rate = 2e-3
    encode_batch_size: Count = 64
    seed: CountOrZero = 0

    @model_validator(mode="after")
    def _groups_divide(self):
        odd = [channels for channels in self.block_out_channels if channels % self.norm_groups]
        if odd:
            raise ValueError(f"block_out_channels: {odd[0]} does not divide into {self.norm_groups} norm_groups")
        if self.identity and self.pretrained:
            raise ValueError("identity: a tokenizer is the identity or pretrained, not both")
        return self

    def reduction(self) -> int | None:
        """Image pixels per latent position along a side; None where only the pretrained weights know."""
        if self.pretrained:
            return None
        return 1 if self.identity else 2 ** (len(self.block_out_channels) - 1)


class Encoder(Section):
    dataset: Name
    tokenizer: Name
    width: Count = 256
    depths: Annotated[list[Count], Field(min_length=4, max_length=4)] = [3, 4, 6, 3]
    input_patch_size: Count = 1
    mask_patch: Count = 2
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    batch_size: Count = 8192
    steps: Count = 30000
    warmup_steps: CountOrZero = 4000
    learning_rate: Rate = 4e-3
    weight_decay: NonNegative = 0.01
    ema_decay: Decay = 0.9995
    finetune_steps: CountOrZero = 3000
    finetune_learning_rate: Rate = 4e-3
    classification_weight: Share = 0.1
    classification_warmup_steps: CountOrZero = 1000
    seed: CountOrZero = 0


class Judge(Section):
    dataset: Name
    width: Count = 16
    feature_size: Annotated[int, Field(ge=2, le=64)] = 64
    batch_size: Count = 64
    steps: Count = 400
    learning_rate: Rate = 2e-3
    shift: CountOrZero = 2
    noise: NonNegative = 0.2
    seed: CountOrZero = 0


class GeneratorSize(Section):
    size: Literal[tuple(GENERATORS)] | None = None
    patch_size: Count = 2
    width: Count = 768
    depth: Count = 12
    heads: Count = 12
    mlp_ratio: Rate = 4.0
    num_registers: CountOrZero = 16
    num_styles: CountOrZero = 32
    style_codes: Count = 64
    class_embedding_std: NonNegative = 0.02
    style_embedding_std: NonNegative = 0.02
    guidance_gain: Rate = 0.02
    attention_in_float32: bool = True

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width: {self.width} must divide into {self.heads} heads of even width")
        if self.width % 4:
            raise ValueError(f"width: {self.width} must be a multiple of 4 for the position embedding")
        return self


class Train(Section):
    steps: Count
    labels: Count = 64
    generated: Annotated[int, Field(ge=2)] = 64
    positives: Count = 64
    unconditional: Count = 16
    guidance_power: float = 3.0
    guidance_range: Annotated[list[Alpha], Field(min_length=2, max_length=2)] = [1.0, 4.0]
    unguided_fraction: Share = 0.0
    temperatures: Annotated[list[Rate], Field(min_length=1)] = [0.02, 0.05, 0.2]
    kernel: Literal[KERNELS] = "laplacian"
    normalization: Literal[NORMALIZATIONS] = "both"
    positive_weight: NonNegative = 1.0
    negative_weight: NonNegative = 1.0
    features: list[str] | None = None
    learning_rate: Rate = 2e-4
    warmup_steps: CountOrZero = 5000
    decay_fraction: Share = 0.0
    weight_decay: NonNegative = 0.01
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    max_grad_norm: Rate = 2.0
    ema_decay: Decay = 0.999
    push: Count = 64
    queue_class_capacity: Count = 128
    queue_global_capacity: Count = 1000
    precision: Literal["no", "bf16"] = "no"
    checkpoint_every: Count = 1000
    grid_every: Count = 1000
    log_every: Count = 10
    seed: CountOrZero = 0

    @model_validator(mode="after")
    def _consistent(self):
        if self.push < self.labels:
            raise ValueError(f"push: {self.push} newest samples cannot give {self.labels} labels")
        if self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError(f"guidance_range: {self.guidance_range} must rise")
        return self


class Sample(Section):
    num_images: Count = 50000
    guidance_scale: Alpha = 1.0
    batch_size: Count = 250
    seed: CountOrZero = 0


class Evaluate(Section):
    draws: Count = 10
    sweep: list[Alpha] = [1.0, 1.5, 2.0, 2.5, 3.0]
    sweep_images: Count = 1000
    latency_repeats: Count = 30
    paper_fid: float | None = None
    seed: CountOrZero = 0


class Experiment(Section):
    dataset: Name
    tokenizer: Name
    encoder: Name
    judge: Name
    generator: GeneratorSize
    train: Train
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()


class Ablation(Section):
    description: str
    variants: dict[Name, dict[str, Any]]


class Names(Section):
    """What ``dvc.yaml`` needs to name paths: DVC cannot look a name up under another name."""

    dataset: Name
    tokenizer: Name
    encoder: Name
    judge: Name


class Params(Section):
    """The whole file; every name that an entry gives must exist."""

    experiment: str
    names: Names
    datasets: dict[Name, Dataset]
    tokenizers: dict[Name, Tokenizer]
    encoders: dict[Name, Encoder]
    judges: dict[Name, Judge]
    experiments: dict[Name, Experiment]
    ablations: dict[Name, Ablation] = {}

    @model_validator(mode="after")
    def _names_exist(self):
        for kind in ("tokenizers", "encoders", "judges", "experiments"):
            for name, entry in getattr(self, kind).items():
                for field in ("dataset", "tokenizer", "encoder", "judge"):
                    value = getattr(entry, field, None)
                    if value is not None and value not in getattr(self, f"{field}s"):
                        known = nearest(value, getattr(self, f"{field}s"))
                        raise ValueError(f"{kind}.{name}.{field}: no {field} is named {value!r}{known}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self):
        for name, entry in self.experiments.items():
            for field in ("tokenizer", "encoder", "judge"):
                part = getattr(self, f"{field}s")[getattr(entry, field)]
                if part.dataset != entry.dataset:
                    raise ValueError(
                        f"experiments.{name}.{field}: {getattr(entry, field)!r} is of the dataset {part.dataset!r}, "
                        f"the experiment of {entry.dataset!r}"
                    )
            reduction, size = self.tokenizers[entry.tokenizer].reduction(), self.datasets[entry.dataset].image_size
            patch = entry.generator.patch_size
            if reduction and entry.generator.size is None and size % (reduction * patch):
                raise ValueError(
                    f"experiments.{name}.generator.patch_size: images of {size} pixels do not divide into "
                    f"patches of {patch} latents of {reduction} pixels"
                )
            tokenizer = self.encoders[entry.encoder].tokenizer
            if tokenizer != entry.tokenizer:
                raise ValueError(
                    f"experiments.{name}.encoder: {entry.encoder!r} reads latents of {tokenizer!r}, "
                    f"the experiment makes those of {entry.tokenizer!r}"
                )
        return self

    @model_validator(mode="after")
    def _names_agree(self):
        if self.experiment not in self.experiments:
            raise ValueError(f"experiment: unknown {self.experiment!r}{nearest(self.experiment, self.experiments)}")
        for field, name in self.names:
            wanted = getattr(self.experiments[self.experiment], field)
            if name != wanted:
                raise ValueError(f"names.{field}: {name!r}, but the experiment {self.experiment!r} uses {wanted!r}")
        return self


def load(path: Path | str) -> Params:
    """Read and validate; raises InputError with one line per mistake, each naming file and key."""
    return validate(read(path), str(path))


def read(path: Path | str) -> dict:
    """The raw mapping; raises InputError if the file is missing or is not YAML."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping of sections")
    return content


def validate(content: Mapping, path: str) -> Params:
    """`Params` of a raw mapping; raises InputError as `load`."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        lines = [f"{path}: {describe(mistake, content)}" for mistake in error.errors()]
        raise InputError("\n".join(lines)) from None


def run_of(params: Params, run: str) -> Experiment:
    """The experiment of a run, ``<experiment>`` or ``<experiment>.<table>.<variant>``, overrides applied.

    Raises InputError for an unknown name, with the nearest known one, or for an override that does not fit.
    """
    name, *variant = run.split(".")
    experiment = lookup(params.experiments, name, "experiment")
    if not variant:
        return experiment
    if len(variant) != 2:
        raise InputError(f"run {run!r} is not of the form <experiment> or <experiment>.<table>.<variant>")
    table = lookup(params.ablations, variant[0], "ablation table")
    overrides = lookup(table.variants, variant[1], f"variant of the table {variant[0]!r}")
    content = experiment.model_dump()
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        section = content
        for parent in parents:
            section = section.get(parent)
            if not isinstance(section, dict):
                raise InputError(f"ablations.{variant[0]}.variants.{variant[1]}: no section {parent!r} in {key!r}")
        section[leaf] = value
    whole = params.model_dump()
    whole["experiments"] = {**whole["experiments"], name: content}
    if name == params.experiment:  # a variant may name other parts; `names` is dvc.yaml's and stays the experiment's
        whole["names"] = {field: content[field] for field in whole["names"]}
    return validate(whole, f"ablations.{variant[0]}.variants.{variant[1]}").experiments[name]


def lookup(entries: Mapping[str, Any], name: str, kind: str) -> Any:
    """`entries[name]`; raises InputError naming the nearest known name."""
    if name not in entries:
        raise InputError(f"unknown {kind} {name!r}{nearest(name, entries)}")
    return entries[name]


def digest(section: BaseModel | Mapping) -> str:
    """Hex SHA-256 of a resolved section."""
    return sha256_of_json(section.model_dump() if isinstance(section, BaseModel) else section)


def nearest(name: str, known) -> str:
    """``"; did you mean 'x'?"``, or the list of what there is."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(map(str, known)) or 'none'}"


def describe(mistake: Mapping, content: Mapping) -> str:
    """One line for one pydantic error: the dotted key, what is wrong, and the nearest valid key if it is unknown."""
    location = [str(part) for part in mistake["loc"] if part != "[key]"]
    key = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(location[-1], _fields_at(location[:-1]))}"
    if mistake["type"] == "missing":
        return f"{key}: missing"
    message = mistake["msg"].removeprefix("Value error, ")
    value = mistake["input"]
    shown = f" (got {value!r})" if isinstance(value, (str, int, float, bool, list, type(None))) else ""
    return f"{key}: {message}{shown}" if key else message


def _fields_at(location: list[str]) -> list[str]:
    """The keys that the section at a dotted location knows."""
    model: Any = Params
    for part in location:
        is_section = isinstance(model, type) and issubclass(model, BaseModel)
        model = model.model_fields[part].annotation if is_section else get_args(model)[-1]
    return list(getattr(model, "model_fields", ()))
