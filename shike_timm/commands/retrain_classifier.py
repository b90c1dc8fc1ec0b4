"""Stage two alone, on the trunk and experts of a stage-one checkpoint."""
from typing import Any, Dict, Optional, Sequence

from ..options import parse_retrain_args
from ..runs import load_stage_one, retrain, saved_args


def retrain_classifier(argv: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """Retrain as a command line asks, by default that of the process; gives what `shike_timm.runs.retrain` gives."""
    checkpoint: Dict[str, Any] = {}

    def read(path: str) -> Dict[str, Any]:
        checkpoint.update(load_stage_one(path))
        return saved_args(checkpoint)

    return retrain(parse_retrain_args(argv, read), checkpoint)
