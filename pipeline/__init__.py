"""Orchestration: parameters, stage entry, shards, the DAG and the command line. Knows no model and no data format."""
