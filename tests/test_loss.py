"""`drift_loss`: the released numbers, steps 1-6 of Appendix A.6 in float64, and the contracts around them."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import drift.loss
from drift import drift_loss
from drift.loss import sum_over_features

REFERENCE = Path(__file__).parent / "reference" / "drift_loss.npz"
CASES = ("plain", "cfg", "one_dim_wide", "single_pos")
TAUS = (0.02, 0.05, 0.2)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_loss(
    generated,
    positives,
    negatives=None,
    weights=None,
    *,
    temperatures=TAUS,
    kernel="laplacian",
    normalization="both",
    positive_weight=1.0,
    negative_weight=1.0,
):
    """Loss ``[B]``, scale, norms, total drift ``[B, G, C]`` and scale' in float64, as in A.6."""
    gen, pos = np.float64(generated), np.float64(positives)
    B, G, C = gen.shape
    neg = np.zeros((B, 0, C)) if negatives is None else np.float64(negatives)
    N = neg.shape[1]
    w = np.ones((B, G + N + pos.shape[1]))
    if weights is not None:
        w[:, G : G + N] = np.float64(weights)
    targets = np.concatenate([gen, neg, pos], 1)
    distance = np.sqrt(np.maximum(((gen[:, :, None] - targets[:, None]) ** 2).sum(-1), 1e-8))
    scale = (distance * w[:, None]).mean() / w.mean()
    coordinate_scale = max(scale / np.sqrt(C), 1e-3)
    x, y, d = gen / coordinate_scale, targets / coordinate_scale, distance / max(scale, 1e-3)
    for g in range(G):
        d[:, g, g] += 100
    norms, total = {}, np.zeros_like(gen)
    for tau in temperatures:
        logits = -(d if kernel == "laplacian" else d**2) / tau
        if normalization == "both":
            A = np.sqrt(np.maximum(softmax(logits, 2) * softmax(logits, 1), 1e-6))
        else:
            A = softmax(logits, 2) if normalization == "targets" else np.exp(logits)
        A = A * w[:, None]
        A_neg, A_pos = A[..., : G + N], A[..., G + N :]
        push = -negative_weight * A_neg * A_pos.sum(-1, keepdims=True)
        pull = positive_weight * A_pos * A_neg.sum(-1, keepdims=True)
        R = np.concatenate([push, pull], -1)
        V = np.einsum("bgm,bmc->bgc", R, y) - R.sum(-1)[..., None] * x
        norms[tau] = (V**2).mean()
        total += V / np.sqrt(max(norms[tau], 1e-8))
    return (total**2).mean((1, 2)), scale, norms, total, coordinate_scale


def softmax(logits, axis):
    exponentials = np.exp(logits - logits.max(axis, keepdims=True))
    return exponentials / exponentials.sum(axis, keepdims=True)


def assert_close(actual: torch.Tensor, expected, *, rtol: float = 1e-5) -> None:
    """Closeness relative to the largest of the expected values."""
    expected = np.asarray(expected)
    atol = rtol * np.abs(expected).max()
    assert atol > 0
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=0, atol=atol)


def random_inputs(B=3, G=5, P=4, N=2, C=6) -> dict[str, torch.Tensor]:
    weights = torch.rand(B, N, generator=torch.Generator().manual_seed(9)) * 3
    weights[0, 0] = 0.0
    return {
        "generated": 2 * randn(B, G, C, seed=1),
        "positives": 2 * randn(B, P, C, seed=2) + 0.5,
        "negatives": 2 * randn(B, N, C, seed=3),
        "negative_weights": weights,
    }


@pytest.mark.parametrize("case", CASES)
def test_loss_scale_norms_and_gradient_are_the_released_ones(case):
    with np.load(REFERENCE) as file:
        want = {name.split("/")[1]: file[name] for name in file.files if name.startswith(f"{case}/")}
    tensors = {name: torch.from_numpy(value) for name, value in want.items()}
    generated = tensors["gen"].requires_grad_()
    result = drift_loss(
        generated, tensors["pos"], tensors.get("neg"), negative_weights=tensors.get("weight_neg"), temperatures=TAUS
    )
    result.loss.mean().backward()
    assert_close(result.loss, want["loss"])
    assert_close(result.scale, want["scale"])
    assert list(result.drift_norms) == list(TAUS)
    for tau, norm in result.drift_norms.items():
        assert_close(norm, want[f"loss_{tau}"])
    assert_close(generated.grad, want["grad_of_mean_loss"])


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"C": 1},
        {"P": 1},
        {"B": 1, "G": 2, "P": 9, "N": 4, "C": 33},
        {"B": 4, "G": 8, "P": 2, "N": 5, "C": 3},
    ],
    ids=["G!=P!=N", "C=1", "P=1", "few-generated", "many-generated"],
)
@pytest.mark.parametrize("sets", ["positives", "unweighted-negatives", "weighted-negatives"])
def test_the_loss_is_appendix_a6_in_float64(shape, sets):
    inputs = random_inputs(**shape)
    if sets != "weighted-negatives":
        del inputs["negative_weights"]
    if sets == "positives":
        del inputs["negatives"]
    inputs["generated"].requires_grad_()
    result = drift_loss(**inputs)
    loss, scale, norms, total, coordinate_scale = numpy_loss(*(t.detach() for t in inputs.values()))
    # The mean includes distances of samples to themselves, known only to the root of the rounding of their squares.
    assert_close(result.scale, scale, rtol=1e-4)
    assert_close(result.loss, loss, rtol=1e-4)
    for tau in TAUS:
        assert_close(result.drift_norms[tau], norms[tau], rtol=1e-4)
    (gradient,) = torch.autograd.grad(result.loss.sum(), inputs["generated"])
    assert_close(gradient, -2 * total / (total[0].size * coordinate_scale), rtol=1e-4)


def test_the_gradient_is_that_of_the_explicit_stop_gradient_formula():
    inputs = random_inputs()
    generated = inputs["generated"].requires_grad_()
    _, _, _, total, coordinate_scale = numpy_loss(*(t.detach() for t in inputs.values()))
    upstream = torch.tensor([0.3, -1.0, 2.0])
    explicit = generated.detach().double().requires_grad_()
    scaled = explicit / coordinate_scale
    ((scaled - (scaled + torch.from_numpy(total)).detach()) ** 2).mean((1, 2)).backward(upstream.double())
    drift_loss(**inputs).loss.backward(upstream)
    assert_close(generated.grad, explicit.grad, rtol=1e-4)


def test_gradients_flow_to_the_generated_features_only():
    inputs = {name: tensor.requires_grad_() for name, tensor in random_inputs().items()}
    result = drift_loss(**inputs)
    result.loss.mean().backward()
    assert inputs["generated"].grad.abs().max() > 0
    assert all(inputs[name].grad is None for name in ("positives", "negatives", "negative_weights"))
    assert not result.scale.requires_grad
    assert not any(norm.requires_grad for norm in result.drift_norms.values())


def test_the_inputs_are_left_as_they_were():
    inputs = random_inputs()
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    drift_loss(**inputs)
    assert all(inputs[name].equal(before[name]) for name in inputs)


@pytest.mark.parametrize("elements", [1, 150])
def test_the_result_does_not_depend_on_the_chunks(monkeypatch, elements):
    inputs = random_inputs(B=5)
    inputs["generated"].requires_grad_()
    whole = drift_loss(**inputs)
    monkeypatch.setattr(drift.loss, "CHUNK_ELEMENTS", elements)
    # 5 x 11 affinities each: one entry at a time, and two with one left over.
    assert len(drift.loss._chunks(torch.empty(5, 5, 11))) == {1: 5, 150: 3}[elements]
    parts = drift_loss(**inputs)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.scale, whole.scale, rtol=0, atol=0)
    for tau in TAUS:
        torch.testing.assert_close(parts.drift_norms[tau], whole.drift_norms[tau], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(result.loss.mean(), inputs["generated"])[0] for result in (parts, whole)]
    assert_close(gradients[0], gradients[1], rtol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_inputs_give_bf16_gradients_of_a_loss_computed_in_float32(autocast):
    inputs = {name: tensor.bfloat16() for name, tensor in random_inputs().items()}
    generated = inputs["generated"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = drift_loss(**inputs)
    result.loss.mean().backward()
    loss, scale, _, total, coordinate_scale = numpy_loss(*(t.detach().float() for t in inputs.values()))
    assert result.loss.dtype == result.scale.dtype == torch.float32
    assert_close(result.loss, loss, rtol=1e-4)
    assert_close(result.scale, scale, rtol=1e-4)
    assert generated.grad.dtype == torch.bfloat16
    assert_close(generated.grad, -2 * total / (total.size * coordinate_scale), rtol=2**-8)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "gaussian"},
        {"normalization": "targets"},
        # Without normalisation only temperatures near the distances leave a drift that float32 can hold.
        {"normalization": "none", "temperatures": (0.2, 0.5)},
        {"positive_weight": 2.0},
        {"negative_weight": 1.5},
        {"negative_weight": 0.0},
        {"temperatures": (0.05,)},
        {"temperatures": (0.5, 0.1)},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_each_ablation_changes_the_loss_as_the_equations_say(options):
    inputs = random_inputs()
    inputs["generated"].requires_grad_()
    result = drift_loss(**inputs, **options)
    loss, _, norms, total, coordinate_scale = numpy_loss(*(t.detach() for t in inputs.values()), **options)
    assert_close(result.loss, loss, rtol=1e-4)
    assert list(result.drift_norms) == list(norms)
    for tau, norm in norms.items():
        assert_close(result.drift_norms[tau], norm, rtol=1e-4)
    (gradient,) = torch.autograd.grad(result.loss.mean(), inputs["generated"])
    assert_close(gradient, -2 * total / (total.size * coordinate_scale), rtol=1e-4)
    # The method itself, at the same temperatures where another knob is turned too.
    method = {"temperatures": options["temperatures"]} if len(options) > 1 else {}
    (usual,) = torch.autograd.grad(drift_loss(**inputs, **method).loss.mean(), inputs["generated"])
    assert (gradient - usual).abs().max() > 1e-2 * usual.abs().max()


def test_equal_weights_of_attraction_and_repulsion_scale_the_norms_and_leave_the_loss():
    inputs = random_inputs()
    usual, doubled = drift_loss(**inputs), drift_loss(**inputs, positive_weight=2.0, negative_weight=2.0)
    torch.testing.assert_close(doubled.loss, usual.loss, rtol=1e-5, atol=0)
    for tau in TAUS:
        torch.testing.assert_close(doubled.drift_norms[tau], 4 * usual.drift_norms[tau], rtol=1e-5, atol=0)


def test_the_loss_does_not_depend_on_the_units_or_the_origin_of_the_features():
    inputs = random_inputs()
    usual = drift_loss(**inputs)
    moved = {n: t if n == "negative_weights" else 8.0 * t + 512.0 for n, t in inputs.items()}
    result = drift_loss(**moved)
    torch.testing.assert_close(result.loss, usual.loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(result.scale, 8.0 * usual.scale, rtol=1e-5, atol=0)


def test_features_that_are_all_alike_give_a_finite_loss_and_gradient():
    generated = torch.ones(2, 3, 4, requires_grad=True)
    result = drift_loss(generated, torch.ones(2, 5, 4))
    result.loss.mean().backward()
    assert result.loss.abs().max() == 0
    assert generated.grad.abs().max() == 0


def test_the_objective_is_the_sum_over_features_of_the_mean_over_their_batch():
    a, b = drift_loss(**random_inputs()), drift_loss(**random_inputs(B=7, C=2))
    expected = a.loss.double().numpy().mean() + b.loss.double().numpy().mean()
    assert_close(sum_over_features({"a": a, "b": b}), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        ("positives", torch.zeros(2, 4, 6)),
        ("positives", torch.zeros(3, 4, 5)),
        ("positives", torch.zeros(4, 6)),
        ("negatives", torch.zeros(3, 2, 7)),
        ("negatives", torch.zeros(1, 2, 6)),
        ("negative_weights", torch.zeros(3, 3)),
        ("negative_weights", torch.zeros(3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(wrong, value):
    with pytest.raises(ValueError, match=wrong):
        drift_loss(**random_inputs() | {wrong: value})


def test_weights_without_negatives_are_refused():
    inputs = random_inputs()
    del inputs["negatives"]
    with pytest.raises(ValueError, match="without negatives"):
        drift_loss(**inputs)


def one_step(rows: slice) -> dict[str, torch.Tensor]:
    """Loss of these rows of a batch, generated by one shared matrix, and the gradient of the matrix."""
    inputs = {name: tensor[rows] for name, tensor in random_inputs(B=4).items()}
    matrix = randn(6, 6, seed=7).requires_grad_()
    result = drift_loss(**inputs | {"generated": inputs["generated"] @ matrix})
    result.loss.mean().backward()
    norms = torch.stack(list(result.drift_norms.values()))
    return {"loss": result.loss.detach(), "scale": result.scale, "norms": norms, "gradient": matrix.grad}


def half_of_the_batch(rank: int, folder: str) -> None:
    timeout = timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    try:
        step = one_step(slice(2 * rank, 2 * rank + 2))
        dist.all_reduce(step["gradient"])
        step["gradient"] /= 2
        torch.save(step, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_with_half_of_the_batch_each_are_one_with_all_of_it(tmp_path):
    whole = one_step(slice(None))
    alone = one_step(slice(0, 2))
    # This process is rank 1: starting one more is half of the cost of starting two.
    other = mp.spawn(half_of_the_batch, (str(tmp_path),), nprocs=1, join=False)
    half_of_the_batch(1, str(tmp_path))
    other.join()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        for name in ("scale", "norms", "gradient"):
            assert_close(rank[name], whole[name], rtol=1e-5)
    assert_close(torch.cat([rank["loss"] for rank in ranks]), whole["loss"], rtol=1e-5)
    assert (alone["scale"] - whole["scale"]).abs() > 1e-3 * whole["scale"]
