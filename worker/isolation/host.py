"""What one node decided about walls: found once at its start, handed to its supervisors, used for every trainer."""

import json
import os
from dataclasses import replace

import structlog

from tunery.settings import NodeSettings
from worker import inventory
from worker.isolation import probe
from worker.isolation.probe import Found, Wanted
from worker.isolation.walls import Way

log = structlog.get_logger(__name__)

OFF = {"trainer_isolated": False, "network_isolated": False}
_ENVIRONMENT = "TUNERY_ISOLATION_WAYS"


class NotIsolated(Exception):
    """`TUNERY_TRAINER_ISOLATION=require`, and this host does not give what it requires."""


class Ways:
    """How trainers start, and how the program that fetches base models does. None: as any other child."""

    def __init__(self, trainer: Way | None, fetcher: Way | None) -> None:
        self.trainer, self.fetcher = trainer, fetcher

    def environment(self) -> dict[str, str]:
        """For a supervisor's environment: it does not probe again."""
        texts = [way.as_text() if way else None for way in (self.trainer, self.fetcher)]
        return {_ENVIRONMENT: json.dumps(texts)}

    @classmethod
    def inherited(cls, settings: NodeSettings) -> "Ways":
        """In a supervisor: what its node decided; probing afresh if a node of an older version started it."""
        if text := os.environ.get(_ENVIRONMENT):
            return cls(*(Way.from_text(one) if one else None for one in json.loads(text)))
        return decide(settings)[0]


def decide(settings: NodeSettings) -> tuple[Ways, dict[str, object]]:
    """Probe this host. Also what to show of it.

    Raises:
        NotIsolated: a required wall cannot be put up.
    """
    if settings.trainer_isolation == "off":
        log.warning("trainers run without walls", setting="TUNERY_TRAINER_ISOLATION=off")
        return Ways(None, None), {**OFF, "layers": [], "refused": []}
    wanted = _wanted(settings)
    found = probe.find(wanted)
    if settings.trainer_isolation == "require" and (missing := found.missing()):
        raise NotIsolated(_explain(found, missing))
    log.info("trainers run behind walls", how=probe.describe(found.way), isolated=found.isolated)
    for reason in found.refused:
        log.info("a stronger way does not work here", reason=reason)
    return Ways(found.way, _fetcher(found.way, wanted)), found.as_json()


def _wanted(settings: NodeSettings) -> Wanted:
    return Wanted(
        home=settings.home,
        trainer_module=settings.trainer_module,
        uids=settings.trainer_uids,
        cgroups=settings.trainer_cgroups,
        readable=settings.trainer_readable,
        hidden=settings.trainer_hidden,
        cuda_minors=inventory.minors(),
    )


def _fetcher(way: Way, wanted: Wanted) -> Way:
    """The open view: it needs the user's network, certificates and package index, none of the node's secrets."""
    plain = Way(keep_network=True)
    if not (way.processes or way.bubblewrap):
        return plain
    walled = replace(plain, user_namespace=os.geteuid() != 0, processes=True, view="open")
    return plain if isinstance(probe.ask(walled, replace(wanted, cuda_minors=())), str) else walled


def _explain(found: Found, missing: list[probe.Layer]) -> str:
    lines = [f"{layer.name}: {layer.detail}; fix: {layer.fix}" for layer in missing]
    return "; ".join([*lines, *found.refused])
