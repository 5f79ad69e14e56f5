"""The temporal models, one file each; `models.predictor` holds their contract and finds them here by name."""
