"""pretrain_encoder: the masked autoencoder whose features carry the drifting loss.

In: ``data/<dataset>/latents/<tokenizer>/`` (train split only).
Out: ``models/encoders/<name>/``, a diffusers folder in safetensors with the EMA weights, and ``index.json``.
"""

from pathlib import Path

import torch

from drift.artifacts import atomic_folder, describe_model, sha256_of_json
from drift.data.shards import ShardSet
from drift.data.stream import latent_stream
from drift.encoders import ResNetMAE
from drift.pretraining import train_encoder
from pipeline import params, stage
from pipeline.tracking import Tracker


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--encoder", required=True, help="name in encoders:")
    parser.add_argument("--latents", type=Path, required=True, help="folder of latent shards")
    parser.add_argument("--output", type=Path, required=True, help="folder of the encoder")
    args = parser.parse_args()

    section = params.lookup(params.load(args.params).encoders, args.encoder, "encoder")
    latents = ShardSet(args.latents, "latents")
    identity = sha256_of_json([section.model_dump(), latents.digest])
    with stage.writing("pretrain_encoder", args.output):
        torch.manual_seed(section.seed)
        encoder = ResNetMAE(
            in_channels=latents.index["shape"][0],
            width=section.width,
            depths=tuple(section.depths),
            num_classes=len(latents.classes),
            input_patch_size=section.input_patch_size,
            mask_patch=section.mask_patch,
        )
        encoder.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
        with Tracker(latents.index["dataset"], args.encoder, identity, stage="pretrain_encoder") as tracker:
            tracker.params(section.model_dump())
            tracker.dataset(latents.index["dataset"], latents.digest, context="train")
            records = train_encoder(
                encoder,
                latent_stream(latents, batch_size=section.batch_size, seed=section.seed),
                steps=section.steps,
                finetune_steps=section.finetune_steps,
                learning_rate=section.learning_rate,
                finetune_learning_rate=section.finetune_learning_rate,
                warmup_steps=section.warmup_steps,
                generator=torch.Generator().manual_seed(section.seed),
                classification_weight=section.classification_weight,
                classification_warmup_steps=section.classification_warmup_steps,
                mask_ratio=section.mask_ratio,
                ema_decay=section.ema_decay,
                weight_decay=section.weight_decay,
            )
            total = section.steps + section.finetune_steps
            for record in stage.progress(records, total=total, unit="step", description=f"encoder {args.encoder}"):
                tracker.metrics(record.values, record.images_seen)
        with atomic_folder(args.output) as folder:
            encoder.to(memory_format=torch.contiguous_format).save_pretrained(folder)
            describe_model(folder, "encoder", args.encoder, identity=identity)


if __name__ == "__main__":
    stage.run(main)
