"""Check a params file, or print the JSON Schema of params files."""

from __future__ import annotations

import argparse
import sys

from workflow.params import read
from workflow.params.schema import schema_text
from workflow.plugins import ParamsError


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.params", description="Check a params file."
    )
    parser.add_argument("file", nargs="?", default="params.yaml")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of params files"
    )
    args = parser.parse_args(argv)
    if args.schema:
        sys.stdout.write(schema_text())
        return 0
    try:
        experiment = read(args.file)
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    counts = {key: len(getattr(experiment, key)) for key in ("runs", "targets", "tasks")}
    print(f"{args.file}: good ({', '.join(f'{n} {key}' for key, n in counts.items())})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
