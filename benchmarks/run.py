"""Compare micronet with the plain trainer of plain.py: in turns, on this machine, in one run.

    python benchmarks/run.py --rounds 3

Every round trains some steps of efficientnet_ex under efficientnet_b0 the plain way and then as `micronet.py chain`
would; printed are both rates, their ratio and the ratio of the peak memory, as median and range over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(*command: object) -> dict:
    """Run a benchmark in a process of its own and return what its last line or its whole output says as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_"))}
    result = subprocess.run([sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed")
    measured = json.loads(result.stdout)
    return measured[0] if isinstance(measured, list) else measured


def spread(values: list[float], digits: int = 2) -> str:
    """Write the median and the range of some figures."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, a round")
    parser.add_argument("--stage", default="ex", choices=["ex", "exx"], help="of stages.toml, taught by b0")
    parser.add_argument("--config-file", type=Path, default=ROOT / "accelerate_config.yaml")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="CIFAR-100 for the plain trainer")
    options = parser.parse_args()

    network = f"efficientnet_{options.stage}"
    steps = ["--steps", options.steps]
    plain = [ROOT / "benchmarks/plain.py", "--network", network, "--teacher", "efficientnet_b0", *steps]
    ours = [ROOT / "micronet.py", "bench", options.stage, "--stages", ROOT / "stages.toml", "--json", *steps]
    rounds = []
    for number in range(1, options.rounds + 1):
        pair = measure(*plain, "--data", options.data), measure(*ours, "--config-file", options.config_file)
        rounds.append(pair)
        rates = [f"{result['images_per_second']:,.1f}" for result in pair]
        print(f"round {number}: plain {rates[0]} images/s, micronet {rates[1]} images/s", flush=True)

    _, last = rounds[-1]
    print(f"{last['device']}, {last['processes']} process(es), {last['precision']}, batch {last['batch_size']}")
    for name, digits in (("images_per_second", 1), ("peak_memory_mb", 0)):
        for label, results in zip(("plain", "micronet"), zip(*rounds)):
            print(f"{label} {name}: {spread([result[name] for result in results], digits)}")
        print(f"ratio of {name}: {spread([ours[name] / plain[name] for plain, ours in rounds])}")


if __name__ == "__main__":
    main()
