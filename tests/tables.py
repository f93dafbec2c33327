"""Files of rows, for the tasks on people's own data."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write(file: Path, rows: list[dict]) -> Path:
    """Write rows as .csv, .tsv, .jsonl or .parquet, by the ending of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file
