"""Learns from numbers and predicts: scikit-learn."""
