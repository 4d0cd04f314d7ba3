"""Set up before any test module is imported."""

import signal

import mlx.core as mx
from hypothesis import settings

# A shell has its background jobs ignore Ctrl-C, and what they start inherits that: the commands under test, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tolerances are float32's on the CPU, and float64 exists only there; tests of kernels choose their own device.
# Before mlx_lm is imported: it makes its generation stream on the default device of that moment.
mx.set_default_device(mx.cpu)

# The same examples in every run, and no deadline: a slow machine must not make a test fail.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
