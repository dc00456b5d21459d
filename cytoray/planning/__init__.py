"""What a job would take: a few slides are really read, the rest is arithmetic with an interval."""

from cytoray.planning.device import DeviceRate, flops_per_tile
from cytoray.planning.estimate import Interval, estimate, share_interval
from cytoray.planning.forecast import Forecast, Work, forecast
from cytoray.planning.measure import MeasureSettings, SlideMeasure, measure_slide
from cytoray.planning.nodes import NodeGroup, parse_nodes
from cytoray.planning.sample import IndexFacts, index_facts, sample_slides, usable_rows
from cytoray.planning.show import cache_line, forecast_lines

__all__ = [
    "DeviceRate",
    "Forecast",
    "IndexFacts",
    "Interval",
    "MeasureSettings",
    "NodeGroup",
    "SlideMeasure",
    "Work",
    "cache_line",
    "estimate",
    "flops_per_tile",
    "forecast",
    "forecast_lines",
    "index_facts",
    "measure_slide",
    "parse_nodes",
    "sample_slides",
    "share_interval",
    "usable_rows",
]
