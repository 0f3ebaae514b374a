"""Run the benchmarks. Every published number comes from one command.

    python -m benchmarks                              list all suites, and how many of their parts are done
    python -m benchmarks SUITE [--data DIR]           run the missing parts of a suite, or of a group of suites
    python -m benchmarks SUITE --quick                run a small version to see that it works, and keep no results
    python -m benchmarks SUITE --table                print the results so far

Results are JSON files in `benchmarks/results` or in `--out`. Parts that already have a result are not run again. To repeat a
measurement, delete its file first or give another folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.record import RESULTS, Options, Trainings, at_once
from benchmarks.suites import GROUPS, SUITES


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"one of {', '.join([*SUITES, *GROUPS])}")
    parser.add_argument("--data", default="data", help="folder with the data, in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="download the data if it is not in that folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, from which training runs resume")
    parser.add_argument("--only", nargs="*", default=(), metavar="PATTERN", help="run only parts with a matching label")
    parser.add_argument("--rounds", type=int, help="number of measurements, instead of the suite's own")
    parser.add_argument("--epochs", type=int, help="epochs per training run, instead of the suite's own")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="number of processes that share the work")
    parser.add_argument("--part", default="1/1", help="k/n: run share k of the work, split into n shares")
    parser.add_argument("--quick", action="store_true", help="run a small version and keep no results")
    parser.add_argument("--table", action="store_true", help="only print the results so far")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.suites if name not in SUITES and name not in GROUPS]:
        parser.error(f"no suite {unknown[0]!r}; choose from {', '.join([*SUITES, *GROUPS])}")
    names = [name for word in given.suites for name in GROUPS.get(word, (word,))]
    if given.at_once > 1 and (given.quick or given.only or not all(isinstance(SUITES[n], Trainings) for n in names)):
        parser.error("--at-once is for whole suites of trainings, where times do not matter; leave it out.")
    number, count = map(int, given.part.split("/"))
    with tempfile.TemporaryDirectory() as temporary:
        options = Options(
            data=given.data,
            download=given.download,
            out=Path(temporary) if given.quick else given.out,
            quick=given.quick,
            rounds=given.rounds,
            epochs=given.epochs,
            work=given.work,
            only=given.only,
            part=(number, count),
        )
        for suite in () if names else SUITES.values():
            whole, missing = len(list(suite.parts(options))), len(suite.missing(options))
            print(f"{suite.name:38s} {whole - missing:4d} of {whole:4d} parts are there")
        suites = [SUITES[name] for name in names]
        if given.at_once > 1:
            for suite in suites:
                suite.prepare(options)
            work = [(suite, place) for suite in suites for place in suite.missing(options)]
            if failed := at_once(work, given.at_once, options):
                raise SystemExit(f"{failed} of {len(work)} processes failed, see above; finished parts are kept.")
        for suite in suites:
            if given.at_once == 1 and not given.table:
                suite.run(options)
            if given.table or (isinstance(suite, Trainings) and count == 1):
                print(f"\n{suite.name}\n{suite.table(options.out)}")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch.set_float32_matmul_precision("high")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    main()
