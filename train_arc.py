"""Train a DynSIHA transformer on ARC, then score it.

    python train_arc.py --no-ffn                 attention only, on this machine's GPU or CPU
    python train_arc.py                          with the MoIE FFN; --dense is the standard transformer
    python train_arc.py --help                   every flag; --resume, --eval and --ab among them

The recipe: one demonstration pair is one sequence; a learned embedding per task says which rule applies.
Training sees the demonstrations of every task, the evaluation tasks' too, and never a test output of the
evaluation split: `solve` alone reads these, after the answers. The training split's test pairs are held out.

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
import sysconfig
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn     # imported before a process group exists: its defaults would keep that alive
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import (END, IGNORE, MAX_OUTPUT, MAX_SIDE, N_VOCAB, Config, Transformer, decode_grid, encode_grid,
                   encode_prompt, evaluate, pair_tokens, pi_score, task_loss, unpadded)
from spl import routing_loss

SPLITS, ATTEMPTS = ("training", "evaluation", "test"), ("attempt_1", "attempt_2")
MONITORS = ("loss", "tokens", "grids", "active", "failed")              # of `evaluate`, for the log


class DataError(ValueError):
    """Bad input; its text names the file, the task and the fault."""


def require(ok, fault):
    if not ok:
        raise DataError(fault)


@contextmanager
def blame(where):
    """An error inside becomes a DataError of one line that begins with `where`; nested, the places add up."""
    try:
        yield
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as e:
        short = {KeyError: f"no {e}", pickle.UnpicklingError: "of another format"}
        raise DataError(f"{where}: {short.get(type(e)) or ' '.join(str(e).split())[:300]}") from None


def expect(value, kind, length=None):
    """`value`, if it is a list or dict, not empty, and of `length` entries where that is given."""
    found = f"{len(value)} entries" if isinstance(value, kind) else type(value).__name__
    require(isinstance(value, kind) and value and len(value) == (length or len(value)),
            f"{found}; expected a {kind.__name__} of {length or 'at least one'}")
    return value


# ------------------------------------------------------------------------------------------ views
N_DIHEDRAL, INVERSE = 8, (0, 3, 2, 1, 4, 5, 6, 7)   # the view that undoes each: a mirror undoes itself


def view_grid(grid, view):
    """One of the 8 dihedral views: transposed from 4 on, then turned by view % 4 quarters."""
    return np.rot90(grid.T if view >= 4 else grid, view % 4)


def colour_permutations(free, rng):
    """free (N, 10) bool: the colours that may change -> (N, 14) token tables; the rest map to themselves.
    Row n shuffles its free colours among themselves: sorted by random keys they fill their own slots."""
    table = np.tile(np.arange(N_VOCAB, dtype=np.uint8), (len(free), 1))
    slots = np.argsort(~free, axis=1, kind="stable")
    shuffled = np.argsort(np.where(free, rng.random(free.shape), 2.0), axis=1, kind="stable")
    np.put_along_axis(table, slots, shuffled.astype(np.uint8), axis=1)
    return table


# ------------------------------------------------------------------------------------------ tasks
Task = namedtuple("Task", "train test")     # demonstrations [(input, output)]; inputs, never their outputs


def read_object(path):
    """The JSON object in `path`."""
    text = path.read_bytes()
    with blame(f"{path}: not JSON"):
        value = json.loads(text)
    with blame(path):
        return expect(value, dict)


def read_grid(value):
    """A JSON value -> (h, w) uint8 grid."""
    widths = {len(expect(row, list)) for row in expect(value, list)}
    require(len(widths) == 1 and max(*widths, len(value)) <= MAX_SIDE,
            f"{len(value)} rows of widths {sorted(widths)}; expected up to 30 rows of one width, up to 30")
    wrong = [cell for row in value for cell in row if type(cell) is not int or not 0 <= cell <= 9]
    require(not wrong, f"a cell is {json.dumps(wrong[:1])[1:-1][:20]}; expected an integer from 0 to 9")
    return np.array(value, dtype=np.uint8)


def read_grids(values, part, key=None, length=None):
    """A list of `length` grids, or of objects with a grid under `key`; errors name `part` and the place."""
    grids = []
    with blame(part):
        for i, value in enumerate(expect(values, list, length)):
            with blame(f"{i} {key}" if key else i):
                grids.append(read_grid(expect(value, dict)[key] if key else value))
    return grids


def read_split(folder, split):
    """{id: (file, raw task)} of one split: Kaggle's one file, or GitHub's folder with a file for each task.
    A folder of task files without splits, such as ConceptARC, is an evaluation split as a whole."""
    folder, tasks = Path(folder), {}
    kaggle = folder / f"arc-agi_{split}_challenges.json"
    if kaggle.exists():
        return {name: (kaggle, raw) for name, raw in read_object(kaggle).items()}
    parted = any(folder.glob("arc-agi_*.json")) or any((folder / name).is_dir() for name in SPLITS)
    whole = split == "evaluation" and not parted
    for file in sorted((folder if whole else folder / split).rglob("*.json")):
        above = file.parent
        require(not whole or above.name not in SPLITS, f"{folder}: tasks are in {above.parent}; name that")
        first, _ = tasks.setdefault(file.stem, (file, read_object(file)))
        require(first is file, f"{file}: task {file.stem} is in {first}, too")
    return tasks


def read_tasks(folder, split):
    """{id: Task} of one split. Test outputs, where a file has them, are left unread."""
    tasks = {}
    for name, (file, raw) in read_split(folder, split).items():
        with blame(f"{file}: task {name}"):
            demos = expect(raw, dict)["train"]
            pairs = zip(read_grids(demos, "train", "input"), read_grids(demos, "train", "output"))
            tasks[name] = Task(list(pairs), read_grids(raw["test"], "test", "input"))
    return tasks


def read_solutions(folder, split, tasks):
    """{id: [test output, ...]} of a split's `tasks`, from its file or inline; empty if it has none."""
    file, solutions = Path(folder) / f"arc-agi_{split}_solutions.json", {}
    inline = {} if file.exists() else read_split(folder, split)
    found = read_object(file) if file.exists() else {
        name: [pair["output"] for pair in raw["test"] if "output" in pair]
        for name, (_, raw) in inline.items()}
    if not any(found.values()):
        return solutions
    for name, task in tasks.items():
        with blame(f"{inline[name][0] if inline else file}: task {name}"):
            solutions[name] = read_grids(found.get(name), "solutions", length=len(task.test))
    return solutions


def read_submission(file, tasks):
    """{id: [{"attempt_1": grid, "attempt_2": grid}, ...]} for `tasks`, one entry for each test input."""
    found = read_object(file)
    for name, task in tasks.items():
        with blame(f"{file}: task {name}"):
            for key in ATTEMPTS:
                read_grids(found[name], "attempts", key, len(task.test))
    return found


def without_leaks(extra, asked, known=()):
    """The `extra` tasks that share no id, set of demonstrations or test input with the `asked` ones, and no
    id with the `known`. No output that is asked for is needed to tell."""
    def clues(task, inputs):
        demos = frozenset(str([x.tolist(), y.tolist()]) for x, y in task.train)
        return {demos, *(str(x.tolist()) for x in inputs)}

    taken = set().union(*(clues(task, task.test) for task in asked.values()))
    return {name: task for name, task in extra.items() if name not in asked and name not in known
            and taken.isdisjoint(clues(task, [x for x, _ in task.train] + task.test))}


# ------------------------------------------------------------------------------------------ batches
Pair = namedtuple("Pair", "task free views")        # task index; colours to permute; tokens in each view
Sample = namedtuple("Sample", "task view colours prompt answer")    # one view of a pair, under a colour table
UNKNOWN = np.empty((0, 0), np.uint8)                # the output of a question: its tokens are <end> alone


def collate(samples, device):
    """Samples -> tokens (B, T), task (B,), view (B,), targets (B, T), made on `device`.
    The target at t is token t + 1 where that is an output token, IGNORE elsewhere."""
    flat = np.concatenate([part for s in samples for part in (s.prompt, s.answer)])
    meta = np.array([(s.task, s.view, len(s.prompt), len(s.prompt) + len(s.answer)) for s in samples]).T
    width = meta[3].max()                               # T + 1
    if device.type == "cuda":                           # T a multiple of 8: others would be compiled apart
        width += (1 - width) % 8
    t = torch.arange(width, device=device)
    parts = map(torch.from_numpy, (flat, meta, np.array([s.colours for s in samples])))
    if device.type == "cuda":                           # pinned, the copy does not wait for the GPU
        parts = (part.pin_memory().to(device, non_blocking=True) for part in parts)
    flat, (task, view, prompt, length), colours = parts
    start = length.cumsum(0) - length
    outside = t >= length[:, None]
    tokens = flat[(start[:, None] + t).masked_fill(outside, 0)].long()                    # (B, T + 1)
    tokens = colours.long().gather(1, tokens).masked_fill(outside, END)
    targets = tokens.masked_fill(outside | (t < prompt[:, None]), IGNORE)
    return tokens[:, :-1], task, view, targets[:, 1:]


def cut(lengths, budget):
    """Where to split ascending `lengths` so that each part, padded to its longest, stays within `budget`."""
    cuts, first = [], 0
    for i, length in enumerate(lengths):
        if (i + 1 - first) * length > budget and i > first:
            cuts.append(i)
            first = i
    return cuts


def plan_epoch(pairs, batch_tokens, rng, least=2):
    """One epoch as lists of samples: each pair once, in a fresh view, similar lengths together. A last list
    below `least` joins the one before: a lone sample would compile anew, and every process needs one."""
    view = rng.integers(len(pairs[0].views), size=len(pairs))
    length = np.array([sum(map(len, pair.views[v])) for pair, v in zip(pairs, view)])
    order = np.lexsort((rng.random(len(pairs)), length))
    colours = colour_permutations(np.array([pair.free for pair in pairs]), rng)
    samples = [Sample(pair.task, v, table, *pair.views[v]) for pair, v, table in zip(pairs, view, colours)]
    cuts = cut(length[order] - 1, batch_tokens)
    if cuts and len(pairs) - cuts[-1] < least:
        cuts.pop()
    parts = np.split(order, cuts)
    return [[samples[i] for i in parts[n]] for n in rng.permutation(len(parts))]


def batches(pairs, c, world=1):
    """Endless (epoch, samples); number n is the same for every arm and every resumption."""
    for epoch in itertools.count():
        for batch in plan_epoch(pairs, c.batch_tokens, np.random.default_rng((c.seed, epoch)), max(2, world)):
            yield epoch, batch


def in_views(x, y):
    """A pair's (prompt, answer) tokens in each view."""
    pairs = ((view_grid(x, v), view_grid(y, v)) for v in range(N_DIHEDRAL))
    return [(np.array(encode_prompt(x), np.uint8), np.array(encode_grid(y, END), np.uint8)) for x, y in pairs]


def free_colours(task, permute=True):
    """(10,) bool: colours 1..9 but for those that only outputs show, since 'mark with red' must stay red."""
    shown = {c for x in [x for x, _ in task.train] + task.test for c in x.flat}
    added = {c for _, y in task.train for c in y.flat} - shown
    return np.array([permute and c > 0 and c not in added for c in range(10)])


def load_data(c, device):
    """(names of the tasks to train on, their pairs, held-out batches); reads no output that is asked for."""
    require(Path(c.data).is_dir(), f"--data {c.data}: no such folder")
    training, asked = read_tasks(c.data, "training"), read_tasks(c.data, c.split)
    extra = {name: task for s in SPLITS for name, task in read_tasks(c.extra, s).items()} if c.extra else {}
    solutions, both = read_solutions(c.data, "training", training), training.keys() & asked.keys()
    require(asked, f"{c.data}: no {c.split} tasks: no arc-agi_{c.split}_challenges.json, no {c.split}/*.json")
    require(not both, f"{c.data}: task {min(both, default='')} is in both splits")
    require(solutions or not training, f"{c.data}: the training split has no solutions, in a file or inline")
    require(extra or not c.extra, f"{c.extra}: no tasks; expected a folder as --data takes it")
    new = without_leaks(extra, asked, training)
    own = without_leaks(training, asked)                # a task of ARC-1 is in both: its test stays unseen
    if extra:
        print(f"{c.extra}: {len(new)} of {len(extra)} tasks are new, {len(extra) - len(new)} dropped")

    def short(pairs):
        return [(x, y) for x, y in pairs if pair_tokens(x, y) <= c.max_tokens]
    tasks = training | asked | new
    demos = {name: pairs for name, task in tasks.items() if (pairs := short(task.train))}
    require(demos, f"{c.data}: no pair of at most {c.max_tokens} tokens; raise --max-tokens")
    tests = {name: short(zip(task.test, solutions[name])) for name, task in own.items()}
    names, free = list(demos), [free_colours(tasks[name], c.permute_colours) for name in demos]
    pairs, held = ([Pair(n, free[n], in_views(*pair)) for n, name in enumerate(names)
                    for pair in part.get(name, [])] for part in (demos, tests))
    pairs += [pair for pair in pairs if names[pair.task] in asked] * (c.repeat - 1)
    if not c.heldout or not held:
        return names, pairs + held, []
    held = [Pair(task, np.zeros(10, bool), views[:1]) for task, _, views in held]  # in true colours, unturned
    plan = plan_epoch(held, c.batch_tokens, np.random.default_rng(0))
    return names, pairs, [collate(samples, device) for samples in plan]


# ------------------------------------------------------------------------------------------ answers
def gather(value, world):
    """[`value` of each process], the same list in all of them."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def share_out(work, jobs, lengths, budget, what, rank, world):
    """[work's result for each of `jobs`]; work takes lists of similar `lengths`, the longest list first, each
    within `budget` tokens unless it is one job. The processes share the jobs, and each gets every result."""
    order, found = np.argsort(lengths, kind="stable")[rank::world], {}
    bar = tqdm(total=len(order), desc=what, unit="grid", dynamic_ncols=True, disable=rank > 0)
    with bar, torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        for part in filter(len, reversed(np.split(order, cut(np.array(lengths)[order], budget)))):
            found |= zip(part, work([jobs[j] for j in part]))
            bar.update(len(part))
    found = {j: result for share in gather(found, world) for j, result in share.items()}
    return [found[j] for j in range(len(jobs))]


def propose(model, questions, c, rank=0, world=1):
    """{key: Pair of an input and UNKNOWN} -> [(key, valid output as a tuple of rows)], no two alike: greedy
    answers in 8 views x c.colour_votes colour tables, turned and coloured back; the first table changes
    nothing. Format and flags bound an output's length, never the answer."""
    def decode(jobs):
        tokens, task, view, _ = collate(jobs, device)
        lengths = [len(job.prompt) for job in jobs]
        most = min(MAX_OUTPUT, c.max_tokens - min(lengths))
        outputs = model.generate(tokens, torch.tensor(lengths, device=device), task, view, most)
        for job, output in zip(jobs, outputs.cpu().numpy()):    # cut: a row depends on none beside it
            rows = decode_grid(np.argsort(job.colours)[output[:c.max_tokens - len(job.prompt)]])
            yield rows and tuple(map(tuple, view_grid(np.array(rows), INVERSE[job.view]).tolist()))

    rng, jobs, device = np.random.default_rng(c.seed), [], model.head.weight.device
    votes = c.colour_votes if c.permute_colours else 1      # else each would be the same
    for task, free, views in questions.values():
        tables = colour_permutations(np.repeat(free[None], votes, 0), rng)
        tables[0] = np.arange(N_VOCAB)
        jobs += [Sample(task, v, table, *views[v]) for table in tables for v in range(N_DIHEDRAL)]
    lengths = [len(job.prompt) + min(MAX_OUTPUT, c.max_tokens) for job in jobs]                 # upper bounds
    grids = share_out(decode, jobs, lengths, c.decode_tokens, "decode", rank, world)
    keys = [key for key in questions for _ in range(N_DIHEDRAL * votes)]
    return list(dict.fromkeys((key, grid) for key, grid in zip(keys, grids) if grid))


def likeliest(model, questions, proposed, c, rank=0, world=1):
    """[(key, output)] -> {key: [output]}, the likeliest first: by log-probability, the mean over 8 views."""
    def loss(jobs):
        *inputs, targets = collate(jobs, model.head.weight.device)
        logits = model(*inputs).float().transpose(1, 2)                                   # (B, n_vocab, T)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").sum(1).tolist()

    jobs, answers, colours = [], {key: [] for key in questions}, np.arange(N_VOCAB, dtype=np.uint8)
    for key, grid in proposed:
        for v, (prompt, _) in enumerate(questions[key].views):
            output = np.array(encode_grid(view_grid(np.array(grid), v), END), np.uint8)
            jobs.append(Sample(questions[key].task, v, colours, prompt, output))
    lengths = [len(job.prompt) + len(job.answer) for job in jobs]
    losses = share_out(loss, jobs, lengths, c.batch_tokens // world, "rank", rank, world)
    for n in np.argsort(np.reshape(losses, (-1, N_DIHEDRAL)).mean(1), kind="stable"):
        key, grid = proposed[n]
        answers[key].append(list(map(list, grid)))
    return answers


def score(submission, solutions):
    """((pass@1, pass@2), tasks solved whole): the ARC Prize's mean over a task's outputs, then over tasks."""
    marks = np.zeros((len(solutions), 2))
    for mark, (name, outputs) in zip(marks, solutions.items()):
        for output, given in zip(outputs, submission.get(name, [])):
            hits = [given[key] == output.tolist() for key in ATTEMPTS]
            mark += np.array([hits[0], any(hits)]) / len(outputs)
    return marks.mean(0), int((marks[:, 1] > 1 - 1e-9).sum())


def draw(titled, colour, width):
    """[(title, grid)] as text, side by side if `width` allows: digits, on cells in colour if `colour`."""
    palette = 16, 27, 160, 34, 220, 245, 201, 208, 117, 88      # the colours of ARC among a terminal's 256

    def cell(v):                        # paper and ink are both set: it reads on dark and on light terminals
        ink = 15 if v in (0, 1, 2, 9) else 16
        return f"\033[48;5;{palette[v]};38;5;{ink}m{v} \033[0m" if colour else f"{v} "
    sizes = [max(len(title), 2 * len(grid[0])) + 2 for title, grid in titled]
    if sum(sizes) > width and len(titled) > 1:
        return "\n".join(draw([one], colour, width) for one in titled)
    lines = ["".join(title.ljust(size) for (title, _), size in zip(titled, sizes))]
    for rows in itertools.zip_longest(*(grid for _, grid in titled), fillvalue=()):
        lines.append("".join("".join(map(cell, row)) + " " * (size - 2 * len(row))
                             for row, size in zip(rows, sizes)))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def solve(c, model, names, rank=0, world=1):
    """Answers the test inputs of c.split, writes submission.json, and scores it where there are solutions."""
    model.eval()
    tasks, index = read_tasks(c.data, c.split), {name: n for n, name in enumerate(names)}
    questions = {(name, i): Pair(index[name], free_colours(task, c.permute_colours), in_views(x, UNKNOWN))
                 for name, task in tasks.items() if name in index
                 for i, x in enumerate(task.test) if pair_tokens(x, x[:1, :1]) <= c.max_tokens}
    answers = likeliest(model, questions, propose(model, questions, c, rank, world), c, rank, world)
    if rank > 0:
        return {}
    file = Path(c.out) / "submission.json"
    submission = {name: [dict(zip(ATTEMPTS, answers.get((name, i), [])[:2] + [[[0]], [[0]]]))
                         for i in range(len(task.test))] for name, task in tasks.items()}
    save(file, submission)
    submission = read_submission(file, tasks)
    solutions = read_solutions(c.data, c.split, tasks)          # read here alone, after the last answer
    for name, i in list(questions)[:c.show]:
        target = solutions and solutions[name][i].tolist()
        titled = [("input", tasks[name].test[i])] + [("target", target)] * bool(target)
        for key, grid in submission[name][i].items():
            verdict = (" right" if grid == target else " wrong") if target else ""
            verdict = verdict if grid in answers[name, i] else " missing"
            titled.append((key.replace("_", " ") + verdict, grid))
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"{name} test {i}\n{draw(titled, colour, shutil.get_terminal_size().columns)}")
    asked = sum(len(task.test) for task in tasks.values())
    tried = f"{len(questions)} of {asked} test inputs were short enough and of a trained task; see {file}"
    if not solutions:
        print(f"{c.split}: no solutions in {c.data}, so the submission cannot be scored here; {tried}")
        return {}
    (pass1, pass2), solved = score(submission, solutions)
    print(f"{c.split}: pass@1 {pass1:.2%}, pass@2 {pass2:.2%} (mean over a task's test outputs, then over "
          f"the {len(tasks)} tasks), {solved} tasks solved whole; {tried}")
    return {"pass@1": pass1, "pass@2": pass2, "solved": solved, "tasks": len(tasks), "tried": len(questions)}


# ------------------------------------------------------------------------------------------ flags
DENSE_LR = 0.2          # the dense control's best learning rate over the SPL's: see results/README.md
HEADERS = Path(sysconfig.get_path("include"), "Python.h")           # torch.compile on a CPU needs these, too
COMPILER = sys.platform == "linux" and shutil.which("g++") is not None and HEADERS.exists()


def flag(default, text, least=0, most=1e9):
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass
class Run:
    """Every field is a flag. Of two defaults the first is for a CPU, the second for CUDA."""
    ffn: bool = flag(True, "the MoIE feed-forward network in each block")
    dense: bool = flag(False, "the dense control: nn.Linear attention and a 4x GELU FFN")
    data: str = flag("data/arc-agi-1", "folder of the task set, in the Kaggle or the GitHub layout")
    split: str = flag("evaluation", "split to answer: evaluation or test; its demonstrations are trained on")
    extra: str = flag("", "folder of more tasks to train on; those of the split to answer are dropped")
    out: str = flag("", "folder of this run; empty: runs/ARM-seedN-TIME")
    show: int = flag(0, "test inputs to draw with their answers, at the end")
    heldout: bool = flag(True, "hold out the training split's test pairs, for tuning, or train on them too")
    score: bool = flag(True, "answer and score the split at the end")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")
    sars: bool = flag(False, "train W_p and W_g by the routing loss of SARS in place of the task loss")
    seed: int = flag(0, "seed of weights, order, views and colours")
    seeds: int = flag(3, "seeds of each arm under --ab: 0, 1, ...", 1)
    minutes: float = flag((10.0, 20.0), "training budget in minutes; scoring comes on top", 0.01)
    steps: int = flag(0, "training budget in steps, in place of minutes")
    d_model: int = flag((128, 768), "width D", 2)
    n_head: int = flag((2, 12), "heads H", 1)
    n_layer: int = flag((4, 10), "layers L", 1)
    ffn_factor: int = flag(1, "hidden width of MoIE over D", 1)
    dropout: float = flag((0.0, 0.1), "dropout on each branch", 0, 0.99)
    max_tokens: int = flag((150, 1863), "longest pair to train on; longer test pairs count as wrong", 1)
    batch_tokens: int = flag((768, 2**15), "tokens per batch over all processes, padding included", 1)
    lr: float = flag((5e-3, 4e-3), f"peak learning rate; times {DENSE_LR} by default under --dense", 1e-7)
    weight_decay: float = flag(0.1, "decay of the blocks' matrices")
    warmup: float = flag(0.02, "share of the budget in which the learning rate rises", 0, 1)
    decay: float = flag(0.5, "share of the budget in which it falls to 0", 0, 1)
    clip: float = flag(1.0, "largest gradient norm", 1e-6)
    repeat: int = flag(1, "times that an epoch shows each pair of the split to answer", 1)
    permute_colours: bool = flag(True, "permute a task's input colours in training")
    colour_votes: int = flag(4, "colour tables under which each of the 8 views answers", 1)
    decode_tokens: int = flag((2**15, 2**20), "size of a decoding batch: rows times tokens with answer", 1)
    dtype: str = flag(("float32", "bfloat16"), "float32, or bfloat16 by autocast")
    compile: bool = flag((COMPILER, True), "torch.compile the blocks")
    log_every: int = flag(50, "steps between lines of the log", 1)
    save_minutes: float = flag(5.0, "minutes between checkpoints")

    def __post_init__(self):
        """Fills in what depends on the device, and refuses what cannot run."""
        devices, world = ["cpu"] + ["cuda"] * torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
        if self.device == "auto":
            self.device = devices[-1]
        if self.dense and isinstance(self.lr, tuple):
            self.lr = tuple(DENSE_LR * lr for lr in self.lr)

        def expected(name, ok, what):
            require(ok, f"--{name.replace('_', '-')} {getattr(self, name)}: expected {what}")
        for f in fields(self):
            if isinstance(getattr(self, f.name), tuple):
                setattr(self, f.name, getattr(self, f.name)[self.device == "cuda"])
            value, least, most = getattr(self, f.name), f.metadata["least"], f.metadata["most"]
            expected(f.name, f.type not in (int, float) or least <= value <= most, f"{least:g} to {most:g}")
        expected("device", self.device in devices, " or ".join(devices))
        expected("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        expected("split", self.split in SPLITS[1:], "evaluation or test")
        expected("d_model", self.d_model % (2 * self.n_head) == 0,
                 f"a multiple of {2 * self.n_head}, twice --n-head")
        expected("batch_tokens", self.batch_tokens >= world * self.max_tokens,
                 f"at least --max-tokens {self.max_tokens} for each of {world} processes")
        require(self.ffn or not self.dense, "--dense --no-ffn: the control has an FFN of its own; name one")
        require(not self.sars or not self.dense and world == 1,
                "--sars: needs SPLs and one process; leave out --dense and torchrun")
        self.arm = "dense" if self.dense else "ffn" if self.ffn else "no-ffn"


def parse(argv):
    """(mode, Run, checkpoint or None); mode is train, resume, eval or ab."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda fault: require(False, fault)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="DIR", help="go on with the stopped run in DIR, under its flags")
    modes.add_argument("--eval", metavar="FILE", help="score this checkpoint; other flags override its own")
    modes.add_argument("--ab", action="store_true", help="train every arm with every seed, print a table")
    for f in fields(Run):
        default = "{} on a CPU, {} on CUDA".format(*f.default) if isinstance(f.default, tuple) else f.default
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f"{f.metadata['help']} (default: {default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(parser.parse_args(argv))
    mode = next((mode for mode in ("resume", "eval", "ab") if mode in given), "train")
    path, state = given.pop(mode, ""), None
    clash = given.keys() & {"ffn", "dense", "sars", "heldout", "seed"} if mode == "ab" else ()
    require(not clash, f"--ab --{' --'.join(clash)}: it sets its arms and seeds; leave it out")
    require(mode != "resume" or not given, "--resume takes no other flag: the run goes on under its own")
    if mode in ("resume", "eval"):
        file = Path(path, "checkpoint.pt" if mode == "resume" else "")
        with blame(f"{file}: not a checkpoint of this program"):
            found = torch.load(file, map_location="cpu", weights_only=True)
            state = {key: found[key] for key in "config names step seconds log model optimizer".split()}
            Run(**state["config"] | {"device": "cpu"})                  # refuses what is no configuration
    out = {"resume": path, "ab": "runs/ab"}.get(mode, "")
    own = {"out": out} | ({"device": "auto"} if mode == "eval" else {})
    c = Run(**(state["config"] if state else {}) | own | given)
    c.out = c.out or time.strftime(f"runs/{'eval' if mode == 'eval' else c.arm}-seed{c.seed}-%Y%m%d-%H%M%S")
    return mode, c, state


# ------------------------------------------------------------------------------------------ files of a run
def save(path, value):
    """Atomic: to a temporary file, flushed to the disk, then renamed; tensors in a .pt file, else JSON."""
    temporary = path.with_suffix(".tmp")
    with blame(f"{path}: cannot be written"):
        try:
            with open(temporary, "wb") as file:
                torch.save(value, file) if path.suffix == ".pt" else file.write(json.dumps(value).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path, row):
    """`row` as the next line of a CSV file, under a header if it is the first."""
    with blame(f"{path}: cannot be written"), open(path, "a") as file:
        header = "" if file.tell() else ",".join(row)
        np.savetxt(file, [list(row.values())], "%.9g", delimiter=",", header=header, comments="")


# ------------------------------------------------------------------------------------------ comparison
def compare(c, argv):
    """--ab: every arm with every seed, run after run, each its own process and folder; then their table.
    Finished runs are kept and stopped ones go on: the same command continues, and runs made by hand count."""
    require("RANK" not in os.environ, "--ab: starts its runs itself; leave out torchrun")
    deep = round(c.n_layer * (1 + c.ffn_factor / 2))              # about as many weights as with the FFN
    arms = {"no-ffn": ["--no-ffn"], "ffn": ["--ffn"], "dense": ["--dense"],
            "no-ffn-deep": ["--no-ffn", f"--n-layer={deep}"]}
    free = {"out", "seeds", "show", "compile", "decode_tokens", "save_minutes"}     # change rounding at most
    signal.signal(signal.SIGINT, lambda *_: None)                       # Ctrl-C is for the run in hand
    runs = {arm: [] for arm in arms}
    for seed, arm in itertools.product(range(c.seeds), arms):
        folder = Path(c.out) / f"{arm}-seed{seed}"
        config, result = folder / "config.json", folder / "result.json"
        words = [word for word in argv if word != "--ab"] + [*arms[arm], f"--seed={seed}", f"--out={folder}"]
        if config.exists():
            ours = asdict(parse(words)[1])
            found = {f.name: f.default for f in fields(Run)} | read_object(config)     # it may lack new flags
            odd = sorted(name for name in ours.keys() - free if found.get(name) != ours[name])
            require(not odd, f"{folder}: a run with another --{' --'.join(odd).replace('_', '-')}; "
                    "name another --out")
        if not result.exists():
            words = [f"--resume={folder}"] if (folder / "checkpoint.pt").exists() else words
            status = subprocess.run([sys.executable, __file__, *words]).returncode
            if status or not result.exists():
                sys.exit(status or 130)
        curve = np.genfromtxt(folder / "log.csv", delimiter=",", names=True)
        curve = curve[np.isfinite(curve["heldout_loss"])]
        require(len(curve), f"{folder}: --ab compares held-out losses, and this run has none")
        runs[arm].append((read_object(result), curve))
    text = table(runs)
    Path(c.out, "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


def table(runs):
    """{arm: [(result, log lines with a held-out loss) by seed]} -> Markdown, mean ± standard deviation."""
    curves = [curve for found in runs.values() for _, curve in found]
    steps, seconds = (min(curve[axis][-1] for curve in curves) for axis in ("step", "seconds"))
    target = max(curve["heldout_loss"][-1] for curve in curves)         # the loss that every run reaches

    def measure(result, curve):
        loss, reached = curve["heldout_loss"], curve[np.argmax(curve["heldout_loss"] <= target)]
        return {
            "parameters": result["parameters"], "FLOPs/token": result["flops_per_token"],
            "steps/s": result["steps"] / result["seconds"],
            "held-out loss at the end": result["heldout_loss"],
            f"at step {steps:g}": np.interp(steps, curve["step"], loss),
            f"at {seconds:.0f} s": np.interp(seconds, curve["seconds"], loss),
            f"steps to {target:.3f}": reached["step"], f"seconds to {target:.3f}": reached["seconds"],
            **{name: result.get(name, math.nan) for name in ("pass@1", "pass@2", "solved")},
            "active": result["heldout_active"], "failed": result["heldout_failed"], "PI": curve["pi"][-1]}
    rows = []
    for arm, found in runs.items():
        measured = [measure(*run) for run in found]
        rows.append([arm] + [f"{np.mean(x):.4g}" + (f" ± {np.std(x, ddof=1):.2g}" if np.ptp(x) > 0 else "")
                             for x in zip(*(run.values() for run in measured))])
    head = [f"arm (n = {len(found)})", *measured[0]]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


# ------------------------------------------------------------------------------------------ training
def rate(used, warmup, decay):
    """Learning-rate factor when `used` of the budget is gone: linear up, constant, linear down to 0."""
    return min(1.0, used / warmup if warmup else 1.0, max(0.0, 1 - used) / decay if decay else 1.0)


def compile_blocks(c, model, pairs, rank, world):
    """Compiles in place and warms up, before the clock starts; the layers share one compiled block."""
    for module in model.spls().values() if c.sars else model.blocks:    # SARS must see into the blocks
        module.forward = torch.compile(module.forward, dynamic=True)
    warm = 64 if c.device == "cuda" else 1      # about an epoch: CUDA compiles anew for small batches
    for _, batch in itertools.islice(batches(pairs, c, world), warm):
        task_loss(model, *collate(batch[rank::world], model.head.weight.device)).backward()
    model.zero_grad()


def train(c, model, optimizer, pairs, heldout, state, rank, world):
    """Trains from `state` until the budget is used -> what result.json says of it; None if a signal came."""
    out, log, step, seconds = Path(c.out), Path(c.out, "log.csv"), state["step"], state["seconds"]
    device = model.head.weight.device

    def check_finite():
        require(math.isfinite(norm), f"step {step}: loss {loss:g}, gradient norm {norm:g}, learning rate "
                f"{lr:.2g}; a lower --lr may help; {out} keeps its last checkpoint")

    def checkpoint():
        check_finite()
        if rank == 0:
            now = {"step": step, "seconds": seconds, "log": log.stat().st_size if log.exists() else 0,
                   "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(out / "checkpoint.pt", state | now)

    shown, due, tokens, padded, route_loss = {}, 0.0, 0, 0, torch.tensor(math.nan)
    loss, norm, lr, saved = math.nan, 0.0, c.lr, seconds
    if rank == 0:
        if log.exists():
            os.truncate(log, state["log"])                          # what came after is made again
        checkpoint()
        git = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent,
                             capture_output=True, text=True).stdout.strip()
        save(out / "config.json", asdict(c) | {"git": git})
    routing = [p for m in model.spls().values() for p in (m.proto_weight, m.gate_weight)] if c.sars else []
    others = [p for p in model.parameters() if p not in set(routing)]   # the two are clipped apart
    if c.compile:
        compile_blocks(c, model, pairs, rank, world)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    stop = []
    handlers = {n: signal.signal(n, lambda *_: stop.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    start, last = time.perf_counter() - seconds, seconds
    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", dynamic_ncols=True,
               disable=rank > 0)
    for epoch, batch in itertools.islice(batches(pairs, c, world), step, None):
        seconds = time.perf_counter() - start
        used = step / c.steps if c.steps else seconds / (60 * c.minutes)
        used, stopped = gather((used, len(stop)), world)[0]         # one clock and one Ctrl-C for all
        if used >= 1 or stopped:
            break
        lr = c.lr * rate(used, c.warmup, c.decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((c.seed << 32) + step * world + rank)     # dropout follows from seed, step and rank

        # ---- the step
        *inputs, targets = collate(batch[rank::world], device)
        with model.watch() if c.sars else nullcontext() as seen:
            loss = task_loss(net, *inputs, targets) * world / sum(len(sample.answer) for sample in batch)
        loss.backward()                                             # several processes: DDP takes the mean
        if c.sars:                                  # W_p and W_g learn from the routing loss alone
            real = unpadded(targets)
            with model.autocast():
                route_loss = sum(routing_loss(*layer, real) for layer in seen.values()) / len(seen)
            for p, gradient in zip(routing, torch.autograd.grad(route_loss, routing)):
                p.grad = gradient
        norm = torch.stack([nn.utils.clip_grad_norm_(p, c.clip) for p in (others, routing) if p]).norm()
        optimizer.step()
        optimizer.zero_grad()
        # ----

        step, padded = step + 1, padded + targets.numel() * world
        tokens += sum(len(sample.prompt) + len(sample.answer) - 1 for sample in batch)
        if step % c.log_every and step != c.steps:
            continue
        loss, norm = sum(gather(loss.item(), world)) / world, norm.item()
        seconds = time.perf_counter() - start
        check_finite()
        if rank == 0:
            now, ahead, speed = evaluate(model, [(*inputs, targets)]), {}, tokens / (seconds - last)
            if heldout and used >= due:
                ahead, due = evaluate(model, heldout), used + 0.04
                shown["held-out"] = f"{ahead['loss']:.3f}"
            append(log, {
                "step": step, "epoch": epoch, "seconds": seconds, "lr": lr, "loss": loss, "grad_norm": norm,
                "tokens_per_s": speed, "padding": 1 - tokens / padded, "route_loss": route_loss.item(),
                "pi": pi_score(now["loss"], now["entropy"], norm), **{key: now[key] for key in MONITORS[1:]},
                **{f"heldout_{key}": ahead.get(key, math.nan) for key in MONITORS},
                **{name: value for name, value in now.items() if " " in name}})
            mfu = model.mfu(speed / world, targets.shape[1])
            shown |= {"loss": f"{loss:.3f}", "tok/s": f"{speed:.0f}"} | ({"MFU": f"{mfu:.0%}"} if mfu else {})
            bar.set_postfix(shown, refresh=False)
            bar.update(100 * used - bar.n)
        if seconds - saved > 60 * c.save_minutes:
            checkpoint()
            saved = seconds
        tokens, padded, last = 0, 0, seconds
        start = time.perf_counter() - seconds                   # looking is not training: no time has passed
    bar.update(0 if stopped else 100 - bar.n)
    bar.close()
    checkpoint()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopped:
        launcher = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
        print(f"stopped at step {step}; go on with: {launcher} train_arc.py --resume {out}")
        return None
    return summary(c, model, heldout if rank == 0 else None) | {"steps": step, "seconds": seconds}


def summary(c, model, heldout):
    """What result.json says of a trained model before its score; one line of it on the screen."""
    result = {"arm": c.arm, "parameters": model.n_params(),
              "flops_per_token": model.flops_per_token(c.max_tokens)}
    if heldout:
        found = evaluate(model, heldout)
        told = "held-out: loss {loss:.4f}, {tokens:.1%} of tokens, {grids:.1%} of grids"
        print((told + "; {active:.0%} of the neurons active" * (not c.dense)).format(**found))
        result |= {f"heldout_{key}": value for key, value in found.items()}
    return result


def main(argv):
    mode, c, state = parse(argv)
    if mode == "ab":
        return compare(c, argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun sets them
    if c.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if c.device == "cuda" else "gloo")  # gloo for `gather`
        c.out = gather(c.out, world)[0]                 # its name may hold the time
    if rank > 0:
        sys.stdout = None                               # print is silent then: one process speaks
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")          # TF32 where bfloat16 does not reach
    torch.backends.cuda.enable_cudnn_sdp(False)         # it plans anew for each of thousands of shapes
    out, device, result = Path(c.out), torch.device(c.device), {}
    require(rank > 0 or mode == "resume" or all(file.suffix == ".tmp" for file in out.glob("*")),
            f"--out {out}: is not empty; name another folder, or go on with a run in it: --resume {out}")
    names, pairs, heldout = (state["names"], None, None) if mode == "eval" else load_data(c, device)
    model = Transformer(Config(
        n_task=len(names), d_model=c.d_model, n_head=c.n_head, n_layer=c.n_layer, dense=c.dense,
        ffn_factor=c.ffn_factor if c.ffn else 0, dropout=c.dropout, dtype=c.dtype)).to(device)
    require(mode == "eval" or len(pairs) >= world, f"{c.data}: fewer pairs than the {world} processes")
    optimizer = torch.optim.AdamW(model.parameter_groups(c.weight_decay), c.lr, betas=(0.9, 0.95), fused=True)
    if state:
        require(state["names"] == names, f"{c.data} {c.extra}: other tasks than those of the checkpoint")
        with blame("the checkpoint is of another shape"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    out.mkdir(parents=True, exist_ok=True)
    if mode != "eval":
        budget = f"{c.steps} steps" if c.steps else f"{c.minutes:g} minutes"
        print(f"{c.arm} on {c.device}{f' x {world}' * (world > 1)}: D={c.d_model} H={c.n_head} L={c.n_layer}"
              f", {model.n_params() / 1e6:.2f} M parameters, {c.dtype}{', compiled' * c.compile}; "
              f"{len(pairs)} pairs of at most {c.max_tokens} tokens, {budget}, {c.batch_tokens} tokens a step"
              f"; into {out}")
        state = state or {"config": asdict(c), "names": names, "step": 0, "seconds": 0.0, "log": 0}
        result = train(c, model, optimizer, pairs, heldout, state, rank, world)
        if not result:
            return
    elif rank == 0:
        save(out / "config.json", asdict(c) | {"command": argv})
    if c.score or mode == "eval":
        result |= solve(c, model, names, rank, world)
    if rank == 0:
        save(out / "result.json", result)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as fault:              # OSError names its file: missing or unreadable
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
