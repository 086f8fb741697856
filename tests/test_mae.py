"""The ResNet masked autoencoder: the released activations, its masks, its losses, pixel inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from drift.encoders import Encoder, ResNetMAE, load_encoder
from drift.encoders.mae import group_norm
from drift.errors import InputError
from drift.official import load_mae

REFERENCE = Path(__file__).parent / "reference" / "mae"


@pytest.fixture(scope="module")
def released() -> ResNetMAE:
    return load_mae(REFERENCE)


@pytest.fixture(scope="module")
def want() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "activations.npz") as file:
        return dict(file)


def tiny(**options) -> ResNetMAE:
    torch.manual_seed(0)
    return ResNetMAE(**{"in_channels": 4, "width": 4, "depths": (1, 1, 1, 1), "num_classes": 5} | options).eval()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return np.abs(actual.detach().double().numpy() - expected).max() / np.abs(expected).max()


def test_every_feature_set_is_the_released_one(released, want):
    features = released.features(nchw(want["input_nhwc"]))
    expected = {name.removeprefix("act/"): value for name, value in want.items() if name.startswith("act/")}
    assert set(features) == set(expected) | {"global"}
    errors = {name: relative_error(features[name], value) for name, value in expected.items()}
    assert max(errors.values()) < 1e-5, errors
    assert relative_error(features["global"], want["input_nhwc"].reshape(3, 1, -1)) == 0


def test_the_reconstruction_and_the_logits_are_the_released_ones(released, want):
    x = nchw(want["input_nhwc"])
    assert relative_error(released.reconstruct(x).permute(0, 2, 3, 1), want["recon_patched_nhwc"]) < 1e-5
    assert relative_error(released.classify(x), want["logits"]) < 1e-5
    reconstruction, logits = released.reconstruct_and_classify(x)
    assert reconstruction.equal(released.reconstruct(x))
    assert logits.equal(released.classify(x))


def test_gradients_flow_through_every_feature_set_and_are_finite():
    x = randn(2, 4, 16, 16).requires_grad_()
    features = tiny().features(x)
    assert [name for name, feature in features.items() if feature.grad_fn is None] == []
    sum((feature**3).sum() for feature in features.values()).backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()


def test_masks_hide_2_by_2_blocks_of_all_channels_with_the_given_ratio():
    model, x = tiny(), torch.zeros(500, 4, 8, 12)
    for ratio in (0.5, 0.2):
        mask = model.random_mask(x, ratio=ratio, generator=torch.Generator().manual_seed(0))
        assert mask.shape == (500, 1, 8, 12)
        assert mask.unique().tolist() == [0.0, 1.0]
        corners = mask[:, :, ::2, ::2]
        for i, j in ((0, 1), (1, 0), (1, 1)):
            assert mask[:, :, i::2, j::2].equal(corners)
        # Five standard deviations of 500 x 24 independent blocks.
        assert abs(corners.mean() - ratio) < 5 * (ratio * (1 - ratio) / (500 * 24)) ** 0.5
        blocks = corners.flatten(1).double()
        correlation = torch.corrcoef(blocks.T) - torch.eye(24)
        assert correlation.abs().max() < 5 / 500**0.5


def test_the_default_mask_hides_half():
    mask = tiny().random_mask(torch.zeros(200, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    assert abs(mask.mean() - 0.5) < 5 * 0.5 / (200 * 64) ** 0.5


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_masks_of_nothing_and_of_everything(ratio):
    assert (tiny().random_mask(torch.zeros(20, 4, 8, 8), ratio=ratio) == ratio).all()


def test_masks_cut_blocks_at_odd_borders_and_follow_the_folded_size():
    mask = tiny().random_mask(torch.zeros(50, 4, 5, 7))
    assert mask.shape == (50, 1, 5, 7)
    assert mask[:, :, 0:4:2, 0:6:2].equal(mask[:, :, 1::2, 1::2])
    folded = tiny(in_channels=3, input_patch_size=4, mask_patch=3).random_mask(torch.zeros(50, 3, 24, 48))
    assert folded.shape == (50, 1, 6, 12)
    assert folded[:, :, 0, 0].equal(folded[:, :, 2, 2])


def test_hidden_locations_do_not_reach_the_reconstruction():
    model, x = tiny(), randn(2, 4, 8, 8)
    mask = model.random_mask(x, generator=torch.Generator().manual_seed(0))
    other = x + mask * randn(2, 4, 8, 8, seed=1)
    seen = x + (1 - mask) * randn(2, 4, 8, 8, seed=1)
    assert 0 < mask.mean() < 1
    with torch.no_grad():
        assert model.reconstruct(other, mask).equal(model.reconstruct(x, mask))
        assert (model.reconstruct(seen, mask) - model.reconstruct(x, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"in_channels": 3, "input_patch_size": 4}])
def test_the_losses_are_masked_squared_error_per_location_and_cross_entropy(options):
    model = tiny(**options)
    x, labels = randn(3, model.config.in_channels, 16, 16), torch.tensor([4, 0, 2])
    mask = model.random_mask(x, ratio=0.3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error, cross_entropy = model.losses(x, labels, mask)
        reconstruction, logits = (t.double().numpy() for t in model.reconstruct_and_classify(x, mask))
    target = fold(x.double().numpy(), model.config.input_patch_size)
    squared, hidden = 0.0, 0
    for b, i, j in np.ndindex(mask[:, 0].shape):
        if mask[b, 0, i, j]:
            squared += ((reconstruction[b, :, i, j] - target[b, :, i, j]) ** 2).sum()
            hidden += 1
    assert 0 < hidden < mask.numel()
    assert error.item() == pytest.approx(squared / hidden, rel=1e-5)
    log_likelihood = [row[label] - np.log(np.exp(row).sum()) for row, label in zip(logits, labels, strict=True)]
    assert cross_entropy.item() == pytest.approx(-np.mean(log_likelihood), rel=1e-5)


def test_a_mask_of_nothing_costs_nothing():
    error, _ = tiny().losses(randn(2, 4, 8, 8), torch.tensor([0, 1]), torch.zeros(2, 1, 8, 8))
    assert error.item() == 0.0


def fold(x: np.ndarray, p: int) -> np.ndarray:
    """``[B, C, H, W]`` to ``[B, p p C, H/p, W/p]``, channels in (row, column, channel) order."""
    B, C, H, W = x.shape
    folded = np.empty((B, p * p * C, H // p, W // p), x.dtype)
    for b, c, y, z in np.ndindex(x.shape):
        folded[b, ((y % p) * p + z % p) * C + c, y // p, z // p] = x[b, c, y, z]
    return folded


def test_pixel_inputs_are_folded_in_row_column_channel_order():
    model, x = tiny(in_channels=3, input_patch_size=4), randn(2, 3, 16, 32)
    folded = fold(x.numpy(), 4)
    assert (model._fold(x).numpy() == folded).all()
    assert tiny()._fold(x).equal(x)
    # An encoder of folded inputs with the same weights sees the same maps.
    unfolding = tiny(in_channels=48)
    unfolding.load_state_dict(model.state_dict())
    with torch.no_grad():
        features, expected = model.features(x), unfolding.features(torch.from_numpy(folded))
        reconstruction = model.reconstruct(x)
    assert reconstruction.shape == folded.shape
    maps = set(expected) - {"norm_x", "global"}
    assert all(features[name].equal(expected[name]) for name in maps)
    assert features["norm_x"].shape == (2, 1, 3)
    assert features["global"].shape == (2, 1, 3 * 16 * 32)


@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (32, 32), (48, 24), (64, 32), (80, 20), (31, 31), (37, 1)])
def test_group_norms_have_the_largest_divisor_up_to_32_and_the_released_epsilon(channels, groups):
    norm = group_norm(channels)
    assert norm.num_groups == groups
    assert norm.eps == 1e-6


def test_no_convolution_but_the_head_has_a_bias():
    convolutions = {n: m for n, m in tiny().named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert [name for name, module in convolutions.items() if module.bias is not None] == ["decoder.head"]


def test_the_encoder_keeps_its_protocol_and_its_bits_through_a_folder(tmp_path):
    model = tiny(depths=(1, 2, 1, 1))
    assert isinstance(model, Encoder)
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = load_encoder(tmp_path)
    x = randn(2, 4, 16, 16)
    with torch.no_grad():
        features, expected = loaded.features(x), model.features(x)
    assert set(features) == set(expected)
    assert all(features[name].equal(expected[name]) for name in expected)


def test_a_folder_without_an_encoder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "VGG"}')
    with pytest.raises(InputError, match="unknown class 'VGG'; known: ResNetMAE"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "ResNetMAE"}')
    with pytest.raises(InputError, match=str(tmp_path)):
        load_encoder(tmp_path)


def test_another_number_of_stages_is_refused():
    with pytest.raises(ValueError, match="must name 4 stages"):
        ResNetMAE(depths=(1, 1, 1))
