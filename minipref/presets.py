"""The named sizes. A preset is what a user types; everything else follows from it.

Sizes only: what a model learns from (words, pictures) comes from whoever trains it.
"""

from __future__ import annotations

from .diffusion import ScheduleConfig
from .models.autoencoder import SpaceToDepth
from .models.clip import CLIPConfig
from .models.reward_features import FeatureConfig
from .models.tokenizer import EOS, WordTokenizer
from .models.unet import UNetConfig

SMALL_SIZE = 32  # pixels, height and width
SMALL_CODEC = SpaceToDepth(2)


def small_clip(tokenizer: WordTokenizer) -> CLIPConfig:
    return CLIPConfig(
        projection_dim=64,
        hidden_act="gelu",
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.max_length,
        text_hidden_size=80,
        text_layers=2,
        text_heads=4,
        text_intermediate_size=160,
        eos_token_id=EOS,
        context_skip=1,
        image_size=SMALL_SIZE,
        patch_size=4,
        vision_hidden_size=80,
        vision_layers=4,
        vision_heads=4,
        vision_intermediate_size=160,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


SMALL_UNET = UNetConfig(
    sample_size=SMALL_SIZE // SMALL_CODEC.factor,
    in_channels=2 * SMALL_CODEC.channels + SMALL_CODEC.mask_channels,  # noisy latent, mask, masked picture
    out_channels=SMALL_CODEC.channels,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(48, 64, 80),
    layers_per_block=1,
    cross_attention_dim=80,
    attention_head_dim=4,
    norm_num_groups=8,
)

SMALL_FEATURES = FeatureConfig(pixel_width=16, widths=(16, 32, 48, 64), dim=64)

SMALL_SCHEDULE = ScheduleConfig(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    steps_offset=0,
    set_alpha_to_one=True,
)

# Stable Diffusion 1.5 inpainting, as its published configuration has it (9 channels: latent 4, mask 1, masked image 4).
SD15_INPAINT_UNET = UNetConfig(in_channels=9)
