"""A copy of the project with tiny settings in which stages run as commands, prepared once for all tests."""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("Snakefile", "dvc.yaml", "params.yaml", "pipeline", "drift", "docs", "envs", "profiles", "tests")
PREPARED = ("shard", "train_tokenizer", "cache_latents", "pretrain_encoder", "train_judge")


@dataclass(frozen=True)
class Project:
    """A copy of the project; its stages run with the commands of its ``dvc.yaml``."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def params(self) -> dict:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def command(self, stage: str, **options: object) -> list[str]:
        """The command of a stage as a list; ``output="x"`` replaces the value of ``--output``, or adds it."""
        stages = yaml.safe_load((self.folder / "dvc.yaml").read_text())["stages"]
        words = shlex.split(resolved(stages[stage]["cmd"], self.params))
        for name, value in options.items():
            option = f"--{name}"
            if option in words:
                words[words.index(option) + 1] = str(value)
            else:
                words += [option, str(value)]
        return [sys.executable, *words[1:]]

    def start(self, stage: str, *, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen:
        """Start a stage and return the process, its stdout and stderr piped as text."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, **self.env, **(env or {})}
        return subprocess.Popen(self.command(stage, **options), cwd=self.folder, env=environment, **streams)

    def run(
        self, stage: str, *, env: dict[str, str] | None = None, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a stage to its end."""
        process = self.start(stage, env=env, **options)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def resolved(text: str, params: dict) -> str:
    """`text` with DVC's ``${a.b}`` replaced from `params`."""

    def value(match: re.Match) -> str:
        found = params
        for key in match[1].split("."):
            found = found[key]
        return str(found)

    return re.sub(r"\$\{([^}]+)\}", value, text)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors are small here: on a busy machine threads wait longer for each other than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A committed copy of the project with tiny settings, nothing run in it yet."""
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)
    params = folder / "params.yaml"
    params.write_text(yaml.safe_dump(tiny(yaml.safe_load(params.read_text())), sort_keys=False))
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", *COPIED], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "A tiny project"], check=True)
    env = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        # The copy's own library comes first, also for commands other than `python -m`.
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return Project(folder, env)


@pytest.fixture(scope="session")
def tiny_run(tiny_project: Project) -> Project:
    """The same copy with shards, tokenizer, latents, encoder and judge made; tests write only outputs of their own."""
    for stage in PREPARED:
        done = tiny_project.run(stage)
        assert done.returncode == 0, f"{stage}:\n{done.stderr}"
    return tiny_project


@pytest.fixture
def fresh_accelerate():
    """A function that forgets Accelerate's process-wide state, so that one test may build several accelerators."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()


@pytest.fixture
def small_files():
    """A context in which no file may grow beyond so many bytes: writes fail as on a full disk, with EFBIG."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
