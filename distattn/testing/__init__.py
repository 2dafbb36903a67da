"""Fake devices, programs compiled and counted, and the float64 reference."""

from distattn._compat import interpreted
from distattn.testing.devices import fake_devices
from distattn.testing.hlo import collective_bytes, collectives
from distattn.testing.programs import Exchange, Report, compile_for, lower

__all__ = [
    "Exchange",
    "Report",
    "collective_bytes",
    "collectives",
    "compile_for",
    "fake_devices",
    "interpreted",
    "lower",
]
