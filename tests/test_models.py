"""UNet, CLIP, tokenizer and codec by themselves; their equality with other libraries is in test_parity.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minipref.models.autoencoder import SpaceToDepth
from minipref.models.clip import CLIP, CLIPConfig, clip_loss
from minipref.models.tokenizer import BOS, EOS, PAD, UNK, WordTokenizer
from minipref.models.unet import GEGLU, Attention, UNet, UNetConfig, timestep_embedding
from minipref.presets import SMALL_CODEC, SMALL_SIZE, SMALL_UNET, small_clip

TOKENIZER = WordTokenizer("a red small blue white star circle on background".split())

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def test_the_unet_keeps_the_shape_of_its_latent_and_reads_time_and_text():
    unet = UNet(UNetConfig(**TINY)).eval()
    x, t, text = torch.randn(2, 4, 9, 7), torch.tensor([3, 800]), torch.randn(2, 5, 6)
    with torch.no_grad():
        y = unet(x, t, text)
        assert y.shape == x.shape
        assert not torch.allclose(y, unet(x, t.flip(0), text)) and not torch.allclose(y, unet(x, t, text.flip(0)))
        for i in range(2):  # samples do not see each other
            assert torch.allclose(y[i : i + 1], unet(x[i : i + 1], t[i : i + 1], text[i : i + 1]), atol=1e-5)


def test_every_parameter_of_the_unet_gets_a_gradient():
    unet = UNet(UNetConfig(**TINY))
    unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.randn(2, 5, 6)).square().sum().backward()
    assert not [n for n, p in unet.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


@pytest.mark.parametrize("size", [(8, 8), (10, 6), (9, 7)], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_checkpointing_a_block_changes_no_gradient(size, layers, monkeypatch):
    """Recomputed in the backward pass, each block reads the same skips again: equal bit for bit, at odd sizes too."""
    unet = UNet(UNetConfig(**TINY | {"layers_per_block": layers}))
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    calls, x, t, text = [], torch.randn(2, 4, *size), torch.tensor([3, 800]), torch.randn(2, 5, 6)

    def gradients():
        leaf = x.clone().requires_grad_()
        y = unet(leaf, t, text)
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *unet.parameters()])]

    for block in blocks:
        monkeypatch.setattr(block, "forward", counted(block.forward, calls))
    plain, once = gradients(), len(calls)
    for block in blocks:
        monkeypatch.setattr(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))
    recomputed = gradients()
    assert once == len(blocks) and len(calls) == once + 2 * once  # forward, and once more on the way back
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def counted(function, calls):
    def call(*args):
        calls.append(1)
        return function(*args)

    return call


def test_no_block_takes_anything_off_its_callers_list():
    unet, given = UNet(UNetConfig(**TINY)), []

    def hand_a_list(block, args):
        given.append((list(args[1]), list(args[1])))
        return args[0], given[-1][0], *args[2:]

    for block in unet.up_blocks:
        block.register_forward_pre_hook(hand_a_list)
    unet(torch.randn(1, 4, 10, 6), torch.tensor([3]), torch.randn(1, 5, 6))
    assert [len(skips) for skips, _ in given] == [2, 2]
    assert all(a is b for skips, before in given for a, b in zip(skips, before, strict=True))


@pytest.mark.parametrize(
    "x,t,text,message",
    [
        ((2, 3, 8, 8), (2,), (2, 5, 6), r"x is \(2, 3, 8, 8\), expected \(B, 4, h, w\)"),
        ((2, 4, 8, 8), (1,), (2, 5, 6), r"t is \(1,\), expected \(2,\)"),
        ((2, 4, 8, 8), (2,), (2, 5, 7), r"context is \(2, 5, 7\), expected \(2, L, 6\)"),
        ((2, 4, 8, 8), (2,), (1, 5, 6), r"context is \(1, 5, 6\)"),
    ],
)
def test_the_unet_refuses_shapes_that_do_not_fit(x, t, text, message):
    with pytest.raises(ValueError, match=message):
        UNet(UNetConfig(**TINY))(torch.zeros(x), torch.zeros(t), torch.zeros(text))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"block_out_channels": (8, 16, 16)}, "3 block_out_channels, 2 down and 2 up blocks"),
        ({"down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D")}, "unknown block type.*AttnDownBlock2D"),
        ({"mid_block_type": "other"}, "unknown block type"),
        ({"attention_head_dim": (2, 2, 2)}, "3 entries for 2 levels"),
        ({"norm_num_groups": 3}, "norm_num_groups=3"),
        ({"attention_head_dim": 5}, "into 5 heads"),
    ],
)
def test_a_wrong_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(UNetConfig(**{**TINY, **change}))


def test_attention_is_softmax_of_scaled_products():
    a = Attention(4, 6, heads=2).double()
    x, c = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = a.to_q(x)[0], a.to_k(c)[0], a.to_v(c)[0]
    heads = []
    for h in (slice(0, 2), slice(2, 4)):
        weights = torch.stack([torch.exp(q[i, h] @ k[:, h].T / 2**0.5) for i in range(3)])
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, h])
    assert torch.allclose(a(x, c)[0], a.to_out[0](torch.cat(heads, 1)), atol=1e-12)


def test_one_text_for_all_samples_is_read_like_copies_of_it():
    """Expanded, its keys and values are computed once; the same numbers, and the same gradients, as copies give."""
    unet, x, t = UNet(UNetConfig(**TINY)).eval(), torch.randn(3, 4, 10, 6), torch.tensor([3, 800, 40])
    text, found = torch.randn(1, 5, 6), []
    for context in (text.expand(3, -1, -1), text.repeat(3, 1, 1)):
        y = unet(x, t, context)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(unet.parameters()))])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found))
    rows, seen = torch.randn(3, 5, 6), []
    for module in (m for m in unet.modules() if isinstance(m, Attention) and m.to_k.in_features == 6):
        module.to_k.register_forward_hook(lambda m, args, output: seen.append(len(args[0])))
    with torch.no_grad():
        unet(x, t, text.expand(3, -1, -1)), unet(x, t, rows)
    assert seen == [1] * (len(seen) // 2) + [3] * (len(seen) // 2) and len(seen) == 8


def test_geglu_gates_the_first_half_with_gelu_of_the_second():
    layer = GEGLU(3, 2)
    x = torch.randn(4, 3)
    both = x @ layer.proj.weight.T + layer.proj.bias
    gate = both[:, 2:]
    assert torch.allclose(layer(x), both[:, :2] * gate * 0.5 * (1 + torch.erf(gate / 2**0.5)), atol=1e-6)


def test_time_is_embedded_by_cosines_then_sines_of_falling_frequencies():
    e = timestep_embedding(torch.tensor([0, 10]), 4)
    assert e[0].tolist() == [1, 1, 0, 0]
    expected = [
        torch.cos(torch.tensor(10.0)),
        torch.cos(torch.tensor(0.1)),
        torch.sin(torch.tensor(10.0)),
        torch.sin(torch.tensor(0.1)),
    ]
    assert torch.allclose(e[1], torch.stack(expected), atol=1e-5)
    flipped = timestep_embedding(torch.tensor([10]), 4, flip_sin_to_cos=False)
    assert torch.allclose(flipped[0], e[1][[2, 3, 0, 1]])
    assert timestep_embedding(torch.tensor([10]), 5).shape == (1, 5)


# ------------------------------------------------------------------------------------------------ CLIP


def test_pictures_and_captions_become_unit_vectors_of_one_space():
    clip, tokenizer = CLIP(small_clip(TOKENIZER)).eval(), TOKENIZER
    image = clip.encode_image(torch.rand(2, 3, 48, 40))  # any size
    text = clip.encode_text(tokenizer(["a red circle", "a blue star on a white background"]))
    assert image.shape == text.shape == (2, 64)
    for v in (image, text):
        assert torch.allclose(v.norm(dim=1), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), expected"):
        clip.encode_image(torch.rand(3, 32, 32))


def test_the_text_tower_looks_back_only():
    """A later word cannot change the state of an earlier one."""
    clip, tokenizer = CLIP(small_clip(TOKENIZER)).eval(), TOKENIZER
    a, b = clip.context(tokenizer(["a red circle", "a red star"]))
    assert torch.allclose(a[:3], b[:3], atol=1e-6) and not torch.allclose(a[3], b[3], atol=1e-3)


def test_the_condition_may_leave_out_the_last_layers():
    config = small_clip(TOKENIZER)
    clip, ids = CLIP(config).eval(), TOKENIZER(["a small blue star"])
    tower = clip.text_model
    x = tower.encoder.layers[0](tower.embeddings(ids), True)
    assert config.context_skip == 1 and config.text_layers == 2
    assert torch.allclose(clip.context(ids), tower.final_layer_norm(x), atol=1e-6)
    assert torch.allclose(tower.hidden(ids, 0), tower(ids)[0], atol=1e-6)
    assert torch.allclose(tower.hidden(ids, 2), tower.final_layer_norm(tower.embeddings(ids)), atol=1e-6)
    for skip in (-1, 3):
        with pytest.raises(ValueError, match=f"context_skip={skip}; the text tower has 2 layers"):
            replace(config, context_skip=skip)


def test_contrastive_loss_is_two_cross_entropies():
    image, text = (F.normalize(torch.randn(3, 5), dim=1) for _ in range(2))
    scale = torch.tensor(1.3)
    logits = torch.exp(scale) * image @ text.T
    rows = -sum(torch.log_softmax(logits[i], 0)[i] for i in range(3)) / 3
    columns = -sum(torch.log_softmax(logits[:, i], 0)[i] for i in range(3)) / 3
    assert clip_loss(image, text, scale).item() == pytest.approx(((rows + columns) / 2).item(), rel=1e-5)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        CLIPConfig(hidden_act="relu")


def test_old_files_with_position_ids_load():
    clip = CLIP(small_clip(TOKENIZER))
    state = clip.state_dict() | {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    clip.load_state_dict(state)


# ------------------------------------------------------------------------------------------------ tokenizer, codec


def test_a_caption_becomes_begin_words_end_padding():
    t = WordTokenizer(["a", "red", "circle"], max_length=8)
    assert len(t) == 4 + 4 + 3
    ids = t.encode("A red [V] circle!")
    a, red, circle, subject = t.index["a"], t.index["red"], t.index["circle"], t.index["[V]"]
    assert ids == [BOS, a, red, subject, circle, EOS, PAD, PAD]
    assert t.encode("zebra")[:3] == [BOS, UNK, EOS] and t.unknown("a zebra, [V2] [W]") == ["zebra", "[W]"]
    assert t.encode("a " * 20) == [BOS] + [a] * 6 + [EOS] and t([""]).tolist() == [[BOS, EOS] + [PAD] * 6]
    assert len({*t.index.values()}) == len(t) and EOS != 2
    with pytest.raises(ValueError, match="twice"):
        WordTokenizer(["a", "a"])


def test_space_to_depth_is_lossless_and_keeps_neighbours_together():
    codec, x = SpaceToDepth(2), torch.rand(2, 3, 8, 6)
    z = codec.encode(x)
    assert z.shape == (2, 12, 4, 3) and codec.channels == 12 and codec.mask_channels == 4
    assert torch.allclose(codec.decode(z), x, atol=1e-6) and z.min() >= -1 and z.max() <= 1
    assert torch.allclose(z[0, :4, 1, 2], 2 * x[0, 0, 2:4, 4:6].flatten() - 1)
    mask = (torch.rand(2, 1, 8, 6) > 0.5).float()
    assert torch.equal(F.pixel_shuffle(codec.encode_mask(mask), 2), mask)
    assert codec.decode(torch.full((1, 12, 1, 1), 3.0)).max() == 1
    with pytest.raises(ValueError, match="7×6"):
        codec.encode(torch.rand(1, 3, 7, 6))


def test_a_codec_is_known_by_the_channels_of_its_latents():
    for factor in (1, 2, 3, 4):
        codec = SpaceToDepth.with_channels(3 * factor**2)
        assert codec.factor == factor and codec.encode(torch.rand(1, 3, 12, 12)).shape[1] == 3 * factor**2
    for channels in (-12, 0, 1, 4, 13, 24):
        with pytest.raises(ValueError, match=f"latents of {channels} channels"):
            SpaceToDepth.with_channels(channels)


def test_the_small_preset_fits_together():
    codec, clip = SMALL_CODEC, small_clip(TOKENIZER)
    assert SMALL_UNET.in_channels == 2 * codec.channels + codec.mask_channels and SMALL_UNET.out_channels == 12
    assert SMALL_UNET.sample_size * codec.factor == SMALL_SIZE == clip.image_size == 32
    assert SMALL_UNET.cross_attention_dim == clip.text_hidden_size
    assert clip.vocab_size == len(TOKENIZER) and clip.max_position_embeddings == TOKENIZER.max_length
    assert clip.eos_token_id == EOS
