"""Drift training (Section 3, Appendix A.6-A.8): one step, and the loop that yields a record of each.

Every random draw comes from a generator seeded by (seed, step, process): a resumed run continues exactly, and no random
state has to be saved. Shape suffixes: L labels, G generated per label, P positives, N unconditional negatives.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from drift.data.latents import sample_latents
from drift.encoders import Encoder
from drift.errors import InputError
from drift.generator import Generator
from drift.guidance import sample_guidance_scale
from drift.loss import DriftLoss, global_mean, sum_over_features
from drift.objective import Objective, norms_by_group, norms_by_temperature
from drift.queue import SampleQueue

#: The learning rate at the first step of the warm-up.
WARMUP_START = 1e-6


@dataclass(frozen=True)
class Step:
    """One training step. Norms are root-free: mean squared un-normalised drifts (Eq. 25)."""

    step: int
    images_seen: int
    loss: float
    drift_norms: dict[float, float]
    group_norms: dict[str, float]
    grad_norm: float
    learning_rate: float
    images_per_second: float
    data_wait: float


@dataclass
class DriftTrainer:
    """Trains a generator by drifting its samples in the encoder's feature space.

    Args:
        generator, encoder: the encoder is frozen.
        batches: endless ``(moments, labels)`` of real samples, as `latent_stream` gives them; each step pushes one
            batch to the queues. Its ``position`` must be 0, or that of the checkpoint that `load` will read.
        objective: sizes and densities of a step.
        num_classes: classes of the data.
        learning_rate, warmup_steps, weight_decay, betas, max_grad_norm: AdamW, constant after a linear warm-up.
        steps, decay_steps: the rate falls linearly to 0 over the last `decay_steps` of `steps`; 0 in the paper.
        ema_decay: constant decay of the EMA weights.
        queue_class_capacity, queue_global_capacity: `drift.queue`.
        accelerator: device, precision and processes.

    Raises InputError at a NaN or infinite loss, naming the step and the feature sets.
    """

    generator: Generator
    encoder: Encoder
    batches: Iterable[tuple[np.ndarray, np.ndarray]]
    objective: Objective
    num_classes: int
    learning_rate: float = 2e-4
    warmup_steps: int = 5000
    steps: int = 30000
    decay_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 2.0
    ema_decay: float = 0.999
    queue_class_capacity: int = 128
    queue_global_capacity: int = 1000
    seed: int = 0
    accelerator: Accelerator = field(default_factory=Accelerator)

    def __post_init__(self):
        config = self.generator.config
        self._sample_shape = (config.in_channels, config.input_size, config.input_size)
        self._num_styles, self._style_codes = config.num_styles, config.style_codes
        self.step = 0
        device = self.accelerator.device
        if isinstance(self.encoder, nn.Module):
            self.encoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.generator.to(device).train()
        optimizer = torch.optim.AdamW(
            self.generator.parameters(),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            foreach=True,
        )
        self.ema = EMAModel(self.generator.parameters(), decay=self.ema_decay, min_decay=self.ema_decay, foreach=True)
        self.queue = SampleQueue(
            self.num_classes,
            self._sample_shape,
            class_capacity=self.queue_class_capacity,
            global_capacity=self.queue_global_capacity,
            device=device,
        )
        # Not prepared: Accelerate would step it once per process, and a step here is one step whatever their number.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: self._rate(done))
        self.model, self.optimizer = self.accelerator.prepare(self.generator, optimizer)
        self.accelerator.register_for_checkpointing(self.ema, self.queue, self.scheduler, self)
        self._batches: Iterator[tuple[np.ndarray, np.ndarray]] | None = None

    def run(self, steps: int | None = None) -> Iterator[Step]:
        """Train until step number `steps` (by default to the end), yielding each step's record after its update."""
        while self.step < (self.steps if steps is None else steps):
            yield self._train_step()

    def _rate(self, done: int) -> float:
        """Factor of the learning rate after `done` steps: linear warm-up from 1e-6, constant, linear decay to 0."""
        start = min(WARMUP_START / self.learning_rate, 1.0)
        warm = min(done / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        left = min((self.steps - done) / self.decay_steps, 1.0) if self.decay_steps else 1.0
        return (start + (1 - start) * warm) * max(left, 0.0)

    # --- One step -----------------------------------------------------------------------------------------------

    def _train_step(self) -> Step:
        started = time.perf_counter()
        random = self._random(self.step + 1)
        newest_labels = self._refill(random)
        waited = time.perf_counter() - started

        goal = self.objective
        labels_L = newest_labels[torch.randperm(len(newest_labels), generator=random)[: goal.labels]]
        alpha_L = sample_guidance_scale(
            len(labels_L),
            power=goal.guidance_power,
            low=goal.guidance_range[0],
            high=goal.guidance_range[1],
            unguided_fraction=goal.unguided_fraction,
            generator=random,
        )
        positives = self.queue.sample_class(labels_L, goal.positives, generator=random)
        negatives = self.queue.sample_any(len(labels_L), goal.unconditional, generator=random)
        generated = self._generate(labels_L, alpha_L, random)
        losses = self._losses(generated, positives, negatives, alpha_L)
        loss = sum_over_features(losses)
        self._require_finite(loss, losses)

        self.accelerator.backward(loss)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.generator.parameters())
        self.step += 1
        images = len(labels_L) * goal.generated * self.accelerator.num_processes
        # Reading the values waits for the device, so the time is taken after them.
        measured = {
            "loss": float(global_mean(loss.detach())),
            "drift_norms": norms_by_temperature(losses),
            "group_norms": norms_by_group(losses),
            "grad_norm": float(grad_norm),
        }
        seconds = time.perf_counter() - started
        return Step(
            step=self.step,
            images_seen=images * self.step,
            **measured,
            learning_rate=learning_rate,
            images_per_second=images / seconds,
            data_wait=waited / seconds,
        )

    def _refill(self, random: torch.Generator) -> Tensor:
        """Push the newest batch to the queues and return its labels (A.8); fill them before the first step."""
        if self._batches is None:
            self._batches = iter(self.batches)
        if self.step == 0:
            self._fill(random)
        return self._push(random)

    def _fill(self, random: torch.Generator) -> None:
        """Fill the queues before the first step, so that its draws are as varied as any later one's."""
        capacity = max(self.num_classes * self.queue_class_capacity, self.queue_global_capacity)
        pushes = 0
        while self.queue.pushed_overall < capacity or self.queue.missing_classes():
            self._push(random)
            pushes += 1
            if pushes > capacity:
                missing = self.queue.missing_classes()
                raise InputError(f"no sample of class {missing[0]} in the first {pushes} batches of training data")

    def _push(self, random: torch.Generator) -> Tensor:
        moments, labels = next(self._batches)
        labels = torch.from_numpy(labels)
        self.queue.push(sample_latents(torch.from_numpy(moments), random), labels)
        return labels

    def _generate(self, labels_L: Tensor, alpha_L: Tensor, random: torch.Generator) -> Tensor:
        """``[L G, C, H, W]``: `generated` samples of each label from fresh noise and styles."""
        G = self.objective.generated
        rows = len(labels_L) * G
        noise = torch.randn(rows, *self._sample_shape, generator=random)
        styles = torch.randint(self._style_codes, (rows, self._num_styles), generator=random)
        inputs = (noise, labels_L.repeat_interleave(G), alpha_L.repeat_interleave(G), styles)
        return self.model(*(value.to(self.accelerator.device) for value in inputs))

    def _losses(
        self, generated: Tensor, positives_LP: Tensor, negatives_LN: Tensor, alpha_L: Tensor
    ) -> dict[str, DriftLoss]:
        """Encode real samples without a graph and generated ones with it; one drifting loss per vector set."""
        with torch.no_grad(), self.accelerator.autocast():
            real = self.encoder.features(torch.cat([positives_LP.flatten(0, 1), negatives_LN.flatten(0, 1)]))
        with self.accelerator.autocast():
            fake = self.encoder.features(generated)
        return self.objective.losses(fake, real, alpha_L)

    def _require_finite(self, loss: Tensor, losses: Mapping[str, DriftLoss]) -> None:
        if math.isfinite(float(global_mean(loss.detach()))):
            return
        broken = [name for name, value in losses.items() if not torch.isfinite(value.loss).all()]
        where = ", ".join(broken[:5]) or "of another process"
        raise InputError(
            f"loss is not finite at step {self.step + 1} in the feature sets {where}; stopped before the update: "
            f"lower the learning rate ({self.learning_rate}) or check the encoder"
        )

    def _random(self, step: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.seed, step, self.accelerator.process_index]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(seed[0]) << 31 | int(seed[1]))

    # --- What a checkpoint holds beside weights and optimizer -----------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Step and position in the data; Accelerate saves it with weights, EMA, optimizer, schedule and queues."""
        return {"step": self.step, "position": self.batches.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.ema.to(self.accelerator.device)  # Accelerate loads it on the CPU
        self.step = state["step"]
        self.batches.position = state["position"]
        self._batches = None
