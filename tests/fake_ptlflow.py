"""A small stand-in for the package ptlflow, written where a Python finds it instead of the real one.

Its `probe` answers with the colours it was given (dx: blue of the first frame, dy: red of the second, both times a
learned `scale`), so that order, range and channels of what arrives can be read off the flows. It talks on standard
output, as libraries do. `trouble` does what the first pixel's red asks for.
"""

from __future__ import annotations

from pathlib import Path

VERSION = "0.4.fake"
_PACKAGE = f'''
import os, sys, time
print("this must not land among the answers", flush=True)
if os.environ.get("FAKE_HANG"):
    time.sleep(120)
__version__ = "{VERSION}"

def get_model_names():
    return ["probe", "probe_large", "trouble"]

def get_model_reference(name):
    from ptlflow.models.probe import probe
    return getattr(probe, name)

def get_model(name, ckpt_path=None, args=None):
    import torch
    if os.environ.get("FAKE_UNBUILDABLE"):
        raise RuntimeError("nothing was to be built")
    model = get_model_reference(name)()
    if ckpt_path is not None:
        model.load_state_dict(torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"])
    return model
'''
_MODELS = """
import os, sys, time
import torch

class probe(torch.nn.Module):
    pretrained_checkpoints = {published}

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seeded = torch.rand(())

    def forward(self, inputs):
        print("nor this")
        here, there = inputs["images"].unbind(1)
        assert not self.training and not torch.is_grad_enabled()
        return {{"flows": self.scale * torch.stack([here[:, 0], there[:, 2]], dim=1)[:, None]}}

class probe_large(probe):
    pretrained_checkpoints = {{}}

class trouble(probe):
    def forward(self, inputs):
        flows = super().forward(inputs)["flows"]
        kind = round(float(inputs["images"][0, 0, 2, 0, 0]) * 255)
        if kind == 1:
            raise RuntimeError("this network takes three frames")
        if kind == 2:
            return {{"flows": flows * float("nan")}}
        if kind == 3:
            return {{"flows": flows[..., 1:]}}
        if kind == 4:
            print("out of memory, says the fake", file=sys.stderr, flush=True)
            os._exit(9)
        if kind == 5:
            time.sleep(120)
        return {{"flows": flows}}
"""
_README = """# Probe

## Code license

See [LICENSE](LICENSE).

## Pretrained weights license

Only for tests.

## Citation
"""


def write(folder: Path, published: dict[str, str] | None = None) -> Path:
    """Write the package below ``folder``, which goes on the path; ``published`` are checkpoint names and addresses."""
    models = folder / "ptlflow/models/probe"
    models.mkdir(parents=True)
    (folder / "ptlflow/__init__.py").write_text(_PACKAGE)
    (folder / "ptlflow/models/__init__.py").touch()
    (models / "__init__.py").touch()
    (models / "probe.py").write_text(_MODELS.format(published=repr(published or {})))
    (models / "README.md").write_text(_README)
    (models / "LICENSE").write_text("\n   Fake Public License\nand so on\n")
    return folder
