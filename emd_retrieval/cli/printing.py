"""What commands print: a record's table, notes, and where the files are."""

from __future__ import annotations

from pathlib import Path

from emd_retrieval.records import ResultRecord, markdown_table


def print_record(record: ResultRecord, output: Path) -> None:
    """Print a record's summary and the files of its folder."""
    print(f"\n{record.title}\n")
    print(markdown_table(record.table if record.summary is None else record.summary))
    for name, table in list(record.tables.items())[1:]:
        print(f"\n{name}\n\n{markdown_table(table)}")
    print()
    for note in record.notes:
        print(f"- {note}")
    files = ", ".join(sorted(file.name for file in output.iterdir() if file.is_file()))
    print(f"\nwritten to {output}: {files}")
