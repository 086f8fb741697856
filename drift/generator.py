"""The one-step generator: a DiT conditioned on class, guidance scale and style (Appendix A.2).

Shape suffixes: B samples, N tokens (registers first), D width, H heads, E width of a head, P patch elements.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

#: The paper's named sizes (A.2): what differs from the defaults of `Generator`.
GENERATORS = {
    "B/2": {"in_channels": 4, "input_size": 32, "patch_size": 2, "width": 768, "depth": 12, "heads": 12},
    "L/2": {"in_channels": 4, "input_size": 32, "patch_size": 2, "width": 1024, "depth": 24, "heads": 16},
    "B/16": {"in_channels": 3, "input_size": 256, "patch_size": 16, "width": 768, "depth": 12, "heads": 12},
    "L/16": {"in_channels": 3, "input_size": 256, "patch_size": 16, "width": 1024, "depth": 24, "heads": 16},
}

REGISTER_STD = 0.02


class Generator(ModelMixin, ConfigMixin):
    """Maps noise to a sample in one forward pass (A.2).

    Args:
        in_channels, input_size: of the square sample, e.g. 4 and 32 for Stable-Diffusion latents of 256 x 256 images.
        patch_size: side of the patches that become tokens.
        width, depth, heads: of the transformer.
        mlp_ratio: the SwiGLU's hidden width is 2/3 of this times `width`, rounded up to a multiple of 32.
        num_classes: class slots.
        num_registers: register tokens, dropped at the end.
        num_styles, style_codes: style indices per sample, and the size of each one's codebook; 0 styles for none.
        class_embedding_std, style_embedding_std: of the initial embeddings; a short training wants more than the
            paper's 0.02, so that classes and styles differ from the first step.
        guidance_gain: weight of the embedding of alpha in the condition; a short training needs more than the paper's
            0.02 to tell alphas apart.
        attention_in_float32: do attention in float32 even under autocast (ablation and pixel models).
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        input_size: int = 32,
        patch_size: int = 2,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        num_registers: int = 16,
        num_styles: int = 32,
        style_codes: int = 64,
        class_embedding_std: float = 0.02,
        style_embedding_std: float = 0.02,
        guidance_gain: float = 0.02,
        attention_in_float32: bool = True,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} must divide into {heads} heads of even width")
        grid, patch_elements = input_size // patch_size, patch_size**2 * in_channels
        self.patchify = nn.Linear(patch_elements, width)
        self.position = nn.Parameter(torch.zeros(grid**2, width))
        self.class_embedding = nn.Embedding(num_classes, width)
        self.style_embeddings = nn.ModuleList(nn.Embedding(style_codes, width) for _ in range(num_styles))
        self.guidance_embedding = GuidanceEmbedding(width)
        self.register_projection = nn.Linear(width, width)
        self.registers = nn.Parameter(torch.zeros(num_registers, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, attention_in_float32) for _ in range(depth))
        self.final_norm = nn.RMSNorm(width, eps=1e-6)
        self.final_modulation = Modulation(width, 2)
        self.unpatchify = nn.Linear(width, patch_elements)
        self._init_weights(grid)

    def forward(self, noise: Tensor, class_labels: Tensor, guidance_scale: Tensor, style_indices: Tensor) -> Tensor:
        """One-step generation ``[B, C, H, W]``.

        Args:
            noise: standard normal ``[B, C, H, W]``.
            class_labels: ``[B]``, integers below `num_classes`.
            guidance_scale: alpha ``[B]``, at least 1.
            style_indices: ``[B, num_styles]``, integers below `style_codes`.
        """
        c_BD = self.condition(class_labels, guidance_scale, style_indices)
        x_BND = self.patchify(self._to_patches(noise)) + self.position
        registers_BRD = self.register_projection(c_BD)[:, None] + self.registers
        x_BND = torch.cat([registers_BRD, x_BND], dim=1)
        rotation = rotary_embedding(x_BND.shape[1], self.config.width // self.config.heads, x_BND.device)
        for block in self.blocks:
            x_BND = block(x_BND, c_BD, rotation)
        x_BND = x_BND[:, self.config.num_registers :]
        shift, scale = self.final_modulation(c_BD)
        x_BNP = self.unpatchify(modulate(self.final_norm(x_BND), shift, scale))
        return self._to_image(x_BNP)

    def condition(self, class_labels: Tensor, guidance_scale: Tensor, style_indices: Tensor) -> Tensor:
        """The condition ``[B, D]``: class + sum of styles + `guidance_gain` x embedding of alpha."""
        c_BD = self.class_embedding(class_labels)
        for embedding, index_B in zip(self.style_embeddings, style_indices.unbind(1), strict=True):
            c_BD = c_BD + embedding(index_B)
        return c_BD + self.config.guidance_gain * self.guidance_embedding(guidance_scale)

    def _to_patches(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, N, P]``, the elements of a patch in (p, p, C) order."""
        B, C, H, W = x.shape
        p = self.config.patch_size
        return x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)

    def _to_image(self, x_BNP: Tensor) -> Tensor:
        """Inverse of `_to_patches`."""
        p, C, grid = self.config.patch_size, self.config.in_channels, self.config.input_size // self.config.patch_size
        x = x_BNP.reshape(-1, grid, grid, p, p, C).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, C, grid * p, grid * p)

    @torch.no_grad()
    def _init_weights(self, grid: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedding.weight, std=self.config.class_embedding_std)
        for embedding in self.style_embeddings:
            nn.init.normal_(embedding.weight, std=self.config.style_embedding_std)
        nn.init.normal_(self.registers, std=REGISTER_STD)
        self.position.copy_(get_2d_sincos_pos_embed(self.config.width, grid, output_type="pt"))
        for modulation in [*(block.modulation for block in self.blocks), self.final_modulation]:
            nn.init.zeros_(modulation.linear.weight)
        nn.init.zeros_(self.unpatchify.weight)


class GuidanceEmbedding(nn.Module):
    """alpha ``[B]`` to ``[B, D]``: 256 sinusoids (cosines first), MLP, RMSNorm."""

    FREQUENCIES = 128

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, guidance_scale: Tensor) -> Tensor:
        index = torch.arange(self.FREQUENCIES, device=guidance_scale.device, dtype=torch.float32)
        angle = guidance_scale.float()[:, None] * 10000.0 ** (-index / self.FREQUENCIES)
        return self.norm(self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1)))


class Modulation(nn.Module):
    """adaLN-zero: the condition ``[B, D]`` to `chunks` tensors ``[B, 1, D]``, in float32; zero at the start."""

    def __init__(self, width: int, chunks: int):
        super().__init__()
        self.linear = nn.Linear(width, chunks * width)
        self.chunks = chunks

    def forward(self, c_BD: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(c_BD.device.type, enabled=False):
            return self.linear(F.silu(c_BD.to(self.linear.weight.dtype)))[:, None].chunk(self.chunks, dim=2)


class Block(nn.Module):
    """RMSNorm, adaLN-zero, attention and SwiGLU, each added through its gate."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, attention_in_float32: bool):
        super().__init__()
        self.modulation = Modulation(width, 6)
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, attention_in_float32)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, mlp_ratio)

    def forward(self, x_BND: Tensor, c_BD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c_BD)
        attended = self.attention(modulate(self.attention_norm(x_BND), shift_a, scale_a), rotation)
        x_BND = torch.addcmul(x_BND, gate_a, attended)
        return torch.addcmul(x_BND, gate_m, self.mlp(modulate(self.mlp_norm(x_BND), shift_m, scale_m)))


class Attention(nn.Module):
    """Self-attention with per-head RMSNorm on queries and keys, then rotary positions over the whole sequence."""

    def __init__(self, width: int, heads: int, in_float32: bool):
        super().__init__()
        self.heads, self.in_float32 = heads, in_float32
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHNE, k_BHNE, v_BHNE = qkv.unbind(0)
        q_BHNE, k_BHNE = rotate(self.q_norm(q_BHNE), *rotation), rotate(self.k_norm(k_BHNE), *rotation)
        dtype = torch.float32 if self.in_float32 else v_BHNE.dtype
        with torch.autocast(x_BND.device.type, enabled=False):
            y_BHNE = F.scaled_dot_product_attention(q_BHNE.to(dtype), k_BHNE.to(dtype), v_BHNE.to(dtype))
        return self.out(y_BHNE.to(v_BHNE.dtype).transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    """``out(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, mlp_ratio: float):
        super().__init__()
        hidden = -(-int(width * mlp_ratio * 2 / 3) // 32) * 32
        self.gate, self.up, self.out = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x_BND)) * self.up(x_BND))


def modulate(x_BND: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x_BND, 1 + scale)


def rotary_embedding(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine ``[length, width]`` of the 1-D rotary embedding, base 10000, for rotated halves."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle.cos(), angle.cos()], dim=1), torch.cat([-angle.sin(), angle.sin()], dim=1)


def rotate(x_BHNE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    return torch.addcmul(x_BHNE * cos_NE, x_BHNE.roll(x_BHNE.shape[-1] // 2, dims=-1), sin_NE)
