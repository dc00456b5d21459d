"""cytoray: from raw cytology whole-slide images to a foundation model and tuned heads, on Ray."""

__version__ = "0.1.0"
