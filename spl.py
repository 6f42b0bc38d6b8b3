"""SparseProtoLinear (SPL): a linear layer whose every output is gated by input-dependent routing.

    Y_comp  = x W_muᵀ + b_mu                 computation path: what a neuron says
    V_match = x W_pᵀ / √D_in                 prototype matching: how well x fits what the neuron looks for
    L_gate  = x W_gᵀ                         gating cost: what it costs the neuron to fire
    logits  = V_match − mas(L_gate)          routing logits
    M       = mas(logits)                    routing mask, in [0, 1]
    Y_out   = Y_comp ⊙ M

    mas(z)  = relu(z / max_j |z_j|)          max-abs scaling over the last axis; zeros stay zeros

Symbols   x (..., D_in), Y (..., D_out); mu_weight, proto_weight and gate_weight are W_mu, W_p and W_g,
          each (D_out, D_in) as in nn.Linear.
Cost      3·D_in·D_out multiply-adds, of which the routing is two thirds; with a tied gate, W_g = −W_p for
          good, 2·D_in·D_out, of which it is half.
Source    SPL is the layer of Tiny-ONN, github.com/dmf-archive/Tiny-ONN; written anew from its equations.
Copy      this file alone; it needs torch. Use it like nn.Linear, on normalized inputs: cost does not shrink
          with x as the match does. With one output the mask is 0 or 1 and no routing is learned. For a
          Hessian take jacrev of jacrev: forward-mode derivatives are missing, as torch.compile refuses them.
Train     W_p and W_g by AdamW at a high rate (4e-3), W_mu with them or, better, by Muon, which is below.
Run       python spl.py
"""

import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


def mas_reference(z):
    """mas(z) as the formula stands, through autograd: what the fast one below is tested against."""
    return F.relu(z / z.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny))


class Peak(torch.autograd.Function):
    """max_j |z_j| over the last axis, kept as one of size 1; the entries that equal it share its gradient.

    Entries within one eps of it count as equal. `amax` compares exactly: where compiled bfloat16 code has
    rounded one of the two, it finds no such entry and divides 0 by 0. `max` scatters its gradient by index,
    which makes a compiled SPL of D = 768 about 15% slower on an H100.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.abs().amax(dim=-1, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, g):
        z, peak = ctx.saved_tensors
        top = z.abs() >= peak * (1 - torch.finfo(z.dtype).eps)
        return z.sign() * top * (g / top.sum(-1, keepdim=True).clamp_min(1))


def mas_normalize(z):
    """relu(z / max_j |z_j|) over the last axis: values in [0, 1], unchanged by any positive scale of z."""
    # A fixed guard of 1e-9 is 0 in float16, and 0/0 is NaN: take the dtype's own smallest normal number.
    return F.relu(z / Peak.apply(z).clamp_min(torch.finfo(z.dtype).tiny))


def spl_reference(x, mu_weight, mu_bias, proto_weight, gate_weight):
    """SPL as the equations stand, one product per line. Returns (Y_out, logits, M), each (..., D_out)."""
    Y_comp = x @ mu_weight.T + mu_bias
    V_match = x @ proto_weight.T / math.sqrt(x.shape[-1])
    L_gate = x @ gate_weight.T
    logits = V_match - mas_reference(L_gate)
    M = mas_reference(logits)
    return Y_comp * M, logits, M


class SparseProtoLinear(nn.Module):
    """Maps (..., in_features) to (..., out_features), with the arguments of nn.Linear: any leading shape, any
    floating dtype. `bias` is b_mu; the routing has none. A tied gate has no matrix: W_g is always −W_p."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, tied_gate=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

        def matrix():
            return nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.mu_weight, self.proto_weight = matrix(), matrix()
        self.gate_weight = None if tied_gate else matrix()
        self.mu_bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        bound = 1 / math.sqrt(self.in_features)
        # The mask stops half of the neurons and shrinks the others, so W_mu starts larger than nn.Linear's
        # weight, whose standard deviation is 0.58/√D_in.
        self.mu_weight.normal_(std=2 * bound)
        if self.mu_bias is not None:
            self.mu_bias.zero_()
        # The prototypes start small, because the learned match must outgrow the random one.
        self.proto_weight.uniform_(-bound, bound)
        # The gate starts as the opposite of the prototype, costly where that mismatches, plus noise. W_g = 0
        # sits on relu's corner and never learns; W_g = −W_p charges no neuron that fires, so few rows learn.
        if self.gate_weight is not None:
            self.gate_weight.uniform_(-0.3 * bound, 0.3 * bound).sub_(self.proto_weight)

    def forward(self, x):
        return F.linear(x, self.mu_weight, self.mu_bias) * self.route(x)[1]                     # Y_comp ⊙ M

    def route(self, x):
        """(logits, M), each (..., D_out): the routing alone."""
        V_match = F.linear(x, self.proto_weight / math.sqrt(self.in_features))
        # With a tied gate L_gate is −V_match but for a factor √D_in, which mas does not see: where the match
        # is above 0 nothing is paid, below 0 nothing fires. M is relu(V_match) over a scale of each token.
        L_gate = -V_match if self.gate_weight is None else F.linear(x, self.gate_weight)
        logits = V_match - mas_normalize(L_gate)
        return logits, mas_normalize(logits)

    def extra_repr(self):
        bias, tied = self.mu_bias is not None, self.gate_weight is None
        return f"{self.in_features}, {self.out_features}, bias={bias}, tied_gate={tied}"


# ---- SARS (Surprise-Aware Routing Shaping): routing learns to fire the neurons that are worth it ----
def goodness(e, r, k, eps=0.01):
    """A neuron's worth, mas(mas(e)·mas(r)) / (mas(k) + eps), from its contribution e = ‖Y_out_j‖, relevance
    r = ‖dLoss/dY_comp_j‖ and learning cost k = ‖dLoss/dW_mu_j‖; each (D_out,), over all tokens of a batch."""
    return mas_normalize(mas_normalize(e) * mas_normalize(r)) / (mas_normalize(k) + eps)


def jsd(p, q):
    """Jensen-Shannon divergence over the last axis, in [0, ln 2]; 0·log 0 is taken as 0."""
    tiny = torch.finfo(p.dtype).tiny
    logm = ((p + q) / 2).clamp_min(tiny).log()
    return sum((d * (d.clamp_min(tiny).log() - logm)).sum(-1) for d in (p, q)) / 2


def routing_loss(spl, x, Y_out, real):
    """L_route = mean over tokens of JSD(M / ΣM ‖ goodness / Σ goodness), after the task loss's backward pass.

    x (..., D_in) and Y_out (..., D_out) are the layer's, Y_out.grad kept; real (...,) is 0 for padding, which
    counts in nothing. Its gradient reaches W_p and W_g alone; a mask of zeros gives ln 2 / 2 and no gradient.
    """
    def normalized(z):
        return z / z.sum(-1, keepdim=True).clamp_min(1e-9)     # a smaller guard overflows in its derivative

    def norms(z):                                           # over the real tokens: (..., D_out) -> (D_out,)
        return (z.detach().float() * real.unsqueeze(-1)).flatten(0, -2).norm(dim=0)
    M = spl.route(x.detach())[1].float()                       # (..., D_out)
    dY_comp = Y_out.grad * M.detach()                          # Y_out = Y_comp ⊙ M
    G = goodness(norms(Y_out), norms(dY_comp), spl.mu_weight.grad.norm(dim=1))
    return (jsd(normalized(M), normalized(G)) * real).sum() / real.sum()


# ---- Muon: the optimizer for W_mu, and for any matrix that is a linear map; W_p and W_g want AdamW ----
MOMENTUM, ROW_BETA = 0.95, 0.95             # decay rates of the momentum and of the rows' mean squares


def orthogonalize(x):
    """(N, r, c) -> matrices of the same singular vectors, with singular values near 1: five steps of the
    Newton-Schulz iteration, with the coefficients of Jordan et al. 2024. In bfloat16 on CUDA."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT).mT           # the same, by products of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(5):
        A = x @ x.mT
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


class Muon(torch.optim.Optimizer):
    """For matrices that are linear maps: momentum made orthogonal (Jordan et al. 2024), its rows brought to
    one length (NorMuon, Li et al. 2025, arXiv:2510.05491). The matrices of a parameter group have one shape
    and are taken as one stack; `orthogonal` may be a compiled `orthogonalize`."""

    def __init__(self, groups, lr, weight_decay, orthogonal=orthogonalize):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.orthogonal = orthogonal

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = group["params"]
            grad = torch.stack([p.grad for p in matrices])                                  # (N, r, c)
            state = self.state[matrices[0]]                     # of the whole stack, kept at its first matrix
            if not state:
                state["momentum"], state["rows"] = torch.zeros_like(grad), torch.zeros_like(grad[..., :1])
            state["momentum"].lerp_(grad, 1 - MOMENTUM)
            update = self.orthogonal(grad.lerp(state["momentum"], MOMENTUM)).to(grad.dtype)     # Nesterov's
            size = update.norm(dim=(-2, -1), keepdim=True)
            state["rows"].lerp_(update.square().mean(-1, keepdim=True), 1 - ROW_BETA)
            update = update / state["rows"].sqrt().clamp_min(1e-12)
            update = update * (size / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12))
            # An orthogonal (r, c) matrix has a root mean square of 1/√max(r, c): make it 0.2, that of AdamW's
            # updates (Liu et al. 2025, arXiv:2502.16982).
            update = update * (0.2 * math.sqrt(max(grad.shape[-2:])))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update), alpha=-group["lr"])


# ---- compiling and measuring, for the demos of the concept files and for training ----
def can_compile(device):
    """Whether torch.compile works here, tried on a tiny function; if not, one line says why. It needs a C++
    compiler, Python's headers, and a cache folder that it may write to and execute from."""
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.ones(8, device=device))
        return True
    except RuntimeError as fault:                               # torch wraps in one whatever its tools raise
        print(f"torch.compile does not work here, going on without it: {' '.join(str(fault).split())[:200]}")
        return False


def bench(candidates, seconds=3.0, calls=1):
    """{name: function} -> {name: median seconds}; they take turns, so that a noisy machine is noisy for all.
    A measurement is `calls` in a row: on a GPU one is launched while another runs, as in training."""
    def timed(run, calls):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    for run in 2 * [*candidates.values()]:                      # warm-up, compilation included
        timed(run, 1)
    rounds, start = [], time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - start < seconds:
        rounds.append({name: timed(run, calls) for name, run in candidates.items()})
    return {name: statistics.median(times[name] for times in rounds) for name in candidates}


def forward_backward(layer, x):
    """A function that runs `layer` on x and back, for `bench`."""
    grad = torch.randn_like(layer(x))
    return lambda: layer(x).backward(grad)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, N, calls = (torch.bfloat16, 2**18, 10) if device == "cuda" else (torch.float32, 4096, 1)
    compiles = can_compile(device)
    print(f"What an SPL with a free gate costs, forward and backward, {N} tokens, {dtype}, {device};\n"
          "1 is one F.linear to 3·D; in the last column the compiled SPL is compared with a dense layer")
    columns = "dense layer", "to 3·D", "formula", "SPL", "compiled"
    print(f"{'D':>5}" + "".join(f"{name:>13}" for name in (*columns, "ms to 3·D", "times dense")))
    for D in (128, 256, 768):
        x = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
        dense, triple = (nn.Linear(D, n * D).to(device, dtype) for n in (1, 3))
        spl = SparseProtoLinear(D, D).to(device, dtype)
        weights = spl.mu_weight, spl.mu_bias, spl.proto_weight, spl.gate_weight
        runs = {"dense layer": dense, "to 3·D": triple, "SPL": spl,
                "formula": lambda x: spl_reference(x, *weights)[0]}
        if compiles:
            runs["compiled"] = torch.compile(spl)
        t = bench({name: forward_backward(layer, x) for name, layer in runs.items()}, calls=calls)
        ratios = "".join(f"{t.get(name, math.nan) / t['to 3·D']:13.2f}" for name in columns)
        times_dense = t.get("compiled", math.nan) / t["dense layer"]
        print(f"{D:5}{ratios}{1000 * t['to 3·D']:13.2f}{times_dense:13.2f}")
        assert spl(x).shape == x.shape
