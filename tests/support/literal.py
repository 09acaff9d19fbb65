"""Sections 1 to 5 of docs/method.md, written out literally in the inputs' dtype: the tests' reference."""

import torch

EPS, TAU, DELTA = 1e-2, 1e-2, 1e-5


def kappa(x, y, scale=4.0):
    return torch.exp(-(x[..., :, None, :] - y[..., None, :, :]).abs().sum(-1) / scale)


def exact_inverse(w, eps=EPS):
    return torch.linalg.inv(w + eps * torch.eye(w.shape[-1], dtype=w.dtype, device=w.device))


def literal_attention(q, k, v, landmarks, normalization="mass", tau=TAU):
    """Sections 1 to 5 as they stand: every matrix formed, the inverse exact."""
    n = q.shape[-2]
    inverse = exact_inverse(kappa(landmarks, landmarks))
    columns_q, columns_k = kappa(q, landmarks), kappa(k, landmarks)
    if normalization == "whiten_landmarks":
        variance = columns_q.var(-2, correction=0, keepdim=True)
        columns_q = (columns_q - columns_q.mean(-2, keepdim=True)) / torch.sqrt(variance + DELTA)
        return (columns_q @ inverse @ columns_k.mT / n + 1 / n) @ v
    g = columns_q @ inverse @ columns_k.mT
    if normalization == "whiten_keys":
        variance = g.var(-2, correction=0, keepdim=True)
        return ((g - g.mean(-2, keepdim=True)) / torch.sqrt(variance + DELTA) / n + 1 / n) @ v
    mass = g.mean(-1, keepdim=True)
    return ((g - mass) / (n * (mass.clamp_min(0) + tau)) + 1 / n) @ v


def pooled(q, m):
    """m landmarks as the attention makes them: averages of runs of queries."""
    return torch.stack([chunk.mean(-2) for chunk in q.tensor_split(m, -2)], -2)


def make_inputs(batch=2, heads=2, n=60, d=8, m=9, spread=1.0, dtype=torch.float64):
    q, k = (spread * torch.randn(batch, heads, n, d, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, heads, n, d, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, pooled(q, m))]


def gradients(function, inputs, weight):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad((function(*leaves) * weight).sum(), leaves)


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def gram(m, spread, dtype=torch.float32, batch=2):
    points = spread * torch.randn(batch, m, 16, dtype=torch.float64)
    return kappa(points, points).to(dtype)
