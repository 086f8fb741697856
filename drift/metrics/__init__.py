"""Measures of samples, reconstructions and speed."""
