"""The training loop: resuming, checkpoints, and what a step is made of."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from drift import objective as objective_module
from drift import training
from drift.artifacts import write_json
from drift.checkpoints import Checkpoints, read_history, write_history
from drift.data.shards import ShardSet
from drift.data.stream import ShardStream
from drift.encoders import ResNetMAE
from drift.errors import InputError
from drift.generator import Generator
from drift.objective import Objective, by_location
from drift.training import DriftTrainer

CLASSES = 3
SHAPE = (2, 8, 8)
#: Shards of unequal sizes, so that batches run across their ends.
SIZES = (13, 9, 20)
BATCH = 8
STEPS = 6

OBJECTIVE = Objective(labels=3, generated=3, positives=4, unconditional=2, unguided_fraction=0.3)


def read_random(_shards: ShardSet, entry: dict) -> tuple[np.ndarray, np.ndarray]:
    """A latent shard of random moments, the same whenever read: ``[N, 1, 2, C, h, w]`` and labels of every class."""
    rng = np.random.default_rng(entry["seed"])
    moments = rng.normal(size=(entry["samples"], 1, 2, *SHAPE)).astype(np.float16)
    return moments, np.arange(entry["samples"]) % CLASSES


@pytest.fixture
def latents(tmp_path) -> ShardSet:
    folder = tmp_path / "latents"
    shards = [{"name": f"train-{i}.tar", "split": "train", "samples": size, "seed": i} for i, size in enumerate(SIZES)]
    write_json(folder / "index.json", {"kind": "latents", "classes": list("abc"), "shards": shards})
    return ShardSet(folder, "latents")


@pytest.fixture
def build(latents, fresh_accelerate):
    """A function that builds a small trainer; the same every time but for what is given."""

    def build(**options) -> DriftTrainer:
        fresh_accelerate()
        torch.manual_seed(0)
        generator = Generator(
            in_channels=2,
            input_size=8,
            patch_size=4,
            width=16,
            depth=1,
            heads=2,
            num_classes=CLASSES,
            num_registers=1,
            num_styles=2,
            style_codes=4,
        )
        encoder = ResNetMAE(in_channels=2, width=4, depths=(1, 1, 1, 1), num_classes=CLASSES)
        defaults = {
            "generator": generator,
            "encoder": encoder,
            "batches": ShardStream(latents, read_random, split="train", batch_size=BATCH, seed=0),
            "objective": OBJECTIVE,
            "num_classes": CLASSES,
            "learning_rate": 1e-2,
            "warmup_steps": 3,
            "steps": STEPS,
            "decay_steps": 2,
            "ema_decay": 0.9,
            "queue_class_capacity": 6,
            "queue_global_capacity": 10,
            "accelerator": Accelerator(cpu=True),
        }
        return DriftTrainer(**{**defaults, **options})

    return build


def state(trainer: DriftTrainer) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name."""
    weights = {f"weights.{k}": v.clone() for k, v in trainer.generator.state_dict().items()}
    ema = {f"ema.{i}": v.clone() for i, v in enumerate(trainer.ema.shadow_params)}
    queue = {f"queue.{k}": v for k, v in trainer.queue.state_dict().items()}
    moments = {
        f"{key}.{i}": value.clone()
        for i, entry in trainer.optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return {**weights, **ema, **queue, **moments}


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def reproducible(step: training.Step) -> dict:
    """A step's record without what the clock decides."""
    record = dataclasses.asdict(step)
    return {k: v for k, v in record.items() if k not in ("images_per_second", "data_wait")}


def run(trainer: DriftTrainer, steps: int) -> list[dict]:
    return [reproducible(step) for step in trainer.run(steps)]


# --- Resuming -----------------------------------------------------------------------------------------------------


@pytest.fixture
def uninterrupted(build) -> tuple[list[dict], dict[str, torch.Tensor]]:
    trainer = build()
    return run(trainer, STEPS), state(trainer)


def test_a_run_is_the_same_whenever_repeated(build, uninterrupted):
    trainer = build()
    assert run(trainer, STEPS) == uninterrupted[0]
    assert_identical(state(trainer), uninterrupted[1])


def test_training_changes_every_weight_that_can_change(build):
    before, trainer = state(build()), build()
    run(trainer, STEPS)
    after = state(trainer)
    assert not torch.equal(before["weights.unpatchify.weight"], after["weights.unpatchify.weight"])
    assert not torch.equal(before["weights.class_embedding.weight"], after["weights.class_embedding.weight"])
    assert all(torch.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize("position", range(1, STEPS))
def test_a_run_resumed_from_any_checkpoint_equals_an_uninterrupted_one_bit_for_bit(
    build, uninterrupted, tmp_path, position: int
):
    records, final = uninterrupted
    first = build()
    head = run(first, position)
    Checkpoints(tmp_path / "checkpoints", "identity", first.accelerator).save(position, [{"step": position}])

    # The new trainer starts from other weights: what it ends with can only come from the checkpoint.
    second = build()
    with torch.no_grad():
        for parameter in second.generator.parameters():
            parameter.add_(1.0)
    history = Checkpoints(tmp_path / "checkpoints", "identity", second.accelerator).load_newest()
    assert history == [{"step": position}]
    assert second.step == position
    tail = run(second, STEPS)
    assert head + tail == records
    assert_identical(state(second), final)


def test_a_run_interrupted_twice_equals_an_uninterrupted_one(build, uninterrupted, tmp_path):
    for stop in (2, 4, STEPS):
        trainer = build()
        checkpoints = Checkpoints(tmp_path / "checkpoints", "identity", trainer.accelerator)
        checkpoints.load_newest()
        run(trainer, stop)
        checkpoints.save(stop, [])
    assert_identical(state(trainer), uninterrupted[1])


def test_saving_checkpoints_does_not_change_the_run(build, uninterrupted, tmp_path):
    trainer = build()
    checkpoints = Checkpoints(tmp_path / "checkpoints", "identity", trainer.accelerator)
    for step in trainer.run(STEPS):
        checkpoints.save(step.step, [])
    assert_identical(state(trainer), uninterrupted[1])


def test_a_finished_run_has_nothing_left_to_do(build, uninterrupted):
    trainer = build()
    run(trainer, STEPS)
    assert run(trainer, STEPS) == []
    assert_identical(state(trainer), uninterrupted[1])


# --- Checkpoints --------------------------------------------------------------------------------------------------


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.rglob("*step-*") if p.is_dir())


def test_only_the_newest_two_checkpoints_are_kept(build, tmp_path):
    trainer = build()
    checkpoints = Checkpoints(tmp_path / "checkpoints", "identity", trainer.accelerator)
    kept = []
    for step in trainer.run(4):
        checkpoints.save(step.step, [])
        kept.append(folders(tmp_path / "checkpoints"))
    names = [f"step-{step:08d}" for step in range(1, 5)]
    assert kept == [names[:1], names[:2], names[1:3], names[2:4]]


def test_a_checkpoint_of_another_identity_is_not_loaded(build, tmp_path):
    trainer = build()
    run(trainer, 2)
    Checkpoints(tmp_path / "checkpoints", "a" * 64, trainer.accelerator).save(2, [{"step": 2}])
    other = build()
    before = state(other)
    assert Checkpoints(tmp_path / "checkpoints", "b" * 64, other.accelerator).load_newest() == []
    assert other.step == 0
    assert_identical(state(other), before)


def test_removing_checkpoints_leaves_those_of_another_identity(build, tmp_path):
    trainer = build()
    run(trainer, 1)
    one, other = (Checkpoints(tmp_path / "checkpoints", name * 64, trainer.accelerator) for name in "ab")
    one.save(1, [])
    other.save(1, [])
    one.remove()
    assert folders(tmp_path / "checkpoints") == ["step-00000001"]
    assert other.folder.exists()


def test_an_interrupted_save_leaves_the_checkpoint_before_it_to_be_loaded(build, tmp_path, monkeypatch):
    trainer = build()
    checkpoints = Checkpoints(tmp_path / "checkpoints", "identity", trainer.accelerator)
    run(trainer, 1)
    checkpoints.save(1, [{"step": 1}])
    run(trainer, 2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("drift.checkpoints.write_history", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, [])
    assert folders(tmp_path / "checkpoints") == ["step-00000001"]
    # A kill leaves even the temporary folder; it must not be taken for a checkpoint.
    (checkpoints.folder / ".step-00000003.tmp").mkdir()
    resumed = build()
    assert Checkpoints(tmp_path / "checkpoints", "identity", resumed.accelerator).load_newest() == [{"step": 1}]
    assert resumed.step == 1


def test_without_checkpoints_a_run_starts_at_its_beginning(build, tmp_path):
    trainer = build()
    assert Checkpoints(tmp_path / "none", "identity", trainer.accelerator).load_newest() == []
    assert trainer.step == 0


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "loss": 0.1 + 0.2, "grad_norm": 1e-300, "drift_norm_tau_0.02": 1 / 3}],
        [{"step": 5, "loss": float("inf"), "x": 0.0}, {"step": 10, "loss": -1.5, "x": 12345678.9}],
    ],
)
def test_a_history_comes_back_with_every_digit(tmp_path, history):
    write_history(tmp_path / "history.csv", history)
    read = read_history(tmp_path / "history.csv")
    assert read == history
    assert [type(value) for row in read for value in row.values()] == [
        type(value) for row in history for value in row.values()
    ]


# --- A step -------------------------------------------------------------------------------------------------------


def test_a_nan_stops_the_run_by_name_and_leaves_its_checkpoints(build, tmp_path):
    trainer = build()
    checkpoints = Checkpoints(tmp_path / "checkpoints", "identity", trainer.accelerator)
    for step in trainer.run(2):
        checkpoints.save(step.step, [])
    before = state(trainer)
    with torch.no_grad():
        next(trainer.encoder.stages[3].parameters()).fill_(float("nan"))
    with pytest.raises(InputError) as caught:
        run(trainer, 4)
    message = str(caught.value)
    assert "\n" not in message
    assert "step 3" in message
    # The last stage is broken, and only what comes from it may be blamed.
    assert "layer4" in message
    assert "layer3" not in message
    assert "conv1" not in message
    assert folders(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]
    after = state(trainer)
    weights = [name for name in before if name.startswith(("weights", "ema"))]
    assert_identical({name: before[name] for name in weights}, {name: after[name] for name in weights})


def test_the_labels_of_a_step_come_from_the_newest_batch(build):
    # Batches of one class each: the labels of a step tell which batch they came from.
    class Batches:
        position = 0

        def __iter__(self):
            rng = np.random.default_rng(0)
            for number in itertools.count():
                self.position += BATCH
                self.newest = number % CLASSES
                yield rng.normal(size=(BATCH, 1, 2, *SHAPE)).astype(np.float16), np.full(BATCH, self.newest)

    batches = Batches()
    trainer = build(batches=batches)
    seen: list[tuple[int, list[int]]] = []
    trainer.generator.register_forward_pre_hook(
        lambda _module, inputs: seen.append((batches.newest, inputs[1].unique().tolist()))
    )
    run(trainer, 5)
    assert len(seen) == 5
    assert [labels for _, labels in seen] == [[newest] for newest, _ in seen]


def test_a_class_may_occur_as_often_as_in_the_newest_batch(build):
    trainer = build(objective=dataclasses.replace(OBJECTIVE, labels=BATCH))
    seen: list[torch.Tensor] = []
    trainer.generator.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1].clone()))
    pushed: list[torch.Tensor] = []
    push = trainer.queue.push
    trainer.queue.push = lambda samples, labels: (pushed.append(labels.clone()), push(samples, labels))
    run(trainer, 1)
    pushed.clear()
    run(trainer, 2)
    # All of a batch, without replacement, each label for all of its generated samples in a row.
    rows = seen[-1].reshape(BATCH, OBJECTIVE.generated)
    assert (rows == rows[:, :1]).all()
    assert len(pushed) == 1
    assert sorted(rows[:, 0].tolist()) == sorted(pushed[0].tolist())


def guidance_of(build, monkeypatch, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The alphas that the generator is given in one step, one per label, and the negative weights of the losses."""
    trainer = build(objective=objective)
    alphas, weights = [], []
    trainer.generator.register_forward_pre_hook(lambda _module, inputs: alphas.append(inputs[2].clone()))
    real = objective_module.drift_loss

    def spy(*args, **kwargs):
        weights.append(kwargs["negative_weights"].clone())
        return real(*args, **kwargs)

    monkeypatch.setattr(objective_module, "drift_loss", spy)
    run(trainer, 1)
    rows = alphas[0].reshape(objective.labels, objective.generated)
    assert (rows == rows[:, :1]).all(), "alpha is drawn per label"
    assert len({tuple(w[:: len(w) // objective.labels].flatten().tolist()) for w in weights}) == 1
    return rows[:, 0], weights[0][:: len(weights[0]) // objective.labels]


def test_unguided_labels_give_unconditional_negatives_no_weight(build, monkeypatch):
    alphas, weights = guidance_of(build, monkeypatch, dataclasses.replace(OBJECTIVE, unguided_fraction=1.0))
    assert alphas.tolist() == [1.0] * 3
    assert weights.shape == (3, 2)
    assert not weights.any()


def test_guided_labels_weigh_unconditional_negatives_by_their_alpha(build, monkeypatch):
    objective = dataclasses.replace(OBJECTIVE, unguided_fraction=0.0, guidance_range=(2.0, 3.0))
    alphas, weights = guidance_of(build, monkeypatch, objective)
    assert (alphas >= 2).all()
    assert (alphas <= 3).all()
    assert len(alphas.unique()) == 3
    # A.7: w = (alpha - 1)(N_neg - 1) / N_unc with 3 generated and 2 unconditional samples.
    expected = (alphas.double() - 1) * (3 - 1) / 2
    torch.testing.assert_close(weights.double(), expected[:, None].expand(3, 2))


def test_features_can_be_chosen(build):
    trainer = build(objective=dataclasses.replace(OBJECTIVE, features=("layer2_mean", "global")))
    step = next(iter(trainer.run(1)))
    assert set(step.group_norms) == {"layer2", "global"}


def test_a_step_counts_generated_images(build):
    records = run(build(), 5)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert [r["images_seen"] for r in records] == [9, 18, 27, 36, 45]  # 3 labels x 3 generated
    assert all(set(r["drift_norms"]) == {0.02, 0.05, 0.2} for r in records)


WARM = [1e-6 + (1e-2 - 1e-6) * done / 3 for done in range(3)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decay_steps": 0}, [*WARM, 1e-2, 1e-2, 1e-2]),
        ({"decay_steps": 2}, [*WARM, 1e-2, 1e-2, 1e-2 / 2]),
        ({"decay_steps": 0, "warmup_steps": 0}, [1e-2] * STEPS),
    ],
)
def test_the_rate_warms_up_then_stays_or_falls_at_the_end(build, options: dict, expected: list[float]):
    records = run(build(**options), STEPS)
    np.testing.assert_allclose([r["learning_rate"] for r in records], expected, rtol=1e-6)


def test_the_ema_decays_constantly_from_the_first_step(build):
    trainer = build()
    expected = [p.detach().clone() for p in trainer.generator.parameters()]
    for _ in trainer.run(4):
        for shadow, parameter in zip(expected, trainer.generator.parameters(), strict=True):
            shadow.mul_(0.9).add_(parameter.detach(), alpha=0.1)
    # diffusers takes the first update's weights whole: at the warm-up's first rate that is no more than 1e-6.
    for shadow, parameter in zip(trainer.ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(shadow, parameter, rtol=0, atol=2e-6)


def test_the_encoder_stays_as_it_was(build):
    trainer = build()
    before = {name: value.clone() for name, value in trainer.encoder.state_dict().items()}
    run(trainer, 2)
    assert not any(parameter.requires_grad for parameter in trainer.encoder.parameters())
    assert_identical(before, trainer.encoder.state_dict())


def test_queues_are_full_before_the_first_step(build):
    trainer = build()
    run(trainer, 1)
    assert trainer.queue.missing_classes() == []
    assert int(trainer.queue.pushed_overall) >= max(CLASSES * 6, 10)


def test_a_class_without_training_samples_is_named(build):
    # Four classes are expected and three are there.
    with pytest.raises(InputError, match=r"no sample of class 3 in the first"):
        run(build(num_classes=4), 1)


def test_locations_become_batch_entries_with_their_samples_beside_each_other():
    L, S, T, C = 2, 3, 4, 5
    features = torch.arange(L * S * T * C).reshape(L * S, T, C)
    regrouped = by_location(features, L)
    assert regrouped.shape == (L * T, S, C)
    for label, sample, location in itertools.product(range(L), range(S), range(T)):
        expected = features[label * S + sample, location]
        assert torch.equal(regrouped[label * T + location, sample], expected)
