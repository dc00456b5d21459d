"""What `evaluate` prints and tabulates."""

from __future__ import annotations

from typing import Any

from cytoray.errors import choose
from cytoray.evaluation import METRICS, FewShotRun, few_shot_curve
from cytoray.progress import summary_table
from cytoray.report.evaluation_page import interval_text


def table_row(result: dict[str, Any]) -> dict[str, Any]:
    """A probe as a row of `table.csv`."""
    row = {"encoder": result["encoder"], "probe": result["probe"]}
    for metric, (value, low, high) in result["metrics"].items():
        row |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
    return row


def curves_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of the few-shot curves: mean and t-interval over the seeds."""
    points = []
    for result in results:
        if result["kind"] == "few_shot":
            runs = [
                FewShotRun(**run | {"metrics": {k: _number(v) for k, v in run["metrics"].items()}})
                for run in result["runs"]
            ]
            points += [{"encoder": result["encoder"], **vars(p)} for p in few_shot_curve(runs)]
    return points


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def show(summary: dict[str, Any]) -> None:
    """The table, the comparisons and the facts on the terminal."""
    metric = choose("metric", summary["metric"], METRICS)
    rows = [
        (
            f"{row['encoder']} {row['probe']}",
            ", ".join(
                f"{name} {interval_text(row[name], row[f'{name}_low'], row[f'{name}_high'])}"
                for name in ("accuracy", "macro_f1", "auc")
            ),
        )
        for row in summary["table"]
    ]
    summary_table("test part (95 % CI over groups)", rows)
    pairs = [
        (
            f"{c['first']} - {c['second']} ({c['probe']})",
            f"{c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f}), p {c['p_value']:.4f}, "
            f"Holm {c['p_adjusted']:.4f}",
        )
        for c in summary["comparisons"]
    ]
    if pairs:
        summary_table(f"difference in {metric}, paired over groups", pairs)
    hidden = ("table", "comparisons", "few_shot", "parts", "attention_of")
    summary_table("evaluate", {k: v for k, v in summary.items() if k not in hidden})
