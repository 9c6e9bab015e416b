"""The Grafana dashboard's queries, as Prometheus would read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser

from tests.documents import ROOT

DASHBOARD = ROOT / "deploy/grafana/dashboard.json"
# What Grafana puts in place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


def dashboard() -> dict[str, Any]:
    """The dashboard's model."""
    return json.loads(DASHBOARD.read_text())


def queries() -> dict[tuple[str, str], str]:
    """PromQL by panel and legend, without variables."""
    found = {
        (panel["title"], target["legendFormat"]): target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    }
    for annotation in dashboard()["annotations"]["list"]:
        found[annotation["name"], annotation["textFormat"]] = annotation["expr"]
    for key, query in found.items():
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        assert "$" not in query, key
        found[key] = query
    return found


def selectors(query: str) -> Iterator[tuple[str, list[tuple[str, str, str]], set[str]]]:
    """Every metric of a query: its name, its matchers, and the labels that results are grouped by.

    Raises:
        ValueError: it is not PromQL.
    """
    yield from _selectors(promql_parser.parse(query), frozenset())


def _selectors(node: Any, labels: frozenset[str]) -> Iterator[Any]:
    match node:
        case promql_parser.VectorSelector():
            matchers = [
                (matcher.name, str(matcher.op).removeprefix("MatchOp."), matcher.value)
                for matcher in node.matchers.matchers
            ]
            yield node.name, matchers, set(labels)
        case promql_parser.MatrixSelector():
            yield from _selectors(node.vector_selector, labels)
        case promql_parser.AggregateExpr():
            by = frozenset(node.modifier.labels) if node.modifier else frozenset()
            yield from _selectors(node.expr, labels | by)
        case promql_parser.BinaryExpr():
            yield from _selectors(node.lhs, labels)
            yield from _selectors(node.rhs, labels)
        case promql_parser.Call():
            for argument in node.args:
                yield from _selectors(argument, labels)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from _selectors(node.expr, labels)
        case promql_parser.NumberLiteral():
            pass
        case _:
            raise NotImplementedError(type(node))
