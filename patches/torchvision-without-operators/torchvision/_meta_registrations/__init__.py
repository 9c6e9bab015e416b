"""Stands before torchvision's module of this name, as Python prefers a package to a module.

Where the C++ operators are loaded, it is that module. Where they are not, it registers nothing: the
module names operators that do not exist, and `import torchvision` would end there.
"""

from pathlib import Path

from torchvision.extension import _has_ops

if _has_ops():
    source = Path(__file__).parents[1] / "_meta_registrations.py"
    exec(compile(source.read_text(), source, "exec"))
