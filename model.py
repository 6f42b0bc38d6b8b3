"""The transformer: tokens, embeddings, L blocks, norm, head; size, FLOPs, cached generation, loss, monitors.

    x      = token embedding + task embedding + view embedding        (B, T, D)
    x      = block_l(x), l = 1..L                                     positions: rotary angles in each block
    logits = head(norm(x))                                            (B, T, n_vocab)

A sequence is a pair of grids; a token's position is its row, its column and its role (0 input, 1 output):

    <start> input rows, <nl> after each <sep> output rows, <nl> after each <end>

Symbols   B batch, T tokens, P prompt columns, D width, H heads, h = D/H, L layers, f FFN factor.
Copy      this file, block.py, dynsiha.py and spl.py.
Run       python model.py
"""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from block import Block
from dynsiha import KVCache, captured, rotary
from spl import SparseProtoLinear, bench

START, NL, SEP, END, N_VOCAB = 10, 11, 12, 13, 14       # 0..9 are the colours
MAX_SIDE = 30                                           # rows and columns of a grid, at most
MAX_OUTPUT = MAX_SIDE * (MAX_SIDE + 1) + 1              # 30 rows of 30 cells and <nl>, then <end>
IGNORE = -100                                           # the target of a token that is not scored
STRIDE = 64                                             # slots by which decoding reads more of its cache
# dense bfloat16 FLOP/s, from the data sheets
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "4090": 165e12, "5090": 210e12}


# ---------------------------------------------------------------------------------------- grids and positions
def encode_grid(grid, stop):
    """(h, w) array -> its h·(w+1) + 1 tokens: rows, each closed by <nl>, then `stop`."""
    return [token for row in grid.tolist() for token in (*row, NL)] + [stop]


def decode_grid(tokens):
    """The rows that `tokens` (up to <end>) spell, or None: no rectangle of 1..30 by 1..30 colours."""
    body, end, _ = bytes(list(tokens)).partition(bytes([END]))
    *rows, rest = body.split(bytes([NL]))
    widths = {len(row) for row in rows}
    ok = end and not rest and len(widths) == 1 and 0 not in widths and max(*widths, len(rows)) <= MAX_SIDE
    return [list(row) for row in rows] if ok and max(b"".join(rows)) <= 9 else None


def encode_prompt(grid):
    return [START] + encode_grid(grid, SEP)


def pair_tokens(x, y):
    """Length of a pair in its longest view: cells, a <nl> for each row or column, <start>, <sep>, <end>."""
    return x.size + max(x.shape) + y.size + max(y.shape) + 3


def advance(token, pos):
    """The position (row, column, role) after `token` (...,) at `pos` (..., 3)."""
    row, column, role = pos.unbind(-1)
    opens = (token == START) | (token == SEP)
    row = torch.where(opens, 0, row + (token == NL))
    column = torch.where(opens | (token == NL), 0, column + 1)
    return torch.stack((row, column, role | (token == SEP)), dim=-1)


def positions(tokens):
    """Positions (B, T, 3) of whole sequences (B, T): what `advance` gives token by token, all at once."""
    t = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    before = F.pad(tokens[:, :-1], (1, 0), value=START)                       # the token before each
    opens, newline = (before == START) | (before == SEP), before == NL
    newlines = newline.cumsum(1)
    row = newlines - (newlines * opens).cummax(1).values                      # rows since the grid began
    column = t - (t * (opens | newline)).cummax(1).values
    return torch.stack((row, column, (before == SEP).cumsum(1).clamp(max=1)), dim=-1)


# ------------------------------------------------------------------------------------------ model
@dataclass
class Config:
    n_vocab: int = N_VOCAB  # tokens
    n_task: int = 1         # task embeddings
    n_view: int = 8         # view embeddings
    d_model: int = 128      # D
    n_head: int = 2         # H
    n_layer: int = 4        # L
    ffn_factor: int = 1     # f of MoIE; 0 leaves the FFN out
    dense: bool = False     # nn.Linear attention and a 4x GELU FFN: the control of 12·D² weights per block
    dropout: float = 0.0    # share of a branch's output, in training
    dtype: str = "float32"  # or "bfloat16": of the products, by autocast


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        d_ffn = 4 * c.d_model if c.dense else c.ffn_factor * c.d_model
        self.token = nn.Embedding(c.n_vocab, c.d_model)
        self.task = nn.Embedding(c.n_task, c.d_model)
        self.view = nn.Embedding(c.n_view, c.d_model)
        block = c.d_model, c.n_head, d_ffn, c.dense, c.dropout
        self.blocks = nn.ModuleList(Block(*block) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, c.n_vocab, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        """SPL and nn.Linear initialize themselves; what the model adds is set here."""
        for table in (self.token, self.task, self.view):
            nn.init.normal_(table.weight, std=0.1)    # small, so that the blocks soon outweigh them
        nn.init.zeros_(self.head.weight)              # the first prediction is uniform

    def forward(self, tokens, task, view, pos=None, caches=None, mask=None):
        """tokens (B, T), task (B,), view (B,) -> logits (B, T, n_vocab); causal without a mask.

        pos (B, T, any number of axes) replaces `positions(tokens)`.
        """
        x = self.token(tokens) + (self.task(task) + self.view(view)).unsqueeze(1)     # (B, T, D)
        rope = rotary(positions(tokens) if pos is None else pos, self.config.d_model // self.config.n_head)
        with self.autocast():
            for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
                x = block(x, rope, cache, mask)                                       # (B, T, D)
            return self.head(self.norm(x))                                            # (B, T, n_vocab)

    def autocast(self):
        return torch.autocast(self.head.weight.device.type, torch.bfloat16, self.config.dtype == "bfloat16")

    def parameter_groups(self, weight_decay):
        """For an optimizer: the blocks' matrices decay; embeddings, head and vectors do not."""
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if not any(p is matrix for matrix in matrices)]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def spls(self):
        return {name: m for name, m in self.named_modules() if isinstance(m, SparseProtoLinear)}

    @contextmanager
    def watch(self):
        """While open, each forward fills the dict that this yields: {name of an SPL: (SPL, x, Y_out)}; Y_out
        keeps its gradient."""
        def keep(name):
            def hook(spl, x, y):
                seen[name] = spl, x[0], y
                if y.requires_grad:
                    y.retain_grad()
            return hook
        seen, hooks = {}, [spl.register_forward_hook(keep(name)) for name, spl in self.spls().items()]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def n_params(self):
        """Parameters, embeddings apart."""
        return sum(p.numel() for part in (self.blocks, self.norm, self.head) for p in part.parameters())

    def flops_per_token(self, T):
        """Forward FLOPs per token at length T, products alone: 2 a weight, 4·T·D a layer, as if unmasked."""
        weights = sum(p.numel() for m in (self.blocks, self.head) for p in m.parameters() if p.ndim == 2)
        return 2 * weights + 4 * T * self.config.d_model * self.config.n_layer

    def mfu(self, tokens_per_s, T):
        """Training FLOPs (3 forwards) as a share of the GPU's bfloat16 peak; None on a CPU or unknown GPU."""
        name = torch.cuda.get_device_name() if self.head.weight.is_cuda else ""
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        return peak and 3 * self.flops_per_token(T) * tokens_per_s / peak

    @torch.inference_mode()
    def generate(self, tokens, lengths, task, view, max_new, end=END, limit=MAX_SIDE, return_logits=False):
        """Greedy continuation of right-padded prompts, all at once -> (B, N <= max_new), filled with `end`.

        tokens (B, P), lengths (B,). A row ends with `end`, or where its grid exceeds `limit` a side. Its new
        tokens are cached in the slots after P. Positions travel as angles, so a slot means nothing: the mask
        alone says what is read, never the padding. The slots read grow by STRIDE; on CUDA, the first step of
        a size runs as it stands, and the others are a graph of it.
        """
        (B, P), c, device = tokens.shape, self.config, tokens.device
        dtype = torch.bfloat16 if c.dtype == "bfloat16" else self.head.weight.dtype
        size = math.ceil((P + max_new) / STRIDE) * STRIDE
        caches = [KVCache(B, c.n_head, size, c.d_model // c.n_head, device, dtype) for _ in self.blocks]
        last, pos = (torch.arange(B, device=device), lengths - 1), positions(tokens)
        logits, token, now = self(tokens, task, view, pos, caches)[last], tokens[last], pos[last]
        mask = (torch.arange(size, device=device) < lengths[:, None])[:, None, None]       # (B, 1, 1, size)
        out, all_logits, done = [], [], torch.zeros(B, dtype=torch.bool, device=device)
        for slot in range(P, P + max_new):
            now.copy_(advance(token, now))                                            # (B, 3)
            token.copy_(logits.argmax(-1).masked_fill(done, end))                     # (B,)
            done = done | (token == end) | (now > limit).any(-1)
            out.append(token.clone())
            if return_logits:
                all_logits.append(logits.clone())
            if done.all() or slot == P + max_new - 1:
                break
            mask[..., slot], grows = True, slot == P or slot % STRIDE == 0
            if grows:
                read = mask[..., :(slot // STRIDE + 1) * STRIDE]
                step = partial(self, token[:, None], task, view, now[:, None], caches, read)
            logits = step()[:, -1]
            if grows and tokens.is_cuda:
                step = captured(step)
        return (torch.stack(out, 1), torch.stack(all_logits, 1)) if return_logits else torch.stack(out, 1)


# ------------------------------------------------------------------------------------------ loss and monitors
def task_loss(model, tokens, task, view, targets):
    """Cross-entropy summed over the tokens that have a target; the caller divides by their number."""
    logits = model(tokens, task, view).flatten(0, 1).float()                                  # (B·T, n_vocab)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def unpadded(targets):
    """(B, T): 1 up to a row's last target, 0 in the padding after it."""
    return (targets != IGNORE).int().flip(1).cummax(1).values.flip(1)


def pi_score(loss, entropy, grad_norm, a=1.0, c=0.5):
    """Predictive integrity (SigmaPI), in (0, 1]: exp(−a·((1 − c)·loss/entropy + c·grad_norm))."""
    return math.exp(-a * ((1 - c) * loss / max(entropy, 1e-9) + c * grad_norm))


@torch.no_grad()
def evaluate(model, batches):
    """Means over `batches` of (tokens, task, view, targets). Per target: loss, entropy, tokens (share right);
    per row: grids (share right throughout); per token up to a row's last target, for each SPL and for their
    mean: active (share of M > 0) and failed (routing failure: no neuron active)."""
    sums, n = Counter(), Counter()
    model.eval()
    with model.watch() as seen, model.autocast(), torch.compiler.set_stance("force_eager"):
        for *inputs, targets in batches:
            logp = model(*inputs).float().log_softmax(-1)                                 # (B, T, n_vocab)
            scored, right = targets != IGNORE, logp.argmax(-1) == targets                 # (B, T)
            real = unpadded(targets)                                                      # (B, T)
            loss = F.nll_loss(logp.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            sums.update(loss=loss, entropy=-((logp.exp() * logp).sum(-1) * scored).sum(),
                        tokens=(right & scored).sum(), grids=(right | ~scored).all(1).sum())
            n.update(scored=scored.sum(), rows=len(targets), real=real.sum())
            for name, (spl, x, _) in seen.items():
                fires = spl.route(x)[1] > 0                                               # (B, T, D_out)
                for kind, share in ("active", fires.float().mean(-1)), ("failed", ~fires.any(-1)):
                    sums[f"{kind} {name}"] += (share * real).sum()
                    sums[kind] += (share * real).sum() / len(seen)
    model.train()
    per = {"loss": "scored", "entropy": "scored", "tokens": "scored", "grids": "rows"}
    means = {name: float(total / n[per.get(name, "real")]) for name, total in sums.items()}
    return {"active": math.nan, "failed": math.nan} | means                 # the dense control has no SPL


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, T, new = 64, 32, 40
    tokens, zero = torch.randint(14, (B, T), device=device), torch.zeros(B, device=device).long()
    print(f"A model of D=128, L=4 on {device}: a training step on {B} sequences of {T} tokens")
    print(f"{'':10} {'parameters':>11} {'FLOPs/token':>12} {'ms':>7}")
    models = {"no FFN": Config(ffn_factor=0), "MoIE f=1": Config(), "dense": Config(dense=True)}
    models = {name: Transformer(config).to(device) for name, config in models.items()}
    t = bench({name: lambda m=m: m(tokens, zero, zero).sum().backward() for name, m in models.items()})
    for name, m in models.items():
        print(f"{name:10} {m.n_params():11} {m.flops_per_token(T):12} {1000 * t[name]:7.1f}")

    model = models["no FFN"].eval()
    nn.init.normal_(model.head.weight)
    cached = partial(model.generate, tokens, zero + T, zero, zero, new, end=-1, limit=math.inf)

    @torch.inference_mode()
    def recomputed():
        seq = tokens
        for _ in range(new):
            seq = torch.cat((seq, model(seq, zero, zero)[:, -1:].argmax(-1)), 1)
        return seq[:, T:]

    t = bench({"cached": cached, "recomputed": recomputed}, seconds=0)
    print(f"Decoding {new} tokens for {B} prompts: {B * new / t['cached']:.0f} tokens/s with the cache, "
          f"{B * new / t['recomputed']:.0f} recomputing the prefix: {t['recomputed'] / t['cached']:.0f}x")
    assert (cached() == recomputed()).float().mean() > 0.99
