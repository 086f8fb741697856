"""evaluate: the report of a run.

In: ``samples/<run>/samples.npz``, the generator, the judge, ``data/<dataset>/shards/`` (held-out and train splits).
Out: ``reports/<run>_fid.json`` (``metrics``, units in their names; ``sweep`` over alpha; ``reference``;
``provenance``) and beside it figures: ``_grid``, ``_progress``, ``_curves``, ``_alpha``, ``_nearest`` (PNG).
"""

import shutil
import zipfile
from pathlib import Path

import numpy as np

from drift.artifacts import atomic_file, model_index, write_json
from drift.checkpoints import read_history
from drift.data.shards import ShardSet, load_images
from drift.errors import InputError
from drift.metrics import evaluation
from drift.metrics.judge import Judge
from drift.tokenizer import Tokenizer
from pipeline import figures, params, stage
from pipeline.sample import load_pipeline
from pipeline.tracking import Tracker

PAIRS_SHOWN = 24


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--run", required=True, help="<experiment> or <experiment>.<table>.<variant>")
    parser.add_argument("--samples", type=Path, required=True, help="samples.npz")
    parser.add_argument("--generator", type=Path, required=True, help="folder of the generator")
    parser.add_argument("--judge", type=Path, required=True, help="folder of the judge")
    parser.add_argument("--shards", type=Path, required=True, help="folder of image shards")
    parser.add_argument("--output", type=Path, required=True, help="the report, ending in .json")
    args = parser.parse_args()

    experiment = params.run_of(params.load(args.params), args.run)
    section = experiment.evaluate
    shards = ShardSet(args.shards)
    index, judge_index = model_index(args.generator, "generator"), model_index(args.judge, "judge")
    images, labels = load_samples(args.samples, len(shards.classes))
    pipeline = load_pipeline(args.generator)
    judge = Judge.from_pretrained(args.judge, use_safetensors=True).to(pipeline.device)

    tracker = Tracker(experiment.dataset, args.run, index["identity"], stage="evaluate")
    with stage.writing("evaluate", args.output), tracker:
        train = evaluation.Reference.of(*load_images(shards, "train"), judge)
        heldout = evaluation.Reference.of(*load_images(shards, "heldout"), judge)
        # One size for every distance, so that all of them compare.
        size = min(len(train.labels), len(heldout.labels), len(labels), section.sweep_images)
        draws = {"size": size, "draws": section.draws, "seed": section.seed}
        floor = evaluation.floor_metrics(train, heldout, **draws)
        measure = lambda x, y: evaluation.sample_metrics(x, y, judge, train, heldout, **draws)  # noqa: E731
        sampled = measure(images, labels)
        memorised, nearest = evaluation.memorisation_metrics(images, train, heldout)
        alphas = stage.progress(section.sweep, total=len(section.sweep), unit="alpha", description="sweep")
        options = {"num_images": section.sweep_images, "seed": section.seed}
        sweep = evaluation.alpha_sweep(pipeline, alphas, measure, **options)
        metrics = {
            **sampled,
            **floor,
            "judge_set_size": size,
            "frechet_judge_ratio": sampled["frechet_judge"] / floor["frechet_judge_floor"],
            **memorised,
            "judge_heldout_accuracy": judge_index["heldout_accuracy"],
            **evaluation.reconstruction_metrics(Tokenizer(pipeline.vae), heldout.images),
            **evaluation.latency_metrics(pipeline, repeats=section.latency_repeats),
            **evaluation.parameter_counts(pipeline),
        }
        seconds = stage.wall_seconds(stage_outputs(args, experiment))
        metrics |= {f"wall_seconds_{name}": value for name, value in seconds.items() if value is not None}

        draw_figures(args, images, labels, train.images[nearest], sweep, floor)
        parameters = experiment.model_dump()
        report = {
            "run": args.run,
            "metrics": metrics,
            "sweep": sweep,
            "reference": {"paper_fid": section.paper_fid},
            "provenance": stage.provenance(parameters, shards.digest, experiment.train.seed),
        }
        write_json(args.output, report)
        tracker.metrics(metrics, index["images_seen"])
        for path in [args.output, *args.output.parent.glob(f"{args.output.stem}_*.png")]:
            tracker.artifact(path, "report")
    for name in ("frechet_judge", "frechet_judge_ratio", "class_accuracy", "within_class_variance_mean"):
        print(f"{name:28} {metrics[name]:.4f}")


def load_samples(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a ``samples.npz``; raises InputError if it is missing, damaged or labelled out of range."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a samples file with arr_0 and arr_1 ({error})") from None
    if len(images) != len(labels):
        raise InputError(f"{path}: {len(images)} images and {len(labels)} labels")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise InputError(f"{path}: label {wrong[0]} is out of range: the data has {num_classes} classes, from 0")
    return images, labels


def draw_figures(
    args, images: np.ndarray, labels: np.ndarray, nearest: np.ndarray, sweep: list[dict], floor: dict[str, float]
) -> None:
    """Every figure of the report, beside it."""
    beside = lambda name: args.output.with_name(f"{args.output.stem}_{name}.png")  # noqa: E731
    with atomic_file(beside("grid")) as temporary:
        shutil.copyfile(args.samples.parent / "grid.png", temporary)
    figures.training_curves(read_history(args.generator / "history.csv"), beside("curves"), f"{args.run}: training")
    grids = sorted((args.generator / "grids").glob("step-*.png"))
    figures.training_grids(grids, beside("progress"), f"{args.run}: the same noise during training (α = 1)")
    figures.alpha_sweep(sweep, floor, beside("alpha"), f"{args.run}: guidance")
    shown = slice(0, PAIRS_SHOWN)
    title = f"{args.run}: samples (odd rows) and their nearest training images (even rows)"
    figures.nearest_neighbours(images[shown], nearest[shown], beside("nearest"), title)


def stage_outputs(args, experiment: params.Experiment) -> dict[str, Path]:
    """What each stage before this one wrote, as the runners name it."""
    data = Path("data") / experiment.dataset
    return {
        "shard": args.shards,
        "train_tokenizer": Path("models/tokenizers") / experiment.tokenizer,
        "cache_latents": data / "latents" / experiment.tokenizer,
        "pretrain_encoder": Path("models/encoders") / experiment.encoder,
        "train_judge": args.judge,
        "train": args.generator,
        "sample": args.samples.parent,
    }


if __name__ == "__main__":
    stage.run(main)
