"""The command line of reports: which files are written, and the exit status."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import ConfigError
from reports import figures, paired, tables
from reports.records import make_records
from reports.runs import Run, find_runs, read_run

DESCRIPTION = "Tables, figures and paired comparisons of the runs below a directory."


def write_report(directory: Path, output: Path) -> None:
    runs = find_runs(directory)
    output.mkdir(parents=True, exist_ok=True)
    records = make_records(runs)
    tables.write_csv(runs, records, output / "report.csv")
    captions = figures.draw_all(records, output)
    text = tables.report_text(runs, records, captions)
    (output / "report.md").write_text(text, encoding="utf-8")
    print(tables.study_table(records), tables.failed_table(runs), sep="\n\n")
    print(f"report: {len(runs)} runs, files in {output}")


def write_paired(directories: list[Path], output: Path, with_margins: bool) -> bool:
    """Returns whether completions at temperature 0 are equal wherever they should be."""
    if len(directories) == 2:
        pairs, alone = [tuple(_read_run(path) for path in directories)], []
    else:
        pairs, alone = paired.find_pairs(find_runs(directories[0]))
        if not pairs:
            names = ", ".join(run.name for run in alone) or "there is no such run"
            raise ConfigError(
                f"'{directories[0]}' holds no run in which tokens are proposed together with a run "
                f"of its plain ensemble: {names}"
            )
    comparisons = [paired.compare(a, b) for a, b in pairs]
    if with_margins and any(comparison.divergences for comparison in comparisons):
        from harness.run import open_engine

        comparisons = paired.add_margins(comparisons, open_engine)
    output.mkdir(parents=True, exist_ok=True)
    paired.pairs_table(comparisons).to_csv(output / "paired.csv", index=False)
    divergences = paired.divergences_table(comparisons)
    divergences.to_csv(output / "divergences.csv", index=False)
    text = paired.text(comparisons, alone)
    (output / "paired.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"report: {len(comparisons)} comparisons, files in {output}")
    return divergences.empty


def _read_run(path: Path) -> Run:
    if not path.is_dir():
        raise ConfigError(f"'{path}' is not a directory; give one that holds a run")
    run = read_run(path, str(path))
    if not run.config or not run.scores:
        raise ConfigError(f"'{path}' holds no samples" + (f": {run.error}" if run.error else ""))
    return run


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report.py", description=DESCRIPTION)
    parser.add_argument(
        "directories", nargs="+", type=Path, help="folders that hold runs, at any depth"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the report; default: report/ in the first directory"
    )
    parser.add_argument(
        "--paired",
        action="store_true",
        help="compare two runs, or each run with its plain ensemble",
    )
    parser.add_argument(
        "--margins",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="if completions differ, run the plain ensemble and report its margins",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if completions differ at temperature 0"
    )
    parsed = parser.parse_args(arguments)
    if len(parsed.directories) > (2 if parsed.paired else 1):
        parser.error("give one directory, or two runs with --paired")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if `--strict` finds completions that differ."""
    parsed = _parse(arguments)
    output = parsed.output or parsed.directories[0] / "report"
    try:
        if not parsed.paired:
            write_report(parsed.directories[0], output)
            return 0
        equal = write_paired(parsed.directories, output, parsed.margins)
        return 0 if equal or not parsed.strict else 1
    except (ConfigError, OSError) as error:
        sys.exit(f"report: {error}")
