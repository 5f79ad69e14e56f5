"""``clevrcast doctor [CHECK ...]``: can this machine and this workspace do the work, and if not, what to do.

One line per check; the command ends with 1 if one is bad. It changes nothing, locks nothing of DVC's, and answers
within half a minute: checks that hang or take their process along are bad. It loads nothing but the standard library
before the checks do: where packages are missing and `clevrcast` itself cannot start, ``python -m stages.doctor`` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.health import devices, locks, machine, packages, server, workspace
from pipeline.health.checks import SECONDS, Check, Line, as_json, look_at, serve, show, worst
from pipeline.process import die_with_parent
from stages import doctor_models

CHECKS = (
    Check("python", packages.python),
    Check("command", packages.command),
    Check("packages", packages.packages),
    Check("tested versions", packages.tested),
    Check("extras", packages.extras),
    Check("conflicts", packages.conflicts),
    Check("devices", devices.devices, apart="torch"),
    Check("devices asked for", devices.asked_for, apart="torch"),
    Check("torchvision", packages.torchvision, apart="torch"),  # last: it takes as long again to load
    Check("codecs", doctor_models.codecs, apart="codecs"),
    Check("weights", doctor_models.weights, apart="weights"),
    Check("environment", machine.environment),
    Check("disk", machine.free_space),
    Check("hard links", machine.hard_links),
    Check("file locks", machine.file_locks),
    Check("memory", machine.memory),
    Check("limits", machine.limits),
    Check("checkout", workspace.checkout),
    Check("writable", workspace.can_be_written),
    Check("git", workspace.git),
    Check("params.yaml", workspace.params),
    Check("dvc.yaml", workspace.graph),
    Check("dvc.lock", workspace.lock_file),
    Check("DVC settings", workspace.dvc_settings),
    Check("at work", locks.at_work),
    Check("DVC lock", locks.dvc_lock),
    Check("DVC paths", locks.dvc_paths),
    Check("Prefect server", server.prefect_server),
    Check("quarantine", workspace.quarantine),
    Check("unfinished", workspace.unfinished),
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
