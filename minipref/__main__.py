"""`python -m minipref COMMAND`."""

from __future__ import annotations

import sys
from importlib import import_module

from .runtime.config import run_main

COMMANDS = {
    "pretrain": "train CLIP and UNet weights from scratch",
    "check-data": "what a folder of pictures or ratings holds, and what is wrong, and where",
    "sample": "complete pictures, base beside aligned",
    "bench": "time each kernel and each saving of the loop on this machine",
    "evaluate": "WinRate, rewards, KL and a grid of a run; without --run, test the base model's text-to-image",
}
MOVED = {"tutorial": "python tutorials/run.py NUMBER", "claims": "python tutorials/claims.py"}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m minipref COMMAND [--help]\n")
        print("\n".join(f"  {k:11s} {v}" for k, v in COMMANDS.items()))
        return
    if name in MOVED:
        raise ValueError(f"{name}: now {MOVED[name]}, in a clone of the project")
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; choose from {', '.join(COMMANDS)}")
    import_module(f"minipref.commands.{name.replace('-', '_')}").main(sys.argv[2:])


if __name__ == "__main__":
    run_main("minipref", main)
