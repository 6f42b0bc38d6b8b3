"""Train a DynSIHA transformer on ARC, then score it.

    python train_arc.py --no-ffn                 attention only, on this machine's GPU or CPU
    python train_arc.py                          with the MoIE FFN
    python train_arc.py --dense                  the standard transformer of as many parameters as --no-ffn
    python train_arc.py --resume runs/NAME       go on with a stopped run
    python train_arc.py --eval runs/NAME/checkpoint.pt --show 3          score a model, draw three tasks
    python train_arc.py --ab --seeds 3           train every arm of the comparison, print its table
    torchrun --standalone --nproc_per_node=8 train_arc.py --no-ffn       on 8 GPUs
    python train_arc.py --help                   every flag

The recipe: one demonstration pair is one sequence; a learned embedding per task says which rule applies. Training
sees the demonstration pairs of every task, the evaluation tasks' too, and never a test output of the evaluation
split: these are read in `solve` alone, after the answers. The training split's own test pairs are held out, for tuning.

Symbols   B batch, T tokens.
"""

import argparse
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (END, IGNORE, MAX_SIDE, N_VOCAB, NL, SEP, START, Config, Transformer,
                   evaluate, pi_score, task_loss, unpadded)
from spl import routing_loss

# ---------------------------------------------------------------------------------------------- grids <-> tokens
MAX_OUTPUT = MAX_SIDE * (MAX_SIDE + 1) + 1              # 30 rows of 30 cells and <nl>, then <end>

HERE = Path(__file__).parent
SPLITS, ATTEMPTS = ("training", "evaluation", "test"), ("attempt_1", "attempt_2")
MONITORS = ("loss", "tokens", "grids", "active", "failed")              # of `evaluate`, for the log
PALETTE = (16, 27, 160, 34, 220, 245, 201, 208, 117, 88)  # the colours of ARC among a terminal's 256


class DataError(ValueError):
    """Bad input; its text names the file, the task and the fault."""


@contextmanager
def blame(where):
    """A fault inside becomes a DataError of one line that begins with `where`; nested, they spell the way to it."""
    try:
        yield
    except KeyError as e:
        raise DataError(f"{where}: no {e}") from None
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as e:
        raise DataError(f"{where}: {' '.join(str(e).split())[:300]}") from None


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
    with blame(f"{path}: not JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    with blame(path):
        return expect(value, dict)


def expect(value, kind, length=None):
    """`value`, if it is a list or dict, not empty, and of `length` entries where that is given."""
    if not isinstance(value, kind) or not value or len(value) != (length or len(value)):
        found = f"{len(value)} entries" if isinstance(value, kind) else type(value).__name__
        raise ValueError(f"{found}; expected a {kind.__name__} of {length or 'at least one'}")
    return value


def read_grid(value):
    """A JSON value -> (h, w) uint8 grid."""
    widths = {len(expect(row, list)) for row in expect(value, list)}
    if len(widths) > 1 or max(*widths, len(value)) > MAX_SIDE:
        raise ValueError(f"{len(value)} rows of widths {sorted(widths)}; expected up to 30 rows of one width, up to 30")
    for cell in itertools.chain(*value):
        if type(cell) is not int or not 0 <= cell <= 9:
            raise ValueError(f"a cell is {json.dumps(cell)[:20]}; expected an integer from 0 to 9")
    return np.array(value, dtype=np.uint8)


def read_grids(values, key=None):
    """A list of grids, or of objects with a grid under `key`."""
    grids = []
    for i, value in enumerate(expect(values, list)):
        with blame(f"{i} {key}" if key else i):
            grids.append(read_grid(expect(value, dict)[key] if key else value))
    return grids


def read_split(folder, split):
    """{id: (file, raw task)} of one split: from Kaggle's one file, or GitHub's folder with a file for each task.

    A folder of task files without splits, such as ConceptARC, is an evaluation split as a whole.
    """
    kaggle, tasks = Path(folder) / f"arc-agi_{split}_challenges.json", {}
    if kaggle.exists():
        return {name: (kaggle, raw) for name, raw in read_object(kaggle).items()}
    has_splits = any(Path(folder).glob("arc-agi_*.json")) or any((Path(folder) / s).is_dir() for s in SPLITS)
    root = Path(folder) / split if has_splits else Path(folder)
    for file in sorted(root.rglob("*.json")) if has_splits or split == "evaluation" else []:
        if file.stem in tasks:
            raise DataError(f"{file}: task {file.stem} is in {tasks[file.stem][0]}, too")
        tasks[file.stem] = file, read_object(file)
    return tasks


def read_tasks(folder, split):
    """{id: Task} of one split. Test outputs, where a file has them, are left unread."""
    tasks = {}
    for name, (file, raw) in read_split(folder, split).items():
        with blame(f"{file}: task {name}"):
            train, test = (expect(raw, dict)[part] for part in ("train", "test"))
            with blame("train"):
                train = list(zip(read_grids(train, "input"), read_grids(train, "output")))
            with blame("test"):
                tasks[name] = Task(train, read_grids(test, "input"))
    return tasks


def read_solutions(folder, split, tasks):
    """{id: [test output, ...]} of a split's `tasks`, from its solutions file or inline; None where there are none."""
    file = Path(folder) / f"arc-agi_{split}_solutions.json"
    if file.exists():
        raw = {name: (file, grids) for name, grids in read_object(file).items()}
    else:
        raw = {name: (file, [pair["output"] for pair in task["test"] if "output" in pair])
               for name, (file, task) in read_split(folder, split).items()}
        if not any(grids for _, grids in raw.values()):
            return None
    solutions = {}
    for name, task in tasks.items():
        source, grids = raw.get(name, (file, None))
        with blame(f"{source}: task {name}: solutions"):
            solutions[name] = read_grids(expect(grids, list, len(task.test)))
    return solutions


def read_submission(file, tasks):
    """{id: [{"attempt_1": grid, "attempt_2": grid}, ...]} for `tasks`, one entry for each test input."""
    found = read_object(file)
    for name, task in tasks.items():
        with blame(f"{file}: task {name}"):
            for key in ATTEMPTS:
                read_grids(expect(found[name], list, len(task.test)), key)
    return found


def without_leaks(extra, asked, known):
    """The `extra` tasks that share nothing with the `asked` ones: no id, no set of demonstrations, no test input.

    `known` are ids to leave out as well. No output that is asked for is needed to tell.
    """
    def key(grid):
        return grid.shape, grid.tobytes()

    def demos(task):
        return frozenset((key(x), key(y)) for x, y in task.train)

    taken = {demos(task) for task in asked.values()}
    inputs = {key(x) for task in asked.values() for x in task.test}
    return {name: task for name, task in extra.items()
            if name not in asked and name not in known and demos(task) not in taken
            and not inputs & {key(x) for x in [x for x, _ in task.train] + task.test}}


# ---------------------------------------------------------------------------------------------- batches
class Pairs:
    """Tokenized pairs in all 8 views, on one device: flat tokens; per [pair, view] their start and lengths."""

    def __init__(self, pairs, free, device):
        """pairs: [(task index, input, output)]; free (n_task, 10): the colours a task may permute."""
        rows = [(encode_prompt(view_grid(x, v)), encode_grid(view_grid(y, v), END))
                for _, x, y in pairs for v in range(N_DIHEDRAL)]
        shape = (len(pairs), N_DIHEDRAL)
        self.prompt, answer = (np.array([len(row[i]) for row in rows]).reshape(shape) for i in (0, 1))
        self.length = self.prompt + answer
        self.start = self.length.cumsum().reshape(shape) - self.length
        self.task = np.array([task for task, _, _ in pairs], dtype=np.int64)
        self.free = free[self.task]
        self.device = device
        flat = np.concatenate([part for row in rows for part in row] + [np.full(2048, END, np.uint8)])
        self.flat = torch.from_numpy(flat).to(device)

    def batch(self, index, view, colours):
        """Pairs index (B,) in views (B,) under colour tables (B, 14) -> tokens, task, view, targets.

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
        return tokens[:, :-1], task, view, targets

    def unaugmented(self, batch_tokens):
        """Every pair once, in the first view and its true colours, batch by batch."""
        order, same = np.argsort(self.length[:, 0], kind="stable"), np.arange(N_VOCAB, dtype=np.uint8)
        size = max(1, batch_tokens // int(self.length[:, 0].max()))
        for index in np.split(order, range(size, len(order), size)):
            yield self.batch(index, np.zeros_like(index), np.tile(same, (len(index), 1)))


def pair_tokens(x, y):
    """Length of a pair in its longest view: the cells, a <nl> for each row or column, <start>, <sep>, <end>."""
    return x.size + max(x.shape) + y.size + max(y.shape) + 3


def to_device(array, device):
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def plan_epoch(pairs, batch_tokens, rng, least=2):
    """One epoch as (index, view, colours) batches: each pair once, in a fresh view, similar lengths together.

    A last batch of fewer than `least` pairs joins the one before: a lone pair would compile anew, and every
    process needs one.
    """
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
    if cuts and n - first < least:
        cuts.pop()
    parts = np.split(order, cuts)
    return [(parts[i], view[parts[i]], colours[parts[i]]) for i in rng.permutation(len(parts))]


def batches(pairs, c, world=1):
    """Endless (epoch, batch); batch n follows from the seed alone, whatever the arm, and wherever a run resumes."""
    for epoch in itertools.count():
        for batch in plan_epoch(pairs, c.batch_tokens, np.random.default_rng((c.seed, epoch)), max(2, world)):
            yield epoch, batch


def free_colours(task, permute=True):
    """(10,) bool: colours 1..9 but for those that only outputs show, since 'mark with red' must stay red."""
    shown = {c for x in [x for x, _ in task.train] + task.test for c in np.unique(x)}
    added = {c for _, y in task.train for c in np.unique(y)} - shown
    return np.array([permute and c > 0 and c not in added for c in range(10)])


def load_data(c, device):
    """(names of the tasks with pairs to train on, these pairs, held-out pairs or None); no output that is asked for."""
    training, asked = read_tasks(c.data, "training"), read_tasks(c.data, c.split)
    if not asked:
        raise DataError(f"{c.data}: no {c.split} tasks; expected arc-agi_{c.split}_challenges.json, {c.split}/*.json "
                        "or, for a folder without splits, *.json")
    if both := training.keys() & asked.keys():
        raise DataError(f"{c.data}: task {min(both)} is in both splits")
    tasks, solutions = training | asked, read_solutions(c.data, "training", training)
    if training and solutions is None:
        raise DataError(f"{c.data}: the training split has no solutions; expected arc-agi_training_solutions.json")
    more = {split: read_tasks(c.extra, split) for split in SPLITS} if c.extra else {}
    if c.extra and not any(more.values()):
        raise DataError(f"{c.extra}: no tasks; expected a folder as --data takes it")
    for split, new in more.items():
        kept = without_leaks(new, asked, tasks)
        tasks |= kept
        if new:
            print(f"{c.extra}: {len(kept)} of {len(new)} {split} tasks are new, {len(new) - len(kept)} dropped")
    demos = {name: [pair for pair in task.train if pair_tokens(*pair) <= c.max_tokens] for name, task in tasks.items()}
    names = [name for name, pairs in demos.items() if pairs]
    if not names:
        raise DataError(f"{c.data}: no pair of at most {c.max_tokens} tokens; raise --max-tokens")
    own = without_leaks(training, asked, {})                # one task of ARC-1 is in both: its test stays unseen
    tests = [(n, x, y) for n, name in enumerate(names) if name in own
             for x, y in zip(own[name].test, solutions[name]) if pair_tokens(x, y) <= c.max_tokens]
    pairs = [(n, x, y) for n, name in enumerate(names) for x, y in demos[name]]
    free = np.stack([free_colours(tasks[name], c.permute_colours) for name in names])
    if c.heldout and tests:
        return names, Pairs(pairs, free, device), Pairs(tests, free, device)
    return names, Pairs(pairs + tests, free, device), None


# ---------------------------------------------------------------------------------------------- answers and scores
def answer(model, prompts, c, rank=0, world=1):
    """prompts [(task, input grid, free colours)] -> for each the grids of 8 views x c.colour_votes colour tables.

    Each grid is turned and coloured back; invalid outputs are left out. The first table of a task changes nothing.
    The processes share the jobs, longest prompts first, and all get every answer.
    """
    rng, jobs = np.random.default_rng(c.seed), []                       # (prompt, task, view, colour table, tokens)
    for n, (task, grid, free) in enumerate(prompts):
        tables = colour_permutations(np.repeat(free[None], c.colour_votes, 0), rng)
        tables[0] = np.arange(N_VOCAB)
        jobs += [(n, task, v, table, table[encode_prompt(view_grid(grid, v))])
                 for table in tables for v in range(N_DIHEDRAL)]
    grids, order = {}, sorted(range(len(jobs)), key=lambda j: -len(jobs[j][-1]))[rank::world]
    with tqdm(total=len(order), desc="decode", unit="grid", dynamic_ncols=True, disable=rank > 0) as bar:
        while order:
            rows = max(1, c.decode_tokens // min(len(jobs[order[0]][-1]) + MAX_OUTPUT, c.max_tokens))
            part, order = order[:rows], order[rows:]
            for j, tokens in zip(part, decode([jobs[j] for j in part], model, c)):
                _, _, view, table, _ = jobs[j]
                grid = decode_grid(np.argsort(table)[tokens])
                grids[j] = grid if grid is None else unview_grid(grid, view)
            bar.update(len(part))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, grids)
        grids = {j: grid for share in shares for j, grid in share.items()}
    found = [[] for _ in prompts]
    for j, (n, *_) in enumerate(jobs):                                  # in the order of the jobs, for ties
        found[n] += [] if grids[j] is None else [grids[j]]
    return found


def decode(jobs, model, c):
    """Greedy outputs of one batch of jobs, longest prompt first: (B, N) tokens, closed by <end>.

    The bound on N comes from the format and the flags, never from the answer.
    """
    device = model.head.weight.device
    lengths = np.array([len(prompt) for *_, prompt in jobs])
    tokens = np.array([np.pad(prompt, (0, lengths[0] - len(prompt))) for *_, prompt in jobs], dtype=np.int64)
    task, view = np.array([[task, view] for _, task, view, _, _ in jobs]).T
    tokens, lengths, task, view = (to_device(array, device) for array in (tokens, lengths, task, view))
    most = min(MAX_OUTPUT, c.max_tokens - int(lengths[-1]))
    with autocast(c), torch.compiler.set_stance("force_eager"):
        return model.generate(tokens, lengths, task, view, most).cpu().numpy()


def vote(grids):
    """The two most frequent grids as a submission has them; ties go to the one that came first, [[0]] fills up."""
    counts = Counter(tuple(map(tuple, grid.tolist())) for grid in grids)
    best = [[list(row) for row in grid] for grid, _ in counts.most_common(2)]
    return dict(zip(ATTEMPTS, best + [[[0]], [[0]]]))


def score(submission, solutions):
    """((pass@1, pass@2), tasks solved whole) by the ARC Prize's rule: mean over a task's outputs, then over tasks."""
    marks = np.zeros((len(solutions), 2))
    for mark, (name, outputs) in zip(marks, solutions.items()):
        for output, given in zip(outputs, submission.get(name, [])):
            hits = [given.get(key) == output.tolist() for key in ATTEMPTS]
            mark += np.array([hits[0], any(hits)]) / len(outputs)
    return marks.mean(0), int((marks[:, 1] > 1 - 1e-9).sum())


def draw(titled, colour, width):
    """[(title, grid)] as text, side by side if `width` allows: cells coloured, each with its digit, or digits alone."""
    def cell(v):                            # paper and ink are both set: it reads on dark and on light terminals
        return f"\033[48;5;{PALETTE[v]};38;5;{15 if v in (0, 1, 2, 9) else 16}m{v} \033[0m" if colour else f"{v} "
    sizes = [max(len(title), 2 * len(grid[0])) + 2 for title, grid in titled]
    if sum(sizes) > width and len(titled) > 1:
        return "\n".join(draw([one], colour, width) for one in titled)
    lines = ["".join(title.ljust(size) for (title, _), size in zip(titled, sizes))]
    for r in range(max(len(grid) for _, grid in titled)):
        row = [grid[r] if r < len(grid) else [] for _, grid in titled]
        lines.append("".join("".join(map(cell, cells)) + " " * (size - 2 * len(cells))
                             for cells, size in zip(row, sizes)))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def solve(c, model, names, rank=0, world=1):
    """Answers the test inputs of c.split, writes submission.json, and, where there are solutions, scores it."""
    model.eval()
    tasks, index = read_tasks(c.data, c.split), {name: n for n, name in enumerate(names)}
    asked = {(name, i): grid for name, task in tasks.items() for i, grid in enumerate(task.test)}
    tried = [key for key, x in asked.items() if key[0] in index and pair_tokens(x, x[:1, :1]) <= c.max_tokens]
    prompts = [(index[key[0]], asked[key], free_colours(tasks[key[0]], c.permute_colours)) for key in tried]
    votes = dict(zip(tried, answer(model, prompts, c, rank, world)))
    if rank > 0:
        return {}
    file = Path(c.out) / "submission.json"
    submission = {name: [vote(votes.get((name, i), [])) for i in range(len(task.test))] for name, task in tasks.items()}
    save_json(file, submission)
    submission = read_submission(file, tasks)
    solutions = read_solutions(c.data, c.split, tasks)          # the only place that reads them, after the last answer

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for name, i in tried[:c.show]:
        target = solutions and solutions[name][i].tolist()
        grids = [("input", asked[name, i].tolist())] + [("target", target)] * bool(target)
        for key, grid in submission[name][i].items():
            grids.append((key.replace("_", " ") + (" right" if grid == target else " wrong") * bool(target), grid))
        print(f"{name} test {i}\n{draw(grids, colour, shutil.get_terminal_size().columns)}")
    print(f"{c.split}: {len(tried)} of {len(asked)} test inputs were short enough and of a trained task; see {file}")
    if solutions is None:
        print(f"{c.data}: no solutions of the {c.split} split; the submission is written, and cannot be scored here")
        return {}
    (pass1, pass2), solved = score(submission, solutions)
    print(f"pass@1 {pass1:.2%}, pass@2 {pass2:.2%} (mean over a task's test outputs, then over the {len(tasks)} "
          f"tasks), {solved} tasks solved whole")
    return {"pass@1": pass1, "pass@2": pass2, "solved": solved, "tasks": len(tasks), "tried": len(tried)}


# ---------------------------------------------------------------------------------------------- training
def autocast(c):
    return torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16")


def rate(used, warmup, decay):
    """Learning-rate factor when the fraction `used` of the budget is gone: linear up, constant, linear down to 0."""
    return min(1.0, used / warmup if warmup else 1.0, max(0.0, 1 - used) / decay if decay else 1.0)


# ---------------------------------------------------------------------------------------------- flags
def dashed(name):
    return name.replace("_", "-")


def flag(default, text, least=0, most=1e9):
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass
class Run:
    """Every field is a flag. A default of None is filled in by device, from DEFAULTS."""
    ffn: bool = flag(True, "the MoIE feed-forward network in each block")
    dense: bool = flag(False, "the dense control: nn.Linear attention and a 4x GELU FFN")
    data: str = flag("data/arc-agi-1", "folder of the task set, in the Kaggle or the GitHub layout")
    split: str = flag("evaluation", "split to answer: evaluation or test; its demonstrations are trained on")
    extra: str = flag("", "folder of more tasks to train on; those of the split to answer are dropped")
    out: str = flag("", "folder of this run; empty: runs/ARM-seedN-TIME")
    show: int = flag(0, "tasks to draw with their answers at the end")
    heldout: bool = flag(True, "hold out the training split's test pairs, for tuning; without, train on them too")
    score: bool = flag(True, "answer and score the split at the end")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")
    sars: bool = flag(False, "train W_p and W_g by the routing loss of SARS in place of the task loss")
    seed: int = flag(0, "seed of weights, order, views and colours")
    seeds: int = flag(3, "seeds of each arm under --ab: 0, 1, ...", 1)
    minutes: float = flag(None, "training budget in minutes; scoring comes on top", 0.01)
    steps: int = flag(0, "training budget in steps, in place of minutes")
    d_model: int = flag(None, "width D", 2)
    n_head: int = flag(None, "heads H", 1)
    n_layer: int = flag(None, "layers L", 1)
    ffn_factor: int = flag(1, "hidden width of MoIE over D", 1)
    dropout: float = flag(None, "dropout on each branch", 0, 0.99)
    max_tokens: int = flag(None, "longest sequence; what is longer is not trained on, and counts as wrong", 1)
    batch_tokens: int = flag(None, "tokens per batch over all processes, padding included", 1)
    lr: float = flag(None, "peak learning rate", 1e-7)
    weight_decay: float = flag(0.1, "decay of the blocks' matrices")
    warmup: float = flag(0.02, "share of the budget in which the learning rate rises", 0, 1)
    decay: float = flag(0.5, "share of the budget in which it falls to 0", 0, 1)
    clip: float = flag(1.0, "largest gradient norm", 1e-6)
    permute_colours: bool = flag(True, "permute a task's input colours in training")
    colour_votes: int = flag(None, "colour tables under which each of the 8 views votes", 1)
    decode_tokens: int = flag(None, "size of a decoding batch: rows times columns of the cache", 1)
    dtype: str = flag(None, "float32, or bfloat16 by autocast")
    compile: bool = flag(None, "torch.compile the blocks")
    log_every: int = flag(50, "steps between lines of the log", 1)
    save_minutes: float = flag(5.0, "minutes between checkpoints")

    @property
    def arm(self):
        return "dense" if self.dense else "ffn" if self.ffn else "no-ffn"


DEFAULTS = {
    "cpu": dict(minutes=10.0, d_model=128, n_head=2, n_layer=4, dropout=0.0, max_tokens=150, batch_tokens=768,
                lr=5e-3, colour_votes=4, decode_tokens=2**15, dtype="float32",
                compile=sys.platform == "linux" and shutil.which("g++") is not None),
    "cuda": dict(minutes=20.0, d_model=768, n_head=12, n_layer=10, dropout=0.1, max_tokens=1863, batch_tokens=2**15,
                 lr=4e-3, colour_votes=4, decode_tokens=2**20, dtype="bfloat16", compile=True),
}
DENSE_LR = 0.2          # the dense control's best learning rate over the SPL's: see the search in results/README.md


def parse(argv=None):
    """(mode, Run, checkpoint or None, the flags as given); mode is train, resume, eval or ab."""
    def fail(message):
        raise DataError(message)

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.error = fail
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="DIR", help="go on with the stopped run in DIR, under its own flags")
    modes.add_argument("--eval", metavar="FILE", help="answer and score with this checkpoint; flags override its own")
    modes.add_argument("--ab", action="store_true", help="train every arm with every seed into --out, print a table")
    for f in fields(Run):
        default = f.default
        if default is None:
            default = ", ".join(f"{device} {values[f.name]}" for device, values in DEFAULTS.items())
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + dashed(f.name), help=f"{f.metadata['help']} (default: {default})", **kind)
    given = vars(parser.parse_args(argv))
    mode = next((mode for mode in ("resume", "eval", "ab") if mode in given), "train")
    path, state = given.pop(mode, None), None
    if mode == "ab" and (clash := given.keys() & {"ffn", "dense", "sars", "heldout", "seed"}):
        raise DataError(f"--ab --{min(clash)}: the comparison sets this itself; leave it out")
    if mode == "resume" and given:
        raise DataError("--resume takes no other flag: the run goes on under its own")
    if given.get("device") == "auto" or "device" not in given and mode in ("train", "ab"):
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if mode in ("train", "ab"):
        base = DEFAULTS.get(given["device"], DEFAULTS["cpu"]) | {"out": "runs/ab" if mode == "ab" else ""}
        base["lr"] *= DENSE_LR if given.get("dense") else 1
    else:
        state = load_checkpoint(Path(path) / "checkpoint.pt" if mode == "resume" else Path(path))
        base = state["config"] | {"out": path if mode == "resume" else ""}
    c = Run(**base | given)
    check(c)
    c.out = c.out or time.strftime(f"runs/{'eval' if mode == 'eval' else c.arm}-seed{c.seed}-%Y%m%d-%H%M%S")
    first = int(os.environ.get("RANK", 0)) == 0         # by the time that others look it may hold this very run
    if first and mode in ("train", "eval") and Path(c.out).is_dir() and any(Path(c.out).iterdir()):
        raise DataError(f"--out {c.out}: is not empty; name another folder, or go on with a run in it: --resume {c.out}")
    return mode, c, state, given


def check(c):
    for f in fields(c):
        value, least, most = getattr(c, f.name), f.metadata["least"], f.metadata["most"]
        if f.type in (int, float) and not least <= value <= most:
            raise DataError(f"--{dashed(f.name)} {value}: expected {least:g} to {most:g}")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", 1))
    for wrong, fault in (
            (c.dense and not c.ffn, "--dense --no-ffn: the dense control has its own FFN; name one of the two"),
            (c.device not in devices, f"--device {c.device}: not available here; expected {' or '.join(devices)}"),
            (c.d_model % (2 * c.n_head), f"--d-model {c.d_model}: expected a multiple of twice --n-head {c.n_head}"),
            (c.dtype not in ("float32", "bfloat16"), f"--dtype {c.dtype}: expected float32 or bfloat16"),
            (c.sars and (c.dense or world > 1), "--sars: needs SPLs and one process; leave out --dense and torchrun"),
            (c.split not in ("evaluation", "test"), f"--split {c.split}: expected evaluation or test"),
            (c.batch_tokens < world * c.max_tokens, f"--batch-tokens {c.batch_tokens}: expected at least --max-tokens "
                                                    f"{c.max_tokens} for each of {world} processes")):
        if wrong:
            raise DataError(fault)


# ---------------------------------------------------------------------------------------------- runs
def save(path, write):
    """Atomic: `write(file)` to a temporary file, flushed to the disk, then renamed."""
    temporary = path.with_suffix(".tmp")
    with blame(f"{path}: cannot be written"):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_json(path, value):
    save(path, lambda file: file.write(json.dumps(value).encode()))


def append(path, row):
    """`row` as the next line of a CSV file, under a header if it is the first."""
    with blame(f"{path}: cannot be written"), open(path, "a") as file:
        header = "" if file.tell() else ",".join(row) + "\n"
        file.write(header + ",".join(f"{value:.9g}" for value in row.values()) + "\n")


def load_checkpoint(path):
    with blame(f"{path}: not a checkpoint of this program"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        check(Run(**state["config"] | {"device": "cpu"}))
        return {key: state[key] for key in ("config", "names", "step", "seconds", "log", "model", "optimizer")}


def join(device):
    """(device, rank, world) of this process: torchrun starts several and sets the variables."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl")       # the clock is on the CPU, gradients are on the GPU
    return torch.device(device), rank, world


# ---------------------------------------------------------------------------------------------- compare, train
def compare(c, given):
    """--ab: every arm with every seed, one run after the other, each its own process and folder; then their table.

    Finished runs are kept and stopped ones go on: the same command continues, and runs made by hand count.
    """
    arms = {"no-ffn": {"ffn": False}, "ffn": {"ffn": True}, "dense": {"dense": True},
            "no-ffn-deep": {"ffn": False, "n_layer": round(c.n_layer * (1 + c.ffn_factor / 2))}}
    given = {"steps": c.steps, "minutes": c.minutes, "n_layer": c.n_layer} | given
    signal.signal(signal.SIGINT, lambda *_: None)                           # Ctrl-C is for the run in hand
    runs = {}
    for seed, arm in itertools.product(range(c.seeds), arms):
        folder = Path(c.out) / f"{arm}-seed{seed}"
        flags = given | arms[arm] | {"seed": seed, "out": str(folder)}
        if (folder / "config.json").exists():
            config = read_object(folder / "config.json")
            if other := [name for name in flags.keys() - {"out", "seeds"} if config.get(name) != flags[name]]:
                raise DataError(f"{folder}: a run with another --{dashed(other[0])}; name another --out")
        if not (folder / "result.json").exists():
            words = [f"--{'no-' * (value is False)}{dashed(name)}{'' if isinstance(value, bool) else f'={value}'}"
                     for name, value in flags.items()]
            words = [f"--resume={folder}"] if (folder / "checkpoint.pt").exists() else words
            status = subprocess.run([sys.executable, __file__, *words]).returncode
            if status or not (folder / "result.json").exists():
                sys.exit(status or 130)
        curve = np.genfromtxt(folder / "log.csv", delimiter=",", names=True)
        runs[arm, seed] = read_object(folder / "result.json"), curve[np.isfinite(curve["heldout_loss"])]

    if not all(len(curve) for _, curve in runs.values()):
        raise DataError(f"{c.out}: --ab compares held-out losses, and a run there has none")
    steps, seconds = (min(curve[axis][-1] for _, curve in runs.values()) for axis in ("step", "seconds"))
    target = max(curve["heldout_loss"][-1] for _, curve in runs.values())   # the loss that every run reaches
    table = {}
    for key, (result, curve) in runs.items():
        loss = curve["heldout_loss"]
        reached = curve[np.argmax(loss <= target)]
        table[key] = {
            "parameters": result["parameters"], "FLOPs/token": result["flops_per_token"],
            "steps/s": result["steps"] / result["seconds"], "held-out loss at the end": result["heldout_loss"],
            f"at step {steps:g}": np.interp(steps, curve["step"], loss),
            f"at {seconds:.0f} s": np.interp(seconds, curve["seconds"], loss),
            f"steps to {target:.3f}": reached["step"], f"seconds to {target:.3f}": reached["seconds"],
            **{name: result.get(name, math.nan) for name in ("pass@1", "pass@2", "solved")},
            "active": result["heldout_active"], "failed": result["heldout_failed"], "PI": curve["pi"][-1]}
    head = list(table["no-ffn", 0])
    lines = [" | ".join([f"| arm (n = {c.seeds})", *head, ""]), "|---" * (1 + len(head)) + "|"]
    for arm in arms:
        cells = [f"{np.mean(x):.4g}" + (f" ± {np.std(x, ddof=1):.2g}" if np.ptp(x) > 0 else "")
                 for x in zip(*(table[arm, seed].values() for seed in range(c.seeds)))]
        lines.append(" | ".join([f"| {arm}", *cells, ""]))
    save(Path(c.out) / "table.md", lambda file: file.write("\n".join([*lines, ""]).encode()))
    print("\n".join(lines))


def main(argv=None):
    mode, c, state, given = parse(argv)
    if mode == "ab":
        return compare(c, given)
    device, rank, world = join(c.device)
    if rank > 0:
        sys.stdout = None                               # print is silent then: one process speaks
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")          # TF32 where bfloat16 does not reach
    torch.backends.cuda.enable_cudnn_sdp(False)         # it plans anew for each shape, and there are thousands
    out, step, seconds = Path(c.out), 0, 0.0

    # ---- data and model
    names, pairs, heldout = (state["names"], None, None) if mode == "eval" else load_data(c, device)
    model = Transformer(Config(n_task=len(names), d_model=c.d_model, n_head=c.n_head, n_layer=c.n_layer, dense=c.dense,
                               ffn_factor=c.ffn_factor if c.ffn else 0, dropout=c.dropout)).to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(c.weight_decay), c.lr, betas=(0.9, 0.95), fused=True)
    if state:
        if state["names"] != names:
            raise DataError(f"{c.data}, {c.extra or 'no --extra'}: other tasks than those of the checkpoint in {out}")
        with blame("the checkpoint is of another shape"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    if mode == "eval":
        result = solve(c, model, names, rank, world)
        if rank == 0:
            save_json(out / "result.json", result)
        return
    print(f"{c.arm} on {c.device}{f' x {world}' * (world > 1)}: D={c.d_model} H={c.n_head} L={c.n_layer}, "
          f"{model.n_params() / 1e6:.2f} M parameters, {c.dtype}{', compiled' * c.compile}; {len(pairs.task)} pairs of "
          f"at most {c.max_tokens} tokens, {f'{c.steps} steps' if c.steps else f'{c.minutes:g} minutes'}, "
          f"{c.batch_tokens} tokens a step; into {out}  (any flag changes this: --help)")

    def look(batches):
        with autocast(c):
            return evaluate(model, batches)

    def check_finite():
        if not math.isfinite(norm):
            raise DataError(f"step {step}: loss {loss:g}, gradient norm {norm:g}, learning rate {lr:.2g}; a lower --lr "
                            f"may help; {out} keeps its last checkpoint")

    def checkpoint():
        log = (out / "log.csv").stat().st_size if (out / "log.csv").exists() else 0     # its lines, in bytes
        everything = {"config": asdict(c), "names": names, "step": step, "seconds": seconds, "log": log,
                      "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(out / "checkpoint.pt", lambda file: torch.save(everything, file))

    if rank == 0:
        if (out / "log.csv").exists():
            os.truncate(out / "log.csv", state["log"])                      # what came after is made again
        elif not state:
            checkpoint()
        git = ["git", "describe", "--always", "--dirty"] if shutil.which("git") else ["true"]
        git = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
        save_json(out / "config.json", asdict(c) | {"git": git})
    routing = [p for spl in model.spls().values() for p in (spl.proto_weight, spl.gate_weight)] if c.sars else []
    others = [p for p in model.parameters() if not any(p is q for q in routing)]
    if c.compile:                                       # before the clock starts; the layers share one compiled block
        for module in model.spls().values() if c.sars else model.blocks:        # SARS must see into the blocks
            module.forward = torch.compile(module.forward, dynamic=True)
        for _, batch in itertools.islice(batches(pairs, c), 64):                # CUDA's first epoch: no shape surprises
            with autocast(c):
                task_loss(model, *pairs.batch(*batch)).backward()
        model.zero_grad()
    net = DistributedDataParallel(model) if world > 1 else model

    # ---- train
    stop, shown, held, tokens, padded, norm = [], {}, 0.0, 0, 0, 0.0
    handlers = {n: signal.signal(n, lambda *_: stop.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    clock = saved = time.perf_counter()
    start = clock - seconds
    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", dynamic_ncols=True,
               disable=rank > 0)
    for epoch, (index, view, colours) in itertools.islice(batches(pairs, c, world), step, None):
        seconds = time.perf_counter() - start
        used = torch.tensor([step / c.steps if c.steps else seconds / (60 * c.minutes), len(stop)], dtype=torch.float64)
        if world > 1:
            dist.broadcast(used, 0)                                 # one clock and one Ctrl-C for all
        used, stopped = used.tolist()
        if used >= 1 or stopped:
            break
        lr = c.lr * rate(used, c.warmup, c.decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((c.seed << 32) + step * world + rank)     # dropout, too, follows from seed, step and rank

        length = pairs.length[index, view]

        # ---- the step
        *inputs, targets = pairs.batch(index[rank::world], view[rank::world], colours[rank::world])
        with autocast(c), model.watch() if c.sars else nullcontext() as seen:
            loss = task_loss(net, *inputs, targets) * world / int((length - pairs.prompt[index, view]).sum())
        loss.backward()                                             # several processes: DDP takes the mean gradient
        if c.sars:                                  # W_p and W_g learn from the routing loss, and from nothing else
            with autocast(c):
                real = unpadded(targets)
                route_loss = sum(routing_loss(*layer, real) for layer in seen.values()) / len(seen)
            for p in routing:
                p.grad = None
            route_loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(others, c.clip)
        if c.sars:
            norm = torch.hypot(norm, torch.nn.utils.clip_grad_norm_(routing, c.clip))
        optimizer.step()
        optimizer.zero_grad()
        # ----

        step, tokens, padded = step + 1, tokens + int((length - 1).sum()), padded + targets.numel() * world
        if step % c.log_every and step != c.steps:
            continue
        if world > 1:
            dist.all_reduce(loss)
        loss, norm, pause = loss.item() / world, norm.item(), time.perf_counter()
        speed = tokens / (pause - clock)
        check_finite()
        if rank == 0:
            row = {"step": step, "epoch": epoch, "seconds": pause - start, "lr": lr, "loss": loss,
                   "grad_norm": norm, "tokens_per_s": speed, "padding": 1 - tokens / padded}
            now, later = look([(*inputs, targets)]), {}
            if heldout and used >= held:
                later, held = look(heldout.unaugmented(c.batch_tokens)), used + 0.04
                shown["held-out"] = f"{later['loss']:.3f}"
            row |= {"route_loss": route_loss.item() if c.sars else math.nan}
            row |= {"pi": pi_score(now["loss"], now["entropy"], norm)} | {key: now[key] for key in MONITORS[1:]}
            row |= {f"heldout_{key}": later.get(key, math.nan) for key in MONITORS}
            append(out / "log.csv", row | {name: value for name, value in now.items() if " " in name})
            mfu = model.mfu(speed / world, targets.shape[1])
            shown |= {"loss": f"{loss:.3f}", "tok/s": f"{speed:.0f}"} | ({"MFU": f"{mfu:.0%}"} if mfu else {})
            bar.set_postfix(shown, refresh=False)
            bar.update(100 * used - bar.n)
            if time.perf_counter() - saved > 60 * c.save_minutes:
                checkpoint()
                saved = time.perf_counter()
        tokens, padded, clock = 0, 0, time.perf_counter()
        start += clock - pause                                      # looking is not training: the budget stands still
    bar.update(0 if stopped else 100 - bar.n)
    bar.close()
    check_finite()
    if rank == 0:
        checkpoint()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopped:
        print(f"stopped at step {step}; go on with: python train_arc.py --resume {out}")
        return
    result = {"arm": c.arm, "parameters": model.n_params(), "flops_per_token": model.flops_per_token(c.max_tokens),
              "steps": step, "seconds": seconds}
    if heldout and rank == 0:
        result |= {f"heldout_{key}": value for key, value in look(heldout.unaugmented(c.batch_tokens)).items()}
        told = "held-out: loss {heldout_loss:.4f}, {heldout_tokens:.1%} of tokens, {heldout_grids:.1%} of grids"
        print((told + "; {heldout_active:.0%} of the neurons active" * (not c.dense)).format(**result))
    result |= solve(c, model, names, rank, world) if c.score else {}
    if rank == 0:
        save_json(out / "result.json", result)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as fault:              # OSError names its file: missing or unreadable
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the folder of the run keeps what was saved", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
