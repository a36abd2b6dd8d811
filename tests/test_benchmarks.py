"""Benchmarks whose figures are taken elsewhere or later: that they run, in small, and say what they have seen."""

import json

import pytest
from programs import program

from benchmarks import gpu, predict
from lightning_phantom.cost.methods import METHODS


def without_a_gpu(folder):
    out = program("-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", folder)
    return out, json.loads((folder / "report.json").read_text())["parts"]


@pytest.mark.program.with_args(without_a_gpu)
def test_all_that_waits_for_a_gpu_runs_without_one(outcome):
    out, parts = outcome
    assert list(parts) == list(gpu.PARTS)
    for name, part in parts.items():
        left_out = name == "window" and not gpu.WINDOW.exists()
        assert part["holds"] is (None if left_out else True), (name, part["lines"])
        assert f"{name}: {'left out' if left_out else 'holds'}" in out and part["lines"]
    assert "4 passed, 1 skipped" in parts["tests"]["lines"][-1]  # no second device for NCCL
    assert "FLOP ratio" in "\n".join(parts["layer"]["lines"])


def test_joules_are_taken_to_the_lowest_loss_that_all_have_seen():
    def rank(losses, joules, flag="measured_counter"):
        energy = {"steady_j_per_step": joules, "flag": flag}
        return [{"losses": [(n, n / 10, loss) for n, loss in losses], "energy": energy, "weights": 5}]

    dense = {"method": "ddp", "ranks": rank([(10, 3.0), (20, 2.0), (30, 2.5)], 7.0)}
    phantom = {"method": "phantom", "ranks": rank([(10, 2.2), (20, 1.5), (30, 1.0)], 2.0, "modelled")}
    lines, flags = gpu.to_equal_loss({"runs": [dense, phantom], "left_out": {"smaller": "a reason"}})
    assert "ddp      to 2.0000: 20 steps, 2.00 s, 140 J (measured_counter)" in lines[0]
    assert "phantom  to 2.0000: 20 steps, 2.00 s, 40 J (modelled)" in lines[1]
    assert lines[2] == "left out: smaller: a reason" and flags == {"measured_counter", "modelled"}


def small_prediction(folder):
    options = ["--small", "--rounds", 1, "--steps", 1, "--out", folder / "predict.json"]
    return program("-m", "benchmarks.predict", *options), json.loads((folder / "predict.json").read_text())


@pytest.mark.program.with_args(small_prediction)
def test_predictions_lie_beside_what_every_method_takes(outcome):
    out, result = outcome
    (case,) = result["cases"]
    assert list(case["methods"]) == list(METHODS) and case["left_out"] == {}
    assert 0 <= result["machines"]["2"]["overlap"] <= 1 and result["machines"]["2"]["all_reduce_bytes_per_s"] > 0
    assert set(result["median_errors"]) == {*METHODS, "all"} and "median error: DDP" in out


def test_errors_are_medians_over_the_configurations(capsys):
    def case(measured, predicted):
        both = {"measured": {"step_s": {"median": measured}}, "predicted": {"compute_s": predicted, "waited_s": 0.0}}
        return {
            "case": predict.CASES[0]._asdict(),
            "methods": {"ddp": both, "phantom": both},
            "left_out": {"fsdp": "why"},
        }

    medians = predict.show([case(1.0, 1.1), case(1.0, 0.2), case(1.0, 1.2)])
    assert medians == pytest.approx({"ddp": 0.2, "phantom": 0.2, "all": 0.2})
    assert "left out: fsdp: why" in capsys.readouterr().out
    kinds = [case.kind for case in predict.CASES]
    assert len(kinds) == 8 and kinds.count("transformer") >= 3 and {case.ranks for case in predict.CASES} == {2, 4}
