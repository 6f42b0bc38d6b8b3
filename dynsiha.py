"""DynSIHA (Dynamic Sparse Infinite-Head Attention): causal self-attention whose Q, K, V and O are SPLs.

    q, k, v = SPL_q(x), SPL_k(x), SPL_v(x)                      each (B, H, T, h)
    y       = softmax(rot(q) rot(k)ᵀ / √h + causal mask) v      horizontal attention: token -> tokens
    out     = SPL_o(y)

It attends twice. Inside each SPL, vertically: x is the query, the rows of W_p are the keys and the rows of
W_mu the values. Then horizontally, token to tokens. Read as a Bayesian update: (W_p, W_mu) is the prior, the
sparse q, k, v the likelihood, the output the posterior.

Symbols   B batch, T tokens, S slots of the cache that are read, D width, H heads, h = D/H, A position axes.
Cost      4 SPLs: 12·D² multiply-adds per token, plus 2·T·D for the attention itself.
Source    DynSIHA is the attention of Tiny-ONN; rotary positions: Su et al. 2021, arXiv:2104.09864.
Copy      this file and spl.py.
Run       python dynsiha.py [checkpoint of train_arc.py]
"""

import sys

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
    frequency = base ** -(pair // A * A * 2 / h)
    angle = pos[..., pair % A] * frequency                           # (B, T, h/2)
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x, cos, sin):
    """Turns each channel pair of x (B, H, T, h) by its token's angle: q·k feels differences of position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class KVCache:
    """The keys and values of one layer, in S_max slots made beforehand; `append` fills the next ones.

    `length` is a tensor, and S, the number of slots to read, the caller's: which of them are filled is the
    mask's business. So each step of decoding runs the same kernels, and a CUDA graph can hold it.
    """

    def __init__(self, B, H, S_max, h, device=None, dtype=None):
        self.k = torch.zeros(B, H, S_max, h, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros((), dtype=torch.long, device=device)

    def append(self, k, v, S):
        """k, v (B, H, T, h) go into the next T slots -> the first S slots of all, each (B, H, S, h)."""
        at = self.length + torch.arange(k.shape[2], device=k.device)
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        self.length += k.shape[2]
        return self.k[:, :, :S], self.v[:, :, :S]


def captured(step):
    """`step`, which must have run before, as one CUDA graph: a call launches its kernels together.

    They read and write the tensors that `step` uses now; the caller keeps these.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay():
        graph.replay()
        return out
    return replay


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
        q, k, v = (f(x).view(B, T, self.n_head, -1) for f in (self.q, self.k, self.v))          # (B, T, H, h)
        q, k, v = rotate(q.transpose(1, 2), *rope), rotate(k.transpose(1, 2), *rope), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v, T if mask is None else mask.shape[-1])                    # (B, H, S, h)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)     # (B, H, T, h)
        return self.o(y.transpose(1, 2).reshape(B, T, D))


if __name__ == "__main__":
    B, T, D, H = 4, 256, 256, 8
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(B, T, D, device=device, requires_grad=True)
    pos = torch.arange(T, device=device).expand(B, T)[..., None]
    rope = rotary(pos, D // H)
    sparse, dense = DynSIHA(D, H).to(device), DynSIHA(D, H, nn.Linear).to(device)
    layers = {"sparse": sparse, "dense": dense}
    t = bench({name: forward_backward(lambda x, f=f: f(x, rope), x) for name, f in layers.items()})
    print(f"Attention at B={B} T={T} D={D} H={H} on {device}, forward and backward")
    for name, linear, weights in (("dense", "nn.Linear", 4), ("sparse", "SPL", 12)):
        print(f"  {linear:10} {weights:3}·D² weights {1000 * t[name]:8.2f} ms  {t[name] / t['dense']:5.2f}x")
    cache, y = KVCache(B, H, T, D // H, device), sparse(x, rope)
    mask = torch.ones(B, 1, 1, 8, dtype=torch.bool, device=device)
    steps = [sparse(x[:, i:i + 1], [r[:, :, i:i + 1] for r in rope], cache, mask[..., :i + 1])
             for i in range(8)]
    error = (torch.cat(steps, 1) - y[:, :8]).abs().max()
    print(f"Token by token through the cache the output differs by at most {error:.1e}")
    assert y.shape == (B, T, D)

    # Both attentions on a real pair, the first of ARC's training task 0d3d703e: a fixed map of colours.
    grids = [[3, 1, 2]] * 3, [[4, 5, 6]] * 3
    names, pos = ["<start>"], [(0, 0, 0)]
    for role, grid in enumerate(grids):
        for r, row in enumerate(grid):
            names += [str(cell) for cell in row] + ["<nl>"]
            pos += [(r, column, role) for column in range(len(row) + 1)]
        names.append(("<sep>", "<end>")[role])
        pos.append((len(grid), 0, role))
    vocabulary = [*"0123456789", "<start>", "<nl>", "<sep>", "<end>"]
    if len(sys.argv) > 1:                               # block 0 of a run of train_arc.py, but not of --dense
        state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
        weights, H, task = state["model"], state["config"]["n_head"], state["names"].index("0d3d703e")
        embedding = weights["token.weight"] + weights["view.weight"][0] + weights["task.weight"][task]
        layer, head = DynSIHA(embedding.shape[1], H), "blocks.0.attn."
        layer.load_state_dict({name.removeprefix(head): w for name, w in weights.items() if head in name})
        scale = weights["blocks.0.attn_norm.weight"]
    else:
        embedding, layer, scale = torch.randn(14, D), DynSIHA(D, H), torch.ones(D)
    with torch.no_grad():
        D, t = embedding.shape[1], names.index("<sep>")
        x = F.rms_norm(embedding[[vocabulary.index(name) for name in names]], (D,), scale)[None]  # (1, T, D)
        rope = rotary(torch.tensor([pos]), D // H)
        q, k, v = (f(x).view(1, -1, H, D // H).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        scores = rotate(q, *rope) @ rotate(k, *rope).mT / (D // H) ** 0.5                       # (1, H, T, T)
        weight = scores[0, :, t, :t + 1].softmax(-1)                                            # (H, t + 1)
        y = F.scaled_dot_product_attention(rotate(q, *rope), rotate(k, *rope), v, is_causal=True)
        inputs = {"q": x, "k": x, "v": x, "o": y.transpose(1, 2).reshape(1, -1, D)}
    source = "".join(sys.argv[1:]) or "a random layer (name a checkpoint for a trained one)"
    print(f"\nThe double attention of <sep>, which must name the output's first cell, in {source}")
    print("  first, token -> prototypes: neurons that fire, and the strongest with their masks")
    for name, inner in inputs.items():
        M = getattr(layer, name).route(inner)[1][0, t]
        top = "  ".join(f"{j}: {M[j]:.2f}" for j in M.topk(5).indices.tolist())
        print(f"    {name}: {(M > 0).sum()} of {D};  {top}")
    print("  second, token -> tokens: where its heads look, token at (row, column, role) and weight")
    for head in range(min(H, 4)):
        best = weight[head].topk(3).indices.tolist()
        print(f"    head {head}:", "  ".join(f"{names[s]} at {pos[s]}: {weight[head, s]:.2f}" for s in best))
