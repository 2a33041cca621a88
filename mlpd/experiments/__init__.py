"""Experiment engine: assignment, exposures, outcomes, confidence sequences, sample ratio checks."""
