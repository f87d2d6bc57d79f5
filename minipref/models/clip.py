"""CLIP (Radford et al. 2021) from scratch: two transformers that put pictures and captions into one space.

Configuration names and state-dict keys are those of transformers' `CLIPModel`. A hidden state of the text tower
conditions the UNet, as in Stable Diffusion; both towers serve rewards and metrics.

Shapes: B batch · L text tokens · D width of a tower · P width of the shared space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CLIPConfig:
    """Defaults: ViT-B/32's towers as Stable Diffusion's text encoder and PrefPaint's features know them."""

    projection_dim: int = 512
    hidden_act: str = "quick_gelu"  # "quick_gelu" (OpenAI's weights) or "gelu" (most others)
    layer_norm_eps: float = 1e-5
    # text tower
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    text_hidden_size: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_intermediate_size: int = 2048
    eos_token_id: int = 49407
    # Last layers that the UNet's condition leaves out. Stable Diffusion 2.x leaves out one, but its published text
    # encoder is stored without it: 0 for the files of 1.x and 2.x.
    context_skip: int = 0
    # vision tower
    image_size: int = 224
    patch_size: int = 32
    vision_hidden_size: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_intermediate_size: int = 3072
    # pixels are normalised with these before the vision tower
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"CLIPConfig: hidden_act={self.hidden_act!r}; choose quick_gelu or gelu")
        if not 0 <= self.context_skip <= self.text_layers:
            raise ValueError(
                f"CLIPConfig: context_skip={self.context_skip}; the text tower has {self.text_layers} layers"
            )


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, act: str):
        super().__init__()
        self.act = act
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(F.gelu(h) if self.act == "gelu" else h * torch.sigmoid(1.702 * h))


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, act: str, eps: float):
        super().__init__()
        self.self_attn = _SelfAttention(dim, heads)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = _MLP(dim, hidden, act)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, layers: int, *args):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(*args) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, causal)
        return x


class _TextEmbeddings(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.text_hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTower(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.eos_token_id = c.eos_token_id
        self.embeddings = _TextEmbeddings(c)
        self.encoder = _Encoder(
            c.text_layers, c.text_hidden_size, c.text_heads, c.text_intermediate_size, c.hidden_act, c.layer_norm_eps
        )
        self.final_layer_norm = nn.LayerNorm(c.text_hidden_size, eps=c.layer_norm_eps)

    def hidden(self, ids: Tensor, skip: int) -> Tensor:
        """ids (B, L) -> the hidden state (B, L, D) before the last `skip` layers, through the final norm."""
        x = self.embeddings(ids)
        for layer in self.encoder.layers[: len(self.encoder.layers) - skip]:
            x = layer(x, causal=True)
        return self.final_layer_norm(x)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> last hidden state (B, L, D), and the state at the end-of-text token (B, D)."""
        x = self.hidden(ids, 0)
        # Published configurations say eos_token_id = 2 although their end token is the highest id.
        end = ids.argmax(1) if self.eos_token_id == 2 else (ids == self.eos_token_id).int().argmax(1)
        return x, x[torch.arange(len(x), device=x.device), end]


class _VisionEmbeddings(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        n = (c.image_size // c.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(c.vision_hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.vision_hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(n + 1, c.vision_hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight  # (B, 1 + patches, D)


class VisionTower(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.embeddings = _VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.vision_hidden_size, eps=c.layer_norm_eps)  # the published spelling
        self.encoder = _Encoder(
            c.vision_layers,
            c.vision_hidden_size,
            c.vision_heads,
            c.vision_intermediate_size,
            c.hidden_act,
            c.layer_norm_eps,
        )
        self.post_layernorm = nn.LayerNorm(c.vision_hidden_size, eps=c.layer_norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """normalised pixels (B, 3, S, S) -> last hidden state (B, 1 + patches, D), pooled (B, D)."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)
        return x, self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Two towers, two projections and a temperature (transformers: CLIPModel)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = c = config
        self.text_model, self.vision_model = TextTower(c), VisionTower(c)
        self.visual_projection = nn.Linear(c.vision_hidden_size, c.projection_dim, bias=False)
        self.text_projection = nn.Linear(c.text_hidden_size, c.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As published files have it: `position_ids` (a constant in old files) is ignored."""
        state = {k: v for k, v in state_dict.items() if not k.endswith("position_ids")}
        return super().load_state_dict(state, strict, assign)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> unit vectors (B, P)."""
        return F.normalize(self.visual_projection(self.vision_model(pixel_values(images, self.config))[1]), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """token ids (B, L) -> unit vectors (B, P)."""
        return F.normalize(self.text_projection(self.text_model(ids)[1]), dim=-1)

    def context(self, ids: Tensor) -> Tensor:
        """token ids (B, L) -> the UNet's text condition (B, L, D): what the tower knows of each word."""
        return self.text_model.hidden(ids, self.config.context_skip)

    def context_state(self) -> dict[str, Tensor]:
        """The weights that `context` depends on: those of the text tower but for the last layers that it leaves out."""
        c = self.config
        above = tuple(f"encoder.layers.{c.text_layers - 1 - i}." for i in range(c.context_skip))
        return {k: v for k, v in self.text_model.state_dict().items() if not k.startswith(above)}


def pixel_values(images: Tensor, config: CLIPConfig) -> Tensor:
    """What the vision tower reads: images (B, 3, H, W) in [0, 1], resized (bicubic) where they are not of the tower's
    size, and normalised -> (B, 3, S, S)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"CLIP: images are {tuple(images.shape)}, expected (B, 3, H, W)")
    size = (config.image_size, config.image_size)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    return (images - mean) / std


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric contrastive loss over a batch of matching unit vectors (B, P) (Radford et al. 2021, Fig. 3)."""
    logits = logit_scale.exp() * image @ text.T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
