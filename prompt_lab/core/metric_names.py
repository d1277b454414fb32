"""The names of the metrics, for modules that only name them: ``metrics.py`` needs torch."""

ROW_METRICS = ("ACC", "EM", "QA-F1", "Rouge-L")
LABEL_METRICS = ("Classification-F1", "Matthew-Correlation")
METRICS = (*ROW_METRICS, *LABEL_METRICS, "Pearson-Correlation")
