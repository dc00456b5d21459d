"""A forecast in words."""

from __future__ import annotations

from collections.abc import Sequence

from cytoray.planning.estimate import Interval
from cytoray.planning.forecast import Forecast, Work
from cytoray.planning.measure import SlideMeasure
from cytoray.planning.nodes import NodeGroup, price_per_hour
from cytoray.progress import duration


def forecast_lines(
    result: Forecast,
    work: Work,
    measured: Sequence[SlideMeasure],
    nodes: Sequence[NodeGroup],
) -> dict[str, str]:
    """What is shown of a forecast, name and value; what is only a bound says so."""
    at_least = "at least " if result.is_bound else ""
    rows = {
        "slides": f"{work.num_slides:,}, of which {len(measured)} were read",
        "quarantined": shown(result.quarantined.scaled(100), "%"),
        "tiles": shown(result.tiles),
        "nuclei": shown(result.nuclei),
        "tiles processed": shown(result.tiles_processed),
        "read from storage": shown(result.bytes_read.scaled(1e-9), "GB"),
    }
    for stage in result.stages:
        text = f"{stage.ms_per_tile:,.2f} ms a tile, {stage.tiles_per_s_core:,.0f} tiles/s a core"
        rows[f"CPU: {stage.name}"] = text
    rows["reading CPUs"] = f"{result.reader_cpus:,}"
    if result.gpu is not None and result.cores_to_feed_gpus is not None:
        most = "at most " if result.is_bound else ""
        rows["GPU"] = f"{most}{result.gpu.tiles_per_s:,.0f} tiles/s each ({result.gpu.what})"
        rows["cores to feed the GPUs"] = f"{most}{result.cores_to_feed_gpus:,.1f}"
    sure = not result.is_bound or result.bottleneck == "GPU"
    rows["bottleneck"] = result.bottleneck + ("" if sure else ", if the GPUs reached their bound")
    rows["hours"] = f"{at_least}{shown(result.hours)} ({duration(3600 * result.hours.value)})"
    rows["cost"] = f"{at_least}{shown(result.cost)}, at {price_per_hour(nodes):,.2f} an hour"
    rows["object store"] = f"{result.object_store_bytes / 1e9:,.2f} GB on all nodes together"
    for slide in measured:
        if slide.reason:
            rows[f"refused: {slide.slide_id}"] = f"{slide.message} [{slide.reason}]"
    return rows


def cache_line(remote_bytes: float, cache_bytes: int, job: str) -> str:
    """What becomes of slides that are staged to the nodes' caches.

    Args:
        remote_bytes: size of all remote slides together.
        cache_bytes: what a node's cache may hold.
        job: what is planned.
    """
    text = f"{remote_bytes / 1e9:,.1f} GB of remote slides, {cache_bytes / 1e9:,.1f} GB on a node"
    if remote_bytes <= cache_bytes:
        return f"{text}: each node fetches a slide once at the most"
    if job != "pretrain":
        return f"{text}: slides go when they are done, each is fetched once by each of its readers"
    return (
        f"{text}: slides are read in mixed order, so they are fetched again and again; raise "
        "CYTORAY_CACHE_GB, use --cache-tiles, or copy them near the nodes"
    )


def shown(interval: Interval, unit: str = "") -> str:
    """`1,234 (1,100 to 1,400)`, with the unit behind."""
    unit = f" {unit}" if unit else ""
    if interval.low is None or interval.high is None:
        return f"{_digits(interval.value)}{unit} (one slide: no interval)"
    if interval.low == interval.high:
        return f"{_digits(interval.value)}{unit}"
    ends = f"{_digits(interval.low)} to {_digits(interval.high)}"
    return f"{_digits(interval.value)}{unit} ({ends})"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
