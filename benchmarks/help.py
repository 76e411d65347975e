"""How long `launch --help` takes, against importing the three libraries no such tool can do without.

    python benchmarks/help.py

Interleaved runs of both; prints the medians and their ratio. The bar is 2.5.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 15
COMMANDS = {
    "launch --help": [sys.executable, "-m", "launcher", "--help"],
    "import click, pydantic, yaml": [sys.executable, "-c", "import click, pydantic, yaml"],
}


def main() -> None:
    """Measures and prints."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    # The first round fills the caches of the disk.
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<30}{median * 1000:6.0f} ms")
    ours, floor = medians.values()
    print(f"{'ratio':<30}{ours / floor:6.2f}    (bar 2.5)")


if __name__ == "__main__":
    main()
