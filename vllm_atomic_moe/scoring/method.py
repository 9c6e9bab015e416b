"""The definition of a pruning method. `methods/` has ours; installed packages add others.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vllm_atomic_moe.files.statistics import MIN_TOKENS
from vllm_atomic_moe.scoring.budget import prune_atoms
from vllm_atomic_moe.scoring.masks import LayerScores, Masks

Value = bool | int | float | str
KINDS: tuple[type[Value], ...] = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a method; `weight_by_frequency` is `--weight-by-frequency` on the command line.

    Attributes:
        default: the value if it is not given; None leaves it to the method.
        help: one sentence, without the method's name.
        kind: bool, int, float or str; None means the type of `default`.
        shown: the default in help texts, if `default` is None.
        metavar: the value in help texts; None means the kind.

    Raises:
        ValueError: the kind is none of these, or not that of the default.
    """

    default: Value | None
    help: str
    kind: type[Value] | None = None
    shown: str | None = None
    metavar: str | None = None

    def __post_init__(self) -> None:
        if self.kind is None:
            object.__setattr__(self, "kind", type(self.default))
        if self.kind not in KINDS:
            raise ValueError(
                f"an option of kind {getattr(self.kind, '__name__', self.kind)}; wanted bool, int, "
                "float or str"
            )
        if self.default is not None and not self.takes(self.default):
            raise ValueError(f"an option's default {self.default!r} is not of its kind")

    def takes(self, value: object) -> bool:
        """Whether `value` is of the option's kind; an int is a float, a bool is not an int."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        return type(value) in kinds


# Methods that score atoms by tokens have this option; they protect such experts unless it is set.
UNSEEN: Mapping[str, Option] = MappingProxyType(
    {
        "allow_unseen": Option(
            False,
            f"Score experts that saw fewer than {MIN_TOKENS} tokens like the others, instead of "
            "keeping them whole.",
        )
    }
)
ALIGN = Option(1, "Make every width a multiple of this many atoms.")
# The options of `prune_atoms`.
ATOM_SELECTION: Mapping[str, Option] = MappingProxyType(
    {
        "scope": Option(
            "global", "global: all layers compete; layer or expert: each loses the same."
        ),
        "align": ALIGN,
        "min_width": Option(0, "Atoms that every expert keeps."),
    }
)
# The options of `prune_experts`.
EXPERT_SELECTION: Mapping[str, Option] = MappingProxyType(
    {
        "scope": Option(
            "global",
            "global: all layers compete; layer: each loses as many experts; group: each group of "
            "the router does.",
        )
    }
)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to prune, in two halves: scores, then masks.

    Attributes:
        score_layer: (`LayerSums` of the layer, layer index, **options) -> LayerScores of that layer
            alone; higher = more important, +inf is never removed, NaN is refused.
        help: one line that says what it scores.
        select: (LayerScores by layer, ratio, **selection) -> Masks; with `whole_experts`,
            (LayerScores by layer, ratio, RouterNeeds, **selection) -> Masks.
        options: options of `score_layer` by name; a method with `UNSEEN` keeps experts with few
            tokens whole unless it is set, and `score_layer` does not get it.
        selection: options of `select` by name.
        whole_experts: whether it removes whole experts; then the router keeps what it needs.
        needs: sums that `score_layer` reads and that a calibration may leave out.
    """

    score_layer: Callable[..., LayerScores]
    help: str
    select: Callable[..., Masks] = prune_atoms
    options: Mapping[str, Option] = field(default_factory=dict)
    selection: Mapping[str, Option] = field(default_factory=lambda: ATOM_SELECTION)
    whole_experts: bool = False
    needs: tuple[str, ...] = ()
