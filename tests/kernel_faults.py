"""What `python tests/mutate.py --kernel-faults` plants in the fused kernels, to see whether their tests notice."""

# Faults that fused kernels are prone to: file, text (once in it), what stands there instead.
KERNEL_FAULTS = [
    ("q_sample", "tl.store(OUT + b * n + i, x_t.to(OUT.dtype.element_ty), mask=inside)",
     "tl.store(OUT + b * n + i, x_t.to(OUT.dtype.element_ty), mask=i < n - 1)"),
    ("q_sample", "tl.load(X0 + b * n + i", "tl.load(X0 + b * (n + 1) + i"),  # wrong stride
    ("q_sample", "x_t = tl.load(A + b).to(ACC) * x0", "x_t = tl.load(A).to(ACC) * x0"),
    ("q_sample", "(tl.load(A + b).to(ACC) * g)", "(tl.load(S + b).to(ACC) * g)"),  # swapped gradients
    ("group_norm_act", "(variance + eps).rsqrt()", "(variance + 2 * eps).rsqrt()"),  # wrong eps
    ("group_norm_act", "(variance + eps).rsqrt()", "variance.rsqrt()"),  # no eps
    ("group_norm_act", "u = a[:, None] * ((x - mean[:, None]) * rstd[:, None]) + b[:, None]",
     "u = b[:, None] * ((x - mean[:, None]) * rstd[:, None]) + a[:, None]"),  # swapped scale and shift
    ("group_norm_act", "mean = total.unflatten(2, (groups, -1)).sum((1, 3)) / count",
     "mean = total.unflatten(2, (groups, -1)).sum((1, 3)) / pixels"),
    ("group_norm_act", "tl.where(inside, x - mean[:, None], 0.0)", "x - mean[:, None]"),  # dropped mask
    ("group_norm_act", "total / tl.minimum(BLOCK_P, P - chunk * BLOCK_P)", "total / BLOCK_P"),
    ("group_norm_act", "at = (n * chunks + chunk) * C + c\n        tl.store(SUM",
     "at = (n + chunk) * C + c\n        tl.store(SUM"),  # wrong stride
    ("group_norm_act", "(squares + sizes * apart.square())", "squares"),  # tiles joined as if they had one mean
    ("group_norm_act", "apart = total / sizes -", "apart = total / TILE_P -"),
    ("group_norm_act", "sizes[-1] = pixels - (chunks - 1) * TILE_P", "sizes[-1] = TILE_P"),  # the last tile is smaller
    ("group_norm_act", "tl.store(DA + at, tl.sum(du * xhat, 1)", "tl.store(DA + at, tl.sum(du, 1)"),
    ("group_norm_act", "tl.store(DB + at, tl.sum(du, 1)", "tl.store(DB + at, tl.sum(du * xhat, 1)"),
    ("group_norm_act", "da, db = parts_a.sum(1), parts_b.sum(1)", "da, db = parts_a[:, 0], parts_b[:, 0]"),  # one tile
    ("group_norm_act", "(a[:, None] * du - m1[:, None] - xhat * m2[:, None])", "(a[:, None] * du - m1[:, None])"),
    ("group_norm_act", "(a[:, None] * du - m1[:, None] - xhat * m2[:, None])",
     "(a[:, None] * du - xhat * m2[:, None])"),
    ("group_norm_act", ".sum(2) / count for v in (db, da)", ".sum(2) for v in (db, da)"),  # unscaled mean
    ("group_norm_act", ".sum(2) / count for v in (db, da)", ".sum(2) / count for v in (da, db)"),
    ("group_norm_act", "return (C * H * W, H * W, 1) if x.is_contiguous() else (C * H * W, 1, C)",
     "return (C * H * W, H * W, 1)"),  # channels_last read as NCHW
    ("group_norm_act", "du = du * s * (1.0 + u * (1.0 - s))", "du = du * s"),
    ("geglu", "y = value * gate * 0.5 *", "y = gate * gate * 0.5 *"),
    ("geglu", "(below + gate * density)", "below"),
    ("geglu", "tl.store(DH + row * 2 * n + n + i, d_gate", "tl.store(DH + row * 2 * n + i, d_gate"),
    ("geglu", "gate = tl.load(H + row * 2 * n + n + i, mask=inside, other=0.0).to(ACC)\n        y",
     "gate = tl.load(H + row * n + n + i, mask=inside, other=0.0).to(ACC)\n        y"),  # wrong stride
    ("ddim_step_logprob", "x_prev = kept.to(ACC)", "x_prev = drawn"),  # scored before it is rounded
    ("ddim_step_logprob", " - tl.log(sigma) - ", " - "),
    ("ddim_step_logprob", "tl.sum(total, 0) / n", "tl.sum(total, 0)"),  # unscaled mean
    ("ddim_step_logprob", "(k_out / (sigma * n)) * z", "(k_out / n) * z"),
    ("ddim_step_logprob", "drawn = mean + sigma * given", "drawn = mean + given"),
    ("ddim_step_logprob", "k_x, k_out = tl.load(KX + b).to(ACC), tl.load(KO + b).to(ACC)",
     "k_x, k_out = tl.load(KX).to(ACC), tl.load(KO).to(ACC)"),  # the first sample's for all
    ("preference_loss", "base * base - policy * policy", "policy * policy - base * base"),
    ("preference_loss", "margin = (gained_ref - gained_gen) / n", "margin = (gained_ref - gained_gen)"),
    ("preference_loss", "+ (1.0 - y) * pulled)", "+ y * pulled)"),
    ("preference_loss", "/ pairs + tl.load(GM + b).to(ACC)", "/ pairs"),
    ("preference_loss", "tl.load(GL).to(ACC) / pairs", "tl.load(GL).to(ACC)"),  # unscaled mean
    ("preference_loss", "(2.0 * g * gen / n)", "(-2.0 * g * gen / n)"),
]  # fmt: skip
