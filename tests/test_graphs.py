"""The two runners say the same: stages, commands, inputs, outputs and code of the Snakefile and of dvc.yaml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import COPIED, ROOT, Project, resolved

TARGET = "reports/digits_fid.json"


@dataclass(frozen=True)
class Job:
    """A stage with its wildcards filled in."""

    name: str
    command: str
    inputs: frozenset[str]
    outputs: frozenset[str]


def snakemake(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *arguments]
    environment = {**os.environ, **project.env}
    return subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=300)


def planned(project: Project) -> list[Job]:
    """The jobs of Snakemake's plan for the report, everything made anew."""
    done = snakemake(project, "--dry-run", "--forceall", "--printshellcmds", TARGET)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    pattern = re.compile(
        r"^(?:local)?rule (?P<name>\w+):\n    input: (?P<inputs>.*)\n    output: (?P<outputs>.*)\n(?:    .*\n)*"
        r"Shell command: (?P<command>.*)$",
        re.MULTILINE,
    )
    return [
        Job(
            match["name"],
            match["command"],
            frozenset(match["inputs"].split(", ")),
            frozenset(match["outputs"].split(", ")),
        )
        for match in pattern.finditer(text)
    ]


def declared(project: Project) -> dict[str, Job]:
    """The stages of dvc.yaml."""
    text = resolved((project.folder / "dvc.yaml").read_text(), project.params)
    assert "${" not in text
    return {
        name: Job(
            name,
            " ".join(stage["cmd"].split()),
            frozenset(stage["deps"]),
            frozenset([*stage.get("outs", []), *stage.get("metrics", [])]),
        )
        for name, stage in yaml.safe_load(text)["stages"].items()
    }


@pytest.fixture(scope="module")
def plan(tiny_project) -> list[Job]:
    return planned(tiny_project)


@pytest.fixture(scope="module")
def stages(tiny_project) -> dict[str, Job]:
    return declared(tiny_project)


def as_folders(paths: frozenset[str], stages: dict[str, Job]) -> set[str]:
    """Paths, a file in a declared folder standing for that folder: Snakemake names the file that tells its content."""
    outputs = {output for stage in stages.values() for output in stage.outputs}
    return {next((o for o in outputs if path.startswith(f"{o}/")), path) for path in paths}


def without_log(command: str) -> str:
    return re.sub(r" 2>&1 \| tee logs/\S+$", "", command)


def test_both_runners_have_the_same_stages_once_each(plan, stages):
    assert sorted(job.name for job in plan) == sorted(stages)
    assert len(stages) == 8


def test_both_runners_run_the_same_commands(plan, stages):
    commands = {job.name: without_log(job.command) for job in plan}
    assert commands == {name: stage.command for name, stage in stages.items()}


def test_snakemake_keeps_a_log_of_every_command(plan):
    logs = [re.search(r" 2>&1 \| tee (logs/\S+)$", job.command)[1] for job in plan]
    assert len(set(logs)) == len(plan)


def is_code(path: str) -> bool:
    return path.endswith(".py")


def test_both_runners_read_the_same_artifacts(plan, stages):
    read = {job.name: as_folders(frozenset(p for p in job.inputs if not is_code(p)), stages) for job in plan}
    assert read == {name: {p for p in stage.inputs if not is_code(p)} for name, stage in stages.items()}


def test_both_runners_depend_on_the_same_code(plan, stages):
    code = {job.name: {path for path in job.inputs if is_code(path)} for job in plan}
    assert code == {name: {path for path in stage.inputs if is_code(path)} for name, stage in stages.items()}


def test_both_runners_write_the_same_outputs(plan, stages):
    written = {job.name: as_folders(job.outputs, stages) for job in plan}
    assert written == {name: set(stage.outputs) for name, stage in stages.items()}


def test_every_artifact_that_is_read_is_written_by_a_stage(stages):
    written = {output for stage in stages.values() for output in stage.outputs}
    for stage in stages.values():
        assert {path for path in stage.inputs if not is_code(path)} <= written, stage.name


def test_no_output_is_inside_another(stages):
    outputs = sorted(output for stage in stages.values() for output in stage.outputs)
    assert len(outputs) == len(set(outputs))
    assert [(a, b) for a in outputs for b in outputs if b.startswith(f"{a}/")] == []


def test_every_stage_is_one_script_and_all_declared_code_exists(stages):
    for stage in stages.values():
        assert stage.command.startswith(f"python -m pipeline.{stage.name} ")
        assert f"pipeline/{stage.name}.py" in stage.inputs
        missing = [path for path in stage.inputs if is_code(path) and not (ROOT / path).is_file()]
        assert not missing, stage.name


def test_every_parameter_that_dvc_tracks_is_in_the_file(tiny_project):
    text = resolved((tiny_project.folder / "dvc.yaml").read_text(), tiny_project.params)
    tracked = [key for stage in yaml.safe_load(text)["stages"].values() for key in stage["params"]]
    assert len(tracked) >= 8
    for key in tracked:
        value = tiny_project.params
        for part in key.split("."):
            assert part in value, key
            value = value[part]


def test_commands_write_what_they_declare(stages):
    for stage in stages.values():
        words = shlex.split(stage.command)
        output = words[words.index("--output") + 1]
        assert output in stage.outputs, stage.name
        # Checkpoints must outlive a deleted output: no runner may know them.
        assert not any(path.startswith("checkpoints") for path in stage.outputs | stage.inputs), stage.name


def changed_copy(project: Project, folder: Path, old: str, new: str) -> Project:
    """A copy of the project with a text in its params.yaml replaced."""
    for name in COPIED:
        source = project.folder / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    params = folder / "params.yaml"
    assert old in params.read_text()
    params.write_text(params.read_text().replace(old, new))
    return Project(folder, {"PYTHONPATH": str(folder)})


def test_parallel_parts_run_the_same_commands_with_a_part_each(tiny_project, plan, tmp_path):
    parted = planned(changed_copy(tiny_project, tmp_path, "parts: 1", "parts: 2"))
    whole = {job.name: without_log(job.command) for job in plan}
    # Gathering is the command of the stage itself.
    assert {job.name: without_log(job.command) for job in parted if not job.name.endswith("_part")} == whole
    for name in ("shard", "cache_latents"):
        parts = {without_log(job.command): job for job in parted if job.name == f"{name}_part"}
        assert set(parts) == {f"{whole[name]} --part {i}/2" for i in (1, 2)}
        gather = next(job for job in parted if job.name == name)
        assert {output for job in parts.values() for output in job.outputs} <= gather.inputs
    assert len(parted) == len(plan) + 4


def test_the_snakefile_passes_its_linter(tiny_project):
    done = snakemake(tiny_project, "--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_mistake_in_the_parameters_stops_snakemake_by_name(tiny_project, tmp_path):
    project = changed_copy(tiny_project, tmp_path, "ema_decay", "ema_dekay")
    done = snakemake(project, "--dry-run", TARGET)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    expected = "error: params.yaml: encoders.digits-mae.ema_dekay: unknown key; did you mean 'ema_decay'?"
    assert expected in done.stderr.splitlines()
