"""Where a run is tracked."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from pretrain.config import Config


def tracking_uri(config: Config) -> Optional[str]:
    """The MLflow store: what the config says, by default sqlite in the runs' folder; None when switched off."""
    if config.tracking.uri == "none":
        return None
    return config.tracking.uri or f"sqlite:///{Path(config.run.dir).absolute() / 'mlflow.db'}"
