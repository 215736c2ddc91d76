"""Puts a trainer behind walls, then becomes it: `python -I -S launcher.py PLAN`, PLAN being what `walls.py` made.

It imports next to nothing, because every trainer waits for it: no pathlib, json, socket or signal, each of which costs
more than all the walls. It runs before anything a tenant has influence on.

With namespaces there are three processes: this one, which waits outside; the first process of the namespace, which
reaps; and the trainer. Kill any of the three and the kernel ends all.

Exit code: the trainer's own; 128 + N when signal N ended it; 70 when a wall could not be put up.
"""

from __future__ import annotations

import ctypes
import fcntl
import marshal
import os
import resource
import select
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

EXIT_OURS = 70
_SIGKILL = 9
_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_USER, _NEW_MOUNTS, _NEW_PROCESSES, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x20000, 0x20000000, 0x40000000, 0x8000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_SLAVE = 1, 2, 4, 8, 4096, 16384, 1 << 19
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_PROC_READ_ONLY = ("sys", "sysrq-trigger", "irq", "bus", "fs")


def main(plan: dict[str, Any]) -> NoReturn:
    parent = plan.get("parent") or os.getppid()
    _follow(parent)
    _unshare(plan)
    if plan.get("network"):
        _loopback_up()
    if plan.get("processes"):
        parent = _become_first_process()
        if plan.get("view"):
            _see(plan)
        _reap_for_child()
        parent = 1
    _confine(plan, parent)
    os.environ.update(plan.get("set") or {})
    os.environ["TUNERY_SUPERVISOR_PID"] = str(parent)  # as the trainer sees it
    os.chdir(plan["cwd"])
    os.execv(plan["argv"][0], plan["argv"])  # noqa: S606 - the point of it


def _follow(parent: int) -> None:
    """Die with `parent`, at once if it has gone already."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_OURS)


def _call(what: str, result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# ---- namespaces ---------------------------------------------------------------------------------------------------


def _unshare(plan: dict[str, Any]) -> None:
    flags = _NEW_NETWORK if plan.get("network") else 0
    if plan.get("processes"):
        flags |= _NEW_PROCESSES | _NEW_MOUNTS | _NEW_IPC
    if plan.get("user_namespace"):
        flags |= _NEW_USER
    if not flags:
        return
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", _LIBC.unshare(flags))
    if plan.get("user_namespace"):
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")


def _loopback_up() -> None:
    """A fresh network namespace has one interface, down; processes of one trainer talk over it."""
    any_socket = _call("socket", _LIBC.socket(2, 2, 0))  # AF_INET, SOCK_DGRAM
    request = struct.pack("16sH14s", b"lo", 0x1 | 0x40, b"")  # IFF_UP | IFF_RUNNING
    fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS
    os.close(any_socket)


def _become_first_process() -> int:
    """Fork into the new process namespace. The caller goes on as its first process; the other one waits here."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(read)
        _end_like(os.waitpid(child, 0)[1])
    os.close(write)
    _LIBC.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    poll = select.poll()
    poll.register(read, select.POLLIN)
    if poll.poll(0):  # its only writer went before we had asked to go with it
        os._exit(EXIT_OURS)
    return 0


def _reap_for_child() -> None:
    """Fork again: the child becomes the trainer; we collect whatever ends until the trainer does."""
    child = os.fork()
    if not child:
        return
    _LIBC.prctl(_PR_SET_DUMPABLE, 0)
    _drop_bounds()
    _clear_capabilities()
    while True:
        pid, status = os.wait()
        if pid == child:
            _end_like(status)  # and the kernel kills what is left in the namespace


def _end_like(status: int) -> NoReturn:
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


# ---- what it sees of the disk -------------------------------------------------------------------------------------


def _see(plan: dict[str, Any]) -> None:
    _mount(None, "/", None, _MS_REC | _MS_SLAVE)
    (_see_open if plan["view"] == "open" else _see_closed)(plan)


def _see_closed(plan: dict[str, Any]) -> None:
    """A new root with nothing but what the plan names, at the paths it has outside."""
    root = plan["scratch"]
    steps = _held(plan)
    devices = [(path, _hold(path)) for path in (*(f"/dev/{one}" for one in _DEVICES), *plan["devices"])]
    private = _hold(plan["scratch"])
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID, "mode=0755,size=16m")
    for each in ("proc", "dev", "tmp"):
        os.mkdir(f"{root}/{each}")
    _bind(private, root, "/tmp")  # noqa: S108 - the trainer's own, on the workspace's disk
    _take(steps, root)
    for link, target in plan["links"].items():
        _make_parents(root, link)
        os.symlink(target, root + link)
    _devices(root, devices)
    _proc(f"{root}/proc")
    _read_only(root, recursive=False)
    os.chdir(root)
    _call("pivot_root", _LIBC.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."))
    _call("umount", _LIBC.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _see_open(plan: dict[str, Any]) -> None:
    """Everything as outside but read-only, with the hidden folders empty and other processes unseen."""
    steps = _held(plan)
    _read_only("/", recursive=True)
    _take(steps, "")
    _proc("/proc")


def _held(plan: dict[str, Any]) -> list[tuple[str, str, int]]:
    """What to mount, a folder before what lies in it, each opened before anything is mounted over it."""
    found = [(kind, path, _hold(path)) for kind, path in plan["steps"]]
    return [(kind, path, descriptor) for kind, path, descriptor in found if descriptor is not None]


def _take(steps: list[tuple[str, str, int]], root: str) -> None:
    for kind, path, descriptor in steps:
        if kind == "hide":
            _hide(root + path)
        else:
            # what a workspace has mounted below it is our own new root: not to be had twice
            _bind(descriptor, root, path, recursive=kind == "read")
    for kind, path, _ in steps:
        if kind == "write":
            _writable(root + path)
        else:
            _read_only(root + path, recursive=kind == "read")
    for kind, path, _ in steps:
        if kind == "write":  # it may lie in what was just closed
            _writable(root + path)


def _hide(path: str) -> None:
    if os.path.isdir(path):
        _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    else:
        _mount("/dev/null", path, None, _MS_BIND)


def _hold(path: str) -> int | None:
    """A handle that stays good when something is mounted over the path."""
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _bind(descriptor: int | None, root: str, path: str, *, recursive: bool = False) -> None:
    inside = root + path
    _make_parents(root, path)
    if not os.path.exists(inside):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    _mount(f"/proc/self/fd/{descriptor}", inside, None, _MS_BIND | (_MS_REC if recursive else 0))


def _devices(root: str, held: list[tuple[str, int | None]]) -> None:
    for path, descriptor in held:
        if descriptor is not None:
            _bind(descriptor, root, path)
    shared = f"{root}/dev/shm"  # noqa: S108 - the trainer's own
    os.mkdir(shared)
    _mount("tmpfs", shared, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")
    for name, target in {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        os.symlink(f"/proc/self/{target}", f"{root}/dev/{name}")


def _proc(where: str) -> None:
    _mount("proc", where, "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    for name in _PROC_READ_ONLY:
        if os.path.exists(path := f"{where}/{name}"):
            _mount(path, path, None, _MS_BIND | _MS_REC)
            _read_only(path, recursive=True)


def _make_parents(root: str, path: str) -> None:
    """Folders on the way that anybody may walk through: a clone under a closed home is reachable here."""
    os.makedirs(os.path.dirname(root + path), exist_ok=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    given = None if options is None else options.encode()
    _call(f"mount {target}", _LIBC.mount(*words, ctypes.c_ulong(flags), given))


def _read_only(path: str, *, recursive: bool) -> None:
    _set_attributes(path, struct.pack("QQQQ", _MS_RDONLY, 0, 0, 0), _AT_RECURSIVE if recursive else 0)


def _writable(path: str) -> None:
    if os.path.exists(path):
        _set_attributes(path, struct.pack("QQQQ", _MS_NOSUID | _MS_NODEV, _MS_RDONLY, 0, 0), 0)


def _set_attributes(path: str, attributes: bytes, flags: int) -> None:
    done = _LIBC.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, attributes, len(attributes))
    _call(f"mount_setattr {path} (Linux 5.12 or later)", done)


# ---- the process itself -------------------------------------------------------------------------------------------


def _confine(plan: dict[str, Any], parent: int) -> None:
    for name, most in (plan.get("limits") or {}).items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (value, value))
    _write("/proc/self/oom_score_adj", "1000")  # when memory runs out, it goes first
    _drop_bounds()
    if (uid := plan.get("uid")) is not None:
        os.setgroups([])
        os.setresgid(plan["gid"], plan["gid"], plan["gid"])
        os.setresuid(uid, uid, uid)
    _clear_capabilities()
    _follow(parent)  # again: a change of uid clears it
    os.umask(0o077)
    _call("no_new_privs", _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if plan.get("filter"):
        from_filter = ctypes.create_string_buffer(bytes.fromhex(plan["filter"]))
        program = struct.pack("HxxxxxxQ", len(from_filter.raw) // 8, ctypes.addressof(from_filter))
        _call("seccomp", _LIBC.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0))


def _drop_bounds() -> None:
    """Nothing that is executed from here on can hold a capability, not even as uid 0."""
    number = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1


def _clear_capabilities() -> None:
    header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", _LIBC.syscall(_SYS_CAPSET[os.uname().machine], header, data))


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    try:
        main(marshal.loads(bytes.fromhex(sys.argv[1])))  # noqa: S302 - ours, from the process that started us
    except Exception as error:  # noqa: BLE001 - the process edge; a trainer must not run with a wall missing
        sys.stderr.write(f"tunery isolation: {error}\n")
        sys.stderr.flush()
        os._exit(EXIT_OURS)
