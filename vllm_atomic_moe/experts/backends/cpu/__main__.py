"""Build all libraries for this architecture, so that no compiler is needed later."""

from __future__ import annotations

import sys

from vllm_atomic_moe.experts.backends.cpu.library import VariantError, build, variants_of_machine


def main() -> int:
    """Build every variant.

    Returns:
        0, or 1 if none was built; an old compiler may not support the newest variant.
    """
    built = 0
    for variant in variants_of_machine():
        try:
            print(build(variant))
            built += 1
        except VariantError as reason:
            print(f"{variant.name}: {reason}", file=sys.stderr)
    return 0 if built else 1


if __name__ == "__main__":
    sys.exit(main())
