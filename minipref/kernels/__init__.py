"""Fused operations, each with its specification in plain PyTorch beside it.

A file holds, top to bottom: the formulas and what they move; the reference, which runs anywhere and is the
specification; the Triton kernels, forward and backward; the operator with its gradient; the dispatcher with
`impl="auto"` (Triton where it can run and pays), "torch" or "triton". Nothing here needs Triton to be imported.
"""

from .ddim_step_logprob import ddim_step_logprob
from .geglu import geglu
from .group_norm_act import group_norm_act
from .preference_loss import preference_loss_from_predictions
from .q_sample import q_sample

__all__ = [
    "ddim_step_logprob",
    "geglu",
    "group_norm_act",
    "preference_loss_from_predictions",
    "q_sample",
]
