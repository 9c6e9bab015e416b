"""Commands with options from registered plug-ins: pruning methods, formats to import.

The list is known only after their code is imported, which needs torch. So these commands read it
when they run or print their help, not when the command line starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from vllm_atomic_moe.cli.console import print_warning

if TYPE_CHECKING:
    from vllm_atomic_moe.files.registry import Registry
    from vllm_atomic_moe.scoring.method import Method, Option


class ImporterCommand(TyperCommand):
    """Knows the formats in its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _warn_of_refused(_importers())
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        known = _importers().entries
        ranking = [f"{entry.needs_ratio} ({x})" for x, entry in known.items() if entry.needs_ratio]
        own = super().get_params(ctx)
        return _with_help(own, format_name=_list_of(known), ratio=", ".join(ranking))


class ScoreCommand(TyperCommand):
    """Has the options of all methods' scores; the given ones are the context's `obj`."""

    def options_of(self, method: Method) -> Mapping[str, Option]:
        """The options of a method that the command has."""
        return method.options

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _warn_of_refused(_known_methods())
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        known = _known_methods().entries
        whole = ", ".join(name for name, method in known.items() if method.whole_experts)
        own = _with_help(super().get_params(ctx), method=_list_of(known), ratio=whole)
        return [*own[:-1], *_parameters(self._options()), own[-1]]

    def invoke(self, ctx: Any) -> Any:
        ctx.obj = {name: ctx.params.pop(name) for name in self._options()}
        return super().invoke(ctx)

    def _options(self) -> dict[str, dict[str, Option]]:
        """Name of the option -> name of the method -> its option."""
        found: dict[str, dict[str, Option]] = {}
        for name, method in _known_methods().entries.items():
            for option, told in self.options_of(method).items():
                found.setdefault(option, {})[name] = told
        return found


class PruneCommand(ScoreCommand):
    """Also has the options of all methods' masks."""

    def options_of(self, method: Method) -> Mapping[str, Option]:
        return {**method.selection, **method.options}


def _known_methods() -> Registry[Method]:
    from vllm_atomic_moe.scoring import known_methods

    return known_methods()


def _importers() -> Registry[Any]:
    from vllm_atomic_moe.convert.importing import known_importers

    return known_importers()


def _warn_of_refused(registry: Registry[Any]) -> None:
    for line in registry.refused.values():
        print_warning(line)


def _list_of(entries: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {entry.help}" for name, entry in entries.items())


def _with_help(parameters: list[Any], **texts: str) -> list[Any]:
    """The same parameters; in the help of those named, the text replaces …."""
    for parameter in parameters:
        if parameter.name in texts:
            parameter.help = parameter.help.replace("…", texts[parameter.name])
    return parameters


def _parameters(options: Mapping[str, Mapping[str, Option]]) -> list[Any]:
    """typer's parameters for options that are not given by default."""

    def carrier(**given: Any) -> None:
        """Typer reads a command's parameters from a function."""

    annotations = {name: _annotation(name, told) for name, told in options.items()}
    carrier.__annotations__ = annotations
    carrier.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in annotations.items()
        ]
    )
    app = typer.Typer(add_completion=False)
    app.command()(carrier)
    return list(typer.main.get_command(app).params)


def _annotation(name: str, of_methods: Mapping[str, Option]) -> Any:
    """The type of an option, with its help: every text with the methods that it belongs to."""
    texts: dict[str, list[str]] = {}
    for method, option in of_methods.items():
        texts.setdefault(option.help.rstrip("."), []).append(method)
    first = next(iter(of_methods.values()))
    defaults = {option.shown or str(option.default) for option in of_methods.values()}
    told = typer.Option(
        f"--{name.replace('_', '-')}",
        help=" ".join(f"{text} ({', '.join(known)})." for text, known in texts.items()),
        metavar=first.metavar,
        show_default=False if first.kind is bool else " or ".join(sorted(defaults)),
    )
    return Annotated[first.kind | None, told]  # type: ignore[operator]
