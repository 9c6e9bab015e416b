"""Servers of the tests are asked directly, whatever proxy the environment names; examples may take
as long as they do, on machines that do other work beside.
"""

import os

from hypothesis import settings

from vllm_atomic_moe.measure.server_process import asking_directly

os.environ.update(asking_directly(os.environ))
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
