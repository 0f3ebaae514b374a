"""Run the missing parts of all suites of trainings in the background, in order of value.

    setsid nohup nice -n 19 python -m benchmarks.queue --data DIR --work DIR --stop FILE > LOG 2>&1 &
    touch FILE      the training finishes its step, leaves its state and waits
    rm FILE         it goes on
    kill PID        the same, and ends; the same command goes on from there (after `kill -9` from one of the last epochs)
    python -m benchmarks.queue --list

It runs at the lowest priority. Results go into `benchmarks/results` as they come, one training after the other; states of
trainings into `--work`. A suite whose data are missing, or whose results are of another version, is left out with its
reason; a training that fails is told, and the next one begins. Costs are not measured here: nothing that takes times may
run beside anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.record import RESULTS, Options, Suite
from benchmarks.suites import QUEUE
from benchmarks.trainers import wait_while


def waiting(options: Options, suites: Sequence[Suite]) -> Iterator[tuple[Suite, int]]:
    """The missing parts of suites that can be run, the first suites first."""
    for suite in suites:
        missing = suite.missing(options)
        try:
            suite.prepare(options) if missing else None
        except SystemExit as error:
            print(f"{suite.name} is left out: {error}", flush=True)
            continue
        yield from ((suite, place) for place in missing)


def run(options: Options, suites: Sequence[Suite]) -> int:
    """Do them all; how many failed."""
    failed = 0
    for suite, place in waiting(options, suites):
        wait_while(options.stop)
        count = len(list(suite.parts(options)))
        print(f"{datetime.now():%m-%d %H:%M} {suite.name}, {place + 1} of {count}", flush=True)
        try:
            suite.run(replace(options, part=(place + 1, count)))
        except Exception:
            failed += 1
            print(traceback.format_exc(), flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="only these, in this order")
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of the states of trainings, instead of that of the results")
    parser.add_argument("--stop", type=Path, metavar="FILE", help="wait while it is there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="of each training, instead of the suite's, to see that it runs")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    given = parser.parse_args(arguments)
    known = {suite.name: suite for suite in QUEUE}
    if unknown := [name for name in given.suites if name not in known]:
        parser.error(f"no suite {unknown[0]!r}; choose from {', '.join(known)}")
    options = Options(data=given.data, out=given.out, epochs=given.epochs, work=given.work, stop=given.stop)
    suites = [known[name] for name in given.suites or known]
    if given.list:
        for suite in suites:
            whole, missing = len(list(suite.parts(options))), len(suite.missing(options))
            print(f"{suite.name:38s} {whole - missing:4d} of {whole:4d} parts are there")
        return
    os.nice(19)
    torch.set_num_threads(given.threads)
    if failed := run(options, suites):
        raise SystemExit(f"{failed} trainings failed, see above; the same command tries them again.")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    main()
