"""train_tokenizer: the autoencoder between images and latents.

In: ``data/<dataset>/shards/`` (train split only), or a pretrained `AutoencoderKL` by folder or hub id
(``tokenizers.<name>.pretrained``), or nothing for pixel space (``identity: true``).
Out: ``models/tokenizers/<name>/``, a diffusers folder in safetensors, and ``index.json``.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from drift.artifacts import atomic_folder, describe_model, sha256_of_json
from drift.data.shards import ShardSet, load_images
from drift.data.stream import image_stream
from drift.pretraining import set_latent_scale, train_tokenizer
from drift.tokenizer import Tokenizer
from pipeline import params, stage
from pipeline.tracking import Tracker

#: Images that the scale of the latents is measured on.
SCALE_IMAGES = 2000


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="name in tokenizers:")
    parser.add_argument("--shards", type=Path, required=True, help="folder of image shards")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tokenizer")
    args = parser.parse_args()

    section = params.lookup(params.load(args.params).tokenizers, args.tokenizer, "tokenizer")
    shards = ShardSet(args.shards)
    identity = sha256_of_json([section.model_dump(), shards.digest])
    with stage.writing("train_tokenizer", args.output):
        if section.identity:
            tokenizer = Tokenizer()
        elif section.pretrained:
            tokenizer = Tokenizer.from_pretrained(section.pretrained)
        else:
            tokenizer = Tokenizer(trained(section, shards, args.tokenizer, identity))
        with atomic_folder(args.output) as folder:
            tokenizer.save_pretrained(folder)
            describe_model(folder, "tokenizer", args.tokenizer, identity=identity)


def trained(section: params.Tokenizer, shards: ShardSet, name: str, identity: str) -> AutoencoderKL:
    """Train on the train split, logging to MLflow."""
    torch.manual_seed(section.seed)
    stages = len(section.block_out_channels)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * stages,
        up_block_types=["UpDecoderBlock2D"] * stages,
        block_out_channels=section.block_out_channels,
        layers_per_block=section.layers_per_block,
        latent_channels=section.latent_channels,
        norm_num_groups=section.norm_groups,
        sample_size=shards.index["image_size"],
        mid_block_add_attention=False,
    )
    vae.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    batches = image_stream(shards, batch_size=section.batch_size, seed=section.seed)
    records = train_tokenizer(
        vae,
        batches,
        steps=section.steps,
        learning_rate=section.learning_rate,
        kl_weight=section.kl_weight,
        generator=torch.Generator().manual_seed(section.seed),
    )
    with Tracker(shards.index["dataset"], name, identity, stage="train_tokenizer") as tracker:
        tracker.params(section.model_dump())
        tracker.dataset(shards.index["dataset"], shards.digest, context="train")
        for record in stage.progress(records, total=section.steps, unit="step", description=f"tokenizer {name}"):
            tracker.metrics(record.values, record.images_seen)
    images, _ = load_images(shards, "train", limit=SCALE_IMAGES)
    set_latent_scale(vae, images)
    return vae.to(memory_format=torch.contiguous_format)


if __name__ == "__main__":
    stage.run(main)
