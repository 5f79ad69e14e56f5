"""``clevrcast doctor [CHECK ...]``: can this machine and this workspace do the work, and if not, what to do.

One line per check; the command ends with 1 if one is bad. It changes nothing, locks nothing of DVC's, and answers in
ten seconds: checks that hang or take their process along are bad. It loads nothing but the standard library before the
checks do: where packages are missing and `clevrcast` itself cannot start, ``python -m stages.doctor`` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import health_devices, health_locks, health_machine, health_packages, health_server, health_workspace
from pipeline.health import SECONDS, Check, Line, as_json, look_at, serve, show, worst
from pipeline.process import die_with_parent
from stages import doctor_models

CHECKS = (
    Check("python", health_packages.python),
    Check("command", health_packages.command),
    Check("packages", health_packages.packages),
    Check("tested versions", health_packages.tested),
    Check("extras", health_packages.extras),
    Check("conflicts", health_packages.conflicts),
    Check("devices", health_devices.devices, apart="torch"),
    Check("devices asked for", health_devices.asked_for, apart="torch"),
    Check("torchvision", health_packages.torchvision, apart="torch"),  # last: it takes as long again to load
    Check("codecs", doctor_models.codecs, apart="codecs"),
    Check("weights", doctor_models.weights, apart="weights"),
    Check("environment", health_machine.environment),
    Check("disk", health_machine.free_space),
    Check("hard links", health_machine.hard_links),
    Check("file locks", health_machine.file_locks),
    Check("memory", health_machine.memory),
    Check("limits", health_machine.limits),
    Check("checkout", health_workspace.checkout),
    Check("writable", health_workspace.can_be_written),
    Check("git", health_workspace.git),
    Check("params.yaml", health_workspace.params),
    Check("dvc.yaml", health_workspace.graph),
    Check("dvc.lock", health_workspace.lock_file),
    Check("DVC settings", health_workspace.dvc_settings),
    Check("at work", health_locks.at_work),
    Check("DVC lock", health_locks.dvc_lock),
    Check("DVC paths", health_locks.dvc_paths),
    Check("Prefect server", health_server.prefect_server),
    Check("quarantine", health_workspace.quarantine),
    Check("unfinished", health_workspace.unfinished),
)


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing is bad; 1: something is; 2: no such check."""
    arguments = _parser().parse_args(argv)
    root, known = Path.cwd(), {check.name: check for check in CHECKS}
    if unknown := [name for name in arguments.checks if name not in known]:
        print(f"there is no check {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    checks = [known[name] for name in arguments.checks] or list(CHECKS)
    if arguments.apart:
        die_with_parent()
        serve(checks, root, sys.stdout)
        return 0
    if arguments.trace:
        lines = [Line(check.name, finding) for check in checks for finding in check.look(root)]
    else:
        lines = look_at(checks, root, arguments.seconds)
    if arguments.json:
        print(as_json(lines))
    else:
        show(lines)
    return int(worst(lines) == "bad")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clevrcast doctor", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="by the name in the table; none: all")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--trace", action="store_true", help="in this process, with the traceback of what fails")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"to wait for all checks (default {SECONDS:g})")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
