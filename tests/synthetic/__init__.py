"""Tests of the synthetic slides."""
