"""The Grafana dashboard asks for what the collector exports, and for all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached_plugins.metrics import COUNTERS, DEVICE_GAUGES, ENGINE_LABELS, GAUGES, UP

FILE = Path(__file__).parents[1] / "integration" / "grafana" / "kvcached.json"
LEFT_OUT: frozenset[str] = frozenset()
"""What is exported and on no panel, on purpose."""

OF_ENGINE = {each.name for each in (*GAUGES, *COUNTERS)}
OF_DEVICE = {UP, *(each.name for each in DEVICE_GAUGES)}
SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text()))


@pytest.fixture(scope="module")
def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels but rows, those in rows too."""
    return [panel for panel in _panels(dashboard["panels"]) if panel["type"] != "row"]


@pytest.fixture(scope="module")
def expressions(dashboard: dict[str, Any], panels: list[dict[str, Any]]) -> list[str]:
    """Every query, those of variables too."""
    variables = [each for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [
        each["query"]["query"] for each in variables
    ]


def _panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        yield panel
        yield from _panels(panel.get("panels", []))


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\bkvcached_\w+", expression))


def test_every_panel_asks_for_metrics_that_exist(panels: list[dict[str, Any]]) -> None:
    assert panels
    for panel in panels:
        for target in panel["targets"]:
            asked = metrics(target["expr"])
            assert asked, f"{panel['title']} asks for no metric"
            assert asked <= OF_ENGINE | OF_DEVICE, panel["title"]


def test_every_metric_is_on_a_panel_or_left_out_on_purpose(panels: list[dict[str, Any]]) -> None:
    used = {m for p in panels for target in p["targets"] for m in metrics(target["expr"])}
    assert used | LEFT_OUT == OF_ENGINE | OF_DEVICE
    assert not used & LEFT_OUT


def test_variables_ask_for_metrics_and_labels_that_exist(dashboard: dict[str, Any]) -> None:
    for each in dashboard["templating"]["list"]:
        if each["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", each["query"]["query"])
            assert found, each["name"]
            assert found[2] in _labels(found[1]) | SCRAPED


def test_queries_name_labels_that_their_metrics_have(expressions: list[str]) -> None:
    for expression in expressions:
        selectors = re.findall(r"(kvcached_\w+)(?:\{(.*?)\})?", expression)
        for metric, matchers in selectors:
            named = set(re.findall(r"(\w+)=~", matchers))
            assert named <= _labels(metric) | SCRAPED, expression
        for grouped in re.findall(r"by \((.*?)\)", expression):
            for metric, _ in selectors:
                assert set(grouped.split(", ")) <= _labels(metric), expression


def test_queries_are_well_formed(dashboard: dict[str, Any], expressions: list[str]) -> None:
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    for expression in expressions:
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression
        used = set(re.findall(r"\$(\w+)", expression))
        assert used <= variables | {"__rate_interval"}, expression
        for metric in re.findall(r"rate\((\w+)", expression):
            assert metric.endswith("_total"), f"rate of a gauge: {expression}"
        for metric in metrics(expression):
            if metric.endswith("_total"):
                assert f"rate({metric}" in expression, f"a counter as it is: {expression}"


def test_legends_show_labels_that_survive_the_grouping(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = re.search(r"by \((.*?)\)", target["expr"])
            assert grouped, panel["title"]
            assert shown <= set(grouped[1].split(", ")), panel["title"]


def test_units_are_those_of_the_metrics(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            rated = "rate(" in target["expr"]
            if any("_bytes" in metric for metric in metrics(target["expr"])):
                assert unit == ("Bps" if rated else "bytes"), panel["title"]
            if any("_seconds_" in metric for metric in metrics(target["expr"])):
                assert unit == ("s" if " / " in target["expr"] else "percentunit"), panel["title"]


def test_it_is_a_dashboard_for_any_data_source(
    dashboard: dict[str, Any], panels: list[dict[str, Any]]
) -> None:
    assert dashboard["schemaVersion"] == 42
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    sources = [panel["datasource"] for panel in panels]
    sources += [target["datasource"] for panel in panels for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_panels_are_told_apart_explained_and_do_not_overlap(
    dashboard: dict[str, Any], panels: list[dict[str, Any]]
) -> None:
    every = list(_panels(dashboard["panels"]))
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in every}) == len(every)
    assert all(panel["description"].endswith(".") for panel in panels)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def _labels(metric: str) -> set[str]:
    return set(ENGINE_LABELS) if metric in OF_ENGINE else {"device"}
