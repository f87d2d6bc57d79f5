"""The parts of one model together: texts without a picture, networks without inpainting channels, batches, KL."""

import shutil
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from minipref.data.prompts import Prompts, outpainting_masks, text_prompts
from minipref.diffusion import sample_generators
from minipref.models.unet import UNet
from minipref.pipeline import SHIPPED, Pipeline, Sampling
from minipref.presets import SMALL_SCHEDULE, SMALL_UNET
from minipref.runs import held_out_prompts
from minipref.runtime import checkpoint
from minipref.toy.world import prompt_source

TEXTS = ["a red circle", "a small blue star on a white background", ""]
# A network that knows texts alone: no mask, no masked picture.
TEXT_UNET = replace(SMALL_UNET, in_channels=12, block_out_channels=(8, 8, 8), norm_num_groups=4)
QUICK = Sampling(3, eta=1.0, guidance=2.0)


@pytest.fixture(scope="module")
def shipped():
    return Pipeline.load(None)


@pytest.fixture(scope="module")
def text_only(shipped):
    torch.manual_seed(0)
    return replace(shipped, unet=UNet(TEXT_UNET).eval())


def full_holes(texts):
    """The same texts under a mask of ones over a grey picture."""
    grey, ones = torch.full((len(texts), 3, 32, 32), 0.5), torch.ones(len(texts), 1, 32, 32)
    return Prompts(grey, ones, texts, ["full"] * len(texts))


def test_texts_alone_are_to_an_inpainting_network_one_large_hole(shipped):
    """Bit for bit the condition of a mask of ones over a grey picture, and the same pictures from the same noise."""
    prompts, masked = text_prompts(TEXTS), full_holes(TEXTS)
    assert shipped.inpaints and prompts.images is prompts.masks is prompts.truth is None
    found, expected = shipped.condition(prompts), shipped.condition(masked)
    for name in ("context", "empty", "mask", "masked"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.mask.shape == (3, 4, 16, 16) and found.mask.min() == 1 and found.masked.abs().max() == 0
    assert shipped.latent_shape(prompts) == shipped.latent_shape(masked) == (12, 16, 16)
    images = [shipped.complete(shipped.unet, p, QUICK, seed=1, stream="sample") for p in (prompts, masked)]
    assert torch.equal(*images)


def test_a_network_without_inpainting_channels_sees_the_noisy_latent_alone(text_only):
    seen, prompts = [], text_prompts(TEXTS)
    condition = text_only.condition(prompts)
    assert not text_only.inpaints and condition.mask is condition.masked is None and condition.empty is not None
    handle = text_only.unet.register_forward_pre_hook(lambda unet, args: seen.append(args[0]))
    trajectory = text_only.rollout(text_only.unet, prompts, QUICK, 7, "sample", range(3))
    images = text_only.complete(text_only.unet, prompts, QUICK, seed=7, stream="sample")
    handle.remove()
    assert torch.equal(images, text_only.decode(trajectory, prompts))
    noise = torch.stack([torch.randn(4, 12, 16, 16, generator=g) for g in sample_generators(7, "sample", range(3))])
    assert torch.equal(seen[0], torch.cat([noise[:, 0]] * 2))  # guided: both branches
    for i in range(3):
        assert torch.equal(seen[i], torch.cat([trajectory.latents[:, i]] * 2))
    assert images.shape == (3, 3, 32, 32) and 0 <= images.min() < images.max() <= 1
    again = text_only.complete(text_only.unet, prompts, Sampling(3, 1.0, 1.0), seed=7, stream="sample")
    assert not torch.equal(again, images)  # the text is read


def test_a_network_without_inpainting_channels_takes_full_holes_and_refuses_others(text_only):
    texts, full = text_prompts(TEXTS), full_holes(TEXTS)
    condition = text_only.condition(full)
    assert condition.mask is None and torch.equal(condition.context, text_only.condition(texts).context)
    pictures = [text_only.complete(text_only.unet, p, QUICK, seed=1, stream="test") for p in (texts, full)]
    assert torch.equal(*pictures)
    full.masks[1, 0, 3, 3] = 0  # a single known pixel
    with pytest.raises(ValueError, match="no inpainting channels: it draws from texts and cannot fill a hole"):
        text_only.condition(full)


def test_a_folder_may_hold_a_network_without_inpainting_channels(tmp_path):
    meta = {"schedule": asdict(SMALL_SCHEDULE)}
    shutil.copy(SHIPPED / "clip.pt", tmp_path)
    checkpoint.save(tmp_path / "unet.pt", "unet", TEXT_UNET, UNet(TEXT_UNET).state_dict(), meta=meta)
    pipe = Pipeline.load(tmp_path)
    assert not pipe.inpaints and pipe.image_size == 32 and pipe.folder == tmp_path
    assert pipe.complete(pipe.unet, text_prompts(TEXTS), QUICK, seed=0, stream="sample").shape == (3, 3, 32, 32)
    for channels in (13, 24, 40):
        odd = replace(TEXT_UNET, in_channels=channels)
        checkpoint.save(tmp_path / "unet.pt", "unet", odd, UNet(odd).state_dict(), meta=meta)
        with pytest.raises(ValueError, match=rf"with {channels} channels in .* need 28 \(or 12 for texts\) and 80"):
            Pipeline.load(tmp_path)


def test_prompts_of_texts_alone_are_selected_and_repeated_like_others():
    prompts = text_prompts(TEXTS)
    twice, part = prompts.repeat_each(2), prompts.select(slice(1, 3))
    assert len(prompts) == 3 and part.texts == TEXTS[1:] and part.images is part.masks is None
    assert twice.texts == [t for t in TEXTS for _ in range(2)] and twice.kinds == ["full"] * 6
    drawn = torch.rand(3, 3, 32, 32)
    assert prompts.paste_known(drawn) is drawn  # nothing is known
    for images, masks in ((drawn, None), (None, drawn[:, :1]), (drawn[:2], drawn[:2, :1])):
        with pytest.raises(ValueError, match="Prompts: images"):
            Prompts(images, masks, TEXTS, ["full"] * 3)


def test_texts_are_encoded_as_the_tokenizer_and_the_text_tower_say(shipped):
    for texts in (TEXTS, ["a red circle"] * 3, ["", "", ""]):
        condition = shipped.condition(text_prompts(texts))
        for found, words in ((condition.context, texts), (condition.empty, [""] * 3)):
            expected = torch.cat([shipped.clip.context(shipped.tokenizer([t])) for t in words])
            assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


def test_a_completion_depends_on_its_number_not_on_its_batch(shipped):
    """Chunks of other sizes round differently in the network, no more; a later part has its own numbers."""
    prompts = prompt_source("held out", 0, 32)(0, 5)
    kw = {"seed": 3, "stream": "curves"}
    whole = shipped.complete(shipped.unet, prompts, Sampling(3), **kw)
    for size in (1, 2, 3):
        assert torch.allclose(
            shipped.complete(shipped.unet, prompts, Sampling(3), batch_size=size, **kw), whole, atol=1e-4
        )
    later = shipped.complete(shipped.unet, prompts.select(slice(2, 5)), Sampling(3), first=2, **kw)
    assert torch.allclose(later, whole[2:], atol=1e-4)
    known = (prompts.masks < 0.5).expand_as(whole)
    assert torch.equal(whole[known], prompts.images[known])  # bit for bit


def test_kl_to_the_base_is_that_of_means_apart_by_a_known_distance(shipped):
    """A network whose output is off by d moves each step's mean by k_out·d: KL = sum of n·(k_out·d)²/(2·sigma²)."""
    prompts, sampling, d = prompt_source("held out", 0, 32)(0, 2), Sampling(4, eta=0.7), 0.01
    kl = shipped.kl_to_base(lambda *args: shipped.unet(*args) + d, prompts, sampling, seed=0)
    times = shipped.schedule.timesteps(4)
    _, k_out, sigma = shipped.schedule.coefficients(times, torch.cat([times[1:], torch.tensor([-1])]), 0.7)
    terms = [12 * 16 * 16 * (k * d) ** 2 / (2 * s**2) for k, s in zip(k_out.tolist(), sigma.tolist()) if s > 0]
    assert len(terms) == 3 and kl.shape == (2,) and kl.tolist() == pytest.approx([sum(terms)] * 2, rel=1e-3)
    assert shipped.kl_to_base(shipped.unet, prompts, sampling, seed=0).tolist() == [0, 0]

    empty = shipped.context([""])

    def with_text(x, t, context):
        """Off by d where there is a text: guided by 3, off by 3·d."""
        named = (context != empty).flatten(1).any(1)[:, None, None, None]
        return shipped.unet(x, t, context) + d * named

    texts = text_prompts(["a red circle"] * 2)
    kl = shipped.kl_to_base(with_text, texts, Sampling(4, eta=0.7, guidance=3.0), seed=0)
    assert kl.tolist() == pytest.approx([9 * sum(terms)] * 2, rel=1e-3)


def test_held_out_pictures_are_the_runs_under_the_masks_of_its_held_out_world(tmp_path):
    """Of ten pictures every fifth, in turn, from number 2 on; masks are those of the world that the run names."""
    pixels = torch.arange(10).mul(20).byte()[:, None, None, None].expand(10, 32, 32, 3)
    for i, x in enumerate(pixels):
        Image.fromarray(x.numpy().copy()).save(tmp_path / f"{i}.png")
    found = held_out_prompts({"data": str(tmp_path), "held_out": 3}, 32, None, 1, 3)
    masks, kinds = outpainting_masks(5 * 1_000_003 + 3, 1, 3, 32)
    assert [round(float(x.mean()) * 255 / 20) for x in found.images] == [9, 4, 9]
    assert torch.equal(found.masks, masks) and found.kinds == kinds
