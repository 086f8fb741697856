"""Tokenizers: identity and autoencoder, the scale of latents, loading from safetensors only."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from drift.errors import InputError
from drift.pretraining import set_latent_scale
from drift.tokenizer import Tokenizer, decode_latents, images_to_tensor, latent_scale, load_vae, tensor_to_images


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


def test_images_survive_the_way_through_the_identity_tokenizer(images):
    tokenizer = Tokenizer()
    x = images_to_tensor(images)
    mean, std = tokenizer.encode(x)
    assert torch.equal(mean, x)
    assert torch.equal(std, torch.zeros_like(x))
    assert torch.equal(tokenizer.decode(mean), x)


def test_a_byte_comes_back_from_a_tensor_up_to_one_truncated_level():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = images_to_tensor(levels)
    assert (x.dtype, x.shape) == (torch.float32, (1, 3, 16, 16))
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    # Truncation, the paper's choice, turns a rounding error below a level into the level beneath.
    lost = levels.astype(int) - tensor_to_images(x)
    assert set(lost.flatten()) <= {0, 1}
    assert lost.mean() < 0.5


def test_tensors_become_bytes_by_truncation_and_saturation():
    # (x + 1) * 127.5: -2 -> below 0, 0.002 -> 127.755, 0.999 -> 254.87, 2 -> above 255.
    values = torch.tensor([-2.0, 0.002, 0.999, 2.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    np.testing.assert_array_equal(tensor_to_images(values)[0, ..., 0], [[0, 127], [254, 255]])


def test_the_identity_tokenizer_comes_back_from_its_folder(tmp_path, images):
    Tokenizer().save_pretrained(tmp_path / "identity")
    loaded = Tokenizer.from_pretrained(tmp_path / "identity")
    assert loaded.vae is None
    assert loaded.latent_shape(16) == (3, 16, 16)
    x = images_to_tensor(images)
    assert torch.equal(loaded.encode(x)[0], x)


def test_scale_and_shift_are_applied_to_moments_and_undone_before_decoding(vae, images):
    vae.register_to_config(scaling_factor=0.25, shift_factor=-0.5)
    tokenizer, x = Tokenizer(vae), images_to_tensor(images)
    mean, std = tokenizer.encode(x)
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.mean).sample
    torch.testing.assert_close(mean, (posterior.mean + 0.5) * 0.25)
    torch.testing.assert_close(std, (0.5 * posterior.logvar).exp() * 0.25)
    torch.testing.assert_close(tokenizer.decode(mean), decoded, rtol=1e-4, atol=1e-5)
    assert mean.shape[1:] == tokenizer.latent_shape(16) == (4, 8, 8)


def test_a_missing_shift_is_no_shift(vae, images):
    vae.register_to_config(scaling_factor=0.18215, shift_factor=None)
    assert latent_scale(vae) == (0.18215, 0.0)
    x = images_to_tensor(images)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mean * 0.18215
    torch.testing.assert_close(Tokenizer(vae).encode(x)[0], expected)


@pytest.mark.parametrize("batch_size", [5, 256])
def test_the_latent_scale_gives_mean_zero_and_variance_one(vae, images, batch_size: int):
    set_latent_scale(vae, images, batch_size=batch_size)
    mean, std = Tokenizer(vae).encode(images_to_tensor(images))
    # A latent is mean + std * noise: its variance over images, channels and places is that of means plus mean variance.
    mean, std = mean.double(), std.double()
    assert abs(float(mean.mean())) < 1e-5
    assert float(mean.var(correction=0) + std.square().mean()) == pytest.approx(1, abs=1e-5)


def test_a_saved_autoencoder_gives_the_same_latents_and_images(vae, images, tmp_path):
    set_latent_scale(vae, images)
    saved = Tokenizer(vae)
    saved.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    x = images_to_tensor(images)
    for a, b in zip(saved.encode(x), loaded.encode(x), strict=True):
        assert torch.equal(a, b)
    latents = saved.encode(x)[0]
    assert torch.equal(saved.decode(latents), loaded.decode(latents))
    assert latent_scale(loaded.vae) == latent_scale(vae)
    assert not any(parameter.requires_grad for parameter in loaded.vae.parameters())
    assert not loaded.vae.training
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_decoding_without_an_autoencoder_returns_the_latents():
    latents = torch.randn(2, 3, 4, 4)
    assert torch.equal(decode_latents(None, latents), latents)


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"config.json": '{"_class_name": "AutoencoderKL"}'}])
def test_a_folder_without_weights_is_refused_by_name(tmp_path, content):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(InputError) as caught:
        Tokenizer.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "none"))):
        Tokenizer.from_pretrained(tmp_path / "none")


def test_pickled_weights_are_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path, safe_serialization=True)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "diffusion_pytorch_model.bin")
    assert load_vae(tmp_path).config.latent_channels == 4
    weights.unlink()
    # The pickle alone would load if it were allowed to.
    AutoencoderKL.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(InputError) as caught:
        load_vae(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused_by_name(vae, tmp_path):
    vae.save_pretrained(tmp_path, safe_serialization=True)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: -weights.stat().st_size // 2])
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        load_vae(tmp_path)


def test_a_configuration_that_is_not_json_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_the_identity_folder_holds_no_weights(tmp_path):
    Tokenizer().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "IdentityTokenizer"
