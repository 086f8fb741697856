"""MLflow: one run per trained model, found again by a digest of its parameters and inputs.

``MLFLOW_TRACKING_URI`` is honoured; without it the database is ``mlflow.db`` here. If tracking cannot be reached, one
warning is printed and the stage goes on.
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.stage import git_commit, runner

DATABASE = "sqlite:///mlflow.db"
IDENTITY = "identity"
#: Metrics are sent together at most this often, so that tracking costs training nothing.
FLUSH_SECONDS = 5.0


class Tracker:
    """A run of the MLflow experiment `experiment`, opened on entering; the same `identity` resumes the same run.

    Args:
        experiment: name of the MLflow experiment (a dataset's name, so that everything on it compares).
        name: of the run, shown in the UI.
        identity: digest of resolved parameters and inputs.
        stage: name of the stage that logs.
        tags: further tags, e.g. the identities of the models that this one was built on.
    """

    def __init__(self, experiment: str, name: str, identity: str, *, stage: str, tags: Mapping[str, str] | None = None):
        self._experiment, self._name, self._identity = experiment, name, identity
        self._tags = {IDENTITY: identity, "stage": stage, "runner": runner(), "git_commit": git_commit() or "none"}
        self._tags.update(tags or {})
        self._pending: list[tuple[str, float, int]] = []
        self._flushed = time.monotonic()
        self._mlflow = None

    def __enter__(self) -> "Tracker":
        self._guard(self._open)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.flush()
        status = "FINISHED" if kind is None else "FAILED"
        self._guard(lambda: self._mlflow and self._mlflow.end_run(status))

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters, nested mappings as dotted names."""
        flat = {k: str(v)[:6000] for k, v in flatten(values).items()}
        self._guard(lambda: self._mlflow and self._mlflow.log_params(flat))

    def dataset(self, name: str, digest: str, *, context: str) -> None:
        """Log an input by its digest (MLflow accepts 36 characters of it)."""

        def log() -> None:
            from mlflow.data.code_dataset_source import CodeDatasetSource
            from mlflow.data.meta_dataset import MetaDataset

            dataset = MetaDataset(CodeDatasetSource(tags={}), name=name, digest=digest[:36])
            self._mlflow.log_input(dataset, context=context)

        self._guard(lambda: self._mlflow and log())

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queue metrics at `step` (images seen); they are sent every few seconds."""
        self._pending += [(name, float(value), step) for name, value in values.items()]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send queued metrics."""
        pending, self._pending = self._pending, []
        self._flushed = time.monotonic()
        if pending:
            self._guard(lambda: self._mlflow and self._send(pending))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Attach a file."""
        self._guard(lambda: self._mlflow and self._mlflow.log_artifact(str(path), folder))

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", DATABASE))
        experiment_id = experiment_named(self._experiment)
        found = mlflow.MlflowClient().search_runs(
            [experiment_id], f"tags.{IDENTITY} = '{self._identity}'", max_results=1
        )
        mlflow.set_system_metrics_sampling_interval(10)
        if found:
            mlflow.start_run(run_id=found[0].info.run_id, log_system_metrics=True)
            # Stage and commit stay those that trained the model.
            mlflow.set_tags({k: v for k, v in self._tags.items() if k not in ("stage", "git_commit")})
        else:
            mlflow.start_run(experiment_id=experiment_id, run_name=self._name, tags=self._tags, log_system_metrics=True)
        self._mlflow = mlflow

    def _send(self, pending: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        run_id = self._mlflow.active_run().info.run_id
        client = self._mlflow.MlflowClient()
        for start in range(0, len(pending), 1000):
            batch = [Metric(name, value, now, step) for name, value, step in pending[start : start + 1000]]
            client.log_batch(run_id, metrics=batch)

    def _guard(self, call: Callable[[], object]) -> None:
        """Call into MLflow; at the first failure say so once and stop tracking: it must never stop a stage."""
        try:
            call()
        except Exception as error:  # whatever a tracking server, its driver or the network may raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            print(f"warning: MLflow tracking is off for this stage: {reason}", file=sys.stderr)
            self._mlflow = None


class NoTracker:
    """Stands in for `Tracker` in processes other than the first."""

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, *exc_info) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def experiment_named(name: str) -> str:
    """The id of an MLflow experiment, created if need be; parallel stages on one machine wait for each other here."""
    import mlflow

    Path("logs").mkdir(exist_ok=True)
    with open("logs/.mlflow.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = mlflow.get_experiment_by_name(name)
        return found.experiment_id if found else mlflow.create_experiment(name)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings to dotted names."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
