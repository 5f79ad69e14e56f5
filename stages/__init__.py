"""One module per stage of dvc.yaml: ``python -m stages.NAME [KEY]``."""

import pipeline.process  # noqa: F401 - before anything that takes time to load; see there
