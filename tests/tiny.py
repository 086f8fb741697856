"""Settings for a whole run in seconds: the same stages, smaller.

``python -m tests.tiny params.yaml`` rewrites a file.
"""

import sys
from pathlib import Path

import yaml

TINY = {
    "tokenizers.digits-vae": {"block_out_channels": [8, 8, 8], "steps": 6, "batch_size": 16},
    "encoders.digits-mae": {"width": 8, "depths": [1, 1, 1, 1], "steps": 4, "finetune_steps": 2, "batch_size": 16},
    "judges.digits-cnn": {"width": 8, "feature_size": 8, "steps": 6},
    "experiments.digits.generator": {"width": 16, "depth": 1, "heads": 2, "num_registers": 1, "num_styles": 2},
    "experiments.digits.train": {
        "steps": 8,
        "labels": 4,
        "generated": 4,
        "positives": 4,
        "unconditional": 2,
        "warmup_steps": 2,
        "checkpoint_every": 2,
        "grid_every": 4,
        "log_every": 1,
    },
    "experiments.digits.sample": {"num_images": 60},
    "experiments.digits.evaluate": {"draws": 2, "sweep": [1.0, 2.0], "sweep_images": 60, "latency_repeats": 2},
}


def tiny(content: dict, overrides: dict[str, dict] = TINY) -> dict:
    """`content` with the overrides written into its sections."""
    for key, values in overrides.items():
        section = content
        for part in key.split("."):
            section = section[part]
        section.update(values)
    return content


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(yaml.safe_dump(tiny(yaml.safe_load(path.read_text())), sort_keys=False))
