"""`SampleQueue` against rings that are plain deques."""

from collections import Counter, deque

import pytest
import torch

from drift.errors import InputError
from drift.queue import SampleQueue, draw


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(start: int, num: int) -> torch.Tensor:
    """Samples ``[num, 1, 2]`` that are known again by their number."""
    return (start + torch.arange(num, dtype=torch.float32))[:, None, None].expand(num, 1, 2)


def queue_of(classes: int = 3, class_capacity: int = 5, global_capacity: int = 8) -> SampleQueue:
    return SampleQueue(classes, (1, 2), class_capacity=class_capacity, global_capacity=global_capacity)


def numbers(samples: torch.Tensor) -> list[int]:
    """The numbers of samples ``[..., 1, 2]``; both values of a sample must agree."""
    assert samples[..., 0, 0].equal(samples[..., 0, 1])
    return samples[..., 0, 0].flatten().int().tolist()


def fill(queue: SampleQueue, sizes: list[int], generator: torch.Generator) -> tuple[list[deque], deque]:
    """Push batches of these sizes with random labels into the queue and into deques."""
    by_class = [deque(maxlen=queue.by_class.shape[1]) for _ in range(len(queue.by_class))]
    overall = deque(maxlen=len(queue.overall))
    start = 0
    for size in sizes:
        labels = torch.randint(len(by_class), (size,), generator=generator)
        queue.push(numbered(start, size), labels)
        for number, label in enumerate(labels.tolist(), start):
            by_class[label].append(number)
            overall.append(number)
        start += size
    return by_class, overall


def test_after_random_pushes_the_queue_holds_what_the_deques_hold():
    random = seeded(1)
    queue = queue_of()
    by_class, overall = [deque(maxlen=5) for _ in range(3)], deque(maxlen=8)
    start = 0
    for size in torch.randint(0, 14, (60,), generator=random).tolist():
        labels = torch.randint(3, (size,), generator=random)
        queue.push(numbered(start, size), labels)
        for number, label in enumerate(labels.tolist(), start):
            by_class[label].append(number)
            overall.append(number)
        start += size
        assert queue.missing_classes() == [label for label in range(3) if not by_class[label]]
        for label, held in enumerate(by_class):
            if held:
                drawn = queue.sample_class(torch.tensor([label]), len(held), generator=random)
                assert sorted(numbers(drawn)) == sorted(held)
        if overall:
            assert sorted(numbers(queue.sample_any(1, len(overall), generator=random))) == sorted(overall)
    assert start > 100


def test_a_batch_larger_than_the_rings_leaves_its_newest_samples():
    queue = queue_of(classes=1, class_capacity=3, global_capacity=4)
    queue.push(numbered(0, 20), torch.zeros(20, dtype=torch.long))
    assert sorted(numbers(queue.sample_class(torch.tensor([0]), 3))) == [17, 18, 19]
    assert sorted(numbers(queue.sample_any(1, 4))) == [16, 17, 18, 19]


def test_draws_are_without_replacement_when_there_are_enough():
    queue = queue_of()
    by_class, overall = fill(queue, [9, 9, 9], seeded(1))
    labels = torch.tensor([2, 0, 2, 1])
    for seed in range(20):
        drawn = queue.sample_class(labels, 4, generator=seeded(seed))
        assert drawn.shape == (4, 4, 1, 2)
        for row, label in zip(drawn, labels.tolist(), strict=True):
            assert len(set(numbers(row))) == 4
            assert set(numbers(row)) <= set(by_class[label])
        for row in queue.sample_any(3, 7, generator=seeded(seed)):
            assert len(set(numbers(row))) == 7
            assert set(numbers(row)) <= set(overall)


def test_draws_are_with_replacement_when_there_are_too_few():
    queue = queue_of()
    queue.push(numbered(10, 2), torch.tensor([1, 1]))
    drawn = numbers(queue.sample_class(torch.tensor([1]), 200, generator=seeded()))
    assert len(drawn) == 200
    # Never an empty slot of the ring; each of the two about half of the time (six standard deviations).
    assert set(drawn) == {10, 11}
    assert abs(Counter(drawn)[10] - 100) < 6 * 200**0.5 / 2
    assert set(numbers(queue.sample_any(1, 200, generator=seeded()))) == {10, 11}


def test_every_sample_is_drawn_equally_often():
    draws = Counter(i for seed in range(400) for i in draw(6, 3, seeded(seed)).tolist())
    # 200 expected of each; six standard deviations of a binomial.
    assert sorted(draws) == list(range(6))
    assert all(abs(count - 200) < 60 for count in draws.values())


def test_rows_of_one_draw_are_drawn_on_their_own():
    queue = queue_of(classes=1, class_capacity=32, global_capacity=32)
    queue.push(numbered(0, 32), torch.zeros(32, dtype=torch.long))
    for drawn in (queue.sample_class(torch.tensor([0, 0]), 8), queue.sample_any(2, 8)):
        assert numbers(drawn[0]) != numbers(drawn[1])


def test_the_generator_fixes_the_draws():
    queue = queue_of()
    fill(queue, [20], seeded(1))
    labels = torch.tensor([0, 1, 2])
    assert queue.sample_class(labels, 3, generator=seeded(5)).equal(queue.sample_class(labels, 3, generator=seeded(5)))
    assert queue.sample_any(3, 3, generator=seeded(5)).equal(queue.sample_any(3, 3, generator=seeded(5)))


@pytest.mark.parametrize("label", [-1, 3])
def test_pushing_a_label_out_of_range_is_an_input_error_and_changes_nothing(label):
    queue = queue_of()
    before = queue.state_dict()
    with pytest.raises(InputError, match=f"label {label} is out of range.* 3 classes"):
        queue.push(numbered(0, 3), torch.tensor([0, label, 1]))
    assert all(value.equal(before[name]) for name, value in queue.state_dict().items())


@pytest.mark.parametrize("label", [-1, 3])
def test_drawing_a_label_out_of_range_is_an_input_error(label):
    queue = queue_of()
    fill(queue, [30], seeded(1))
    assert queue.missing_classes() == []
    with pytest.raises(InputError, match=str(label)):
        queue.sample_class(torch.tensor([label]), 2)


def test_drawing_from_nothing_is_an_input_error():
    queue = queue_of()
    with pytest.raises(InputError, match="the queue is empty"):
        queue.sample_any(1, 1)
    queue.push(numbered(0, 1), torch.tensor([0]))
    assert queue.missing_classes() == [1, 2]
    with pytest.raises(InputError, match="class 2 has no sample"):
        queue.sample_class(torch.tensor([0, 2]), 1)


def test_a_restored_queue_continues_as_the_saved_one():
    queue, restored = queue_of(), queue_of()
    fill(queue, [7, 4], seeded(1))
    state = queue.state_dict()
    restored.load_state_dict(state)
    for q in (queue, restored):
        q.push(numbered(100, 6), torch.tensor([0, 1, 2, 0, 0, 1]))
    assert all(restored.state_dict()[name].equal(value) for name, value in queue.state_dict().items())
    labels = torch.tensor([0, 1, 2])
    drawn = [q.sample_class(labels, 4, generator=seeded(3)) for q in (queue, restored)]
    assert drawn[0].equal(drawn[1])
    assert not state["by_class"].equal(queue.by_class), "a state must not follow later pushes"


def test_samples_are_kept_in_the_type_of_the_queue():
    queue = SampleQueue(1, (2,), class_capacity=2, global_capacity=2, dtype=torch.float16)
    queue.push(torch.tensor([[0.1, 1000.0]]), torch.tensor([0]))
    assert queue.sample_any(1, 1).dtype == torch.float16
    assert queue.sample_class(torch.tensor([0]), 1)[0, 0].equal(torch.tensor([0.1, 1000.0]).half())
