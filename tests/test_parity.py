"""Our classes against diffusers and transformers: same weights, same numbers. Needs the extra `parity`, no network."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from minipref.diffusion import Condition, Schedule, ScheduleConfig, add_noise, ddim_step, rollout, target
from minipref.models.clip import CLIP, CLIPConfig
from minipref.models.tokenizer import WordTokenizer
from minipref.models.unet import UNet, UNetConfig
from minipref.pipeline import SHIPPED, load_unet
from minipref.presets import SD15_INPAINT_UNET, SMALL_SCHEDULE, SMALL_UNET, small_clip
from minipref.toy.world import WORDS

parametrize = pytest.mark.parametrize
MISSING = "the extra `parity` is not installed: pip install -e .[parity]"
diffusers = pytest.fixture(scope="module")(lambda: pytest.importorskip("diffusers", reason=MISSING))
transformers = pytest.fixture(scope="module")(lambda: pytest.importorskip("transformers", reason=MISSING))


@torch.no_grad()
def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Draws every parameter. Norms and biases too: left at 1 and 0, a misplaced one would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        bound = (3 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.5
        p.uniform_(-bound, bound, generator=generator)
        if p.ndim == 1 and "norm" in name and name.endswith("weight"):
            p += 1
    return module.eval()


def layers(module: nn.Module) -> dict:
    """Keys and shapes of the state dict, and what it does not say: strides, paddings, groups, epsilons, heads."""
    found = {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.endswith("position_ids")}
    for name, m in module.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)):
            found[name] = m.extra_repr()
        elif hasattr(m, "to_q") or hasattr(m, "q_proj"):
            found[name] = m.heads if hasattr(m, "heads") else m.num_heads
    return found


def max_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------ UNet

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def tiny_unet(*kinds: tuple[str, str], **options) -> UNetConfig:
    """A small network with blocks of these kinds, from the top level to the bottom."""
    down, up = zip(*kinds)
    blocks = dict(block_out_channels=(16, 32, 24)[: len(kinds)], down_block_types=down, up_block_types=up[::-1])
    sizes = dict(cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8, layers_per_block=1)
    return UNetConfig(**blocks | sizes | options)


UNETS = {  # configuration, latent height and width
    "one layer": (tiny_unet(CROSS, PLAIN), (8, 8)),
    "two layers, linear projections": (tiny_unet(CROSS, PLAIN, layers_per_block=2, use_linear_projection=True), (8, 8)),
    "heads by level": (tiny_unet(CROSS, CROSS, CROSS, layers_per_block=2, attention_head_dim=(2, 4, 8)), (8, 12)),
    "odd latent, inpainting channels": (tiny_unet(CROSS, CROSS, CROSS, in_channels=9), (13, 9)),
    "attention in the middle alone": (tiny_unet(PLAIN, PLAIN, in_channels=9, use_linear_projection=True), (7, 10)),
    "attention below, sines first": (tiny_unet(PLAIN, CROSS, attention_head_dim=(1, 4), flip_sin_to_cos=False), (8, 8)),
    "other norms, frequencies": (tiny_unet(CROSS, CROSS, freq_shift=1, norm_eps=0.1, norm_num_groups=4), (8, 8)),
    "small preset": (SMALL_UNET, (SMALL_UNET.sample_size,) * 2),
}
# The published configuration of Stable Diffusion 1.5 inpainting, and what 2.x changes.
SD15 = json.loads("""{"attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 9,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}""")
SD2 = dict(attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, cross_attention_dim=1024)


def unet_outputs(ours, theirs, c: UNetConfig, size: tuple[int, int], batch: int = 3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, c.in_channels, *size, generator=g)
    context = torch.randn(batch, 7, c.cross_attention_dim, generator=g)
    t = torch.tensor([501, 0, 999])[:batch]
    with torch.no_grad():
        return ours(x, t, context), theirs(x, t, context).sample


@parametrize("name", UNETS)
def test_unet_gives_diffusers_numbers_with_weights_loaded_either_way(diffusers, name):
    config, size = UNETS[name]
    ours, theirs = UNet(config), diffusers.UNet2DConditionModel(**asdict(config))
    for seed, source, copy in ((0, theirs, ours), (1, ours, theirs)):
        copy.load_state_dict(randomised(source, seed).state_dict(), strict=True)
        a, b = unet_outputs(ours, theirs, config, size)
        assert max_diff(a, b) <= 1e-4 and b.std() > 0.1


def test_the_lines_of_the_reference_load_our_weights_in_diffusers(diffusers, monkeypatch):
    """As they stand there, from the folder of the project: the same pictures of noise from both networks."""
    root = SHIPPED.parents[2]
    text = (root / "tutorials" / "REFERENCE.md").read_text(encoding="utf-8")
    (code,) = [f for f in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "diffusers" in f]
    monkeypatch.chdir(root)
    names: dict = {}
    exec(code, names)
    ours, config = load_unet(SHIPPED / "unet.pt")[0], SMALL_UNET
    a, b = unet_outputs(ours, names["unet"].eval(), config, (config.sample_size,) * 2)
    assert max_diff(a, b) <= 1e-5 and b.std() > 0.1
    assert names["file"]["meta"]["schedule"] == asdict(SMALL_SCHEDULE)  # where the text says that it is


@parametrize("extra", [{}, SD2], ids=["1.5", "2.x"])
def test_unet_has_the_layers_of_stable_diffusion_inpainting(diffusers, extra):
    with torch.device("meta"):
        ours, theirs = UNet(replace(SD15_INPAINT_UNET, **extra)), diffusers.UNet2DConditionModel(**SD15 | extra)
    assert layers(ours) == layers(theirs)


@pytest.mark.slow
def test_unet_of_stable_diffusion_15_inpainting_gives_diffusers_numbers(diffusers):
    with torch.device("meta"):
        ours, theirs = UNet(SD15_INPAINT_UNET), diffusers.UNet2DConditionModel(**SD15)
    theirs = randomised(theirs.to_empty(device="cpu"), 0)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)  # the same 3.4 GB
    a, b = unet_outputs(ours, theirs, SD15_INPAINT_UNET, (16, 16), batch=1)
    assert max_diff(a, b) <= 1e-4 and b.std() > 0.1


# ------------------------------------------------------------------------------------------------ CLIP

SMALL_CLIP = small_clip(WordTokenizer(WORDS))
TINY_CLIP = replace(SMALL_CLIP, vocab_size=60, vision_hidden_size=60, image_mean=(0.0, 0.2, 1.0))
PUBLISHED = {"logit_scale", "text_model.embeddings.token_embedding.weight", "vision_model.pre_layrnorm.weight"}


def their_clip(transformers, c: CLIPConfig):
    flat, towers = asdict(c), {}
    for tower in ("text", "vision"):
        own = {k.removeprefix(f"{tower}_"): v for k, v in flat.items()}
        towers[f"{tower}_config"] = own | {"num_hidden_layers": own["layers"], "num_attention_heads": own["heads"]}
    return transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=c.projection_dim))


@parametrize("eos", [2, 49])
@parametrize("act", ["quick_gelu", "gelu"])
def test_clip_gives_transformers_embeddings(transformers, act, eos):
    config = replace(TINY_CLIP, hidden_act=act, eos_token_id=eos, context_skip=0)
    theirs = randomised(their_clip(transformers, config), 0)
    ours = CLIP(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    # eos 2 is the old rule: the first of the highest ids ends a text. What follows the end is padding of any kind.
    ids = torch.tensor([[58, 5, 59, 9, 49, 0, 0, 0], [1, 59, 49, 49, 49, 49, 49, 49], [58, 57, 3, 2, 49, 59, 59, 59]])
    images = torch.rand(2, 3, *[config.image_size] * 2, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=(images - mean) / std)
        hidden = theirs.text_model(input_ids=ids).last_hidden_state
        image, text = ours.encode_image(images), ours.encode_text(ids)
        assert max_diff(image, expected.image_embeds) <= 1e-5
        assert max_diff(text, expected.text_embeds) <= 1e-5
        assert max_diff(ours.context(ids), hidden) <= 1e-5
        # What Stable Diffusion 2.x takes of a whole encoder: the layer before the last, through the final norm.
        second = CLIP(replace(config, context_skip=1))
        second.load_state_dict(theirs.state_dict())
        states = theirs.text_model(input_ids=ids, output_hidden_states=True).hidden_states
        before_last = theirs.text_model.final_layer_norm(states[-2])
        assert max_diff(second.context(ids), before_last) <= 1e-5 < max_diff(before_last, hidden)
        assert max_diff(ours.logit_scale.exp() * image @ text.T, expected.logits_per_image) <= 1e-5


@parametrize("config", [CLIPConfig(), SMALL_CLIP], ids=["ViT-B/32", "small preset"])
def test_clip_has_the_layers_of_transformers(transformers, config):
    with torch.device("meta"):
        ours, theirs = CLIP(config), their_clip(transformers, config)
    assert layers(ours) == layers(theirs) and PUBLISHED <= layers(ours).keys()


def test_clip_loads_old_files_that_carry_position_ids():
    ours, state = CLIP(TINY_CLIP), randomised(CLIP(TINY_CLIP), 3).state_dict()
    old = state | {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}
    ours.load_state_dict(old, strict=True)
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
    with pytest.raises(RuntimeError, match="text_model.embeddings.unheard_of"):
        ours.load_state_dict(old | {"text_model.embeddings.unheard_of": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------ DDIM

each_betas = parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
each_spacing = parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])


def schedules(diffusers, config: ScheduleConfig):
    return Schedule(config), diffusers.DDIMScheduler(**asdict(config), clip_sample=False)


@each_betas
def test_schedule_tables_agree_with_diffusers(diffusers, betas):
    for to_one in (True, False):
        ours, theirs = schedules(diffusers, ScheduleConfig(beta_schedule=betas, set_alpha_to_one=to_one))
        assert max_diff(ours.betas, theirs.betas) <= 1e-7
        # Relative, because abar falls to 1e-9; theirs is a product of a thousand single-precision factors.
        assert max_diff(theirs.alphas_cumprod / ours.abar, torch.ones(1000)) <= 5e-5
        assert max_diff(ours.final_abar, theirs.final_alpha_cumprod) <= 1e-7


@each_spacing
def test_timesteps_agree_with_diffusers(diffusers, spacing, offset):
    ours, theirs = schedules(diffusers, ScheduleConfig(timestep_spacing=spacing, steps_offset=offset))
    for steps in [*range(1, 101), 144, 333, 500, 999]:  # rounding ties at 27, 31, 48, 96, 144 among them
        theirs.set_timesteps(steps)  # its "trailing" sometimes appends time -1
        assert ours.timesteps(steps).tolist() == theirs.timesteps[:steps].tolist(), steps


@parametrize("prediction", ["epsilon", "v_prediction"])
@parametrize("to_one", [True, False])
@each_spacing
@each_betas
def test_ddim_step_has_diffusers_mean_and_variance(diffusers, betas, spacing, offset, to_one, prediction):
    config = ScheduleConfig(1000, betas, 0.00085, 0.012, prediction, spacing, offset, to_one)
    ours, theirs = schedules(diffusers, config)
    theirs.set_timesteps(7)
    t = theirs.timesteps
    t_prev = t - 1000 // 7  # diffusers' rule, with every spacing; ours is told where the step goes
    x, output = torch.randn(2, len(t), 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def check(x, output, tolerance: float):  # relative: at t = 999 of the cosine schedule means reach 1e4
        for eta in (0.0, 0.5, 1.0):
            for z in (0, 1):  # without noise the mean, with ones the mean and sigma
                noise = torch.full_like(x, z)
                drawn, _ = ddim_step(ours, output, x, t, t_prev, eta=eta, noise=noise)
                for i in range(7):
                    expected = theirs.step(output[i], t[i], x[i], eta=eta, variance_noise=noise[i]).prev_sample
                    assert max_diff(drawn[i], expected) <= tolerance * max(1, expected.abs().max().item())

    # Their single-precision tables cost 5e-5 at t = 999 of the cosine schedule (1e-5 and less elsewhere) ...
    check(x.float(), output.float(), 2e-4)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = ours.abar, ours.final_abar  # ... and nothing in double
    check(x, output, 1e-12)


@each_betas
def test_noising_and_velocity_agree_with_diffusers(diffusers, betas):
    ours, theirs = schedules(diffusers, ScheduleConfig(beta_schedule=betas, prediction_type="v_prediction"))
    t = torch.arange(1000)
    x, noise = torch.randn(2, 1000, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def check(x, noise, tolerance: float):
        assert max_diff(add_noise(ours, x, noise, t), theirs.add_noise(x, noise, t)) <= tolerance
        assert max_diff(target(ours, x, noise, t), theirs.get_velocity(x, noise, t)) <= tolerance

    check(x.float(), noise.float(), 2e-5)  # near t = 0 they round abar before they take the root of 1 − abar
    theirs.alphas_cumprod = ours.abar
    check(x, noise, 1e-12)


@parametrize("schedule", [ScheduleConfig(), SMALL_SCHEDULE], ids=["epsilon, leading", "small preset"])
@parametrize("guidance", [1.0, 3.0])
def test_rollout_is_a_plain_diffusers_loop_at_eta_0(diffusers, schedule, guidance):
    unet = randomised(UNet(tiny_unet(CROSS, PLAIN, in_channels=9)), 0)
    theirs = diffusers.UNet2DConditionModel(**asdict(unet.config))
    theirs.load_state_dict(unet.state_dict())
    ours, scheduler = schedules(diffusers, schedule)
    g = torch.Generator().manual_seed(4)
    empty, context = torch.randn(2, 2, 7, 24, generator=g)
    mask, masked = (torch.rand(2, 1, 8, 8, generator=g) < 0.5).float(), torch.randn(2, 4, 8, 8, generator=g)
    condition = Condition(context, mask, masked, empty)
    kw = {"steps": 10, "eta": 0.0, "guidance": guidance}
    latents = rollout(unet, ours, condition, shape=(4, 8, 8), generator=g, **kw).latents
    scheduler.set_timesteps(10)
    x = latents[:, 0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            sample = torch.cat([x, mask, masked], dim=1)
            without, given = theirs(torch.cat([sample] * 2), t, torch.cat([empty, context])).sample.chunk(2)
            x = scheduler.step(without + guidance * (given - without), t, x, eta=0.0).prev_sample
    assert max_diff(latents[:, -1], x) <= 1e-4 * x.abs().max().item()
