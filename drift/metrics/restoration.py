"""PSNR and SSIM between images and their references (scikit-image)."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def psnr_db(images: np.ndarray, references: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB, of uint8 ``[N, H, W, 3]``."""
    # A perfect copy has an infinite ratio; one wrong level in one value is the finest error that counts.
    floor = 10 * np.log10(255.0**2 * references[0].size)
    with np.errstate(divide="ignore"):
        values = [peak_signal_noise_ratio(r, i, data_range=255) for i, r in zip(images, references, strict=True)]
    return float(np.mean(np.minimum(values, floor)))


def ssim(images: np.ndarray, references: np.ndarray) -> float:
    """Mean structural similarity of uint8 ``[N, H, W, 3]``."""
    pairs = zip(images, references, strict=True)
    return float(np.mean([structural_similarity(r, i, channel_axis=-1, data_range=255) for i, r in pairs]))
