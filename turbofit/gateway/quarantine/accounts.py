"""Engine deaths by client, and when a client is refused. Pure, as `suspects`.

It meets requests that are new each time: what kills is never the same twice, who sends it is. A
client is an API key at an address, and the key at all its addresses together, with twice the
budget; without keys it is the address.

- A death counts whole where the client's request was alone at it, or was convicted of it.
- Where others, or equal ones, were beside it nobody knows whose it was: it counts whole for each
  of them (half, where the answer had begun) until that request is answered, or the death explained;
  eight answers of a client make up for one such death.
- Each thousand answers of a client allow one death more: who is behind a busy address or key is
  many, and refusing all of them is worse than a death.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from math import ceil
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

__all__ = ["BUDGET", "BUDGET_SECONDS", "Accounts", "accounts_of"]

#: Deaths in so many seconds; fewer than the six after which a supervisor lets an engine rest.
BUDGET: Final = 4
BUDGET_SECONDS: Final = 3600.0
#: Of a key at all its addresses.
_KEY_BUDGET: Final = 2 * BUDGET
_ANSWERS_A_DEATH: Final = 8
_ANSWERS_A_BUDGET: Final = 1000
_MOST_ACCOUNTS: Final = 16_384
_BEGUN: Final = 0.5


def accounts_of(key: str, address: str) -> tuple[str, ...]:
    """The names under which a client's deaths are counted.

    Args:
        key: of the API key, as it is called in logs; empty where none is needed.
        address: where the client is.
    """
    return (f"{key} {address}", key) if key else (address,)


class _Account:
    """Deaths by the object that stands for each: when, and how much it counts while it is open."""

    __slots__ = ("answers", "before", "budget", "hour", "open", "proved")

    def __init__(self) -> None:
        self.budget = BUDGET
        self.proved: dict[Any, float] = {}
        self.open: dict[Any, tuple[float, float]] = {}
        #: Answers in this hour and in the one before.
        self.hour, self.answers, self.before = 0, 0, 0

    def turn(self, now: float) -> None:
        """Forget what is older than the window."""
        hour, since = int(now // BUDGET_SECONDS), now - BUDGET_SECONDS
        if hour != self.hour:
            self.before = self.answers if hour == self.hour + 1 else 0
            self.hour, self.answers = hour, 0
        self.proved = {death: at for death, at in self.proved.items() if at > since}
        self.open = {death: one for death, one in self.open.items() if one[0] > since}

    @property
    def deaths(self) -> float:
        """How many count against it."""
        doubtful = sum(weight for _, weight in self.open.values())
        made_up = (self.answers + self.before) / _ANSWERS_A_DEATH
        return len(self.proved) + max(0.0, doubtful - made_up)

    @property
    def spent(self) -> bool:
        """Whether it has no death left."""
        more = (self.answers + self.before) // _ANSWERS_A_BUDGET
        return self.deaths >= self.budget + more


class Accounts:
    """All clients' deaths.

    Args:
        clock: as that of `suspects.Suspects`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        #: Whether any death counts against anybody: else nobody need be looked up.
        self._any = False

    def charge(
        self, death: Any, accounts: Iterable[str], *, proved: bool, begun: bool = False
    ) -> None:
        """An engine died with a request of this client.

        Args:
            death: stands for it, however often it is charged.
            accounts: see `accounts_of`.
            proved: whether it is known whose it was.
            begun: whether the request's answer had begun.
        """
        now = self._clock()
        self._any = True
        for number, name in enumerate(accounts):
            account = self._account(name)
            account.budget = _KEY_BUDGET if number else BUDGET
            if proved:
                account.open.pop(death, None)
                account.proved[death] = float(now)
            elif death not in account.proved:
                weight = max(account.open.get(death, (now, 0.0))[1], _BEGUN if begun else 1.0)
                account.open[death] = (now, weight)

    def refund(self, death: Any, accounts: Iterable[str], *, proved: bool = False) -> None:
        """It was not this client's request; ``proved``: what was proved is taken back too."""
        for name in accounts:
            account = self._accounts.get(name)
            if account is not None:
                account.open.pop(death, None)
                if proved:
                    account.proved.pop(death, None)

    def answered(self, accounts: Iterable[str]) -> None:
        """A request of this client was answered to its end."""
        now = self._clock()
        for name in accounts:
            account = self._account(name)
            account.turn(now)
            account.answers += 1

    def seconds_refused(self, accounts: Iterable[str]) -> int:
        """For how long a client is refused, at least; 0 where it is not."""
        if not self._any:
            return 0
        now, longest = self._clock(), 0
        for name in accounts:
            account = self._accounts.get(name)
            if account is None:
                continue
            account.turn(now)
            if account.spent:
                oldest = min((*account.proved.values(), *(at for at, _ in account.open.values())))
                longest = max(longest, ceil(oldest + BUDGET_SECONDS - now))
        return longest

    @property
    def refused(self) -> int:
        """How many clients are refused now."""
        charged = [name for name, one in self._accounts.items() if one.proved or one.open]
        return sum(self.seconds_refused((name,)) > 0 for name in charged)

    def state(self) -> dict[str, tuple[float, ...]]:
        """The deaths that are proved, to be kept."""
        since = self._clock() - BUDGET_SECONDS
        kept = {
            name: tuple(sorted(at for at in one.proved.values() if at > since))
            for name, one in self._accounts.items()
        }
        return {name: times for name, times in kept.items() if times}

    def merge(self, saved: Mapping[str, tuple[float, ...]]) -> None:
        """Take over what was kept."""
        for name, times in saved.items():
            account = self._account(name)
            for at in (Counter(times) - Counter(account.proved.values())).elements():
                account.proved[object()] = at
                self._any = True

    def newest(self, name: str) -> float:
        """When a client's last death was."""
        account = self._accounts.get(name) or _Account()
        return max((*account.proved.values(), *(at for at, _ in account.open.values())), default=0)

    def forget(self, name: str, until: float) -> bool:
        """A person pardons a client: deaths up to then do not count; whether any did."""
        account = self._accounts.get(name)
        if account is None:
            return False
        before = len(account.proved) + len(account.open)
        account.proved = {one: at for one, at in account.proved.items() if at > until}
        account.open = {one: found for one, found in account.open.items() if found[0] > until}
        return len(account.proved) + len(account.open) < before

    def _account(self, name: str) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = _Account()
            while len(self._accounts) > _MOST_ACCOUNTS:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(name)
        return account
