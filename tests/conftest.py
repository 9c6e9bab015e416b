"""Tests reach their servers without proxies of the environment. hypothesis has no deadline, since
machines may be busy.
"""

import os

from hypothesis import settings

from vllm_atomic_moe.measure.server_process import asking_directly

os.environ.update(asking_directly(os.environ))
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
