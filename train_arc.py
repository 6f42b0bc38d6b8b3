"""Train a DynSIHA transformer on ARC, then score it.

    python train_arc.py --no-ffn                 attention only, on this machine's GPU or CPU
    python train_arc.py                          with the MoIE FFN
    python train_arc.py --dense                  the standard transformer of as many parameters as --no-ffn
    python train_arc.py --help                   every flag

The recipe: one demonstration pair is one sequence; a learned embedding per task says which rule applies. Training
sees the demonstration pairs of every task, the evaluation tasks' too, and never a test output of the evaluation
split: these are read for `score` alone, at the end. The training split's own test pairs are held out, for tuning.

    <start> input rows, <nl> after each <sep> output rows, <nl> after each <end>

Symbols   B batch, T tokens, P pairs, V views.
"""

import argparse
import csv
import functools
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Config, Transformer

# ---------------------------------------------------------------------------------------------- grids <-> tokens
START, NL, SEP, END, N_VOCAB = 10, 11, 12, 13, 14       # 0..9 are the colours
MAX_SIDE, IGNORE = 30, -100
MAX_OUTPUT = MAX_SIDE * (MAX_SIDE + 1) + 1              # 30 rows of 30 cells and <nl>, then <end>


class DataError(Exception):
    """Bad input; its text names the file, the task and the fault."""


def encode_grid(grid, stop):
    """(h, w) grid -> h·(w+1) + 1 tokens: rows, each closed by <nl>, then `stop`."""
    return np.append(np.pad(grid, ((0, 0), (0, 1)), constant_values=NL).ravel(), stop).astype(np.uint8)


def decode_grid(tokens):
    """The grid that `tokens` (up to <end>) spell, or None: no rectangle of 1..30 by 1..30 colours."""
    tokens = np.asarray(tokens)
    ends = np.flatnonzero(tokens == END)
    body = tokens[:ends[0]] if len(ends) else tokens[:0]
    width = np.flatnonzero(body == NL)[0] if NL in body else 0
    if not 1 <= width <= MAX_SIDE or len(body) % (width + 1) or len(body) // (width + 1) > MAX_SIDE:
        return None
    rows = body.reshape(-1, width + 1)
    return rows[:, :-1] if (rows[:, -1] == NL).all() and (rows[:, :-1] <= 9).all() else None


def encode_prompt(x):
    return np.concatenate(([np.uint8(START)], encode_grid(x, SEP)))


def advance(token, pos):
    """The position (row, column, role) after `token` (...,) at `pos` (..., 3); role: 0 input, 1 output."""
    row, column, role = pos.unbind(-1)
    opens = (token == START) | (token == SEP)
    row = torch.where(opens, 0, row + (token == NL))
    column = torch.where(opens | (token == NL), 0, column + 1)
    return torch.stack((row, column, role | (token == SEP)), dim=-1)


def positions(tokens):
    """Positions (B, T, 3) of whole sequences (B, T): what `advance` gives token by token, all at once."""
    t = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    before = F.pad(tokens[:, :-1], (1, 0), value=START).long()                # the token before each
    role = (before == SEP).cumsum(1)
    newlines = (before == NL).cumsum(1)
    row = newlines - (newlines * (before == SEP)).cummax(1).values            # rows since the grid began
    opens = (before == NL) | (before == START) | (before == SEP)
    column = t - (t * opens).cummax(1).values
    return torch.stack((row, column, role), dim=-1)


# ---------------------------------------------------------------------------------------------- views
N_DIHEDRAL = 8


def view_grid(grid, view):
    """One of the 8 dihedral views: transposed from 4 on, then turned by view % 4 quarters."""
    return np.rot90(grid.T if view >= 4 else grid, view % 4)


def unview_grid(grid, view):
    grid = np.rot90(grid, -(view % 4))
    return grid.T if view >= 4 else grid


def colour_permutations(free, rng):
    """free (N, 10) bool: the colours that may change -> (N, 14) token tables; the rest map to themselves.

    Row n shuffles its free colours among themselves: sorted by random keys they fill their own slots.
    """
    table = np.tile(np.arange(N_VOCAB, dtype=np.uint8), (len(free), 1))
    slots = np.argsort(~free, axis=1, kind="stable")
    shuffled = np.argsort(np.where(free, rng.random(free.shape), 2.0), axis=1, kind="stable")
    np.put_along_axis(table, slots, shuffled.astype(np.uint8), axis=1)
    return table


# ---------------------------------------------------------------------------------------------- tasks
@dataclass
class Task:
    train: list     # demonstration pairs (input, output) of uint8 grids
    test: list      # input grids; their outputs are not here: only `read_solutions` returns them


def read_object(path):
    """The JSON object in `path`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: a {type(value).__name__}; expected an object")
    return value


def read_grid(value, where):
    """A JSON value -> (h, w) uint8 grid, or DataError."""
    rows = value if isinstance(value, list) else []
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(widths) != 1 or not 1 <= len(rows) <= MAX_SIDE or not 1 <= max(widths) <= MAX_SIDE:
        raise DataError(f"{where}: {len(rows)} rows of widths {sorted(widths)}; "
                        "expected 1 to 30 rows of one width, 1 to 30")
    for cell in (cell for row in rows for cell in row):
        if type(cell) is not int or not 0 <= cell <= 9:
            shown = type(cell).__name__ if isinstance(cell, (list, dict)) else json.dumps(cell)[:20]
            raise DataError(f"{where}: a cell is {shown}; expected an integer from 0 to 9")
    return np.array(rows, dtype=np.uint8)


def read_split(folder, split):
    """{id: (file, raw task)} of one split, in the Kaggle layout (one file) or GitHub's (a file per task)."""
    kaggle = Path(folder) / f"arc-agi_{split}_challenges.json"
    github = sorted((Path(folder) / split).glob("*.json"))
    if kaggle.exists():
        raw = {name: (kaggle, task) for name, task in read_object(kaggle).items()}
    else:
        raw = {file.stem: (file, read_object(file)) for file in github}
    if not raw:
        raise DataError(f"{folder}: no {split} tasks; expected {kaggle.name} or {split}/*.json")
    return raw


def read_grids(raw, part, key, where):
    """The grids raw[part][i][key] of one task."""
    pairs = raw.get(part) if isinstance(raw, dict) else None
    if not isinstance(pairs, list) or not pairs:
        raise DataError(f"{where}: no {part!r} pairs; expected a list of at least one")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, dict) or key not in pair:
            raise DataError(f"{where}: {part} {i} has no {key!r}")
    return [read_grid(pair[key], f"{where}: {part} {i} {key}") for i, pair in enumerate(pairs)]


def read_tasks(folder, split):
    """{id: Task} of one split. Test outputs, where a file has them, are left unread."""
    tasks = {}
    for name, (file, raw) in read_split(folder, split).items():
        inputs, outputs, tests = (read_grids(raw, part, key, f"{file}: task {name}")
                                  for part, key in (("train", "input"), ("train", "output"), ("test", "input")))
        tasks[name] = Task(list(zip(inputs, outputs)), tests)
    return tasks


def read_solutions(folder, split, tasks):
    """{id: [test output, ...]} for `tasks`: from the split's solutions file, or inline in its task files."""
    if not (Path(folder) / f"arc-agi_{split}_challenges.json").exists():
        return {name: read_grids(raw, "test", "output", f"{file}: task {name}")
                for name, (file, raw) in read_split(folder, split).items()}
    file, solutions = Path(folder) / f"arc-agi_{split}_solutions.json", {}
    found = read_object(file)
    for name, task in tasks.items():
        outputs = found.get(name)
        if not isinstance(outputs, list) or len(outputs) != len(task.test):
            count = len(outputs) if isinstance(outputs, list) else "no"
            raise DataError(f"{file}: task {name}: {count} solutions; expected {len(task.test)}")
        where = f"{file}: task {name}: test"
        solutions[name] = [read_grid(grid, f"{where} {i} output") for i, grid in enumerate(outputs)]
    return solutions


def without_leaks(extra, evaluation, known):
    """The `extra` tasks that share nothing with `evaluation`: no id, no set of demonstrations, no test input.

    `known` are ids to leave out as well. No evaluation output is needed to tell.
    """
    def key(grid):
        return grid.shape, grid.tobytes()

    def demos(task):
        return frozenset((key(x), key(y)) for x, y in task.train)

    taken = {demos(task) for task in evaluation.values()}
    asked = {key(x) for task in evaluation.values() for x in task.test}
    return {name: task for name, task in extra.items()
            if name not in evaluation and name not in known and demos(task) not in taken
            and not asked & {key(x) for x in [x for x, _ in task.train] + task.test}}


# ---------------------------------------------------------------------------------------------- batches
class Pairs:
    """Tokenized pairs in all 8 views, on one device: flat tokens; per [pair, view] their start and lengths."""

    def __init__(self, pairs, free, device):
        """pairs: [(task index, input, output)]; free (n_task, 10): the colours a task may permute."""
        rows = [(encode_prompt(view_grid(x, v)), encode_grid(view_grid(y, v), END))
                for _, x, y in pairs for v in range(N_DIHEDRAL)]
        shape = (len(pairs), N_DIHEDRAL)
        self.prompt = np.array([len(p) for p, _ in rows], dtype=np.int64).reshape(shape)
        self.length = np.array([len(p) + len(y) for p, y in rows], dtype=np.int64).reshape(shape)
        self.start = np.append(0, self.length.ravel().cumsum())[:-1].reshape(shape)
        self.task = np.array([task for task, _, _ in pairs], dtype=np.int64)
        self.free = free[self.task]
        self.device = device
        flat = np.concatenate([part for row in rows for part in row] + [np.full(2048, END, np.uint8)])
        self.flat = torch.from_numpy(flat).to(device)

    def batch(self, index, view, colours):
        """Pairs index (B,) in views (B,) under colour tables (B, 14) -> tokens, positions, task, view, targets.

        The target at t is token t + 1 where that is an output token, IGNORE elsewhere.
        """
        length = self.length[index, view]
        meta = np.stack((self.start[index, view], self.prompt[index, view], length, self.task[index], view))
        start, prompt, end, task, view = to_device(meta, self.device)
        t = torch.arange(int(length.max()), device=self.device)
        tokens = self.flat[start[:, None] + t].long()                                             # (B, T + 1)
        tokens = to_device(colours, self.device).long().gather(1, tokens)
        scored = (t >= prompt[:, None]) & (t < end[:, None])
        targets = tokens.masked_fill(~scored, IGNORE)[:, 1:]
        return tokens[:, :-1], positions(tokens[:, :-1]), task, view, targets


def prompt_tokens(x):
    """Length of the longest prompt over the views: <start>, <sep>, and a <nl> for each row or column."""
    return x.size + max(x.shape) + 2


def pair_tokens(x, y):
    return prompt_tokens(x) + y.size + max(y.shape) + 1


def to_device(array, device):
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def plan_epoch(pairs, batch_tokens, rng):
    """One epoch as (index, view, colours) batches: each pair once, in a fresh view, similar lengths together."""
    n = len(pairs.task)
    view = rng.integers(N_DIHEDRAL, size=n)
    length = pairs.length[np.arange(n), view]
    order = np.lexsort((rng.random(n), length))
    colours = colour_permutations(pairs.free, rng)
    cuts, first = [], 0
    for i in range(n):
        if (i + 1 - first) * (length[order[i]] - 1) > batch_tokens and i > first:
            cuts.append(i)
            first = i
    if first == n - 1 and cuts:
        cuts.pop()                      # a last lone pair joins the batch before: one row would compile anew
    parts = np.split(order, cuts)
    return [(parts[i], view[parts[i]], colours[parts[i]]) for i in rng.permutation(len(parts))]


def free_colours(task, permute=True):
    """(10,) bool: colours 1..9 but for those that only outputs show, since 'mark with red' must stay red."""
    shown = {c for x in [x for x, _ in task.train] + task.test for c in np.unique(x)}
    added = {c for _, y in task.train for c in np.unique(y)} - shown
    return np.array([permute and c > 0 and c not in added for c in range(10)])


# ---------------------------------------------------------------------------------------------- answers and scores
def answer(model, prompts, free, c, amp):
    """prompts [(task, input grid)] -> for each the list of grids decoded in 8 views x c.colour_votes colour tables.

    Each grid is turned and coloured back; invalid outputs are left out. The first table of a task changes nothing.
    """
    rng, jobs = np.random.default_rng(c.seed), []                       # (prompt, task, view, colour table, tokens)
    for n, (task, grid) in enumerate(prompts):
        tables = colour_permutations(np.repeat(free[task][None], c.colour_votes, 0), rng)
        tables[0] = np.arange(N_VOCAB)
        jobs += [(n, task, v, table, table[encode_prompt(view_grid(grid, v))])
                 for table in tables for v in range(N_DIHEDRAL)]
    grids, order = [None] * len(jobs), sorted(range(len(jobs)), key=lambda j: -len(jobs[j][-1]))
    with tqdm(total=len(jobs), desc="decode", unit="grid", dynamic_ncols=True) as bar:
        while order:
            longest = len(jobs[order[0]][-1])
            rows = max(1, c.decode_tokens // min(longest + MAX_OUTPUT, c.max_tokens))
            part, order = order[:rows], order[rows:]
            for j, tokens in zip(part, decode([jobs[j] for j in part], model, c, amp)):
                _, _, view, table, _ = jobs[j]
                grid = decode_grid(np.argsort(table)[tokens])
                grids[j] = grid if grid is None else unview_grid(grid, view)
            bar.update(len(part))
    found = [[] for _ in prompts]
    for (n, *_), grid in zip(jobs, grids):                              # in the order of the jobs, for ties
        found[n] += [] if grid is None else [grid]
    return found


def decode(jobs, model, c, amp):
    """Greedy outputs of one batch of jobs, longest prompt first: (B, N) tokens, closed by <end>.

    The bound on N comes from the format and the flags, never from the answer.
    """
    device = model.head.weight.device
    lengths = np.array([len(prompt) for *_, prompt in jobs])
    tokens = np.full((len(jobs), lengths[0]), END)
    for row, (*_, prompt) in zip(tokens, jobs):
        row[:len(prompt)] = prompt
    task, view = np.array([[task, view] for _, task, view, _, _ in jobs]).T
    tokens, lengths, task, view = (to_device(array, device) for array in (tokens, lengths, task, view))
    most = min(MAX_OUTPUT, c.max_tokens - int(lengths[-1]))
    with amp(), torch.compiler.set_stance("force_eager"):
        out = model.generate(tokens, lengths, positions(tokens), task, view, most, END, advance, limit=MAX_SIDE)
    return out.cpu().numpy()


def vote(grids):
    """The two most frequent grids as a submission has them; ties go to the one that came first, [[0]] fills up."""
    counts = Counter(tuple(map(tuple, grid.tolist())) for grid in grids)
    best = [[list(row) for row in grid] for grid, _ in counts.most_common(2)]
    return dict(zip(("attempt_1", "attempt_2"), best + [[[0]], [[0]]]))


def score(submission, solutions):
    """((pass@1, pass@2), tasks solved whole) by the ARC Prize's rule: mean over a task's outputs, then over tasks."""
    marks = np.zeros((len(solutions), 2))
    for mark, (name, outputs) in zip(marks, solutions.items()):
        answers = submission.get(name, [])
        for output, given in zip(outputs, answers):
            hits = [given.get(key) == output.tolist() for key in ("attempt_1", "attempt_2")]
            mark += np.array([hits[0], any(hits)]) / len(outputs)
    return marks.mean(0), int((marks[:, 1] > 1 - 1e-9).sum())


# ---------------------------------------------------------------------------------------------- training
def task_loss(model, tokens, pos, task, view, targets):
    logits = model(tokens, pos, task, view)                                                       # (B, T, 14)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def rate(used, warmup, decay):
    """Learning-rate factor when the fraction `used` of the budget is gone: linear up, constant, linear down to 0."""
    return min(1.0, used / warmup if warmup else 1.0, max(0.0, 1 - used) / decay if decay else 1.0)


@torch.no_grad()
def evaluate(model, pairs, batch_tokens, amp):
    """(loss per output token, token accuracy, grid accuracy) on `pairs` as they are: first view, true colours."""
    n = len(pairs.task)
    order, same = np.argsort(pairs.length[:, 0], kind="stable"), np.arange(N_VOCAB, dtype=np.uint8)
    size = max(1, batch_tokens // int(pairs.length[:, 0].max()))
    sums = torch.zeros(4, device=pairs.device)
    model.eval()
    for index in np.split(order, range(size, n, size)):
        *inputs, targets = pairs.batch(index, np.zeros_like(index), np.tile(same, (len(index), 1)))
        with amp(), torch.compiler.set_stance("force_eager"):
            logits = model(*inputs).float()
        scored, right = targets != IGNORE, logits.argmax(-1) == targets
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        sums += torch.stack((loss, (right & scored).sum(), (right | ~scored).all(1).sum(), scored.sum()))
    model.train()
    loss, tokens, grids, total = sums.tolist()
    return loss / total, tokens / total, grids / n


def make_optimizers(model, c):
    """Matrices of the blocks under AdamW or Muon, with decay; embeddings, head and vectors under AdamW, without."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    groups = [{"params": [p for p in model.parameters() if id(p) not in ids], "lr": c.lr, "weight_decay": 0.0}]
    if c.muon_lr:
        optimizers = [torch.optim.Muon(matrices, c.muon_lr, c.weight_decay, adjust_lr_fn="match_rms_adamw")]
    else:
        groups.append({"params": matrices, "lr": c.lr, "weight_decay": c.weight_decay})
        optimizers = []
    return optimizers + [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


# ---------------------------------------------------------------------------------------------- flags
def flag(default, text, least=0, most=1e9):
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass
class Run:
    """Every field is a flag. A default of None is filled in by device, from DEFAULTS."""
    ffn: bool = flag(True, "the MoIE feed-forward network in each block")
    dense: bool = flag(False, "the dense control: nn.Linear attention and a 4x GELU FFN")
    data: str = flag("data/arc-agi-1", "folder of the task set, in the Kaggle or the GitHub layout")
    extra: str = flag("", "folder of more tasks to train on; those of the evaluation split are dropped")
    out: str = flag("", "folder of this run; empty: runs/ARM-TIME")
    resume: str = flag("", "folder of a stopped run to go on with, under its own flags")
    heldout: bool = flag(True, "hold out the training split's test pairs, for tuning; without, train on them too")
    score: bool = flag(True, "answer and score the evaluation split at the end")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")
    seed: int = flag(0, "seed of weights, order, views and colours")
    minutes: float = flag(None, "training budget in minutes; scoring comes on top", 0.01)
    steps: int = flag(0, "training budget in steps, in place of minutes")
    d_model: int = flag(None, "width D", 2)
    n_head: int = flag(None, "heads H", 1)
    n_layer: int = flag(None, "layers L", 1)
    ffn_factor: int = flag(1, "hidden width of MoIE over D", 1)
    dropout: float = flag(None, "dropout on each branch", 0, 0.99)
    max_tokens: int = flag(None, "longest sequence; what is longer is not trained on, and counts as wrong", 1)
    batch_tokens: int = flag(None, "tokens per batch, padding included", 1)
    lr: float = flag(None, "peak learning rate", 1e-7)
    muon_lr: float = flag(0.0, "peak learning rate of Muon for the blocks' matrices, in place of AdamW's --lr")
    weight_decay: float = flag(0.1, "decay of the blocks' matrices")
    warmup: float = flag(0.02, "share of the budget in which the learning rate rises", 0, 1)
    decay: float = flag(0.5, "share of the budget in which it falls to 0", 0, 1)
    clip: float = flag(1.0, "largest gradient norm", 1e-6)
    permute_colours: bool = flag(True, "permute a task's input colours in training")
    colour_votes: int = flag(None, "colour tables under which each of the 8 views votes", 1)
    decode_tokens: int = flag(None, "size of a decoding batch: rows times columns of the cache", 1)
    dtype: str = flag(None, "float32, or bfloat16 by autocast")
    compile: bool = flag(None, "torch.compile the blocks")
    log_every: int = flag(20, "steps between lines of the log", 1)
    save_minutes: float = flag(5.0, "minutes between checkpoints", 0.01)

    @property
    def arm(self):
        return "dense" if self.dense else "ffn" if self.ffn else "no-ffn"


DEFAULTS = {
    "cpu": dict(minutes=10.0, d_model=128, n_head=2, n_layer=4, dropout=0.0, max_tokens=150, batch_tokens=768,
                lr=5e-3, colour_votes=4, decode_tokens=2**15, dtype="float32",
                compile=sys.platform == "linux" and shutil.which("g++") is not None),
    "cuda": dict(minutes=20.0, d_model=768, n_head=12, n_layer=10, dropout=0.1, max_tokens=1863, batch_tokens=2**15,
                 lr=2e-3, colour_votes=1, decode_tokens=2**20, dtype="bfloat16", compile=True),
}


def parse(argv=None):
    """The flags as a Run, and the checkpoint to go on from or None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Run):
        default = f.default
        if default is None:
            default = ", ".join(f"{device} {values[f.name]}" for device, values in DEFAULTS.items())
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {default})", **kind)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if len(given) > 1:
            raise DataError("--resume takes no other flag: the run goes on under its own")
        state = load_checkpoint(Path(given["resume"]) / "checkpoint.pt")
        c = Run(**state["config"] | {"out": given["resume"]})
        check(c)
        return c, state
    device = given.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    c = Run(**DEFAULTS.get(device, DEFAULTS["cpu"]) | given | {"device": device})
    check(c)
    c.out = c.out or time.strftime(f"runs/{c.arm}-seed{c.seed}-%Y%m%d-%H%M%S")
    if (Path(c.out) / "checkpoint.pt").exists():
        raise DataError(f"--out {c.out}: holds a run already; go on with --resume {c.out}, or name another folder")
    if Path(c.out).is_dir() and any(Path(c.out).iterdir()):
        raise DataError(f"--out {c.out}: is not empty; name another folder")
    return c, None


def check(c):
    for f in fields(c):
        value, least, most = getattr(c, f.name), f.metadata["least"], f.metadata["most"]
        if f.type in (int, float) and not least <= value <= most:
            raise DataError(f"--{f.name.replace('_', '-')} {value}: expected {least:g} to {most:g}")
    if c.dense and not c.ffn:
        raise DataError("--dense --no-ffn: the dense control has its own FFN; name one of the two")
    if c.device not in ("cpu",) + ("cuda",) * torch.cuda.is_available():
        raise DataError(f"--device {c.device}: not available here; expected cpu" + ", cuda" * torch.cuda.is_available())
    if c.d_model % (2 * c.n_head):
        raise DataError(f"--d-model {c.d_model}: expected a multiple of twice --n-head {c.n_head}")
    if c.dtype not in ("float32", "bfloat16"):
        raise DataError(f"--dtype {c.dtype}: expected float32 or bfloat16")


# ---------------------------------------------------------------------------------------------- runs
def load_data(c, device):
    """(names, free, pairs to train on, held-out pairs or None, evaluation tasks); no evaluation output among them."""
    training, evaluation = read_tasks(c.data, "training"), read_tasks(c.data, "evaluation")
    solutions = read_solutions(c.data, "training", training)
    if both := training.keys() & evaluation.keys():
        raise DataError(f"{c.data}: task {min(both)} is in both splits")
    twins = training.keys() - without_leaks(training, evaluation, {})       # ARC-1 has one; its test stays unseen
    extra = {}
    for split in ("training", "evaluation") if c.extra else ():
        new = read_tasks(c.extra, split)
        kept = without_leaks(new, evaluation, training | extra)
        print(f"{c.extra}: {len(kept)} of {len(new)} {split} tasks are new, {len(new) - len(kept)} dropped")
        extra |= kept
    tasks = training | evaluation | extra
    demos = [(n, x, y) for n, task in enumerate(tasks.values()) for x, y in task.train]
    tests = [(n, x, y) for n, (name, task) in enumerate(training.items()) if name not in twins
             for x, y in zip(task.test, solutions[name])]
    demos, tests = ([pair for pair in pairs if pair_tokens(*pair[1:]) <= c.max_tokens] for pairs in (demos, tests))
    if not demos:
        raise DataError(f"{c.data}: no pair of at most {c.max_tokens} tokens; raise --max-tokens")
    free = np.stack([free_colours(task, c.permute_colours) for task in tasks.values()])
    pairs = Pairs(demos if c.heldout else demos + tests, free, device)
    return list(tasks), free, pairs, Pairs(tests, free, device) if c.heldout and tests else None, evaluation


def batches(pairs, c):
    """Endless (epoch, batch); batch n follows from the seed alone, whatever the arm, and wherever a run resumes."""
    for epoch in itertools.count():
        for batch in plan_epoch(pairs, c.batch_tokens, np.random.default_rng((c.seed, epoch))):
            yield epoch, batch


def save(path, write):
    """Atomic: `write(file)` to a temporary file, flushed to the disk, then renamed."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def snapshot(c, model, optimizers, step, seconds):
    """Everything a run needs to go on as if it had not stopped."""
    return {"config": asdict(c), "step": step, "seconds": seconds,
            "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def restore(state, model, optimizers):
    try:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    except (KeyError, RuntimeError, ValueError) as e:
        raise DataError(f"the checkpoint does not fit this model and data: {str(e).partition(chr(10))[0]}") from None


def load_checkpoint(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        Run(**state["config"])
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise DataError(f"{path}: not a checkpoint of this program: {str(e).partition(chr(10))[0]}") from None
    return state


def open_log(path, step):
    """(file, csv writer) of log.csv. A resumed run keeps the lines up to its checkpoint and appends."""
    kept = []
    if path.exists():
        with open(path, newline="") as old:
            kept = [row for row in csv.DictReader(old) if int(row["step"]) <= step]
    file = open(path, "w", newline="")
    writer = csv.DictWriter(file, ("step", "epoch", "seconds", "lr", "loss", "grad_norm", "tokens_per_s", "padding",
                                   "heldout_loss", "heldout_tokens", "heldout_grids"))
    writer.writeheader()
    writer.writerows(kept)
    return file, writer


# ---------------------------------------------------------------------------------------------- main
def main(argv=None):
    c, state = parse(argv)
    device = torch.device(c.device)
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")          # TF32 where bfloat16 does not reach
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=c.dtype == "bfloat16")
    out = Path(c.out)

    # ---- data and model
    names, free, pairs, heldout, evaluation = load_data(c, device)
    model = Transformer(Config(n_vocab=N_VOCAB, n_task=len(names), n_view=N_DIHEDRAL, d_model=c.d_model,
                               n_head=c.n_head, n_layer=c.n_layer, ffn_factor=c.ffn_factor if c.ffn else 0,
                               dense=c.dense, dropout=c.dropout)).to(device)
    budget = f"{c.steps} steps" if c.steps else f"{c.minutes:g} minutes"
    print(f"{c.arm} on {device}: D={c.d_model} H={c.n_head} L={c.n_layer}, {model.n_params() / 1e6:.2f} M parameters, "
          f"{c.dtype}{', compiled' if c.compile else ''}; {len(pairs.task)} pairs of at most {c.max_tokens} tokens, "
          f"{budget}, {c.batch_tokens} tokens a step; into {out}  (any flag changes this: --help)")
    out.mkdir(parents=True, exist_ok=True)
    save(out / "config.json", lambda file: file.write(json.dumps(asdict(c), indent=1).encode()))
    optimizers = make_optimizers(model, c)
    if c.compile:                                   # before the clock starts; the layers share one compiled block
        for block in model.blocks:
            block.compile(dynamic=True)
        with amp():
            task_loss(model, *pairs.batch(*next(batches(pairs, c))[1])).backward()
        model.zero_grad()
    step, seconds = 0, 0.0
    if state:
        restore(state, model, optimizers)
        step, seconds = state["step"], state["seconds"]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group.setdefault("peak", group["lr"])

    # ---- train
    def checkpoint():
        save(out / "checkpoint.pt", functools.partial(torch.save, snapshot(c, model, optimizers, step, seconds)))

    file, log = open_log(out / "log.csv", step)
    tokens, padding, rows, held, shown, stop = 0, 0, 0, 0.0, {}, []
    handlers = {n: signal.signal(n, lambda *_: stop.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    start = clock = saved = time.perf_counter()
    start -= seconds
    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", dynamic_ncols=True)
    for epoch, batch in itertools.islice(batches(pairs, c), step, None):
        seconds = time.perf_counter() - start
        used = step / c.steps if c.steps else seconds / (60 * c.minutes)
        if used >= 1 or stop:
            break
        for group in groups:
            group["lr"] = group["peak"] * rate(used, c.warmup, c.decay)
        torch.manual_seed((c.seed << 32) + step)        # dropout, too, follows from the seed and the step

        # ---- the step
        *inputs, targets = pairs.batch(*batch)
        with amp():
            loss = task_loss(model, *inputs, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # ----

        step, tokens, rows = step + 1, tokens + targets.numel(), rows + len(targets)
        padding += targets.numel() - int((pairs.length[batch[0], batch[1]] - 1).sum())
        if step % c.log_every == 0:
            row = {"step": step, "epoch": epoch, "loss": loss.item(), "grad_norm": norm.item(), "lr": groups[0]["lr"],
                   "seconds": time.perf_counter() - start, "tokens_per_s": tokens / (time.perf_counter() - clock),
                   "padding": padding / tokens}
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise DataError(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}, learning rate "
                                f"{row['lr']:.2g}; a lower --lr may help; {out} keeps earlier checkpoints")
            if heldout and used >= held:
                held = used + 0.05
                found = evaluate(model, heldout, c.batch_tokens, amp)
                row |= zip(("heldout_loss", "heldout_tokens", "heldout_grids"), found)
                shown["held-out"] = f"{row['heldout_loss']:.3f}"
            log.writerow({key: f"{value:.9g}" for key, value in row.items()})
            file.flush()
            shown |= {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:.0f}"}
            if mfu := model.mfu(row["tokens_per_s"], tokens / rows):
                shown["MFU"] = f"{mfu:.0%}"
            bar.set_postfix(shown, refresh=False)
            bar.update(100 * used - bar.n)
            tokens = padding = rows = 0
            clock = time.perf_counter()
            if time.perf_counter() - saved > 60 * c.save_minutes:
                checkpoint()
                saved = time.perf_counter()
    bar.update(0 if stop else 100 - bar.n)
    bar.close()
    file.close()
    checkpoint()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        print(f"stopped at step {step}; go on with: python train_arc.py --resume {out}")
        return
    if heldout:
        found = evaluate(model, heldout, c.batch_tokens, amp)
        print("held-out: loss {:.4f}, {:.1%} of tokens, {:.1%} of grids".format(*found))
    if not c.score:
        return

    # ---- answer every test input of the evaluation split that fits, then score
    model.eval()
    index, trained = {name: n for n, name in enumerate(names)}, set(pairs.task)
    asked = {(name, i): (index[name], grid) for name, task in evaluation.items() for i, grid in enumerate(task.test)}
    tried = {key: (task, grid) for key, (task, grid) in asked.items()
             if task in trained and prompt_tokens(grid) < c.max_tokens}
    answers = dict(zip(tried, answer(model, list(tried.values()), free, c, amp)))
    submission = {name: [vote(answers.get((name, i), [])) for i in range(len(task.test))]
                  for name, task in evaluation.items()}
    save(out / "submission.json", lambda file: file.write(json.dumps(submission).encode()))
    (pass1, pass2), solved = score(submission, read_solutions(c.data, "evaluation", evaluation))
    result = {"pass@1": pass1, "pass@2": pass2, "solved": solved, "tasks": len(evaluation),
              "tried": len(tried), "asked": len(asked)}
    save(out / "result.json", lambda file: file.write(json.dumps(result).encode()))
    print(f"evaluation: pass@1 {pass1:.2%}, pass@2 {pass2:.2%} (mean over a task's test outputs, then over the "
          f"{len(evaluation)} tasks), {solved} tasks solved whole; {len(tried)} of {len(asked)} test inputs were short "
          "enough to try")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as fault:              # OSError names its file: missing, unreadable, disk full
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
