"""Stands before torchvision's module of this name, as Python prefers a package to a module.

Where the C++ operators are loaded, it is that module. Where they are not, it registers nothing: the
module names operators that do not exist, and `import torchvision` would end there.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from torchvision.extension import _has_ops

if _has_ops():
    path = Path(__file__).parents[1] / "_meta_registrations.py"
    spec = spec_from_file_location(__name__, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    globals().update(vars(module))
