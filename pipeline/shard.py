"""shard: images of a dataset to WebDataset shards.

In: scikit-learn's digits, or a folder of images (``datasets.<name>``).
Out: ``data/<dataset>/shards/``: tars of ``<key>.png|jpg`` + ``<key>.cls``, split into train and a stratified, seeded
held-out part that no training stage sees; ``index.json`` says which shard holds what.
With ``--part i/n`` only every n-th shard is written; the run without ``--part`` does what is left and indexes.
"""

from pathlib import Path

from drift.artifacts import write_json
from drift.data.shards import gather_index, identity_of, parse_part, plan_shards, write_shard
from drift.data.sources import Digits, ImageFolder, Source
from pipeline import params, stage


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--dataset", required=True, help="name in datasets:")
    parser.add_argument("--output", type=Path, required=True, help="folder of shards")
    parser.add_argument("--part", help="i/n: write only this part of the shards")
    args = parser.parse_args()

    dataset = params.lookup(params.load(args.params).datasets, args.dataset, "dataset")
    source = open_source(dataset)
    plans = plan_shards(
        source,
        samples_per_shard=dataset.samples_per_shard,
        heldout_fraction=dataset.heldout_fraction,
        seed=dataset.seed,
    )
    identity = identity_of(dataset.model_dump(exclude={"parts"}), source.identity)
    part, parts = parse_part(args.part or "1/1")
    target = args.output.with_name(f"{args.output.name}.parts") / f"{part}-of-{parts}.json"

    with stage.writing("shard", target if args.part else args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        mine = plans[part - 1 :: parts]
        for plan in stage.progress(mine, total=len(mine), unit="shard", description=f"shard {args.dataset}"):
            write_shard(source, plan, args.output, identity=identity)
        if args.part:
            write_json(target, {"identity": identity, "shards": [plan.name for plan in mine]})
            return
        description = {
            "kind": "shards",
            "dataset": args.dataset,
            "classes": list(source.classes),
            "image_size": dataset.image_size,
            "flip": dataset.flip,
        }
        gather_index(args.output, [plan.name for plan in plans], identity, description)


def open_source(dataset: params.Dataset) -> Source:
    return Digits(dataset.image_size) if dataset.source == "digits" else ImageFolder(dataset.path)


if __name__ == "__main__":
    stage.run(main)
