"""DriftPipeline: one-step sampling, its round trip to disk, its arguments."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from drift import DriftPipeline, Generator, InputError
from drift.sampling import sample_in_batches

NAMES = ["zero", "one", "two", "three"]


def small_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    return vae.eval()


def small_generator(channels: int) -> Generator:
    torch.manual_seed(0)
    generator = Generator(
        in_channels=channels,
        input_size=8,
        patch_size=4,
        width=16,
        depth=1,
        heads=2,
        num_classes=len(NAMES),
        num_registers=1,
        num_styles=2,
        style_codes=8,
    )
    # A new generator's output is zero: give its zero-initialised layers weights, so that inputs matter.
    with torch.no_grad():
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return generator.eval()


@pytest.fixture(scope="module", params=["latent", "pixel"])
def pipeline(request) -> DriftPipeline:
    """A pipeline with an autoencoder, and one in pixel space."""
    latent = request.param == "latent"
    made = DriftPipeline(small_generator(4 if latent else 3), small_vae() if latent else None, NAMES)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uint8(pipeline: DriftPipeline, labels, alpha=1.0, **options) -> np.ndarray:
    return pipeline(labels, alpha, output_type="uint8", **options).images


LABELS = [0, 3, 1, 1, 2]


def test_a_saved_pipeline_gives_the_same_images_bit_for_bit(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    loaded = DriftPipeline.from_pretrained(str(tmp_path), use_safetensors=True)
    for alpha in (1.0, 2.5):
        expected = pipeline(LABELS, alpha, generator=seeded(), output_type="pt").images
        assert torch.equal(loaded(LABELS, alpha, generator=seeded(), output_type="pt").images, expected)
    assert list(loaded.config.class_names) == NAMES
    assert (loaded.vae is None) == (pipeline.vae is None)
    assert loaded.generator.config.num_styles == 2


def test_weights_are_saved_as_safetensors_only(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_names_stand_for_labels(pipeline):
    names = [NAMES[label] for label in LABELS]
    expected = uint8(pipeline, LABELS, generator=seeded())
    np.testing.assert_array_equal(uint8(pipeline, names, generator=seeded()), expected)
    np.testing.assert_array_equal(uint8(pipeline, [0, "three", 1, "one", "two"], generator=seeded()), expected)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_labels_may_be_any_sequence(pipeline, kind):
    np.testing.assert_array_equal(
        uint8(pipeline, kind(LABELS), generator=seeded()), uint8(pipeline, LABELS, generator=seeded())
    )


def test_the_same_seed_gives_the_same_images_and_another_others(pipeline):
    first, again, other = (uint8(pipeline, LABELS, generator=seeded(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_label_alpha_noise_and_style_all_decide_the_image(pipeline):
    noise = torch.randn(1, pipeline.generator.config.in_channels, 8, 8, generator=seeded())
    given = {"noise": noise, "style_indices": torch.tensor([[1, 2]])}
    base = pipeline.latents(torch.tensor([1]), 1.0, **given)
    others = {
        "label": pipeline.latents(torch.tensor([2]), 1.0, **given),
        "alpha": pipeline.latents(torch.tensor([1]), 3.0, **given),
        "noise": pipeline.latents(torch.tensor([1]), 1.0, **{**given, "noise": -noise}),
        "style": pipeline.latents(torch.tensor([1]), 1.0, **{**given, "style_indices": torch.tensor([[1, 3]])}),
    }
    assert torch.equal(base, pipeline.latents(torch.tensor([1]), 1.0, **given))
    assert [name for name, value in others.items() if torch.allclose(value, base, atol=1e-6)] == []


def test_alpha_may_be_given_per_image(pipeline):
    noise = torch.randn(2, pipeline.generator.config.in_channels, 8, 8, generator=seeded())
    styles = torch.zeros(2, 2, dtype=torch.long)
    labels = torch.tensor([1, 2])
    both = pipeline.latents(labels, [1.0, 3.0], noise=noise, style_indices=styles)
    for i, alpha in enumerate([1.0, 3.0]):
        one = pipeline.latents(labels[i : i + 1], alpha, noise=noise[i : i + 1], style_indices=styles[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], one)


def test_an_image_depends_on_its_own_noise_whatever_the_batch(pipeline):
    noise = torch.randn(6, pipeline.generator.config.in_channels, 8, 8, generator=seeded(2))
    styles = torch.randint(8, (6, 2), generator=seeded(3))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    whole = pipeline(labels, 1.5, noise=noise, style_indices=styles, output_type="pt").images
    for size in (1, 2, 4):
        parts = [
            pipeline(
                labels[i : i + size],
                1.5,
                noise=noise[i : i + size],
                style_indices=styles[i : i + size],
                output_type="pt",
            )
            for i in range(0, 6, size)
        ]
        torch.testing.assert_close(torch.cat([part.images for part in parts]), whole)
    backwards = pipeline(labels.flip(0), 1.5, noise=noise.flip(0), style_indices=styles.flip(0), output_type="pt")
    torch.testing.assert_close(backwards.images.flip(0), whole)


def test_sampling_is_one_forward_pass(pipeline):
    calls = []
    handle = pipeline.generator.register_forward_hook(lambda *_: calls.append(1))
    uint8(pipeline, LABELS, 3.0, generator=seeded())
    handle.remove()
    assert calls == [1]


def test_the_image_is_the_generator_then_the_decoder(pipeline):
    noise = torch.randn(2, pipeline.generator.config.in_channels, 8, 8, generator=seeded())
    styles = torch.tensor([[1, 2], [3, 4]])
    with torch.no_grad():
        latents = pipeline.generator(noise, torch.tensor([0, 1]), torch.tensor([1.0, 1.0]), styles)
        # diffusers' convention: z = latent / scaling_factor + shift_factor.
        images = pipeline.vae.decode(latents / 0.7 + 0.2).sample if pipeline.vae is not None else latents
    got = pipeline([0, 1], noise=noise, style_indices=styles, output_type="pt").images
    torch.testing.assert_close(got, (images / 2 + 0.5).clamp(0, 1))
    latent = pipeline([0, 1], noise=noise, style_indices=styles, output_type="latent").images
    torch.testing.assert_close(latent, latents)


def test_every_output_type_shows_the_same_image(pipeline):
    side = 16 if pipeline.vae is not None else 8
    get = lambda kind: pipeline(LABELS, generator=seeded(), output_type=kind).images  # noqa: E731
    pt, array, truncated, pil = get("pt"), get("np"), get("uint8"), get("pil")
    assert (pt.dtype, pt.shape) == (torch.float32, (5, 3, side, side))
    assert pt.min() >= 0
    assert pt.max() <= 1
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    assert (truncated.dtype, truncated.shape) == (np.uint8, (5, side, side, 3))
    # Truncation loses up to one level, never gains one.
    loss = array.astype(np.float64) * 255 - truncated
    assert loss.min() > -1e-3
    assert loss.max() < 1 + 1e-3
    assert all(isinstance(image, Image.Image) and image.size == (side, side) for image in pil)
    rounded = np.stack([np.asarray(image) for image in pil])
    assert np.abs(array * 255 - rounded).max() <= 0.5 + 1e-3


def test_images_come_as_pil_by_default_and_as_a_tuple_on_request(pipeline):
    images = pipeline(LABELS, generator=seeded()).images
    (same,) = pipeline(LABELS, generator=seeded(), return_dict=False)
    assert [np.asarray(image).tobytes() for image in images] == [np.asarray(image).tobytes() for image in same]


@pytest.mark.parametrize(
    ("labels", "alpha", "options", "fragments"),
    [
        ([0, 4], 1.0, {}, ["class label 4", "has 4"]),
        ([0, -1], 1.0, {}, ["class label -1"]),
        (torch.tensor([0, 7]), 1.0, {}, ["class label 7"]),
        ([0, "five"], 1.0, {}, ["'five'", "zero, one, two, three"]),
        ([0, 1], 0.99, {}, ["guidance_scale 0.99", "below 1"]),
        ([0, 1], [1.0, 0.5], {}, ["guidance_scale 0.5", "below 1"]),
        ([0, 1], float("nan"), {}, ["guidance_scale nan"]),
        ([0, 1], [1.0, 1.5, 2.0], {}, ["guidance_scale"]),
        ([0, 1], 1.0, {"noise": torch.zeros(2, 2, 8, 8)}, ["noise", "[2, 2, 8, 8]"]),
        ([0, 1], 1.0, {"noise": torch.zeros(1, 4, 8, 8)}, ["noise", "[1, 4, 8, 8]"]),
        ([0, 1], 1.0, {"style_indices": torch.zeros(2, 3, dtype=torch.long)}, ["style_indices", "[2, 3]", "[2, 2]"]),
        ([0, 1], 1.0, {"style_indices": torch.full((2, 2), 8)}, ["style", "8"]),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(pipeline, labels, alpha, options, fragments):
    with pytest.raises(InputError) as caught:
        pipeline(labels, alpha, generator=seeded(), output_type="uint8", **options)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_a_pipeline_without_names_says_so():
    nameless = DriftPipeline(small_generator(3))
    with pytest.raises(InputError, match=r"^unknown class name 'zero'; this model knows no names$"):
        nameless(["zero"])


def test_many_labels_are_sampled_in_batches_whose_sizes_are_reported(pipeline):
    labels = torch.arange(7) % 4
    counts: list[int] = []
    images = sample_in_batches(pipeline, labels, 1.0, generator=seeded(), batch_size=3, progress=counts.append)
    assert counts == [3, 3, 1]
    assert (images.dtype, len(images)) == (np.uint8, 7)
    # The source of noise runs on from batch to batch.
    source = seeded()
    expected = [uint8(pipeline, part, generator=source) for part in labels.split(3)]
    np.testing.assert_array_equal(images, np.concatenate(expected))
