"""Vector sets from feature maps (Appendix A.5): the features that one drifting loss each is computed on.

Shape suffixes: B samples, H W locations of a map, T vectors of a set, C channels.
"""

from torch import Tensor

STD_EPS = 1e-6
#: Sides of the patches whose mean and standard deviation are vectors (A.5 c, d).
PATCHES = (2, 4)


def vector_sets(name: str, feature_map: Tensor, *, patches: tuple[int, ...] = PATCHES) -> dict[str, Tensor]:
    """All vector sets of one map ``[B, C, H, W]``: ``{set name: [B, T, C]}``, float32.

    `name`: every location; `name`_mean, `name`_std: over the map; `name`_mean_p, `name`_std_p: over p x p patches,
    only where p divides the size. std is ``sqrt(population variance + 1e-6)``.
    """
    map_BHWC = feature_map.float().permute(0, 2, 3, 1)
    B, H, W, C = map_BHWC.shape
    all_BTC = map_BHWC.reshape(B, H * W, C)
    mean, std = _mean_std(all_BTC, dims=(1,))
    sets = {name: all_BTC, f"{name}_mean": mean[:, None], f"{name}_std": std[:, None]}
    for p in patches:
        if H % p or W % p:
            continue
        mean, std = _mean_std(map_BHWC.reshape(B, H // p, p, W // p, p, C), dims=(2, 4))
        sets[f"{name}_mean_{p}"] = mean.reshape(B, -1, C)
        sets[f"{name}_std_{p}"] = std.reshape(B, -1, C)
    return sets


def input_sets(x: Tensor) -> dict[str, Tensor]:
    """Vector sets of the input ``[B, C, H, W]`` itself: ``global`` ``[B, 1, HWC]`` and ``norm_x`` ``[B, 1, C]``.

    ``global`` is the flattened sample (the vanilla loss), in (H, W, C) order; ``norm_x`` the root mean square of each
    channel.
    """
    x_BHWC = x.float().permute(0, 2, 3, 1)
    norm_BC = (x_BHWC.square().mean((1, 2)) + STD_EPS).sqrt()
    return {"norm_x": norm_BC[:, None], "global": x_BHWC.flatten(1)[:, None]}


def feature_group(name: str) -> str:
    """The map that a vector set comes from, e.g. ``layer2`` for ``layer2_blk2_std_4``: the unit that curves show."""
    return name if name in ("global", "norm_x") else name.split("_")[0]


def _mean_std(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims)
    return mean.squeeze(dims), (variance + STD_EPS).sqrt()
