"""What batches tell beside the answers: whether the predictor has drifted, a trace, if one is to be saved, and a slower way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.batch_result import BatchResult
from pipeline.predicting.trace_parts import TraceParts
from pipeline.prepare import Prepared
from predictor.drift import Drift
from predictor.registry import PredictorSpec, calibration_of


class Watch:
    """Looks at every batch of one run."""

    def __init__(self, prepared: Prepared, output: Path, predictor: PredictorSpec):
        config = prepared.config
        calibration = calibration_of(predictor)
        wide = config.predictor.named(prepared.model.shape.top_k) >= 3 and config.predictor.mass is None
        self._drift = Drift(calibration, wide) if calibration is not None else None
        self._trace = TraceParts(output, prepared.model.shape, predictor.identity) if config.trace.save is not None else None
        self._path, self._batches = Path(config.trace.save or ""), len(prepared.batches)
        self._first = self._batches if config.routing == "hash" else 0  # routers are asked in the second pass only
        self.drifted: str | None = None
        """What was said."""
        self._is_staged = False

    def saw(self, result: BatchResult) -> None:
        if not self._is_staged and result.stats.miss_path != "in_place":
            self._is_staged = True
            tqdm.write(f"experts come through a pinned ring, which is slower; {result.stats.miss_path}")
        if self._trace is not None and result.trace is not None:
            self._trace.add(result.batch, result.trace)
        if self._drift is not None and self.drifted is None:
            self.drifted = self._drift.saw(result.stats.accuracy)
            if self.drifted is not None:
                tqdm.write(self.drifted)

    def finish(self, entries: list[dict[str, Any]]) -> None:
        """
        Args:
            entries: the journal's, of all batches.
        """
        if self._trace is not None:
            rows = {entry["batch"]: [result["index"] for result in entry["results"]] for entry in entries}
            self._trace.finish({batch: rows[batch] for batch in range(self._first, self._first + self._batches)}, self._path)
            print(f"saved the trace: {self._path}", flush=True)
