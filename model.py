"""The transformer: tokens, embeddings, L blocks, norm, head; size, FLOPs, cached generation, loss, monitors.

    x      = token embedding + task embedding + view embedding        (B, T, D)
    x      = block_l(x), l = 1..L                                     positions: rotary angles in each block
    logits = head(norm(x))                                            (B, T, N_VOCAB)

A sequence is a pair of grids; a token's position is its row, its column and its role (0 input, 1 output):

    <start> input rows, <nl> after each <sep> output rows, <nl> after each <end>

Symbols   B batch, T tokens, P prompt columns, D width, H heads, h = D/H, L layers, f FFN factor.
Copy      this file, block.py, dynsiha.py and spl.py.
Run       python model.py; python model.py RUN shows where a trained model of train_arc.py looks
"""

import math
import pickle
import struct
import sys
from collections import Counter, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from block import Block
from dynsiha import KVCache, double_attention, rotary
from spl import SparseProtoLinear, bench, routing_loss

START, NL, SEP, END, N_VOCAB = 10, 11, 12, 13, 14       # 0..9 are the colours
MAX_SIDE = 30                                           # rows and columns of a grid, at most
MAX_OUTPUT = MAX_SIDE * (MAX_SIDE + 1) + 1              # 30 rows of 30 cells and <nl>, then <end>
IGNORE = -100                                           # the target of a token that is not scored
INVERSE = 0, 3, 2, 1, 4, 5, 6, 7                        # the view that undoes each: 1 and 3 are quarter turns
N_VIEW = len(INVERSE)
STRIDE = 64                                             # slots by which decoding reads more of its cache
# dense bfloat16 FLOP/s, from the data sheets
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "4090": 165e12, "5090": 210e12}


class InputError(ValueError):
    """Bad input. Its text is one line that names the file, the task and the fault."""


# ------------------------------------------------------------------------------------------ grids, positions
def view_grid(grid, view):
    """One of the 8 dihedral views: transposed from 4 on, then turned by view % 4 quarters. INVERSE[view] is
    the view that undoes it."""
    return np.rot90(grid.T if view >= 4 else grid, view % 4)


def encode_grid(grid):
    """(h, w) array -> its h·(w+1) tokens, a <nl> after each row."""
    return [token for row in grid.tolist() for token in (*row, NL)]


def decode_grid(tokens):
    """The rows that `tokens` (up to <end>) spell, or None: no rectangle of 1..30 by 1..30 colours."""
    answer, end, _ = bytes([*tokens]).partition(bytes([END]))           # `end` is empty if there is no <end>
    *rows, rest = map(list, answer.split(bytes([NL])))                  # `rest` follows the last <nl>
    if not end or rest or len({len(row) for row in rows}) != 1:         # unfinished, no row, or no rectangle
        return None
    sides = len(rows), len(rows[0])
    return rows if 1 <= min(sides) and max(sides) <= MAX_SIDE and max(map(max, rows)) <= 9 else None


def encode_prompt(grid):
    """(h, w) array -> the tokens of a prompt: <start>, the grid, <sep>."""
    return [START, *encode_grid(grid), SEP]


def pair_tokens(x, y):
    """Length of a pair in its longest view: cells, a <nl> for each row or column, <start>, <sep>, <end>."""
    newlines = max(np.add(x.shape, y.shape))        # the rows of both grids, or, transposed, their columns
    return x.size + y.size + newlines + 3


# One sequence: the first n_prompt of its tokens are given, and <end> follows its last.
Sample = namedtuple("Sample", "task view tokens n_prompt")


def encode_views(task, x, y=None):
    """[Sample in each of the 8 views] of a pair; without an output y, of the prompt alone."""
    samples = []
    for view in range(N_VIEW):
        prompt = encode_prompt(view_grid(x, view))
        answer = [] if y is None else encode_grid(view_grid(y, view))
        samples.append(Sample(task, view, np.array(prompt + answer, dtype=np.uint8), len(prompt)))
    return samples


def collate(samples, device):
    """Samples -> tokens (B, T), task (B,), view (B,), targets (B, T) on `device`, padded on the right.
    The target at t is token t + 1 where that is an output token or <end>, IGNORE elsewhere."""
    T, on_cuda = max(len(sample.tokens) for sample in samples), torch.device(device).type == "cuda"
    if on_cuda:
        T = math.ceil(T / 8) * 8                            # other lengths would be compiled once more
    tokens, targets = np.full((len(samples), T), END), np.full((len(samples), T), IGNORE)
    for row, (_, _, sequence, n_prompt) in enumerate(samples):
        tokens[row, :len(sequence)] = sequence
        targets[row, n_prompt - 1:len(sequence)] = [*sequence[n_prompt:], END]
    task, view = [sample.task for sample in samples], [sample.view for sample in samples]
    parts = [torch.as_tensor(part) for part in (tokens, task, view, targets)]
    if on_cuda:                                             # from pinned memory, no copy waits for the GPU
        parts = [part.pin_memory().to(device, non_blocking=True) for part in parts]
    return parts


def advance(token, pos):
    """The position (row, column, role) of what follows `token` (...,), which itself is at `pos` (..., 3).
    <start> and the first cell of the input are both at (0, 0, 0)."""
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
    # `newlines` never falls, so its maximum over the openings so far is its value at the last one.
    row = newlines - (newlines * opens).cummax(1).values
    column = t - (t * (opens | newline)).cummax(1).values
    return torch.stack((row, column, (before == SEP).cumsum(1).clamp(max=1)), dim=-1)


# ------------------------------------------------------------------------------------------ model
@dataclass
class Config:
    n_task: int = 1         # task embeddings
    d_model: int = 128      # D
    n_head: int = 2         # H
    n_layer: int = 4        # L
    ffn_factor: int = 1     # hidden width of the FFN over D; 0 leaves the FFN out
    dense: bool = False     # nn.Linear and GELU in place of SPLs; with ffn_factor 4, the control
    moie_norm: bool = False # an RMSNorm before the second SPL of the FFN
    tied_gate: bool = False # W_g = −W_p in every SPL: two matrices each; train_arc.py ties them
    dropout: float = 0.0    # share of a branch's output, in training
    dtype: str = "float32"  # or "bfloat16": of the products, by autocast


class Transformer(nn.Module):
    """Tokens (B, T), with a task and a view for each row, -> logits (B, T, N_VOCAB)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.token = nn.Embedding(N_VOCAB, c.d_model)
        self.task = nn.Embedding(c.n_task, c.d_model)
        self.view = nn.Embedding(N_VIEW, c.d_model)
        self.blocks = nn.ModuleList(
            Block(c.d_model, c.n_head, c.ffn_factor, c.dense, c.dropout, c.moie_norm, c.tied_gate)
            for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, N_VOCAB, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        """SPL and nn.Linear initialize themselves; what the model adds is set here."""
        for table in (self.token, self.task, self.view):
            nn.init.normal_(table.weight, std=0.1)    # small, so that the blocks soon outweigh them
        nn.init.zeros_(self.head.weight)              # the first prediction is uniform
        if self.config.dense:
            # Each branch of the control starts at 0, as in the runs of results/README.md.
            for name, p in self.blocks.named_parameters():
                if ".attn.o." in name or ".ffn.down." in name:
                    nn.init.zeros_(p)

    def forward(self, tokens, task, view, pos=None, caches=None, mask=None):
        """tokens (B, T), task (B,), view (B,) -> logits (B, T, N_VOCAB); causal without a mask.

        pos (B, T, any number of axes) replaces `positions(tokens)`.
        """
        x = self.token(tokens) + (self.task(task) + self.view(view)).unsqueeze(1)     # (B, T, D)
        rope = rotary(positions(tokens) if pos is None else pos, self.config.d_model // self.config.n_head)
        with self.autocast():
            for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
                x = block(x, rope, cache, mask)                                       # (B, T, D)
            return self.head(self.norm(x))                                            # (B, T, N_VOCAB)

    def autocast(self):
        return torch.autocast(self.head.weight.device.type, torch.bfloat16, self.config.dtype == "bfloat16")

    def spls(self):
        return {name: m for name, m in self.named_modules() if isinstance(m, SparseProtoLinear)}

    def routing_weights(self):
        """W_p and W_g of all SPLs. The blocks' other matrices, W_mu and nn.Linear's weights, are for Muon."""
        return [p for name, p in self.named_parameters() if name.endswith(("proto_weight", "gate_weight"))]

    @contextmanager
    def watch(self):
        """While open, each forward fills the dict that this yields: {name of an SPL: (SPL, x, Y_out)}; Y_out
        keeps its gradient."""
        seen, names = {}, {spl: name for name, spl in self.spls().items()}

        def keep(spl, inputs, y):
            seen[names[spl]] = spl, inputs[0], y
            if y.requires_grad:
                y.retain_grad()
        hooks = [spl.register_forward_hook(keep) for spl in names]
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
        """Training FLOPs (3 forwards) as a share of one GPU's bfloat16 peak, at its tokens/s; None on a CPU
        or unknown GPU."""
        name = torch.cuda.get_device_name() if self.head.weight.is_cuda else ""
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        return peak and 3 * self.flops_per_token(T) * tokens_per_s / peak

    @torch.inference_mode()
    def generate(self, tokens, lengths, task, view, max_new, end=END, limit=MAX_SIDE, return_logits=False):
        """Greedy continuation of right-padded prompts, all at once -> (B, N <= max_new), filled with `end`.

        tokens (B, P), lengths (B,). A row ends with `end`, or where its grid exceeds `limit` a side. Its new
        tokens are cached in the slots after P. A key holds its position, as angles, so the order of slots is
        free: the mask alone says what is read, never the padding. The slots that are read grow by STRIDE.
        With return_logits also the logits (B, N, N_VOCAB) that each token was chosen by.
        """
        (B, P), c, device = tokens.shape, self.config, tokens.device
        dtype = torch.bfloat16 if c.dtype == "bfloat16" else self.head.weight.dtype
        size = math.ceil((P + max_new) / STRIDE) * STRIDE
        caches = [KVCache(B, c.n_head, size, c.d_model // c.n_head, device, dtype) for _ in self.blocks]
        row, last, pos = torch.arange(B, device=device), lengths - 1, positions(tokens)
        logits = self(tokens, task, view, pos, caches)[row, last]                     # (B, N_VOCAB)
        token, now = tokens[row, last], pos[row, last]      # the last token, (B,), and its position, (B, 3)
        mask = (torch.arange(size, device=device) < lengths[:, None])[:, None, None]  # (B, 1, 1, size)
        out, all_logits, done = [], [], torch.zeros(B, dtype=torch.bool, device=device)
        for slot in range(P, P + max_new):
            # A CUDA graph reads the very tensors that it was recorded with, so `now`, `token` and `mask`, of
            # which `step` has views, are updated in place, and what is kept of a step is a copy. `now` comes
            # first: the new token's position follows from the last token, which the next line replaces.
            now.copy_(advance(token, now))
            token.copy_(logits.argmax(-1).masked_fill(done, end))
            done = done | (token == end) | (now > limit).any(-1)
            out.append(token.clone())
            if return_logits:
                all_logits.append(logits.clone())
            if done.all() or slot == P + max_new - 1:
                break
            mask[..., slot] = True
            # The first 64, 128, ... slots are read. For each size the step runs once as it is; on CUDA it is
            # recorded then, and replayed up to the next size.
            grows = slot == P or slot % STRIDE == 0
            if grows:
                read = mask[..., :(slot // STRIDE + 1) * STRIDE]
                step = partial(self, token[:, None], task, view, now[:, None], caches, read)
            logits = step()[:, -1]
            if grows and tokens.is_cuda:
                step = captured(step)
        return (torch.stack(out, 1), torch.stack(all_logits, 1)) if return_logits else torch.stack(out, 1)


def captured(step):
    """`step`, which must have run before, as one CUDA graph: a call launches all its kernels together. They
    read and write the tensors that `step` uses now; the caller keeps these and updates them in place."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay():
        graph.replay()
        return out
    return replay


# ------------------------------------------------------------------------------------------ loss and monitors
def task_loss(model, tokens, task, view, targets):
    """Cross-entropy summed over the tokens that have a target; the caller divides by their number."""
    logits = model(tokens, task, view).flatten(0, 1).float()                                  # (B·T, N_VOCAB)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def sample_losses(model, tokens, task, view, targets):
    """(B,): the cross-entropy summed over each row's targets, -log of the probability of its output."""
    logits = model(tokens, task, view).float().transpose(1, 2)                               # (B, N_VOCAB, T)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").sum(1)


def train_routing(model, seen, targets, clip):
    """SARS, after the backward pass of the task loss under `watch`: W_p and W_g get the gradient of the
    routing loss in place of the task loss's, clipped by itself. Returns that loss, the mean over SPLs."""
    weights = model.routing_weights()
    with model.autocast():
        losses = [routing_loss(spl, x, Y_out, unpadded(targets)) for spl, x, Y_out in seen.values()]
        loss = sum(losses) / len(losses)
    for p, gradient in zip(weights, torch.autograd.grad(loss, weights)):
        p.grad = gradient
    nn.utils.clip_grad_norm_(weights, clip)
    return loss


def unpadded(targets):
    """(B, T): 1 up to a row's last target, 0 in the padding after it."""
    t = torch.arange(targets.shape[1], device=targets.device)
    last = (t * (targets != IGNORE)).amax(1, keepdim=True)
    return (t <= last).int()


def pi_score(loss, entropy, grad_norm, a=1.0, c=0.5):
    """Predictive integrity (SigmaPI), in (0, 1]: exp(−a·((1 − c)·loss/entropy + c·grad_norm))."""
    return math.exp(-a * ((1 - c) * loss / max(entropy, 1e-9) + c * grad_norm))


@torch.no_grad()
def evaluate(model, batches):
    """Means over `batches` of (tokens, task, view, targets). Per target: loss, entropy, tokens (share right);
    per row: grids (share right throughout); per token up to a row's last target, for each SPL and for their
    mean: active (share of M > 0) and failed (routing failure: no neuron active). A model without SPLs has
    neither of these two."""
    sums, n, training = Counter(), Counter(), model.training
    model.eval()
    with model.watch() as seen, model.autocast(), torch.compiler.set_stance("force_eager"):
        for *inputs, targets in batches:
            logp = model(*inputs).float().log_softmax(-1)                                 # (B, T, N_VOCAB)
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
    model.train(training)
    per = {"loss": "scored", "entropy": "scored", "tokens": "scored", "grids": "rows"}    # the others: "real"
    return {name: float(total / n[per.get(name, "real")]) for name, total in sums.items()}


def load_checkpoint(run):
    """What a run of train_arc.py has saved in its folder, `run`; nothing that it holds is executed. "shape"
    has the arguments of Config, "pairs" a digest of the pairs. InputError names the file and the fault."""
    file = Path(run, "checkpoint.pt")
    parts = "flags", "shape", "names", "pairs", "step", "seconds", "log", "model", "optimizers"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        Config(**state["shape"])
        return {part: state[part] for part in parts}
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
            pickle.UnpicklingError, struct.error) as fault:         # what torch.load raises over broken files
        reason = str(fault).partition(". ")[0][:200]
        raise InputError(f"{file}: {type(fault).__name__}: {reason}; expected the folder of a run") from None


def restore(target, state, run):
    """Loads `state` of that run into a model or an optimizer; InputError names the run if it does not fit."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as fault:  # another revision's?
        reason = " ".join(str(fault).split())[:200]
        raise InputError(f"{run}: its checkpoint does not fit: {reason}") from None


# ------------------------------------------------------------------------------------------ demos
def show_costs():
    """Prints what the arms cost, in training and in decoding, and what the cache saves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, T, new = 64, 32, 40
    tokens, zero = torch.randint(10, (B, T), device=device), torch.zeros(B, device=device).long()
    configs = {"no FFN": Config(ffn_factor=0), **{f"MoIE f={f}": Config(ffn_factor=f) for f in (1, 2, 4)},
               "dense": Config(dense=True, ffn_factor=4)}
    models = {name: Transformer(config).to(device).eval() for name, config in configs.items()}

    def train(model):
        task_loss(model, tokens, zero, zero, tokens).backward()

    trains, decodes = {}, {}
    for name, model in models.items():
        nn.init.normal_(model.head.weight)
        trains[name] = partial(train, model)
        decodes[name] = partial(model.generate, tokens, zero + T, zero, zero, new, end=-1, limit=math.inf)
    train_s, decode_s = bench(trains), bench(decodes, seconds=0)
    print(f"D=128, L=4, gates free, {device}: a forward and backward pass of {B} x {T} tokens, uncompiled;\n"
          f"tokens decoded in a second after {B} prompts; each as a share of no FFN's")
    print(f"{'':10}{'parameters':>12} {'FLOPs/token':>12} {'ms':>7} {'share':>6} {'decoded':>8} {'share':>6}")
    for name, model in models.items():
        print(f"{name:10} {model.n_params():11} {model.flops_per_token(T):12} {1000 * train_s[name]:7.1f} "
              f"{train_s[name] / train_s['no FFN']:6.2f} {B * new / decode_s[name]:8.0f} "
              f"{decode_s['no FFN'] / decode_s[name]:6.2f}")
    model, cached = models["no FFN"], decodes["no FFN"]

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


def show_attention(run):
    """Prints both attentions of a trained model's block 0, at the end of the first input of ARC's task
    0d3d703e, three rows of 3 1 2."""
    state = load_checkpoint(run)
    if state["shape"]["dense"]:
        raise InputError(f"{run}: expected SPLs, found the dense control")
    task = state["names"].index("0d3d703e") if "0d3d703e" in state["names"] else 0
    model = Transformer(Config(**state["shape"])).eval()
    restore(model, state["model"], run)
    prompt = torch.tensor([[START, *[3, 1, 2, NL] * 3, SEP]])
    with model.watch() as seen, torch.no_grad():
        model(prompt, torch.tensor([task]), torch.tensor([0]))
    layer, (_, x, _) = model.blocks[0].attn, seen["blocks.0.attn.q"]
    masks, weights = double_attention(layer, x, rotary(positions(prompt), x.shape[-1] // layer.n_head))
    print(f"The double attention of <sep>, after which the output begins, in block 0 of {run}")
    for part, mask in masks.items():
        M = mask[0, -1]
        strongest = "  ".join(f"{j}: {M[j]:.2f}" for j in M.topk(4).indices)
        print(f"  {part}: {(M > 0).sum()} of {len(M)} neurons fire; {strongest}")
    names = [*"0123456789", "<start>", "<nl>", "<sep>", "<end>"]
    for head, weight in enumerate(weights[0, :4, -1]):
        best = "  ".join(f"{names[prompt[0, t]]} at {t}: {weight[t]:.2f}" for t in weight.topk(3).indices)
        print(f"  head {head} looks at {best}")


if __name__ == "__main__":
    try:
        show_attention(sys.argv[1]) if len(sys.argv) > 1 else show_costs()
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
