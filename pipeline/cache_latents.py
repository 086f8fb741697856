"""cache_latents: image shards to shards of posterior moments.

In: ``data/<dataset>/shards/``, a tokenizer.
Out: ``data/<dataset>/latents/<tokenizer>/``: for every image float16 mean and standard deviation ``[2, C, h, w]`` in
scaled latent units, of its mirror image too where the dataset allows flips; ``index.json``.
With ``--part i/n`` only every n-th shard is encoded; the run without ``--part`` does what is left and indexes.
"""

from pathlib import Path

import torch

from drift.artifacts import model_index, write_json
from drift.data.latents import cache_shard
from drift.data.shards import ShardSet, gather_index, identity_of, parse_part
from drift.tokenizer import Tokenizer
from pipeline import params, stage


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--dataset", required=True, help="name in datasets:")
    parser.add_argument("--shards", type=Path, required=True, help="folder of image shards")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder of latent shards")
    parser.add_argument("--part", help="i/n: encode only this part of the shards")
    args = parser.parse_args()

    everything = params.load(args.params)
    dataset = params.lookup(everything.datasets, args.dataset, "dataset")
    shards = ShardSet(args.shards)
    tokenizer_index = model_index(args.tokenizer, "tokenizer")
    section = params.lookup(everything.tokenizers, tokenizer_index["name"], "tokenizer")
    identity = identity_of(shards.digest, tokenizer_index["digest"], dataset.flip)
    entries = shards.index["shards"]
    part, parts = parse_part(args.part or "1/1")
    target = args.output.with_name(f"{args.output.name}.parts") / f"{part}-of-{parts}.json"

    with stage.writing("cache_latents", target if args.part else args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.from_pretrained(args.tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
        mine = entries[part - 1 :: parts]
        for entry in stage.progress(mine, total=len(mine), unit="shard", description=f"encode {args.dataset}"):
            cache_shard(
                shards,
                entry,
                tokenizer,
                args.output,
                flip=dataset.flip,
                batch_size=section.encode_batch_size,
                identity=identity,
            )
        if args.part:
            write_json(target, {"identity": identity, "shards": [entry["name"] for entry in mine]})
            return
        description = {
            "kind": "latents",
            "dataset": args.dataset,
            "classes": shards.classes,
            "flip": dataset.flip,
            "tokenizer": tokenizer_index["name"],
            "tokenizer_digest": tokenizer_index["digest"],
            "shards_digest": shards.digest,
            "shape": list(tokenizer.latent_shape(shards.index["image_size"])),
        }
        gather_index(args.output, [entry["name"] for entry in entries], identity, description)


if __name__ == "__main__":
    stage.run(main)
