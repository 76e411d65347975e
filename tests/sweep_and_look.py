"""`python -m tests.sweep_and_look RUN_URI`: drives a sweep, then prints what its Ray still holds, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time

from launcher.runs import Run
from trainers.driver import Driver

SETTLE_SECONDS = 30.0


def main() -> None:
    code = Driver(Run.at(sys.argv[1])).drive()
    import ray
    from ray.util import placement_group_table

    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        groups = [group["state"] for group in placement_group_table().values()]
        whole, free = ray.cluster_resources(), ray.available_resources()
        held = {key: whole[key] - free.get(key, 0.0) for key in ("CPU", "trial") if whole[key] != free.get(key)}
        # Ray's own view lags behind by a heartbeat or two.
        if (not held and set(groups) <= {"REMOVED"}) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    print(json.dumps({"code": code, "groups": groups, "held": held}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
