"""params.yaml: what is accepted, and how every mistake is named."""

import copy

import pytest
import yaml

from drift.errors import InputError
from pipeline import params
from tests.conftest import ROOT

SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())


def with_entries(entries: dict[str, object]) -> dict:
    content = copy.deepcopy(SHIPPED)
    for key, value in entries.items():
        *parents, leaf = key.split(".")
        section = content
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return content


def mistake(entries: dict[str, object]) -> str:
    """The message with which the shipped parameters, changed, are refused."""
    with pytest.raises(InputError) as caught:
        params.validate(with_entries(entries), "params.yaml")
    return str(caught.value)


def test_the_shipped_file_loads_with_its_values_and_defaults():
    loaded = params.load(ROOT / "params.yaml")
    assert loaded.experiment == "digits"
    assert loaded.datasets["digits"].heldout_fraction == SHIPPED["datasets"]["digits"]["heldout_fraction"]
    train = loaded.experiments["digits"].train
    assert train.steps == SHIPPED["experiments"]["digits"]["train"]["steps"]
    # Table 8 and A.6 are the defaults of what the file leaves out.
    assert (train.temperatures, train.max_grad_norm, train.betas) == ([0.02, 0.05, 0.2], 2.0, [0.9, 0.95])


def test_every_variant_of_the_shipped_file_resolves():
    loaded = params.load(ROOT / "params.yaml")
    runs = [f"digits.{table}.{name}" for table, entry in loaded.ablations.items() for name in entry.variants]
    assert len(runs) == sum(len(entry["variants"]) for entry in SHIPPED["ablations"].values())
    for run in runs:
        assert params.run_of(loaded, run) != loaded.experiments["digits"], run


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("experimentss", "'experiments'"),
        ("names.datasett", "'dataset'"),
        ("datasets.digits.image_sise", "'image_size'"),
        ("tokenizers.digits-vae.learning_rat", "'learning_rate'"),
        ("encoders.digits-mae.mask_rato", "'mask_ratio'"),
        ("judges.digits-cnn.step", "'steps'"),
        ("experiments.digits.trainx", "'train'"),
        ("experiments.digits.generator.num_register", "'num_registers'"),
        ("experiments.digits.train.learning_rte", "'learning_rate'"),
        ("experiments.digits.sample.guidance", "'guidance_scale'"),
        ("experiments.digits.evaluate.sweeps", "'sweep'"),
        ("ablations.style.variant", "'variants'"),
    ],
)
def test_an_unknown_key_names_file_key_and_the_nearest_valid_one(key: str, expected: str):
    message = mistake({key: 1})
    assert message == f"params.yaml: {key}: unknown key; did you mean {expected}?"


def test_an_unknown_key_unlike_any_other_lists_what_there_is():
    message = mistake({"names.zzzzz": "x"})
    assert message == "params.yaml: names.zzzzz: unknown key; known: dataset, tokenizer, encoder, judge"


def test_several_mistakes_give_one_line_each():
    message = mistake({"datasets.digits.sed": 1, "experiments.digits.train.steps": 0})
    lines = message.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("params.yaml: datasets.digits.sed: unknown key")
    assert lines[1].startswith("params.yaml: experiments.digits.train.steps: ")


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("experiments.digits.dataset", "digit", "'digits'"),
        ("experiments.digits.tokenizer", "digits-va", "'digits-vae'"),
        ("experiments.digits.encoder", "digits-mea", "'digits-mae'"),
        ("experiments.digits.judge", "digits-cn", "'digits-cnn'"),
        ("encoders.digits-mae.tokenizer", "digit-vae", "'digits-vae'"),
        ("judges.digits-cnn.dataset", "digitss", "'digits'"),
        ("tokenizers.digits-vae.dataset", "digitz", "'digits'"),
    ],
)
def test_a_name_that_no_section_has_is_refused_with_the_nearest(key: str, value: str, nearest: str):
    message = mistake({key: value})
    assert message.startswith(f"params.yaml: {key}: ")
    assert repr(value) in message
    assert message.endswith(f"did you mean {nearest}?")
    assert "\n" not in message


def test_the_experiment_to_run_must_exist():
    message = mistake({"experiment": "digit"})
    assert message.startswith("params.yaml: experiment: ")
    assert "'digits'" in message


@pytest.mark.parametrize("kind", ["dataset", "tokenizer", "encoder", "judge"])
def test_names_that_disagree_with_the_named_experiment_are_refused(kind: str):
    # A second entry that is valid in itself: only the disagreement is the mistake.
    section = f"{kind}s"
    name = SHIPPED["names"][kind]
    content = with_entries({f"{section}.other": SHIPPED[section][name], f"names.{kind}": "other"})
    with pytest.raises(InputError) as caught:
        params.validate(content, "params.yaml")
    message = str(caught.value)
    assert message.startswith(f"params.yaml: names.{kind}: ")
    assert "other" in message
    assert name in message


def test_names_that_agree_with_another_experiment_are_accepted_once_it_is_named():
    other = {**SHIPPED["experiments"]["digits"], "judge": "other"}
    content = with_entries(
        {
            "judges.other": SHIPPED["judges"]["digits-cnn"],
            "experiments.other": other,
            "experiment": "other",
            "names.judge": "other",
        }
    )
    assert params.validate(content, "params.yaml").experiment == "other"


@pytest.mark.parametrize(
    ("run", "fragments"),
    [
        ("digit", ["unknown experiment 'digit'", "'digits'"]),
        ("digits.temperaturez.t002", ["unknown ablation table 'temperaturez'", "'temperature'"]),
        ("digits.temperature.t0022", ["unknown variant of the table 'temperature'", "'t0022'", "'t002'"]),
        ("digits.temperature", ["'digits.temperature'", "<experiment>.<table>.<variant>"]),
        ("digits.temperature.t002.x", ["'digits.temperature.t002.x'", "<experiment>.<table>.<variant>"]),
        ("", ["unknown experiment ''", "digits"]),
    ],
)
def test_an_unknown_run_is_refused_with_what_was_meant(run: str, fragments: list[str]):
    loaded = params.load(ROOT / "params.yaml")
    with pytest.raises(InputError) as caught:
        params.run_of(loaded, run)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("kind", ["dataset", "tokenizer", "encoder", "judge"])
def test_looking_up_an_unknown_entry_names_the_nearest(kind: str):
    loaded = params.load(ROOT / "params.yaml")
    name = SHIPPED["names"][kind]
    with pytest.raises(InputError, match=rf"^unknown {kind} '{name}x'; did you mean '{name}'\?$"):
        params.lookup(getattr(loaded, f"{kind}s"), f"{name}x", kind)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # Wrong types.
        ("experiments.digits.train.steps", "many"),
        ("experiments.digits.train.steps", 1.5),
        ("experiments.digits.train.temperatures", 0.05),
        ("datasets.digits.flip", "perhaps"),
        ("datasets.digits", ["source", "digits"]),
        ("experiments.digits.train.kernel", "cauchy"),
        ("experiments.digits.train.normalization", "all"),
        ("experiments.digits.train.precision", "fp8"),
        ("datasets.digits.source", "mnist"),
        # Out of range.
        ("experiments.digits.sample.guidance_scale", 0.99),
        ("experiments.digits.train.guidance_range", [0.5, 4.0]),
        ("experiments.digits.train.guidance_range", [1.0]),
        ("experiments.digits.evaluate.sweep", [1.0, 0.5]),
        ("experiments.digits.train.unguided_fraction", 1.01),
        ("experiments.digits.train.unguided_fraction", -0.01),
        ("datasets.digits.heldout_fraction", 0.0),
        ("datasets.digits.heldout_fraction", 1.0),
        ("encoders.digits-mae.mask_ratio", 1.0),
        ("encoders.digits-mae.depths", [1, 1, 1]),
        ("experiments.digits.train.learning_rate", 0.0),
        ("experiments.digits.train.learning_rate", float("nan")),
        ("experiments.digits.train.learning_rate", float("inf")),
        ("experiments.digits.train.ema_decay", 1.0),
        ("experiments.digits.train.generated", 1),
        ("experiments.digits.train.temperatures", []),
        ("experiments.digits.train.temperatures", [0.0]),
        ("experiments.digits.sample.num_images", 0),
        ("datasets.digits.parts", 0),
        ("datasets.digits.seed", -1),
    ],
)
def test_a_wrong_type_or_range_is_refused_by_its_key(key: str, value: object):
    message = mistake({key: value})
    assert message.startswith(f"params.yaml: {key}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("entries", "section", "word"),
    [
        (
            {"experiments.digits.train.labels": 65, "experiments.digits.train.push": 64},
            "experiments.digits.train",
            "push",
        ),
        ({"experiments.digits.train.guidance_range": [3.0, 2.0]}, "experiments.digits.train", "guidance_range"),
        ({"datasets.digits.flip": True}, "datasets.digits", "flip"),
        ({"datasets.digits.source": "folder"}, "datasets.digits", "path"),
        ({"datasets.digits.path": "images"}, "datasets.digits", "path"),
    ],
)
def test_values_that_contradict_each_other_are_refused(entries: dict, section: str, word: str):
    message = mistake(entries)
    assert message.startswith(f"params.yaml: {section}: ")
    assert word in message
    assert "\n" not in message


def test_as_many_labels_as_are_pushed_are_accepted():
    content = with_entries({"experiments.digits.train.labels": 64, "experiments.digits.train.push": 64})
    assert params.validate(content, "params.yaml").experiments["digits"].train.labels == 64


@pytest.mark.parametrize(
    "key", ["experiment", "datasets", "experiments.digits.encoder", "experiments.digits.train.steps"]
)
def test_a_missing_key_is_named(key: str):
    content = copy.deepcopy(SHIPPED)
    *parents, leaf = key.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    del section[leaf]
    with pytest.raises(InputError) as caught:
        params.validate(content, "params.yaml")
    assert f"params.yaml: {key}: missing" in str(caught.value).splitlines()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"params\.yaml: no such file$"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tx: 1"])
def test_a_file_that_is_not_yaml_is_named_in_one_line(tmp_path, text: str):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        params.load(path)
    assert str(caught.value).startswith(f"{path}: not valid YAML (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "digits\n"])
def test_a_file_without_sections_is_refused(tmp_path, text: str):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        params.load(path)
    assert str(caught.value) == f"{path}: must be a mapping of sections"


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xff\xfe\x00bin")
    with pytest.raises(InputError, match=r"params\.yaml"):
        params.load(path)


def test_a_variant_changes_just_what_it_says():
    loaded = params.load(ROOT / "params.yaml")
    base = loaded.experiments["digits"].model_dump()
    variant = params.run_of(loaded, "digits.temperature.t005").model_dump()
    assert variant["train"].pop("temperatures") == [0.05]
    assert base["train"].pop("temperatures") == [0.02, 0.05, 0.2]
    assert variant == base
    # Resolving a variant leaves the experiment itself as it was.
    assert loaded.experiments["digits"].train.temperatures == [0.02, 0.05, 0.2]
    assert loaded.experiments["digits"] == params.load(ROOT / "params.yaml").experiments["digits"]


def test_a_variant_may_override_several_keys_in_several_sections():
    overrides = {"train.steps": 7, "train.seed": 3, "generator.num_styles": 0, "sample.guidance_scale": 2.0}
    content = with_entries({"ablations.style.variants": {"several": overrides}})
    run = params.run_of(params.validate(content, "params.yaml"), "digits.style.several")
    assert (run.train.steps, run.train.seed, run.generator.num_styles, run.sample.guidance_scale) == (7, 3, 0, 2.0)


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ({"train.temperaturez": 1}, ["train.temperaturez", "unknown key"]),
        ({"trainx.steps": 1}, ["no section 'trainx'", "'trainx.steps'"]),
        ({"train.steps.more": 1}, ["no section 'steps'", "'train.steps.more'"]),
        ({"train.learning_rate": -1.0}, ["train.learning_rate"]),
        ({"encoder": "none"}, ["no encoder is named 'none'"]),
    ],
)
def test_an_override_that_does_not_fit_names_the_variant(override: dict, fragments: list[str]):
    content = with_entries({"ablations.style.variants": {"wrong": override}})
    loaded = params.validate(content, "params.yaml")
    with pytest.raises(InputError) as caught:
        params.run_of(loaded, "digits.style.wrong")
    message = str(caught.value)
    assert message.startswith("ablations.style.variants.wrong: ")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_digests_of_sections_differ_with_their_values_only():
    loaded = params.load(ROOT / "params.yaml")
    half = params.run_of(loaded, "digits.learning-rate.half")
    again = params.load(ROOT / "params.yaml").experiments["digits"]
    assert params.digest(loaded.experiments["digits"]) == params.digest(again)
    assert params.digest(half) != params.digest(again)
