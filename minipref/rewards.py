"""Every callable reward: small built-in ones, the learned one, CLIP, yours, weighted sums, and RPO's of a subject.

A reward is any callable `reward(images (B, 3, H, W) in [0, 1], prompts)` that returns a tensor (B,) or `Scores`; every
answer is checked. RPO's reward, of pictures of a subject:

    I          mean over references of (cos(f(x), f(ref)) + 1)/2     likeness to the subject, 0 to 1
    T          (cos(f(x), g(c)) + 1)/2                               likeness to the prompt, 0 to 1
    r          1 / (lam/I + (1 − lam)/T), lambda-harmonic             (RPO Eq. 5)
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.prompts import Prompts
from .models.tokenizer import SUBJECT
from .reward_model import LearnedReward, Scores
from .runtime.foreign import ForeignError, foreign_code

if TYPE_CHECKING:
    from .pipeline import Pipeline

Reward = Callable[[Tensor, Prompts], "Tensor | Scores"]

# ------------------------------------------------------------------------------------------------ built-in rewards


def brightness(images: Tensor, prompts: Prompts) -> Tensor:
    """Mean luma (Rec. 601) of the whole picture, 0 to 1."""
    return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2))


def jpeg_size(images: Tensor, prompts: Prompts) -> Tensor:
    """Kilobytes of the picture as a JPEG of quality 95 (DDPO's incompressibility)."""
    sizes = []
    for x in (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(x)).save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_small(images: Tensor, prompts: Prompts) -> Tensor:
    """Minus `jpeg_size` (DDPO's compressibility)."""
    return -jpeg_size(images, prompts)


class ClipReward:
    """Cosine similarity to a text, or to each prompt's own text where none is given, −1 to 1."""

    def __init__(self, clip, tokenizer, text: str | None = None):
        if text and (unknown := tokenizer.unknown(text)):
            raise ValueError(f"the text {text!r} has words that the CLIP-like encoder never saw: {', '.join(unknown)}")
        self.clip, self.tokenizer, self.text = clip, tokenizer, text

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Prompts) -> Tensor:
        texts = prompts.texts if self.text is None else [self.text] * len(images)
        if not all(texts):
            raise ValueError("prompts without a text; name one: --reward 'clip:a red circle on a blue background'")
        device = self.clip.logit_scale.device
        image, text = self.clip.encode_image(images.to(device)), self.clip.encode_text(self.tokenizer(texts).to(device))
        return (image * text).sum(1).cpu()


BUILT_IN: dict[str, Reward] = {
    "brightness": brightness,
    "jpeg_size": jpeg_size,
    "jpeg_small": jpeg_small,
}


def load_reward(
    name: str,
    pipeline: Pipeline,
    extra: dict[str, Reward] | None = None,
    *,
    batch_size: int = 64,
    imports: bool = True,
) -> CheckedReward:
    """The reward that `--reward` names, checked: "model" (the trained one of the pipeline's weights), "model:RUN" (of a
    run of train_reward.py), "clip:TEXT" (the pipeline's encoder), a built-in or one of `extra` (the toy's "gold"), a
    weighted sum such as "0.7*model+0.3*brightness", or "package.module:function".

    `batch_size`: the most pictures that it is given at a time. `imports`: False where the name comes from a file, not
    from who sits here: then nothing is imported.
    """
    return CheckedReward(name, _load(name, pipeline, BUILT_IN | (extra or {}), batch_size, imports), batch_size)


def _load(name: str, pipeline: Pipeline, built_in: dict[str, Reward], batch_size: int, imports: bool) -> Reward:
    terms = [t.strip() for t in re.split(r"(?<![0-9.][eE])\+", name)]  # 1e+3 is a number
    whole = name.startswith("model:") and Path(name[6:].strip()).exists()  # a folder may have a + in its name
    if (len(terms) > 1 or "*" in name) and not whole:
        return _weighted_sum(terms, lambda term: _load(term, pipeline, built_in, batch_size, imports), batch_size)
    if name == "model":
        path = pipeline.folder / "reward.pt"
        if not path.is_file():
            make = f"python train_reward.py --small --weights {shlex.quote(str(pipeline.folder))} --out RUN"
            raise FileNotFoundError(f"{path}: no reward model lies there; `{make}` makes one for --reward model:RUN")
        return LearnedReward.load(path)
    if name.startswith("model:"):
        path = Path(name[6:].strip())
        return LearnedReward.load(path / "reward.pt" if path.is_dir() else path)
    if name.startswith("clip:"):
        return ClipReward(pipeline.clip, pipeline.tokenizer, name[5:].strip())
    if name in built_in:
        return built_in[name]
    if ":" not in name:
        names = ", ".join(["model", "model:RUN", "clip:TEXT", *built_in])
        raise ValueError(f"--reward {name}: unknown; choose {names}, or yours as package.module:function")
    if not imports:
        raise ValueError(f"the run's reward is a function, {name}: say by --reward that it may be imported")
    return import_function("--reward", name)


def import_function(flag: str, name: str) -> Callable:
    """The function that "package.module:function" names; the folder that the user stands in counts as importable."""
    module, _, attribute = name.partition(":")
    module = module.removesuffix(".py")
    if os.getcwd() not in sys.path:  # a script's own folder is on the path, the user's is not
        sys.path.insert(0, os.getcwd())
    try:
        with foreign_code():
            function = getattr(importlib.import_module(module), attribute)
    except ForeignError as e:  # whatever the user's module does when it is imported
        raise ValueError(f"{flag} {name}: cannot be imported ({e}); run from the folder that holds it") from None
    if not callable(function):
        raise ValueError(f"{flag} {name}: is no function")
    return function


def _weighted_sum(terms: list[str], load: Callable[[str], Reward], batch_size: int) -> Reward:
    parsed: list[tuple[float, CheckedReward]] = []
    for term in terms:
        weight, star, rest = term.partition("*")
        try:
            factor = float(weight) if star else 1.0
            if not math.isfinite(factor):
                raise ValueError
        except ValueError:
            reason = f"{weight.strip()!r} is no number; join terms by +, as in model+-2*brightness"
            raise ValueError(f"--reward term {term!r}: {reason}") from None
        inner = rest.strip() if star else term
        try:
            parsed.append((factor, CheckedReward(inner, load(inner), batch_size)))
        except ValueError as e:
            raise ValueError(f"--reward term {term!r}: {e}") from None

    def total(images: Tensor, prompts: Prompts) -> Scores:
        scored = [(w, r(images, prompts)) for w, r in parsed]
        column = {k: [(w, s.parts[k]) for w, s in scored if k in s.parts] for k in ("bound", "trusted", "norm")}
        parts = {"norm": column["norm"][0][1]} if len(column["norm"]) == 1 else {}  # norms of two models do not add
        if column["bound"]:  # |sum of w·error| ≤ sum of |w|·bound
            parts["bound"] = torch.stack([abs(w) * v for w, v in column["bound"]]).sum(0)
        if column["trusted"]:  # a sum is trusted where every term is
            parts["trusted"] = torch.stack([v for _, v in column["trusted"]]).amin(0)
        weights = [s.trust for _, s in scored if s.trust is not None]
        value = torch.stack([w * s.value for w, s in scored]).sum(0)
        return Scores(value, torch.stack(weights).amin(0) if weights else None, parts)

    return total


LARGEST = 1e15  # reward: squares of it are numbers, too


class CheckedReward:
    """A reward whose every answer is checked: shape (B,), finite numbers, and at first a difference between pictures.

    It gets copies of what it judges, at most `batch_size` pictures at a time, and changes nothing outside itself. Later
    a constant is no fault: a reward of "solved or not" becomes one when all is solved.
    """

    def __init__(self, name: str, reward: Reward, batch_size: int = 64):
        self.name, self.reward, self.batch_size, self.told_apart = name, reward, batch_size, False

    def __call__(self, images: Tensor, prompts: Prompts) -> Scores:
        parts = [slice(i, i + self.batch_size) for i in range(0, len(images), self.batch_size)]
        chunks = [self._answer(images[at], prompts.select(at)) for at in parts]
        value = torch.cat([c.value for c in chunks])
        trusts = [c.trust for c in chunks if c.trust is not None]
        keys = [k for k in chunks[0].parts if all(k in c.parts for c in chunks)]
        if len(value) > 1 and not self.told_apart:
            self.told_apart = bool((value != value[0]).any())
        if len(value) > 1 and not self.told_apart:
            raise ValueError(
                f"reward {self.name}: gave all {len(value)} pictures the value {value[0].item():g}: nothing to learn"
            )
        columns = {k: torch.cat([c.parts[k] for c in chunks]) for k in keys}
        return Scores(value, torch.cat(trusts) if len(trusts) == len(chunks) else None, columns)

    def try_out(self, images: Tensor, prompts: Prompts) -> None:
        """Judges as many pictures at a time as it ever will, so that what does not fit is known before a run starts."""
        at = [i % len(images) for i in range(max(len(images), self.batch_size))]
        self(images[at], prompts.select(at))

    def _answer(self, images: Tensor, prompts: Prompts) -> Scores:
        expected = f"expected {len(images)} finite real numbers, one per picture"
        try:
            with foreign_code():
                answer = self.reward(images.clone(), prompts)  # `select` has copied the prompts
        except ForeignError as e:
            raise ValueError(f"reward {self.name}: raised {e}; {expected}") from e
        scores = answer if isinstance(answer, Scores) else Scores(answer)

        def column(what: str, x: Any) -> Tensor:
            numbers, got = None, type(x).__name__
            with contextlib.suppress(Exception):  # whatever kind of list or tensor it is
                if isinstance(x, (list, tuple)):
                    x = torch.tensor(
                        [float(v.detach() if isinstance(v, Tensor) else v) for v in x], dtype=torch.float64
                    )
                elif isinstance(x, np.ndarray) and not np.iscomplexobj(x):
                    x = torch.from_numpy(np.array(x, dtype=np.float64))
                if isinstance(x, Tensor):
                    odd = x.is_complex() or x.layout != torch.strided
                    got = f"{x.dtype}, {x.layout}" if odd else str(tuple(x.shape))
                    if x.shape == (len(images),) and not odd:
                        numbers = x.detach().to("cpu", torch.float32, copy=True)  # a reward may use its buffer again
            if numbers is None:
                raise ValueError(f"reward {self.name}: {what} {got}; {expected}")
            if not torch.isfinite(numbers).all():
                raise ValueError(f"reward {self.name}: {what} NaN or infinity; {expected}")
            if numbers.abs().max() > LARGEST:
                raise ValueError(f"reward {self.name}: {what} numbers beyond {LARGEST:g}; scale it down")
            return numbers

        trust = None if scores.trust is None else column("returned a trust of", scores.trust)
        if trust is not None and trust.min() < 0:
            raise ValueError(f"reward {self.name}: returned a trust below 0, which would turn learning around")
        parts = {k: column(f"returned a part {k!r} of", v) for k, v in (scores.parts or {}).items()}
        return Scores(column("returned", scores.value), trust, parts)


AT_ONCE = 64  # pictures that a further image encoder is given


class ImageJudge:
    """A further image encoder, DINO for example: mean cosine of pictures and references (RPO Section 5)."""

    def __init__(self, name: str, references: Tensor):
        self.name, self.encoder = name, import_function("--image-encoder", name)
        self.references = self.embed(references)
        self.embed(references[[i % len(references) for i in range(AT_ONCE)]])  # as many as it ever gets

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, H, W) in [0, 1]."""
        try:
            with foreign_code():
                embedding = self.encoder(images.clone())
        except ForeignError as e:
            raise ValueError(f"--image-encoder {self.name}: raised {e}") from e
        D = self.references.shape[1] if hasattr(self, "references") else "D"
        real = isinstance(embedding, Tensor) and not embedding.is_complex()
        embedding = embedding.float().clone() if real else embedding
        fits = real and embedding.ndim == 2 and len(embedding) == len(images) and D in ("D", embedding.shape[1])
        if not (fits and embedding.isfinite().all() and embedding.norm(dim=1).gt(0).all()):
            what = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
            raise ValueError(
                f"--image-encoder {self.name}: gave {what}, expected ({len(images)}, {D}), finite and no row all zero"
            )
        return torch.nn.functional.normalize(embedding, dim=1)

    def __call__(self, images: Tensor) -> float:
        cosines = [self.embed(x) @ self.references.T for x in images.split(AT_ONCE)]
        return float(torch.cat(cosines).mean())


# ------------------------------------------------------------------------------------------------ RPO


def stripped(prompt: str) -> str:
    """The prompt without the subject's token: "a [V] dog" -> "a dog". No encoder has learned what [V] means."""
    return re.sub(r"\s+([,.;:!?])|\s+", lambda m: m[1] or " ", prompt.replace(SUBJECT, " ")).strip()


def likeness(cosine: Tensor) -> Tensor:
    """(cos + 1)/2: −1 … 1 -> 0 … 1, whatever rounding adds."""
    return ((cosine + 1) / 2).clamp(0, 1)


def harmonic(image: Tensor, text: Tensor, lam: float) -> Tensor:
    """1 / (lam/I + (1 − lam)/T), (B,) (RPO Eq. 5). lam 1 gives I, lam 0 gives T; between, I = 0 or T = 0 gives 0.

    Never above the arithmetic mean lam·I + (1 − lam)·T; for lam between 0 and 1 equal to it only where I = T.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"harmonic: lam={lam}; choose a weight from 0 to 1")
    if lam == 0:
        return text
    if lam == 1:
        return image
    return image * text / (lam * text + (1 - lam) * image).clamp(min=torch.finfo(image.dtype).tiny)


def arithmetic(image: Tensor, text: Tensor, lam: float) -> Tensor:
    """lam·I + (1 − lam)·T: the rival of the paper's ablation."""
    if not 0 <= lam <= 1:
        raise ValueError(f"arithmetic: lam={lam}; choose a weight from 0 to 1")
    return lam * image + (1 - lam) * text


class SubjectReward:
    """I and T of pictures of one subject. The references are encoded once; "[V]" never reaches the text tower."""

    def __init__(self, clip, tokenizer, references: Tensor, batch: int = 64):
        if len(references) == 0:
            raise ValueError("no reference pictures of the subject")
        self.clip, self.tokenizer, self.batch = clip, tokenizer, batch
        self.references = self.embed(references)  # (R, P), unit vectors

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        device = next(self.clip.parameters()).device
        return torch.cat([self.clip.encode_image(x.to(device)).cpu() for x in images.split(self.batch)])

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """Texts without "[V]", each different one encoded once: (B, P)."""
        texts = sorted({stripped(p) for p in prompts})
        device = next(self.clip.parameters()).device
        encoded = dict(zip(texts, self.clip.encode_text(self.tokenizer(texts).to(device)).cpu()))
        return torch.stack([encoded[stripped(p)] for p in prompts])

    def __call__(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [0, 1], B prompts -> I (B,), T (B,), each in [0, 1]."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
        x = self.embed(images)
        return likeness(x @ self.references.T).mean(1), likeness((x * self.read(prompts)).sum(1))

    def of_references(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """I and T of every reference under each of B prompts: (R, B) twice. I is the likeness to the other ones."""
        alike, R = likeness(self.references @ self.references.T), len(self.references)
        if R < 2:
            raise ValueError("one reference picture: there is no other to compare it with")
        I = (alike.sum(1) - alike.diagonal()) / (R - 1)
        return I[:, None].expand(-1, len(prompts)), likeness(self.references @ self.read(prompts).T)
