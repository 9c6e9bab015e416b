"""The Grafana dashboard's queries, as Prometheus reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser

from tests.documents import ROOT

DASHBOARD = ROOT / "deploy/grafana/dashboard.json"
# Values for Grafana's variables.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


def dashboard() -> dict[str, Any]:
    """The dashboard's model."""
    return json.loads(DASHBOARD.read_text())


def queries() -> Iterator[tuple[str, str, str]]:
    """Every query: panel, legend, and PromQL without variables."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["legendFormat"], _resolved(target["expr"])
    for annotation in dashboard()["annotations"]["list"]:
        yield annotation["name"], annotation["textFormat"], _resolved(annotation["expr"])


def _resolved(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


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
        case promql_parser.NumberLiteral():
            pass
        case _:
            raise NotImplementedError(type(node))
