"""What every test may ask for."""

import os

pytest_plugins = ["tests.fixtures_s3"]

# Of torch, before it is imported, here and in what tests start: threads that wait for each other in a spin, in more processes
# than there are cores, take minutes for what one thread does in a second.
os.environ.setdefault("OMP_NUM_THREADS", "1")
