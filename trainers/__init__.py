"""The data plane of raylaunch: what runs beside the GPUs, on a laptop or in a pod.

Of `launcher` it imports the spec, the run directory with its storage, and the errors; nothing else.
"""

import gc

# What such a process imports makes half a million objects that stay, and Python's usual 700 would have it look through
# them for garbage again and again while they are made: half a second of each start (torch, numba, botocore, pyarrow).
gc.set_threshold(10_000, 10, 10)
