"""A few pictures of a subject -> a text-to-image model that places it anywhere (RPO).

    python train_rpo.py --small

The base model draws pictures for a few prompts. Each reference is labelled better than a drawn picture with a
probability that their rewards give. The UNet learns the references (similarity loss) and the preference (Bradley-Terry
loss), and the lambda-harmonic reward on validation prompts decides which step to keep.
"""
# `main` is the algorithm; below it stand the checks, the subject, and the final comparison.

from __future__ import annotations

from minipref.runtime.config import check_pictures, opt, parse, printable, run_main  # isort: skip  (first: it answers Ctrl-C)
import copy
import time
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minipref.data.prompts import text_prompts
from minipref.data.subjects import Subject, SubjectPrompt, instance_prompt, load_prompts, photo_subject
from minipref.diffusion import Schedule, add_noise, predict, target
from minipref.figures import rpo_curves, rpo_grid
from minipref.kernels import preference_loss_from_predictions
from minipref.losses import denoising_loss, preference_label
from minipref.pipeline import Pipeline, Sampling
from minipref.rewards import ImageJudge, SubjectReward, arithmetic, harmonic, stripped
from minipref.runs import RENAMED, absolute, load_pipeline
from minipref.runtime import checkpoint
from minipref.runtime.runlog import RunFolder, peak_memory_mb, progress
from minipref.toy import judge as toy_judge
from minipref.toy import subjects as toy_subjects

SCRIPT = "train_rpo.py"


@dataclass(frozen=True)
class RPOConfig:
    preset: str = opt("", "named set of values; flags override it")
    weights: str = opt("", "folder with unet.pt and clip.pt, or a run to start from; empty: the shipped small ones")
    # the subject
    subject: int = opt(0, "number of the toy subject", lo=0, hi=999)
    references: str = opt("", "folder with pictures of your subject instead")
    class_name: str = opt("", "what it is, in a word or two: dog")
    live: bool = opt(False, "the subject is alive, a pet: DreamBench's prompts for animals")
    prompt_file: str = opt("", "file of prompts with [V], one per line: training, then validation, then test")
    out: str = opt("", "run folder; empty: runs/rpo-small, or the next free name")
    seed: int = opt(0, "seed of toy prompts, pictures, noise, labels and order", lo=0, hi=999_999)
    # what is compared
    train_prompts: int = opt(8, "training prompts, which the base model draws", lo=1)
    images: int = opt(4, "pictures per training prompt", lo=1)
    lam_train: float = opt(0.0, "lambda of the reward behind labels: 1 the subject, 0 the prompt alone", lo=0, hi=1)
    label_temperature: float = opt(1.0, "divides the difference of rewards; smaller gives clearer labels", lo=1e-6)
    soft_labels: bool = opt(False, "labels are probabilities; off: 0 or 1, drawn anew for each pair")
    reference_prompt: str = opt(
        "modified",
        "prompt of the reference in a pair: that of the drawn picture (modified) or 'a photo of a [V] dog' (instance)",
        choices=("modified", "instance"),
    )
    share_noise: bool = opt(False, "both pictures of a pair get the same noise and time, as in Diffusion-DPO")
    # the update
    mode: str = opt(
        "rpo",
        "both losses (rpo), one alone, or dreambooth: similarity loss and as many pictures of the class",
        choices=("rpo", "similarity", "preference", "dreambooth"),
    )
    beta: float = opt(1.0, "slope of the preference loss, per unit of the mean squared error", lo=0)
    updates: int = opt(400, "optimiser steps", lo=1)
    batch_size: int = opt(1, "pairs per update", lo=1)
    lr: float = opt(5e-6, "learning rate of AdamW", lo=0)
    weight_decay: float = opt(0.01, "weight decay of AdamW", lo=0)
    grad_clip: float = opt(1.0, "largest gradient norm", lo=1e-6)
    # when to stop
    lam_val: float = opt(0.5, "lambda of the reward that decides which step is kept (paper: 0.3, 0.5, 0.7)", lo=0, hi=1)
    mean: str = opt(
        "harmonic",
        "mean of likeness to subject and to prompt that is the validation reward",
        choices=("harmonic", "arithmetic"),
    )
    val_prompts: int = opt(8, "validation prompts", lo=1)
    val_images: int = opt(4, "pictures per validation prompt", lo=1)
    val_every: int = opt(40, "updates between validations", lo=1)
    patience: int = opt(0, "stop after so many validations without improvement at any lambda; 0: never", lo=0)
    # sampling and the final comparison
    sampling_steps: int = opt(50, "DDIM steps per picture", lo=2, hi=1000)
    guidance: float = opt(7.5, "classifier-free guidance scale", lo=0)
    eta: float = opt(1.0, "randomness of the DDIM steps", lo=0, hi=1)
    test_prompts: int = opt(25, "prompts of the final comparison", lo=1)
    test_images: int = opt(4, "pictures per test prompt", lo=1)
    image_encoder: str = opt("", "a further judge of likeness: package.module:function, pictures to embeddings (B, D)")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


# The defaults are RPO's values; a preset is the table of its deviations from them.
PRESETS = {
    "small": {  # the toy world on a CPU, in minutes
        "lam_train": 0.5,
        "soft_labels": True,
        "batch_size": 4,
        "lr": 5e-4,
        "patience": 4,
        "guidance": 3.0,
        "test_images": 2,
    }
}
OF_PAIRS = ("beta", "lam_train", "label_temperature", "soft_labels", "reference_prompt", "share_noise")
LAMBDAS = (0.3, 0.5, 0.7)


def main() -> None:
    cfg = parse(RPOConfig, None, prog=SCRIPT, description=__doc__ or "", presets=PRESETS, renamed=RENAMED[SCRIPT])
    check(cfg)
    started = time.time()
    pipe = load_pipeline(cfg.weights, cfg.device, steps=cfg.sampling_steps)
    subject, (training, validation, test) = load_subject(cfg, pipe.image_size)
    check_texts(pipe, subject, [*training, *validation, *test])
    further = ImageJudge(cfg.image_encoder, subject.references) if cfg.image_encoder else None
    run = RunFolder(cfg.out, f"runs/rpo-{cfg.preset}", asdict(cfg) | {"weights": absolute(cfg.weights)}, SCRIPT)
    print(f"this run writes to {run.path}")
    reward = SubjectReward(pipe.clip, pipe.tokenizer, subject.references)
    sampling, seed = Sampling(cfg.sampling_steps, cfg.eta, cfg.guidance), 1000 * cfg.seed + cfg.subject
    torch.manual_seed(seed)
    base, policy = pipe.unet.requires_grad_(False), copy.deepcopy(pipe.unet).requires_grad_(True)
    pairs, instance = cfg.mode in ("rpo", "preference"), instance_prompt(subject.class_name)

    # 1. What the base model makes of the training prompts, and how likely a reference is preferred to it (Eq. 6).
    texts = [p.text for p in training for _ in range(cfg.images)]
    if cfg.mode == "dreambooth":  # the prior is the class, which no name makes special
        texts = [stripped(instance)] * len(texts)
    generated = pipe.complete(base, text_prompts(texts), sampling, seed=seed, stream="training pictures")
    gen_reward = harmonic(*reward(generated, texts), cfg.lam_train)  # (G,)
    ref_reward = harmonic(*reward.of_references(texts), cfg.lam_train)  # (R, G)
    R, G = ref_reward.shape

    # 2. Everything that never changes, encoded once: latents, texts, masked picture and mask (all is hole).
    latents_ref, latents_gen = (pipe.codec.encode(x).to(pipe.device) for x in (subject.references, generated))
    modified = pipe.condition(text_prompts(texts))
    instances = pipe.condition(text_prompts([instance] * cfg.batch_size))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    # Labels have a stream of their own: whether they are drawn changes nothing else.
    generator, label_generator = (torch.Generator().manual_seed(seed + i * 10**9) for i in range(2))

    lambdas, stale = sorted({*LAMBDAS, cfg.lam_val}), 0
    best: dict[float, tuple[float, int]] = {}  # reward and step of the best weights by each lambda
    states: dict[int, dict[str, Tensor]] = {}  # the weights of those steps
    meta = {"schedule": asdict(pipe.schedule.config), "base": pipe.fingerprint}
    meta |= {"clip": pipe.meta["clip"]} if "clip" in pipe.meta else {}

    bar = progress(range(cfg.updates + 1), "RPO")
    for step in bar:  # step 0 only validates: the base itself may turn out to be the best
        row: dict[str, float] = {}
        if step > 0:
            # 3. One update: pairs of a reference and a generated picture, under the generated picture's prompt.
            r, g = (torch.randint(n, (cfg.batch_size,), generator=generator) for n in (R, G))
            latents = latents_ref[r], latents_gen[g], latents_ref[r]  # of the pair, and of the similarity loss
            noises = [draw_noise(x, len(pipe.schedule), generator) for x in latents]
            noises[1] = noises[0] if cfg.share_noise else noises[1]
            ref, gen, single = (noised(pipe.schedule, x, *noise) for x, noise in zip(latents, noises))
            pair_condition = modified[g] if cfg.reference_prompt == "modified" else instances
            parts: dict[str, Tensor] = {}
            if pairs:  # preference (Eqs. 7-8)
                theta_ref, theta_gen = predict(policy, *ref[:2], pair_condition), predict(policy, *gen[:2], modified[g])
                with torch.no_grad():
                    base_ref, base_gen = predict(base, *ref[:2], pair_condition), predict(base, *gen[:2], modified[g])
                label = preference_label(
                    ref_reward[r, g], gen_reward[g], temperature=cfg.label_temperature,
                    generator=None if cfg.soft_labels else label_generator,
                )  # fmt: skip
                # margin l and loss of Eq. 7, as losses.py has them: preference_loss(preference_margin(…), label, beta)
                parts["preference"], margin = preference_loss_from_predictions(
                    theta_ref, theta_gen, base_ref, base_gen, ref.target, gen.target, label.to(pipe.device), cfg.beta
                )
                row |= {"margin": margin.mean().item(), "label": label.mean().item()}
            if cfg.mode == "rpo" and cfg.reference_prompt == "instance":  # one error is both, as in the released code
                parts["similarity"] = denoising_loss(theta_ref, ref.target).mean()
            elif cfg.mode != "preference":  # similarity (Eq. 4): the references under the instance prompt
                prediction = predict(policy, *single[:2], instances)
                parts["similarity"] = denoising_loss(prediction, single.target).mean()
            if cfg.mode == "dreambooth":  # prior preservation: the base's own pictures of the class
                parts["prior"] = denoising_loss(predict(policy, *gen[:2], modified[g]), gen.target).mean()
            loss = torch.stack(list(parts.values())).sum()
            optimiser.zero_grad()
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip))
            optimiser.step()
            row |= {"loss": loss.item(), "grad_norm": norm, **{k: v.item() for k, v in parts.items()}}

        # 4. Validate; keep the best step of every lambda; stop when none improves any more (early stopping).
        if step % cfg.val_every == 0 or step == cfg.updates:
            texts = [p.text for p in validation for _ in range(cfg.val_images)]
            pictures = pipe.complete(policy, text_prompts(texts), sampling, seed=seed, stream="validation")
            row |= validation_row(*reward(pictures, texts), cfg.mean, lambdas)
            row |= true_measures(pictures, subject, validation, "val")
            better = [lam for lam in lambdas if lam not in best or row[f"val_{lam}"] > best[lam][0]]
            best |= {lam: (row[f"val_{lam}"], step) for lam in better}
            states |= {step: copy.deepcopy(policy.state_dict())} if better else {}
            states = {k: v for k, v in states.items() if k in {0, *(b[1] for b in best.values())}}
            stale = 0 if better else stale + 1
            for name in ["last"] + (["best"] if cfg.lam_val in better else []):
                checkpoint.save(
                    run.path / f"{name}.pt", "unet", policy.config, policy.state_dict(), meta=meta | {"step": step}
                )
            shown = {f"step {step}": pictures[:: cfg.val_images]}
            rpo_grid(run.path / "samples" / f"{step:06d}.png", subject, validation, shown)
            bar.set_postfix({k[4:]: f"{v:.3f}" for k, v in row.items() if k.startswith("val_")}, refresh=False)
        run.log(step=step, **row)
        if "val_i" in row:  # a run that is stopped by hand leaves its curves, too
            rpo_curves(run, cfg.lam_val, cfg.mean, best[cfg.lam_val][1])
        if cfg.patience and stale >= cfg.patience:
            print(f"stopped after step {step}: no reward has improved in {stale} validations")
            break

    # 5. Base, last and the best of every lambda on test prompts that nothing was chosen by.
    steps = {"base": 0, "last": step, "best": best[cfg.lam_val][1]} | {f"best {lam}": b[1] for lam, b in best.items()}
    states = states | {step: copy.deepcopy(policy.state_dict())}
    texts = [p.text for p in test for _ in range(cfg.test_images)]
    drawn, rows = dict[int, Tensor](), dict[int, dict]()
    for at in dict.fromkeys(steps.values()):
        policy.load_state_dict(states[at])
        drawn[at] = pipe.complete(policy, text_prompts(texts), sampling, seed=seed, stream="test")
        rows[at] = test_row(*reward(drawn[at], texts), lambdas) | ({"further_i": further(drawn[at])} if further else {})
        rows[at] |= true_measures(drawn[at], subject, test, "true")
    chance = preference_label(ref_reward, gen_reward.expand(R, G), temperature=cfg.label_temperature)
    summary = {key: {name: rows[at][key] for name, at in steps.items()} for key in rows[0]} | {
        "steps": steps,
        "best_step": steps["best"],
        "last_step": step,
        "subject": subject.name,
        "judged": "best",
        "seconds": time.time() - started,
        "peak_memory_mb": peak_memory_mb(),
        "seed": cfg.seed,
    }
    run.write_json("summary.json", summary | ({"label_mean": float(chance.mean())} if pairs else {}))
    shown = {k: drawn[steps[k]][:: cfg.test_images] for k in ("base", "last", "best")}
    rpo_grid(run.path / "grid.png", subject, test, shown)
    print(comparison(rows, steps))
    if steps["best"] == 0:
        print(f"no step was better than the base model by lambda_val {cfg.lam_val:g}: best.pt is the base")
    print(f"look at {run.path / 'grid.png'} and {run.path / 'curves.png'}")


# ------------------------------------------------------------------------------------------------ before the loop


def check(cfg: RPOConfig) -> None:
    """Refuses flags that mean nothing together; sets the threads."""
    preset = replace(RPOConfig(), **PRESETS[cfg.preset])  # type: ignore[arg-type]
    for name in OF_PAIRS:
        if cfg.mode not in ("rpo", "preference") and getattr(cfg, name) != getattr(preset, name):
            raise ValueError(f"--{name.replace('_', '-')}: belongs to pairs, and --mode {cfg.mode} compares none")
    for name in ("class_name", "prompt_file", "live"):
        if getattr(cfg, name) and not cfg.references:
            raise ValueError(f"--{name.replace('_', '-')}: belongs to the pictures of --references")
    if cfg.references and cfg.subject:
        raise ValueError("--subject: numbers the toy subjects; --references brings its own")
    check_pictures(cfg, "train_prompts images", "val_prompts val_images", "test_prompts test_images", "batch_size")
    if cfg.mode == "preference" and cfg.beta == 0:
        raise ValueError("--beta 0: --mode preference would learn nothing")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)


def load_subject(cfg: RPOConfig, size: int) -> tuple[Subject, list[list[SubjectPrompt]]]:
    """The subject that the command line names, and its training, validation and test prompts."""
    counts, skipped = (cfg.train_prompts, cfg.val_prompts, cfg.test_prompts), list[str]()
    if cfg.references:
        subject, skipped = photo_subject(cfg.references, cfg.class_name, size)
        prompts = load_prompts(subject, cfg.references, cfg.live, cfg.prompt_file, counts)
    else:
        subject = toy_subjects.toy_subject(cfg.subject, size)
        prompts = toy_subjects.prompt_lists(subject, cfg.seed, counts)
    for line in skipped:
        print(printable(f"skipped {line}"))
    print(f"{printable(subject.name)}: {len(subject.references)} references, class {subject.class_name}")
    return subject, prompts


def check_texts(pipe: Pipeline, subject: Subject, prompts: list[SubjectPrompt]) -> None:
    """Refuses prompts that the text encoder would cut; names words that it has never seen."""
    texts = [instance_prompt(subject.class_name), *(p.text for p in prompts)]
    if long := [t for t in texts if pipe.tokenizer.left_out(t)]:
        words = pipe.tokenizer.max_length - 2
        raise ValueError(f"prompt {long[0][:150]!r}: the text encoder reads {words} words; shorten it")
    if unknown := dict.fromkeys(pipe.tokenizer.unknown(" ".join(texts))):
        print(f"the text encoder has never seen: {', '.join(unknown)}; likeness to such a prompt means little")


# ------------------------------------------------------------------------------------------------ in the loop


class Noised(NamedTuple):
    """A noisy latent x_t (B, C, H, W), its times t (B,), and what the network should predict, like x_t."""

    x_t: Tensor
    t: Tensor
    target: Tensor


def draw_noise(x_0: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times (B,) below `length` and noise like x_0 (B, C, H, W)."""
    t = torch.randint(length, (len(x_0),), generator=generator)
    return t, torch.randn(x_0.shape, generator=generator).to(x_0.device)


def noised(schedule: Schedule, x_0: Tensor, t: Tensor, noise: Tensor) -> Noised:
    return Noised(add_noise(schedule, x_0, noise, t), t, target(schedule, x_0, noise, t))


def validation_row(I: Tensor, T: Tensor, mean: str, lambdas: list[float]) -> dict[str, float]:
    """Likeness to subject and prompt, and their mean at every lambda, averaged over the pictures."""
    joined = harmonic if mean == "harmonic" else arithmetic
    rewards = {f"val_{lam}": float(joined(I, T, lam).mean()) for lam in lambdas}
    return {"val_i": float(I.mean()), "val_t": float(T.mean())} | rewards


def true_measures(images: Tensor, subject: Subject, prompts: list[SubjectPrompt], prefix: str) -> dict[str, float]:
    """Shares of pictures, as many a prompt, that show what the prompts ask for; nothing where nobody knows (photos).

    Background and second thing: of the pictures whose prompts name one (NaN, in JSON null, where none does).
    """
    if subject.truth is None:
        return {}
    each = [p for p in prompts for _ in range(len(images) // len(prompts))]
    return {f"{prefix}_{k}": v for k, v in toy_judge.subject_shares(images, subject.truth, each).items()}


# ------------------------------------------------------------------------------------------------ after the loop


def test_row(I: Tensor, T: Tensor, lambdas: list[float]) -> dict[str, float]:
    """CLIP-I and CLIP-T as cosines, and the harmonic reward at every lambda."""
    rewards = {f"harmonic_{lam}": float(harmonic(I, T, lam).mean()) for lam in lambdas}
    return {"clip_i": float(2 * I.mean() - 1), "clip_t": float(2 * T.mean() - 1)} | rewards


def comparison(rows: dict[int, dict[str, float]], steps: dict[str, int]) -> str:
    """Markdown: base, last and best, each with its step and its row of the test."""
    lines = ["| | step | " + " | ".join(rows[0]) + " |", "|---" * (2 + len(rows[0])) + "|"]
    for name, at in steps.items():
        lines.append(f"| {name} | {at} | " + " | ".join(f"{v:.3f}" for v in rows[at].values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(SCRIPT, main)
