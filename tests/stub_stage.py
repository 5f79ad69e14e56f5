"""A stage of the real graph that computes nothing: what it writes says what it was made of.

Half of the parameters do not matter, as rounding or a limit that is not reached would have it. ``STUB_SECONDS``, or the
file ``slow-TITLE``, makes it last, and it fails with exit code 4 where the file ``fail-TITLE`` is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline import torn
from pipeline.code import closure, code_digest
from pipeline.journal import Plan
from pipeline.process import die_with_parent


def main(name: str, key: str = "") -> None:
    body, params = YAML(typ="safe").load(Path("dvc.yaml"))["stages"][name], YAML(typ="safe").load(Path("params.yaml"))
    body = body.get("do", body)
    model = params["predictors"].get(key, {}).get("model", "")

    def paths(field: str) -> list[str]:
        entries = [entry if isinstance(entry, str) else next(iter(entry)) for entry in body.get(field, [])]
        return [entry.replace("${key}", key).replace("${item.model}", model) for entry in entries]

    entries = [f"stages/{name}.py", *(dep for dep in paths("deps") if dep.startswith("models/predictors/"))]
    code = code_digest(Path.cwd(), {file for entry in entries for file in closure(Path.cwd(), entry)})
    title = f"{name}@{key}" if key else name
    slow = Path(f"slow-{title}")
    time.sleep(float(slow.read_text() if slow.exists() else os.environ.get("STUB_SECONDS", "0")))
    if Path(f"fail-{title}").exists():
        print("a made-up error\n  what to do: remove the file")
        raise SystemExit(4)
    values = {path: leaf for path, leaf in leaves(pick(params, paths("params"))) if len(path) % 2}
    made_of = {"code": code, "params": values, "deps": [tree(Path(dep)) for dep in paths("deps") if "artifacts" in dep]}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    Plan(title, "videos", made_of, (), time.time()).save(Path(".work") / title / digest)
    for out in [path for field in ("outs", "metrics", "plots") for path in paths(field)]:
        file = Path(out) if Path(out).suffix else Path(out) / "data.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{out} {digest}\n" if file.suffix != ".json" else json.dumps({"made": digest}))


def pick(params: Any, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        node = params
        for part in name.split("."):
            node = node[part]
        found[name] = node
    return found


def leaves(node: Any, where: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(where, node)]
    return [leaf for name, inner in sorted(node.items()) for leaf in leaves(inner, f"{where}.{name}")]


def tree(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(f.as_posix().encode() + f.read_bytes() for f in files if f.is_file())).hexdigest()


if __name__ == "__main__":
    die_with_parent("dvc")
    torn.keep(Path.cwd(), wait=False)
    main(*sys.argv[1:])
