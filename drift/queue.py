"""Queues of real samples (Appendix A.8): per class and global rings from which positives and negatives are drawn."""

import torch
from torch import Tensor

from drift.errors import InputError


class SampleQueue:
    """One ring of the newest samples per class and one global ring, on one device.

    Args:
        num_classes: rings of `class_capacity` samples each.
        sample_shape: shape of one sample, e.g. ``(4, 32, 32)``.
        class_capacity: samples kept per class (128 in the paper).
        global_capacity: samples kept of any class, for the unconditional negatives (1000 in the paper).
    """

    def __init__(
        self,
        num_classes: int,
        sample_shape: tuple[int, ...],
        *,
        class_capacity: int = 128,
        global_capacity: int = 1000,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        options = {"device": device, "dtype": dtype}
        self.by_class = torch.zeros(num_classes, class_capacity, *sample_shape, **options)
        self.overall = torch.zeros(global_capacity, *sample_shape, **options)
        # Samples ever pushed; the next one goes to this count modulo the capacity.
        self.pushed = torch.zeros(num_classes, dtype=torch.long)
        self.pushed_overall = torch.zeros((), dtype=torch.long)

    def push(self, samples: Tensor, labels: Tensor) -> None:
        """Add samples ``[B, ...]`` of classes ``labels [B]``; the oldest of each ring give way.

        Raises InputError for a label outside [0, num_classes).
        """
        labels = self._checked(labels)
        class_capacity = self.by_class.shape[1]
        samples = samples.to(self.overall)
        for label in labels.unique().tolist():
            # Of one batch only the newest samples that fit survive; indices within one write stay distinct.
            fresh = samples[labels.to(samples.device) == label][-class_capacity:]
            self.by_class[label, self._slots(self.pushed[label], len(fresh), class_capacity)] = fresh
            self.pushed[label] += len(fresh)
        fresh = samples[-len(self.overall) :]
        self.overall[self._slots(self.pushed_overall, len(fresh), len(self.overall))] = fresh
        self.pushed_overall += len(fresh)

    def sample_class(self, labels: Tensor, num: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``[len(labels), num, ...]`` samples, row i of class ``labels[i]``.

        Without replacement where the class has enough, else with it. Raises InputError for an empty class.
        """
        capacity = self.by_class.shape[1]
        labels = self._checked(labels)
        rows = []
        for label in labels.tolist():
            available = min(int(self.pushed[label]), capacity)
            if not available:
                raise InputError(f"class {label} has no sample in the queue")
            rows.append(draw(available, num, generator))
        index = torch.stack(rows).to(self.by_class.device)
        return self.by_class[labels.to(index.device)[:, None], index]

    def sample_any(self, rows: int, num: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``[rows, num, ...]`` samples of any class, each row on its own; raises InputError if there are none."""
        available = min(int(self.pushed_overall), len(self.overall))
        if not available:
            raise InputError("the queue is empty")
        index = torch.stack([draw(available, num, generator) for _ in range(rows)])
        return self.overall[index.to(self.overall.device)]

    def missing_classes(self) -> list[int]:
        """Classes of which no sample has been pushed yet."""
        return (self.pushed == 0).nonzero().flatten().tolist()

    def state_dict(self) -> dict[str, Tensor]:
        return {k: getattr(self, k).clone() for k in ("by_class", "overall", "pushed", "pushed_overall")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)

    def _checked(self, labels: Tensor) -> Tensor:
        num_classes = len(self.by_class)
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            raise InputError(f"label {wrong[0]} is out of range: there are {num_classes} classes, from 0")
        return labels.cpu()

    def _slots(self, start: Tensor, num: int, capacity: int) -> Tensor:
        return ((start + torch.arange(num)) % capacity).to(self.overall.device)


def draw(available: int, num: int, generator: torch.Generator | None = None) -> Tensor:
    """`num` indices below `available`: distinct if there are enough, with replacement otherwise."""
    if available >= num:
        return torch.randperm(available, generator=generator)[:num]
    return torch.randint(available, (num,), generator=generator)
