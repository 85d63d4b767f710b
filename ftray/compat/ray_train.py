"""Private APIs of Ray Train. Seen with ray 2.60; contract tests: tests/unit/test_compat.py. Imports torch."""

from ray.train.torch.config import _TorchBackend

# What Ray Train's torch backend does when a worker group starts. Reason: to choose gloo's network before it, and to release
# the placement group if it fails; the class has no public name.
TorchBackend = _TorchBackend
