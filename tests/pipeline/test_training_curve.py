"""The picture of a training."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from pipeline.predicting.training_curve import training_curve
from predictor.checkpoint import Epoch


@pytest.mark.parametrize("epochs", [0, 1, 7])
def test_is_a_whole_svg_with_a_point_for_every_epoch_on_every_curve(epochs):
    history = [Epoch(4.0 - i / 10, 0.5 + i / 20, 0.8 + i / 50) for i in range(epochs)]
    root = ElementTree.fromstring(training_curve(history))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    lines = [path.get("d") for path in root.iter(f"{space}path")]
    dots = list(root.iter(f"{space}circle"))
    assert len(lines) == (3 if epochs > 1 else 0) and len(dots) == (3 if epochs == 1 else 0)
    assert all(line.count("L") == epochs - 1 for line in lines)
