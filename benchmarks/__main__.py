"""Every published number is made by one command.

    python -m benchmarks                              the suites, and what is missing of each
    python -m benchmarks SUITE [--data DIR]           do what is missing of one, or of a group of them
    python -m benchmarks SUITE --quick                small, into a folder that is thrown away, to see that it runs
    python -m benchmarks SUITE --table                print what is there

Results are files in `benchmarks/results`, or in `--out`; what is there is not done again, so to repeat a measurement remove
its file first, or give another folder.
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
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch the data if they are not in that folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder where states of trainings stay, to be gone on from")
    parser.add_argument("--only", nargs="*", default=(), metavar="PATTERN", help="parts that are called like this")
    parser.add_argument("--rounds", type=int, help="how often something is measured, instead of the suite's number")
    parser.add_argument("--epochs", type=int, help="of each training, instead of the suite's, to see that it runs")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="processes that share the work")
    parser.add_argument("--part", default="1/1", help="k/n: be the k-th of n processes that share the work")
    parser.add_argument("--quick", action="store_true", help="small, and nothing is kept")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.suites if name not in SUITES and name not in GROUPS]:
        parser.error(f"no suite {unknown[0]!r}; choose from {', '.join([*SUITES, *GROUPS])}")
    names = [name for word in given.suites for name in GROUPS.get(word, (word,))]
    if given.at_once > 1 and (given.quick or given.only or not all(isinstance(SUITES[n], Trainings) for n in names)):
        parser.error("--at-once is for whole suites of trainings, which take no times; leave it out.")
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
                raise SystemExit(f"{failed} of {len(work)} processes failed, see above; what was finished is kept.")
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
