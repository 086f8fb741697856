"""train: the one-step generator, drifted in the encoder's feature space.

In: ``data/<dataset>/latents/<tokenizer>/`` (train split only), an encoder, the tokenizer (for grids and for sampling).
Out: ``models/generators/<run>/``, a `DriftPipeline` folder in safetensors with the EMA weights, ``index.json``,
``history.csv`` (curves) and ``grids/``. Checkpoints and growing grids stand in ``checkpoints/<run>/``: after an
interruption the same command continues from the newest one.
"""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid

from drift.artifacts import atomic_file, atomic_folder, describe_model, model_index, sha256_of_json
from drift.checkpoints import Checkpoints, write_history
from drift.data.shards import ShardSet
from drift.data.stream import latent_stream
from drift.encoders import load_encoder
from drift.generator import GENERATORS, Generator
from drift.objective import Objective
from drift.sampling import DriftPipeline
from drift.tokenizer import Tokenizer
from drift.training import DriftTrainer, Step
from pipeline import params, stage
from pipeline.tracking import NoTracker, Tracker

GRID_ROWS = 8


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--run", required=True, help="<experiment> or <experiment>.<table>.<variant>")
    parser.add_argument("--latents", type=Path, required=True, help="folder of latent shards")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of resume state")
    parser.add_argument("--output", type=Path, required=True, help="folder of the generator")
    args = parser.parse_args()

    experiment = params.run_of(params.load(args.params), args.run)
    latents = ShardSet(args.latents, "latents")
    latents.require_every_class("train")
    inputs = {
        "latents": latents.digest,
        "encoder": model_index(args.encoder, "encoder")["digest"],
        "tokenizer": model_index(args.tokenizer, "tokenizer")["digest"],
    }
    parameters = {"generator": experiment.generator.model_dump(), "train": experiment.train.model_dump()}
    identity = sha256_of_json([parameters, inputs])

    accelerator = Accelerator(mixed_precision=experiment.train.precision)
    trainer = build_trainer(experiment, latents, args.encoder, accelerator)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    pipeline = DriftPipeline(trainer.generator, tokenizer.vae, latents.classes).to(accelerator.device)
    if not accelerator.is_main_process:
        train(trainer, experiment.train, Checkpoints(args.checkpoints, identity, accelerator), pipeline, NoTracker())
        return
    tracker = Tracker(latents.index["dataset"], args.run, identity, stage="train", tags=inputs)
    with stage.writing("train", args.output), tracker:
        tracker.params(parameters)
        tracker.dataset(latents.index["dataset"], latents.digest, context="train")
        checkpoints = Checkpoints(args.checkpoints, identity, accelerator)
        history = train(trainer, experiment.train, checkpoints, pipeline, tracker)
        trainer.ema.copy_to(trainer.generator.parameters())
        with atomic_folder(args.output) as folder:
            pipeline.save_pretrained(folder, safe_serialization=True)
            write_history(folder / "history.csv", history)
            shutil.copytree(checkpoints.folder / "grids", folder / "grids")
            describe_model(
                folder,
                "generator",
                args.run,
                identity=identity,
                inputs=inputs,
                steps=trainer.step,
                images_seen=history[-1]["images_seen"],
            )
        checkpoints.remove()


def build_trainer(
    experiment: params.Experiment, latents: ShardSet, encoder: Path, accelerator: Accelerator
) -> DriftTrainer:
    """The trainer of an experiment's resolved parameters."""
    section, size = experiment.train, experiment.generator
    torch.manual_seed(section.seed)
    channels, side, _ = latents.index["shape"]
    named = GENERATORS[size.size] if size.size else size.model_dump(include={"patch_size", "width", "depth", "heads"})
    generator = Generator(
        **{
            **named,
            "in_channels": channels,
            "input_size": side,
            "num_classes": len(latents.classes),
            **size.model_dump(exclude={"size", "patch_size", "width", "depth", "heads"}),
        }
    )
    objective = Objective(**{name: getattr(section, name) for name in Objective.__dataclass_fields__})
    return DriftTrainer(
        generator,
        load_encoder(encoder),
        # Every process draws its own real samples.
        latent_stream(latents, batch_size=section.push, seed=section.seed + 7919 * accelerator.process_index),
        objective,
        len(latents.classes),
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        steps=section.steps,
        decay_steps=round(section.decay_fraction * section.steps),
        weight_decay=section.weight_decay,
        betas=tuple(section.betas),
        max_grad_norm=section.max_grad_norm,
        ema_decay=section.ema_decay,
        queue_class_capacity=section.queue_class_capacity,
        queue_global_capacity=section.queue_global_capacity,
        seed=section.seed,
        accelerator=accelerator,
    )


def train(
    trainer: DriftTrainer,
    section: params.Train,
    checkpoints: Checkpoints,
    pipeline: DriftPipeline,
    tracker: Tracker | NoTracker,
) -> list[dict[str, float]]:
    """Train from the newest checkpoint to the last step; returns the history of logged steps."""
    history = checkpoints.load_newest()
    bar = stage.progress(None, total=section.steps, unit="step", description="train")
    bar.update(trainer.step)
    bar.initial = bar.last_print_n = trainer.step
    with bar:
        for step in trainer.run():
            last = step.step == section.steps
            if step.step % section.log_every == 0 or last:
                history.append(reproducible_metrics(step))
                tracker.metrics({**reproducible_metrics(step), **speed_metrics(step)}, step.images_seen)
                norms = " ".join(f"{norm:.2e}" for norm in step.drift_norms.values())
                bar.set_postfix_str(f"drift norms {norms}", refresh=False)
            if trainer.accelerator.is_main_process and (step.step % section.grid_every == 0 or last):
                path = checkpoints.folder / "grids" / f"step-{step.step:08d}.png"
                write_grid(trainer, pipeline, path, section.seed)
                tracker.artifact(path, "grids")
            if step.step % section.checkpoint_every == 0 or last:
                tracker.flush()
                checkpoints.save(step.step, history)
            bar.update(1)
    return history


def reproducible_metrics(step: Step) -> dict[str, float]:
    """What depends on parameters and data alone."""
    return {
        "step": step.step,
        "images_seen": step.images_seen,
        "loss": step.loss,
        **{f"drift_norm_tau_{tau:g}": norm for tau, norm in step.drift_norms.items()},
        **{f"drift_norm_{group}": norm for group, norm in step.group_norms.items()},
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
    }


def speed_metrics(step: Step) -> dict[str, float]:
    """What depends on the machine too."""
    return {"images_per_second": step.images_per_second, "data_wait_share": step.data_wait}


def write_grid(trainer: DriftTrainer, pipeline: DriftPipeline, path: Path, seed: int) -> None:
    """Samples of the EMA weights at alpha 1, a column per class (the first ten), the same noise every time."""
    classes = min(10, trainer.num_classes)
    labels = torch.arange(classes).repeat(GRID_ROWS)
    parameters = list(trainer.generator.parameters())
    trainer.ema.store(parameters)
    trainer.ema.copy_to(parameters)
    random = torch.Generator().manual_seed(seed)
    images = pipeline(labels, 1.0, generator=random).images
    trainer.ema.restore(parameters)
    with atomic_file(path) as temporary:
        make_image_grid(images, GRID_ROWS, classes).save(temporary)


if __name__ == "__main__":
    stage.run(main)
