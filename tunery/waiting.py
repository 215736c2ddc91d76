"""Why a job waits, in words, and what would help: each code has one sentence, filled with the numbers of the moment.

code                            its numbers, all optional; times are seconds since the epoch
too_large                       largest (bytes of the largest device), most (devices on one node that would do)
no_such_place                   wanted: "h100-80gb, rack=b"
unavailable                     nodes, why: "1 cordoned, 2 silent"
blocked                         why
project_cap, organization_cap   used, cap, needs: rates; counts: that of the devices that are free now
running_limit                   running, most
busy                            busy, total, ahead, free_at
fragmented                      free, most (on one node), free_at
no_slot                         busy, total
reserved                        until, limit_s: with that limit it would be let in
holds, preempting               by
behind                          depth, ahead
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tunery.contracts.scheduling import JobView, Reason, WaitCode, shape

GB = 10**9
"""As `tunery gpus` and every other table counts; a device is not called larger in one place than in another."""
MINUTE_S = 60
Numbers = Mapping[str, Any]


def message(reason: Reason, job: JobView, now: float | None = None) -> str:
    """For the job's owner. Other projects' jobs are counted, never named. `now`: seconds since the epoch."""
    numbers = {"now": time.time() if now is None else now, **dict(reason.numbers)}
    return _SENTENCES[reason.code](_need(job), numbers)


def ahead(own: int, others: int) -> str:
    """`; 2 jobs of your project and 3 of others are ahead`: the end of a sentence, empty where nobody is."""
    told = [_count(own, "job") + " of your project"] if own else []
    if others:
        told.append(f"{others} of other projects" if told else _count(others, "job") + " of other projects")
    return f"; {' and '.join(told)} {_are(own + others)} ahead" if told else ""


def advice(reason: Reason, job: JobView) -> list[str]:
    """What its owner, or an operator, could change; each a sentence that is true of this job now."""
    numbers = dict(reason.numbers)
    help_for = _ADVICE.get(reason.code)
    return [*(help_for(job, numbers) if help_for else ()), *_choices(reason.code, job)]


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
        return f"{need}, but no node has more than {_count(numbers['most'], 'such device')}"
    largest = (
        f"the largest device that is up has {_gb(numbers['largest'])}" if "largest" in numbers else "none has that"
    )
    return f"{need}, but {largest}"


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
        if _never_fits(numbers):
            return f"{need}; your {whose} may use {cap} GPUs at once, which is less"
        free = f"; the devices that are free count as {_amount(numbers['counts'])}" if "counts" in numbers else ""
        return f"{need}; your {whose} uses {used} of the {cap} GPUs that it may use at once{free}"

    return sentence


def _never_fits(numbers: Numbers) -> bool:
    """It asks for more than the cap, whoever else runs."""
    return numbers.get("needs", 0) > numbers.get("cap", math.inf)


def _running_limit(_need: str, numbers: Numbers) -> str:
    if "most" not in numbers:
        return "your project has as many running jobs as it may have"
    if not numbers["most"]:
        return "your project may run no jobs: an operator has set its limit to 0"
    return f"your project has {numbers.get('running', numbers['most'])} of at most {numbers['most']} running jobs"


def _busy(need: str, numbers: Numbers) -> str:
    ahead = (
        f" and {_count(numbers['ahead'], 'waiting job')} {_are(numbers['ahead'])} ahead" if "ahead" in numbers else ""
    )
    return f"{need}; {_how_busy(numbers)}{ahead}{_free_at(numbers)}"


def _fragmented(need: str, numbers: Numbers) -> str:
    free = (
        f"{_count(numbers['free'], 'suitable device')} {_are(numbers['free'])} free"
        if "free" in numbers
        else "enough devices are free"
    )
    most = f", at most {numbers['most']} on one node" if "most" in numbers else ", but not on one node"
    return f"{need}; {free}{most}{_free_at(numbers)}"


def _no_slot(need: str, numbers: Numbers) -> str:
    return f"{need}; {_how_busy(numbers)}, and the nodes of the others run as many attempts as they may"


def _reserved(need: str, numbers: Numbers) -> str:
    until = f" until {_clock(numbers['until'], numbers['now'])}" if numbers.get("until") else ""
    limit_s = numbers.get("limit_s")
    shorter = f"; with a time limit of {_span(limit_s)} it would be let in before" if limit_s else ""
    return f"{need}; the free devices are kept for a job ahead of it{until}{shorter}"


def _holds(need: str, numbers: Numbers) -> str:
    kept = need.removeprefix("needs ")
    return f"it is next: {kept} {'is' if kept.startswith('1 ') else 'are'} kept for it{_by(numbers)}"


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


# ---- what would help --------------------------------------------------------------------------------------------


def _shorter(_job: JobView, numbers: Numbers) -> Sequence[str]:
    limit_s = numbers.get("limit_s") or 0
    return [f"A time limit of {_span(limit_s)} or less would let it in before."] if limit_s >= MINUTE_S else []


def _smaller(job: JobView, numbers: Numbers) -> Sequence[str]:
    if numbers.get("most"):
        return [f"Ask for {_count(numbers['most'], 'GPU')} or fewer; no node has more that would do."]
    less = "A smaller base model, max_length or per_device_train_batch_size needs less memory."
    return [less, "Without the class it may find a larger device."] if job.gpu_class else [less]


def _fewer(_job: JobView, numbers: Numbers) -> Sequence[str]:
    most = numbers.get("most")
    return [f"{_count(most, 'GPU')} on one node would be free now."] if most else []


def _elsewhere(_job: JobView, _numbers: Numbers) -> Sequence[str]:
    return ["Leave out the class or the labels that no node has; `tunery gpus` shows what there is."]


def _under_cap(whose: str, numbers: Numbers) -> Sequence[str]:
    if _never_fits(numbers):
        return ["An operator has to raise the cap, or the job to ask for fewer GPUs."]
    return [f"It starts as your {whose}'s jobs end; an operator may raise the cap."]


_ADVICE: dict[WaitCode, Callable[[JobView, Numbers], Sequence[str]]] = {
    WaitCode.RESERVED: _shorter,
    WaitCode.TOO_LARGE: _smaller,
    WaitCode.FRAGMENTED: _fewer,
    WaitCode.NO_SUCH_PLACE: _elsewhere,
    WaitCode.NO_NODE: lambda _job, _numbers: ["An operator has to bring a node up; `tunery nodes` shows them."],
    WaitCode.UNAVAILABLE: lambda _job, _numbers: ["An operator has to return a node; `tunery nodes` shows them."],
    WaitCode.BLOCKED: lambda _job, _numbers: ["`tunery budget show` shows the numbers; an operator may raise it."],
    WaitCode.PROJECT_CAP: lambda _job, numbers: _under_cap("project", numbers),
    WaitCode.ORGANIZATION_CAP: lambda _job, numbers: _under_cap("organization", numbers),
    WaitCode.RUNNING_LIMIT: lambda _job, numbers: [
        "An operator may raise the limit; `tunery project show` shows it."
        if numbers.get("most") == 0
        else "It starts when one of your project's jobs ends."
    ],
}


def _choices(code: WaitCode, job: JobView) -> Sequence[str]:
    """What it asks for that others do without."""
    if code not in (WaitCode.BUSY, WaitCode.FRAGMENTED, WaitCode.RESERVED, WaitCode.NO_SLOT):
        return []
    found: list[str] = []
    if job.gpus > 1 and code is not WaitCode.NO_SLOT:
        found.append(f"Fewer than {job.gpus} GPUs find room sooner: they need not be free on one node at one time.")
    if job.gpu_class is not None:
        found.append(f"Without the class {job.gpu_class} any GPU with the memory would do.")
    if job.labels:
        found.append("Without its node labels any node would do.")
    if not job.shareable and job.gpus == 1:
        found.append("--shareable lets it run beside your project's other shareable jobs.")
    return found


# ---- words ------------------------------------------------------------------------------------------------------


def _need(job: JobView) -> str:
    if job.gpus == 1:
        return f"needs 1 GPU with {_gb(job.required_bytes)}"
    return f"needs {job.gpus} GPUs with {_gb(job.required_bytes)} each on one node"


def _how_busy(numbers: Numbers) -> str:
    if "busy" not in numbers or "total" not in numbers:
        return "suitable devices are busy"
    return f"{numbers['busy']} of {numbers['total']} suitable devices are busy"


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _amount(rate: float) -> str:
    return f"{rate:.2f}".rstrip("0").rstrip(".")


def _by(numbers: Numbers) -> str:
    return f", and it starts by {_clock(numbers['by'], numbers['now'])}" if numbers.get("by") else ""


def _free_at(numbers: Numbers) -> str:
    return (
        f"; a place is free by {_clock(numbers['free_at'], numbers['now'])} at the latest"
        if numbers.get("free_at")
        else ""
    )


def _clock(at: float, now: float) -> str:
    """`10:45 UTC (in 41 min)`; with its date where that is another day."""
    then, today = datetime.fromtimestamp(at, UTC), datetime.fromtimestamp(now, UTC)
    text = then.strftime("%H:%M UTC" if then.date() == today.date() else "%Y-%m-%d %H:%M UTC")
    return f"{text} (in {_span(at - now)})" if at - now >= MINUTE_S else f"{text} (any moment)"


def _span(seconds: float) -> str:
    minutes = int(seconds // MINUTE_S)
    if minutes >= 48 * 60:
        return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
