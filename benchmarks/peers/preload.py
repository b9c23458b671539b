"""Imports every peer that can be imported: a process that others are forked from does so once."""

from __future__ import annotations

from benchmarks.peers import FAMILIES

AVAILABLE = [family.NAME for family in FAMILIES if family.why_not("cpu") is None]
