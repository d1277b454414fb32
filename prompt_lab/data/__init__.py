"""Data for training: the task table and the few-shot files."""
