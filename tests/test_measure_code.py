"""The figures of scripts/measure_code.py, on a package of a few lines."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_code.py"

MODULES = {
    "__init__.py": "",
    "retry.py": '"""Retries."""\n\nimport threading\n\nthreading.Thread()\n',
    "errors.py": "class Gone(Exception):  # noqa: N818\n    pass\n",
    "store/errors.py": "# Why.\nclass Gone(Exception):\n    limit = 1  # bytes\n",
    "store/client.py": (
        "from thrave import retry\nfrom thrave.errors import Gone\n\n\n"
        "def send():\n    return _once(_twice, _twice)\n\n\n"
        "def _once():\n    pass\n\n\ndef _twice():\n    pass\n"
    ),
}
FIGURES = {
    "modules": "5",
    "lines": "24",
    "modules with a single importer": "2",
    "functions: public / private": "1 / 2",
    "private functions used at one place": "1 = 50%",
    "lines that are only a comment": "1 = 4.2%",
    "lines that end with a comment": "1 = 4.2%",
    "docstring lines": "1 = 4%",
    "noqa marks (N818 alone)": "1 (1)",
    "modules that share a name": "2 (1 names)",
    "modules that share a name, without conventional names": "0 (0 names)",
    "public classes that share a name": "2 (1 names)",
    "threading.Thread( outside concurrency.py": "1 in 1 modules",
}


def test_figures_of_a_small_package(tmp_path):
    for name, source in MODULES.items():
        path = tmp_path / "src" / "thrave" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    output = subprocess.check_output([sys.executable, SCRIPT, tmp_path], text=True)
    figures = {line[:64].strip(): line[65:] for line in output.splitlines()}
    assert FIGURES.items() <= figures.items()
