"""Fuzzes code that reads untrusted input, with atheris.

    python scripts/fuzz.py --seconds 600 TARGET      one target of tests/support/fuzz_targets.py, or `all`
    python scripts/fuzz.py --input FILE TARGET       one input again

`all` gives each target an equal share of the time. The run ends with status 1 at an input that raises another error
than Thrave's, takes five seconds, or takes a gigabyte of memory; the input is stored in .cache/fuzz/TARGET. Inputs that
increase the coverage are stored there as well, and are the start of the next run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
STORED = ROOT / ".cache" / "fuzz"
LIMITS = ("-timeout=5", "-rss_limit_mb=1024", "-max_len=16384", "-print_final_stats=1")

sys.path.insert(0, str(ROOT / "tests"))
with atheris.instrument_imports(include=["thrave"]):
    from support.fuzz_targets import TARGETS


def main() -> int:
    """Fuzz one target in this process, or each target in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--input", type=Path, help="try only this file")
    parser.add_argument("target", choices=[*TARGETS, "all"])
    arguments = parser.parse_args()
    if arguments.target == "all":
        share = str(max(1, arguments.seconds // len(TARGETS)))
        runs = [subprocess.run([sys.executable, __file__, "--seconds", share, name], check=False) for name in TARGETS]
        return max(run.returncode != 0 for run in runs)
    if arguments.input:
        TARGETS[arguments.target].take(arguments.input.read_bytes())
        return 0
    return fuzz(arguments.target, arguments.seconds)


def fuzz(name: str, seconds: int) -> int:
    """Fuzz for some time; libFuzzer then ends the process."""
    found, corpus = STORED / name, STORED / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].corpus):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [*LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={found}/", str(corpus)]
    atheris.Setup([sys.argv[0], *options], TARGETS[name].take)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
