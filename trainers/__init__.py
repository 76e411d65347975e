"""The data plane of raylaunch: what runs beside the GPUs, on a laptop or in a pod.

Of `launcher` it imports the spec, the run directory with its storage, and the errors; nothing else.
"""
