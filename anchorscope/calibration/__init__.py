"""From profiles to anchors.json: the groups and the theta of every head (docs/calibrate.md)."""

from __future__ import annotations

from anchorscope.calibration.request import CalibrateRequest, CalibrationPlan
from anchorscope.calibration.run import Calibration, calibrate, plan_calibration
from anchorscope.calibration.sources import parse_groups

__all__ = ["CalibrateRequest", "Calibration", "CalibrationPlan", "calibrate", "parse_groups", "plan_calibration"]
