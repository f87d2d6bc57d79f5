"""A few pictures of a subject -> a text-to-image model that places it anywhere (RPO).

    python train_rpo.py --small

The base model draws pictures for a few prompts; the references are preferred to them with a probability that the
rewards give. The UNet learns the references (similarity loss) and the preference (Bradley-Terry loss), and the
lambda-harmonic reward on validation prompts decides which step to keep. The whole algorithm stands in `main`.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minipref.data.prompts import text_prompts
from minipref.data.recognise import placed_as_asked
from minipref.data.subjects import Placed, Subject, instance_prompt, load_prompts, load_subject
from minipref.diffusion import Condition, add_noise, predict, target
from minipref.kernels import preference_loss_from_predictions
from minipref.losses import denoising_loss, preference_label
from minipref.named_rewards import ImageJudge
from minipref.pipeline import Pipeline, Sampling
from minipref.report import rpo_curves, rpo_grid
from minipref.rewards import SubjectReward, arithmetic, harmonic, stripped
from minipref.runtime import checkpoint
from minipref.runtime.config import opt, parse, run_main
from minipref.runtime.runlog import RunFolder, peak_memory_mb, progress


@dataclass(frozen=True)
class RPOConfig:
    weights: str = opt("", "folder with unet.pt and clip.pt; empty: the shipped small ones")
    # the subject
    subject: int = opt(0, "number of the toy subject", lo=0, hi=999)
    references: str = opt("", "folder with pictures of your subject instead")
    class_name: str = opt("", "what it is, in a word or two: dog")
    live: bool = opt(False, "a living subject: DreamBench's other prompts")
    prompts: str = opt("", "text file of prompts for it, one a line with [V]: they train, validate and test in turn")
    out: str = opt("", "run folder; empty: runs/rpo-small, or the next free name")
    seed: int = opt(0, "seed of toy prompts, pictures, noise, labels and order", lo=0, hi=999_999)
    # what is compared
    train_prompts: int = opt(8, "prompts that the base model draws (RPO: 8)", lo=1)
    images: int = opt(4, "pictures a training prompt (RPO: 4)", lo=1)
    lam_train: float = opt(
        0.5, "lambda of the rewards behind the labels: 1 is the subject alone (RPO: 0, the prompt alone)", lo=0, hi=1
    )
    label_temperature: float = opt(1.0, "divides the difference of rewards (RPO: 1)", lo=1e-6)
    soft_labels: bool = opt(True, "labels are probabilities; off: drawn anew for each pair (RPO)")
    reference_prompt: str = opt(
        "modified",
        "what the reference is called in a pair (RPO: modified; its code: instance, one error for both losses)",
        choices=("modified", "instance"),
    )
    share_noise: bool = opt(False, "both pictures of a pair get the same noise and time (Diffusion-DPO; RPO: no)")
    # the update
    mode: str = opt(
        "rpo",
        "rpo, similarity or preference alone, or dreambooth: similarity and as many pictures of the class alone",
        choices=("rpo", "similarity", "preference", "dreambooth"),
    )
    beta: float = opt(1.0, "beta in units of the mean squared error (RPO's code: 1)", lo=0)
    steps: int = opt(400, "updates (RPO: 400)", lo=1)
    batch: int = opt(4, "pairs an update (RPO: 1)", lo=1)
    lr: float = opt(5e-4, "learning rate of AdamW (RPO: 5e-6)", lo=0)
    weight_decay: float = opt(0.01, "weight decay of AdamW (RPO: 0.01)", lo=0)
    grad_clip: float = opt(1.0, "largest gradient norm", lo=1e-6)
    # when to stop
    lam_val: float = opt(0.5, "lambda of the validation reward that decides (RPO: 0.3, 0.5 or 0.7)", lo=0, hi=1)
    mean: str = opt(
        "harmonic", "how the validation reward joins likeness to subject and prompt", choices=("harmonic", "arithmetic")
    )
    val_prompts: int = opt(8, "validation prompts (RPO: 8)", lo=1)
    val_images: int = opt(4, "pictures a validation prompt (RPO: 4)", lo=1)
    val_every: int = opt(40, "updates between validations (RPO: 40)", lo=1)
    patience: int = opt(4, "validations in which no lambda's reward improves, after which to stop; 0: never", lo=0)
    # sampling and the final comparison
    sample_steps: int = opt(50, "DDIM steps of a picture", lo=2)
    guidance: float = opt(3.0, "classifier-free guidance scale", lo=0)
    eta: float = opt(1.0, "noise of the DDIM steps", lo=0, hi=1)
    test_prompts: int = opt(25, "prompts of the final comparison (DreamBench: 25)", lo=1)
    test_images: int = opt(2, "pictures a test prompt (DreamBench: 4)", lo=1)
    image_encoder: str = opt("", "a further judge of likeness: package.module:function, pictures to embeddings (B, D)")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


PRESETS: dict[str, dict] = {"small": {}}
OF_PAIRS = ("beta", "lam_train", "label_temperature", "soft_labels", "reference_prompt", "share_noise")
LAMBDAS = (0.3, 0.5, 0.7)
TRAIN, VALIDATE, TEST = 0, 1, 2  # three lists of prompts, three streams of noise


def main() -> None:
    cfg = parse(RPOConfig, None, prog="train_rpo.py", description=__doc__ or "", presets=PRESETS)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    pairs = cfg.mode in ("rpo", "preference")
    for name in OF_PAIRS:
        if not pairs and getattr(cfg, name) != getattr(RPOConfig, name):
            raise ValueError(f"--{name.replace('_', '-')}: belongs to pairs, and --mode {cfg.mode} compares none")
    if cfg.mode == "preference" and cfg.beta == 0:
        raise ValueError("--beta 0: --mode preference would learn nothing")
    started = time.time()
    pipe = Pipeline.load(cfg.weights, cfg.device)
    subject, skipped = load_subject(cfg.references, cfg.class_name, cfg.subject)
    for line in skipped:
        print(f"skipped {line}")
    counts = cfg.train_prompts, cfg.val_prompts, cfg.test_prompts
    asked = load_prompts(subject, cfg.references, cfg.live, cfg.prompts, counts, cfg.seed)
    print(f"{subject.name}: {len(subject.references)} references, class {subject.class_name}")
    said = [instance_prompt(subject.class_name), *(p.text for part in asked for p in part)]
    if long := [t for t in said if pipe.tokenizer.left_out(t)]:
        raise ValueError(f"{long[0]!r}: the text encoder reads {pipe.tokenizer.max_length - 2} words; shorten it")
    if unknown := dict.fromkeys(pipe.tokenizer.unknown(" ".join(said))):
        print(f"the text encoder has never seen: {', '.join(unknown)}; likeness to such a prompt means little")
    further = ImageJudge(cfg.image_encoder, subject.references) if cfg.image_encoder else None
    pipe.schedule.timesteps(cfg.sample_steps)  # refused before anything is written
    run = RunFolder(cfg.out, "runs/rpo-small", asdict(cfg))
    reward = SubjectReward(pipe.clip, pipe.tokenizer, subject.references)
    how, noise_seed = Sampling(cfg.sample_steps, cfg.eta, cfg.guidance), 1000 * cfg.seed + cfg.subject
    torch.manual_seed(noise_seed)
    base, policy = pipe.unet.requires_grad_(False), copy.deepcopy(pipe.unet).requires_grad_(True)
    joined = harmonic if cfg.mean == "harmonic" else arithmetic
    lambdas = sorted({*LAMBDAS, cfg.lam_val})

    def draw(unet, texts: list[str], which: int) -> Tensor:
        """A picture of each text; the noise is that of subject, seed, list and place in the list."""
        return pipe.complete(unet, text_prompts(texts), how, seed=noise_seed, epoch=-10 - which)

    # 1. What the base model makes of the training prompts, and how likely a reference is preferred to it (Eq. 6).
    texts = [p.text for p in asked[TRAIN] for _ in range(cfg.images)]
    if cfg.mode == "dreambooth":  # the prior is the class, which no name makes special
        texts = [stripped(instance_prompt(subject.class_name))] * len(texts)
    generated = draw(base, texts, TRAIN)
    gen_reward = harmonic(*reward(generated, texts), cfg.lam_train)  # (G,)
    ref_reward = harmonic(*reward.of_references(texts), cfg.lam_train)  # (R, G)
    R, G = ref_reward.shape

    # 2. Everything that never changes, encoded once: latents, texts, masked picture and mask (all is hole).
    latents_ref, latents_gen = (pipe.codec.encode(x).to(pipe.device) for x in (subject.references, generated))
    modified = pipe.condition(text_prompts(texts))
    instance = pipe.condition(text_prompts([instance_prompt(subject.class_name)] * cfg.batch))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    # Labels have a stream of their own: whether they are drawn changes nothing else.
    generator, label_generator = (torch.Generator().manual_seed(noise_seed + i * 10**9) for i in range(2))

    def noisy(x_0: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B,) and noise like x_0, newly drawn."""
        t = torch.randint(len(pipe.schedule), (len(x_0),), generator=generator)
        return t, torch.randn(x_0.shape, generator=generator).to(pipe.device)

    def predicted(unet, x_0: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """What the model makes of x_0 with noise, in its own prediction space, like x_0."""
        return predict(unet, add_noise(pipe.schedule, x_0, noise, t), t, condition).float()

    def goal(x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return target(pipe.schedule, x_0, noise, t)

    def validate(step: int, unet) -> dict:
        """I, T and the joined reward at every lambda on the validation prompts, with noise that never changes."""
        said = [p.text for p in asked[VALIDATE] for _ in range(cfg.val_images)]
        made = draw(unet, said, VALIDATE)
        I, T = reward(made, said)
        row = {"val_i": float(I.mean()), "val_t": float(T.mean())}
        row |= {f"val_{lam}": float(joined(I, T, lam).mean()) for lam in lambdas}
        row |= true_measures(made, subject, asked[VALIDATE], cfg.val_images, "val")
        rpo_grid(
            run.path / "samples" / f"{step:06d}.png",
            subject,
            asked[VALIDATE],
            {f"step {step}": made[:: cfg.val_images]},
        )
        return row

    meta = {"schedule": asdict(pipe.schedule.config), "base": pipe.fingerprint}
    if "clip" in pipe.meta:
        meta["clip"] = pipe.meta["clip"]

    def keep(name: str, step: int, state: dict) -> None:
        checkpoint.save(run.path / f"{name}.pt", "unet", policy.config, state, meta=meta | {"step": step})

    row = validate(0, base)
    run.log(step=0, **row)
    best = {lam: (row[f"val_{lam}"], 0) for lam in lambdas}  # the base itself may turn out to be the best
    states = {0: base.state_dict()}  # of the steps that are the best of some lambda
    keep("best", 0, states[0])
    since = 0

    bar = progress(range(1, cfg.steps + 1), "RPO")
    for step in bar:
        # 3. One update: `batch` pairs of a reference and a generated picture, under the generated picture's prompt.
        r, g = (torch.randint(n, (cfg.batch,), generator=generator) for n in (R, G))
        ref, gen, alone = noisy(latents_ref[r]), noisy(latents_gen[g]), noisy(latents_ref[r])
        if cfg.share_noise:
            gen = ref
        under = modified[g] if cfg.reference_prompt == "modified" else instance
        parts: dict[str, Tensor] = {}
        if pairs:  # preference (Eqs. 7-8)
            both = ((latents_ref[r], *ref), under), ((latents_gen[g], *gen), modified[g])
            theta_ref, theta_gen = (predicted(policy, *x, c) for x, c in both)
            with torch.no_grad():
                base_ref, base_gen = (predicted(base, *x, c) for x, c in both)
            goal_ref, goal_gen = (goal(*x) for x, _ in both)
            label = preference_label(
                ref_reward[r, g], gen_reward[g], temperature=cfg.label_temperature,
                generator=None if cfg.soft_labels else label_generator,
            )  # fmt: skip
            # margin l and loss of Eq. 7, as losses.py has them: preference_loss(preference_margin(…), label, beta)
            parts["preference"], margin = preference_loss_from_predictions(
                theta_ref, theta_gen, base_ref, base_gen, goal_ref, goal_gen, label.to(pipe.device), cfg.beta
            )
        if cfg.mode == "rpo" and cfg.reference_prompt == "instance":  # one error is both, as in the released code
            parts["similarity"] = denoising_loss(theta_ref, goal_ref).mean()
        elif cfg.mode != "preference":  # similarity (Eq. 4): the references under the instance prompt
            one = latents_ref[r], *alone
            parts["similarity"] = denoising_loss(predicted(policy, *one, instance), goal(*one)).mean()
        if cfg.mode == "dreambooth":  # prior preservation: the base's own pictures of the class
            own = latents_gen[g], *gen
            parts["prior"] = denoising_loss(predicted(policy, *own, modified[g]), goal(*own)).mean()
        loss = torch.stack(list(parts.values())).sum()
        optimiser.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip))
        optimiser.step()
        row = {"loss": loss.item(), "grad_norm": norm, **{k: v.item() for k, v in parts.items()}}
        if "preference" in parts:
            row |= {"margin": margin.mean().item(), "label": label.mean().item()}

        # 4. Validate; keep the best step of every lambda; stop when none improves any more (early stopping).
        if step % cfg.val_every == 0 or step == cfg.steps:
            row |= validate(step, policy)
            better = [lam for lam in lambdas if row[f"val_{lam}"] > best[lam][0]]
            best |= {lam: (row[f"val_{lam}"], step) for lam in better}
            states |= {step: copy.deepcopy(policy.state_dict())} if better else {}
            states = {k: v for k, v in states.items() if k in {b[1] for b in best.values()}}
            since = 0 if better else since + 1
            keep("last", step, policy.state_dict())
            if cfg.lam_val in better:
                keep("best", step, policy.state_dict())
            bar.set_postfix({k[4:]: f"{v:.3f}" for k, v in row.items() if k.startswith("val_")}, refresh=False)
        run.log(step=step, **row)
        if "val_i" in row:  # a run that is stopped by hand leaves its curves, too
            rpo_curves(run, cfg.lam_val, cfg.mean, best[cfg.lam_val][1])
        if cfg.patience and since >= cfg.patience:
            print(f"stopped after step {step}: no reward has improved in {since} validations")
            break

    # 5. Base, last and the best of every lambda on test prompts that nothing was chosen by.
    said = [p.text for p in asked[TEST] for _ in range(cfg.test_images)]
    table, shown, judge = dict[str, dict](), dict[str, Tensor](), copy.deepcopy(policy)
    by_step = {0: base.state_dict(), step: policy.state_dict(), **states}
    names = {"base": 0, "last": step, "best": best[cfg.lam_val][1]} | {f"best {lam}": b[1] for lam, b in best.items()}
    for name, at in names.items():
        same = [other for other in table if names[other] == at]
        if same:  # judged already
            table[name] = table[same[0]]
            shown[name] = shown[same[0]]
            continue
        judge.load_state_dict(by_step[at])
        shown[name] = draw(judge, said, TEST)
        I, T = reward(shown[name], said)
        table[name] = {"clip_i": float(2 * I.mean() - 1), "clip_t": float(2 * T.mean() - 1)}
        table[name] |= {f"harmonic_{lam}": float(harmonic(I, T, lam).mean()) for lam in lambdas}
        table[name] |= {"further_i": further(shown[name])} if further else {}
        table[name] |= true_measures(shown[name], subject, asked[TEST], cfg.test_images, "true")
    summary: dict[str, Any] = {key: {name: row[key] for name, row in table.items()} for key in table["base"]}
    chance = preference_label(ref_reward, gen_reward.expand(R, G), temperature=cfg.label_temperature)
    summary |= {
        "steps": names,
        "best_step": names["best"],
        "last_step": step,
        "subject": subject.name,
        "judged": "best",
        "seconds": time.time() - started,
        "peak_memory_mb": peak_memory_mb(),
        "seed": cfg.seed,
    }
    summary |= {"label_mean": float(chance.mean())} if pairs else {}
    run.write_json("summary.json", summary)
    kept = {k: shown[k][:: cfg.test_images] for k in ("base", "last", "best")}
    rpo_grid(run.path / "grid.png", subject, asked[TEST], kept)
    print(comparison(table, names))
    if names["best"] == 0:
        print(f"no step was better than the base model by lambda_val {cfg.lam_val:g}: best.pt is the base")
    print(f"look at {run.path / 'grid.png'} and {run.path / 'curves.png'}")


def true_measures(images: Tensor, subject: Subject, asked: list[Placed], each: int, prefix: str) -> dict[str, float]:
    """Shares of pictures, `each` a prompt, that show what was asked; nothing where the truth is unknown (photos).

    Background and second thing: of the pictures whose prompts name one (NaN, in JSON null, where none does).
    """
    if subject.thing is None:
        return {}
    asked = [p for p in asked for _ in range(each)]
    found = placed_as_asked(images, subject.thing, asked)
    named = {k: torch.tensor([getattr(p, k) is not None for p in asked]) for k in ("background", "second")}
    shares = {k: v[named[k]] if k in named else v for k, v in found.items()}
    return {f"{prefix}_{k}": float(v.float().mean()) for k, v in shares.items()}


def comparison(table: dict[str, dict], steps: dict[str, int]) -> str:
    """Markdown: base, last and best."""
    lines = ["| | step | " + " | ".join(table["base"]) + " |", "|---" * (2 + len(table["base"])) + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | {steps[name]} | " + " | ".join(f"{v:.3f}" for v in row.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main("train_rpo.py", main)
