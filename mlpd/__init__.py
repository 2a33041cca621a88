"""mlpd: an ML platform in one daemon: features, models, training, serving, experiments, monitoring."""

__version__ = "0.1.0"
