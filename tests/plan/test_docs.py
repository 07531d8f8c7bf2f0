"""docs/plan.md and docs/tpu.md are what benchmarks/plan.py would write now."""

import pytest

from benchmarks import plan


@pytest.fixture(scope="module")
def documents():
    return plan.documents()


@pytest.mark.parametrize("path", [plan.PLAN, plan.TPU], ids=lambda path: path.name)
def test_the_written_parts_are_what_the_script_writes_now(documents, path):
    assert path.read_text() == documents[path], f"{path.name} is out of date: run python benchmarks/plan.py"


def test_the_plot_is_there_and_shown_on_the_page():
    assert "<svg" in plan.PLOT.read_text() and f"]({plan.PLOT.name})" in plan.PLAN.read_text()


def test_every_point_has_a_result_and_every_result_a_point():
    assert {key.split(" | ")[0] for key in plan.read_results()} == {point.name for point in plan.POINTS}


@pytest.mark.parametrize("row", plan.rows(), ids=lambda row: row.point.name)
def test_the_closed_form_agrees_with_the_compiler(row):
    """What is there before a step to half a percent, the peak to half of the 25% that were asked for."""
    assert row.predicted.arguments == pytest.approx(row.found["argument_bytes"], rel=0.005)
    assert row.predicted.total == pytest.approx(row.found["peak_bytes"], rel=0.125)
