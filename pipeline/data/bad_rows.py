"""Rows that are left out: counted by reason, and no more of them than a share."""

import re
from collections import Counter

from pipeline.data.files import DataError
from pipeline.runtime.console import print_main

FIRST_LOOK = 1_000  # rows after which the share is looked at while reading: a stream may not end


class BadRows:
    """The rows of one source that are left out."""

    def __init__(self, source: str, most: float) -> None:
        self.source, self.most = source, most
        self.used = 0
        self.reasons = Counter[str]()
        self.first: dict[str, DataError] = {}

    def use(self) -> None:
        self.used += 1

    def drop(self, where: str, error: DataError) -> None:
        """Counts one; DataError where they are more than their share of at least FIRST_LOOK rows."""
        reason = reason_of(where, error)
        self.reasons[reason] += 1
        self.first.setdefault(reason, error)
        if self.used + self.reasons.total() >= FIRST_LOOK:
            self.check_share()

    def finish(self) -> None:
        """Says how many there were and why. DataError where they are more than their share, or all."""
        if not self.used:
            raise DataError(
                f"{self.source}: no row of it can be used; the first: {next(iter(self.first.values()), None)}"
            )
        self.check_share()
        if self.reasons:
            print_main(f"{self.source}: left out: {self.describe()}")

    def check_share(self) -> None:
        if self.reasons.total() > self.most * (self.used + self.reasons.total()):
            raise DataError(
                f"{self.source}: {self.describe()}; that is more than max_bad_rows = {self.most:g} of them: "
                "mend the rows, or name their columns by --columns, or raise max_bad_rows"
            )

    def describe(self) -> str:
        """How many rows cannot be used, and the commonest reason."""
        dropped = self.reasons.total()
        reason, times = self.reasons.most_common(1)[0]
        return (
            f"{dropped:,} of {self.used + dropped:,} rows cannot be used, {times:,} of them for this reason: "
            f"{self.first[reason]}"
        )


def reason_of(where: str, error: DataError) -> str:
    """The error without its row, numbers and values, so that those of one kind are counted together."""
    text = str(error).removeprefix(f"{where}: ")
    return re.sub(r"\d+", "0", re.split(r"(?<=, got )|(?<= roles are )|(?<=it has )|(?<= contradicts )", text)[0])
