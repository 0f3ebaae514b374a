"""The parser of the command line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_sparse.cli.hints import explain

__all__ = ["SparseParser"]


class SparseParser(LightningArgumentParser):
    """A parser that reports a problem in one sentence.

    For every class that a configuration names, jsonargparse makes a parser of this kind, which knows its class.
    """

    made_for: type | None = None

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **options: Any) -> Any:
        if nested_key is None:
            self.made_for = theclass
        return super().add_class_arguments(theclass, nested_key, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        said = explain(str(message), list(self.get_defaults().keys()), self.made_for)
        print(f"lightning-sparse: {said}", file=sys.stderr)
        sys.exit(2)
