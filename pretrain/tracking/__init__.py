"""Metrics: appended to metrics.jsonl first (the source of truth), shipped to MLflow by background threads afterwards.

    metric_log.py      metrics.jsonl: write, roll back, read               spool.py        a file that survives a full disk
    run_events.py      events.jsonl: configs, code, roll-backs, state      run_tags.py     how MLflow is told of them
    system_metrics.py  system-HOST.jsonl: processor, memory, GPUs          system_spool.py gpu_metrics.py
    shipping.py        what MLflow lacks, once                             mlflow_run.py   the run there, found or created
    shipper.py         the threads of a training run                       artifacts.py    configs, code version, samples

The loop never waits for MLflow. What has been shipped is kept in mlflow.json beside the spools, so a dead server, a kill or a
resume loses nothing and ships nothing twice: `track sync` (or the next start) goes on where shipping stopped.
"""
