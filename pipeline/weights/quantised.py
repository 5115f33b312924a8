"""Which quantised checkpoints are served: those that transformers can turn back into floats while it converts their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from pipeline.errors import ModelError

QUANTISED = ("fp8", "mxfp4")
"""Values of `quant_method` in a config.json that are served."""


def dequantizer(model: PreTrainedModel, directory: Path) -> Any:
    """transformers' own reader of a quantised checkpoint, set to dequantise; None: the checkpoint is not quantised.

    Raises:
        ModelError: in a format that is not served.
    """
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method")
    if method not in QUANTISED:
        raise ModelError(
            f"{directory}: its weights are quantised with {method!r}, which is not served; "
            f"served are {', '.join(QUANTISED)} and checkpoints that are not quantised"
        )
    config = AutoQuantizationConfig.from_dict(dict(settings))
    config.dequantize = True
    return AutoHfQuantizer.from_config(config, pre_quantized=True)
