"""A lean RL loop on diffusers' UNet, in the style of ddpo-pytorch, to time `train_rl.py` against.

The same work as an epoch of `train_rl.py --small` at KL weight 0: prompts, 64 rollouts of 6 steps, decoding, the
learned reward, 5 trained steps of each sample, 2 updates. One pass of the network for each timestep, nothing logged.
`python -m minipref bench --part epoch` runs the two in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..losses import advantages
from ..pipeline import Pipeline
from ..rewards import load_reward
from ..runtime.runlog import progress, read_rows
from ..toy.world import prompt_source

PROMPTS, SAMPLES, STEPS, TRAINED, UPDATES, LR, CLIP = 16, 4, 6, 5, 2, 1e-4, 1.64
EPOCHS = 3  # of a round; the first warms up
SCRIPT = Path(__file__).resolve().parents[2] / "train_rl.py"


def diffusers_unet(pipe: Pipeline) -> Any:
    """diffusers' UNet with the pipeline's weights, in channels_last."""
    from diffusers import UNet2DConditionModel  # type: ignore[import-not-found]

    config = pipe.unet.config
    unet: Any = UNet2DConditionModel(**{f.name: getattr(config, f.name) for f in fields(config)})
    unet.eval()
    unet.load_state_dict(pipe.unet.state_dict())
    return unet.to(memory_format=torch.channels_last)


def step(output: Tensor, x: Tensor, coefficients: tuple[float, ...], x_prev: Any = None) -> tuple[Tensor, Any]:
    """x_prev, drawn or given, and its log-probability (B,), mean over dimensions."""
    k_x, k_out, sigma = coefficients
    mean = k_x * x + k_out * output
    if x_prev is None:
        x_prev = mean + sigma * torch.randn_like(x)
    return x_prev, -(((x_prev.detach() - mean) / sigma) ** 2 / 2).mean((1, 2, 3)) if sigma > 0 else None


def lean_epochs(epochs: int) -> list[float]:
    """Trains so many epochs; -> seconds of each."""
    pipe = Pipeline.load(None)
    unet, reward, B = diffusers_unet(pipe), load_reward("model", pipe), PROMPTS * SAMPLES
    prompts_of, groups = prompt_source("rl", 0, pipe.image_size), torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=0.01, fused=True)
    times = pipe.schedule.timesteps(STEPS)
    tables = pipe.schedule.coefficients(times, torch.cat([times[1:], torch.tensor([-1])]), 1.0)
    coefficients = [tuple(float(v) for v in row) for row in zip(*tables)]
    n, seconds = 1, []
    for epoch in range(epochs):
        started = time.perf_counter()
        prompts = prompts_of(epoch * PROMPTS, PROMPTS).repeat_each(SAMPLES)
        text = pipe.clip.context(pipe.tokenizer(prompts.texts))
        condition = torch.cat([pipe.codec.encode_mask(prompts.masks), pipe.codec.encode(prompts.masked)], 1)
        latents, log_probs = [torch.randn(B, *pipe.latent_shape(prompts))], []
        with torch.no_grad():
            for i, t in enumerate(times):
                x = torch.cat([latents[-1], condition], 1)
                output = unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
                x_prev, log_prob = step(output, latents[-1], coefficients[i])
                latents.append(x_prev)
                log_probs.append(log_prob)
        n = latents[0][0].numel()
        images = prompts.paste_known(pipe.codec.decode(latents[-1]))
        advantage = advantages(reward(images, prompts).value, groups)
        for part in torch.randperm(B).tensor_split(UPDATES):
            for i in range(TRAINED):  # a pass for each timestep, as ddpo-pytorch has it
                x = torch.cat([latents[i][part], condition[part]], 1)
                output = unet(x, times[i], encoder_hidden_states=text[part], return_dict=False)[0]
                _, log_prob = step(output, latents[i][part], coefficients[i], x_prev=latents[i + 1][part])
                ratio = (log_prob - log_probs[i][part]).exp()
                clipped = ratio.clamp(1 - CLIP / n, 1 + CLIP / n)
                loss = torch.maximum(-advantage[part] * ratio, -advantage[part] * clipped).mean()
                (loss / TRAINED).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def script_epochs(epochs: int, threads: int) -> list[float]:
    """Seconds of each epoch of train_rl.py --small but the first, by its own log (one more epoch runs, to evaluate)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = ["--epochs", str(epochs + 1), "--eval-every", str(epochs + 2), "--kl-weight", "0", "--guard", "0"]
        flags += ["--eval-prompts", "8", "--win-prompts", "8", "--threads", str(threads), "--out", str(out)]
        subprocess.run([sys.executable, str(SCRIPT), "--small", *flags], check=True, capture_output=True)
        rows = read_rows(out / "metrics.jsonl")
    ends = [row["seconds"] for row in rows]
    return [b - a for a, b in zip(ends[1:-2], ends[2:-1])]


def epoch_table(rounds: int, threads: int) -> str:
    """Seconds an epoch of train_rl.py and of the lean loop, `rounds` times in turn, each in a process of its own."""
    if not SCRIPT.is_file():
        return "train_rl.py is not here: an epoch is timed in a clone of the project only."
    ours, lean = [], []
    command = [sys.executable, "-m", "minipref.commands.bench_lean", str(EPOCHS), str(threads)]
    for _ in progress(range(rounds), "rounds"):
        ours.append(sum(script_epochs(EPOCHS, threads)) / (EPOCHS - 1))
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        lean.append(sum(json.loads(done.stdout)[1:]) / (EPOCHS - 1))
    ratios = [b / a for a, b in zip(ours, lean)]
    rows = {"train_rl.py, seconds": ours, "lean loop, seconds": lean, "train_rl.py, times as fast": ratios}
    lines = [
        f"An RL epoch of the small preset at KL weight 0, {threads or 'all'} threads, against a lean loop in the style "
        f"of ddpo-pytorch on diffusers' UNet in channels_last: {rounds} rounds in turn.",
        "",
        "| | median | range |",
        "|---|---|---|",
    ]
    for name, values in rows.items():
        lines.append(f"| {name} | {sorted(values)[len(values) // 2]:.2f} | {min(values):.2f} to {max(values):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]) or torch.get_num_threads())
    print(json.dumps(lean_epochs(int(sys.argv[1]))))
