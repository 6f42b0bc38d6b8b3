"""Train a DynSIHA transformer on ARC, then score it.

    python train_arc.py --no-ffn                 attention only, on this machine's GPU or CPU
    python train_arc.py                          with the MoIE FFN
    python train_arc.py --dense                  the standard transformer of as many parameters as --no-ffn
    python train_arc.py --help                   every flag

The recipe: one demonstration pair is one sequence; a learned embedding per task says which rule applies. Training sees
the demonstration pairs of every task, the evaluation tasks' too, and never a test output of the evaluation split: these
are read by `score`, at the end. The training split's own test pairs are held out, for tuning.

    <start> input rows, <nl> after each <sep> output rows, <nl> after each <end>

Symbols   B batch, T tokens, P pairs, V views.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections import Counter
from dataclasses import MISSING, asdict, dataclass, field, fields
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
    """The grid that `tokens` (up to <end>) spell, or None where they spell no rectangle of 1..30 by 1..30 colours."""
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
    """The position (row, column, role) after `token` (...,) at `pos` (..., 3); role is 0 in the input, 1 in the output."""
    row, column, role = pos.unbind(-1)
    opens = (token == START) | (token == SEP)
    row = torch.where(opens, 0, row + (token == NL))
    column = torch.where(opens | (token == NL), 0, column + 1)
    return torch.stack((row, column, role | (token == SEP)), dim=-1)


def positions(tokens):
    """Positions (B, T, 3) of whole sequences (B, T): what `advance` gives token by token, from cumulative counts."""
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
    test: list      # input grids; their outputs are not here, only `read_solutions` returns them


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON: {e}") from None


def read_grid(value, where):
    grid = np.array(value, dtype=object) if isinstance(value, list) else None
    if grid is None or grid.ndim != 2 or not 1 <= grid.shape[0] <= MAX_SIDE or not 1 <= grid.shape[1] <= MAX_SIDE:
        raise DataError(f"{where}: not a rectangular grid of 1..30 by 1..30 cells")
    if not all(type(cell) is int and 0 <= cell <= 9 for cell in grid.flat):
        raise DataError(f"{where}: a cell is not an integer 0..9")
    return grid.astype(np.uint8)


def read_split(folder, split):
    """{id: (file, raw task)} of one split, in the Kaggle layout (two files) or the GitHub layout (a file per task)."""
    kaggle, github = Path(folder) / f"arc-agi_{split}_challenges.json", sorted((Path(folder) / split).glob("*.json"))
    if kaggle.exists():
        return {name: (kaggle, task) for name, task in read_json(kaggle).items()}
    if github:
        return {file.stem: (file, read_json(file)) for file in github}
    raise DataError(f"{folder}: no {split} tasks; expected {kaggle.name} or {split}/*.json")


def read_tasks(folder, split):
    """{id: Task} of one split. Test outputs, where a file has them, are left unread."""
    tasks = {}
    for name, (file, raw) in read_split(folder, split).items():
        where = f"{file}: task {name}"
        tasks[name] = Task(
            [(read_grid(pair["input"], f"{where}: train {i} input"), read_grid(pair["output"], f"{where}: train {i} output"))
             for i, pair in enumerate(raw["train"])],
            [read_grid(pair["input"], f"{where}: test {i} input") for i, pair in enumerate(raw["test"])])
    return tasks


def read_solutions(folder, split):
    """{id: [test output, ...]} of one split."""
    kaggle = Path(folder) / f"arc-agi_{split}_solutions.json"
    if kaggle.exists():
        outputs = {name: (kaggle, grids) for name, grids in read_json(kaggle).items()}
    else:
        outputs = {name: (file, [pair["output"] for pair in raw["test"]])
                   for name, (file, raw) in read_split(folder, split).items()}
    return {name: [read_grid(grid, f"{file}: task {name}: test {i} output") for i, grid in enumerate(grids)]
            for name, (file, grids) in outputs.items()}


# ---------------------------------------------------------------------------------------------- batches
class Pairs:
    """Tokenized pairs in all 8 views, on one device: flat tokens, and for each [pair, view] its start and lengths."""

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
        """Pairs index (B,) in views (B,) under colour tables (B, 14) -> tokens, positions, task, view, targets on the device.

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


def pair_tokens(x, y):
    """Length of the pair's longer sequence over the views: <start>, <sep>, <end>, and a <nl> for each row or column."""
    return x.size + max(x.shape) + y.size + max(y.shape) + 3


def to_device(array, device):
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def plan_epoch(pairs, batch_tokens, rng):
    """One epoch as a list of (index, view, colours) batches: each pair once, in a fresh view, similar lengths together."""
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
    parts = np.split(order, cuts)
    return [(parts[i], view[parts[i]], colours[parts[i]]) for i in rng.permutation(len(parts))]


def free_colours(task, permute=True):
    """(10,) bool: colours 1..9 but for those that only outputs show, since 'mark with red' must stay red."""
    shown = {c for x in [x for x, _ in task.train] + task.test for c in np.unique(x)}
    added = {c for _, y in task.train for c in np.unique(y)} - shown
    return np.array([permute and c > 0 and c not in added for c in range(10)])


# ---------------------------------------------------------------------------------------------- answers and scores
def answer(model, prompts, free, c, rng, amp, device):
    """prompts [(task, input grid)] -> for each the list of grids decoded in 8 views x c.colour_votes colour tables.

    Each grid is turned and coloured back; invalid outputs are left out. The first table of each task changes nothing.
    """
    jobs = []                                                         # (prompt, view, colour table, tokens)
    for n, (task, grid) in enumerate(prompts):
        tables = colour_permutations(np.repeat(free[task][None], c.colour_votes, 0), rng)
        tables[0] = np.arange(N_VOCAB)
        jobs += [(n, view, table, table[encode_prompt(view_grid(grid, view))]) for table in tables for view in range(N_DIHEDRAL)]
    found = [{} for _ in prompts]
    longest_first = sorted(range(len(jobs)), key=lambda j: -len(jobs[j][3]))
    with tqdm(total=len(jobs), desc="decode", unit="grid", dynamic_ncols=True) as bar:
        while longest_first:
            columns = min(len(jobs[longest_first[0]][3]) + MAX_OUTPUT, c.max_tokens)
            size = max(1, c.decode_tokens // columns)
            part, longest_first = longest_first[:size], longest_first[size:]
            lengths = np.array([len(jobs[j][3]) for j in part])
            tokens = np.full((len(part), lengths.max()), END)
            for row, j in zip(tokens, part):
                row[:len(jobs[j][3])] = jobs[j][3]
            task, view = np.array([prompts[jobs[j][0]][0] for j in part]), np.array([jobs[j][1] for j in part])
            tokens, lengths, task, view = (to_device(a, device) for a in (tokens, lengths, task, view))
            room = min(MAX_OUTPUT, c.max_tokens - int(lengths.min()))  # from the format and the flags, never from the answer
            with amp:
                out = model.generate(tokens, lengths, positions(tokens), task, view, room, END, advance).cpu().numpy()
            for j, row in zip(part, out):
                n, view, table, _ = jobs[j]
                grid = decode_grid(np.argsort(table)[row])
                if grid is not None:
                    found[n][j] = unview_grid(grid, view)
            bar.update(len(part))
    return [[grids[j] for j in sorted(grids)] for grids in found]     # in the order of the jobs: ties depend on it


def vote(grids):
    """The two most frequent of `grids` as nested lists; ties go to the grid that came first; [[0]] where none is left."""
    counts = Counter(tuple(map(tuple, grid.tolist())) for grid in grids)
    best = [[list(row) for row in grid] for grid, _ in counts.most_common(2)]
    return (best + [[[0]], [[0]]])[:2]


def score(submission, solutions):
    """((pass@1, pass@2), tasks solved whole) by the ARC Prize's rule: mean over a task's test outputs, then over the tasks."""
    marks = np.zeros((len(solutions), 2))
    for mark, (name, outputs) in zip(marks, solutions.items()):
        answers = submission.get(name, [])
        for output, given in zip(outputs, answers):
            hits = [given[key] == output.tolist() for key in ("attempt_1", "attempt_2")]
            mark += np.array([hits[0], any(hits)]) / len(outputs)
    return marks.mean(0), int((marks[:, 1] > 1 - 1e-9).sum())


# ---------------------------------------------------------------------------------------------- training
def task_loss(model, tokens, pos, task, view, targets):
    return F.cross_entropy(model(tokens, pos, task, view).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def rate(used, warmup, decay):
    """Learning-rate factor when the fraction `used` of the budget is gone: linear up, constant, linear down to 0."""
    if used < warmup:
        return used / warmup
    if used > 1 - decay:
        return max(0.0, (1 - used) / decay)
    return 1.0


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
        with amp:
            logits = model(*inputs).float()
        scored, right = targets != IGNORE, logits.argmax(-1) == targets
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        sums += torch.stack((loss, (right & scored).sum(), (right | ~scored).all(1).sum(), scored.sum()))
    model.train()
    loss, tokens, grids, total = sums.tolist()
    return loss / total, tokens / total, grids / n


def make_optimizers(model, c):
    """The blocks' matrices under Muon or AdamW, with decay; embeddings, head and vectors under AdamW, without."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0, "lr": c.lr}]
    optimizers = []
    if c.muon_lr:
        optimizers.append(torch.optim.Muon(matrices, lr=c.muon_lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"))
    else:
        groups.append({"params": matrices, "weight_decay": c.weight_decay, "lr": c.lr})
    optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------------------------------------- flags
def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Run:
    """Every field is a flag. A default of None is filled in by device, from DEFAULTS."""
    ffn: bool = flag(True, "the MoIE feed-forward network in each block")
    dense: bool = flag(False, "the dense control: nn.Linear attention and a 4x GELU FFN")
    data: str = flag("data/arc-agi-1", "folder of the task set, in the Kaggle or the GitHub layout")
    out: str = flag("", "folder of this run; empty: runs/<arm>-<time>")
    heldout: bool = flag(True, "hold out the training split's test pairs; --no-heldout trains on them, for a final score")
    score: bool = flag(True, "answer and score the evaluation split at the end")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    seed: int = flag(0, "seed of weights, order, views and colours")
    minutes: float = flag(None, "training budget in minutes; scoring comes on top")
    steps: int = flag(0, "training budget in steps, in place of minutes")
    d_model: int = flag(None, "width D")
    n_head: int = flag(None, "heads H")
    n_layer: int = flag(None, "layers L")
    ffn_factor: int = flag(1, "hidden width of MoIE over D")
    dropout: float = flag(None, "dropout on each branch")
    max_tokens: int = flag(None, "longest sequence; longer pairs are not trained on, and count as wrong in the score")
    batch_tokens: int = flag(None, "tokens per batch, padding included")
    lr: float = flag(None, "peak learning rate")
    muon_lr: float = flag(0.0, "learning rate of Muon for the blocks' matrices; 0: AdamW for all")
    weight_decay: float = flag(0.1, "decay of the blocks' matrices")
    warmup: float = flag(0.02, "share of the budget in which the learning rate rises")
    decay: float = flag(None, "share of the budget in which it falls to 0")
    clip: float = flag(1.0, "largest gradient norm")
    permute_colours: bool = flag(True, "permute a task's input colours in training")
    decode_tokens: int = flag(None, "tokens of a decoding batch, rows times columns of its cache")
    colour_votes: int = flag(1, "colour tables each of the 8 views votes under")
    dtype: str = flag(None, "float32 or bfloat16 (autocast)")
    compile: bool = flag(None, "torch.compile the training step")
    log_every: int = flag(20, "steps between lines of the log")


DEFAULTS = {
    "cpu": dict(minutes=10.0, d_model=128, n_head=4, n_layer=4, dropout=0.0, max_tokens=150, batch_tokens=768, lr=5e-3,
                decay=0.5, decode_tokens=2**15, dtype="float32", compile=False),
    "cuda": dict(minutes=20.0, d_model=768, n_head=12, n_layer=10, dropout=0.1, max_tokens=1863, batch_tokens=32768, lr=1e-3,
                 decay=0.2, decode_tokens=2**20, dtype="bfloat16", compile=True),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Run):
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.default is None:
            text += " (default: cpu {}, cuda {})".format(*(DEFAULTS[d][f.name] for d in DEFAULTS))
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(name, default=argparse.SUPPRESS if f.default is None else f.default, help=text, **kind)
    given = vars(parser.parse_args(argv))
    device = given["device"].split(":")[0]
    if device not in DEFAULTS or device == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {given['device']}: not available here")
    return Run(**DEFAULTS[device] | given)


# ---------------------------------------------------------------------------------------------- main
def main(argv=None):
    c = parse(argv)
    device = torch.device(c.device)
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")          # TF32 where bfloat16 does not reach
    rng = np.random.default_rng(c.seed)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16")
    arm = "dense" if c.dense else "ffn" if c.ffn else "no-ffn"
    out = Path(c.out or time.strftime(f"runs/{arm}-%Y%m%d-%H%M%S"))

    # ---- data: the demonstration pairs of both splits; test outputs of the training split only
    training, evaluation = read_tasks(c.data, "training"), read_tasks(c.data, "evaluation")
    tasks = training | evaluation
    index = {name: i for i, name in enumerate(tasks)}
    free = np.stack([free_colours(task, c.permute_colours) for task in tasks.values()])
    known = read_solutions(c.data, "training")
    demos = [(index[name], x, y) for name, task in tasks.items() for x, y in task.train]
    tests = [(index[name], x, y) for name, task in training.items() for x, y in zip(task.test, known[name])]
    demos, tests = ([pair for pair in pairs if pair_tokens(*pair[1:]) <= c.max_tokens] for pairs in (demos, tests))
    pairs = Pairs(demos if c.heldout else demos + tests, free, device)
    heldout = Pairs(tests, free, device) if c.heldout and tests else None

    # ---- model
    model = Transformer(Config(N_VOCAB, len(tasks), N_DIHEDRAL, c.d_model, c.n_head, c.n_layer, c.ffn_factor * c.ffn, c.dense,
                               c.dropout)).to(device)
    optimizers = make_optimizers(model, c)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if c.compile:
        for block in model.blocks:                      # the layers share one compiled block: a tenth of the start-up
            block.compile(dynamic=True)
    print(f"{arm} on {device}: D={c.d_model} H={c.n_head} L={c.n_layer}, {model.n_params() / 1e6:.2f} M parameters; "
          f"{len(pairs.task)} pairs of at most {c.max_tokens} tokens; "
          + (f"{c.steps} steps" if c.steps else f"{c.minutes:g} minutes") + f", {c.batch_tokens} tokens each, {c.dtype}"
          + (", compiled" if c.compile else "") + "  (any flag changes this: --help)")

    # ---- train
    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", dynamic_ncols=True)
    step, tokens_seen, used, shown, held = 0, 0, 0.0, {}, -1.0
    begin = time.perf_counter()
    while used < 1:
        for batch in plan_epoch(pairs, c.batch_tokens, rng):
            used = step / c.steps if c.steps else (time.perf_counter() - begin) / (60 * c.minutes)
            if used >= 1:
                break
            for group in groups:
                group["lr"] = group["peak"] * rate(used, c.warmup, c.decay)

            # ---- the step
            *inputs, targets = pairs.batch(*batch)
            with amp:
                loss = task_loss(model, *inputs, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, tokens_seen = step + 1, tokens_seen + targets.numel()
            # ----

            if step % c.log_every == 0:
                shown["loss"] = f"{loss.item():.3f}"
                shown["tok/s"] = f"{tokens_seen / (time.perf_counter() - begin):.0f}"
                bar.set_postfix(shown, refresh=False)
                bar.update(100 * used - bar.n)
            if heldout and used >= held + 0.05:
                held, shown["held-out"] = used, "{:.3f}".format(evaluate(model, heldout, c.batch_tokens, amp)[0])
    bar.close()

    if not c.score:
        return

    # ---- answer every test input of the evaluation split that fits, then score
    model.eval()
    trained = {task for task, _, _ in demos}
    prompts = {(name, i): (index[name], grid) for name, task in evaluation.items() for i, grid in enumerate(task.test)
               if index[name] in trained and grid.size + max(grid.shape) + 3 < c.max_tokens}
    answers = dict(zip(prompts, answer(model, list(prompts.values()), free, c, rng, amp, device)))
    submission = {name: [dict(zip(("attempt_1", "attempt_2"), vote(answers.get((name, i), [])))) for i in range(len(task.test))]
                  for name, task in evaluation.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "submission.json").write_text(json.dumps(submission))
    torch.save(model.state_dict(), out / "model.pt")
    (pass1, pass2), solved = score(submission, read_solutions(c.data, "evaluation"))
    print(f"evaluation: pass@1 {pass1:.2%}, pass@2 {pass2:.2%} (mean over a task's test outputs, then over {len(evaluation)} tasks); "
          f"{solved} tasks solved; {len(prompts)} of {sum(len(t.test) for t in evaluation.values())} test inputs short enough to try")


if __name__ == "__main__":
    try:
        main()
    except DataError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
