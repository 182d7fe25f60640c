"""The command line of `study report`."""

from __future__ import annotations

from collections.abc import Sequence


def report(arguments: Sequence[str]) -> int:
    """`study report PATH [options]`: writes the report and says where it is. Returns 0, also where parts were refused."""
    from pretrain.arguments import parse, parser_of
    from pretrain.study.report.report import ReportOptions, write_report

    parser = parser_of(f"study report: {(ReportOptions.__doc__ or '').splitlines()[0]}")
    parser.add_argument("path", help="a study's folder in which `study fit` has left fit.json, or such a file")
    parser.add_class_arguments(ReportOptions)
    values = vars(parser.instantiate(parse(parser, "study report", arguments)))
    path = values.pop("path")
    written = write_report(path, ReportOptions(**values))
    print(f"report: {written.folder / 'index.html'}")
    if isinstance(written.recommendation, str):
        print(f"no recommended run: {written.recommendation}")
    else:
        cell = written.recommendation.cell
        print(f"recommended run: {written.folder / 'recommended.yaml'}: N {cell.N:,}, D {cell.D:,}")
    return 0
