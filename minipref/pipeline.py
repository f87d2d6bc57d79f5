"""The parts of one inpainting model together: weights, schedule, codec, text. What every script starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data.prompts import Prompts
from .diffusion import Condition, Schedule, ScheduleConfig, Trajectory, rollout, sample_generators
from .models.clip import CLIP, CLIPConfig
from .models.codec import SpaceToDepth
from .models.tokenizer import WordTokenizer
from .models.unet import UNet, UNetConfig
from .presets import SMALL_CODEC
from .rewards import LearnedReward
from .runtime import checkpoint
from .runtime.runlog import progress

SHIPPED = Path(__file__).parent / "weights" / "small"


def load_clip(path: str | Path) -> tuple[CLIP, WordTokenizer]:
    """-> CLIP in eval mode, frozen, and its tokenizer."""
    config, state, meta = checkpoint.load(path, "clip")
    clip = checkpoint.build(CLIPConfig, CLIP, config, state, path).requires_grad_(False)
    assert isinstance(clip, CLIP)
    if not meta.get("words"):
        raise ValueError(f"{path}: does not hold the words of its tokenizer")
    return clip, WordTokenizer(meta["words"])


def load_unet(path: str | Path) -> tuple[UNet, Schedule, dict]:
    """-> UNet in eval mode, the noise schedule that it was trained with, and what else its file says."""
    config, state, meta = checkpoint.load(path, "unet")
    try:
        schedule = Schedule(ScheduleConfig(**meta["schedule"]))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: does not say which noise schedule its UNet was trained with ({e})") from None
    unet = checkpoint.build(UNetConfig, UNet, config, state, path)
    assert isinstance(unet, UNet)
    return unet, schedule, meta


@dataclass(frozen=True)
class Sampling:
    """How to sample: T DDIM steps, their noise eta (0 none, 1 the DDPM's), classifier-free guidance scale."""

    steps: int
    eta: float = 1.0
    guidance: float = 1.0


@dataclass
class Pipeline:
    unet: UNet
    schedule: Schedule
    codec: SpaceToDepth
    clip: CLIP
    tokenizer: WordTokenizer
    device: torch.device
    fingerprint: str  # of unet.pt: a run says which base model it started from
    meta: dict  # what unet.pt says of itself

    @staticmethod
    def load(weights: str | Path | None, device: str = "cpu") -> Pipeline:
        """The model in a folder with unet.pt and clip.pt; the shipped small one where none is named."""
        folder, where = Path(weights or SHIPPED), pick_device(device)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder of weights; `python -m minipref pretrain --small` makes one"
            )
        unet, schedule, meta = load_unet(folder / "unet.pt")
        clip, tokenizer = load_clip(folder / "clip.pt")
        check_text(meta, clip, folder / "clip.pt", folder / "unet.pt")
        c, codec = unet.config, SMALL_CODEC
        expected = 2 * codec.channels + codec.mask_channels, codec.channels, clip.config.text_hidden_size
        if (c.in_channels, c.out_channels, c.cross_attention_dim) != expected:
            raise ValueError(
                f"{folder / 'unet.pt'}: a UNet with {c.in_channels} channels in, {c.out_channels} out, texts of width "
                f"{c.cross_attention_dim}; this codec and clip.pt need {expected[0]}, {expected[1]} and {expected[2]}"
            )
        unet.to(memory_format=torch.channels_last).to(where)  # type: ignore[call-overload]
        return Pipeline(unet, schedule, SMALL_CODEC, clip.to(where), tokenizer, where, digest(folder / "unet.pt"), meta)

    @torch.no_grad()
    def condition(self, prompts: Prompts) -> Condition:
        """Texts, holes and masked pictures, encoded once."""
        ids, empty = (self.tokenizer(t).to(self.device) for t in (prompts.texts, [""] * len(prompts)))
        masked, masks = prompts.masked.to(self.device), prompts.masks.to(self.device)
        return Condition(
            self.clip.context(ids), self.codec.encode_mask(masks), self.codec.encode(masked), self.clip.context(empty)
        )

    def latent_shape(self, prompts: Prompts) -> tuple[int, int, int]:
        H, W = prompts.images.shape[-2:]
        return self.codec.channels, H // self.codec.factor, W // self.codec.factor

    def complete(
        self,
        unet: UNet,
        prompts: Prompts,
        how: Sampling,
        *,
        seed: int,
        epoch: int,
        batch: int = 64,
        first: int = 0,
    ) -> Tensor:
        """Completions (B, 3, H, W) in [0, 1] on the CPU, known pixels in place. Sample i's noise is that of
        (seed, epoch, first + i), whatever `batch`, the number of pictures a pass, is."""
        done, starts = [], range(0, len(prompts), batch)
        for i in progress(starts, "completions", leave=False) if len(starts) > 2 else starts:
            part = prompts.select(slice(i, i + batch))
            path = self.sample(unet, part, how, seed, epoch, range(first + i, first + i + len(part)))
            done.append(self.decode(path, part))
        return torch.cat(done)

    def sample(
        self,
        unet: UNet,
        prompts: Prompts,
        how: Sampling,
        seed: int,
        epoch: int,
        indices: Iterable[int],
        condition: Condition | None = None,
    ) -> Trajectory:
        """One rollout of `unet` for a batch of prompts; sample i's noise is that of (seed, epoch, indices[i]).

        `condition`: that of the prompts, where it is known already.
        """
        return rollout(
            unet,
            self.schedule,
            self.condition(prompts) if condition is None else condition,
            shape=self.latent_shape(prompts),
            steps=how.steps,
            eta=how.eta,
            guidance=how.guidance,
            generator=sample_generators(seed, epoch, indices),
        )

    def decode(self, path: Trajectory, prompts: Prompts) -> Tensor:
        """A rollout's last latents as pictures with the known pixels put back."""
        images = self.codec.decode(path.latents[:, -1]).cpu()
        if not torch.isfinite(images).all():
            raise ValueError("the UNet made pictures of NaN: its weights are damaged or have diverged (lower --lr)")
        return prompts.paste_known(images)


def check_text(meta: dict, clip: CLIP, path: Path, unet: str | Path) -> None:
    """A UNet understands the text encoder that it was trained with and no other."""
    if meta.get("clip", text_digest(clip)) != text_digest(clip):
        raise ValueError(f"{unet}: was trained with another clip.pt than {path}")


def text_digest(clip: CLIP) -> str:
    """Of the weights that the UNet's condition depends on; the rest of CLIP may be trained on."""
    whole = hashlib.sha256()
    for name, v in sorted(clip.context_state().items()):
        whole.update(name.encode() + v.detach().cpu().float().numpy().tobytes())
    return whole.hexdigest()[:16]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def learned_reward(weights: str | Path | None) -> LearnedReward:
    return LearnedReward.load(Path(weights or SHIPPED) / "reward.pt")


def pick_device(name: str) -> torch.device:
    """The device, or one line that says why it cannot be had."""
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: not available here; choose cpu, cuda or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: not available here ({str(e).splitlines()[0]})") from None
    return device
