"""Train a DynSIHA transformer on ARC, then score it.

    python train_arc.py --no-ffn                 attention only, on this machine's GPU or CPU
    python train_arc.py                          with the MoIE FFN; --dense is the standard transformer
    python train_arc.py --help                   every flag; --resume, --eval and --compare among them
    torchrun --standalone --nproc_per_node=8 train_arc.py --no-ffn

The recipe: one demonstration pair is one sequence; a learned embedding per task says which rule applies.
Training sees the demonstrations of every task, the evaluation tasks' too, and never a test output of the
evaluation split: `solve` alone uses these, after the last answer. The training split's test pairs are trained
on, too, unless --heldout keeps them for tuning.

Read from the top: tasks -> batches -> answers -> flags -> files -> training -> comparison -> main.
Symbols   B batch, T tokens, c the values of the flags, as `parse` returns them.
"""

import argparse
import glob
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn     # before there is a process group, which it would keep alive beyond its end
from torch import nn
from tqdm import tqdm

from model import (INVERSE, MAX_OUTPUT, MAX_SIDE, N_VIEW, N_VOCAB, Config, InputError, Transformer, collate,
                   decode_grid, encode_grid, encode_views, evaluate, load_checkpoint, pair_tokens, pi_score,
                   restore, sample_losses, task_loss, train_routing, view_grid)
from spl import Muon, can_compile, orthogonalize


def refuse(fault):
    raise InputError(fault)


# ------------------------------------------------------------------------------------------ tasks
SPLITS = "training", "evaluation", "test"
Task = namedtuple("Task", "train test")    # demonstrations [(input, output)]; tests [(input, output or None)]


def read_grid(value):
    """A JSON value -> (h, w) uint8 grid."""
    rows = value if isinstance(value, list) else []
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(widths) != 1 or 0 in widths or max(widths | {len(rows)}) > MAX_SIDE:
        raise ValueError(f"{json.dumps(value)[:40]} is no grid; expected rows of one width, 1 to {MAX_SIDE} "
                         "each way")
    for cell in itertools.chain(*rows):
        if type(cell) is not int or not 0 <= cell <= 9:
            raise ValueError(f"a cell is {json.dumps(cell)[:20]}; expected an integer from 0 to 9")
    return np.array(rows, dtype=np.uint8)


def read_json(file, kind=dict, expected="an object"):
    """The JSON value in `file`, which must be of this kind."""
    try:
        value = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{file}: not JSON: {fault}") from None
    if not isinstance(value, kind):
        refuse(f"{file}: a {type(value).__name__}; expected {expected}")
    return value


def read_raw(folder, split):
    """{id: (file, task as JSON)} of one split: Kaggle's one file, or GitHub's folder with a file for each
    task. Task files without splits, a folder of them or a single one, are an evaluation split."""
    folder, tasks = Path(folder), {}
    if folder.is_file():
        return {folder.stem: (folder, read_json(folder))} if split == "evaluation" else {}
    challenges = folder / f"arc-agi_{split}_challenges.json"             # Kaggle's
    if challenges.exists():
        return {name: (challenges, raw) for name, raw in read_json(challenges).items()}
    has_splits = any(folder.glob("arc-agi_*")) or any((folder / name).is_dir() for name in SPLITS)
    if not has_splits and split != "evaluation":
        return {}
    root = folder / split if has_splits else folder
    for name in sorted(glob.glob("**/*.json", root_dir=root, recursive=True)):     # follows links, skips ".*"
        file = root / name
        if not has_splits and file.parent.name in SPLITS:
            refuse(f"{folder}: its tasks are in {file.parent.parent}; name that")
        if file.stem in tasks:
            refuse(f"{file}: task {file.stem} is in {tasks[file.stem][0]}, too")
        tasks[file.stem] = file, read_json(file)
    return tasks


def read_tasks(folder, split, solved=False):
    """{id: Task} of one split. Test outputs are read only if `solved`; one that is missing, null or [] is
    None."""
    tasks, solutions = {}, Path(folder, f"arc-agi_{split}_solutions.json")
    given = read_json(solutions) if solved and solutions.exists() else {}
    for name, (file, raw) in read_raw(folder, split).items():
        try:
            train = [(read_grid(pair["input"]), read_grid(pair["output"])) for pair in raw["train"]]
            inputs = [read_grid(pair["input"]) for pair in raw["test"]]
            if not train or not inputs:
                raise ValueError(f"{len(train)} train pairs and {len(inputs)} tests; expected one or more")
            outputs = [pair.get("output") for pair in raw["test"]] if solved else [None] * len(inputs)
            if given.get(name):
                file, outputs = solutions, given[name]
            if len(outputs) != len(inputs):
                raise ValueError(f"{len(outputs)} outputs for {len(inputs)} test inputs")
            outputs = [None if output in (None, []) else read_grid(output) for output in outputs]
            tasks[name] = Task(train, list(zip(inputs, outputs)))
        except (AttributeError, KeyError, TypeError, ValueError) as fault:
            no = "no " if isinstance(fault, KeyError) else ""
            raise InputError(f"{file}: task {name}: {no}{fault}") from None
    return tasks


def read_pairs(file):
    """[(input, output), ...] of one of RE-ARC's files."""
    pairs = read_json(file, list, "a list of pairs, as RE-ARC has them")
    try:
        return [(read_grid(pair["input"]), read_grid(pair["output"])) for pair in pairs]
    except (KeyError, TypeError, ValueError) as fault:
        raise InputError(f"{file}: {'no ' if isinstance(fault, KeyError) else ''}{fault}") from None


def key(grid):
    """Equal for equal grids, to look them up in a set."""
    return grid.shape, grid.tobytes()


def without_leaks(others, asked):
    """Those of the tasks `others` that share no id and no set of demonstrations with the `asked` ones, and
    show none of the inputs that these ask: ARC-1 and ARC-2 share tasks, some under different ids."""
    def demonstrations(task):
        return frozenset((key(x), key(y)) for x, y in task.train)

    asked_demonstrations = {demonstrations(task) for task in asked.values()}
    asked_inputs = {key(x) for task in asked.values() for x, _ in task.test}
    return {name: task for name, task in others.items()
            if name not in asked and demonstrations(task) not in asked_demonstrations
            and asked_inputs.isdisjoint(key(x) for x, _ in task.train + task.test)}


# ------------------------------------------------------------------------------------------ batches
# The colours that may be permuted; a Sample in each view; the pair is shown in one of `every` epochs.
Pair = namedtuple("Pair", "free views every", defaults=[1])


def free_colours(task, permute):
    """The colours to permute: 1 to 9 but for those that only outputs show ('mark with red' must stay red)."""
    inputs = {colour for x, _ in task.train + task.test for colour in x.flat}
    outputs = {colour for _, y in task.train for colour in y.flat}
    free = [colour for colour in range(1, 10) if colour in inputs or colour not in outputs]
    return free if permute else []


def colour_table(free, rng):
    """(N_VOCAB,) table of tokens that permutes the `free` colours; np.argsort of it is its inverse."""
    table = np.arange(N_VOCAB, dtype=np.uint8)
    table[free] = rng.permutation(free)
    return table


def split_by_budget(lengths, budget):
    """Lists of indices of similar lengths, ascending; each is within `budget` tokens when padded to its
    longest, or a single one."""
    parts = []
    for i in np.argsort(lengths, kind="stable"):
        if parts and (len(parts[-1]) + 1) * lengths[i] <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def batches(pairs, c, world=1):
    """Endless (epoch, samples): in an epoch each of its pairs once, in a fresh view and colouring, similar
    lengths together. Batch number n depends on data, seed, flags and number of processes, not on the
    model: every arm sees the same, and so does a resumed run."""
    for epoch in itertools.count():
        rng, samples = np.random.default_rng((c.seed, epoch)), []
        shown = [pair for n, pair in enumerate(pairs) if (n + epoch) % pair.every == 0]
        for i in rng.permutation(len(shown)):           # `split_by_budget` keeps the order of equal lengths
            sample = shown[i].views[rng.integers(N_VIEW)]
            table = colour_table(shown[i].free, rng)
            samples.append(sample._replace(tokens=table[sample.tokens]))
        parts = split_by_budget([len(sample.tokens) for sample in samples], c.batch_tokens)
        if len(parts) > 1 and len(parts[-1]) < max(2, world):       # every process needs a sample, and a
            rest = parts.pop()                                      # lone one would be compiled apart
            parts[-1] += rest
        for n in rng.permutation(len(parts)):
            yield epoch, [samples[i] for i in parts[n]]


def read_extra(path):
    """({id: Task}, {id: [(input, output), ...]}) of a folder or zip: tasks, as --data takes them, and
    generated pairs in RE-ARC's layout: tasks/ID.json, each a list of pairs."""
    if not zipfile.is_zipfile(path):
        return read_extra_folder(Path(path))
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            zipfile.ZipFile(path).extractall(unpacked)
            found = [file for name in ("arc-agi_*.json", *SPLITS) for file in Path(unpacked).rglob(name)]
            # A Mac's zip has a shadow of each file in __MACOSX; GitHub's tasks are two folders down.
            sets = {file.parent for file in found if "__MACOSX" not in file.parts}
            return read_extra_folder(min(sets, default=Path(unpacked)))
        except InputError as fault:                                 # names the zip, not where it was unpacked
            refuse(str(fault).replace(unpacked, str(path)))
        except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError) as fault:     # broken, or encrypted
            refuse(f"--extra {path}: cannot be unpacked: {fault}")


def read_extra_folder(folder):
    """The same, of a folder."""
    generated = {file.stem: read_pairs(file) for file in sorted(folder.rglob("tasks/[!.]*.json"))}
    tasks = {}
    if not generated:
        for split in SPLITS:
            tasks |= read_tasks(folder, split, solved=True)
    if not tasks and not generated:
        refuse(f"--extra {folder}: no tasks there; expected a folder or zip as --data takes it, or RE-ARC's")
    return tasks, generated


def read_asked(c):
    """{id: Task} of the split to answer, without outputs of tests."""
    if not Path(c.data).exists():
        refuse(f"--data {c.data}: no such file or folder")
    asked = read_tasks(c.data, c.split)
    if not asked:
        refuse(f"--data {c.data}: no arc-agi_{c.split}_challenges.json and no task in a folder {c.split}")
    return asked


def fits(x, y, c):
    """Whether the output is known and the pair short enough to train on."""
    return y is not None and pair_tokens(x, y) <= c.max_tokens


def load_data(c):
    """(ids of the tasks, pairs to train on, held-out samples). No output that is asked for is used.

    Under --heldout the tests of the training split are held out. Generated pairs would spoil those of their
    own tasks: if there are any, the tests of every second training task alone are held out, and it gets none.
    The pairs of tasks to answer, and of those with held-out tests, which stand for them, are shown in every
    epoch, the others' in every c.repeat-th: so no batch has one pair several times.
    """
    asked, training = read_asked(c), read_tasks(c.data, "training", solved=True)
    asked_inputs = {key(x) for task in asked.values() for x, _ in task.test}
    extras = [(path, *read_extra(path)) for path in c.extra]

    # The pairs of each task beside its demonstrations: its own tests, unless held out, and generated ones.
    other_pairs = {name: task.test for name, task in without_leaks(training, asked).items()}
    heldout_names = sorted(other_pairs) if c.heldout else []
    if any(generated for _, _, generated in extras):
        heldout_names = heldout_names[1::2]
    heldout_tests = {name: other_pairs.pop(name) for name in heldout_names}
    may_generate = set(other_pairs)
    always = asked | {name: training[name] for name in heldout_names}       # shown in every epoch
    tasks = training | asked
    for path, found, generated in extras:
        new = {name: task for name, task in without_leaks(found, always).items() if name not in tasks}
        grown = may_generate & generated.keys()
        print(f"{path}: {len(new)} new tasks of {len(found)}, generated pairs for {len(grown)} tasks of "
              f"{len(generated)}; the others are dropped")
        tasks |= new
        other_pairs |= {name: task.test for name, task in new.items()}
        other_pairs |= {name: other_pairs[name] + generated[name][:c.generated] for name in grown}

    names, pairs, heldout = [], [], []
    for name, task in tasks.items():
        n, free = len(names), free_colours(task, c.permute_colours)
        every = 1 if name in always else c.repeat
        # No other task shows an input that is asked for: a task of --data's training split may overlap one.
        shown = [Pair(free, encode_views(n, x, y), every) for x, y in task.train + other_pairs.get(name, [])
                 if fits(x, y, c) and (name in asked or key(x) not in asked_inputs)]
        if shown:
            names.append(name)
            pairs += shown                      # held-out ones are unturned, and in true colours
            heldout += [encode_views(n, x, y)[0] for x, y in heldout_tests.get(name, []) if fits(x, y, c)]
    if not any(pair.every == 1 for pair in pairs):
        refuse(f"--data {c.data}: no pair of at most {c.max_tokens} tokens; raise --max-tokens")
    return names, pairs, heldout


# ------------------------------------------------------------------------------------------ answers
RANK_TOKENS = 2**16                         # tokens of a ranking batch
FILLER = [[0]]                              # stands in a submission where there is no answer
# What a test input asks: the colours that may be permuted, and the prompt in each of the 8 views
Question = namedtuple("Question", "free prompts")


def decode_tokens(model):
    """Tokens of a decoding batch: on CUDA their keys and values fill a third of the memory that is free."""
    c = model.config
    if not model.head.weight.is_cuda:
        return 2**15
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free // 3 // (2 * c.n_layer * c.d_model * (2 if c.dtype == "bfloat16" else 4))


def propose(model, questions, c, rank):
    """{(task id, number of the test): Question} -> {the same: [output, ...]}: greedy, in 8 views times
    c.colour_votes colour tables, turned and coloured back, no two alike. The first table changes nothing."""
    device, jobs = model.head.weight.device, []
    for test, question in questions.items():
        rng = np.random.default_rng(c.seed)                         # anew: no question depends on another
        # Vote 0 keeps the colours; a task without colours to permute has that one alone.
        for vote in range(c.colour_votes if question.free else 1):
            table = colour_table(question.free if vote else [], rng)
            jobs += [(test, table, prompt._replace(tokens=table[prompt.tokens]))
                     for prompt in question.prompts]
    # A batch is as wide as its longest prompt and the longest output: prompts of similar lengths go together.
    # That output is bounded here by c.max_tokens, below by what the batch's shortest prompt leaves of them.
    bounds = [prompt.n_prompt + min(MAX_OUTPUT, c.max_tokens) for _, _, prompt in jobs]
    parts = split_by_budget(bounds, decode_tokens(model))
    proposed = {test: [] for test in questions}
    bar = tqdm(total=len(jobs), desc="decode", unit="grid", ascii=True, dynamic_ncols=True, disable=rank > 0)
    while parts:
        part = parts.pop()                                          # the longest first
        tokens, task, view, _ = collate([jobs[i][2] for i in part], device)
        n_prompt = torch.tensor([jobs[i][2].n_prompt for i in part], device=device)
        longest = min(MAX_OUTPUT, c.max_tokens - n_prompt.min().item())
        try:
            outputs = model.generate(tokens, n_prompt, task, view, longest).cpu().numpy()
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            parts += [part[:len(part) // 2], part[len(part) // 2:]]
            continue
        for i, output in zip(part, outputs):
            test, table, prompt = jobs[i]
            # Cut to its own bound, an output does not depend on the prompts beside it.
            rows = decode_grid(np.argsort(table)[output[:c.max_tokens - prompt.n_prompt]])
            if rows is not None:
                grid = view_grid(np.array(rows), INVERSE[prompt.view]).tolist()
                if grid not in proposed[test]:
                    proposed[test].append(grid)
        bar.update(len(part))
    bar.close()
    return proposed


def rank_outputs(model, questions, proposed, rank):
    """`proposed`, the likeliest output of each test first: by log-probability, the mean over the 8 views."""
    ranked = {}
    for test, grids in tqdm(proposed.items(), "rank", ascii=True, dynamic_ncols=True, disable=rank > 0):
        samples = []
        for grid, prompt in itertools.product(grids, questions[test].prompts):
            answer = encode_grid(view_grid(np.array(grid), prompt.view))
            samples.append(prompt._replace(tokens=np.append(prompt.tokens, answer)))
        loss = np.zeros(len(samples))
        for part in split_by_budget([len(sample.tokens) for sample in samples], RANK_TOKENS):
            batch = collate([samples[i] for i in part], model.head.weight.device)
            loss[part] = sample_losses(model, *batch).cpu()
        loss = loss.reshape(-1, N_VIEW).mean(1)                     # of each output, over its 8 views
        order = np.argsort(loss, kind="stable")
        ranked[test] = [grids[i] for i in order]
    return ranked


def write_submission(file, tasks, answers):
    """The two likeliest outputs of each test input, in Kaggle's form."""
    submission = {}
    for name, task in tasks.items():
        submission[name] = []
        for i in range(len(task.test)):
            first, second, *_ = answers.get((name, i), []) + [FILLER, FILLER]
            submission[name].append({"attempt_1": first, "attempt_2": second})
    save(file, submission)


def score(answers, tasks):
    """{pass@1, pass@2, solved, tasks}: the ARC Prize's mean over a task's outputs, then over tasks. Answers
    count, fillers do not; a test without an answer is wrong, one whose output is None is left out."""
    first, either = [], []
    for name, task in tasks.items():
        known = [(y.tolist(), answers.get((name, i), []))
                 for i, (_, y) in enumerate(task.test) if y is not None]
        if known:
            first.append(np.mean([y in attempts[:1] for y, attempts in known]))
            either.append(np.mean([y in attempts[:2] for y, attempts in known]))
    if not first:
        return {}
    return {"pass@1": float(np.mean(first)), "pass@2": float(np.mean(either)), "solved": either.count(1),
            "tasks": len(either)}


def draw(title, grid):
    """Prints a grid as rows of digits."""
    print(title, *(" ".join(map(str, row)) for row in grid), sep="\n")


def solve(c, model, names, rank=0, world=1):
    """Answers the test inputs of c.split, writes submission.json, scores it -> what result.json says of it"""
    model.eval()
    tasks, questions, shortest_output = read_asked(c), {}, np.zeros((1, 1))
    for n, name in enumerate(names):
        if name not in tasks:
            continue
        for i, (x, _) in enumerate(tasks[name].test):
            if fits(x, shortest_output, c):
                free = free_colours(tasks[name], c.permute_colours)
                questions[name, i] = Question(free, encode_views(n, x))
    mine = dict(list(questions.items())[rank::world])
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        answers = rank_outputs(model, mine, propose(model, mine, c, rank), rank)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, answers)
        answers = {test: grids for part in parts for test, grids in part.items()}
    if rank > 0:
        return {}
    file = Path(c.out, "submission.json")
    write_submission(file, tasks, answers)

    tasks = read_tasks(c.data, c.split, solved=True)                    # here alone, after the last answer
    for name, i in list(questions)[:c.show]:
        x, y = tasks[name].test[i]
        draw(f"{name} test {i}: input", x)
        for grid in answers[name, i][:2] or [[["none"]]]:
            verdict = "" if y is None else ", right" if grid == y.tolist() else ", wrong"
            draw("attempt" + verdict, grid)
        draw("output", [["unknown"]] if y is None else y)
    result, n_asked = score(answers, tasks), sum(len(task.test) for task in tasks.values())
    print(f"{len(questions)} of {n_asked} test inputs were short enough and of a task that the model was "
          f"trained on, {sum(map(bool, answers.values()))} got an answer; see {file}")
    if result:
        print("{}: pass@1 {pass@1:.2%}, pass@2 {pass@2:.2%} (mean over a task's test outputs, then over the "
              "{tasks} tasks), {solved} tasks solved whole".format(c.split, **result))
    else:
        print(f"{c.split}: no solutions in {c.data}, so the submission cannot be scored here")
    return result | {"tried": len(questions)}


# ------------------------------------------------------------------------------------------ flags
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
CPU = dict(
    d_model=128, n_head=2, n_layer=4, dropout=0.0, extra=[], repeat=16, minutes=10.0, max_tokens=150,
    batch_tokens=1536, lr=2.5e-3, muon_lr=1e-2, dtype="float32")
CUDA = dict(
    d_model=768, n_head=12, n_layer=10, dropout=0.1, extra=["data/arc-agi-2", "data/re-arc.zip"], repeat=3,
    minutes=20.0, max_tokens=1863, batch_tokens=2**15, lr=4e-3, muon_lr=4e-3, dtype="bfloat16")
# The same for the dense control, whose rates have been searched for by themselves.
CPU_DENSE = CPU | dict(ffn_factor=4, tied_gate=False, muon_lr=2.5e-3)
CUDA_DENSE = CUDA | dict(ffn_factor=4, tied_gate=False, lr=1e-3, muon_lr=1e-3)
PRESETS = {("cpu", False): CPU, ("cpu", True): CPU_DENSE, ("cuda", False): CUDA, ("cuda", True): CUDA_DENSE}
# The least value of each number; none may reach a billion.
LEAST = dict(ffn_factor=0, d_model=2, n_head=1, n_layer=1, dropout=0, repeat=1, colour_votes=1, show=0,
             seed=0, minutes=0.01, steps=0, max_tokens=5, batch_tokens=5, lr=1e-7, muon_lr=0, generated=0)
# The flags that shape a model
SHAPE = "d_model", "n_head", "n_layer", "ffn_factor", "moie_norm", "tied_gate", "dense"


def flag_parser():
    """A line a flag, with its default or, from CPU or CUDA, this machine's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, add, switch = refuse, parser.add_argument, argparse.BooleanOptionalAction
    begin = parser.add_mutually_exclusive_group().add_argument
    begin("--resume", metavar="DIR", help="go on with the run in DIR, under its flags; one given anew counts")
    begin("--eval", metavar="DIR", help="answer and score with that run's checkpoint, likewise")
    begin("--init", metavar="DIR", help="begin with the weights of that run, for tasks that it has not seen")
    add("--compare", metavar="DIR", nargs="+", help="print a table of finished runs")
    # model
    ffn = parser.add_mutually_exclusive_group().add_argument
    ffn("--ffn-factor", type=int, default=1, help="hidden width of the FFN over D; 4 under --dense")
    ffn("--no-ffn", dest="ffn_factor", action="store_const", const=0, help="leave it out, as --ffn-factor 0")
    add("--moie-norm", action="store_true", help="normalize the input of the FFN's second SPL")
    add("--tied-gate", action=switch, default=True, help="W_g = -W_p in every SPL: two products, not three")
    add("--dense", action="store_true", help="the control: nn.Linear for SPL, a GELU FFN unless --no-ffn")
    add("--d-model", type=int, help="width D")
    add("--n-head", type=int, help="heads H")
    add("--n-layer", type=int, help="layers L")
    add("--dropout", type=float, help="dropout on each branch, in training")
    # data and answers
    add("--data", default="data/arc-agi-1", help="a folder as Kaggle or GitHub has it, or one task's file")
    add("--extra", nargs="*", help="folders or zips of more tasks or, as RE-ARC has them, pairs")
    add("--generated", type=int, default=60, help="pairs to take from RE-ARC for each task, at most")
    add("--split", choices=SPLITS[1:], default="evaluation", help="split to answer")
    add("--heldout", action=switch, default=False, help="hold out the training split's test pairs")
    add("--permute-colours", action=switch, default=True, help="permute the colours of a task")
    add("--repeat", type=int, help="how much more often than others the tasks to answer are shown")
    add("--score", action=switch, default=True, help="answer and score the split at the end")
    add("--colour-votes", type=int, default=4, help="colour tables under which each of 8 views answers")
    add("--show", type=int, default=0, help="test inputs to draw with their answers")
    add("--out", help="folder of this run, a new one; by default in runs/")
    # training
    add("--seed", type=int, default=0, help="seed of weights, order, views and colours")
    add("--minutes", type=float, help="training budget; scoring comes on top")
    add("--steps", type=int, default=0, help="training budget in steps, in place of minutes")
    add("--max-tokens", type=int, help="longest pair to train on; longer test pairs count as wrong")
    add("--batch-tokens", type=int, help="tokens per batch over all processes, padding included")
    add("--lr", type=float, help="peak learning rate of AdamW; under --dense some are others")
    add("--muon-lr", type=float, help="that of Muon, for the linear maps; 0: AdamW for all")
    add("--sars", action="store_true", help="train W_p and W_g by the routing loss of SARS alone")
    # machine
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products; bfloat16 by autocast")
    add("--compile", action=switch, default=True, help="torch.compile the blocks, where that works")
    parser.set_defaults(**(CUDA if DEVICES[0] == "cuda" else CPU))
    return parser


def check(c, saved, world):
    """Refuses flags that are out of range or do not go together."""
    for name, least in LEAST.items():
        if not least <= getattr(c, name) < 1e9:                     # nan is refused as well
            refuse(f"--{name.replace('_', '-')} {getattr(c, name)}: expected {least} or more, below 1e9")
    if c.device not in DEVICES:
        refuse(f"--device {c.device}: expected one of {DEVICES}")
    if c.dropout >= 1:
        refuse(f"--dropout {c.dropout}: expected less than 1")
    if c.d_model % (2 * c.n_head):
        refuse(f"--d-model {c.d_model}: expected a multiple of {2 * c.n_head}, twice --n-head")
    if not c.eval and c.batch_tokens < world * c.max_tokens:
        refuse(f"--batch-tokens {c.batch_tokens}: expected --max-tokens {c.max_tokens} for each of {world}")
    if c.dense and (c.sars or c.tied_gate or c.moie_norm):
        refuse("--dense: has no SPLs; leave out --sars, --tied-gate and --moie-norm")
    if c.moie_norm and not c.ffn_factor:
        refuse("--moie-norm --no-ffn: there is no FFN to normalize; leave out one of the two")
    if c.sars and world > 1 and not c.eval:
        refuse("--sars: needs one process; leave out torchrun")
    if c.resume and bool(c.muon_lr) != bool(saved.get("muon_lr")):
        refuse(f"--muon-lr {c.muon_lr}: the run has {saved.get('muon_lr')}; Muon cannot be taken up or left")
    if c.resume and c.out:
        refuse("--resume: a run stays in its folder; leave out --out")
    for name in (*SHAPE, "sars"):
        if name in saved and getattr(c, name) != saved[name]:
            refuse(f"--{name.replace('_', '-')} {getattr(c, name)}: the checkpoint's model has {saved[name]}")


def parse(argv, saved={}):
    """The flags' values: given in `argv`, else `saved` by an earlier run, else what suits the device."""
    parser = flag_parser()              # A value in the namespace replaces a default, a flag replaces both.
    # Parsed twice: first for the device, --dense and whether --minutes is given, which decide the defaults.
    given = parser.parse_args(argv, argparse.Namespace(**saved | {"minutes": None}))
    values = PRESETS[given.device, given.dense] | saved
    if given.minutes is not None:
        values["steps"] = 0                 # a new budget takes the place of saved steps
    c = parser.parse_args(argv, argparse.Namespace(**values))
    check(c, saved, int(os.environ.get("WORLD_SIZE", 1)))
    c.arm = "ffn" if c.ffn_factor else "no-ffn"
    if c.dense:
        c.arm = "dense" if c.ffn_factor else "dense-no-ffn"
    return c


# ------------------------------------------------------------------------------------------ files of a run
def save(path, value):
    """Atomic: to a temporary file, flushed to the disk, then renamed. Tensors go into a .pt file, a list of
    dicts into a .csv file with the columns of the first (in a log's first line there are all, since every run
    looks at the model there), everything else into JSON."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".pt":
                torch.save(value, file)
            elif path.suffix == ".csv":
                rows = [value[0].keys()] + [[str(row.get(name, "")) for name in value[0]] for row in value]
                file.writelines(f"{','.join(row)}\n".encode() for row in rows)
            else:
                file.write(json.dumps(value, indent=1, allow_nan=False).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as fault:                        # RuntimeError is torch.save's
        refuse(f"{path}: cannot be written: {str(fault).splitlines()[0]}")
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(c, model, optimizers, state):
    tensors = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    save(Path(c.out, "checkpoint.pt"), state | tensors)


# ------------------------------------------------------------------------------------------ training
LOG_EVERY, SAVE_MINUTES = 50, 5.0           # steps; minutes
LOOK_EVERY = 0.04                           # share of the budget between two looks at the model
WARMUP, DECAY = 0.02, 0.5                   # shares of the budget
CLIP, WEIGHT_DECAY = 1.0, 0.1               # the largest gradient norm; the decay of the blocks' matrices
# These end training after the step. Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def make_optimizers(c, model, compiled):
    """[AdamW] or, with --muon-lr, [AdamW, Muon for the linear maps]. The blocks' matrices decay; embeddings,
    head and vectors do not."""
    matrices = dict.fromkeys(p for p in model.blocks.parameters() if p.ndim == 2)   # a set that keeps order
    by_adamw = set(model.routing_weights()) if c.muon_lr else set(matrices)
    by_muon = [p for p in matrices if p not in by_adamw]
    groups = [{"params": [p for p in matrices if p in by_adamw], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in model.parameters() if p not in matrices], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, c.lr, betas=(0.9, 0.95), fused=True)]
    if by_muon:
        orthogonal = torch.compile(orthogonalize) if compiled else orthogonalize
        shapes = dict.fromkeys(p.shape for p in by_muon)                    # each once, in their order
        stacks = [{"params": [p for p in by_muon if p.shape == shape]} for shape in shapes]
        optimizers.append(Muon(stacks, c.muon_lr, WEIGHT_DECAY, orthogonal))
    return optimizers


def compile_blocks(c, model, pairs, rank, world):
    """Compiles in place and warms up, before the clock starts; the layers share one compiled block."""
    for module in model.spls().values() if c.sars else model.blocks:    # SARS must see into the blocks
        module.forward = torch.compile(module.forward, dynamic=True)
    warm = 64 if c.device == "cuda" else 1      # about an epoch: CUDA compiles anew for small batches
    for _, batch in itertools.islice(batches(pairs, c, world), warm):
        task_loss(model, *collate(batch[rank::world], c.device)).backward()
    model.zero_grad()


@contextmanager
def signals_heard():
    """While open, signals that would end Python are kept in the list that this yields."""
    stop = []
    # A signal that was ignored when the run began, as under nohup, stays ignored.
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda came, _: stop.append(came)) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def progress(c, state, stop, world):
    """(share of the budget that is used, whether a signal came): those of rank 0, for all processes."""
    used = state["step"] / c.steps if c.steps else state["seconds"] / (60 * c.minutes)
    shared = torch.tensor([used, len(stop)], dtype=torch.float64)
    if world > 1:
        dist.broadcast(shared, 0)
    return shared[0].item(), shared[1].item() > 0


def monitored_batches(pairs, heldout, c):
    """("heldout", the batches of the held-out pairs) or, where there are none, ("trained", one batch of
    `pairs`): what the columns of the log begin with, and what the model is looked at with during training."""
    kind, samples = ("heldout", heldout) if heldout else ("trained", next(batches(pairs, c))[1])
    parts = split_by_budget([len(sample.tokens) for sample in samples], c.batch_tokens)
    return kind, [collate([samples[i] for i in part], c.device) for part in parts]


def train(c, model, optimizers, pairs, heldout, state, stop, rank, world):
    """Trains until the budget is used or a signal is in `stop` -> whether it was the budget. `state`, as
    save_checkpoint saves it, is kept up to date: step, seconds of training, log."""
    kind, monitored = monitored_batches(pairs, heldout, c)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    routing_weights = set(model.routing_weights()) if c.sars else set()     # these learn from another loss
    task_weights = [p for p in model.parameters() if p not in routing_weights]
    used, stopped = progress(c, state, stop, world)
    bar = tqdm(total=100, initial=int(100 * used), bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
               ascii=True, dynamic_ncols=True, disable=rank > 0)
    next_look, look, tokens = used, {}, 0                           # tokens since the last line of the log
    logged_at = saved_at = state["seconds"]
    begin = time.perf_counter() - state["seconds"]                  # the clock less this: seconds of training
    for epoch, batch in itertools.islice(batches(pairs, c, world), state["step"], None):
        if used >= 1 or stopped:
            break

        # ---- the step
        factor = min(1.0, used / WARMUP, (1 - used) / DECAY)        # up, constant, down to 0
        for optimizer, peak in zip(optimizers, (c.lr, c.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        torch.manual_seed((c.seed << 32) + state["step"] * world + rank)        # what dropout follows from
        *inputs, targets = collate(batch[rank::world], c.device)
        n_targets = sum(len(sample.tokens) - sample.n_prompt + 1 for sample in batch)
        watching = model.watch() if c.sars else nullcontext()
        with watching as seen:
            # The mean over the targets of all processes: DDP takes the mean of their gradients.
            loss = task_loss(net, *inputs, targets) * world / n_targets
        loss.backward()
        if c.sars:
            route_loss = train_routing(model, seen, targets, CLIP)
        norm = nn.utils.clip_grad_norm_(task_weights, CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # ----
        state["step"] += 1
        tokens += sum(len(sample.tokens) for sample in batch)
        state["seconds"] = time.perf_counter() - begin
        used, stopped = progress(c, state, stop, world)
        last = used >= 1 or stopped
        if not last and state["step"] % LOG_EVERY:
            continue

        # once in a while: log, look, save
        if not norm.isfinite():
            refuse(f"step {state['step']}: loss {loss.item():g}, gradient norm {norm.item():g}, learning "
                   f"rate {c.lr * factor:.2g}; a lower --lr may help; the last checkpoint is kept")
        if world > 1:
            dist.all_reduce(loss)
        state["seconds"] = time.perf_counter() - begin              # `isfinite` has waited for the GPU
        speed = tokens / (state["seconds"] - logged_at)
        row = {"step": state["step"], "epoch": epoch, "lr": c.lr * factor, "loss": loss.item() / world,
               "grad_norm": norm.item(), "seconds": state["seconds"], "tokens_per_s": speed}
        if c.sars:
            row["route_loss"] = route_loss.item()
        if rank == 0 and (last or used >= next_look):
            look = evaluate(model, monitored)
            row |= {f"{kind}_{name}": value for name, value in look.items()}
            row["pi"] = pi_score(look["loss"], look["entropy"], row["grad_norm"])
            next_look = used + LOOK_EVERY
        state["log"].append(row)
        if rank == 0:
            save(Path(c.out, "log.csv"), state["log"])
            if last or state["seconds"] - saved_at > 60 * SAVE_MINUTES:
                save_checkpoint(c, model, optimizers, state)
                saved_at = state["seconds"]
        mfu = model.mfu(speed / world, targets.shape[1])
        share = f", MFU {mfu:.0%}" if mfu else ""
        seen_loss = f", {kind} {look['loss']:.3f}" if look else ""
        bar.set_postfix_str(f"loss {row['loss']:.3f}{seen_loss}, {speed:.0f} tok/s{share}", refresh=False)
        bar.update(int(100 * min(1, used)) - bar.n)
        tokens, logged_at = 0, state["seconds"]
        begin = time.perf_counter() - state["seconds"]              # neither looking nor saving is training
    bar.close()
    if look:
        print("{} {} pairs: loss {loss:.4f}, {tokens:.1%} of tokens, {grids:.1%} of grids".format(
            sum(len(targets) for *_, targets in monitored), kind, **look))
    return not progress(c, state, stop, world)[1]           # a signal may have come during the last look


# ------------------------------------------------------------------------------------------ comparison
# Student's t, two-sided 95%, for 1 to 19 degrees of freedom; the last stands for more, a little too wide
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23,
       2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


def interval(gaps):
    """The mean of `gaps` +- half of its 95% interval, by Student's t; "-" for fewer than two."""
    if len(gaps) < 2:
        return "-"
    half = T95[min(len(gaps) - 1, len(T95)) - 1] * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    return f"{np.mean(gaps):+.4f} +- {half:.4f}"


def compare(folders):
    """Prints a Markdown table of finished runs: a column for each arm, which is a folder's name up to
    "-seed", mean +- standard deviation; of what is learned also the difference from the first arm, paired by
    seed."""
    arms = {}
    for folder in map(Path, folders):
        try:
            run = read_json(folder / "config.json") | read_json(folder / "result.json")
            log = np.genfromtxt(folder / "log.csv", delimiter=",", names=True, ndmin=1)
            run["looks"] = log[np.isfinite(log["heldout_loss"])]
            seed, _, _ = run["seed"], run["heldout_grids"], run["looks"][-1]        # they must be there
        except (OSError, ValueError, LookupError) as fault:
            refuse(f"{folder}: not a finished run with held-out pairs: {' '.join(str(fault).split())}")
        run["training loss"] = log["loss"][-math.ceil(len(log) / 10):].mean()          # over the last tenth
        runs = arms.setdefault(folder.name.split("-seed")[0], {})
        if seed in runs:
            refuse(f"{folder}: a second run of this arm with seed {seed}; expected one")
        runs[seed] = run
    every_run = [run for runs in arms.values() for run in runs.values()]
    seconds = min(run["looks"]["seconds"][-1] for run in every_run)
    target = max(run["looks"]["heldout_loss"][-1] for run in every_run)     # the worst, which all runs reach
    at, to = f"heldout_loss at {seconds:.0f} s", f"to {target:.3f}"
    for run in every_run:
        looks = run["looks"]
        run[at] = np.interp(seconds, looks["seconds"], looks["heldout_loss"])
        reached = looks[np.argmax(looks["heldout_loss"] <= target)]
        run["steps " + to], run["seconds " + to] = reached["step"], reached["seconds"]

    def print_row(name, cells):
        print("|", " | ".join([name, *cells]), "|")

    print_row("mean +- s.d.", [f"{arm}, n = {len(runs)}" for arm, runs in arms.items()])
    print_row("---", ["---"] * len(arms))
    first, *_ = arms
    learned = "heldout_loss", "heldout_grids", "training loss"
    for name in (*learned, "steps " + to, at, "seconds " + to, "pass@2", "parameters", "steps", "seconds"):
        cells, gaps = [], []
        for arm, runs in arms.items():
            values = [run[name] for run in runs.values() if name in run]
            spread = f" +- {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if values else "-")
            paired = [seed for seed in runs if name in learned and arm != first and seed in arms[first]]
            gaps.append([runs[seed][name] - arms[first][seed][name] for seed in paired])
        print_row(name, cells)
        if name in learned:
            print_row(f"minus {first}, paired by seed, 95%", map(interval, gaps))


# ------------------------------------------------------------------------------------------ main
def set_up(c):
    """The machine, the seed, and (rank, number) of this process among those that torchrun started."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if c.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_num_threads(1)                        # more would wake for each small copy, and spin on
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if c.device == "cuda" else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")              # one process speaks
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")          # TF32 where bfloat16 does not reach
    torch.backends.cuda.enable_cudnn_sdp(False)         # it plans anew for each of thousands of shapes
    return rank, world


def make_folder(c, argv, flags):
    """Makes the folder of a new run, which no other run can make, too, and writes config.json: the flags, and
    how the run was begun, at first and at each --resume."""
    kind = "eval" if c.eval else c.arm
    c.out = c.resume or c.out or time.strftime(f"runs/{kind}-seed{c.seed}-%Y%m%d-%H%M%S-{os.getpid()}")
    if not c.resume:
        try:
            Path(c.out).mkdir(parents=True)
        except FileExistsError:
            refuse(f"--out {c.out}: is there already; name another, or go on with it: --resume {c.out}")
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()
    file, begun = Path(c.out, "config.json"), {"command": argv, "git": git, "torch": torch.__version__}
    earlier = read_json(file).get("begun", []) if c.resume and file.exists() else []
    save(file, flags | {"out": c.out, "begun": [*earlier, begun]})


def read_start(given):
    """(checkpoint of the run that --resume, --eval or --init names, or None; the flags' values it brings)."""
    run = given.get("resume") or given.get("eval") or given.get("init")
    if not run:
        return None, {}
    checkpoint = load_checkpoint(run)
    if given.get("init"):
        return checkpoint, {name: checkpoint["shape"].get(name, False) for name in SHAPE} | {"extra": []}
    saved = checkpoint["flags"] | {"out": None, "init": None}
    if given.get("eval"):
        saved["device"] = DEVICES[0]                    # trained on another, perhaps
    return checkpoint, saved


def main(argv):
    given = vars(flag_parser().parse_args(argv))
    if given["compare"]:
        return compare(given["compare"])
    checkpoint, saved = read_start(given)               # the one that is named, if any, and its flags
    c = parse(argv, saved)
    rank, world = set_up(c)
    state = None if c.init else checkpoint              # of this run, if it has begun

    # the data, and the model of the checkpoint or a new one
    names, pairs, heldout = (state["names"], [], []) if c.eval else load_data(c)
    if c.eval and read_asked(c).keys().isdisjoint(names):
        refuse(f"--data {c.data}: no task that the model was trained on; --init answers new ones")
    known = set(names) & set(checkpoint["names"]) if c.init else None
    if known:
        refuse(f"--init {c.init}: trained on task {min(known)}, perhaps on its tests; expected new tasks")
    if not c.eval and sum(pair.every == 1 for pair in pairs) < world:
        refuse(f"--data {c.data}: fewer pairs in an epoch than the {world} processes")
    content = b"".join(b"%d " % pair.every + pair.views[0].tokens.tobytes() for pair in pairs)
    digest = hashlib.sha256(content).hexdigest()
    shape = {"n_task": len(names)} | {name: vars(c)[name] for name in SHAPE}
    state = state or {"names": names, "pairs": digest, "shape": shape, "step": 0, "seconds": 0.0, "log": []}
    model = Transformer(Config(**state["shape"], dropout=c.dropout, dtype=c.dtype)).to(c.device)
    compiled = c.compile and not c.eval and can_compile(c.device)
    optimizers = make_optimizers(c, model, compiled)
    if checkpoint:
        new = {"task.weight": model.task.weight} if c.init else {}      # its tasks are others
        restore(model, checkpoint["model"] | new, c.resume or c.eval or c.init)
    if c.resume:
        if (state["names"], state["pairs"]) != (names, digest):
            refuse(f"{c.data} {' '.join(c.extra)}: other pairs than those that the run was trained on")
        for optimizer, tensors in zip(optimizers, state["optimizers"]):
            restore(optimizer, tensors, c.resume)
    # Without result.json it is not over: killed after its last step, a run still has that file to write.
    over = c.resume and progress(c, state, [], world)[0] >= 1 and Path(c.resume, "result.json").exists()
    if over and not c.score:
        refuse(f"--resume {c.resume}: its budget is used up; expected more --minutes or --steps")
    state["flags"] = {name: value for name, value in vars(c).items()
                      if name not in ("resume", "eval", "compare")}
    if rank == 0:
        make_folder(c, argv, state["flags"])

    # training
    result = {}
    if not c.eval:
        budget = f"{c.steps} steps" if c.steps else f"{c.minutes:g} minutes"
        print(f"{c.arm} on {world} x {c.device}: D={c.d_model} H={c.n_head} L={c.n_layer}, {c.dtype}, "
              f"{model.n_params() / 1e6:.2f} M parameters; {len(pairs)} pairs of at most {c.max_tokens} "
              f"tokens, {budget}, {c.batch_tokens} tokens a step; into {c.out}")
        if rank == 0:
            save_checkpoint(c, model, optimizers, state)
            Path(c.out, "result.json").unlink(missing_ok=True)          # a run that goes on is not finished
        if compiled:
            compile_blocks(c, model, pairs, rank, world)
        with signals_heard() as stop:
            finished = train(c, model, optimizers, pairs, heldout, state, stop, rank, world)
        if not finished:
            print(f"stopped at step {state['step']}; go on with: python train_arc.py --resume {c.out}")
            return 130
        result = {"arm": c.arm, "parameters": model.n_params(), "steps": state["step"],
                  "seconds": state["seconds"], "flops_per_token": model.flops_per_token(c.max_tokens),
                  "training_gib": torch.cuda.max_memory_allocated() / 2**30}
        for row in state["log"]:                            # of several looks at the model the last counts
            result |= {name: value for name, value in row.items() if name.startswith(("heldout", "trained"))}
        if rank == 0:
            save(Path(c.out, "result.json"), result)        # before the answers, which may fail

    # answers
    if c.score or c.eval:
        result |= solve(c, model, names, rank, world)
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30          # 0 without a GPU
        if rank == 0:
            save(Path(c.out, "result.json"), result)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # for terminals that lack a letter of a path
    try:
        sys.exit(main(sys.argv[1:]))
    except (InputError, OSError) as fault:                  # OSError names its file: missing or unreadable
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: out of memory; in training a lower --batch-tokens helps", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
