"""What each project and organization has been given, as the database would know it."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tunery.contracts.scheduling import Standing, Tenant


@dataclass(slots=True)
class _Account:
    view: Tenant
    service: float
    """Up to `at`."""
    at: float
    active: bool
    rate: float = 0.0
    credit: float = 0.0
    """Of that service, what waking up cost."""

    def advance(self, now: float) -> None:
        self.service += self.rate * (now - self.at)
        self.at = now


class Accounts:
    """Of the projects, or of the organizations."""

    def __init__(self, tenants: Iterable[Tenant], now: float) -> None:
        self._all = {one.id: _Account(one, one.service, now, one.active) for one in tenants}

    def know(self, tenant_id: uuid.UUID, organization_id: uuid.UUID, now: float) -> None:
        """One that the first snapshot did not have weighs 1."""
        if tenant_id not in self._all:
            self._all[tenant_id] = _Account(Tenant(tenant_id, organization_id), 0.0, now, False)

    def accrue(self, tenant_id: uuid.UUID, rate: float, now: float) -> None:
        """From now on, so much more a second."""
        account = self._all[tenant_id]
        account.advance(now)
        account.rate += rate

    def refund(self, tenant_id: uuid.UUID, cost: float) -> None:
        self._all[tenant_id].service -= cost

    def stand(self, standings: Iterable[Standing]) -> None:
        """What a pass left of them."""
        for one in standings:
            if (account := self._all.get(one.id)) is not None:
                account.service += one.credit
                account.credit += one.credit
                account.active = one.active

    def service(self, tenant_id: uuid.UUID, now: float) -> float:
        account = self._all[tenant_id]
        account.advance(now)
        return account.service

    def credit(self, tenant_id: uuid.UUID) -> float:
        return self._all[tenant_id].credit

    def tenants(self, now: float) -> tuple[Tenant, ...]:
        return tuple(
            replace(account.view, service=self.service(tenant_id, now), active=account.active)
            for tenant_id, account in self._all.items()
        )
