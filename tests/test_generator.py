"""The generator: the released forward pass, the named sizes, and its parts computed another way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from drift import GENERATORS, Generator
from drift.generator import rotary_embedding, rotate
from drift.official import load_generator

REFERENCE = Path(__file__).parent / "reference" / "generator"
TINY = {"input_size": 8, "width": 16, "depth": 2, "heads": 2, "num_classes": 3, "num_registers": 2, "num_styles": 2}


def inputs_of(model: Generator, num: int = 3) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    config = model.config
    return (
        torch.randn(num, config.in_channels, config.input_size, config.input_size, generator=random),
        torch.randint(config.num_classes, (num,), generator=random),
        1 + 3 * torch.rand(num, generator=random),
        torch.randint(config.style_codes, (num, config.num_styles), generator=random),
    )


def randomised(**options) -> Generator:
    """A tiny generator none of whose parameters is zero, so that its output depends on all of them."""
    model = Generator(**TINY | options).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return model


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return np.abs(actual.double().numpy() - expected).max() / np.abs(expected).max()


def test_the_released_generator_gives_its_condition_and_samples():
    model = load_generator(REFERENCE)
    with np.load(REFERENCE / "forward.npz") as file:
        want = dict(file)
    noise = torch.from_numpy(want["noise_nhwc"]).permute(0, 3, 1, 2)
    conditions = (
        torch.from_numpy(want["class_labels"]),
        torch.from_numpy(want["cfg_scale"]),
        torch.from_numpy(want["noise_labels"]),
    )
    with torch.no_grad():
        assert relative_error(model.condition(*conditions), want["cond"]) < 1e-5
        samples = model(noise, *conditions)
    assert not model.training
    assert relative_error(samples.permute(0, 2, 3, 1), want["samples_nhwc"]) < 1e-5


@pytest.mark.parametrize("options", [{}, {"in_channels": 3, "patch_size": 4}, {"num_registers": 0}])
def test_the_output_has_the_shape_of_the_noise_and_is_zero_at_initialisation(options):
    model = Generator(**TINY | options)
    inputs = inputs_of(model)
    output = model(*inputs)
    assert output.shape == inputs[0].shape
    assert output.abs().max() == 0
    output.sum().backward()
    assert model.unpatchify.bias.grad.abs().max() > 0
    assert randomised(**options)(*inputs).abs().max() > 0


@pytest.mark.parametrize("changed", range(4), ids=["noise", "class", "guidance", "style"])
def test_the_output_depends_on_every_input_of_its_own_sample_only(changed):
    model = randomised()
    inputs = list(inputs_of(model))
    with torch.no_grad():
        before = model(*inputs)
        inputs[changed] = inputs[changed].clone()
        inputs[changed][0] = (inputs[changed][0] + 1) % 3
        after = model(*inputs)
    assert (after[0] - before[0]).abs().max() > 1e-4
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "millions"), [("B/2", 133), ("L/2", 463), ("B/16", 134), ("L/16", 464)])
def test_the_named_sizes_have_the_paper_s_parameter_counts(name, millions):
    with torch.device("meta"):
        model = Generator(**GENERATORS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_saving_and_loading_gives_the_same_bits_from_safetensors_alone(tmp_path):
    model = randomised()
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = Generator.from_pretrained(tmp_path, use_safetensors=True)
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert list(state) == list(loaded_state)
    assert all(loaded_state[name].equal(value) for name, value in state.items())
    assert {k: loaded.config[k] for k in TINY} == TINY
    inputs = inputs_of(model)
    with torch.no_grad():
        assert loaded(*inputs).equal(model(*inputs))


def test_patches_are_read_in_rows_their_elements_in_row_column_channel_order():
    model = Generator(**TINY | {"in_channels": 3, "patch_size": 4})
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    patches = model._to_patches(x)
    expected = np.empty((2, 4, 48), np.float32)
    for b, row, column, i, j, c in np.ndindex(2, 2, 2, 4, 4, 3):
        expected[b, 2 * row + column, (4 * i + j) * 3 + c] = x[b, c, 4 * row + i, 4 * column + j]
    assert (patches.numpy() == expected).all()
    assert model._to_image(patches).equal(x)


def test_the_rotary_embedding_is_a_rotation_of_complex_numbers():
    x = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, *rotary_embedding(7, 10, torch.device("cpu")))
    pairs = x.double().numpy()
    z = pairs[..., :5] + 1j * pairs[..., 5:]
    turn = np.exp(1j * np.arange(7)[:, None] * 10000.0 ** (-np.arange(5) / 5))
    expected = np.concatenate([(z * turn).real, (z * turn).imag], -1)
    np.testing.assert_allclose(rotated.numpy(), expected, rtol=0, atol=1e-5)
    assert rotated[:, :, 0].equal(x[:, :, 0])


def test_rotated_products_depend_on_the_distance_of_positions_only():
    q, k = torch.randn(2, 10, generator=torch.Generator().manual_seed(0)).double()
    cos, sin = rotary_embedding(9, 10, torch.device("cpu"))
    rows = [rotate(v.expand(9, 10), cos.double(), sin.double()) for v in (q, k)]
    products = rows[0] @ rows[1].T
    for offset in range(-8, 9):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert products[0].std() > 0.1


def test_the_embedding_of_alpha_has_cosines_first_and_unit_root_mean_square():
    embedding = randomised().guidance_embedding
    torch.nn.init.ones_(embedding.norm.weight)
    alpha = torch.tensor([1.0, 2.5])
    angles = alpha.double().numpy()[:, None] * 10000.0 ** (-np.arange(128) / 128)
    sinusoids = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    (w1, b1), (w2, b2) = (
        (m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in embedding.mlp[::2]
    )
    hidden = sinusoids @ w1.T + b1
    output = hidden / (1 + np.exp(-hidden)) @ w2.T + b2
    expected = output / np.sqrt((output**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(embedding(alpha).detach().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("options", "gain"), [({}, 0.02), ({"guidance_gain": 0.5}, 0.5)], ids=["paper", "other-gain"])
def test_without_styles_the_condition_is_class_and_guidance(options, gain):
    model = randomised(num_styles=0, **options)
    noise, labels, alpha, styles = inputs_of(model)
    assert styles.shape == (3, 0)
    with torch.no_grad():
        expected = model.class_embedding.weight[labels] + gain * model.guidance_embedding(alpha)
        torch.testing.assert_close(model.condition(labels, alpha, styles), expected)
        assert model(noise, labels, alpha, styles).shape == noise.shape


@pytest.mark.parametrize("num_styles", [1, 3])
def test_another_number_of_styles_is_refused(num_styles):
    model = Generator(**TINY)
    noise, labels, alpha, _ = inputs_of(model)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        model(noise, labels, alpha, torch.zeros(3, num_styles, dtype=torch.long))


@pytest.mark.parametrize("width", [15, 18, 6])
def test_a_width_that_does_not_divide_into_heads_of_even_width_is_refused(width):
    with pytest.raises(ValueError, match=f"width {width} must divide into 4 heads of even width"):
        Generator(**TINY | {"width": width, "heads": 4})


@pytest.mark.parametrize("patch_size", [3, 16])
def test_a_patch_that_does_not_divide_the_input_is_refused(patch_size):
    with pytest.raises(ValueError, match=f"input_size 8 is not a multiple of patch_size {patch_size}"):
        Generator(**TINY | {"patch_size": patch_size})
