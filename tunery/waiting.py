"""Why a job waits, in words: each code of the policy's has one sentence, filled with the numbers of the moment.

code                            its numbers, all optional; times are seconds since the epoch
too_large                       largest (bytes of the largest device), most (devices on one node that would do)
no_such_place                   wanted: "h100-80gb, rack=b"
unavailable                     nodes, why: "1 cordoned, 2 silent"
blocked                         why
project_cap, organization_cap   used, cap: rates
running_limit                   running, most
busy                            busy, total, ahead, free_at
fragmented                      free, most (on one node), free_at
no_slot                         busy, total
reserved                        until, limit_s: with that limit it would be let in
holds, preempting               by
behind                          depth, ahead
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from tunery.contracts.scheduling import JobView, Reason, WaitCode, shape

GIB = 1 << 30
Numbers = Mapping[str, Any]


def message(reason: Reason, job: JobView) -> str:
    """For the job's owner. Other projects' jobs are counted, never named."""
    return _SENTENCES[reason.code](_need(job), dict(reason.numbers))


def reason_of(told: Mapping[str, Any], job: JobView) -> Reason | None:
    """What the scheduler last said of this job to its project (`queue_views.reasons`); None if it has not yet."""
    own = told.get("jobs", {}).get(str(job.id))
    known = own or told.get("shapes", {}).get(shape(job, told.get("sizes", ())))
    if known is None or known.get("code") not in set(WaitCode):
        return None
    return Reason(WaitCode(known["code"]), tuple(known.get("numbers", {}).items()))


# ---- sentences --------------------------------------------------------------------------------------------------


def _no_node(need: str, _numbers: Numbers) -> str:
    return f"{need}; no node is up that has room on its disk"


def _too_large(need: str, numbers: Numbers) -> str:
    if numbers.get("most"):
        return f"{need} on one node, but no node has more than {_count(numbers['most'], 'such device')}"
    largest = (
        f"the largest device that is up has {_gib(numbers['largest'])}" if "largest" in numbers else "none has that"
    )
    return f"{need} on one node, but {largest}"


def _no_such_place(need: str, numbers: Numbers) -> str:
    return f"{need}; no node has {numbers.get('wanted') or 'the class and the labels that it asks for'}"


def _unavailable(need: str, numbers: Numbers) -> str:
    nodes = _count(numbers["nodes"], "node") if "nodes" in numbers else "the nodes"
    takes = "takes" if numbers.get("nodes") == 1 else "take"
    why = f": {numbers['why']}" if numbers.get("why") else ""
    return f"{need}; {nodes} that could run it {takes} no work now{why}"


def _blocked(_need: str, numbers: Numbers) -> str:
    return f"none of your project's jobs may start: {numbers.get('why') or 'it is blocked'}"


def _cap(whose: str) -> "Sentence":
    def sentence(need: str, numbers: Numbers) -> str:
        if "used" not in numbers or "cap" not in numbers:
            return f"{need}; your {whose} uses all the GPUs that it may use at once"
        used, cap = _amount(numbers["used"]), _amount(numbers["cap"])
        return f"{need}; your {whose} uses {used} of the {cap} GPUs that it may use at once"

    return sentence


def _running_limit(_need: str, numbers: Numbers) -> str:
    if "most" not in numbers:
        return "your project has as many running jobs as it may have"
    return f"your project has {numbers.get('running', numbers['most'])} of at most {numbers['most']} running jobs"


def _busy(need: str, numbers: Numbers) -> str:
    ahead = (
        f" and {_count(numbers['ahead'], 'waiting job')} {_are(numbers['ahead'])} ahead" if "ahead" in numbers else ""
    )
    return f"{need}; {_how_busy(numbers)}{ahead}{_free_at(numbers)}"


def _fragmented(need: str, numbers: Numbers) -> str:
    free = f"{_count(numbers['free'], 'suitable device')} are free" if "free" in numbers else "enough devices are free"
    most = f", at most {numbers['most']} on one" if "most" in numbers else ", but not on one"
    return f"{need} on one node; {free}{most}{_free_at(numbers)}"


def _no_slot(need: str, numbers: Numbers) -> str:
    return f"{need}; {_how_busy(numbers)}, and the nodes of the others run as many attempts as they may"


def _reserved(need: str, numbers: Numbers) -> str:
    until = f" until {_clock(numbers['until'])}" if numbers.get("until") else ""
    limit_s = numbers.get("limit_s")
    shorter = f"; with a time limit of {_span(limit_s)} it would be let in before" if limit_s else ""
    return f"{need}; the free devices are kept for a job ahead of it{until}{shorter}"


def _holds(need: str, numbers: Numbers) -> str:
    return f"it is next: {need.removeprefix('needs ')} are kept for it{_by(numbers)}"


def _preempting(_need: str, numbers: Numbers) -> str:
    return f"it is next: others are saving checkpoints to make room for it{_by(numbers)}"


def _behind(_need: str, numbers: Numbers) -> str:
    ahead = f"{_count(numbers['ahead'], 'job')} of your project" if "ahead" in numbers else "jobs of your project"
    depth = f" (of each project the scheduler looks at the first {numbers['depth']})" if "depth" in numbers else ""
    return f"{ahead} {_are(numbers.get('ahead', 2))} ahead of it{depth}"


Sentence = Callable[[str, Numbers], str]

_SENTENCES: dict[WaitCode, Sentence] = {
    WaitCode.NO_NODE: _no_node,
    WaitCode.TOO_LARGE: _too_large,
    WaitCode.NO_SUCH_PLACE: _no_such_place,
    WaitCode.UNAVAILABLE: _unavailable,
    WaitCode.BLOCKED: _blocked,
    WaitCode.PROJECT_CAP: _cap("project"),
    WaitCode.ORGANIZATION_CAP: _cap("organization"),
    WaitCode.RUNNING_LIMIT: _running_limit,
    WaitCode.BUSY: _busy,
    WaitCode.FRAGMENTED: _fragmented,
    WaitCode.NO_SLOT: _no_slot,
    WaitCode.RESERVED: _reserved,
    WaitCode.HOLDS: _holds,
    WaitCode.PREEMPTING: _preempting,
    WaitCode.BEHIND: _behind,
}


# ---- words ------------------------------------------------------------------------------------------------------


def _need(job: JobView) -> str:
    return f"needs {job.gpus} x {_gib(job.required_bytes)}"


def _how_busy(numbers: Numbers) -> str:
    if "busy" not in numbers or "total" not in numbers:
        return "suitable devices are busy"
    return f"{numbers['busy']} of {numbers['total']} suitable devices are busy"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _amount(rate: float) -> str:
    return f"{rate:.2f}".rstrip("0").rstrip(".")


def _by(numbers: Numbers) -> str:
    return f", and it starts by {_clock(numbers['by'])}" if numbers.get("by") else ""


def _free_at(numbers: Numbers) -> str:
    return f"; a place is free by {_clock(numbers['free_at'])} at the latest" if numbers.get("free_at") else ""


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _span(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
