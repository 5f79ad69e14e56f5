"""One module per stage of dvc.yaml: ``python -m stages.NAME [KEY]``."""
