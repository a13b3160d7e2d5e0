"""Runs the conformance probes on Thrave, moto, moto with `thrave.moto`, and ministack; writes scripts/conformance.json.

    PYTHONPATH=tests python scripts/probe_conformance.py MINISTACK

MINISTACK is the program of ministack, installed in an environment of its own. `make docs` makes the page from the file.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from support.conformance import doubles
from support.conformance.probes import PROBES, run_probe
from thrave.concurrency import utc_now

RESULTS = Path(__file__).with_name("conformance.json")


def main() -> None:
    """Run every probe on every double, and write the results."""
    ministack = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory(prefix="thrave-conformance-") as name:
        folder = Path(name)
        starts = {
            ("Thrave", version("thrave")): lambda: doubles.thrave(folder),
            ("moto with `thrave.moto`", version("moto")): lambda: doubles.moto_with_thrave(folder / "with-thrave"),
            ("moto", version("moto")): lambda: doubles.moto(folder / "moto"),
            ("ministack", installed_version(ministack)): lambda: doubles.ministack(folder / "ministack", ministack),
        }
        columns = []
        for (double_name, number), start in starts.items():
            with start() as double:
                results = {probe: run_probe(PROBES[probe], double)._asdict() for probe in PROBES}
            columns.append({"name": double_name, "version": number, "results": results})
    probes = {probe: {"area": row.area, "title": row.title} for probe, row in PROBES.items()}
    found = {"date": utc_now().date().isoformat(), "probes": probes, "doubles": columns}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def installed_version(program: Path) -> str:
    """Return the version of ministack in the environment of its program."""
    code = "import importlib.metadata as m; print(m.version('ministack'))"
    return subprocess.check_output([program.with_name("python"), "-c", code], text=True).strip()


if __name__ == "__main__":
    main()
