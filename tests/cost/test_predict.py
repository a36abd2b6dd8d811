"""The predicted step: its operations are the cost model's, and the plan command shows what it says."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import program
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_phantom.commands.cli import main
from lightning_phantom.commands.compare import options as compare
from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.commands.terminal import LABELS
from lightning_phantom.config import LATENTS, MIXINGS
from lightning_phantom.cost.collectives import Group, cuts
from lightning_phantom.cost.count import ELEMENT_BYTES, TENSOR_PARALLEL, estimate_cost
from lightning_phantom.cost.data_parallel import Dense, Divided, estimate_data_parallel
from lightning_phantom.cost.layer import Layer, as_layers
from lightning_phantom.cost.methods import EXACT, METHODS
from lightning_phantom.cost.predict import (
    Machine,
    Stage,
    Work,
    exact_stages,
    phantom_stages,
    predict,
    step_time,
)
from lightning_phantom.cost.scale import Setting, best, pays_from, stops_paying
from lightning_phantom.distributed import comm
from lightning_phantom.errors import PhantomError
from lightning_phantom.measure.machine import nonnegative_fit
from lightning_phantom.measure.simulate import FilledRanks, simulate

MACHINE = Machine(4e10, 1e10, 1e-5, 1e9, 1e-4)
CHAIN = [
    Layer(64, 128, enters=True, needs_input_grad=False),
    Layer(128, 256),
    Layer(128, 256, shares_input=True),
    Layer(256, 64, leaves=True),
    Layer(64, 64, enters=True, leaves=True, depth=3),  # behind a norm
]
CONFIG = """
trainer: {accelerator: cpu}
model:
  class_path: benchmarks.ffn.FeedForward
  init_args: {width: 64, depth: 3}
"""


@pytest.mark.parametrize(("p", "ranks"), [(4, 1), (4, 2), (8, 8)])
def test_stages_hold_the_work_and_the_bytes_of_the_cost_model(p, ranks):
    group, k, tokens, layers = Group(ranks, 96, 4), 2, 96, as_layers(CHAIN)
    stages = {
        "phantom": [s for layer in layers for s in phantom_stages(layer.with_width(k, p), p, group)],
        **{m: [s for each in cuts(CHAIN, m) for s in exact_stages(*each, group)] for m in TENSOR_PARALLEL},
    }
    estimate = estimate_cost(CHAIN, p, k, ranks, tokens)
    for method, those in stages.items():
        cost = getattr(estimate, method)
        assert sum(s.work.flops for s in those if s.backward) == cost.flops_backward
        assert sum(s.work.flops for s in those) == cost.flops
        assert sum(s.calls for s in those) == cost.calls
        assert sum(s.sent_bytes for s in those) == cost.sent_bytes
    for mixing, latents in itertools.product(MIXINGS, LATENTS):
        pairs = [(64, 64)] * 3
        cost = estimate_cost(pairs, p, k, ranks, tokens, mixing=mixing, latents=latents).phantom
        layers = as_layers(pairs, mixing=mixing, latents=latents)
        those = [s for layer in layers for s in phantom_stages(layer.with_width(k, p), p, group)]
        assert sum(s.work.flops for s in those if s.backward) == cost.flops_backward
        assert sum(s.work.flops for s in those) == cost.flops
        assert (sum(s.calls for s in those), sum(s.sent_bytes for s in those)) == (cost.calls, cost.sent_bytes)


def test_a_collective_is_waited_for_only_beyond_the_work_beside_it():
    machine = Machine(100.0, float("inf"), 0.0, 10.0, 1.0)
    hidden = Stage(hidden_behind=Work(flops=400), sent_bytes=20, calls=1)  # takes 3 s, beside 4 s of work
    seen = Stage(hidden_behind=Work(flops=100), sent_bytes=20, calls=1)  # 2 s more than the 1 s beside it
    time = step_time([Stage(Work(flops=500)), hidden, seen], machine, 4)
    assert (time.compute_s, time.communication_s, time.waited_s, time.seconds) == (5.0, 6.0, 2.0, 7.0)
    half = step_time([hidden, seen], replace(machine, overlap=0.5), 4)
    assert half.waited_s == (3 - 1.5) + (3 - 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_hidden_and_what_is_waited_for(method):
    """With an infinite rate of products everything sent is waited for; with none, what cannot be hidden."""
    layers = [Layer(64, 64, enters=True), Layer(64, 64, leaves=True)]

    def waited(machine):
        return predict(layers, 4, 2, 2, 96, machine, smaller=Dense((Layer(64, 32),)))[method]

    slow, fast = (waited(Machine(rate, float("inf"), 0.0, 1e9, 0.0)) for rate in (1e-3, float("inf")))
    assert slow.communication_s == fast.communication_s == pytest.approx(fast.waited_s)
    exchange, gathered = 96 * 64 * 4 // 4 / 1e9, 96 * 64 * 4 // 2 / 1e9
    expected = {
        "ddp": 0.0,  # gradients, behind the backward
        "fsdp": 0.0,  # every layer behind its own products
        "tensor_parallel": gathered,  # the sum of the row-parallel layer
        "tensor_parallel_layerwise": 2 * exchange,  # the exit there and back
        "tensor_parallel_torch": 4 * gathered,  # two all-reduces
        "phantom": 4 * exchange,
        "smaller": 0.0,
    }
    assert slow.waited_s == pytest.approx(expected[method])


def test_predicted_times_follow_the_counts():
    compute_only = Machine(1e9, float("inf"), 0.0, float("inf"), 0.0)
    times = predict(CHAIN, 4, 2, 2, 96, compute_only)
    estimate = estimate_cost(CHAIN, 4, 2, 2, 96)
    assert list(times) == [method for method in METHODS if method != "smaller"]
    for method in (*TENSOR_PARALLEL, "phantom"):
        assert times[method].seconds == pytest.approx(getattr(estimate, method).flops / 1e9)
    for method in ("ddp", "fsdp"):
        assert times[method].seconds == pytest.approx(times["tensor_parallel"].seconds)  # half of the tokens each
    rest, small = Dense((Layer(64, 80),), 1000), Dense((Layer(64, 32),))
    rest_flops = estimate_data_parallel(rest.layers, 2, 96).ddp.flops
    whole = predict(CHAIN, 4, 2, 2, 96, compute_only, rest=rest, smaller=small)
    assert list(whole) == list(METHODS)
    assert whole.pop("smaller").seconds == pytest.approx(3 * 2 * 48 * 64 * 32 / 1e9)
    for method, time in whole.items():
        ranks = 2 if method == "tensor_parallel_torch" else 1  # each of which computes all of it
        assert time.seconds == pytest.approx(times[method].seconds + ranks * rest_flops / 1e9)


def test_what_stands_beside_linears_and_collectives():
    """With no time for products, starts and sending: what elements are read and written."""
    memory_only, rest = Machine(float("inf"), 4.0, 0.0, float("inf"), 0.0), Dense((Layer(8, 24, False),), 100)
    layers, small = [Layer(8, 16, False, enters=True), Layer(16, 8, False, leaves=True)], Dense((Layer(8, 4, False),))
    held = {method: 1000 + n for n, method in enumerate(METHODS)}
    arguments = (layers, 2, 1, 2, 64, memory_only, "float32", rest, None, small)
    without, whole = predict(*arguments), predict(*arguments, held)
    for method in METHODS:
        outputs = 32 * (4 if method == "smaller" else 16 + 8 + 24)
        outputs += 32 * (8 + 24) * (method == "tensor_parallel_torch")  # its ranks have all tokens there
        expected = 5 * outputs + 3 * held[method]
        assert whole[method].seconds - without[method].seconds == pytest.approx(expected), method


def test_gradients_go_into_buckets_and_weights_out_of_shards():
    memory_only, layer = Machine(float("inf"), 4.0, 0.0, float("inf"), 0.0), Layer(8, 16, False)
    alone, two = (predict([layer], 2, 1, ranks, 64 * ranks, memory_only) for ranks in (1, 2))
    assert two["ddp"].compute_s - alone["ddp"].compute_s == 4 * 128
    assert two["fsdp"].compute_s - alone["fsdp"].compute_s == 2 * (2 * 128 + 2 * 64) + 2 * 128


def test_every_kind_of_collective_has_its_rate():
    machine = Machine(float("inf"), float("inf"), 0.0, 1e9, 0.0, 2e9, 4e9)
    layers = [Layer(64, 64, False, enters=True), Layer(64, 64, False, leaves=True)]
    sent = {m: predict(layers, 4, 2, 2, 96, machine)[m].communication_s * 1e9 for m in EXACT}
    weights, activations = 2 * 64 * 64 * 4, 96 * 64 * 4
    assert sent["ddp"] == pytest.approx(weights / 2)
    assert sent["fsdp"] == pytest.approx(weights + weights / 2 / 4)
    assert sent["tensor_parallel"] == pytest.approx(4 * activations / 2)
    assert sent["tensor_parallel_torch"] == pytest.approx(2 * activations / 2)


def test_nonnegative_fit():
    true = torch.tensor([2e-9, 0.0, 3e-4])
    features = torch.tensor([[1e6, 5.0, 1], [1e7, 1.0, 2], [3e5, 9.0, 4], [5e6, 2.0, 1]])
    assert nonnegative_fit(features.tolist(), (features @ true).tolist()) == pytest.approx(
        true.tolist(), rel=1e-3, abs=1e-9
    )
    falling = nonnegative_fit([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], [3.0, 2.0, 1.0])
    assert min(falling) >= 0 and max(falling) > 0


def test_the_sweep_ends_where_phantom_stops_paying():
    layers = tuple(Layer(1024, 1024) for _ in range(4))
    setting = Setting(layers, 4, 128, "float32", MACHINE)
    rows = setting.sweep()
    assert [row.num_blocks for row in rows] == [2, 4, 8, 16, 32, 64, 128, 256]
    for row in rows:  # 1/p + pk/n, less the missing D_ii
        p = row.num_blocks
        assert row.ratio("weights", "tensor_parallel_layerwise") == pytest.approx(1 / p + p * 4 / 1024, rel=0.01)
    end = stops_paying(rows)
    assert end is rows[-1] and end.tp_ratio("flops") >= 1 > rows[-2].tp_ratio("flops")
    first = rows[0]
    assert first.ratio("weights", "ddp") == pytest.approx(
        first.ratio("weights", "tensor_parallel_layerwise") / 2, rel=0.01
    )
    assert first.ratio("flops", "ddp") == first.ratio("flops", "fsdp") == first.tp_ratio("flops")
    for row in rows:
        assert row.ratio("step") == max(row.ratio("step", method) for method in EXACT)
    on_four = setting.sweep(4)
    assert [row.num_blocks for row in on_four] == [4, 8, 16, 32, 64, 128, 256]
    assert best(on_four).num_blocks == 16


def test_what_the_rest_of_a_model_costs():
    layers, rest = (Layer(64, 64, enters=True), Layer(64, 64, leaves=True)), Dense((Layer(64, 96, False),), 500)
    alone, whole = (Setting(layers, 4, 128, "float32", MACHINE, r).scale(4, 4) for r in (Dense(), rest))
    assert list(alone.costs) == list(whole.times) == [method for method in METHODS if method != "smaller"]
    for method in alone.costs:
        more, less = whole.costs[method], alone.costs[method]
        shared = method == "tensor_parallel_torch"  # its ranks read the same batches, and average nothing
        ways = 0 if shared else 3 if method == "fsdp" else 2
        assert more.weights - less.weights == (64 * 96 + 500) // (4 if method == "fsdp" else 1)
        assert more.replicated - less.replicated == (0 if method == "fsdp" else 64 * 96 + 500)
        assert more.flops_forward - less.flops_forward == 2 * (128 if shared else 32) * 64 * 96
        assert more.weight_bytes - less.weight_bytes == ways * 3 * 4 * (64 * 96 + 500) // 4
        sent, calls = (
            (whole.times[method].communication_s - alone.times[method].communication_s),
            more.calls - less.calls,
        )
        assert sent == pytest.approx((more.weight_bytes - less.weight_bytes) / 1e9 + calls * 1e-4)
        assert more.layer_bytes == less.layer_bytes
    assert whole.ratio("flops") > alone.ratio("flops")
    assert whole.costs["ddp"].weights == 2 * (64 * 64 + 64) + 64 * 96 + 500
    assert alone.costs["tensor_parallel"].weight_bytes == 2 * 3 * 64 * 4 // 4  # a bias added to a sum is every rank's


def test_methods_that_divide_the_model_otherwise():
    layers, rest = (Layer(64, 64, enters=True), Layer(64, 64, leaves=True)), Dense((Layer(64, 10),))
    exact = Divided((*layers, Layer(64, 10, enters=True, leaves=True)))
    small = Dense((Layer(64, 48), Layer(48, 64)), 7)
    setting = Setting(layers, 4, 128, "float32", MACHINE, rest, exact, small, {"tensor_parallel_torch": "a reason"})
    on_two, on_four = setting.scale(4, 2), setting.scale(4, 4)
    assert list(on_two.costs) == list(on_two.times) == [m for m in METHODS if m != "tensor_parallel_torch"]
    assert on_two.costs["tensor_parallel_layerwise"].weights == (2 * 65 * 64 + 65 * 10) // 2
    assert on_four.costs["tensor_parallel_layerwise"].weights == 2 * 65 * 64 // 4 + 65 * 10  # 10 is no multiple of 4
    assert on_two.costs["smaller"] == small.cost(2, 128)
    assert on_two.costs["smaller"].weights == 65 * 48 + 49 * 64 + 7
    nothing = Setting(layers, 4, 128, "float32", MACHINE, rest, Divided((), exact.dense)).scale(4, 2)
    assert list(nothing.costs) == ["ddp", "fsdp", "phantom"] and nothing.tp_ratio("flops") == 0


def test_from_how_many_features_on_phantom_pays():
    def of(width):
        return Setting((Layer(width, width, enters=True, leaves=True),), 0.25, 256, "float32", MACHINE)

    features = pays_from(of(512), 4, 4)
    assert features == pays_from(of(1024), 4, 4) and 8 < features < 2**15
    assert of(features).scale(4, 4).ratio("step") <= 1 < of(features // 2).scale(4, 4).ratio("step")
    assert pays_from(Setting((Layer(64, 64),), 64, 256, "float32", MACHINE), 64, 4) is None  # its floor: 2 b k n


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_simulated_rank_holds_its_shard_and_sends_what_the_model_says(dtype):
    layers = [
        Layer(512, 1024, enters=True, phantom_width=2),
        Layer(1024, 512, phantom_width=2),
        Layer(1024, 512, phantom_width=2, shares_input=True),
        Layer(512, 512, leaves=True, phantom_width=2),
        Layer(512, 512, enters=True, leaves=True, phantom_width=2),
    ]
    estimate = estimate_cost(layers, 64, 2, 64, 128, dtype)
    measured = simulate(layers, 64, 64, 128, dtype)
    for method, one in measured.items():
        cost = getattr(estimate, method)
        assert (one.weights, one.sent_bytes, one.calls) == (cost.weights, cost.sent_bytes, cost.calls), method
        assert one.compute_s > 0 and one.tensor_bytes > 2 * cost.weights * ELEMENT_BYTES[dtype]
    assert not torch.distributed.is_initialized()
    with pytest.raises(PhantomError, match="100 tokens on 64 ranks"):
        simulate(layers, 64, 64, 100, dtype)


def test_simulated_chains_send_what_the_model_says():
    for mixing, latents in (("private", "both"), ("pairwise", "previous")):
        chain = [each.with_width(2, 16) for each in as_layers([(256, 256)] * 3, mixing=mixing, latents=latents)]
        cost, one = estimate_cost(chain, 16, 2, 8, 64).phantom, simulate(chain, 16, 8, 64)["phantom"]
        assert (one.weights, one.sent_bytes, one.calls) == (cost.weights, cost.sent_bytes, cost.calls)


def test_what_fake_collectives_bring_is_filled_in(monkeypatch):
    class Nothing:
        def wait(self):
            pass

        def is_completed(self):
            return True

    def leave_garbage(output, given, *sizes, **kwargs):
        output.fill_(float("nan"))
        return Nothing()

    monkeypatch.setattr(comm, "_all_gather_single", leave_garbage)
    monkeypatch.setattr(comm, "_reduce_scatter_single", leave_garbage)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", leave_garbage)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    ranks = FilledRanks(torch.distributed.group.WORLD)
    rows = ranks.agreement.enter("a layer", 16, "")
    assert rows.counts == (16,) * 8
    shard, parts, own = torch.randn(16, 4), torch.randn(8, 16, 4), torch.randn(16, 32)
    assert torch.equal(ranks.all_gather(shard, rows, "")(), shard.expand(8, 16, 4))
    assert torch.equal(ranks.reduce_scatter(parts, rows, "")(), parts[0])
    inside = ranks.to_features(own, rows, "")()
    assert torch.equal(inside, torch.cat(own.chunk(8, 1)))
    assert torch.equal(ranks.to_tokens(inside, rows, "")(), own)
    assert ranks.seconds > 0


def run_plan(tmp_path, capsys, *arguments):
    (tmp_path / "run.yaml").write_text(CONFIG)
    main(["plan", "--config", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "plan.json"), *arguments])
    return capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())


RATES = ("--flops", "1e11", "--bandwidth", "10", "--latency", "1e-5")


def test_plan_command(tmp_path, capsys):
    out, result = run_plan(tmp_path, capsys, "--ranks", "2", "--num-blocks", "4", "--tokens", "256", *RATES)
    assert "Phantom plan: 3 of 3 linears, num_blocks=4" in out and "It stops paying" in out
    methods = result["here"]["methods"]
    expected = estimate_cost([(64, 64)] * 3, 4, 0.25, 2, 256, entry_needs_grad=False)  # nothing is before it
    assert methods["phantom"]["sent_bytes"] == expected.phantom.sent_bytes
    assert methods["tensor_parallel"]["flops"] == expected.tensor_parallel.flops
    weights = 3 * (64 * 64 + 64)
    assert methods["ddp"]["weights"] == weights == 2 * methods["fsdp"]["weights"]
    assert methods["ddp"]["sent_bytes"] == weights * 4 and methods["ddp"]["flops"] == (3 * 6 - 2) * 128 * 64**2
    assert methods["fsdp"]["sent_bytes"] == weights * 6
    assert list(methods) == list(METHODS) and compare.METHODS is METHODS  # one list with `compare`
    assert result["left_out"] == {} and "Left out" not in out
    assert methods["smaller"]["weights"] == pytest.approx(2 * methods["phantom"]["weights"], rel=0.1)
    assert "features of the widest layer on (it has 64" in out and "Phantom's 9 collectives take" in out
    assert result["here"]["fastest"] in methods and f"of {LABELS[result['here']['fastest']]}'s" in out
    assert result["machine_origin"] == dict.fromkeys(("flops_per_s", "latency_s", "link_bytes_per_s"), "given")
    assert f"{methods['phantom']['weights']:,}" in out


def test_plan_command_knows_how_blocks_mix(tmp_path, capsys):
    strategy = ("--trainer.strategy", "lightning_phantom.PhantomStrategy", "--trainer.strategy.latents", "both")
    out, result = run_plan(
        *(tmp_path, capsys, "--ranks", "2", "--num-blocks", "4", "--tokens", "256", *RATES),
        *(*strategy, "--trainer.strategy.mixing", "private"),
    )
    assert "num_blocks=4, mixing=private, latents=both" in out and "reads its own latents and those of" in out
    how = {"entry_needs_grad": False, "mixing": "private", "latents": "both"}
    expected = estimate_cost([(64, 64)] * 3, 4, 0.25, 2, 256, **how).phantom
    phantom = result["here"]["methods"]["phantom"]
    assert (phantom["weights"], phantom["sent_bytes"]) == (expected.weights, expected.sent_bytes)
    assert (result["config"]["mixing"], result["config"]["latents"]) == ("private", "both")


def test_plan_command_lets_later_configs_count_over_earlier_ones(tmp_path, capsys):
    (tmp_path / "blocks.yaml").write_text(
        "trainer: {strategy: {class_path: lightning_phantom.PhantomStrategy, init_args: {num_blocks: 8}}}"
    )
    _, result = run_plan(tmp_path, capsys, "--config", str(tmp_path / "blocks.yaml"), "--ranks", "2", *RATES)
    assert result["config"]["num_blocks"] == 8 and result["config"]["num_ranks"] == 2


def test_plan_command_simulates(tmp_path, capsys):
    arguments = ("--simulate-ranks", "16", "--phantom-width", "1", "--tokens", "250", *RATES)
    out, result = run_plan(tmp_path, capsys, *arguments)
    assert "One of 16 ranks, p=16" in out and "256 tokens" in out  # as many for each rank
    simulation = result["simulation"]
    for method, one in simulation["measured"].items():
        counted = simulation["methods"][method]
        assert one["sent_bytes"] == counted["layer_bytes"] + counted["boundary_bytes"]


def measured_on_two_ranks(folder):
    (folder / "run.yaml").write_text(CONFIG)
    command = ["-m", "lightning_phantom", "plan", "--config", folder / "run.yaml", "--num-blocks", 4, "--ranks", 2]
    return program(*command, "--json", folder / "plan.json"), json.loads((folder / "plan.json").read_text())


@pytest.mark.program.with_args(measured_on_two_ranks)
def test_plan_measures_two_ranks_at_once(outcome):
    out, result = outcome
    assert "Predicted from rates measured on this machine" in out
    assert set(result["machine_origin"].values()) == {"measured here"}
    machine = Machine(**result["machine"])
    assert 0 < machine.flops_per_s < 1e15 and 0 < machine.link_bytes_per_s < 1e13
    times = [method["step_s"] for method in result["here"]["methods"].values()]
    assert all(0 < seconds < 10 for seconds in times)


def test_plan_measures_this_machine_where_nothing_is_given(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_phantom.commands.plan.measure_here", lambda ranks, dtype: MACHINE)
    out, result = run_plan(tmp_path, capsys, "--num-blocks", "4", "--latency", "0.5")
    assert "measured on this machine, latency_s given" in out
    assert result["machine"]["latency_s"] == 0.5 and result["machine"]["flops_per_s"] == MACHINE.flops_per_s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "3", "--num-blocks", "4"), "--ranks 3 does not divide num_blocks=4"),
        (("--ranks", "1"), "give --num-blocks or --ranks"),
        (("--flops", "-1"), "--flops -1.0: needs a number above 0"),
        (("--num-blocks", "7"), "nothing in FeedForward qualifies"),
        (("--num-blocks", "4", "--simulate-ranks", "3"), "--simulate-ranks 3 does not divide --num-blocks 4"),
        (("--phantom-width", "1.5", "--num-blocks", "4"), "phantom_width=1.5"),
        (("--phantom-width", "0", "--num-blocks", "4"), "phantom_width=0"),
        (("--num-blocks", "0"), "--num-blocks 0: needs a number above 0"),
    ],
)
def test_plan_says_what_is_wrong(tmp_path, capsys, arguments, message):
    (tmp_path / "run.yaml").write_text(CONFIG)
    with pytest.raises(SystemExit) as stop:
        main(
            ["plan", "--config", str(tmp_path / "run.yaml"), *arguments, *(RATES if "--flops" not in arguments else ())]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Error: " in error and message in error


def test_a_config_that_fit_has_saved_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "examples/digits.yaml", "--print_config"])
    saved = capsys.readouterr().out
    assert "ckpt_path: null" in saved
    (tmp_path / "config.yaml").write_text(saved)
    assert type(Recipe([tmp_path / "config.yaml"], (), "test").make_module()).__name__ == "DigitsClassifier"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--help"], "plan: "), (["plan", "--help"], "--simulate-ranks"), (["compare", "--help"], "--smaller")],
)
def test_plan_and_compare_are_in_the_help(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0 and words in capsys.readouterr().out
