"""The compare command: runs on real ranks, what it makes of them, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from programs import program
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from benchmarks.ffn import FeedForward, RandomVectors
from lightning_phantom.commands.cli import main
from lightning_phantom.commands.compare.command import Comparison, Job
from lightning_phantom.commands.compare.methods import SharedBatches, torch_plan
from lightning_phantom.commands.compare.options import parse
from lightning_phantom.commands.compare.report import summarise
from lightning_phantom.commands.compare.smaller import smaller_argument
from lightning_phantom.commands.compare.trial import Memory
from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost.count import estimate_cost
from lightning_phantom.cost.data_parallel import estimate_data_parallel
from lightning_phantom.cost.methods import EXACT, METHODS
from lightning_phantom.errors import PhantomError
from lightning_phantom.plan.finder import plan_phantom

ROOT = Path(__file__).parents[2]
CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  strategy:
    class_path: lightning_phantom.PhantomStrategy
    init_args: {phantom_width: 4}
model:
  class_path: benchmarks.ffn.FeedForward
  init_args: {width: 32, depth: 4}
data:
  class_path: benchmarks.ffn.RandomVectors
  init_args: {width: 32, samples: 16, batches: 2}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    return str(tmp_path / "run.yaml")


RATES = ["--flops", "1e11", "--bandwidth", "10", "--latency", "1e-5"]


def two_ranks(folder):
    (folder / "run.yaml").write_text(CONFIG)
    command = ["-m", "lightning_phantom", "compare", "--config", folder / "run.yaml", "--ranks", 2]
    options = ["--rounds", 2, "--steps", 3, "--warmup", 2, "--train-steps", 6, "--validate-every", 2]
    outputs = ["--json", folder / "c.json", "--plot", folder / "c.png"]
    own = ["--set", "phantom.model.lr=0.2", "--model.lr=0.05", "--tokens-per-sample", 7]
    out = program(*command, *options, *outputs, *own)
    plan = ["-m", "lightning_phantom", "plan", "--config", folder / "run.yaml", "--ranks", 2, "--tokens", 32, *RATES]
    program(*plan, "--json", folder / "plan.json")
    results = (json.loads((folder / name).read_text()) for name in ("c.json", "plan.json"))
    return out, *results, (folder / "c.png").read_bytes()


@pytest.mark.program.with_args(two_ranks)
def test_compare_on_two_ranks(outcome):
    """Every method in the same two processes: the exact ones agree, and what they take is what `plan` has counted."""
    out, result, planned, picture = outcome
    methods = result["methods"]
    assert list(methods) == list(METHODS)
    assert [(r["method"], r["round"]) for r in result["runs"]] == [(m, n) for n in (0, 1) for m in methods]  # in turn
    for method, figures in methods.items():
        assert [loss[0] for loss in figures["losses"]] == [2, 4, 6]
        assert len(figures["step_s"]["rounds"]) == 2
        assert figures["tokens_per_s"] == pytest.approx(7 * figures["samples_per_s"])
        assert figures["samples_per_s"] * figures["step_s"]["median"] == pytest.approx(2 * 16)  # the same for all
        assert f"{figures['val_loss']:.4f}" in out, method
    for method in EXACT:
        for mine, dense in zip(methods[method]["losses"], methods["ddp"]["losses"], strict=True):
            assert mine[2] == pytest.approx(dense[2], rel=2e-6)  # another order of batches: 1.5e-5
    assert methods["phantom"]["losses"] != methods["ddp"]["losses"] != methods["smaller"]["losses"]
    # The data need no gradient: the cost model's, without the entry's.
    expected = estimate_cost([(32, 32)] * 4, 2, 4, 2, 2 * 16, entry_needs_grad=False)
    for method, cost, averaged in (
        ("tensor_parallel", expected.tensor_parallel, 2 * 32 * 4),  # biases of row-parallel layers
        ("tensor_parallel_layerwise", expected.tensor_parallel_layerwise, 0),
        ("phantom", expected.phantom, 0),
    ):
        sent = cost.sent_bytes + averaged
        calls = cost.calls + (averaged > 0)
        assert (methods[method]["sent_bytes"], methods[method]["calls"]) == (sent, calls), method
        assert methods[method]["gradient_bytes"] == averaged
        assert methods[method]["weights"] == cost.weights
        assert methods[method]["flops"] == cost.flops
        assert methods[method]["waited_s"] > 0
    assert methods["tensor_parallel_torch"]["weights"] == expected.tensor_parallel.weights
    both = estimate_data_parallel([(32, 32)] * 4, 2, 2 * 16, entry_needs_grad=False)
    for method, cost in (("ddp", both.ddp), ("fsdp", both.fsdp)):
        for name in ("weights", "sent_bytes", "calls", "flops"):
            assert methods[method][name] == getattr(cost, name), (method, name)
        assert methods[method]["waited_s"] is None
    # Torch's ranks read whole batches and sum what leaves a pair: nothing at the entry, and no gradient of it.
    assert methods["tensor_parallel_torch"]["sent_bytes"] == 3 * (2 * 16 * 32 * 4)
    assert methods["tensor_parallel_torch"]["flops"] == expected.tensor_parallel.flops
    for method in EXACT:
        assert methods[method]["weights_in_all"] == 4 * (32 * 32 + 32)
    whole = estimate_cost([(32, 32)] * 4, 2, 4, 1, 32).phantom.weights
    assert methods["phantom"]["weights_in_all"] == whole
    assert abs(methods["smaller"]["weights"] - whole) < 0.1 * whole
    assert list(planned["here"]["methods"]) == list(METHODS)
    for method, counted in planned["here"]["methods"].items():
        for name in ("weights", "flops", "sent_bytes", "calls"):
            assert counted[name] == methods[method][name], (method, name)
    assert result["fastest"] in EXACT and result["ratios"][result["fastest"]]["step"]["median"] == 1
    assert result["environment"]["ranks"] == 2
    assert not any("learning rate" in warning for warning in result["warnings"])  # phantom was given its own
    assert picture.startswith(b"\x89PNG")


def alone(monkeypatch):
    """This process as a job of one rank; port 0 takes one that is free."""
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**given, "GROUP_RANK": "0", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, value)


def test_compare_under_an_outside_launcher_with_target_and_smaller(config, tmp_path, monkeypatch, capsys):
    alone(monkeypatch)
    monkeypatch.chdir(ROOT)
    (tmp_path / "small.yaml").write_text(CONFIG.replace("depth: 4", "depth: 1"))
    arguments = ["--methods", "tensor_parallel,phantom", "--smaller", str(tmp_path / "small.yaml"), "--num-blocks", "4"]
    lengths = ["--rounds", "1", "--steps", "2", "--warmup", "2", "--train-steps", "4", "--validate-every", "1"]
    main(
        [
            "compare",
            "--config",
            config,
            *arguments,
            *lengths,
            "--target-loss",
            "100",
            "--json",
            str(tmp_path / "c.json"),
        ]
    )
    result = json.loads((tmp_path / "c.json").read_text())
    assert list(result["methods"]) == ["tensor_parallel", "phantom", "smaller"]
    assert result["methods"]["smaller"]["weights"] == 32 * 32 + 32
    for method in result["methods"].values():
        assert method["to_target"]["steps"] == 1 and method["to_target"]["seconds"] > 0
        assert method["to_target"]["energy_flag"] is not None
        for name in ("flops", "sent_bytes"):
            assert method["to_target"][name] == method[name]  # of one step
    out = capsys.readouterr().out
    if {m["to_target"]["energy_flag"] for m in result["methods"].values()} == {"modelled"}:
        assert result["ratios"]["phantom"]["energy_to_target"] is None
        assert "Joules here are modelled, so no ratio of energies is given" in out
    assert "The learning rate was not tuned per method" in out
    assert "--smaller" not in out
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("named", "expected"), [("", 4), (", phantom_parallel_size: 2", 2)])
def test_all_ranks_of_all_hosts_hold_the_layers_unless_the_config_says_otherwise(tmp_path, named, expected):
    (tmp_path / "run.yaml").write_text(CONFIG.replace("phantom_width: 4", f"phantom_width: 4{named}"))
    request = parse(["--config", str(tmp_path / "run.yaml"), "--num-blocks", "4"])
    comparison = Comparison(request, Job(0, 4, 2, None))
    for method in ("phantom", "tensor_parallel"):
        settings, _ = comparison._settings(method, request.recipe(method))
        assert (settings["devices"], settings["num_nodes"], settings["strategy"]._size) == (2, 2, expected)


def test_later_configs_count_over_earlier_ones(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "width.yaml").write_text("trainer: {strategy: {init_args: {phantom_width: 2}}}")
    (tmp_path / "small.yaml").write_text("model: {init_args: {depth: 3}}")
    run, width, small = (str(tmp_path / f"{name}.yaml") for name in ("run", "width", "small"))
    request = parse(["--config", run, "--config", width, "--smaller", run, "--smaller", small])
    assert request.recipe("phantom").phantom_arguments()["phantom_width"] == 2
    for method, depth in (("phantom", 4), ("smaller", 3)):
        assert request.recipe(method).config.model.init_args.depth == depth


LM = """
model:
  class_path: examples.lm.LanguageModel
  init_args: {dim: 32, depth: 2, heads: 2, context: 16}
"""


def test_a_smaller_model_is_made_of_the_config_where_its_width_has_a_name(tmp_path):
    def argument(config, blocks=4, width=0.25):
        (tmp_path / "run.yaml").write_text(config)
        request = parse(["--config", str(tmp_path / "run.yaml")])
        name, value = smaller_argument(request.recipe("smaller"), PhantomConfig(blocks, width))
        module = request.recipe("smaller").make_module()
        plan = plan_phantom(module, PhantomConfig(blocks, width))
        phantom = sum(p.numel() for p in module.parameters())
        phantom -= sum(layer.weights_before - layer.weights_after for layer in plan.swapped)
        smaller = sum(p.numel() for p in request.recipe("smaller", f"model.{name}={value}").make_module().parameters())
        return name, smaller / phantom

    name, ratio = argument(LM)
    assert name == "width" and 0.9 <= ratio <= 1.1
    name, ratio = argument(CONFIG)
    assert name == "hidden" and 0.9 <= ratio <= 1.1
    nameless = CONFIG.replace("benchmarks.ffn.FeedForward", "test_compare.Nameless").replace(
        "{width: 32, depth: 4}", "{}"
    )
    with pytest.raises(PhantomError, match=r"no argument that names the width.*--smaller FILE"):
        argument(nameless)
    with pytest.raises(PhantomError, match=r"(?s)does not take some of the values of 'width'.*--smaller FILE"):
        argument(nameless.replace("Nameless", "Fixed"))


class Nameless(FeedForward):
    def __init__(self):
        super().__init__(32, 4)


class Fixed(FeedForward):
    def __init__(self, width: int = 32):
        if width != 32:
            raise ValueError("32, or nothing")
        super().__init__(width, 4)


def test_ddps_calls_are_of_the_buckets_that_it_has_rebuilt(config, tmp_path, monkeypatch):
    alone(monkeypatch)
    monkeypatch.chdir(ROOT)
    sizes = ["--model.width", "512", "--data.width", "512", "--json", str(tmp_path / "c.json")]
    main(["compare", "--config", config, *sizes, "--methods", "ddp", "--rounds", "1", "--steps", "1", "--warmup", "2"])
    calls = json.loads((tmp_path / "c.json").read_text())["methods"]["ddp"]["gradient_calls"]
    assert calls == estimate_data_parallel([(512, 512)] * 4, 2, 8).ddp.calls == 2  # 1 MB first, then 25


def test_a_method_that_fails_is_left_out_with_its_reason(tmp_path, monkeypatch, capsys):
    alone(monkeypatch)
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("benchmarks.ffn.FeedForward", "test_compare.Wide"))
    files = ["--config", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "c.json"), "--num-blocks", "2"]
    main(["compare", *files, "--methods", "smaller,phantom", "--rounds", "2", "--steps", "1", "--warmup", "2"])
    assert list(json.loads((tmp_path / "c.json").read_text())["methods"]) == ["phantom"]
    out = capsys.readouterr().out
    assert "Left out: smaller: it failed: RuntimeError('mat1 and mat2" in out and "its row is missing here" in out


def test_tensor_parallelism_is_left_out_where_it_divides_nothing(tmp_path, monkeypatch, capsys):
    alone(monkeypatch)
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("depth: 4", "depth: 1"))  # a linear alone
    files = ["--config", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "c.json")]
    methods = "ddp,tensor_parallel,tensor_parallel_layerwise,tensor_parallel_torch"
    main(["compare", *files, "--methods", methods, "--rounds", "1", "--steps", "1", "--warmup", "2"])
    assert list(json.loads((tmp_path / "c.json").read_text())["methods"]) == ["ddp"]
    out = capsys.readouterr().out
    for method in methods.split(",")[1:]:
        assert f"Left out: {method}: nothing in FeedForward qualifies for tensor parallelism." in out


class Wide(FeedForward):
    """Its input is as wide as its layers, and the data are not."""

    def __init__(self, width: int = 32, depth: int = 4):
        super().__init__(width, depth)


def test_memory_is_the_peak_of_what_came_after():
    held = torch.ones(30_000_000)  # 120 MB that were there before
    memory = Memory(torch.device("cpu"))
    if memory.peak_bytes() is None:
        pytest.skip("the system does not say")
    assert memory.peak_bytes() < 20e6
    torch.ones(25_000_000)
    assert 95e6 <= memory.peak_bytes() < 130e6  # although it is gone
    again = Memory(torch.device("cpu"))
    assert again.peak_bytes() < 20e6
    del held


def measured(step_s=1.0, **changes):
    figures = {"weights": 10, "steps_s": [step_s] * 3, "samples": 4, "sent_bytes": 8.0, "calls": 2.0, "waited_s": 0.1}
    figures |= {"gradient_bytes": 2.0, "gradient_calls": 1, "weights_in_all": 20, "flops": 5.0}
    return {**figures, "peak_bytes": 100, "losses": [(1, 1.0, 0.9), (2, 2.0, 0.5)], "energy": None, **changes}


def summary(config, runs, *arguments, **where):
    environment = {"ranks": 2, "hosts": 1, "threads_per_rank": 1, "cores": 2, **where}
    return summarise(parse(["--config", config, *arguments]), environment, runs, {})


def runs_of(**rounds):
    """Runs from `method=[step seconds of each round]`; two ranks, of which the second is the slower."""
    return [
        {"method": method, "round": n, "ranks": [measured(0.9 * s), measured(s)]}
        for method, seconds in rounds.items()
        for n, s in enumerate(seconds)
    ]


def test_ratios_are_over_the_fastest_that_trains_the_dense_model_round_by_round(config):
    result = summary(
        config,
        runs_of(tensor_parallel=[2.0, 4.0, 2.0], tensor_parallel_layerwise=[3.0, 3.0, 3.0], phantom=[1.0, 3.0, 1.5]),
    )
    assert result["fastest"] == "tensor_parallel"
    assert result["ratios"]["phantom"]["step"] == {"median": 0.75, "low": 0.5, "high": 0.75}
    assert result["methods"]["tensor_parallel_layerwise"]["step_s"]["median"] == 3.0  # the slowest rank's
    with_torch = summary(
        config, runs_of(tensor_parallel=[2.0], tensor_parallel_torch=[1.0], phantom=[0.5], smaller=[0.1])
    )
    assert with_torch["fastest"] == "tensor_parallel_torch"
    assert with_torch["ratios"]["phantom"]["step"]["median"] == 0.5
    assert with_torch["ratios"]["phantom"]["sent_bytes"] == 1.0
    assert result["methods"]["phantom"]["samples_per_s"] == pytest.approx(2 * 4 / 1.5)  # each rank reads its own
    assert with_torch["methods"]["tensor_parallel_torch"]["samples_per_s"] == pytest.approx(4)
    assert result["methods"]["phantom"]["sent_bytes"] == 8 and result["methods"]["phantom"]["gradient_bytes"] == 2
    assert summary(config, runs_of(ddp=[1.0], fsdp=[0.9], tensor_parallel=[2.0], phantom=[1.0]))["fastest"] == "fsdp"
    assert any("tensor_parallel, phantom differ" in warning for warning in result["warnings"])


def test_unfair_comparisons_are_called_so(config):
    plain = summary(config, runs_of(tensor_parallel=[1.0], phantom=[1.0]))["warnings"]
    assert any("learning rate was not tuned" in warning for warning in plain)
    assert any("fair control" in warning and "row is missing" in warning for warning in plain)
    assert not any("cores" in warning or "not quiet" in warning for warning in plain)
    tuned = summary(config, runs_of(tensor_parallel=[1.0], phantom=[1.0]), "--set", "phantom.model.lr=0.1")["warnings"]
    assert not any("learning rate" in warning for warning in tuned)
    crowded = summary(config, runs_of(ddp=[1.0]), ranks=4)["warnings"]
    assert any("more busy threads than cores" in warning for warning in crowded)
    silent = [{"method": "tensor_parallel", "round": 0, "ranks": [measured(losses=[])]}]
    assert any("--monitor" in warning for warning in summary(config, silent)["warnings"])


@pytest.mark.parametrize(("flag", "expected"), [("modelled", None), ("measured_counter", 0.5), ("unavailable", None)])
def test_only_measured_joules_are_divided(config, flag, expected):
    def run(method, joules):
        energy = {"steady_j_per_step": None if flag == "unavailable" else joules, "flag": flag}
        return {"method": method, "round": 0, "ranks": [measured(energy=energy)]}

    result = summary(config, [run("tensor_parallel", 4.0), run("phantom", 2.0)], "--target-loss", "0.6")
    assert result["methods"]["phantom"]["to_target"]["steps"] == 2
    assert result["ratios"]["phantom"]["energy_to_target"] == expected
    assert any("no ratio of energies" in w for w in result["warnings"]) == (expected is None)


def test_a_target_that_is_not_reached(config):
    result = summary(config, runs_of(tensor_parallel=[1.0], phantom=[1.0]), "--target-loss", "0.1")
    assert result["methods"]["phantom"]["to_target"]["steps"] is None
    assert result["ratios"]["phantom"]["seconds_to_target"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "ddp,zero"], "--methods 'zero': choose from ddp"),
        (["--smaller", "missing.yaml"], "missing.yaml is no file"),
        (["--rounds", "0"], "--rounds 0: needs at least 1"),
        (["--warmup", "1"], "--warmup 1: needs at least 2"),
        (["--train-steps", "4"], "more steps than --warmup 5"),
        (["--set", "phantom.model.lr"], "METHOD.KEY=VALUE"),
        (["--methods", "ddp", "--set", "phantom.model.lr=1"], "a method of this comparison"),
        (["--json", "missing/c.json"], "--json missing/c.json: there is no such folder"),
        (["--plot", "c.docx"], "ends in .png, .svg or .pdf"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(config, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config", config, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_torch_reads_what_ranks_with_batches_of_their_own_read_together(monkeypatch):
    data = torch.arange(24)

    def loader(replicas, rank, **settings):
        sampler = DistributedSampler(data, replicas, rank, shuffle=True, seed=5)
        return DataLoader(data, **{"batch_size": 4, "sampler": sampler, **settings})

    monkeypatch.setattr(SharedBatches, "world_size", 2)
    strategy = SharedBatches(1, 2)
    shared = strategy.process_dataloader(loader(1, 0, collate_fn=torch.tensor))
    own = [list(loader(2, rank)) for rank in range(2)]
    assert len(shared) == len(own[0]) == 3
    for batch, *parts in zip(shared, *own, strict=True):
        assert sorted(batch.tolist()) == sorted(torch.cat(parts).tolist())
    for unfit in (DataLoader(data, batch_size=4), loader(1, 0, batch_size=None), [1, 2]):
        with pytest.raises(PhantomError, match=r"its ranks read the same batches, and of a (DataLoader|list) none"):
            strategy.process_dataloader(unfit)


class Streamed(RandomVectors):
    def train_dataloader(self):
        class Stream(IterableDataset):
            def __iter__(stream):
                return iter(self.train)

        return DataLoader(Stream(), batch_size=self.samples)


def test_torch_is_left_out_where_its_batches_cannot_be_made(tmp_path, monkeypatch, capsys):
    alone(monkeypatch)
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("benchmarks.ffn.RandomVectors", "test_compare.Streamed"))
    files = ["--config", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "c.json")]
    main(
        ["compare", *files, "--methods", "tensor_parallel_torch,ddp", "--rounds", "2", "--steps", "1", "--warmup", "2"]
    )
    result = json.loads((tmp_path / "c.json").read_text())
    assert list(result["methods"]) == ["ddp"] and len(result["runs"]) == 2
    assert (
        "Left out: tensor_parallel_torch: its ranks read the same batches, and of a DataLoader none"
        in capsys.readouterr().out
    )


def test_torchs_styles():
    def styles(module):
        return {
            name: (type(style).__name__.removesuffix("Parallel"), *style.input_layouts, *style.output_layouts)
            for name, style in torch_plan(module, 2)[1].items()
        }

    sharded, whole = Shard(-1), Replicate()
    three = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    ends = {"1": ("Rowwise", sharded, whole), "2": ("Colwise", whole, whole)}
    assert styles(three) == {"0": ("Colwise", whole, sharded)} | ends
    normed = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    assert styles(normed) == {"0": ("Colwise", whole, whole), "2": ("Rowwise", whole, whole)}
    with pytest.raises(PhantomError, match="nothing in Sequential qualifies"):
        torch_plan(nn.Sequential(nn.LayerNorm(8)), 2)
    with pytest.raises(PhantomError, match="'d' may read what lies in two ways"):
        torch_plan(Tapped(), 2)


class Tapped(nn.Module):
    """One column-parallel layer's output is read outside, and another's is not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        a = self.a(x)
        return self.d(self.c(self.b(a))), a.softmax(-1)
