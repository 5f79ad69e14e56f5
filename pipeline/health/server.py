"""Whether servers answer: Prefect's, where one is named, and those that weights would come from."""

from __future__ import annotations

import base64
import json
import os
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.health.checks import Finding, bad, good, one_line, warning
from pipeline.health.packages import installed

PATIENCE = 3.0
"""Seconds that a server may take."""


@dataclass(frozen=True)
class Answer:
    """``status`` is HTTP's, 0 where there was no answer at all; ``text`` the body then the reason."""

    status: int
    text: str


def prefect_server(root: Path) -> Iterator[Finding]:
    """The server that runs are shown on: named by the environment, or by the active profile of Prefect."""
    version = installed("prefect")
    if version is None:
        return  # said by another check
    url, variable = os.environ.get("PREFECT_API_URL", ""), True
    if not url:
        url, variable = _profile().get("PREFECT_API_URL", ""), False
    if not url:
        yield good("PREFECT_API_URL is not set: with --prefect a temporary server is started when needed")
        return
    url, whose = url.rstrip("/"), "PREFECT_API_URL" if variable else "the PREFECT_API_URL of Prefect's profile"
    unset = "unset PREFECT_API_URL" if variable else "prefect config unset PREFECT_API_URL"
    answer = ask(f"{url}/health", headers=_credentials())
    if answer.status in (401, 403):
        yield bad(f"{url} does not let us in ({answer.status})", "set PREFECT_API_KEY, or PREFECT_API_AUTH_STRING")
    elif answer.status != 200:
        why = f"HTTP {answer.status}" if answer.status else answer.text
        remedy = f"start it (`prefect server start`), mend PREFECT_API_URL (it ends in /api), or go on without: {unset}"
        # A profile counts with --prefect only.
        yield (bad if variable else warning)(f"{whose} is {url}, which does not answer: {why}", remedy)
    else:
        yield _versions(url, version)


def answers(url: str) -> bool:
    """Whether a Prefect server answers at the address of an API."""
    answer = ask(f"{url.rstrip('/')}/health", headers=_credentials())
    return answer.status == 200 and answer.text.strip() == "true"


def _versions(url: str, ours: str) -> Finding:
    answer = ask(f"{url}/admin/version", headers=_credentials())
    try:
        theirs = str(json.loads(answer.text)) if answer.status == 200 else ""
        mine, its = ([int(part) for part in version.split(".")[:3]] for version in (ours, theirs))
    except ValueError:  # Prefect Cloud has no version, and not every version is three numbers
        return good(f"{url} answers; this is Prefect {ours}")
    if mine[0] != its[0]:
        return bad(
            f"{url} is Prefect {theirs}, this is {ours}: they do not understand each other", "use one of one version"
        )
    if its < mine:
        return warning(
            f"{url} is Prefect {theirs}, older than {ours} here", f"pip install prefect=={ours} at the server"
        )
    return good(f"{url} answers: Prefect {theirs}, this is {ours}")


def _profile() -> Mapping[str, str]:
    """Settings of the active profile, as `prefect config set` keeps them."""
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    file = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    if not file.exists():
        return {}
    body = tomllib.loads(file.read_text())
    return body.get("profiles", {}).get(os.environ.get("PREFECT_PROFILE") or body.get("active", ""), {})


def _credentials() -> dict[str, str]:
    if user := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
    key = os.environ.get("PREFECT_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def ask(url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
    """What a server says within `PATIENCE`; also a name that cannot be looked up takes no longer."""
    answers: list[Answer] = []

    def fetch() -> None:
        request = urllib.request.Request(url, method=method, headers=dict(headers or {}))  # noqa: S310 - as configured
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:  # noqa: S310
                answers.append(Answer(response.status, response.read(10_000).decode(errors="replace")))
        except urllib.error.HTTPError as error:
            answers.append(Answer(error.code, one_line(str(error.reason))))
            error.close()
        except (OSError, ValueError) as error:
            answers.append(Answer(0, one_line(str(getattr(error, "reason", error)))))

    if not url.startswith(("http://", "https://")):
        return Answer(0, "it is no http address")
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(PATIENCE + 0.5)
    return answers[0] if answers else Answer(0, f"no answer within {PATIENCE:g} s")
