"""Run the missing parts of all training suites in the background, most important first.

    setsid nohup nice -n 19 python -m benchmarks.queue --data DIR --work DIR --stop FILE > LOG 2>&1 &
    touch FILE      pause: the current run finishes its step, saves its state and waits
    rm FILE         continue
    kill PID        finish the step, save the state and exit; the same command resumes from there (after `kill -9`, from one
                    of the last epochs)
    python -m benchmarks.queue --list

The queue has the lowest priority and does one training run after the other. On several cores, start the same command several
times: small networks train faster side by side than on several threads, and no part is run twice. Results are written to
`benchmarks/results` as they come, and checkpoints to `--work`. A suite is left out, with the reason, if its data is missing
or its results are from another version. If a run fails, its error is printed and the next run starts. Costs are not measured
here, because timing needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.record import RESULTS, Options, Suite
from benchmarks.suites import QUEUE
from benchmarks.trainers import wait_while


def waiting(options: Options, suites: Sequence[Suite]) -> Iterator[tuple[Suite, int]]:
    """The missing parts of all suites that can run, in the order of the suites."""
    for suite in suites:
        missing = suite.missing(options)
        try:
            suite.prepare(options) if missing else None
        except SystemExit as error:
            print(f"{suite.name} is left out: {error}", flush=True)
            continue
        yield from ((suite, place) for place in missing)


@contextmanager
def reserved(options: Options, suite: Suite, place: int) -> Iterator[bool]:
    """Whether a part is for this process: no other process is running it, and it is still missing."""
    folder = options.work or options.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite.name}-{place + 1}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield place in suite.missing(options)
        finally:
            path.unlink(missing_ok=True)


def run(options: Options, suites: Sequence[Suite]) -> int:
    """Run all missing parts that no other process is running, and return the number of failures."""
    failed = 0
    for suite, place in waiting(options, suites):
        wait_while(options.stop)
        with reserved(options, suite, place) as mine:
            if not mine:
                continue
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
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="run only these suites, in this order")
    parser.add_argument("--data", default="data", help="folder with the data, in torchvision's layout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, instead of the one for the results")
    parser.add_argument("--stop", type=Path, metavar="FILE", help="pause while this file exists")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="epochs per training run, instead of the suite's own")
    parser.add_argument("--list", action="store_true", help="only print how many parts are done")
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
        raise SystemExit(f"{failed} training runs failed, see above; run the same command to retry them.")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    main()
