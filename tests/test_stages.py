"""The stages as commands: killed and resumed, refused, repeated, reported, tracked; and every mistake in one line."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import (
    cache_latents,
    evaluate,
    pretrain_encoder,
    sample,
    shard,
    stage,
    train,
    train_judge,
    train_tokenizer,
)
from pipeline.tracking import NoTracker
from tests.conftest import Project

STAGES = (shard, train_tokenizer, cache_latents, pretrain_encoder, train_judge, train, sample, evaluate)
#: Nothing listens on this port.
UNREACHABLE = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}


#: A progress bar and nothing else.
BAR = re.compile(r"[^|]*\d+%\|[^|]*\| \d+/\d+ \[[^]]*\](\x1b\[A)?")


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def warnings_in(stderr: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", stderr) if "warning" in line.lower()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- Runs that the tests below look at -------------------------------------------------------------------------------


def ran(project: Project, name: str, **options) -> subprocess.CompletedProcess:
    done = project.run(name, **options)
    assert done.returncode == 0, f"{name}:\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def train_done(tiny_run: Project) -> subprocess.CompletedProcess:
    """An uninterrupted train stage."""
    return ran(tiny_run, "train")


@pytest.fixture(scope="module")
def trained(tiny_run: Project, train_done: subprocess.CompletedProcess) -> Path:
    """Its generator."""
    return tiny_run.folder / "models/generators/digits"


@pytest.fixture(scope="module")
def sampled(tiny_run: Project, trained: Path) -> Path:
    ran(tiny_run, "sample")
    return tiny_run.folder / "samples/digits"


@pytest.fixture(scope="module")
def report(tiny_run: Project, sampled: Path) -> dict:
    ran(tiny_run, "evaluate")
    return json.loads((tiny_run.folder / "reports/digits_fid.json").read_text())


@dataclass(frozen=True)
class Interrupted:
    """What happened to a train stage that was stopped, killed and started again with the same command."""

    output: Path
    pid: int
    second: subprocess.CompletedProcess
    output_existed_when_killed: bool
    checkpoints: Path
    rerun: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def interrupted(tiny_run: Project, tmp_path_factory) -> Interrupted:
    output, checkpoints = "models/generators/interrupted", "checkpoints/interrupted"
    options = {"output": output, "checkpoints": checkpoints, "env": UNREACHABLE}
    saved = lambda: list((tiny_run.folder / checkpoints).glob("*/step-*"))  # noqa: E731
    process = tiny_run.start("train", **options)
    try:
        deadline = time.monotonic() + 200
        while not saved() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        # Stopped, it keeps its lock for as long as the second one needs, and cannot finish before it is killed.
        process.send_signal(signal.SIGSTOP)
        second = tiny_run.run("train", **options)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the first one was killed before it had finished"
    existed = (tiny_run.folder / output).exists()
    kept = shutil.copytree(tiny_run.folder / checkpoints, tmp_path_factory.mktemp("killed") / "checkpoints")
    rerun = tiny_run.run("train", **options)
    return Interrupted(tiny_run.folder / output, process.pid, second, existed, kept, rerun)


@pytest.fixture
def in_process(tiny_run: Project, monkeypatch, fresh_accelerate):
    """A function that runs a stage, its options changed, in the tiny project and in this process, untracked."""

    def run(module: ModuleType, **options: object) -> None:
        monkeypatch.chdir(tiny_run.folder)
        monkeypatch.setattr(sys, "argv", tiny_run.command(name_of(module), **options)[2:])
        if hasattr(module, "Tracker"):
            monkeypatch.setattr(module, "Tracker", lambda *args, **kwargs: NoTracker())
        stage.run(module.main)

    return run


# --- Interruption --------------------------------------------------------------------------------------------------


def test_a_killed_train_leaves_checkpoints_and_no_part_of_its_output(interrupted: Interrupted):
    assert list(interrupted.checkpoints.glob("*/step-*/history.csv"))
    assert not interrupted.output_existed_when_killed


def test_a_killed_train_completes_when_run_again_and_equals_an_uninterrupted_one(
    interrupted: Interrupted, trained: Path
):
    assert interrupted.rerun.returncode == 0, interrupted.rerun.stderr
    resumed, whole = contents(interrupted.output), contents(trained)
    assert sorted(resumed) == sorted(whole)
    assert {"history.csv", "generator/diffusion_pytorch_model.safetensors"} <= set(whole)
    assert [name for name in whole if resumed[name] != whole[name]] == []


def test_a_rerun_continues_from_the_checkpoint_and_does_not_start_anew(interrupted: Interrupted, in_process, tmp_path):
    # A mark in the saved history is in the final one only if that was continued.
    checkpoints = shutil.copytree(interrupted.checkpoints, tmp_path / "checkpoints")
    newest = max(checkpoints.glob("*/step-*"))
    saved = (newest / "history.csv").read_text().splitlines()
    columns = saved[0].split(",")
    marked = dict(zip(columns, saved[1].split(","), strict=True)) | {"loss": "12345.0"}
    (newest / "history.csv").write_text("\n".join([saved[0], ",".join(marked.values()), *saved[2:]]) + "\n")
    in_process(train, checkpoints=checkpoints, output=tmp_path / "output")
    expected = (interrupted.output / "history.csv").read_text().splitlines()
    continued = (tmp_path / "output/history.csv").read_text().splitlines()
    assert continued[1] == ",".join(marked.values())
    assert continued[2:] == expected[2:]


def test_a_finished_train_removes_its_checkpoints_and_leftovers(interrupted: Interrupted):
    project = interrupted.output.parents[2]
    assert list((project / "checkpoints/interrupted").rglob("*step-*")) == []
    assert list(interrupted.output.parent.glob(".*.tmp")) == []


def test_while_a_train_runs_a_second_one_is_refused_in_one_line_naming_the_first(interrupted: Interrupted):
    second = interrupted.second
    assert second.returncode == stage.EXIT_INPUT
    [line] = second.stderr.splitlines()
    assert line.startswith("train: error: models/generators/interrupted: ")
    assert f"process {interrupted.pid} on " in line


def test_without_mlflow_a_stage_succeeds_with_exactly_one_warning(interrupted: Interrupted):
    assert interrupted.rerun.returncode == 0
    [line] = warnings_in(interrupted.rerun.stderr)
    assert line.startswith("warning: MLflow tracking is off for this stage: ")
    assert "Traceback" not in interrupted.rerun.stderr


# --- Samples -------------------------------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_samples_byte_for_byte(tiny_run: Project, sampled: Path):
    again = ran(tiny_run, "sample", output="samples/again", env=UNREACHABLE)
    assert len(warnings_in(again.stderr)) == 1
    assert contents(tiny_run.folder / "samples/again") == contents(sampled)


def test_samples_are_uint8_images_with_balanced_labels(tiny_run: Project, sampled: Path):
    count = tiny_run.params["experiments"]["digits"]["sample"]["num_images"]
    with np.load(sampled / "samples.npz", allow_pickle=False) as file:
        assert set(file) == {"arr_0", "arr_1"}
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (count, 32, 32, 3))
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(labels, minlength=10), count / 10)


def test_the_grid_shows_a_column_of_each_class(sampled: Path):
    with np.load(sampled / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    grid = np.asarray(Image.open(sampled / "grid.png"))
    for digit in range(10):
        column = np.concatenate(images[labels == digit][:6])
        np.testing.assert_array_equal(grid[:, 32 * digit : 32 * digit + 32], column)


# --- The report ----------------------------------------------------------------------------------------------------

METRICS = (
    "frechet_judge",
    "frechet_judge_floor",
    "frechet_judge_ratio",
    "kernel_judge",
    "precision_judge",
    "recall_judge",
    "class_accuracy",
    "within_class_variance_mean",
    "within_class_variance_worst",
    "memorisation_ratio",
    "reconstruction_psnr_db",
    "reconstruction_ssim",
    "latency_batch1_ms",
    "latency_batch64_ms",
    "latency_batch64_decode_ms",
    "nfe",
    "generator_parameters",
)


@pytest.mark.parametrize("name", METRICS)
def test_the_report_has_a_number_for(report: dict, name: str):
    value = report["metrics"][name]
    assert isinstance(value, (int, float))
    assert np.isfinite(value)


def test_the_numbers_of_the_report_agree_with_each_other(report: dict):
    metrics = report["metrics"]
    assert metrics["nfe"] == 1
    assert metrics["frechet_judge_ratio"] == pytest.approx(metrics["frechet_judge"] / metrics["frechet_judge_floor"])
    assert metrics["within_class_variance_worst"] <= metrics["within_class_variance_mean"]
    for name in ("precision_judge", "recall_judge", "class_accuracy"):
        assert 0 <= metrics[name] <= 1
    for name in ("latency_batch1", "latency_batch64", "latency_batch64_decode"):
        assert 0 < metrics[f"{name}_ms"] <= metrics[f"{name}_p95_ms"]


def test_the_report_counts_the_parameters_in_the_weights(report: dict, trained: Path):
    from safetensors.numpy import load_file

    weights = load_file(trained / "generator/diffusion_pytorch_model.safetensors")
    assert report["metrics"]["generator_parameters"] == sum(array.size for array in weights.values())


def test_an_fid_is_not_claimed_without_inception_features(report: dict):
    assert not any(name == "fid" or name.startswith("fid_") for name in report["metrics"])


def test_the_report_says_where_it_comes_from(tiny_run: Project, report: dict):
    provenance = report["provenance"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tiny_run.folder, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert provenance["git_commit"] == head
    section = tiny_run.params["experiments"]["digits"]
    assert provenance["parameters"]["train"].items() >= section["train"].items()
    assert provenance["parameters"]["generator"].items() >= section["generator"].items()
    assert provenance["seed"] == section["train"]["seed"]
    assert re.fullmatch("[0-9a-f]{64}", provenance["data_digest"])
    assert {"python", "torch", "diffusers", "numpy"} <= set(provenance["versions"])
    assert provenance["device"]
    assert provenance["runner"] == "command line"


def test_the_sweep_has_a_row_for_every_alpha(tiny_run: Project, report: dict):
    alphas = tiny_run.params["experiments"]["digits"]["evaluate"]["sweep"]
    assert [row["guidance_scale"] for row in report["sweep"]] == alphas
    assert all(np.isfinite(row["frechet_judge"]) for row in report["sweep"])


@pytest.mark.parametrize("name", ["grid", "progress", "curves", "alpha", "nearest"])
def test_the_report_has_a_picture_of(tiny_run: Project, report: dict, name: str):
    with Image.open(tiny_run.folder / f"reports/digits_fid_{name}.png") as image:
        assert min(image.size) > 50


def test_a_stage_shows_its_progress_and_no_notices_of_libraries(train_done: subprocess.CompletedProcess):
    lines = [line for line in re.split(r"[\r\n]+", train_done.stderr) if line]
    assert any(BAR.fullmatch(line) for line in lines)
    assert [line for line in lines if not BAR.fullmatch(line)] == []


def test_the_history_has_the_curves_of_every_logged_step(tiny_run: Project, trained: Path):
    header, *rows = (trained / "history.csv").read_text().splitlines()
    names = header.split(",")
    assert {"step", "images_seen", "loss", "grad_norm", "drift_norm_tau_0.02", "drift_norm_layer1"} <= set(names)
    steps = tiny_run.params["experiments"]["digits"]["train"]["steps"]
    assert [row.split(",")[0] for row in rows] == [str(step) for step in range(1, steps + 1)]


# --- MLflow --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(tiny_run: Project, report: dict) -> Callable[[str], list]:
    """A function that finds MLflow runs of the digits by a filter, after train, sample and evaluate."""
    with warnings.catch_warnings():
        # What MLflow imports is not ours to mend.
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

    def search(condition: str) -> list:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client = MlflowClient(tracking_uri=tiny_run.env["MLFLOW_TRACKING_URI"])
            experiment = client.get_experiment_by_name("digits")
            return client.search_runs([experiment.experiment_id], condition)

    return search


def identity(generator: Path) -> str:
    return json.loads((generator / "index.json").read_text())["identity"]


@pytest.fixture(scope="module")
def mlflow_run(tracked, trained: Path):
    """The one run of the generator."""
    [run] = tracked(f"tags.identity = '{identity(trained)}'")
    return run


def test_train_sample_and_evaluate_are_one_finished_run(mlflow_run):
    assert mlflow_run.info.run_name == "digits"
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.tags["stage"] == "train"
    assert mlflow_run.data.tags["runner"] == "command line"
    assert re.fullmatch("[0-9a-f]{40}", mlflow_run.data.tags["git_commit"])


def test_the_run_holds_the_resolved_parameters(mlflow_run, tiny_run: Project):
    section = tiny_run.params["experiments"]["digits"]
    logged = mlflow_run.data.params
    for part in ("train", "generator"):
        for key, value in section[part].items():
            assert logged[f"{part}.{key}"] == str(value), key
    # A default that params.yaml leaves out is part of what was run.
    assert logged["train.max_grad_norm"] == "2.0"


@pytest.mark.parametrize(
    "name", ["drift_norm_tau_0.02", "loss", "grad_norm", "images_per_second", "data_wait_share", "learning_rate"]
)
def test_the_run_holds_the_curve_of(mlflow_run, tiny_run: Project, name: str):
    from mlflow import MlflowClient

    points = MlflowClient(tracking_uri=tiny_run.env["MLFLOW_TRACKING_URI"]).get_metric_history(
        mlflow_run.info.run_id, name
    )
    section = tiny_run.params["experiments"]["digits"]["train"]
    images = section["labels"] * section["generated"]
    assert [point.step for point in points] == [images * step for step in range(1, section["steps"] + 1)]
    assert all(np.isfinite(point.value) for point in points)


def test_the_run_holds_the_metrics_of_the_report(mlflow_run, report: dict):
    for name in METRICS:
        assert mlflow_run.data.metrics[name] == pytest.approx(report["metrics"][name])


def test_the_run_names_its_dataset(mlflow_run, tiny_run: Project):
    [entry] = mlflow_run.inputs.dataset_inputs
    assert entry.dataset.name == "digits"
    assert len(entry.dataset.digest) == 36
    assert entry.dataset.digest in mlflow_run.data.tags["latents"]


def test_tokenizer_encoder_and_judge_have_runs_of_their_own_that_the_generator_s_run_names(
    mlflow_run, tracked, tiny_run: Project
):
    for name, kind in (("digits-vae", "tokenizer"), ("digits-mae", "encoder")):
        [run] = tracked(f"tags.mlflow.runName = '{name}'")
        index = json.loads((tiny_run.folder / f"models/{kind}s/{name}/index.json").read_text())
        assert run.data.tags["identity"] == index["identity"]
        assert mlflow_run.data.tags[kind] == index["digest"]
    assert len(tracked("tags.mlflow.runName = 'digits-cnn'")) == 1


def test_another_learning_rate_is_a_second_run(tiny_run: Project, tracked, trained: Path):
    run = "digits.learning-rate.half"
    outputs = {"output": "models/generators/half", "checkpoints": "checkpoints/half"}
    ran(tiny_run, "train", run=run, **outputs)
    other = identity(tiny_run.folder / "models/generators/half")
    assert other != identity(trained)
    [found] = tracked(f"tags.identity = '{other}'")
    assert found.info.run_name == run
    half = tiny_run.params["ablations"]["learning-rate"]["variants"]["half"]["train.learning_rate"]
    assert half != tiny_run.params["experiments"]["digits"]["train"]["learning_rate"]
    assert found.data.params["train.learning_rate"] == str(half)
    assert len(tracked("tags.stage = 'train'")) == 2


# --- Mistakes (the stages' own entry points, in this process) -----------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """How a stage ended: its exit status, its lines on stderr without progress bars, what it wrote."""

    status: int
    lines: list[str]


@pytest.fixture
def attempt(in_process, capfd):
    """A function that runs a stage which must refuse, and returns how it did."""

    def run(module: ModuleType, **options: object) -> Refusal:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            in_process(module, **options)
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        return Refusal(caught.value.code, [line for line in stderr.splitlines() if line and not BAR.fullmatch(line)])

    return run


def assert_one_line(refusal: Refusal, name: str, *fragments: str) -> None:
    assert refusal.status == stage.EXIT_INPUT
    assert len(refusal.lines) == 1, refusal.lines
    assert refusal.lines[0].startswith(f"{name}: error: ")
    for fragment in fragments:
        assert fragment in refusal.lines[0]


def leftovers(folder: Path) -> list[str]:
    """Files and folders under temporary names; a lock beside an output is none."""
    return [str(p) for p in folder.rglob(".*") if not p.name.endswith(".lock")] if folder.exists() else []


@pytest.mark.parametrize("module", [train, sample, evaluate], ids=name_of)
def test_an_unknown_experiment_is_refused(attempt, tmp_path, module: ModuleType):
    refusal = attempt(module, run="digit", output=tmp_path / "output")
    assert_one_line(refusal, name_of(module), "'digit'", "did you mean 'digits'?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", STAGES, ids=name_of)
def test_an_unknown_key_in_the_parameters_is_refused_by_every_stage(
    attempt, tiny_run: Project, tmp_path, module: ModuleType
):
    content = tiny_run.params
    content["experiments"]["digits"]["train"]["learning_rte"] = 1
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(content))
    refusal = attempt(module, params=params, output=tmp_path / "output")
    key = "experiments.digits.train.learning_rte"
    assert_one_line(refusal, name_of(module), str(params), key, "'learning_rate'")
    assert list(tmp_path.iterdir()) == [params]


@pytest.mark.parametrize("module", [m for m in STAGES if m is not shard], ids=name_of)
def test_a_missing_input_folder_is_refused_by_name(attempt, tiny_run: Project, tmp_path, module: ModuleType):
    name = name_of(module)
    options = [o[2:] for o in tiny_run.command(name) if o in ("--shards", "--latents", "--generator")]
    missing = tmp_path / "no-such-folder"
    refusal = attempt(module, **{options[0]: missing}, output=tmp_path / "output")
    assert_one_line(refusal, name, str(missing))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "option"),
    [
        (cache_latents, "tokenizer"),
        (train, "encoder"),
        (train, "tokenizer"),
        (evaluate, "judge"),
        (evaluate, "samples"),
    ],
)
def test_any_missing_input_is_refused_by_name(attempt, sampled, tmp_path, module: ModuleType, option: str):
    missing = tmp_path / "none"
    refusal = attempt(module, **{option: missing}, output=tmp_path / "output")
    assert_one_line(refusal, name_of(module), str(missing))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [train_tokenizer, cache_latents, train_judge], ids=name_of)
def test_a_tampered_shard_is_refused_by_name(attempt, tiny_run: Project, tmp_path, module: ModuleType):
    shards = shutil.copytree(tiny_run.folder / "data/digits/shards", tmp_path / "shards")
    for path in shards.glob("train-*.tar"):
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)
    output = tmp_path / "output"
    refusal = attempt(module, shards=shards, output=output)
    assert_one_line(refusal, name_of(module), f"{shards}/train-0000", "checksum")
    assert not (output / "index.json").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("module", [pretrain_encoder, train], ids=name_of)
def test_a_truncated_latent_shard_is_refused_by_name(attempt, tiny_run: Project, tmp_path, module: ModuleType):
    latents = shutil.copytree(tiny_run.folder / "data/digits/latents/digits-vae", tmp_path / "latents")
    for path in latents.glob("train-*.tar"):
        path.write_bytes(path.read_bytes()[:-100])
    options = {"checkpoints": tmp_path / "checkpoints"} if module is train else {}
    refusal = attempt(module, latents=latents, output=tmp_path / "output", **options)
    assert_one_line(refusal, name_of(module), f"{latents}/train-0000", "bytes")
    assert not (tmp_path / "output").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("wrong", [10, -1])
def test_samples_with_a_label_out_of_range_are_refused(attempt, sampled: Path, tmp_path, wrong: int):
    with np.load(sampled / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"].copy()
    labels[7] = wrong
    path = tmp_path / "samples.npz"
    np.savez(path, images, labels)
    refusal = attempt(evaluate, samples=path, output=tmp_path / "report.json")
    assert_one_line(refusal, "evaluate", str(path), f"label {wrong}", "10 classes")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 a broken archive"])
def test_samples_that_are_no_samples_are_refused(attempt, trained, tmp_path, content: bytes):
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    refusal = attempt(evaluate, samples=path, output=tmp_path / "report.json")
    assert_one_line(refusal, "evaluate", str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_samples_whose_images_and_labels_differ_in_number_are_refused(attempt, trained, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, np.zeros((20, 32, 32, 3), np.uint8), np.zeros(19, np.int64))
    refusal = attempt(evaluate, samples=path, output=tmp_path / "report.json")
    assert_one_line(refusal, "evaluate", str(path))


@pytest.mark.parametrize("module", STAGES, ids=name_of)
def test_an_output_that_cannot_be_written_is_refused_by_name(attempt, sampled, tmp_path, module: ModuleType):
    # Below a regular file: not even root may write there.
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    refusal = attempt(module, output=blocked / "folder" / "output")
    assert_one_line(refusal, name_of(module), str(blocked))
    assert list(tmp_path.iterdir()) == [blocked]
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize(
    ("module", "limit"),
    [
        (shard, 100_000),
        (train_tokenizer, 20_000),
        (cache_latents, 100_000),
        (train, 30_000),  # a checkpoint's weights (safetensors)
        (train, 100_000),  # a checkpoint's optimizer (torch.save)
        (sample, 50_000),
    ],
    ids=lambda value: name_of(value) if isinstance(value, ModuleType) else str(value),
)
def test_a_full_disk_is_refused_by_name_and_leaves_the_old_output(
    attempt, trained, tmp_path, small_files, module: ModuleType, limit: int
):
    name = name_of(module)
    output = tmp_path / "outputs" / "output"
    output.mkdir(parents=True)
    (output / "old").write_text("of an earlier run")
    options = {"checkpoints": tmp_path / "checkpoints"} if module is train else {}
    with small_files(limit):
        refusal = attempt(module, output=output, **options)
    assert_one_line(refusal, name, str(tmp_path))
    assert (output / "old").read_text() == "of an earlier run"
    assert not (output / "index.json").exists()
    assert not (output / "samples.npz").exists()
    assert leftovers(tmp_path) == []


def test_an_image_that_does_not_decode_is_refused_by_name(attempt, tiny_run: Project, tmp_path):
    images = tmp_path / "images"
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50)).save(images / name)
    (images / "dog/b.png").write_bytes(b"no image")
    content = tiny_run.params
    content["datasets"]["pets"] = {"source": "folder", "path": str(images), "image_size": 32, "heldout_fraction": 0.5}
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(content))
    refusal = attempt(shard, params=params, dataset="pets", output=tmp_path / "out" / "shards")
    assert_one_line(refusal, "shard", "dog-b", "does not decode")
    assert not (tmp_path / "out/shards/index.json").exists()
    assert leftovers(tmp_path) == []


def test_a_class_without_images_is_refused_by_name(attempt, tiny_run: Project, tmp_path):
    images = tmp_path / "images"
    (images / "cat").mkdir(parents=True)
    content = tiny_run.params
    content["datasets"]["pets"] = {"source": "folder", "path": str(images)}
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(content))
    refusal = attempt(shard, params=params, dataset="pets", output=tmp_path / "out")
    assert_one_line(refusal, "shard", str(images / "cat"), "class without images")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_refused_by_step_and_feature(attempt, tiny_run: Project, tmp_path):
    from safetensors.numpy import load_file, save_file

    encoder = shutil.copytree(tiny_run.folder / "models/encoders/digits-mae", tmp_path / "encoder")
    [path] = encoder.glob("*.safetensors")
    weights = load_file(path)
    for value in weights.values():
        value[...] = np.nan
    save_file(weights, path, metadata={"format": "pt"})
    options = {"encoder": encoder, "output": tmp_path / "output", "checkpoints": tmp_path / "checkpoints"}
    refusal = attempt(train, **options)
    assert_one_line(refusal, "train", "step 1", "conv1")
    assert not (tmp_path / "output").exists()
    assert leftovers(tmp_path) == []


def test_a_generator_of_other_weights_than_its_configuration_is_refused(attempt, trained: Path, tmp_path):
    generator = shutil.copytree(trained, tmp_path / "generator")
    weights = generator / "generator/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refusal = attempt(sample, generator=generator, output=tmp_path / "output")
    assert_one_line(refusal, "sample", str(generator))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("part", ["0/2", "3/2", "x"])
def test_a_part_that_is_no_part_is_refused(attempt, tmp_path, part: str):
    assert_one_line(attempt(shard, part=part, output=tmp_path / "output"), "shard", repr(part))
    assert list(tmp_path.iterdir()) == []


def test_a_defect_keeps_its_traceback(attempt, monkeypatch, tmp_path):
    # Only a user's mistake is told in one line: hiding a defect would cost whoever has to find it.
    def defect(*args, **kwargs):
        raise KeyError("defect")

    monkeypatch.setattr(shard, "plan_shards", defect)
    with pytest.raises(KeyError, match="defect"):
        attempt(shard, output=tmp_path / "output")
