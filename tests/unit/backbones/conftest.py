"""Backbones written out plainly, from named weights alone: what several oracles share.

No code of `kernels/` or `cl/backbones/`: loops over tokens, products of torch, weights under the names that a module
gives them. A function reads one document (B, T, D) from its first token; documents that share a row are read apart.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


def mapped(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def of(w, prefix):
    """The weights of a part, under its own names."""
    return {name.removeprefix(prefix): p for name, p in w.items() if name.startswith(prefix)}


def normed(w, name, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolved(w, x):
    """silu of the sum over taps, the last of which is the token's own; `x` as it is without a convolution."""
    if "convolution.weight" not in w:
        return x
    taps = w["convolution.weight"].T.flip(0)
    return F.silu(sum(tap * F.pad(x, (0, 0, back, 0))[:, : x.shape[1]] for back, tap in enumerate(taps)))


def projected(w, x, num_heads):
    """q, k, v (B, T, H, .) behind the short convolution."""
    parts = [mapped(w, name, x) for name in ("query", "key", "value")]
    joined = convolved(w, torch.cat(parts, -1))
    return [each.unflatten(-1, (num_heads, -1)) for each in joined.split([p.shape[-1] for p in parts], -1)]


def gated(w, x, o):
    """W_out (o * silu(W_gate x)), heads side by side."""
    return mapped(w, "out", o.flatten(2) * F.silu(mapped(w, "gate", x)))


def turned(x_BTHK, base):
    """Pairs (i, i + K / 2) as complex numbers, turned by position * base^(-2 i / K)."""
    width = x_BTHK.shape[-1]
    rate = base ** (-2 * torch.arange(width // 2, dtype=x_BTHK.dtype) / width)
    angle = torch.arange(x_BTHK.shape[1], dtype=x_BTHK.dtype)[:, None, None] * rate
    pairs = torch.complex(*x_BTHK.chunk(2, -1)) * torch.exp(1j * angle)
    return torch.cat((pairs.real, pairs.imag), -1)


def attention(w, x, num_heads, base=10_000.0):
    """softmax(q k / sqrt(K)) v over the tokens so far; heads share keys and values in groups."""
    width = x.shape[-1] // num_heads
    q, k, v = (mapped(w, name, x).unflatten(-1, (-1, width)) for name in ("query", "key", "value"))
    group = [h * k.shape[2] // num_heads for h in range(num_heads)]
    q, k, v, outs = turned(q, base), turned(k, base)[:, :, group], v[:, :, group], []
    for t in range(x.shape[1]):
        score = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1]) / width**0.5
        outs.append(torch.einsum("bhs,bshk->bhk", score.softmax(-1), v[:, : t + 1]))
    return mapped(w, "out", torch.stack(outs, 1).flatten(2))


def decay(w, name, x):
    """exp(-exp(A) softplus(W x + b)) (B, T, H), of the state space models."""
    step = F.softplus(mapped(w, f"{name}.project", x) + w[f"{name}.bias"])
    return torch.exp(-w[f"{name}.log_rate"].exp() * step)


def gated_delta(w, x, q, k, v):
    """S = alpha S; S = S - beta k (x) (k S - v); o = q S."""
    q, k, beta, alpha = unit(q), unit(k), torch.sigmoid(mapped(w, "strength.project", x)), decay(w, "retention", x)
    s, outs = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        s = alpha[:, t, :, None, None] * s
        error = torch.einsum("bhk,bhkv->bhv", k[:, t], s) - v[:, t]
        s = s - beta[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    return torch.stack(outs, 1)


def gla(w, x, q, k, v):
    """S = diag(alpha) S + k (x) v; o = q S / sqrt(K); alpha = sigmoid(W_2 W_1 x + b)^(1 / 16)."""
    alpha = torch.sigmoid(mapped(w, "retention.1", mapped(w, "retention.0", x))).pow(1 / 16).view_as(k)
    s, outs = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        s = alpha[:, t].unsqueeze(-1) * s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / k.shape[-1] ** 0.5)
    return torch.stack(outs, 1)


def linear_memory(w, x, num_heads, rule):
    """`rule` is gated_delta or gla."""
    answered = {"gated_delta": gated_delta, "gla": gla}[rule](of(w, "rule."), x, *projected(w, x, num_heads))
    return gated(w, x, normed(w, "norm", answered))


def moments(w, x, k, v):
    """H and U of the ridge regression over the tokens so far, summed anew at every token: (B, T, H, K, .) each."""
    beta, log_g = torch.sigmoid(mapped(w, "strength.project", x)), decay(w, "retention", x).log().cumsum(1)
    gram, cross = [], []
    for t in range(x.shape[1]):
        weight = beta[:, : t + 1] * torch.exp(log_g[:, t : t + 1] - log_g[:, : t + 1])
        for sums, other in ((gram, k), (cross, v)):
            sums.append(torch.einsum("bsh,bshk,bshv->bhkv", weight, k[:, : t + 1], other[:, : t + 1]))
    return torch.stack(gram, 1), torch.stack(cross, 1)


def ridge_memory(w, x, num_heads, ratio):
    """(m q + (1 - m) q (H + lambda I)^-1) U, lambda = ratio |H|_F + 1e-6, by an exact solve; and H and U."""
    q, k, v = projected(w, x, num_heads)
    q, k = unit(q), unit(k)
    gram, cross = moments(w, x, k, v)
    strength = ratio * gram.square().sum((-2, -1)).sqrt()[..., None, None] + 1e-6
    solved = torch.linalg.solve(gram + strength * torch.eye(k.shape[-1], dtype=x.dtype), q)
    mix = torch.sigmoid(mapped(w, "mix", x)).unsqueeze(-1)
    o = torch.einsum("bthk,bthkv->bthv", mix * q + (1 - mix) * solved, cross)
    return gated(w, x, normed(w, "norm", o)), gram, cross


def answer(weights, x_BHK):
    """Layers of matrices with GELU between."""
    for layer, matrix in enumerate(weights):
        x_BHK = torch.einsum("bhi,bhio->bho", F.gelu(x_BHK) if layer else x_BHK, matrix)
    return x_BHK


def titans(w, x, num_heads, chunk, max_step=1.0):
    """P = eta P - theta grad 1/2 |M(k) - v|^2, W = alpha W + P, o = M(q; W), the gradient that of autograd.

    It is taken at the weights of the chunk's start; theta = (1 - eta) max_step sigmoid(.) / chunk.
    """
    q, k, v = projected(of(w, "memory."), x, num_heads)
    q, k = (each / each.norm(dim=-1, keepdim=True) for each in (q, k))
    rule, outs = of(w, "memory.rule."), []
    gates = torch.sigmoid(mapped(rule, "gate", x) + rule["gate_bias"]).unflatten(-1, (3, num_heads))
    now = [p.expand(len(x), *p.shape) for _, p in sorted(of(rule, "start.").items())]
    begun, speed = now, [torch.zeros_like(matrix) for matrix in now]
    for t in range(x.shape[1]):
        if t % chunk == 0:
            begun = now
        theta, alpha, eta = gates[:, t, :, :, None, None].unbind(1)
        loss = (answer(begun, k[:, t]) - v[:, t]).square().sum() / 2
        slopes = torch.autograd.grad(loss, begun, create_graph=True)
        speed = [eta * p - (1 - eta) * max_step / chunk * theta * s for p, s in zip(speed, slopes, strict=True)]
        now = [alpha * matrix + p for matrix, p in zip(now, speed, strict=True)]
        outs.append(answer(now, q[:, t]))
    return gated(w, x, normed(w, "memory.norm", torch.stack(outs, 1)))


def mingru(w, x):
    """h = (1 - z) h + z W_h x."""
    z, candidate = torch.sigmoid(mapped(w, "cell.update", x)), mapped(w, "cell.candidate", x)
    h, outs = torch.zeros_like(z[:, 0]), []
    for t in range(x.shape[1]):
        h = (1 - z[:, t]) * h + z[:, t] * candidate[:, t]
        outs.append(h)
    return gated(w, x, torch.stack(outs, 1))


def gru(w, x):
    """z, s = sigmoid(W x + r h); h = (1 - z) h + z tanh(W_c x + r_c (s h)), a recurrent weight per unit."""
    drive, (r_z, r_s, r_c) = mapped(w, "cell.input", x).chunk(3, -1), w["cell.recurrent"]
    h, outs = torch.zeros_like(drive[0][:, 0]), []
    for t in range(x.shape[1]):
        into_z, into_s, into_c = (each[:, t] for each in drive)
        z, s = torch.sigmoid(into_z + r_z * h), torch.sigmoid(into_s + r_s * h)
        h = (1 - z) * h + z * torch.tanh(into_c + r_c * s * h)
        outs.append(h)
    return gated(w, x, torch.stack(outs, 1))


def decoder(w, tokens, mixer):
    """Logits of one document: blocks of `mixer(weights, x)` and SwiGLU, each behind a norm."""
    h = w["embedding.weight"][tokens]
    for n in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        block = of(w, f"blocks.{n}.")
        h = h + mixer(of(block, "mixer."), normed(block, "mixer_norm", h))
        x = normed(block, "mlp_norm", h)
        h = h + mapped(block, "mlp.out", F.silu(mapped(block, "mlp.gate", x)) * mapped(block, "mlp.up", x))
    return mapped(w, "head", normed(w, "norm", h))


def by_document(read, x, starts_BT):
    """`read` of every document of every row, from its first token, in place."""
    rows = []
    for row, starts in zip(x, starts_BT, strict=True):
        documents = row.tensor_split(starts.nonzero().flatten().tolist())
        rows.append(torch.cat([read(document.unsqueeze(0))[0] for document in documents if len(document)]))
    return torch.stack(rows)


@pytest.fixture(scope="session")
def plain():
    """The functions above; a fixture, because test modules cannot import each other."""
    shared = (attention, by_document, decoder, gru, linear_memory, mingru, ridge_memory, titans)
    return SimpleNamespace(**{function.__name__: function for function in shared})
