"""The contract as a pytest class; the only file that imports pytest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_sparse.testing.case import Case, Inapplicable, Make
from lightning_sparse.testing.contract import CHECKS, Check, run_check
from lightning_sparse.testing.toys import Architecture, plain_network

__all__ = ["MethodContract"]


class MethodContract:
    """Subclass this and return your method from `callbacks`; pytest then runs every check of the contract on it.

        class TestMine(MethodContract):
            def callbacks(self):
                return MyMethod(0.9)

    The tests are called `test_contract[2-zeros-adam]` and so on; with several cases, `test_contract[mild-2-zeros-adam]`:

        class TestMine(MethodContract):
            def cases(self):
                return {"mild": lambda: MyMethod(0.5), "wild": lambda: [MyMethod(0.95), Another()]}
    """

    def callbacks(self) -> Callback | Sequence[Callback]:
        """Return new callbacks at every call, one or several; at least one is a `Sparsifier`."""
        raise NotImplementedError(f"{type(self).__name__} must define callbacks() or cases().")

    def cases(self) -> Mapping[str, Make]:
        """Return factories of callbacks, by the name of the case."""
        return {"": self.callbacks}

    def networks(self) -> Mapping[str, Architecture]:
        """Return networks for the toy, by the name of the case; other cases use `testing.plain_network`."""
        return {}

    def checks(self) -> Mapping[str, Check]:
        """Return the checks to run on each case: the contract; a subclass may add to it."""
        return CHECKS

    def exempt(self) -> Mapping[str, str]:
        """Return tests to skip, each with a reason: by "check", or by "case-check" for one of several cases."""
        return {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test for each check of each case."""
        if "check" in metafunc.fixturenames:
            networks = self.networks()
            cases = {name: Case(make, networks.get(name, plain_network)) for name, make in self.cases().items()}
            pairs = [(name, check) for name in cases for check in self.checks()]
            ids = [f"{name}-{check}".lstrip("-") for name, check in pairs]
            metafunc.parametrize(("case", "check"), [(cases[name], check) for name, check in pairs], ids=ids)

    def test_contract(self, case: Case, check: str, request: pytest.FixtureRequest) -> None:
        """Run one check on one case."""
        exempt = self.exempt()
        reason = exempt.get(request.node.callspec.id, exempt.get(check))
        if reason is not None:
            pytest.skip(reason)
        try:
            run_check(check, case, self.checks())
        except Inapplicable as error:
            pytest.skip(str(error))
