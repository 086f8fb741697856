"""Vector sets of A.5 against explicit loops."""

import numpy as np
import pytest
import torch

from drift.encoders import ResNetMAE
from drift.features import feature_group, input_sets, vector_sets


def feature_map(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 1


def mean_and_std(patch):
    """Mean and root of the population variance + 1e-6 of vectors ``[n, C]``, one channel at a time."""
    mean = np.array([sum(column) / len(column) for column in patch.T])
    variance = np.array(
        [sum((v - m) ** 2 for v in column) / len(column) for column, m in zip(patch.T, mean, strict=True)]
    )
    return mean, np.sqrt(variance + 1e-6)


def patch_vectors(map_CHW, p_h, p_w):
    """Means and stds of the p_h x p_w patches, patches in reading order."""
    C, H, W = map_CHW.shape
    means, stds = [], []
    for top in range(0, H, p_h):
        for left in range(0, W, p_w):
            patch = map_CHW[:, top : top + p_h, left : left + p_w].reshape(C, -1).T
            mean, std = mean_and_std(patch)
            means.append(mean)
            stds.append(std)
    return np.array(means), np.array(stds)


def test_vector_sets_are_locations_and_means_and_stds_of_the_map_and_its_patches():
    x = feature_map(2, 3, 8, 4)
    sets = vector_sets("m", x)
    assert {name: tuple(s.shape) for name, s in sets.items()} == {
        "m": (2, 32, 3),
        "m_mean": (2, 1, 3),
        "m_std": (2, 1, 3),
        "m_mean_2": (2, 8, 3),
        "m_std_2": (2, 8, 3),
        "m_mean_4": (2, 2, 3),
        "m_std_4": (2, 2, 3),
    }
    for b, map_CHW in enumerate(x.double().numpy()):
        locations = [map_CHW[:, i, j] for i in range(8) for j in range(4)]
        np.testing.assert_allclose(sets["m"][b].numpy(), locations, rtol=1e-6)
        for suffix, p_h, p_w in (("", 8, 4), ("_2", 2, 2), ("_4", 4, 4)):
            mean, std = patch_vectors(map_CHW, p_h, p_w)
            np.testing.assert_allclose(sets[f"m_mean{suffix}"][b].numpy(), mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(sets[f"m_std{suffix}"][b].numpy(), std, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "patches"),
    [((4, 4), {2, 4}), ((6, 6), {2}), ((4, 6), {2}), ((2, 4), {2}), ((5, 4), set()), ((1, 1), set())],
)
def test_only_patches_that_divide_both_sides_give_sets(size, patches):
    names = set(vector_sets("m", feature_map(1, 2, *size)))
    assert names == {"m", "m_mean", "m_std"} | {f"m_{kind}_{p}" for p in patches for kind in ("mean", "std")}


def test_the_patches_can_be_chosen():
    names = set(vector_sets("m", feature_map(1, 2, 6, 6), patches=(3,)))
    assert names == {"m", "m_mean", "m_std", "m_mean_3", "m_std_3"}
    assert set(vector_sets("m", feature_map(1, 2, 6, 6), patches=())) == {"m", "m_mean", "m_std"}


def test_statistics_of_a_half_precision_map_are_float32():
    x = (100 + feature_map(2, 3, 8, 8)).bfloat16()
    sets = vector_sets("m", x)
    assert {s.dtype for s in sets.values()} == {torch.float32}
    _, std = mean_and_std(x[0].double().numpy().reshape(3, -1).T)
    np.testing.assert_allclose(sets["m_std"][0, 0].numpy(), std, rtol=1e-5)


def test_the_gradient_of_the_std_of_a_constant_map_is_finite():
    x = torch.full((1, 2, 4, 4), 3.0, requires_grad=True)
    sets = vector_sets("m", x)
    assert sets["m_std"].flatten().tolist() == pytest.approx([1e-3, 1e-3])
    sum(s.sum() for s in sets.values()).backward()
    assert x.grad.isfinite().all()


def test_input_sets_are_the_flattened_sample_and_the_root_mean_square_of_each_channel():
    x = feature_map(2, 3, 4, 5)
    sets = input_sets(x)
    assert set(sets) == {"global", "norm_x"}
    assert sets["global"].shape == (2, 1, 60)
    assert sets["norm_x"].shape == (2, 1, 3)
    for b, x_CHW in enumerate(x.double().numpy()):
        flat = [x_CHW[c, i, j] for i in range(4) for j in range(5) for c in range(3)]
        np.testing.assert_allclose(sets["global"][b, 0].numpy(), flat, rtol=1e-6)
        norm = [np.sqrt(sum(v**2 for v in x_CHW[c].flat) / 20 + 1e-6) for c in range(3)]
        np.testing.assert_allclose(sets["norm_x"][b, 0].numpy(), norm, rtol=1e-6)


def test_the_paper_s_encoder_has_86_sets_of_the_groups_that_curves_show():
    encoder = ResNetMAE(in_channels=4, width=2, depths=(3, 4, 6, 3), num_classes=2).eval()
    with torch.no_grad():
        sets = encoder.features(torch.zeros(1, 4, 32, 32))
    assert len(sets) == 86
    # norm_x and global; seven sets of every map: stem, every 2nd block and the four stages.
    maps = ["conv1", "layer1_blk2", "layer2_blk2", "layer2_blk4", *(f"layer3_blk{j}" for j in (2, 4, 6)), "layer4_blk2"]
    maps += [f"layer{i}" for i in range(1, 5)]
    suffixes = ("", "_mean", "_std", "_mean_2", "_std_2", "_mean_4", "_std_4")
    assert set(sets) == {"norm_x", "global"} | {name + suffix for name in maps for suffix in suffixes}
    groups = {feature_group(name) for name in sets}
    assert groups == {"global", "norm_x", "conv1", "layer1", "layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("layer2_blk2_std_4", "layer2"),
        ("layer4", "layer4"),
        ("conv1_mean", "conv1"),
        ("norm_x", "norm_x"),
        ("global", "global"),
    ],
)
def test_the_group_of_a_set_is_the_map_that_it_comes_from(name, group):
    assert feature_group(name) == group
