"""`python -m soak`: the run, its report, and 1 as exit status where something was wrong."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import vlm_spectra as vs
from vlm_spectra_server.spectra_tiny.parts import write_random

from . import cases, report
from .run import Plan, soak

LAYERS = 2
"""Of the model that comes and goes."""


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=2.0, help="minutes")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--worker-kills", type=int, default=3)
    parser.add_argument("--client-kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", default="build/soak.md", help="the report; the JSON lies beside it, in build/")
    options = parser.parse_args()
    plan = Plan(
        seconds=options.minutes * 60,
        warm_up=options.warm_up * 60,
        clients=options.clients,
        processes=options.processes,
        worker_kills=options.worker_kills,
        client_kills=options.client_kills,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        second = write_random(folder / "second", text={"num_hidden_layers": LAYERS})
        models = [vs.HookedVLM.from_pretrained(each, device="cpu") for each in ("spectra-tiny", str(second))]
        expected = cases.expected(*models)
        del models
        outcome = soak(plan, folder, expected, str(second))
        found = report.summary(plan, outcome)
        if found["faults"]:
            kept = Path("build/soak-logs")
            kept.mkdir(parents=True, exist_ok=True)
            for path in folder.rglob("*.log"):
                (kept / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    Path("build").mkdir(exist_ok=True)
    Path("build/soak.json").write_text(json.dumps(found, indent=1))
    Path(options.page).write_text(report.page(found))
    print("\n".join(found["faults"][:20]) or "nothing wrong, nothing lost, nothing left", file=sys.stderr)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
