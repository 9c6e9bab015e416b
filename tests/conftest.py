"""Servers of the tests are asked directly, whatever proxy the environment names."""

import os

from vllm_atomic_moe.measure.server_process import asking_directly

os.environ.update(asking_directly(os.environ))
