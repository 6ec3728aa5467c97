import json
import time
from itertools import pairwise
from statistics import median

import pytest
import torch

pytest.importorskip("rich", reason="needs gradops[bench]")

from gradops.bench import harness, report


def spin(seconds):
    def f():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return torch.tensor(1.0)

    return f


def case(ours=1e-3, reference=4e-3, **more):
    return harness.Case("op", "1x1", torch.float32, ours=spin(ours), reference=spin(reference), **more)


@pytest.fixture(scope="module")
def floor():
    return harness.Floor(harness.Settings(quick=True))


def test_ratio_above_one_means_ours_is_faster(floor):
    result = harness.measure(case(peers={"peer": spin(2e-3)}), floor)
    assert result["ratios"]["torch"] == pytest.approx(4, rel=0.2)
    assert result["ratios"]["peer"] == pytest.approx(2, rel=0.2)
    assert not result["lost"]


def test_a_lost_case_is_marked_and_stays(floor):
    result = harness.measure(case(ours=4e-3, reference=1e-3), floor)
    assert result["lost"] and report.table([result]).row_count == 1


def test_a_contender_that_takes_too_long_is_timed_once(floor, monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE", 3e-3)
    result = harness.measure(case(peers={"peer": spin(2e-3)}), floor)
    assert len(result["bursts"]["torch"]) == 1 and len(result["bursts"]["peer"]) == len(result["bursts"]["ours"]) > 1
    assert list(result["seconds"]) == ["ours", "torch", "peer"]
    assert result["ratios"]["torch"] == pytest.approx(4, rel=0.3)


def test_contenders_are_interleaved(floor):
    order = []

    def watched(name):
        def f():
            order.append(name)
            end = time.process_time() + 0.01
            while time.process_time() < end:
                pass

        return f

    harness.measure(harness.Case("op", "", torch.float32, ours=watched("o"), reference=watched("r")), floor)
    switches = sum(a != b for a, b in pairwise(order))
    assert switches >= 4


def test_error_is_relative_and_in_float64(floor):
    exact = torch.full((4,), 1e-30, dtype=torch.float64)
    error = harness.relative_error(lambda: exact)
    assert error((exact * 1.5).float()) == pytest.approx(0.5, rel=1e-6)
    assert error(exact) == 0


def test_floor_is_the_longer_of_compute_and_copy_and_the_fastest_product_counts(floor):
    flops = {torch.float32: 1e9, torch.float64: 1e6}
    quick = floor.compute(case(flops=flops))
    assert 0 < quick < floor.compute(case(flops={torch.float32: 1e9}))
    floor.gemm |= {"bfloat16": 1.0, "float32": 1e9}  # as on a machine without products of bfloat16
    assert floor.compute(case(flops={torch.bfloat16: 1e9})) == 1
    for reads in (False, True):
        result = harness.measure(case(flops={torch.float64: 1.0}, bytes=1e8, reads=reads), floor)
        assert result["floor"] == median(result["bursts"]["floor"]) > 0
        assert result["of_floor"] == pytest.approx(result["floor"] / result["seconds"]["ours"], rel=0.5)
        assert "floor" not in result["ratios"] and "floor" not in result["seconds"]
    assert harness.measure(case(flops={torch.float64: 1e9}, bytes=8.0), floor)["floor"] == floor.compute(
        case(flops={torch.float64: 1e9}))
    assert harness.measure(case(), floor)["floor"] == harness.measure(case(), floor)["of_floor"] == 0


def test_threads_are_restored():
    before = torch.get_num_threads()
    list(harness.run(iter([case()]), harness.Floor(harness.Settings(quick=True))))
    assert torch.get_num_threads() == before


def test_a_case_that_raises_does_not_stop_the_others(capsys):
    def broken():
        raise RuntimeError("out of order")

    quick = harness.Floor(harness.Settings(quick=True))
    results = list(harness.run(iter([harness.Case("bad", "1", torch.float32, ours=broken), case()]), quick))
    assert results[0]["failed"] == "RuntimeError: out of order" and "failed" not in results[1]
    report.show(harness.machine(quick.settings), results)
    assert "bad 1 float32 failed: RuntimeError: out of order" in capsys.readouterr().out


def test_a_table_has_the_peers_of_its_own_op_alone(floor, capsys):
    first = harness.measure(case(peers={"one": spin(2e-3)}), floor)
    second = {**first, "op": "other", "ratios": {"two": 1.0}, "floor": 0.0}
    report.show(harness.machine(floor.settings), [first, second])
    headers = [line for line in capsys.readouterr().out.splitlines() if "ours ms" in line]
    assert ["x one" in line for line in headers] == [True, False]
    assert ["x two" in line for line in headers] == [False, True]


def test_json_and_plot(floor, tmp_path):
    result = harness.measure(case(error=lambda y: 0.0), floor)
    machine = harness.machine(floor.settings)
    report.write_json(tmp_path / "new" / "r.json", machine, [result])
    read = json.loads((tmp_path / "new" / "r.json").read_text())
    assert read["results"][0]["ratios"] == result["ratios"] and read["machine"]["isa"]
    pytest.importorskip("matplotlib")
    report.write_plot(tmp_path / "r.png", machine, [result])
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_every_family_declares_cases():
    from importlib import import_module

    from gradops.commands import families

    assert "linalg" in families()
    for family in families():
        first = next(import_module(f"gradops.bench.{family}").cases(harness.Settings(quick=True)))
        assert isinstance(first, harness.Case)
