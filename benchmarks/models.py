"""Every architecture of transformers: which linears are found, and whether the swapped model is the dense one.

    python benchmarks/models.py --results models.jsonl          # all; run again, it goes on where it was
    python benchmarks/models.py --results models.jsonl --only bert llama
    python benchmarks/models.py --results models.jsonl --markdown docs/models.md

Each architecture is made tiny (`tiny_models`), fed (`tiny_inputs`) and tried by processes of its own, so that none ends
the others. Of one that does not run whole, the largest of its models that does is compared.

- found: of the linears that are feed-forward by name and sizes (`ffn_linears`), how many the plan makes phantom;
- one process: at full width, outputs and every gradient are the dense model's on the whole batch, in float64;
- two ranks: likewise with a half of the batch each, against the dense model on one half after the other.

The gradients of L, C and D are held to the dense weight's, by the chain rule. What is not equal is printed, and the
exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import transformers
from ffn_linears import ffn_linears
from in_float64 import InFloat64
from tiny_inputs import Feed, tensors_in
from tiny_models import ATTEMPTS, architectures, class_of, make
from torch import Tensor, nn

from lightning_phantom import PhantomConfig, phantomize_, plan_phantom
from lightning_phantom.layers.split import sharded_parameters, split_layers

BATCH, TOLERANCE = 4, 1e-8
NARROW = PhantomConfig(2, phantom_width=1)
HALVES = slice(0, BATCH // 2), slice(BATCH // 2, BATCH)


# One architecture


class Runs:
    """A dense model that runs: its inputs, and its outputs on the whole batch and on each half."""

    def __init__(self, dense: nn.Module) -> None:
        self.dense = dense
        self.feed = Feed(copy.deepcopy(dense), BATCH)
        self.models = [copy.deepcopy(dense) for _ in range(4)]  # a copy each: some keep what they have computed
        parts = slice(0, BATCH), *HALVES, HALVES[1]
        outputs = [outputs_of(model, self.feed(part)) for model, part in zip(self.models, parts, strict=True)]
        self.whole, *self.apart, again = outputs
        if not any(x.requires_grad for x in self.whole):
            raise ValueError("no output has a gradient")
        if not all(map(same, again, self.apart[1])):
            raise ArithmeticError("it gives two outputs for one input")
        # Outputs in which a sample depends on the others of its batch are compared, but have no part in the loss.
        joined = [torch.cat(p) if all(x.dim() for x in p) else p[0] for p in zip(*self.apart, strict=True)]
        graded = [n for n, x in enumerate(self.whole) if x.requires_grad]
        alone = [n for n in graded if self.whole[n].dim() and same(self.whole[n], joined[n])]
        self.coupled, self.in_loss = not alone, alone or graded


def examine(name: str, folder: str) -> dict[str, Any]:
    """What there is to say of an architecture: of the first of its sizes, or the largest of its parts, that runs."""
    torch.set_default_dtype(torch.float64)
    found: dict[str, Any] = {"name": name, "class": class_of(name)}
    errors: dict[str, Exception] = {}
    built: list[nn.Module] = []
    for attempt in ATTEMPTS:
        try:
            built.append(make(name, attempt))
            found = found if len(built) > 1 else found | what_is_found(built[0])
            if not found["found"] + found["others"]:
                return found
            runs = Runs(built[-1])
        except Exception as error:
            errors.setdefault("not_run" if built else "not_built", error)
        else:
            return found | compared(runs, folder)
    for path, part in (each for model in built for each in parts_of(model)):
        with contextlib.suppress(Exception):
            return found | {"part": path} | compared(Runs(part), folder)
    key = "not_run" if built else "not_built"
    return found | {key: _words(errors[key])}


def what_is_found(dense: nn.Module) -> dict[str, Any]:
    """Which linears are feed-forward, and what the plan makes of them."""
    wanted, plan = ffn_linears(dense), plan_phantom(dense, NARROW)
    swapped = {layer.name for layer in plan.swapped}
    return {
        "wanted": len(wanted),
        "found": len(swapped & set(wanted)),
        "others": len(swapped - set(wanted)),
        "missed": {layer.name: layer.reason for layer in plan.layers if layer.name in wanted and not layer.swapped},
    }


def parts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The models inside a model, those with most feed-forward linears first."""
    inside = [(n, m) for n, m in model.named_modules() if n and isinstance(m, transformers.PreTrainedModel)]
    return sorted(((n, m) for n, m in inside if ffn_linears(m)), key=lambda each: -len(ffn_linears(each[1])))


def compared(runs: Runs, folder: str) -> dict[str, Any]:
    """In one process and on two ranks; the second is a process that parts from this one before any backward."""
    swapped = [layer.name for layer in plan_phantom(runs.dense, NARROW).swapped]
    config = PhantomConfig(2, phantom_width=1.0, plan=dict.fromkeys(swapped, "phantom"))
    second = os.fork()
    if not second:
        _leave(lambda: {"two": on_two_ranks(runs, config, 1, folder)}, f"{folder}/second")
    loss_of(runs.whole, runs.in_loss).backward()
    mine = phantomize_(copy.deepcopy(runs.dense), config)
    outputs = outputs_of(mine, runs.feed(slice(0, BATCH)))
    loss_of(outputs, runs.in_loss).backward()
    one = differences(mine, runs.whole, outputs, gradients(runs.models[0]))
    two = on_two_ranks(runs, config, 0, folder)
    os.waitpid(second, 0)
    other = json.loads(Path(f"{folder}/second").read_text())
    found = {"coupled": runs.coupled, "one": one, "two": sorted({*two, *other.get("two", [])})}
    return found | {k: v for k, v in other.items() if k == "crashed"}


def on_two_ranks(runs: Runs, config: PhantomConfig, rank: int, folder: str) -> list[str]:
    """What differs where each of two ranks has half of the batch."""
    for outputs in runs.apart:
        (loss_of(outputs, runs.in_loss) / 2).backward()
    expected = total_of(*map(gradients, runs.models[1:3]))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mine = phantomize_(runs.dense, config, dist.group.WORLD)
    outputs = outputs_of(mine, runs.feed(HALVES[rank]))
    loss_of(outputs, runs.in_loss).backward()
    wrong = differences(mine, runs.apart[rank], outputs, expected)
    dist.barrier()
    return wrong


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The floating point tensors that a model returns, in order."""
    torch.manual_seed(0)
    random.seed(0)
    with InFloat64():
        return list(tensors_in(model(**inputs)))


def loss_of(outputs: list[Tensor], which: list[int]) -> Tensor:
    """A sum over the batch in which no output of a sample counts like another, and every sample like the others."""
    total = outputs[which[0]].new_zeros(())
    for n in which:
        x = outputs[n]
        each = x[:1].numel() if x.dim() else 1
        total = total + (x.reshape(-1, each) * torch.arange(each).sin()).sum()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def total_of(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: y if x is None else x if y is None else x + y
        for (name, x), y in zip(one.items(), other.values(), strict=True)
    }


def same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= TOLERANCE * max(1, y.abs().max())) if x.numel() else True


@torch.no_grad()
def differences(
    mine: nn.Module, whole: list[Tensor], outputs: list[Tensor], expected: dict[str, Tensor | None]
) -> list[str]:
    """What of the outputs and the gradients of `mine`, of all ranks together, is not the dense model's."""
    wrong = [f"output {n}" for n, (x, y) in enumerate(zip(outputs, whole, strict=True)) if not same(x, y)]
    splits, layers = sharded_parameters(mine), split_layers(mine)
    for name, parameter in mine.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in layers and kind != "bias":
            wanted = pulled_back(layers[owner], kind, expected[f"{owner}.weight"])
        elif owner in layers and expected[name] is not None:
            wanted = layers[owner].by_block(expected[name])
        else:
            wanted = expected[name]
        got = parameter.grad
        lacks = torch.tensor(float(got is None))
        if dist.is_initialized():
            dist.all_reduce(lacks)
            got = torch.zeros_like(parameter) if got is None else got
            if id(parameter) in splits:
                got = splits[id(parameter)].gather(got)
            else:
                dist.all_reduce(got)
                got = got / 2
            got = None if lacks == 2 else got
        if got is None and wanted is not None and not wanted.any():
            continue
        if (got is None) != (wanted is None) or (got is not None and wanted is not None and not same(got, wanted)):
            wrong.append(name)
    return wrong


def pulled_back(layer: Any, kind: str, grad: Tensor | None) -> Tensor | None:
    """The gradient of L, C or D that the dense weight's gradient [out, in] implies: W_ii = L_i, W_ij = D_ij C_j."""
    c, d = layer.global_tensor("compressor_weight"), layer.global_tensor("decompressor_weight")
    if grad is None:
        return None
    p = layer.num_blocks
    grad = grad if grad.shape == (layer.out_features, layer.in_features) and not _turned(layer) else grad.T
    grad = layer.by_block(grad)
    blocks = [row.chunk(p, 1) for row in grad.chunk(p, 0)]
    if kind == "weight":
        return torch.cat([blocks[i][i] for i in range(p)])
    cs = c.chunk(p, 0)
    ds = [
        dict(zip((j for j in range(p) if j != i), row.chunk(p - 1, 1), strict=True))
        for i, row in enumerate(d.chunk(p, 0))
    ]
    if kind == "compressor_weight":
        return torch.cat([sum(ds[i][j].T @ blocks[i][j] for i in range(p) if i != j) for j in range(p)])
    return torch.cat([torch.cat([blocks[i][j] @ cs[j].T for j in range(p) if j != i], 1) for i in range(p)])


def _turned(layer: Any) -> bool:
    return layer.dense_class.__name__ == "Conv1D"


def _words(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = next(f for f in reversed(frames) if Path(f.filename).name != "in_float64.py")
    said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return f"{said} ({Path(where.filename).name}:{where.lineno})"


# All of them


class Trial:
    """An architecture that is being examined in a process of its own, until that has worked for too long."""

    def __init__(self, name: str, limit_s: int) -> None:
        self.name, self.limit_s, self.start = name, limit_s, time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        self.pid = os.fork()
        if not self.pid:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 1))
            _leave(lambda: examine(name, self.folder.name), f"{self.folder.name}/found")

    def result(self) -> dict[str, Any] | None:
        """What came out, once the process has ended or has been given up."""
        took, late = time.monotonic() - self.start, False
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if not ended and took < 10 * self.limit_s:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its second rank too
        if not ended:
            _, status = os.waitpid(self.pid, 0)
        file = Path(self.folder.name, "found")
        late = not file.exists() and os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        died = f"not within {self.limit_s} s of work" if late else f"its process died ({status})"
        found = json.loads(file.read_text()) if file.exists() else {"crashed": died}
        self.folder.cleanup()
        return {"name": self.name, "class": class_of(self.name), **found, "s": round(took, 1)}


def _leave(work: Callable[[], dict[str, Any]], path: str) -> NoReturn:
    """Do the work of a process that was parted off, write what it found, and end."""
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            found = work()
        except BaseException as error:
            found = {"crashed": _words(error)}
        Path(f"{path}.tmp").write_text(json.dumps(found))
        os.rename(f"{path}.tmp", path)
    finally:
        os._exit(0)


def verdict(found: dict[str, Any]) -> str:
    for key, word in (("not_built", "not built"), ("crashed", "crashed"), ("not_run", "not run")):
        if key in found:
            return f"{word}: {found[key]}"
    if "two" not in found:
        return "no linear to swap"
    wrong = [
        f"{where}: {', '.join(found[key][:3])}"
        for key, where in (("one", "one process"), ("two", "two ranks"))
        if found[key]
    ]
    of = " in a part" if "part" in found else ""
    said = f"WRONG{of} on {'; '.join(wrong)}" if wrong else f"equal{of}"
    return f"{said}: its `{found['part']}`" if of else said


def line_of(found: dict[str, Any]) -> str:
    return f"{found['name']:34} {found.get('found', '-'):>4} of {found.get('wanted', '-'):>4}  {verdict(found)}"


def score(results: list[dict[str, Any]]) -> str:
    wanted, got = (sum(r.get(key, 0) for r in results) for key in ("wanted", "found"))
    words = [verdict(r).split(":")[0].split(" on ")[0] for r in results]
    counts = ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))
    full = sum(r.get("wanted", 0) == r.get("found", -1) for r in results if r.get("wanted"))
    return (
        f"{got} of {wanted} feed-forward linears found ({got / max(wanted, 1):.1%}), all of them in {full} of "
        f"{sum(bool(r.get('wanted')) for r in results)} architectures that have any; of {len(results)}: {counts}"
    )


def table(results: list[dict[str, Any]]) -> str:
    """The results as a page of the documentation."""
    release = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    lines = [
        "# Models",
        "",
        f"Written by `benchmarks/models.py` with {release}. Every architecture that an Auto class makes",
        "a model of, tiny and from its default config. *Found* are the linears that the plan makes phantom, of those",
        "that are feed-forward by name and sizes, as the benchmark judges by itself. *Equal*: at full width outputs",
        "and every gradient are the dense model's in float64, in one process with the whole batch and on two ranks",
        "with a half each; *in a part*: the whole does not run here, but this model inside does. What was not built or",
        "not run says why: a package that is not installed, or other sizes or inputs than here.",
        "",
        score(results) + ".",
        "",
        "| architecture | class | found | at full width |",
        "|---|---|---|---|",
    ]
    for found in results:
        count = f"{found['found']} of {found['wanted']}" if "found" in found else "-"
        words = verdict(found).replace("|", "\\|").split("`")  # every second is code, where nothing else is markup
        words[::2] = [re.sub(r"[_*\[]", r"\\\g<0>", word).replace("<", "&lt;") for word in words[::2]]
        said = "`".join(words)
        lines.append(f"| `{found['name']}` | `{found['class']}` | {count} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help="one JSON line an architecture; what is there is not run again"
    )
    parser.add_argument("--only", nargs="*", help="model types (default: all)")
    parser.add_argument("--limit-s", type=int, default=60, help="seconds of work for one (default: 60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: one a core)")
    parser.add_argument("--markdown", type=Path, help="write the table there, of what the results hold")
    args = parser.parse_args()
    done = (
        {r["name"]: r for r in map(json.loads, args.results.read_text().splitlines())} if args.results.exists() else {}
    )
    names = args.only if args.only is not None else architectures()
    if args.markdown is None:
        torch.set_num_threads(1)
        for common in ("llama", "t5", "vit", "wav2vec2"):  # what most import is there before the processes part
            make(common)
        waiting, trials = [name for name in names if name not in done], []
        while waiting or trials:
            while waiting and len(trials) < args.jobs:
                trials.append(Trial(waiting.pop(0), args.limit_s))
            time.sleep(0.01)
            for trial in list(trials):
                if found := trial.result():
                    trials.remove(trial)
                    done[trial.name] = found
                    with args.results.open("a") as file:
                        print(json.dumps(found), file=file)
                    print(f"{len(names) - len(waiting) - len(trials):3}/{len(names)} {line_of(found)}", flush=True)
    results = [done[name] for name in names if name in done]
    print(score(results))
    if args.markdown:
        args.markdown.write_text(table(results))
    raise SystemExit(any(verdict(r).startswith("WRONG") for r in results))


if __name__ == "__main__":
    main()
