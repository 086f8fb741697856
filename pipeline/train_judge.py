"""train_judge: an independent pixel-space classifier for evaluation; no training stage sees it.

In: ``data/<dataset>/shards/`` (trained on the train split, its accuracy measured on the held-out one).
Out: ``models/judges/<name>/``, a diffusers folder in safetensors, and ``index.json`` with ``heldout_accuracy``.
"""

from pathlib import Path

import torch

from drift.artifacts import atomic_folder, describe_model, sha256_of_json
from drift.data.shards import ShardSet, load_images
from drift.data.stream import image_stream
from drift.metrics.judge import Judge
from drift.pretraining import train_judge
from pipeline import params, stage
from pipeline.tracking import Tracker


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--judge", required=True, help="name in judges:")
    parser.add_argument("--shards", type=Path, required=True, help="folder of image shards")
    parser.add_argument("--output", type=Path, required=True, help="folder of the judge")
    args = parser.parse_args()

    section = params.lookup(params.load(args.params).judges, args.judge, "judge")
    shards = ShardSet(args.shards)
    identity = sha256_of_json([section.model_dump(), shards.digest])
    with stage.writing("train_judge", args.output):
        torch.manual_seed(section.seed)
        judge = Judge(num_classes=len(shards.classes), width=section.width, feature_size=section.feature_size)
        judge.to("cuda" if torch.cuda.is_available() else "cpu")
        with Tracker(shards.index["dataset"], args.judge, identity, stage="train_judge") as tracker:
            tracker.params(section.model_dump())
            tracker.dataset(shards.index["dataset"], shards.digest, context="train")
            records = train_judge(
                judge,
                image_stream(shards, batch_size=section.batch_size, seed=section.seed),
                steps=section.steps,
                learning_rate=section.learning_rate,
                generator=torch.Generator().manual_seed(section.seed),
                shift=section.shift,
                noise=section.noise,
            )
            for record in stage.progress(records, total=section.steps, unit="step", description=f"judge {args.judge}"):
                tracker.metrics(record.values, record.images_seen)
            judge.set_feature_scale(load_images(shards, "train")[0])
            images, labels = load_images(shards, "heldout")
            accuracy = float((judge.judge(images)[1] == labels).mean())
            tracker.metrics({"heldout_accuracy": accuracy}, section.steps * section.batch_size)
        with atomic_folder(args.output) as folder:
            judge.save_pretrained(folder)
            describe_model(folder, "judge", args.judge, identity=identity, heldout_accuracy=accuracy)
    print(f"held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    stage.run(main)
