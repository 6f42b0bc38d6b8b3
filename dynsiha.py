"""DynSIHA (Dynamic Sparse Infinite-Head Attention): causal self-attention whose Q, K, V and O are SPLs.

    q, k, v = SPL_q(x), SPL_k(x), SPL_v(x)                      each (B, H, T, h)
    y       = softmax(rot(q) rot(k)ᵀ / √h + causal mask) v      horizontal attention: token -> tokens
    out     = SPL_o(y)

It attends twice. Inside each SPL, vertically: x is the query, the rows of W_p are the keys, M the weights and
Y_comp the values, each of which stays with its neuron. Then horizontally, token to tokens. Read as a Bayesian
update: (W_p, W_mu) is the prior, the sparse q, k, v the likelihood, the output the posterior.

Symbols   B batch, T tokens, S slots of the cache that are read, D width, H heads, h = D/H, A position axes.
Cost      4 SPLs: 12·D² multiply-adds per token, 8·D² with tied gates, plus 2·T·D for the attention itself.
Source    DynSIHA is the attention of Tiny-ONN; rotary positions: Su et al. 2021, arXiv:2104.09864.
Copy      this file and spl.py.
Run       python dynsiha.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from spl import SparseProtoLinear, bench, forward_backward


def rotary(pos, h, base=100.0):
    """(cos, sin) of the angles of positions pos (B, T, A), each (B, 1, T, h/2).

    The channel pairs are dealt to the A axes in turn. The base is 100, not 10000: a grid's coordinates end
    at 30.
    """
    A, pair = pos.shape[-1], torch.arange(h // 2, device=pos.device)
    axis, n = pair % A, pair // A                                    # of each pair, and its number within it
    frequency = base ** -(2 * A * n / h)
    angle = pos[..., axis] * frequency                               # (B, T, h/2)
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x, cos, sin):
    """Turns each channel pair (i, i + h/2) of x (B, H, T, h) by its token's angle, so that q·k feels
    differences of position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class KVCache:
    """The keys and values of one layer, in S_max slots made beforehand; `append` fills the next ones.

    All updates are in place and `length` is a tensor, so that each step of decoding runs the same kernels on
    the same memory: a CUDA graph of one step is then good for the next. S, the number of slots to read, is
    the caller's: which of them are filled is the mask's business.
    """

    def __init__(self, B, H, S_max, h, device=None, dtype=None):
        self.k = torch.zeros(B, H, S_max, h, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros((), dtype=torch.long, device=device)

    def append(self, k, v, S):
        """k, v (B, H, T, h) go into the next T slots -> the first S slots of all, each (B, H, S, h)."""
        slots = self.length + torch.arange(k.shape[2], device=k.device)
        self.k.index_copy_(2, slots, k)
        self.v.index_copy_(2, slots, v)
        self.length += k.shape[2]
        return self.k[:, :, :S], self.v[:, :, :S]


class DynSIHA(nn.Module):
    """(B, T, D) -> (B, T, D). `linear=nn.Linear` turns it into standard attention, for the dense control."""

    def __init__(self, d_model, n_head, linear=SparseProtoLinear):
        super().__init__()
        if d_model % n_head or d_model // n_head % 2:
            raise ValueError(f"d_model {d_model} must be n_head {n_head} times an even head width")
        self.n_head = n_head
        self.q, self.k, self.v, self.o = (linear(d_model, d_model) for _ in range(4))

    def forward(self, x, rope, cache=None, mask=None):
        """rope: (cos, sin) of `rotary`. mask (B, 1, T, S): the slots each token may read; None is causal,
        and needs an empty cache."""
        B, T, D = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, D // self.n_head) for f in (self.q, self.k, self.v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                       # (B, H, T, h)
        q, k = rotate(q, *rope), rotate(k, *rope)                                               # (B, H, T, h)
        if cache is not None:
            k, v = cache.append(k, v, T if mask is None else mask.shape[-1])                    # (B, H, S, h)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)     # (B, H, T, h)
        return self.o(y.transpose(1, 2).reshape(B, T, D))                                       # (B, T, D)


@torch.no_grad()
def double_attention(layer, x, rope):
    """Both attentions of a DynSIHA layer on x (B, T, D), made visible: {"q": M, "k": M, "v": M, "o": M}, the
    masks of its SPLs over their neurons, each (B, T, D), and the weights over tokens, (B, H, T, T)."""
    B, T, D = x.shape
    H, h = layer.n_head, D // layer.n_head
    q, k, v = (f(x).view(B, T, H, h).transpose(1, 2) for f in (layer.q, layer.k, layer.v))      # (B, H, T, h)
    scores = rotate(q, *rope) @ rotate(k, *rope).mT / h**0.5                                    # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    y = (weights @ v).transpose(1, 2).reshape(B, T, D)
    inputs = {"q": x, "k": x, "v": x, "o": y}
    return {name: getattr(layer, name).route(inputs[name])[1] for name in "qkvo"}, weights


if __name__ == "__main__":
    B, T, D, H = 4, 256, 256, 8
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(B, T, D, device=device, requires_grad=True)
    rope = rotary(torch.arange(T, device=device).expand(B, T)[..., None], D // H)
    sparse, dense = DynSIHA(D, H).to(device), DynSIHA(D, H, nn.Linear).to(device)
    layers = {"sparse": sparse, "dense": dense}
    t = bench({name: forward_backward(lambda x, f=f: f(x, rope), x) for name, f in layers.items()})
    print(f"Attention at B={B} T={T} D={D} H={H} on {device}, forward and backward")
    for name, linear, weights in (("dense", "nn.Linear", 4), ("sparse", "SPL", 12)):
        print(f"  {linear:10} {weights:3}·D² weights {1000 * t[name]:8.2f} ms  {t[name] / t['dense']:5.2f}x")
    assert sparse(x, rope).shape == (B, T, D)
