"""The parts of one model together: weights, schedule, codec, text. What every script starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data.prompts import Prompts
from .diffusion import Condition, Schedule, ScheduleConfig, Trajectory, replay, rollout, sample_generators
from .losses import gaussian_kl
from .models.autoencoder import SpaceToDepth
from .models.clip import CLIP, CLIPConfig
from .models.tokenizer import WordTokenizer
from .models.unet import UNet, UNetConfig
from .runtime import checkpoint
from .runtime.runlog import progress

SHIPPED = Path(__file__).parent / "weights" / "small"


def load_clip(path: str | Path) -> tuple[CLIP, WordTokenizer]:
    """-> CLIP in eval mode, frozen, and its tokenizer."""
    config, state, meta = checkpoint.load(path, "clip")
    clip = checkpoint.build(CLIPConfig, CLIP, config, state, path).requires_grad_(False)
    assert isinstance(clip, CLIP)
    words = meta.get("words")
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(w, str) for w in words):
        raise ValueError(f"{path}: does not hold the words of its tokenizer")
    try:
        tokenizer = WordTokenizer(words)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if len(tokenizer) != clip.config.vocab_size:  # every id would mean another word, or none
        raise ValueError(f"{path}: lists words for {len(tokenizer)} ids, its text encoder has {clip.config.vocab_size}")
    return clip, tokenizer


def load_unet(path: str | Path) -> tuple[UNet, Schedule, dict]:
    """-> UNet in eval mode, the noise schedule that it was trained with, and what else its file says."""
    config, state, meta = checkpoint.load(path, "unet")
    try:
        schedule = Schedule(checkpoint.configured(ScheduleConfig, meta.get("schedule"), "meta"))
    except (TypeError, ValueError) as e:
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
    folder: Path  # where the weights lie; reward.pt may lie there, too
    fingerprint: str  # of unet.pt: a run says which base model it started from
    meta: dict  # what unet.pt says of itself

    @staticmethod
    def load(weights: str | Path | None, device: str = "cpu") -> Pipeline:
        """The model in a folder with unet.pt and clip.pt; the shipped small one where none is named."""
        folder, on = Path(weights or SHIPPED), pick_device(device)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder of weights; `python -m minipref pretrain --small` makes one"
            )
        unet, schedule, meta = load_unet(folder / "unet.pt")
        clip, tokenizer = load_clip(folder / "clip.pt")
        check_text(meta, clip, folder / "clip.pt", folder / "unet.pt")
        c, codec = unet.config, SpaceToDepth.with_channels(unet.config.out_channels)
        inpainting, width = 2 * codec.channels + codec.mask_channels, clip.config.text_hidden_size
        if c.in_channels not in (inpainting, codec.channels) or c.cross_attention_dim != width:
            raise ValueError(
                f"{folder / 'unet.pt'}: a UNet with {c.in_channels} channels in and texts of width "
                f"{c.cross_attention_dim}; its codec and clip.pt need {inpainting} (or {codec.channels} for texts) and "
                f"{width}"
            )
        unet.to(memory_format=torch.channels_last).to(on)  # type: ignore[call-overload]
        fingerprint = digest(folder / "unet.pt")
        return Pipeline(unet, schedule, codec, clip.to(on), tokenizer, on, folder, fingerprint, meta)

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that the model was trained on, in pixels."""
        return self.unet.config.sample_size * self.codec.factor

    @property
    def inpaints(self) -> bool:
        """Whether the UNet sees mask and masked picture; otherwise it knows texts alone."""
        return self.unet.config.in_channels > self.codec.channels

    @torch.no_grad()
    def context(self, texts: list[str]) -> Tensor:
        """The UNet's text condition (B, L, D); where all texts are the same, one row expanded."""
        once = texts[:1] if len(set(texts)) == 1 else texts
        return self.clip.context(self.tokenizer(once).to(self.device)).expand(len(texts), -1, -1)

    @torch.no_grad()
    def condition(self, prompts: Prompts) -> Condition:
        """Texts, holes and masked pictures, encoded once. Texts alone are one large hole to a UNet that inpaints."""
        context, without = self.context(prompts.texts), self.context([""] * len(prompts))
        if not self.inpaints:
            if prompts.masks is not None and not bool((prompts.masks > 0.5).all()):
                raise ValueError("this UNet has no inpainting channels: it draws from texts and cannot fill a hole")
            return Condition(context, empty=without)
        if prompts.images is None:
            masks = torch.ones(len(prompts), 1, self.image_size, self.image_size)
            masked = torch.full((len(prompts), 3, self.image_size, self.image_size), 0.5)
        else:
            masked, masks = prompts.masked, prompts.masks
        return Condition(
            context,
            self.codec.encode_mask(masks.to(self.device)),
            self.codec.encode(masked.to(self.device)),
            without,
        )

    def latent_shape(self, prompts: Prompts) -> tuple[int, int, int]:
        H, W = (self.image_size,) * 2 if prompts.images is None else prompts.images.shape[-2:]
        return self.codec.channels, H // self.codec.factor, W // self.codec.factor

    def complete(
        self,
        unet: UNet,
        prompts: Prompts,
        sampling: Sampling,
        *,
        seed: int,
        stream: int | str,
        batch_size: int = 64,
        first: int = 0,
    ) -> Tensor:
        """Completions (B, 3, H, W) in [0, 1] on the CPU, known pixels in place. Sample i's noise is that of
        (seed, stream, first + i), whatever `batch_size`, the number of pictures a pass, is."""
        images, starts = [], range(0, len(prompts), batch_size)
        for i in progress(starts, "completions", leave=False) if len(starts) > 2 else starts:
            part = prompts.select(slice(i, i + batch_size))
            indices = range(first + i, first + i + len(part))
            images.append(self.decode(self.rollout(unet, part, sampling, seed, stream, indices), part))
        return torch.cat(images)

    def rollout(
        self,
        unet: UNet,
        prompts: Prompts,
        sampling: Sampling,
        seed: int,
        stream: int | str,
        indices: Iterable[int],
        condition: Condition | None = None,
    ) -> Trajectory:
        """One rollout of `unet` for a batch of prompts; sample i's noise is that of (seed, stream, indices[i]).

        `condition`: that of the prompts, where it is at hand.
        """
        return rollout(
            unet,
            self.schedule,
            self.condition(prompts) if condition is None else condition,
            shape=self.latent_shape(prompts),
            steps=sampling.steps,
            eta=sampling.eta,
            guidance=sampling.guidance,
            generator=sample_generators(seed, stream, indices),
        )

    def decode(self, trajectory: Trajectory, prompts: Prompts) -> Tensor:
        """A rollout's last latents as pictures with the known pixels put back."""
        images = self.codec.decode(trajectory.latents[:, -1]).cpu()
        if not torch.isfinite(images).all():
            raise ValueError("the UNet made pictures of NaN: its weights are damaged or have diverged (lower --lr)")
        return prompts.paste_known(images)

    @torch.no_grad()
    def trajectory_kl(
        self, unet: UNet, trajectory: Trajectory, condition: Condition, samples: Tensor, sampling: Sampling
    ) -> Tensor:
        """KL(unet ‖ base) in nats along the trajectories of `samples` (M,), summed over dimensions and scored steps, in
        closed form for each: (M,) on the CPU."""
        total = torch.zeros(len(samples))
        for step in trajectory.scored.nonzero()[:, 0]:
            steps, settings = step.expand(len(samples)), {"eta": sampling.eta, "guidance": sampling.guidance}
            (_, mean, sigma), (_, mean_base, _) = (
                replay(model, self.schedule, trajectory, condition, samples, steps, **settings)
                for model in (unet, self.unet)
            )
            total += gaussian_kl(mean, mean_base, sigma).cpu()
        return total

    @torch.no_grad()
    def kl_to_base(self, aligned: UNet, prompts: Prompts, sampling: Sampling, *, seed: int) -> Tensor:
        """KL(aligned ‖ base) of whole rollouts of `aligned` in nats, (B,)."""
        condition, indices = self.condition(prompts), range(len(prompts))
        trajectory = self.rollout(aligned, prompts, sampling, seed, "kl", indices, condition)
        return self.trajectory_kl(aligned, trajectory, condition, torch.arange(len(prompts)), sampling)


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
