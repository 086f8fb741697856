"""sample: images from a trained generator, one forward pass each.

In: ``models/generators/<run>/``, a `DriftPipeline` folder.
Out: ``samples/<run>/samples.npz`` (``arr_0`` uint8 [N, H, W, 3], ``arr_1`` int64 labels, as many of every class as can
be) and ``grid.png``.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from drift.artifacts import atomic_folder, model_index
from drift.errors import InputError
from drift.sampling import DriftPipeline, sample_in_batches
from pipeline import params, stage
from pipeline.tracking import Tracker

GRID_ROWS = 10


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--run", required=True, help="<experiment> or <experiment>.<table>.<variant>")
    parser.add_argument("--generator", type=Path, required=True, help="folder of the generator")
    parser.add_argument("--output", type=Path, required=True, help="folder of the samples")
    args = parser.parse_args()

    experiment = params.run_of(params.load(args.params), args.run)
    section = experiment.sample
    index = model_index(args.generator, "generator")
    pipeline = load_pipeline(args.generator)
    labels = torch.arange(section.num_images) % pipeline.generator.config.num_classes
    tracker = Tracker(experiment.dataset, args.run, index["identity"], stage="sample")
    with stage.writing("sample", args.output), tracker:
        with stage.progress(None, total=len(labels), unit="image", description=f"sample {args.run}") as bar:
            images = sample_in_batches(
                pipeline,
                labels,
                section.guidance_scale,
                generator=torch.Generator().manual_seed(section.seed),
                batch_size=section.batch_size,
                progress=bar.update,
            )
        with atomic_folder(args.output) as folder:
            np.savez(folder / "samples.npz", images, labels.numpy())
            columns = min(10, pipeline.generator.config.num_classes)
            shown = [Image.fromarray(image) for image in first_of_each_class(images, labels.numpy(), columns)]
            make_image_grid(shown, len(shown) // columns, columns).save(folder / "grid.png")
        tracker.artifact(args.output / "grid.png")


def first_of_each_class(images: np.ndarray, labels: np.ndarray, columns: int) -> np.ndarray:
    """Rows of one image per class, for as many rows as every shown class has, at most `GRID_ROWS`."""
    of_class = [images[labels == label][:GRID_ROWS] for label in range(columns)]
    rows = min(len(images) for images in of_class)
    if not rows:
        raise InputError(f"num_images {len(images)} is too few for one image of each class")
    return np.stack([images[:rows] for images in of_class], axis=1).reshape(-1, *images.shape[1:])


def load_pipeline(folder: Path) -> DriftPipeline:
    """The pipeline of a generator folder, on the GPU where there is one; weights from safetensors only."""
    try:
        pipeline = DriftPipeline.from_pretrained(str(folder), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: generator does not load ({str(error).splitlines()[0]})") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    stage.run(main)
